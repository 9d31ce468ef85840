"""The introspection builder: three passes, letters against plain transformers, adapters, what becomes of bad input."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import builders.introspection.tracer as introspection
import tracekit.run.worker as worker_module
from builders.introspection.config import PASSES, IntrospectionConfig
from builders.introspection.task import TASK as INTROSPECTION
from builders.introspection.task import single_passes
from builders.kit.columns import ChoiceSource
from tests import given_answers
from tests.hub_for_tests import TestHub
from tests.publishing_for_tests import REPO, publish
from tests.runs_for_tests import hashes, log_lines
from tests.tiny_checkpoint import save_tiny_checkpoint, save_tiny_gpt2
from tracekit import TraceStore, verify
from tracekit.cli import run_task
from tracekit.config import CaptureConfig, DrawConfig, ModelConfig, OutputConfig, ShotsConfig
from tracekit.errors import CaptureError, ConfigError, SourceError
from tracekit.format.layout import Layout
from tracekit.run.engine import LocalEngine
from tracekit.run.recheck import replay_stored
from tracekit.run.runner import Ended, execute

QUESTIONS = [
    {"id": "q1", "question": "Is ice cold?", "options": ["yes", "no", "maybe", "it is hot"], "answer": "A"},
    {
        "id": "q2",
        "question": "Which is not a colour?",
        "options": {"A": "red", "B": "blue", "C": "two", "D": "pink"},
        "answer": 2,
        "subject": "colours",
    },
    {
        "id": "q3",
        "question": "How many legs has a dog, usually?",
        "A": "1",
        "B": "2",
        "C": "3",
        "D": "4",
        "answer": "D",
    },
    {"id": "q4", "question": "Where?", "options": ["here", "there", "nowhere", "up"], "answer": 1},
]


def write_questions(path: Path, questions: Sequence[dict[str, Any]] = QUESTIONS) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


class Checkpoints(NamedTuple):
    llama: Path
    gpt2: Path
    questions: Path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")
    return Checkpoints(
        save_tiny_checkpoint(folder / "llama", chat=True),
        save_tiny_gpt2(folder / "gpt2", num_positions=640),
        write_questions(folder / "questions.jsonl"),
    )


def config_for(checkpoint: Path, questions: Path, /, **changes: Any) -> IntrospectionConfig:
    """A small configuration of all passes; dictionaries change a part, other values a setting."""
    parts = {
        "model": ModelConfig(model=str(checkpoint), device="cpu"),
        "source": ChoiceSource(source=str(questions), split="test"),
        "prompt": ShotsConfig(),
        "generation": DrawConfig(num_beams=1, max_new_tokens=4),
        "capture": CaptureConfig(sites=("hidden_states", "resid_post_mlp"), num_replays=1),
        "output": OutputConfig(samples_per_shard=3, batch_size=2),
    }
    settings = {name: value for name, value in changes.items() if name not in parts}
    changed: dict[str, Any] = {
        name: msgspec.structs.replace(part, **changes.get(name, {})) for name, part in parts.items()
    }
    return IntrospectionConfig(**changed, **settings)


def run_passes(out: Path, checkpoint: Path, questions: Path, /, **changes: Any) -> list[Ended]:
    """Every pass, one after the other, with the model loaded once."""
    engine = LocalEngine()
    return [
        execute(INTROSPECTION, part, out, engine=engine)
        for part in single_passes(config_for(checkpoint, questions, **changes))
    ]


class Made(NamedTuple):
    folder: Path
    checkpoint: Path

    def store(self, name: str) -> TraceStore:
        return TraceStore(str(self.folder), config=name)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("run") / request.param
    checkpoint = getattr(checkpoints, request.param)
    outcomes = run_passes(folder, checkpoint, checkpoints.questions)
    assert all(outcome.manifest is not None for outcome in outcomes)
    assert verify(folder).problems == []
    return Made(folder, checkpoint)


def letter_numbers(model: Any, tokenizer: Any, record: Any, joint: str) -> tuple[list[list[int]], list[float]]:
    """Ids of each letter after the prompt, and the sum of their log-probabilities, by plain transformers."""
    prompt = record.token_ids[: record.prompt_length]
    letters = [one.label for one in record.bins or record.options]
    all_ids, sums = [], []
    for letter in letters:
        whole = tokenizer(record.prompt + joint + letter, add_special_tokens=False).input_ids
        assert whole[: len(prompt)] == prompt
        ids = whole[len(prompt) :]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        sums.append(sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)))
        all_ids.append(ids)
    return all_ids, sums


@pytest.mark.parametrize("name", PASSES)
def test_every_number_is_that_of_plain_transformers(made: Made, name: str):
    plain = AutoModelForCausalLM.from_pretrained(made.checkpoint, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(made.checkpoint)
    lengths, scorings = set(), set()
    for sample in made.store(name):
        record = sample.record
        lengths.add(record.prompt_length)
        scorings.add(record.answer_scoring)
        forms = {joint + "A": letter_numbers(plain, tokenizer, record, joint) for joint in ("", " ")}
        masses = {form: float(np.exp(sums).sum()) for form, (_, sums) in forms.items()}
        assert record.answer_spelling == max(masses, key=lambda form: masses[form])
        ids, sums = forms[record.answer_spelling]
        assert record.answer_token_ids == ids
        assert record.answer_scoring == ("token" if all(len(one) == 1 for one in ids) else "sequence")
        np.testing.assert_allclose(record.logprobs, sums, atol=1e-4)
        assert record.allowed_mass == pytest.approx(masses[record.answer_spelling], rel=1e-4)
        other = next(mass for form, mass in masses.items() if form != record.answer_spelling)
        assert record.other_spelling_mass == pytest.approx(other, rel=1e-4)
        if record.answer_scoring == "token":
            with torch.no_grad():
                raw = plain(torch.tensor([record.token_ids[: record.prompt_length]])).logits[0, -1]
            np.testing.assert_allclose(record.logits, raw[[one[0] for one in ids]], atol=1e-4)
        else:
            assert record.logits == record.logprobs
        probs = np.exp(sums) / np.exp(sums).sum()
        np.testing.assert_allclose(record.probs, probs, atol=1e-5)
        assert record.entropy == pytest.approx(-(probs * np.log(probs)).sum(), abs=1e-4)
        assert record.pred_letter == "ABCDEFGH"[int(probs.argmax())]
        if name == "mcq":
            right = "ABCD".index(record.correct_answer_letter)
            wrong = max(value for i, value in enumerate(record.logits) if i != right)
            assert record.logit_margin == pytest.approx(record.logits[right] - wrong)
            assert record.is_pred_correct == (probs.argmax() == right)
            assert record.self_confidence is record.other_confidence is None
            assert record.bins == []
        else:
            expected = probs @ [2.5, 7.5, 15, 30, 50, 70, 85, 95]
            assert getattr(record, name) == pytest.approx(expected, abs=1e-3)
            others = {"self_confidence", "other_confidence"} - {name}
            assert getattr(record, others.pop()) is None
            assert record.logit_margin is record.is_correct is record.is_pred_correct is None
    assert len(lengths) > 1, "all prompts are of one length: nothing was padded"
    assert scorings <= {"token", "sequence"}


def test_a_tokenizer_that_splits_the_space_is_scored_by_sequences(made: Made):
    """The tiny tokenizer has no token for a space with a letter, so one of the two spellings is of two tokens."""
    record = made.store("mcq")[0].record
    tokenizer = AutoTokenizer.from_pretrained(made.checkpoint)
    assert len(tokenizer(" B", add_special_tokens=False).input_ids) == 2
    assert len(record.answer_token_ids[0]) == len(record.answer_spelling)


def test_every_site_is_that_of_plain_transformers(made: Made):
    plain = AutoModelForCausalLM.from_pretrained(made.checkpoint, attn_implementation="eager").eval()
    for name in PASSES:
        for sample in made.store(name):
            with torch.no_grad():
                output = plain(torch.tensor([sample.record.token_ids]), output_hidden_states=True)
            hidden = torch.stack(output.hidden_states)[:, 0].numpy()
            np.testing.assert_allclose(sample.hidden_states(), hidden, atol=1e-4)
            post = sample.resid(stage="post_mlp")
            assert post.shape == (2, len(sample.record.token_ids), 32)
            np.testing.assert_array_equal(post[0], sample.hidden_states(layer=1))
            inner: Any = getattr(plain, plain.base_model_prefix)
            final_norm = inner.norm if hasattr(inner, "norm") else inner.ln_f
            with torch.no_grad():
                after_norm = final_norm(torch.from_numpy(post[1].copy())).numpy()
            np.testing.assert_allclose(sample.hidden_states(layer=2), after_norm, atol=1e-4)


def test_outputs_are_those_of_plain_generation(made: Made):
    plain = AutoModelForCausalLM.from_pretrained(made.checkpoint).eval()
    for name in PASSES:
        for sample in made.store(name):
            record = sample.record
            prompt = torch.tensor([record.token_ids[: record.prompt_length]])
            ids = plain.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=2)
            assert ids[0].tolist() == record.token_ids
            with torch.no_grad():
                logprobs = plain(ids).logits[0].double().log_softmax(-1)
            answer = range(record.prompt_length, len(record.token_ids))
            expected = [logprobs[t - 1, record.token_ids[t]].item() for t in answer]
            np.testing.assert_allclose(record.token_logprobs, expected, atol=1e-4)


def test_passes_share_questions_keys_and_the_beginning_of_the_prompt(made: Made):
    stores = [made.store(name) for name in PASSES]
    assert stores[0].keys == stores[1].keys == stores[2].keys == ["000000", "000001", "000002", "000003"]
    for key in stores[0].keys:
        mcq, own, other = (store.record(key) for store in stores)
        assert mcq.question_id == own.question_id == other.question_id
        assert [mcq.prompt_type, own.prompt_type, other.prompt_type] == list(PASSES)
        shown = mcq.question_text + "".join(f"\n{option.label}. {option.text}" for option in mcq.options)
        prefix = mcq.prompt[: mcq.prompt.index(shown) + len(shown)]
        assert own.prompt.startswith(prefix)
        assert other.prompt.startswith(prefix)
        assert len({mcq.instruction_sha256, own.instruction_sha256, other.instruction_sha256}) == 3
        for record in (mcq, own, other):
            assert record.prompt_text in record.prompt
            assert record.prompt_text.startswith(shown)
            assert record.config == record.prompt_type
            assert record.model_name == record.model.id
            assert record.checkpoint_id == record.model.revision
            assert (record.temperature, record.top_p, record.max_new_tokens) == (1.0, 1.0, 4)
        assert "you would" in own.prompt_text
        assert "typical college-educated person" in other.prompt_text
        assert stores[0].by_prompt(mcq.question_text)[0].key == key
    assert stores[0].record("000001").subject == "colours"
    assert [stores[0].record(key).correct_answer_letter for key in stores[0].keys] == ["A", "C", "D", "B"]
    surface = [(r.question_type, r.has_negation, r.has_ambiguity) for r in map(stores[0].record, stores[0].keys)]
    assert surface == [
        ("other", False, False),
        ("which", True, False),
        ("how", False, True),
        ("where", False, False),
    ]


def saying(checkpoint: Path, *texts: str) -> Any:
    """In place of generation: outputs with these texts, in turn."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return given_answers.saying(*(tokenizer(text, add_special_tokens=False).input_ids for text in texts))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_an_output_names_is_judged_and_placed(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    checkpoint = getattr(checkpoints, name)
    monkeypatch.setattr(introspection, "answer_traced", saying(checkpoint, " A", "(B) for sure", " hm, no"))
    run_passes(
        tmp_path / "run", checkpoint, checkpoints.questions, output={"batch_size": 1}, generation={"max_new_tokens": 30}
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for config, where in (("mcq", "answer_token_index"), ("self_confidence", "confidence_token_index")):
        parsed = []
        for sample in TraceStore(str(tmp_path / "run"), config=config):
            record = sample.record
            parsed.append(record.parsed_answer)
            place = getattr(record, where)
            if record.parsed_answer is None:
                assert "no letter" in record.parse_failure
                assert place is None
                assert record.is_correct is None
            else:
                assert record.parse_failure is None
                assert place >= record.prompt_length
                assert record.parsed_answer in tokenizer.decode([record.token_ids[place]])
                if config == "mcq":
                    assert record.is_correct == (record.parsed_answer == record.correct_answer_letter)
                    assert record.confidence_token_index is None
        assert sorted(map(str, parsed)).count("None") in (1, 2)
        assert {"A", "B"} <= set(parsed)


def test_reasoning_that_does_not_end_is_named_as_the_reason(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(introspection, "answer_traced", saying(checkpoints.llama, "<think>A is"))
    run_passes(
        tmp_path / "run", checkpoints.llama, checkpoints.questions, passes=("mcq",), generation={"max_new_tokens": 30}
    )
    for sample in TraceStore(str(tmp_path / "run"), config="mcq"):
        assert sample.record.parsed_answer is None
        assert "reasoning did not end" in sample.record.parse_failure


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_options_are_shuffled_by_seed_alike_in_every_pass(made: Made, checkpoints: Checkpoints, tmp_path: Path):
    changes: dict[str, Any] = {"shuffle_options": True, "capture": {"sites": ("none",)}}
    run_passes(tmp_path / "one", made.checkpoint, checkpoints.questions, **changes)
    orders: dict[str, list[list[int]]] = {}
    for name, folder in (("plain", made.folder), ("one", tmp_path / "one")):
        passes = [TraceStore(str(folder), config=one) for one in PASSES]
        orders[name] = [passes[0].record(key).option_order for key in passes[0].keys]
        for key, order in zip(passes[0].keys, orders[name], strict=True):
            before = made.store("mcq").record(key)
            assert [store.record(key).option_order for store in passes] == [order] * 3
            record = passes[0].record(key)
            assert [option.text for option in record.options] == [before.options[i].text for i in order]
            assert [option.label for option in record.options] == list("ABCD")
            texts = {option.label: option.text for option in record.options}
            right = {option.label: option.text for option in before.options}[before.correct_answer_letter]
            assert texts[record.correct_answer_letter] == right
    assert orders["plain"] == [[0, 1, 2, 3]] * 4
    assert orders["one"] != orders["plain"]
    other = config_for(made.checkpoint, checkpoints.questions, passes=("mcq",), output={"seed": 5}, **changes)
    assert [one.order for one in INTROSPECTION.examples(other).examples] != orders["one"]


def test_sampled_outputs_are_drawn_by_question_and_recorded(checkpoints: Checkpoints, tmp_path: Path):
    sampled = {"do_sample": True, "passes": ("mcq",), "capture": {"sites": ("none",)}}
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 50}
    for name, size, extra in (("one", 1, sampled), ("four", 4, sampled), ("greedy", 4, sampled | {"do_sample": False})):
        run_passes(
            tmp_path / name, checkpoints.llama, checkpoints.questions, generation=settings,
            output={"batch_size": size}, **extra,
        )  # fmt: skip
    one, four, greedy = (TraceStore(str(tmp_path / name), config="mcq") for name in ("one", "four", "greedy"))
    assert [s.record.token_ids for s in one] == [s.record.token_ids for s in four]
    assert [s.record.token_ids for s in one] != [s.record.token_ids for s in greedy]
    record = one[0].record
    assert (record.temperature, record.top_p, record.generation.do_sample, record.generation.top_k) == (
        0.7,
        0.9,
        True,
        50,
    )
    assert (greedy[0].record.temperature, greedy[0].record.top_p) == (1.0, 1.0)
    np.testing.assert_allclose(one[0].record.logprobs, greedy[0].record.logprobs, atol=1e-4)


def test_bins_are_configurable(checkpoints: Checkpoints, tmp_path: Path):
    run_passes(
        tmp_path / "run",
        checkpoints.llama,
        checkpoints.questions,
        passes=("self_confidence",),
        bin_edges=(0, 25, 75, 100),
        bin_midpoints=(10, 50, 100),
    )
    for sample in TraceStore(str(tmp_path / "run"), config="self_confidence"):
        record = sample.record
        assert [(b.label, b.low, b.high, b.midpoint) for b in record.bins] == [
            ("A", 0, 25, 10),
            ("B", 25, 75, 50),
            ("C", 75, 100, 100),
        ]
        assert "A. under 25 %\nB. 25 to 75 %\nC. over 75 %" in record.prompt
        assert len(record.probs) == 3
        assert record.self_confidence == pytest.approx(np.dot(record.probs, [10, 50, 100]))


def test_a_source_without_answers_is_not_judged(checkpoints: Checkpoints, tmp_path: Path):
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in QUESTIONS]
    path = write_questions(tmp_path / "rows.jsonl", rows)
    outcomes = run_passes(tmp_path / "run", checkpoints.llama, path, passes=("mcq",))
    for sample in TraceStore(str(tmp_path / "run"), config="mcq"):
        record = sample.record
        assert (
            record.correct_answer_letter is record.is_correct is record.is_pred_correct is record.logit_margin is None
        )
        assert record.pred_letter in "ABCD"
    assert outcomes[0].manifest is not None
    assert "accuracy" not in {metric.name for metric in outcomes[0].manifest.metrics}


