"""The CommonsenseQA builder for decoders: prompts, spelled options, scores against plain transformers, what is cut."""

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast

import tracekit.run.worker as worker_module
from builders.csqa.task import TASK as CSQA
from builders.csqa.task import CsqaConfig
from builders.kit.columns import ChoiceSource
from tests.runs_for_tests import hashes, log_lines
from tests.tiny_checkpoint import save_tiny_checkpoint, save_tiny_gpt2, tiny_tokenizer
from tracekit import TraceStore, verify
from tracekit.cli import run_task
from tracekit.config import ModelConfig, OutputConfig, PromptConfig, ReadingConfig, ShotsConfig
from tracekit.errors import CaptureError, ConfigError, SourceError
from tracekit.format.layout import Layout
from tracekit.model.continuations import answer_joint, continuation_ids
from tracekit.model.prompts import Prompter
from tracekit.run.recheck import replay_stored
from tracekit.run.runner import Ended, execute


def config_for(checkpoint: Path, /, max_seq_len: int | str = "auto", **sections: dict[str, Any]) -> CsqaConfig:
    parts = {
        "model": ModelConfig(model=str(checkpoint), device="cpu"),
        "source": ChoiceSource(source="sample", limit=5),
        "prompt": ShotsConfig(),
        "capture": ReadingConfig(num_replays=1),
        "output": OutputConfig(samples_per_shard=4, batch_size=2),
    }
    changed: dict[str, Any] = {
        name: msgspec.structs.replace(part, **sections.get(name, {})) for name, part in parts.items()
    }
    return CsqaConfig(**changed, max_seq_len=max_seq_len)  # pyright: ignore[reportArgumentType]


def run_csqa(out: Path, checkpoint: Path, /, max_seq_len: int | str = "auto", **sections: dict[str, Any]) -> Ended:
    return execute(CSQA, config_for(checkpoint, max_seq_len, **sections), out)


class Made(NamedTuple):
    """A finished run."""

    store: TraceStore
    checkpoint: Path
    folder: Path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": save_tiny_checkpoint(folder / "llama", chat=True),
        "gpt2": save_tiny_gpt2(folder / "gpt2"),
    }


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("run") / request.param
    outcome = run_csqa(folder, checkpoints[request.param], capture={"sites": ("all",)})
    assert outcome.manifest is not None
    assert verify(folder).problems == []
    return Made(TraceStore(str(folder)), checkpoints[request.param], folder)


