"""The TriviaQA builder: rows, prompts, answers, sampled answers and what stands in the records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders.kit.sources import SourceRow
from builders.trivia_qa.task import SAMPLE, parse_row
from builders.trivia_qa.task import TASK as TRIVIA_QA
from tests.runs_for_tests import hashes, run_trivia, trivia_config
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore, verify
from tracekit.analysis.diff import diff
from tracekit.analysis.stats import stats
from tracekit.errors import SourceError
from tracekit.model.prompts import Prompter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", chat=True)


def parsed(**data: object):
    return parse_row(SourceRow(index=7, where="here", data=data))


def test_the_own_nested_form_is_read():
    example = parsed(
        question="Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
        question_id="tc_1",
        answer={
            "value": "Sinclair Lewis",
            "aliases": ["Harry Sinclair Lewis", "Sinclair Lewis"],
            "type": "WikipediaEntity",
        },
    )
    assert example.example_id == "tc_1"
    assert example.answers == ["Sinclair Lewis", "Harry Sinclair Lewis"]


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        ({"answers": ["a", "b", "a"]}, ["a", "b"]),
        ({"answer": "a", "aliases": ["b"]}, ["a", "b"]),
        ({"answer": "a", "aliases": '["b", "c"]'}, ["a", "b", "c"]),
        ({"answers": "only"}, ["only"]),
        ({"answer": "a", "aliases": "[not json"}, ["a", "[not json"]),
        ({"answer": 8}, ["8"]),
        ({"answer": ["4", "four", 4]}, ["4", "four"]),
    ],
)
def test_answers_are_found_wherever_a_row_keeps_them(data: dict[str, object], answers: list[str]):
    assert parsed(question="Q?", **data).answers == answers


def test_the_flat_form_loses_prefix_and_suffix():
    example = parsed(
        context="Question: Who was the man behind The Chipmunks?\nAnswer:", answer="David Seville", aliases=[]
    )
    assert example.question == "Who was the man behind The Chipmunks?"
    assert example.example_id == "7"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"answers": ["a"]}, "no question"),
        ({"question": " ", "answers": ["a"]}, "no question"),
        ({"question": 3, "answers": ["a"]}, "found 3"),
        ({"question": "Q?"}, "no answer; expected"),
        ({"question": "Q?", "answers": []}, "no answer"),
        ({"question": "Q?", "answers": [None, " "]}, "no answer"),
    ],
)
def test_a_malformed_row_says_what_was_expected(data: dict[str, object], message: str):
    with pytest.raises(SourceError, match=message):
        parsed(**data)


def test_the_sample_has_sixty_questions_or_more_each_with_aliases():
    examples, info = TRIVIA_QA.examples(trivia_config(Path("demo"), source={"limit": None}))
    assert SAMPLE.exists()
    assert len(examples) >= 60
    assert len({example.question for example in examples}) == len(examples)
    assert all(example.answers for example in examples)
    assert info.revision.startswith("sha256:")


def test_the_slice_of_the_real_dataset_is_read(shared: Path):
    source = {"source": str(shared / "data/triviaqa/triviaqa_300.jsonl"), "limit": None}
    examples, info = TRIVIA_QA.examples(trivia_config(Path("demo"), source=source))
    assert len(examples) == info.num_rows == 300
    assert not any(e.question.startswith("Question:") or e.question.endswith("Answer:") for e in examples)


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    folder = tmp_path_factory.mktemp("run") / "run"
    run_trivia(folder, model, source={"limit": 6}, capture={"sites": ("all",)}, generation={"num_beams": 3})
    return TraceStore(str(folder))


def test_records_say_what_the_model_read_and_wrote(store: TraceStore, model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for sample in store:
        record = sample.record
        assert record.prompt == tokenizer.apply_chat_template(
            [
                {"role": "system", "content": record.prompt.split("<|system|>")[1].split("</s>")[0]},
                {"role": "user", "content": record.question},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = tokenizer(record.prompt, add_special_tokens=False).input_ids
        assert record.token_ids == ids + record.generated_token_ids
        assert record.prompt_length == len(ids) == record.last_prompt_index + 1
        assert record.generated_text == record.prompt + tokenizer.decode(record.generated_token_ids)
        assert record.generated_text.startswith(record.prompt)
        assert record.num_layers == 2
        assert record.key == f"{record.global_example_id:06d}"


def test_spans_hold_the_words_they_are_named_for(store: TraceStore):
    for sample in store:
        record = sample.record
        spans = {span.name: span for span in record.spans}
        for name, text in (("user", record.question), ("assistant_header", "<|assistant|>")):
            start = record.token_offsets[spans[name].start][0]
            stop = record.token_offsets[spans[name].stop - 1][1]
            assert text in record.generated_text[start:stop]


def test_log_probabilities_and_entropies_are_those_of_the_raw_model(store: TraceStore, model: Path):
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    for sample in store:
        record = sample.record
        with torch.no_grad():
            logprobs = plain(torch.tensor([record.token_ids])).logits[0].float().log_softmax(-1)
        positions = range(record.prompt_length - 1, len(record.token_ids) - 1)
        expected = [logprobs[p, record.token_ids[p + 1]].item() for p in positions]
        entropies = [-(logprobs[p].exp() * logprobs[p]).sum().item() for p in positions]
        np.testing.assert_allclose(record.token_logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(record.token_entropies, entropies, atol=1e-4)
        assert record.beam_score == pytest.approx(np.mean(expected), abs=1e-4)


def test_answers_that_are_cut_are_flagged_and_counted(store: TraceStore):
    for sample in store:
        record = sample.record
        assert record.is_truncated == (record.finish_reason == "length") == (not record.eos_included)
        if record.is_truncated:
            assert len(record.generated_token_ids) == 6


def test_right_and_wrong_with_the_rule_that_decided(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model, source={"limit": 3})
    record = TraceStore(str(tmp_path / "run")).record("000000")
    assert record.correctness_rule == "exact_match"
    assert record.is_correct == record.exact_match


def test_sampled_answers_keep_text_ids_and_log_probabilities(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "a", model, source={"limit": 4}, generation={"num_samples": 4, "temperature": 0.9})
    run_trivia(
        tmp_path / "b",
        model,
        source={"limit": 4},
        generation={"num_samples": 4, "temperature": 0.9},
        output={"batch_size": 1},
    )
    a, b = (TraceStore(str(tmp_path / name)) for name in "ab")
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    for sample in a:
        record = sample.record
        assert [answer.sample_index for answer in record.samples] == [1, 2, 3]
        assert [s.token_ids for s in record.samples] == [s.token_ids for s in b.record(record.key).samples]
        for answer in record.samples:
            ids = record.token_ids[: record.prompt_length] + answer.token_ids
            with torch.no_grad():
                logprobs = plain(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            start = record.prompt_length - 1
            expected = [logprobs[start + i, token].item() for i, token in enumerate(answer.token_ids)]
            np.testing.assert_allclose(answer.token_logprobs, expected, atol=1e-4)
    texts = [tuple(answer.token_ids) for sample in a for answer in sample.record.samples]
    assert len(set(texts)) > len(texts) // 2, "sampled answers hardly differ"


def test_sampled_answers_are_traced_where_asked_for(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model, source={"limit": 2}, generation={"num_samples": 3, "trace_samples": True})
    store = TraceStore(str(tmp_path / "run"))
    assert store.keys == ["000000", "000000_001", "000000_002", "000001", "000001_001", "000001_002"]
    assert verify(tmp_path / "run").problems == []
    for sample in store:
        record = sample.record
        assert record.question_id == store.record(record.key[:6]).question_id
        assert record.generation.do_sample == (record.sample_index > 0)
        assert sample.hidden_states().shape == (3, len(record.token_ids), 32)
    train, test = store.split(test_size=0.5)
    assert not {key[:6] for key in train} & {key[:6] for key in test}


def test_metrics_are_of_the_deterministic_answers(model: Path, tmp_path: Path):
    source, rule = {"limit": 4}, {"correctness": "alias_in_answer"}
    alone = run_trivia(tmp_path / "alone", model, source=source, **rule)
    drawn = {"num_samples": 4, "trace_samples": True, "temperature": 3.0}
    beside = run_trivia(tmp_path / "beside", model, source=source, generation=drawn, **rule)
    assert alone.manifest is not None
    assert beside.manifest is not None
    assert beside.manifest.splits[0].num_samples == 16
    assert beside.manifest.metrics == alone.manifest.metrics
    assert beside.manifest.figures.entropy_wrong == alone.manifest.figures.entropy_wrong
    before, after = (stats(tmp_path / name)[0] for name in ("alone", "beside"))
    assert (before.num_extra, after.num_extra) == (0, 12)
    assert (after.accuracy, after.num_judged) == (before.accuracy, 4)
    for one, other in zip(after.means, before.means, strict=True):  # prompts are read apart from the last token there
        assert (one.name, one.num) == (other.name, other.num)
        assert (one.mean, one.std) == pytest.approx((other.mean, other.std), rel=1e-4, abs=1e-5)
    (compared,) = diff(tmp_path / "alone", tmp_path / "beside").configs
    assert "12 drawn answers of b are left out; compare them with --where-b sample_index=1" in compared.notes
    assert (compared.num_common, compared.num_only_b) == (4, 0)
    (of_drawn,) = diff(
        tmp_path / "beside", tmp_path / "beside", where_a=["sample_index=1"], where_b=["sample_index=1"]
    ).configs
    assert of_drawn.num_common == 4


def test_solved_examples_are_drawn_by_seed_and_never_the_question_itself(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model, source={"limit": 5}, prompt={"num_shots": 2})
    for sample in TraceStore(str(tmp_path / "run")):
        record = sample.record
        assert record.prompt.count("<|user|>") == 3
        assert record.prompt.count(record.question) == 1
        assert "shots" in {span.name for span in record.spans}


def test_more_shots_than_questions_is_an_error(model: Path, tmp_path: Path):
    with pytest.raises(SourceError, match=r"--num-shots 72: the task has 71 solved examples .* use --num-shots 71"):
        run_trivia(tmp_path / "run", model, source={"limit": 5}, prompt={"num_shots": 72})


def test_a_bad_row_is_reported_or_skipped_and_counted(model: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "A?", "answers": ["a"]}\n{"question": "B?"}\n{"question": "C?", "answers": ["c"]}\n')
    with pytest.raises(SourceError, match=r"rows\.jsonl.*line 2.*no answer"):
        run_trivia(tmp_path / "run", model, source={"source": str(path)})
    outcome = run_trivia(tmp_path / "run", model, source={"source": str(path), "on_bad_row": "skip"})
    assert outcome.manifest is not None
    assert len(outcome.manifest.source.skipped) == 1
    assert TraceStore(str(tmp_path / "run")).keys == ["000000", "000002"]


def test_a_prompt_longer_than_the_model_reads_is_an_error_that_names_the_row(model: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "%s?", "answers": ["a"]}\n' % ("long " * 400))
    with pytest.raises(SourceError, match=r"row 0.*tokens.*512"):
        run_trivia(tmp_path / "run", model, source={"source": str(path)})


def test_a_row_that_is_too_long_is_counted_apart_and_never_tokenised_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [{"question": text, "answers": ["a"]} for text in ("A?", "long " * 400, "word " * 10**6, " ", "B?")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = Prompter.prompt
    seen: list[int] = []
    monkeypatch.setattr(Prompter, "prompt", lambda *a, **k: (seen.append(len(a[1])), prompt(*a, **k))[1])
    outcome = run_trivia(tmp_path / "run", model, source={"source": str(path), "on_bad_row": "skip"})
    assert max(seen) < 10_000
    assert outcome.manifest is not None
    source = outcome.manifest.source
    assert (source.num_rows, source.num_used, source.left_out) == (5, 2, "1 malformed, 2 too long")
    assert [one.split(": ")[:2] for one in source.skipped] == [
        ["rows.jsonl line 4", source.skipped[0].split(": ")[1]],
        ["rows.jsonl row 2", "too long"],
        ["rows.jsonl row 1", "too long"],
    ]
    assert "1 malformed, 2 too long" in (tmp_path / "run/README.md").read_text()
    assert "rows.jsonl row 2: too long: its text of 4999999 characters" in capsys.readouterr().err
    with pytest.raises(SourceError, match=r"row 2: too long.*pass --on-bad-row skip"):
        run_trivia(tmp_path / "all", model, source={"source": str(path), "limit": 1, "offset": 2})


@pytest.mark.parametrize(
    ("sites", "tokens"), [(("hidden_states",), "last"), (("attn", "qkv"), "answer"), (("none",), "all")]
)
def test_what_is_kept_can_be_chosen(model: Path, tmp_path: Path, sites: tuple[str, ...], tokens: str):
    run_trivia(
        tmp_path / "run", model, source={"limit": 3}, capture={"sites": sites, "tokens": tokens, "layers": ("-1",)}
    )
    assert verify(tmp_path / "run").problems == []


def test_half_precision_is_stored_as_it_is_computed(tmp_path: Path):
    model = save_tiny_checkpoint(tmp_path / "tiny", dtype="bfloat16")
    run_trivia(tmp_path / "run", model, source={"limit": 3})
    hidden = TraceStore(str(tmp_path / "run"))[0].hidden_states()
    assert str(hidden.dtype) == "bfloat16"
    run_trivia(tmp_path / "as32", model, source={"limit": 3}, capture={"store_dtype": "float32"})
    wide = TraceStore(str(tmp_path / "as32"))[0].hidden_states()
    np.testing.assert_array_equal(hidden.astype(np.float32), wide)


def test_int8_and_nf4_run_on_the_cpu(model: Path, tmp_path: Path):
    for quantize in ("int8", "nf4"):
        outcome = run_trivia(tmp_path / quantize, model, source={"limit": 3}, model={"quantize": quantize})
        assert outcome.manifest is not None
        assert outcome.manifest.model.quantization in ("int8(threshold=6)", "nf4")
        assert outcome.manifest.verification.num_replayed == 2  # of the first batch and of the last
    assert hashes(tmp_path / "int8") != hashes(tmp_path / "nf4")
