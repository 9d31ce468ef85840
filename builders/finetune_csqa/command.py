"""Fine-tune an encoder on CommonsenseQA: a checkpoint with a multiple-choice head, ready for `builders.csqa_mcq`.

    <out>/run.json                                  what is being trained on what; written first
    <out>/checkpoints/checkpoint-<step>/            after every epoch: the last one to go on from, and the best one
    <out>/config.json, model.safetensors, ...       model and tokenizer of the best epoch
    <out>/curve.png                                 loss and accuracy over the epochs
    <out>/metrics.json                              written last: with it the run is complete

How it is trained stands in builders/finetune_csqa/training.py. The same command again goes on after the last whole
epoch; a finished training is left as it is.

    python -m builders.finetune_csqa --model google-bert/bert-base-uncased --out checkpoints/bert-csqa
"""

import math
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from transformers.data.data_collator import DataCollatorForMultipleChoice

from builders.finetune_csqa.config import FinetuneConfig
from builders.finetune_csqa.training import Data, Encoder, Metrics, draw_curve, encode, load_encoder, train
from builders.kit.columns import ChoiceSource
from builders.kit.csqa_questions import COLUMNS, SAMPLE, SOURCE, CsqaQuestion, parse_row
from builders.kit.sources import read_examples
from tracekit.config import check
from tracekit.console import say
from tracekit.errors import UNREADABLE, ConfigError, DatasetError, PlanMismatchError, SourceError
from tracekit.format.layout import inside, read_whole, write_atomic
from tracekit.format.manifest import SourceInfo, read_struct
from tracekit.model.placement import resolve_device
from tracekit.model.references import resolve
from tracekit.sizes import duration

__all__ = ["FinetuneConfig", "Trained", "finetune", "run"]

_HELD_OUT = 5
"""Where training and evaluation name one file, every fifth question is kept for evaluation."""


class Trained(NamedTuple):
    """How a training ended."""

    folder: Path
    metrics: Metrics | None
    """None after a dry run."""
    was_complete: bool
    """True where there was nothing left to do."""


def run(config: FinetuneConfig) -> int:
    """Train and say what became of it; the exit code, 0."""
    outcome = finetune(config)
    metrics = outcome.metrics
    if metrics is None:
        return 0
    if outcome.was_complete:
        print("nothing to do: this training is complete", file=sys.stderr)
    print(f"checkpoint      {outcome.folder}")
    print(f"accuracy        {metrics.accuracy:.4f} after epoch {metrics.best_epoch}, the best of {config.epochs}")
    print(f"before          {metrics.accuracy_before:.4f}; by chance {1 / metrics.num_choices:.4f}")
    print(f"questions       {metrics.num_train} to train on, {metrics.num_eval} to evaluate on")
    model, folder = shlex.quote(config.model), shlex.quote(str(outcome.folder))
    print(f"next: python -m builders.csqa_mcq --model {model} --model-path {folder}", file=sys.stderr)
    return 0


def finetune(config: FinetuneConfig) -> Trained:
    """Train, or go on with what is there.

    Raises:
        ConfigError: a setting is refused, or the folder holds another training (PlanMismatchError).
        SourceError: questions are missing, malformed, without answer, or differ in the number of options.
        ModelError: the model cannot be loaded, or is no encoder that transformers can give a multiple-choice head.
    """
    config = check(config)
    folder = Path(config.out or f"checkpoints/{Path(config.model.partition('@')[0]).name}-csqa").absolute()
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "the training curve needs matplotlib, which is not installed: pip install 'tracekit-llm[all]'"
        )
    questions, held_out, sources = _questions(config)
    run = _public_run(config, sources)
    is_complete = _check_same(folder, run)
    if is_complete and not config.dry_run:
        return Trained(folder, read_struct(inside(folder, "metrics.json"), Metrics), True)
    encoder = load_encoder(config)
    data, held = (encode(encoder.tokenizer, part, config.max_seq_len) for part in (questions, held_out))
    if data.num_cut + held.num_cut:
        say(
            f"{data.num_cut + held.num_cut} tokens were cut off the beginnings of questions, all options together, to "
            f"fit --max-seq-len {config.max_seq_len}"
        )
    if config.dry_run:
        _print_plan(config, encoder, data, held, folder)
        return Trained(folder, None, False)
    write_atomic(folder / "run.json", _to_json(run))
    metrics = train(config, encoder, data, held, run, folder)
    write_atomic(folder / "curve.png", draw_curve(metrics))
    write_atomic(folder / "metrics.json", _to_json(msgspec.to_builtins(metrics)))
    return Trained(folder, metrics, False)