def whole_logprob(model: Any, prompt: list[int], ids: list[int]) -> float:
    """Log-probability of ids after a prompt: one lone text, plain transformers."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))


def test_every_score_is_that_of_plain_transformers(made: Made):
    store, checkpoint, _ = made
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    lengths = set()
    for sample in store:
        record = sample.record
        lengths.add(len(record.token_ids))
        letters = [whole_logprob(plain, record.token_ids, ids) for ids in record.letter_token_ids]
        texts = [whole_logprob(plain, record.token_ids, ids) for ids in record.text_token_ids]
        np.testing.assert_allclose(record.letter_logprobs, letters, atol=1e-4)
        np.testing.assert_allclose(record.text_logprobs, texts, rtol=1e-5)
        per_token = [total / len(ids) for total, ids in zip(texts, record.text_token_ids, strict=True)]
        np.testing.assert_allclose(record.text_logprobs_normalized, per_token, rtol=1e-5)
        probs = np.exp(letters) / np.exp(letters).sum()
        np.testing.assert_allclose(record.letter_probs, probs, atol=1e-5)
        assert record.entropy == pytest.approx(-(probs * np.log(probs)).sum(), abs=1e-4)
        assert record.margin == pytest.approx(np.sort(probs)[-1] - np.sort(probs)[-2], abs=1e-5)
        assert record.pred_idx == int(np.argmax(probs))
        assert record.pred_idx_by_text == int(np.argmax(per_token))
    assert len(lengths) > 1, "all prompts are of one length: nothing was padded"


def test_every_site_is_that_of_plain_transformers(made: Made):
    store, checkpoint, _ = made
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    for sample in store:
        ids = torch.tensor([sample.record.token_ids])
        with torch.no_grad():
            output = plain(ids, output_hidden_states=True, output_attentions=True)
        hidden = torch.stack(output.hidden_states)[:, 0].numpy()
        np.testing.assert_allclose(sample.hidden_states(), hidden, atol=1e-4)
        np.testing.assert_allclose(sample.attention(layer=1, head=2), output.attentions[1][0, 2].numpy(), atol=1e-5)
        for layer in range(2):
            np.testing.assert_allclose(sample.resid(layer=layer, stage="pre_attn"), hidden[layer], atol=1e-4)


def test_labels_follow_from_options_and_source(made: Made):
    store, _, _ = made
    for sample in store:
        record = sample.record
        assert record.task_name() == "csqa"
        assert record.gold_label == record.choices[record.label_idx].label
        assert record.pred_label == record.choices[record.pred_idx].label
        assert record.is_correct == (record.pred_idx == record.label_idx)
        assert record.is_correct_by_text == (record.pred_idx_by_text == record.label_idx)
        assert record.num_truncated == 0
        assert record.prompt_length == len(record.token_ids) == record.last_prompt_index + 1
        assert record.first_answer_index is None
        assert record.generation.max_new_tokens == 0
        assert store.by_prompt(record.question)[0].key == record.key


def test_the_prompt_has_question_options_and_answer(made: Made):
    store, checkpoint, _ = made
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for sample in store:
        record = sample.record
        options = "".join(f"\n{choice.label}. {choice.text}" for choice in record.choices)
        assert f"{record.question}{options}\nAnswer:" in record.prompt
        assert tokenizer(record.prompt, add_special_tokens=False).input_ids == record.token_ids
        ends = {"chat": "\nAnswer:</s><|assistant|>", "base": "\nAnswer:"}
        assert record.prompt.endswith(ends[record.model.variant])
        user = next(span for span in record.spans if span.name == "user")
        start, stop = record.token_offsets[user.start][0], record.token_offsets[user.stop - 1][1]
        assert f"{record.question}{options}" in record.prompt[start:stop]


def test_options_are_spelled_as_they_follow_the_prompt(made: Made):
    store, checkpoint, _ = made
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for sample in store:
        record = sample.record
        joint = "" if record.model.variant == "chat" else " "
        for choice, letter, text in zip(record.choices, record.letter_token_ids, record.text_token_ids, strict=True):
            assert tokenizer.decode(letter) == joint + choice.label
            assert tokenizer.decode(text) == joint + choice.text
            whole = tokenizer(record.prompt + joint + choice.text, add_special_tokens=False).input_ids
            assert whole == record.token_ids + text


def test_a_letter_of_one_token_with_its_space_in_the_real_gpt2_tokenizer(shared: Path):
    tokenizer = GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    prompter = Prompter(tokenizer, PromptConfig(), default_system="")
    prompt = prompter.prompt("Where?\nA. bank\nB. new york")
    joint = answer_joint(prompter)
    assert joint == " "
    ids = continuation_ids(tokenizer, prompt.text, joint, ["A", "B", "new york"])
    assert [tokenizer.convert_ids_to_tokens(one) for one in ids] == [["ĠA"], ["ĠB"], ["Ġnew", "Ġy", "ork"]]


@pytest.mark.parametrize(
    ("template", "joint"),
    [
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", " "),
        ("{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}", "\n"),
    ],
)
def test_the_chat_template_tells_what_stands_before_an_answer(template: str, joint: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert answer_joint(Prompter(tokenizer, PromptConfig(), default_system="")) == joint


def test_a_template_that_rewrites_past_answers_gets_nothing_before_them():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>nothing to think about{% endif %}"
    )
    assert answer_joint(Prompter(tokenizer, PromptConfig(), default_system="")) == ""


def test_where_prompt_and_option_would_merge_the_option_is_tokenised_alone(shared: Path):
    tokenizer = GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    prompt = "It is sunf"
    merged = tokenizer(prompt + "lower").input_ids
    base = tokenizer(prompt).input_ids
    assert merged[: len(base)] != base, "choose words that merge"
    ids = continuation_ids(tokenizer, prompt, "", ["lower"])[0]
    assert tokenizer.decode(base + ids) == "It is sunflower"
    assert ids == tokenizer("lower").input_ids


def test_a_beginning_of_sequence_token_changes_no_spelling(checkpoints: dict[str, Path], tmp_path: Path):
    for bos in ("auto", "always"):
        run_csqa(tmp_path / bos, checkpoints["gpt2"], source={"limit": 2}, prompt={"bos": bos})
    without, with_bos = (TraceStore(str(tmp_path / bos)) for bos in ("auto", "always"))
    for key in without.keys:
        a, b = without.record(key), with_bos.record(key)
        assert b.token_ids == [tiny_tokenizer().bos_token_id, *a.token_ids]
        assert (a.letter_token_ids, a.text_token_ids) == (b.letter_token_ids, b.text_token_ids)


def test_the_beginning_of_the_question_is_cut_and_counted(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = {sample.key: sample.record for sample in made.store}
    needed = {
        key: len(record.token_ids) + max(map(len, [*record.letter_token_ids, *record.text_token_ids]))
        for key, record in whole.items()
    }
    limit = max(needed.values()) - 20
    capsys.readouterr()
    run_csqa(tmp_path / "cut", made.checkpoint, limit)
    assert verify(tmp_path / "cut").problems == []
    num_cut = 0
    for sample in TraceStore(str(tmp_path / "cut")):
        record, before = sample.record, whole[sample.key]
        assert len(record.token_ids) + max(map(len, [*record.letter_token_ids, *record.text_token_ids])) <= limit
        assert record.num_truncated == len(before.token_ids) - len(record.token_ids)
        assert (record.num_truncated > 0) == (needed[sample.key] > limit)
        assert record.question == before.question
        options = "".join(f"\n{choice.label}. {choice.text}" for choice in record.choices) + "\nAnswer:"
        assert options in record.prompt
        question = record.prompt.split(options)[0]
        assert question.endswith(before.question[-3:])
        num_cut += record.num_truncated > 0
    assert num_cut
    assert f"{num_cut} of 5 questions lost their beginning" in capsys.readouterr().err


def test_a_limit_that_leaves_no_question_says_which_would(checkpoints: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"5 questions do not fit 40 tokens - at `\$\.max_seq_len`") as caught:
        run_csqa(tmp_path / "run", checkpoints["gpt2"], 40)
    least = int(str(caught.value).split("give ")[1].split()[0])
    assert run_csqa(tmp_path / "run", checkpoints["gpt2"], least).manifest is not None


def test_more_than_the_model_has_positions_for_is_refused(checkpoints: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"max_seq_len 1000 - at `\$\.max_seq_len`; the model has 384 positions"):
        run_csqa(tmp_path / "run", checkpoints["gpt2"], 1000)


def question_line(**changes: Any) -> str:
    choices = [{"label": label, "text": text} for label, text in zip("AB", ("yes", "no"), strict=True)]
    stem = changes.pop("stem", "Is ice cold?")
    return json.dumps({"answerKey": "A", "id": "q", "question": {"stem": stem, "choices": choices}} | changes) + "\n"


def test_what_never_fits_the_model_is_a_bad_row(checkpoints: dict[str, Path], tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    long = [{"label": "A", "text": "very " * 200}, {"label": "B", "text": "no"}]
    path.write_text(question_line() + question_line(question={"stem": "Long?", "choices": long}))
    with pytest.raises(SourceError, match=r"rows\.jsonl row 1.*384"):
        run_csqa(tmp_path / "run", checkpoints["gpt2"], source={"source": str(path)})
    run_csqa(tmp_path / "run", checkpoints["gpt2"], source={"source": str(path), "on_bad_row": "skip"})
    assert TraceStore(str(tmp_path / "run")).keys == ["000000"]


def test_a_bad_row_is_named_or_skipped_and_counted(checkpoints: dict[str, Path], tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(question_line() + question_line(answerKey="Z") + question_line(stem="Is fire hot?"))
    with pytest.raises(SourceError, match=r"rows\.jsonl.*line 2.*the answer is 'Z'"):
        run_csqa(tmp_path / "run", checkpoints["llama"], source={"source": str(path)})
    outcome = run_csqa(tmp_path / "run", checkpoints["llama"], source={"source": str(path), "on_bad_row": "skip"})
    assert outcome.manifest is not None
    assert len(outcome.manifest.source.skipped) == 1
    assert TraceStore(str(tmp_path / "run")).keys == ["000000", "000002"]


def test_an_unlabelled_split_has_predictions_and_no_judgement(checkpoints: dict[str, Path], tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_text(question_line(answerKey="") + question_line(answerKey="", stem="Is fire hot?"))
    outcome = run_csqa(tmp_path / "run", checkpoints["llama"], source={"source": str(path), "split": "test"})
    for sample in TraceStore(str(tmp_path / "run")):
        record = sample.record
        assert record.label_idx is record.gold_label is record.is_correct is record.is_correct_by_text is None
        assert record.pred_label in "AB"
        assert record.split == "test"
    assert outcome.manifest is not None
    assert "accuracy" not in {metric.name for metric in outcome.manifest.metrics}


def test_the_run_has_an_accuracy_and_a_card(made: Made):
    right = [sample.record.is_correct for sample in made.store]
    card = (made.folder / "README.md").read_text()
    assert f"| accuracy | {np.mean(right):.4f} |" in card
    assert "Each option is scored by the log-probability of its letter" in card


def test_solved_examples_end_in_their_letter(checkpoints: dict[str, Path], tmp_path: Path):
    for name in ("llama", "gpt2"):
        folder = tmp_path / name
        longer = {"num_shots": 1}
        source = {"limit": 2}
        if name == "gpt2":
            with pytest.raises(SourceError, match="384"):  # no room for options of both
                run_csqa(folder, checkpoints[name], prompt={"num_shots": 3}, source=source)
        run_csqa(folder, checkpoints[name], prompt=longer, source=source)
        for sample in TraceStore(str(folder)):
            record = sample.record
            assert record.prompt.count("Answer:") == 2
            shot = record.prompt.split("Answer:")[1]
            assert shot.removeprefix("</s><|assistant|>").strip()[0] in "ABCDE"
            assert record.prompt.count(record.question) == 1


def test_positions_of_an_answer_are_refused(checkpoints: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'answer' - at `\$\.capture\.tokens`"):
        run_csqa(tmp_path / "run", checkpoints["llama"], capture={"tokens": "answer"})


def test_scores_do_not_depend_on_the_batch(checkpoints: dict[str, Path], tmp_path: Path):
    for size in (1, 4):
        run_csqa(tmp_path / str(size), checkpoints["llama"], output={"batch_size": size})
    one, four = (TraceStore(str(tmp_path / str(size))) for size in (1, 4))
    for key in one.keys:
        a, b = one.record(key), four.record(key)
        np.testing.assert_allclose(a.letter_logprobs, b.letter_logprobs, atol=1e-4)
        np.testing.assert_allclose(a.text_logprobs, b.text_logprobs, rtol=1e-5)


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_csqa(tmp_path / "whole", checkpoints["llama"])
    append, calls = worker_module.ShardWriter.append, []

    def stop_after_two(self: Any, *args: Any, **kwargs: Any) -> None:
        append(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(worker_module.ShardWriter, "append", stop_after_two)
    assert run_csqa(tmp_path / "run", checkpoints["llama"]).interrupted
    assert not run_csqa(tmp_path / "run", checkpoints["llama"]).interrupted
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")
    assert len(log_lines(tmp_path / "run", "csqa")) == 3, "a finished batch was computed again"
    assert run_csqa(tmp_path / "run", checkpoints["llama"]).was_complete


def test_a_dry_run_writes_nothing(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", str(checkpoints["llama"]), "--source", "sample", "--limit", "3", "--max-seq-len", "200"]
    with pytest.raises(SystemExit) as stopped:
        run_task(CSQA, [*arguments, "--dry-run", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 0
    assert "examples        3\n" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_bad_limit_is_refused_with_its_flag(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run_task(CSQA, ["--model", "demo", "--source", "sample", "--max-seq-len", "0"])
    assert "--max-seq-len 0: " in capsys.readouterr().err


def test_the_command_line_is_the_run_again(checkpoints: dict[str, Path], tmp_path: Path):
    outcome = run_csqa(tmp_path / "run", checkpoints["llama"], 250, source={"limit": 1})
    assert outcome.manifest is not None
    assert "python -m builders.csqa" in outcome.manifest.command
    assert "--max-seq-len 250" in outcome.manifest.command


def test_a_replay_holds_every_score_against_the_model(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = next(iter(checkpoints.values()))
    outcome = run_csqa(tmp_path / "run", checkpoint)
    assert outcome.manifest is not None
    sites = {error.site for error in outcome.manifest.verification.sites}
    assert {"letter_logprobs", "text_logprobs"} <= sites
    layout = Layout(tmp_path / "run", "csqa")
    right = replay_stored(layout, 1, model=str(checkpoint), adapter=None, device="cpu")
    assert {"letter_logprobs", "text_logprobs"} <= {error.site for error in right.sites}
    own = TraceStore.record

    def altered(self: TraceStore, key: str) -> Any:
        record: Any = own(self, key)
        return msgspec.structs.replace(record, text_logprobs=[-99.0] * len(record.text_logprobs))

    monkeypatch.setattr(TraceStore, "record", altered)
    with pytest.raises(CaptureError, match="text_logprobs differs"):
        replay_stored(layout, 1, model=str(checkpoint), adapter=None, device="cpu")
