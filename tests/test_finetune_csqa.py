"""Fine-tuning: a tiny encoder learns a toy set; what was stopped or killed goes on; what is left; bad settings."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForMultipleChoice, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.trainer import Trainer

import builders.finetune_csqa.training as training
from builders.finetune_csqa.command import finetune
from builders.finetune_csqa.config import FinetuneConfig
from builders.kit.columns import ChoiceSource
from builders.kit.csqa_questions import SAMPLE, SOURCE, encode_choices, parse_row
from builders.kit.sources import read_examples
from tests.processes_for_tests import run as python
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit.cli import run_main
from tracekit.errors import ConfigError, DatasetError, ModelError, PlanMismatchError, SourceError

ROOT = Path(__file__).parent.parent
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
THINGS = ["grass", "snow", "coal", "sky", "sun", "blood"]
NUM_POSITIONS = 24


def main(arguments: list[str]) -> int:
    """What the command line does."""
    return run_main("builders.finetune_csqa", "builders.finetune_csqa.command", FinetuneConfig, arguments)


def save_encoder(folder: Path) -> Path:
    """A tiny random BERT without a head and a tokenizer of words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "please", "choose", "the", "word", "?", *COLOURS, *THINGS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    settings: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": NUM_POSITIONS,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    torch.manual_seed(5)
    BertModel(BertConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_toy(path: Path, count: int, seed: int, **changes: Any) -> Path:
    """Questions whose answer is the word that they name."""
    draw = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(count):
        picked = [(COLOURS + THINGS)[i] for i in torch.randperm(12, generator=draw)[:4].tolist()]
        right = int(torch.randint(4, (1,), generator=draw))
        choices = [{"label": label, "text": text} for label, text in zip("ABCD", picked, strict=True)]
        stem = f"please choose the word {picked[right]} ?"
        row = {"id": f"t{number}", "answerKey": "ABCD"[right], "question": {"stem": stem, "choices": choices}}
        lines.append(json.dumps(row | changes) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An encoder and a toy set, as settings."""
    folder = tmp_path_factory.mktemp("toy")
    return {
        "model": str(save_encoder(folder / "encoder")),
        "train_source": str(write_toy(folder / "train.jsonl", 480, seed=1)),
        "eval_source": str(write_toy(folder / "eval.jsonl", 60, seed=2)),
    }


def quick(toy: dict[str, str], out: Path, /, **changes: Any) -> FinetuneConfig:
    """A training of a few steps."""
    settings: dict[str, Any] = {"max_seq_len": NUM_POSITIONS, "batch_size": 8, "lr": 1e-3, "epochs": 3, "limit": 40}
    return FinetuneConfig(**toy | settings | {"out": str(out)} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    """What a finished training leaves, its checkpoints apart."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def finished(toy: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of a few steps. Not to be changed."""
    return finetune(quick(toy, tmp_path_factory.mktemp("finished") / "run")).folder


def test_a_tiny_encoder_learns_a_toy_set(toy: dict[str, str], tmp_path: Path):
    outcome = finetune(quick(toy, tmp_path / "run", lr=3e-3, epochs=12, limit=None, batch_size=16))
    metrics = outcome.metrics
    assert metrics is not None
    assert metrics.accuracy_before < 0.5
    assert metrics.accuracy > 0.9
    assert metrics.accuracy == max(epoch.accuracy for epoch in metrics.epochs[1:])
    assert metrics.train_losses[-1] < metrics.train_losses[0]


def test_the_kept_model_has_the_accuracy_that_is_written_down(finished: Path, toy: dict[str, str]):
    """By plain transformers, option by option, unpadded."""
    metrics = json.loads((finished / "metrics.json").read_text())
    model: Any = AutoModelForMultipleChoice.from_pretrained(finished).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished)
    settings = ChoiceSource(source=toy["eval_source"], limit=40)
    questions = read_examples(settings, default=SOURCE, sample=SAMPLE, parse=parse_row).examples
    num_right = 0
    for question in questions:
        logits = []
        for one in encode_choices(tokenizer, question.question, question.choices, None):
            types = torch.tensor([[one.token_type_ids]])
            with torch.no_grad():
                logits.append(model(input_ids=torch.tensor([[one.input_ids]]), token_type_ids=types).logits.item())
        num_right += max(range(4), key=logits.__getitem__) == question.label_idx
    assert num_right / len(questions) == metrics["accuracy"]
    best = finished / "checkpoints" / f"checkpoint-{metrics['epochs'][metrics['best_epoch']]['step']}"
    kept, there = (load_file(folder / "model.safetensors") for folder in (finished, best))
    assert all(torch.equal(kept[name], there[name]) for name in there)


def test_what_is_written_down(finished: Path, toy: dict[str, str]):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert (metrics["num_train"], metrics["num_eval"], metrics["num_choices"]) == (40, 40, 4)
    assert metrics["is_head_fresh"] is True
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [0, 1, 2, 3]
    assert [epoch["step"] for epoch in metrics["epochs"]] == [0, 5, 10, 15]
    assert metrics["epochs"][0]["accuracy"] == metrics["accuracy_before"]
    assert metrics["train_steps"] == list(range(1, 16))
    run = json.loads((finished / "run.json").read_text())
    assert run == metrics["run"]
    assert run["model"] == "encoder"
    assert run["model_revision"].startswith("sha256:")
    assert run["train_source"].startswith("train.jsonl@sha256:")
    assert str(Path(toy["model"]).parent) not in (finished / "metrics.json").read_text()
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_training_gives_the_same_bytes(finished: Path, toy: dict[str, str], tmp_path: Path):
    finetune(quick(toy, tmp_path / "run"))
    assert contents(tmp_path / "run") == contents(finished)


def test_a_finished_training_is_left_as_it_is(
    finished: Path, toy: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = contents(finished)
    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("trained again"))
    settings = msgspec.to_builtins(quick(toy, finished))
    plain = {name: value for name, value in settings.items() if not isinstance(value, bool | tuple | list)}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in plain.items()]
    assert main([flag for flag in flags if "none" not in flag.lower()]) == 0
    said = capsys.readouterr()
    assert "nothing to do: this training is complete" in said.err
    assert "python -m builders.csqa_mcq --model" in said.err
    assert f"checkpoint      {finished}\n" in said.out
    assert contents(finished) == before


