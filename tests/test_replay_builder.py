"""Replay of answers from elsewhere: rows of every form, ids that are checked, the tensors of the run they are from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.kit.columns import TableSource
from builders.kit.sources import SourceRow
from builders.replay.answers import parse_row
from builders.replay.record import ReplayRecord
from builders.replay.task import TASK as REPLAY
from builders.replay.task import ReplayConfig
from builders.trivia_qa.record import TriviaQARecord
from tests.runs_for_tests import run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore, verify
from tracekit.config import CaptureConfig, ModelConfig, OutputConfig
from tracekit.errors import ConfigError, SourceError
from tracekit.records import Message
from tracekit.run.runner import Ended, execute


def row(**data: Any) -> SourceRow:
    return SourceRow(3, "here", data)


def replay(out: Path, checkpoint: Path, source: Path | str, **changes: Any) -> Ended:
    config = ReplayConfig(
        model=ModelConfig(model=str(checkpoint), device="cpu"),
        source=TableSource(source=str(source), split="train"),
        capture=CaptureConfig(sites=("hidden_states", "attentions"), num_replays=1),
        output=OutputConfig(samples_per_shard=4, batch_size=3),
        **changes,
    )
    return execute(REPLAY, config, out)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def answered(folder: Path) -> list[TriviaQARecord]:
    with TraceStore(str(folder)) as store:
        return [sample.record for sample in store]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", ["answer", "generation", "response", "output", "completion"])
def test_an_answer_is_found_under_any_of_its_names(name: str):
    found = parse_row(row(question="Why?", **{name: "So."}))
    assert (found.question, found.answer, found.example_id, found.finish_reason) == ("Why?", "So.", "3", "unknown")


def test_columns_that_are_missing_in_a_row_are_no_answers_and_whole_ids_are_integers():
    found = parse_row(row(id=17.0, question="Why?", prompt=float("nan"), answer="So.", token_ids=float("nan")))
    assert (found.example_id, found.question, found.prompt, found.answer) == ("17", "Why?", None, "So.")
    assert parse_row(row(id=float("nan"), question="Why?", answer="So.")).example_id == f"row-{row().index}"
    assert found.text == "Why?\nSo."


def test_engines_and_api_logs_are_read_in_their_own_forms():
    engine = parse_row(
        row(
            prompt="Q",
            prompt_token_ids=[1, 2],
            outputs=[{"text": "a", "token_ids": [3], "finish_reason": "length"}],
            model="org/m",
        )
    )
    assert (engine.prompt, engine.prompt_token_ids, engine.answer, engine.token_ids) == ("Q", [1, 2], "a", [3])
    assert (engine.finish_reason, engine.model) == ("length", "org/m")
    messages = [{"role": "user", "content": "Why?", "name": "me"}]
    log = parse_row(row(messages=messages, choices=[{"message": {"content": "So."}, "finish_reason": "stop"}], id="x"))
    assert (log.messages, log.answer, log.finish_reason) == ((Message(role="user", content="Why?"),), "So.", "stop")
    assert log.example_id == "x"
    whole = parse_row(row(messages=[*messages, {"role": "assistant", "content": "So."}]))
    assert (len(whole.messages), whole.answer) == (1, "So.")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"answer": "So."}, "no prompt; expected 'messages', 'question', 'prompt' or 'prompt_token_ids'"),
        ({"question": "Why?"}, "no answer; expected a text in 'answer'"),
        ({"question": "Why?", "answer": ""}, "no answer"),
        ({"question": "Why?", "prompt": "Why", "answer": "So."}, "two prompts: 'question' and 'prompt'"),
        ({"question": "Why?", "answer": "So.", "output": "So."}, "several texts: 'answer', 'output'"),
        ({"question": "Why?", "answer": ["So."]}, "'answer' is no text"),
        ({"question": "Why?", "token_ids": ["a"]}, "'token_ids' are no token ids"),
        ({"question": "Why?", "outputs": [{"text": "a"}, {"text": "b"}]}, "holds 2 answers"),
        ({"messages": "Why?", "answer": "So."}, "'messages' is no list"),
        ({"messages": [{"role": "tool", "content": "x"}], "answer": "So."}, "role 'tool'"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "answer": "So."},
            "two answers",
        ),
    ],
)
def test_a_row_that_does_not_say_what_is_prompt_and_what_answer_is_refused(data: dict[str, Any], message: str):
    with pytest.raises(SourceError, match=message):
        parse_row(row(**data))


@pytest.mark.parametrize("is_chat", [False, True])
def test_ids_of_a_run_give_its_own_tensors_again(tmp_path: Path, is_chat: bool):
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny", chat=is_chat)
    run_trivia(tmp_path / "run", checkpoint, capture={"sites": ("hidden_states", "attentions")})
    records = answered(tmp_path / "run")
    rows = [
        {
            "id": one.key,
            "prompt_token_ids": one.token_ids[: one.prompt_length],
            "token_ids": one.generated_token_ids,
            "finish_reason": one.finish_reason,
        }
        for one in records
    ]
    replay(tmp_path / "again", checkpoint, write_rows(tmp_path / "rows.jsonl", rows))
    assert verify(tmp_path / "again").problems == []
    with TraceStore(str(tmp_path / "run")) as old, TraceStore(str(tmp_path / "again")) as new:
        for one, sample in zip(records, new, strict=True):
            again = sample.record
            assert isinstance(again, ReplayRecord)
            assert (again.token_ids, again.prompt_length) == (one.token_ids, one.prompt_length)
            assert again.generated_token_ids == one.generated_token_ids
            assert again.example_id == one.key
            np.testing.assert_allclose(sample.hidden_states(), old.hidden_states(one.key), rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(sample.attention(layer=0), old.attention(one.key, layer=0), atol=1e-4)
            np.testing.assert_allclose(again.token_logprobs, one.token_logprobs, atol=1e-4)


def test_texts_are_tokenised_after_their_prompt_and_end_where_the_source_says(tmp_path: Path, model: Path):
    rows = [
        {"prompt": "One two", "answer": " three", "finish_reason": "stop"},
        {"prompt": "One two", "answer": " three", "finish_reason": "length"},
        {"question": "One?", "answer": "two\nthree"},
    ]
    replay(tmp_path / "run", model, write_rows(tmp_path / "rows.jsonl", rows))
    with TraceStore(str(tmp_path / "run")) as store:
        ended, cut, lines = (store[f"{i:06d}"].record for i in range(3))
    assert isinstance(ended, ReplayRecord)
    assert isinstance(cut, ReplayRecord)
    assert isinstance(lines, ReplayRecord)
    assert ended.generated_token_ids[:-1] == cut.generated_token_ids
    assert (ended.eos_included, cut.eos_included, cut.is_truncated) == (True, False, True)
    assert ended.generated_text.startswith("One two three")
    assert ended.generated_answer == cut.generated_answer == "three"
    assert (lines.finish_reason, lines.generated_answer) == ("unknown", "two\nthree")
    assert not lines.are_answer_ids_given


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"question": "One?", "token_ids": [10**6]}, "row 0, .*'token_ids' holds 1000000, and the tokenizer has"),
        ({"prompt_token_ids": [-1], "token_ids": [1]}, "'prompt_token_ids' holds -1"),
        ({"question": "One?", "token_ids": [5, 6], "answer": "zzz"}, "'token_ids' say .* the text beside them 'zzz'"),
        ({"prompt": "One", "prompt_token_ids": [5, 6], "answer": "a"}, "'prompt_token_ids' say .* beside them 'One'"),
    ],
)
def test_ids_of_another_model_are_refused(tmp_path: Path, model: Path, data: dict[str, Any], message: str):
    with pytest.raises(SourceError, match=message):
        replay(tmp_path / "run", model, write_rows(tmp_path / "rows.jsonl", [data]))
    assert not (tmp_path / "run").exists()


def test_the_sample_shows_every_form_and_a_source_has_to_be_named(tmp_path: Path):
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny", chat=True)
    outcome = replay(tmp_path / "run", checkpoint, "sample")
    assert outcome.manifest is not None
    assert outcome.manifest.splits[0].num_samples == 5
    with pytest.raises(ConfigError, match="name a file with prompts and answers"):
        replay(tmp_path / "other", checkpoint, "default")
