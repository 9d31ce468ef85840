"""Tokenizers and embedding tables of different sizes: prompts are refused by name, drawn ids are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders.kit.columns import TextSource
from builders.next_token.config import NextTokenConfig
from builders.next_token.task import TASK as NEXT_TOKEN
from tests.runs_for_tests import run_trivia
from tests.serving_for_tests import ask, post, serving
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_tokenizer
from tracekit import TraceStore
from tracekit.config import ModelConfig, OutputConfig, PromptConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.model.answers import token_offsets
from tracekit.model.generation import GenerationConfig, answer_once
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.prompts import Prompter
from tracekit.model.vocabulary import check_rows, note_num_rows, say_missing_rows, token_strings
from tracekit.read.verifier import verify
from tracekit.run.runner import execute

NUM_TOKENS = len(tiny_tokenizer())


def resized(folder: Path, num_rows: int) -> Path:
    """A tiny checkpoint with a table of so many rows; ids past the tokenizer's are drawn often."""
    save_tiny_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        if num_rows > NUM_TOKENS:
            model.lm_head.weight[NUM_TOKENS:] = -2.0 * model.lm_head.weight[: num_rows - NUM_TOKENS]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as many rows as tokens."""
    return resized(tmp_path_factory.mktemp("models") / "padded", 2 * NUM_TOKENS)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `[PAD]` was added to the tokenizer alone, and stands in the configuration."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "short", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text()) | {"pad_token_id": NUM_TOKENS}
        (folder / name).write_text(json.dumps(settings))
    return folder


def loaded(folder: Path, **settings: Any) -> Any:
    config = ModelConfig(model=str(folder), device="cpu", **settings)
    return load_model(config, model_info(config, variant="base"), load_tokenizer(config), ("hidden_states",))


@pytest.mark.parametrize("num_samples", [1, 4])
def test_ids_without_a_token_are_empty_strings_and_the_run_goes_on(padded: Path, num_samples: int, tmp_path: Path):
    drawing = {"num_samples": num_samples, "trace_samples": True, "top_p": 1.0} if num_samples > 1 else {}
    run_trivia(tmp_path / "out", padded, generation=drawing, source={"limit": 6})
    store = TraceStore(tmp_path / "out")
    found = 0
    for sample in store:
        record = sample.record
        found += sum(i >= NUM_TOKENS for i in record.token_ids)
        assert [not token for token in record.tokens] == [i >= NUM_TOKENS for i in record.token_ids]
        assert record.token_offsets == sorted(record.token_offsets)
        assert record.token_offsets[-1][1] <= len(record.generated_text)
        assert sample.hidden_states().shape[1] == len(record.token_ids)
    assert found > 3
    assert not verify(tmp_path / "out").problems


def test_offsets_of_ids_without_a_token_are_empty_places():
    tokenizer = tiny_tokenizer()
    ids = [NUM_TOKENS + 9, *tokenizer("The quick fox").input_ids, NUM_TOKENS, NUM_TOKENS + 1]
    ids.insert(3, NUM_TOKENS + 5)
    offsets = token_offsets(tokenizer, ids)
    assert offsets[-1][1] == len("The quick fox")
    assert "".join("The quick fox"[a:b] for i, (a, b) in zip(ids, offsets, strict=True) if i < NUM_TOKENS) == (
        "The quick fox"
    )
    assert token_strings(tokenizer, [NUM_TOKENS]) == [""]


def test_the_server_outlives_ids_without_a_token(padded: Path, tmp_path: Path):
    with serving(tmp_path / "out", padded) as server:
        for seed in range(3):
            body = {"prompt": "The", "max_tokens": 8, "temperature": 1.0, "seed": seed, "logprobs": 3}
            assert post(server.url, body, "completions").status_code == 200
        beyond = {"prompt": [5, NUM_TOKENS + 3, 7], "max_tokens": 4, "temperature": 0}
        assert post(server.url, beyond, "completions").status_code == 200
        for wrong in (2 * NUM_TOKENS, 10**6):
            refused = post(server.url, beyond | {"prompt": [5, wrong]}, "completions")
            assert refused.status_code == 400
            assert str(wrong) in refused.text
    assert not verify(tmp_path / "out").problems
    assert any(i >= NUM_TOKENS for sample in TraceStore(tmp_path / "out") for i in sample.record.token_ids)


@pytest.mark.attack
def test_the_server_refuses_a_prompt_with_a_token_that_has_no_row(short: Path, tmp_path: Path):
    with serving(tmp_path / "out", short) as server:
        for answer in (ask(server.url, "Who [PAD]?"), post(server.url, {"prompt": "a [PAD]"}, "completions")):
            assert answer.status_code == 400
            assert "[PAD]" in answer.text
        assert ask(server.url, "Who?").status_code == 200


def test_a_prompt_with_a_token_that_has_no_row_is_refused_by_name(short: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"token '\[PAD\]' \(id {NUM_TOKENS}\).* {NUM_TOKENS} rows"):
        run_trivia(tmp_path / "out", short, prompt={"system": "Answer. [PAD]"})
    run_trivia(tmp_path / "out", short)
    config = ModelConfig(model=str(short))
    prompter = Prompter(load_tokenizer(config), PromptConfig(), default_system="")
    prompter.prompt("Who?")
    with pytest.raises(ConfigError, match=r"'\[PAD\]'"):
        prompter.prompt("Who is [PAD]?")


def test_a_text_with_a_token_that_has_no_row_is_refused_by_name(short: Path, tmp_path: Path):
    (tmp_path / "texts.txt").write_text("The [PAD] fox jumps.\n")
    config = NextTokenConfig(
        model=ModelConfig(model=str(short), device="cpu"),
        source=TextSource(source=str(tmp_path / "texts.txt")),
        output=OutputConfig(batch_size=2),
    )
    with pytest.raises(ConfigError, match=r"'\[PAD\]'"):
        execute(NEXT_TOKEN, config, tmp_path / "out")


def test_ids_past_the_table_are_never_an_index_error(short: Path):
    traced = loaded(short)
    with pytest.raises(ModelError, match=r"\[PAD\]"):
        traced.run(torch.tensor([[3, NUM_TOKENS]]))
    with pytest.raises(ConfigError, match=r"\[PAD\]"):
        answer_once(traced, [[3, NUM_TOKENS]], GenerationConfig(num_beams=1, max_new_tokens=2))
    answer_once(traced, [[3, 5], [3]], GenerationConfig(num_beams=1, max_new_tokens=2))


def test_tokens_without_a_row_are_said_on_loading(short: Path, capsys: pytest.CaptureFixture[str]):
    loaded(short)
    assert f"'[PAD]' ({NUM_TOKENS})" in capsys.readouterr().err


def test_equal_sizes_are_nothing_to_say(capsys: pytest.CaptureFixture[str]):
    tokenizer = tiny_tokenizer()
    say_missing_rows(tokenizer, NUM_TOKENS)
    assert not capsys.readouterr().err
    note_num_rows(tokenizer, NUM_TOKENS)
    check_rows(tokenizer, [0, NUM_TOKENS - 1])
    check_rows(tokenizer, [])