def _questions(config: FinetuneConfig) -> tuple[list[CsqaQuestion], list[CsqaQuestion], list[SourceInfo]]:
    """Questions to train on, to evaluate on, and where they are from."""
    found = []
    for source, split in ((config.train_source, "train"), (config.eval_source, "validation")):
        say(f"reading {source} ({split})")
        settings = ChoiceSource(
            source=source,
            split=split,
            limit=config.limit,
            question_column=config.question_column,
            choices_columns=config.choices_columns,
            label_column=config.label_column,
            id_column=config.id_column,
            label_start=config.label_start,
            on_bad_row=config.on_bad_row,
        )
        found.append(read_examples(settings, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_row))
        for skipped in found[-1].source.skipped:
            say(f"skipped: {skipped}")
    (train, first), (held, second) = found
    if (first.id, first.revision) == (second.id, second.revision) and first.revision.startswith("sha256:"):
        say(f"{first.id} twice: every fifth question is kept for evaluation, the others are trained on")
        held = train[_HELD_OUT - 1 :: _HELD_OUT]
        train = [question for i, question in enumerate(train) if i % _HELD_OUT != _HELD_OUT - 1]
    for name, questions in (("train", train), ("eval", held)):
        if not questions:
            raise SourceError(f"--{name}-source: no question is left for it; give more rows, or another file")
        unlabelled = [question.example_id for question in questions if question.label_idx is None]
        if unlabelled:
            raise SourceError(
                f"--{name}-source: {len(unlabelled)} questions have no answer, {unlabelled[0]!r} first; expected a "
                "labelled split (CommonsenseQA's test split has none); --label-column names another column"
            )
    counts = {len(question.choices) for question in [*train, *held]}
    if len(counts) > 1:
        raise SourceError(f"questions have {' or '.join(map(str, sorted(counts)))} options; expected the same for all")
    sides = [{(q.question, tuple(choice.text for choice in q.choices)) for q in side} for side in (train, held)]
    both = sides[0] & sides[1]
    if both:
        say(f"warning: {len(both)} questions are both trained on and evaluated on; the accuracy will flatter")
    return train, held, [first, second]


def _public_run(config: FinetuneConfig, sources: Sequence[SourceInfo]) -> dict[str, Any]:
    """What is trained on what, as it is written down: names and content hashes instead of local paths."""
    run = msgspec.json.decode(msgspec.json.encode(config))
    for name in ("out", "dry_run"):
        del run[name]
    reference = resolve(config.model)
    run["model"], run["model_revision"] = (
        reference.id,
        reference.revision or reference.arguments.get("revision", "main"),
    )
    for name, info in zip(("train_source", "eval_source"), sources, strict=True):
        run[name] = f"{info.id}{f':{info.subset}' if info.subset else ''}@{info.revision}"
    return run


def _check_same(folder: Path, run: dict[str, Any]) -> bool:
    """Whether the folder holds this very training, finished.

    Raises:
        PlanMismatchError: it was begun with another configuration.
        DatasetError: it holds something else.
    """
    written = inside(folder, "run.json")
    if not written.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DatasetError(f"--out {str(folder)!r} exists and is no training of this builder; choose another")
        return False
    try:
        old = msgspec.json.decode(read_whole(written), type=dict[str, Any])
    except UNREADABLE as error:
        raise DatasetError(f"{written} does not say what was trained: {error}; choose another --out") from error
    differences = [
        f"    {name}: {old.get(name, '(absent)')!r} there, {run.get(name, '(absent)')!r} now"
        for name in sorted(old.keys() | run.keys())
        if old.get(name) != run.get(name)
    ]
    if differences:
        raise PlanMismatchError(
            f"{folder} was begun with another configuration:\n" + "\n".join(differences) + "\n"
            "Run the original command to go on with it, or choose another --out"
        )
    return (folder / "metrics.json").exists()


def _print_plan(config: FinetuneConfig, encoder: Encoder, data: Data, held: Data, folder: Path) -> None:
    """What a training would do, and how long it would take by one step timed here."""
    steps = math.ceil(len(data.rows) / config.batch_size) * config.epochs
    device = resolve_device("auto")
    batch = DataCollatorForMultipleChoice(encoder.tokenizer)(data.rows[: config.batch_size])
    model = encoder.model.to(device).train()
    started = time.monotonic()
    model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
    seconds = (time.monotonic() - started) * steps
    rows = {
        "model": f"{resolve(config.model).id}, its head {'new' if encoder.is_head_fresh else 'from the checkpoint'}",
        "questions": f"{len(data.rows)} to train on, {len(held.rows)} to evaluate on",
        "longest": f"{max(data.longest, held.longest)} tokens with an option",
        "cut off": f"{data.num_cut + held.num_cut} tokens of questions",
        "steps": f"{steps} of {config.batch_size} questions, {config.epochs} epochs",
        "time": f"about {duration(seconds)} without evaluation (from one step measured here)",
        "folder": f"{folder} (nothing was written)",
    }
    for name, value in rows.items():
        print(f"{name:15s} {value}")


def _to_json(data: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n"