def test_bad_rows_and_repeated_ids_are_named_or_skipped(checkpoints: Checkpoints, tmp_path: Path):
    five = {"question": "Five?", "options": ["a", "b", "c", "d", "e"], "answer": 0}
    path = write_questions(tmp_path / "rows.jsonl", [QUESTIONS[0], five, QUESTIONS[0], QUESTIONS[3]])
    with pytest.raises(SourceError, match=r"rows\.jsonl.*line 2.*5 options; expected four"):
        run_passes(tmp_path / "run", checkpoints.llama, path)
    outcomes = run_passes(tmp_path / "run", checkpoints.llama, path, source={"on_bad_row": "skip"})
    for name, outcome in zip(PASSES, outcomes, strict=True):
        assert outcome.manifest is not None
        assert len(outcome.manifest.source.skipped) == 2
        assert TraceStore(str(tmp_path / "run"), config=name).keys == ["000000", "000003"]
    again = write_questions(tmp_path / "again.jsonl", [QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(SourceError, match=r"row 1 \(counted from 0\): id 'q1' is that of row 0"):
        run_passes(tmp_path / "two", checkpoints.llama, again)


def test_a_question_that_is_too_long_for_one_pass_is_left_out_of_all(checkpoints: Checkpoints, tmp_path: Path):
    """The confidence passes have longer prompts, so that questions near the limit fit the first pass alone."""
    rows = [QUESTIONS[0] | {"id": f"q{n}", "question": "long " * n + "?"} for n in range(10, 250, 24)]
    path = write_questions(tmp_path / "rows.jsonl", [*rows, QUESTIONS[0] | {"id": "x", "question": "endless " * 10**5}])
    changes: dict[str, Any] = {"source": {"on_bad_row": "skip"}, "capture": {"sites": ("none",), "num_replays": 0}}
    run_passes(tmp_path / "run", checkpoints.gpt2, path, **changes)
    keys = {name: TraceStore(str(tmp_path / "run"), config=name).keys for name in PASSES}
    assert keys["mcq"] == keys["self_confidence"] == keys["other_confidence"]
    assert 0 < len(keys["mcq"]) < len(rows)
    (alone,) = run_passes(tmp_path / "alone", checkpoints.gpt2, path, passes=("mcq",), **changes)
    assert TraceStore(str(tmp_path / "alone"), config="mcq").keys == keys["mcq"]
    assert alone.manifest is not None
    num_left_out = len(rows) + 1 - len(keys["mcq"])
    assert alone.manifest.source.left_out == f"0 malformed, {num_left_out} too long"
    assert all(": too long: it" in one for one in alone.manifest.source.skipped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": ("mcq", "mcq")}, r"'mcq mcq' - at `\$\.passes`"),
        ({"passes": ()}, r"at `\$\.passes`; expected one or more of mcq"),
        ({"prompt": {"num_shots": 2}}, r"--num-shots 2 - at `\$\.prompt\.num_shots`"),
        ({"generation": {"num_beams": 2}, "do_sample": True}, r"num_beams"),
        ({"bin_edges": (0, 50, 40, 100)}, r"0 50 40 100 - at `\$\.bin_edges`"),
        ({"bin_midpoints": (1,)}, r"at `\$\.bin_midpoints`; expected 8"),
        ({"model": {"merge_adapter": True}}, r"at `\$\.model\.merge_adapter`; there is no adapter"),
    ],
)
def test_a_setting_without_meaning_is_refused_with_its_path(
    checkpoints: Checkpoints, tmp_path: Path, changes: dict[str, Any], message: str
):
    changes = {"passes": ("self_confidence",)} | changes
    with pytest.raises(ConfigError, match=message):
        run_passes(tmp_path / "run", checkpoints.llama, checkpoints.questions, **changes)
    assert not (tmp_path / "run" / "data").exists()


def test_solved_examples_end_in_their_letter(checkpoints: Checkpoints, tmp_path: Path):
    path = write_questions(tmp_path / "rows.jsonl", QUESTIONS[3:])
    run_passes(tmp_path / "run", checkpoints.gpt2, path, passes=("mcq",), prompt={"num_shots": 1})
    (sample,) = TraceStore(str(tmp_path / "run"), config="mcq")
    assert sample.record.prompt.count("Answer:") == 2
    assert sample.record.prompt.split("Answer:")[1].strip()[0] in "ABCD"


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_a_run_stopped_in_its_second_pass_ends_in_the_same_bytes(
    made: Made, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    append, calls = worker_module.ShardWriter.append, []

    def stop_after_four(self: Any, *args: Any, **kwargs: Any) -> None:
        append(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(worker_module.ShardWriter, "append", stop_after_four)
    arguments = ["--model", str(checkpoints.llama), "--source", str(checkpoints.questions), "--max-new-tokens", "4"]
    arguments += ["--samples-per-shard", "3", "--batch-size", "2", "--num-replays", "1", "--out", str(tmp_path / "run")]
    codes = []
    for _ in range(3):
        with pytest.raises(SystemExit) as ended:
            run_task(INTROSPECTION, [*arguments, "--device", "cpu"])
        codes.append(ended.value.code)
    assert codes == [130, 0, 0]
    assert hashes(tmp_path / "run") == hashes(made.folder)
    assert [len(log_lines(tmp_path / "run", name)) for name in PASSES] == [3, 3, 3], "a batch was computed again"


def test_the_model_is_loaded_once_for_all_passes(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own, calls = worker_module.load_model, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(worker_module, "load_model", counted)
    arguments = ["--model", str(checkpoints.llama), "--source", str(checkpoints.questions), "--max-new-tokens", "2"]
    with pytest.raises(SystemExit) as ended:
        run_task(
            INTROSPECTION, [*arguments, "--dataset-config", "intro", "--sites", "none", "--out", str(tmp_path / "run")]
        )
    assert ended.value.code == 0
    assert len(calls) == 1
    names = {path.name for path in (tmp_path / "run" / "data").iterdir()}
    assert names == {"intro_mcq", "intro_self_confidence", "intro_other_confidence"}


def test_a_dry_run_shows_every_pass_and_writes_nothing(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--model", str(checkpoints.llama), "--source", str(checkpoints.questions), "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        run_task(INTROSPECTION, [*arguments, "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("configuration")] == list(PASSES)
    assert not (tmp_path / "run").exists()


LOAD = """
import sys, datasets, tracekit
for name in sys.argv[2:]:
    rows = datasets.load_dataset(sys.argv[1], f"{name}_records", revision="v1.0.0", split="test")
    assert [row["json"]["prompt_type"] for row in rows] == [name] * 4
    flat = tracekit.load_dataset(sys.argv[1], name, revision="v1.0.0", split="test", layers=[1])
    print(len(flat), flat[0]["question_id"], flat[0]["hidden_states"].shape[0])
"""


def test_what_stops_a_later_pass_stops_the_run_before_the_first(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--model", str(checkpoints.llama), "--source", str(checkpoints.questions), "--max-new-tokens", "200"]
    for extra, message in ((["--bin-edges", "0", "50"], "--bin-edges 0 50"), ([], "the model has 512")):
        with pytest.raises(SystemExit) as ended:
            run_task(INTROSPECTION, [*arguments, *extra, "--out", str(tmp_path / "run")])
        assert ended.value.code == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_passes_are_published_as_configurations(made: Made, xet_hub: TestHub):
    publish(xet_hub, made.folder, "v1.0.0")
    done = xet_hub.python(LOAD, REPO, *PASSES)
    assert done.stdout.splitlines() == ["4 q1 1"] * 3


def test_the_card_has_every_pass_and_the_command_makes_the_run(made: Made):
    card = (made.folder / "README.md").read_text()
    for name in PASSES:
        assert f"## Configuration `{name}`" in card
        assert f"--passes {name}" in card
    assert "expected percent" in card
    assert "parse_failure_share" in card


def test_a_replay_holds_the_letters_against_the_model(made: Made, monkeypatch: pytest.MonkeyPatch):
    layout = Layout(made.folder, "self_confidence")
    right = replay_stored(layout, 2, model=str(made.checkpoint), adapter=None, device="cpu")
    assert {"logprobs", "hidden_states", "resid_post_mlp", "token_logprobs"} <= {error.site for error in right.sites}
    own = TraceStore.record

    def altered(self: TraceStore, key: str) -> Any:
        record: Any = own(self, key)
        return msgspec.structs.replace(record, logprobs=[value - 5 for value in record.logprobs])

    monkeypatch.setattr(TraceStore, "record", altered)
    with pytest.raises(CaptureError, match="logprobs differs"):
        replay_stored(layout, 2, model=str(made.checkpoint), adapter=None, device="cpu")


def test_an_adapter_changes_the_activations_merged_or_not_and_the_base_is_as_before(
    shared: Path, checkpoints: Checkpoints, tmp_path: Path
):
    base, adapter = shared / "models/stories260K-hf", shared / "models/stories260K-lora-wikitext"
    engine = LocalEngine()
    models: dict[str, dict[str, Any]] = {
        "before": {},
        "active": {"adapter": str(adapter)},
        "merged": {"adapter": str(adapter), "merge_adapter": True},
        "after": {},
    }
    for name, model in models.items():
        config = config_for(base, checkpoints.questions, model=model, passes=("mcq",))
        execute(INTROSPECTION, single_passes(config)[0], tmp_path / name, engine=engine)
        assert verify(tmp_path / name).problems == []
    stores = {name: TraceStore(str(tmp_path / name), config="mcq") for name in models}
    assert hashes(tmp_path / "before") == hashes(tmp_path / "after")
    last = {name: store.stack("resid_post_mlp", layer=4, tokens="last_prompt").values for name, store in stores.items()}
    np.testing.assert_allclose(last["active"], last["merged"], atol=1e-3)
    assert np.abs(last["active"] - last["before"]).max() > 0.01
    plain = AutoModelForCausalLM.from_pretrained(base)
    from peft import PeftModel

    wrapped: Any = PeftModel.from_pretrained(plain, adapter).eval()
    for sample in stores["active"]:
        with torch.no_grad():
            hidden = wrapped(torch.tensor([sample.record.token_ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(sample.hidden_states(layer=3), hidden[3][0].numpy(), atol=1e-4)
    ids = {name: store[0].record.checkpoint_id for name, store in stores.items()}
    assert ids["before"].startswith("sha256:")
    assert ids["active"].startswith("stories260K-lora-wikitext@sha256:")
    assert ids["merged"] == ids["active"] + " (merged)"
    replayed = replay_stored(Layout(tmp_path / "merged", "mcq"), 1, model=str(base), adapter=str(adapter), device="cpu")
    assert replayed.num_replayed == 1