def test_a_stopped_training_goes_on_after_its_last_epoch(
    finished: Path, toy: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step, calls = Trainer.training_step, []

    def stop_in_the_third_epoch(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        finetune(quick(toy, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.json").exists()
    calls.clear()
    finetune(quick(toy, tmp_path / "run"))
    assert len(calls) == 5, "a finished epoch was trained again"
    assert contents(tmp_path / "run") == contents(finished)


_KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import msgspec
from transformers.trainer import Trainer
from builders.finetune_csqa.config import FinetuneConfig
from builders.finetune_csqa.command import finetune

save = Trainer._save_rng_state
def killed_in_the_second_checkpoint(self, folder):
    if folder.endswith("checkpoint-10"):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

Trainer._save_rng_state = killed_in_the_second_checkpoint
finetune(msgspec.json.decode(sys.argv[1], type=FinetuneConfig))
"""


def test_a_training_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(
    finished: Path, toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = quick(toy, tmp_path / "run")
    done = python("-c", _KILLED, msgspec.json.encode(config).decode())
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-10" / "model.safetensors").exists()
    finetune(config)
    assert "going on from checkpoint-5" in capsys.readouterr().err
    assert contents(tmp_path / "run") == contents(finished)


def test_a_folder_that_was_moved_in_mid_training_is_refused(toy: dict[str, str], tmp_path: Path):
    finetune(quick(toy, tmp_path / "run", epochs=1))
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="was moved: its best checkpoint is noted as"):
        finetune(quick(toy, tmp_path / "moved", epochs=1))


def test_another_configuration_in_the_same_folder_is_refused(finished: Path, toy: dict[str, str]):
    with pytest.raises(PlanMismatchError, match=r"lr: 0\.001 there, 0\.002 now"):
        finetune(quick(toy, finished, lr=2e-3))
    with pytest.raises(PlanMismatchError, match=r"eval_source: 'eval\.jsonl@sha256"):
        finetune(quick(toy | {"eval_source": toy["train_source"]}, finished))


def test_a_folder_with_something_else_is_refused(toy: dict[str, str], tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="exists and is no training of this builder"):
        finetune(quick(toy, tmp_path))


def test_a_checkpoint_with_a_head_goes_on_from_it(finished: Path, toy: dict[str, str], tmp_path: Path):
    outcome = finetune(quick(toy | {"model": str(finished)}, tmp_path / "run", epochs=1))
    assert outcome.metrics is not None
    assert outcome.metrics.is_head_fresh is False
    assert outcome.metrics.accuracy_before == json.loads((finished / "metrics.json").read_text())["accuracy"]


def test_gradient_checkpointing_gives_the_same_model(finished: Path, toy: dict[str, str], tmp_path: Path):
    finetune(quick(toy, tmp_path / "run", gradient_checkpointing=True))
    plain, saving = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    for name, value in plain.items():
        torch.testing.assert_close(saving[name], value, atol=1e-5, rtol=1e-4)


def test_one_file_for_both_holds_every_fifth_question_back(
    toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outcome = finetune(quick(toy | {"eval_source": toy["train_source"]}, tmp_path / "run", epochs=1))
    assert outcome.metrics is not None
    assert (outcome.metrics.num_train, outcome.metrics.num_eval) == (32, 8)
    assert "train.jsonl twice: every fifth question is kept for evaluation" in capsys.readouterr().err


def test_questions_on_both_sides_are_said(toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(toy["train_source"]).read_text().splitlines(keepends=True)[:3]))
    finetune(quick(toy | {"eval_source": str(other)}, tmp_path / "run", dry_run=True))
    assert "questions are both trained on and evaluated on" in capsys.readouterr().err


def test_what_is_cut_is_said_and_counted(toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcome = finetune(quick(toy, tmp_path / "run", epochs=1, max_seq_len=8))
    assert outcome.metrics is not None
    assert outcome.metrics.num_truncated == 80 * 4 * 2  # of 10 tokens, for every option of every question
    assert "640 tokens were cut off the beginnings of questions" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert finetune(quick(toy, tmp_path / "run", dry_run=True)).metrics is None
    said = capsys.readouterr().out
    assert "questions       40 to train on, 40 to evaluate on\n" in said
    assert "steps           15 of 8 questions, 3 epochs\n" in said
    assert not (tmp_path / "run").exists()


def test_nothing_but_results_on_stdout(toy: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ["--model", toy["model"], "--train-source", toy["train_source"], "--eval-source", toy["eval_source"]]
    arguments += ["--limit", "8", "--epochs", "1", "--max-seq-len", "24", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "accuracy", "before", "questions"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "Expected `float` > 0.0 - at `$.lr`"),
        ({"epochs": 0}, "Expected `int` >= 1 - at `$.epochs`"),
        ({"batch_size": -1}, "at `$.batch_size`"),
        ({"max_seq_len": 4}, "Expected `int` >= 8 - at `$.max_seq_len`"),
        ({"max_seq_len": 25}, "max_seq_len 25 - at `$.max_seq_len`; encoder has 24 positions"),
        ({"seed": -1}, "at `$.seed`"),
        ({"limit": 0}, "at `$.limit`"),
    ],
)
def test_a_bad_value_is_refused_with_its_path(
    toy: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError) as caught:
        finetune(quick(toy, tmp_path / "run", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unlabelled_split_cannot_be_trained_on(toy: dict[str, str], tmp_path: Path):
    path = write_toy(tmp_path / "test.jsonl", 4, seed=3, answerKey="")
    with pytest.raises(SourceError, match=r"--eval-source: 4 questions have no answer, 't0' first"):
        finetune(quick(toy | {"eval_source": str(path)}, tmp_path / "run"))


def test_questions_must_have_one_number_of_options(toy: dict[str, str], tmp_path: Path):
    path = write_toy(tmp_path / "two.jsonl", 4, seed=3, answerKey="A", question="Q?", choices=["red", "blue"])
    with pytest.raises(SourceError, match="questions have 2 or 4 options; expected the same for all"):
        finetune(quick(toy | {"eval_source": str(path)}, tmp_path / "run"))


def test_a_bad_row_is_named_or_skipped(toy: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_toy(tmp_path / "rows.jsonl", 10, seed=3)
    path.write_text(path.read_text() + '{"question": "Q?"}\n')
    with pytest.raises(SourceError, match=r"rows\.jsonl line 11: 0 options"):
        finetune(quick(toy | {"eval_source": str(path)}, tmp_path / "run", dry_run=True))
    finetune(quick(toy | {"eval_source": str(path)}, tmp_path / "run", dry_run=True, on_bad_row="skip"))
    said = capsys.readouterr()
    assert "skipped: rows.jsonl line 11" in said.err
    assert "40 to train on, 10 to evaluate on" in said.out


def test_a_decoder_and_a_missing_model_are_refused(toy: dict[str, str], tmp_path: Path):
    decoder = save_tiny_checkpoint(tmp_path / "llama")
    with pytest.raises(ModelError, match="cannot be loaded with a multiple-choice head") as caught:
        finetune(quick(toy | {"model": str(decoder)}, tmp_path / "run"))
    assert "Expected an encoder" in str(caught.value)
    with pytest.raises(ModelError, match="no model at '/nowhere'"):
        finetune(quick(toy | {"model": "/nowhere"}, tmp_path / "run"))


def test_the_command_line_says_errors_in_one_line(toy: dict[str, str], capsys: pytest.CaptureFixture[str]):
    assert main(["--model", toy["model"], "--train-source", "missing.jsonl"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no such file: 'missing.jsonl'")
