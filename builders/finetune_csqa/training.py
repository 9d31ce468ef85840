"""Training an encoder with a multiple-choice head: questions in, the best epoch's model, metrics and a curve out.

    <folder>/checkpoints/checkpoint-<step>/     after every epoch: the last one to go on from, and the best one
    <folder>/config.json, model.safetensors     model and tokenizer of the best epoch

The loop is transformers.Trainer's. Each option of a question has one logit; the loss is the cross-entropy over them.
Training that was stopped goes on after its last whole epoch, and gives the weights of one left alone.
"""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForMultipleChoice
from transformers.data.data_collator import DataCollatorForMultipleChoice

from builders.finetune_csqa.config import TrainingConfig
from builders.kit.csqa_questions import CsqaQuestion, encode_choices
from tracekit.config import ModelConfig
from tracekit.console import say
from tracekit.errors import UNREADABLE, ConfigError, ModelError
from tracekit.format.layout import inside, read_whole
from tracekit.model.models import is_head_fresh, load_tokenizer
from tracekit.model.references import resolve
from tracekit.plots import BLUE, INK, ORANGE, canvas, grid, png, style

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["Data", "Encoder", "Epoch", "Metrics", "TrainingConfig", "draw_curve", "encode", "load_encoder", "train"]

_NUM_LOGGED = 50
"""Points of the loss curve."""
_WHOLE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")
"""Files of a whole checkpoint; the first is written last."""
_CHECKPOINT = re.compile(r"checkpoint-\d+", re.ASCII)
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """What one evaluation found."""

    epoch: int
    """Epochs trained before it; 0 is the model as it was loaded."""
    step: int
    """Steps trained before it."""
    accuracy: float
    """Share of the evaluation questions whose right option has the highest logit."""
    loss: float
    """Mean cross-entropy over the options, nats."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """How a training went; metrics.json. No clock stands in it: the same run gives the same bytes."""

    run: dict[str, Any]
    """What was trained on what."""
    num_train: int
    """Questions trained on."""
    num_eval: int
    """Questions evaluated on."""
    num_choices: int
    """Options a question."""
    num_truncated: int
    """Tokens cut off questions to fit `max_seq_len`, all options of all questions together."""
    is_head_fresh: bool
    """Whether the model came without a multiple-choice head, so that it was drawn at random before training."""
    accuracy_before: float
    """Accuracy of the model as it was loaded."""
    accuracy: float
    """Accuracy of the best epoch, whose model is kept."""
    best_epoch: int
    """That epoch, from 1."""
    epochs: list[Epoch]
    """Every evaluation, that of the untrained model first."""
    train_steps: list[int]
    """Steps of the loss curve."""
    train_losses: list[float]
    """Mean training loss since the step before."""


class Data(NamedTuple):
    """Encoded questions."""

    rows: list[dict[str, Any]]
    """input_ids, token_type_ids where the model has them, attention_mask (each C lists), label."""
    num_cut: int
    """Tokens cut off."""

    @property
    def longest(self) -> int:
        """Tokens of the longest question with an option."""
        return max(len(ids) for row in self.rows for ids in row["input_ids"])


class Encoder(NamedTuple):
    """A model with a multiple-choice head."""

    model: Any
    """The model, float32."""
    tokenizer: Any
    """Its tokenizer."""
    is_head_fresh: bool
    """Whether the checkpoint had no such head, so that it was drawn by seed."""


def load_encoder(config: TrainingConfig) -> Encoder:
    """The encoder in float32, a head that it lacks drawn by seed.

    Raises:
        ConfigError: the model has not so many positions, or cannot do gradient checkpointing.
        ModelError: it cannot be loaded, or is no encoder that transformers can give a multiple-choice head.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for kernels that nothing here needs
    tokenizer = load_tokenizer(ModelConfig(model=config.model))
    reference = resolve(config.model)
    transformers.set_seed(config.seed)
    try:
        model, info = AutoModelForMultipleChoice.from_pretrained(
            reference.path, dtype=torch.float32, output_loading_info=True, **reference.arguments
        )
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(
            f"model {config.model!r} cannot be loaded with a multiple-choice head: {reason}\n"
            "Expected an encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, DeBERTa) as a local folder or a Hub id"
        ) from error
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing true - at `$.gradient_checkpointing`; {model.config.model_type} cannot do it; "
            "leave it out"
        )
    limit = _num_positions(model, tokenizer)
    if config.max_seq_len > limit:
        raise ConfigError(
            f"max_seq_len {config.max_seq_len} - at `$.max_seq_len`; {reference.id} has {limit} positions; "
            "give at most that"
        )
    is_fresh = is_head_fresh(model, model.base_model, info["missing_keys"], reference.id)
    if is_fresh:
        say(f"the head of {reference.id} is new: drawn at random, now it is trained")
    return Encoder(model, tokenizer, is_fresh)


def _num_positions(model: nn.Module, tokenizer: Any) -> int:
    """Longest text: by the tokenizer, and by the position embeddings (some begin after the padding's)."""
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    sizes = [t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables]
    return min([tokenizer.model_max_length, *sizes])


def encode(tokenizer: Any, questions: Sequence[CsqaQuestion], max_seq_len: int) -> Data:
    """Encode labelled questions for training.

    Raises:
        ConfigError: an option alone leaves no room for a token of its question.
    """
    rows: list[dict[str, Any]] = []
    num_cut = 0
    for question in questions:
        encoded = encode_choices(tokenizer, question.question, question.choices, max_seq_len)
        num_cut += sum(one.num_cut for one in encoded)
        row: dict[str, Any] = {
            "input_ids": [one.input_ids for one in encoded],
            "attention_mask": [[1] * len(one.input_ids) for one in encoded],
            "label": question.label_idx,
        }
        if encoded[0].token_type_ids is not None:
            row["token_type_ids"] = [one.token_type_ids for one in encoded]
        rows.append(row)
    return Data(rows, num_cut)


def train(
    config: TrainingConfig, encoder: Encoder, data: Data, held: Data, run: dict[str, Any], folder: Path
) -> Metrics:
    """Run the epochs that are missing, evaluate on `held` after each, and save model and tokenizer of the best.

    Raises:
        ConfigError: the loss is not finite, or the folder was moved between two runs.
    """
    checkpoints = folder / "checkpoints"
    last = _last_checkpoint(checkpoints)
    if last is not None:
        say(f"going on from {last.name}")
    trainer = _trainer(config, encoder, data, held, checkpoints, is_fresh=last is None)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    metrics = _metrics(encoder, data, held, run, trainer.state.log_history)
    best = metrics.epochs[metrics.best_epoch]
    kept = Path(trainer.state.best_model_checkpoint or "").name
    assert kept == f"checkpoint-{best.step}", (kept, best)
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    return metrics


def _trainer(
    config: TrainingConfig, encoder: Encoder, data: Data, held: Data, checkpoints: Path, *, is_fresh: bool
) -> "Trainer":
    from transformers import Trainer, TrainingArguments  # here, because they take seconds and --help needs none of it
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class _TrainingProgress(ProgressCallback):
        """Trainer's bars, and evaluations said on stderr: stdout is for results."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "eval_accuracy" in logs:
                say(f"epoch {logs['epoch']:.0f}: accuracy {logs['eval_accuracy']:.4f}, loss {logs['eval_loss']:.4f}")

    if config.gradient_checkpointing:
        model = encoder.model  # its method had another name before transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    num_steps = math.ceil(len(data.rows) / config.batch_size) * config.epochs
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.lr,
        num_train_epochs=config.epochs,
        seed=config.seed,
        eval_on_start=is_fresh,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the last; with 1 Trainer deletes the last as soon as it is done
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_steps=max(1, num_steps // _NUM_LOGGED),
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        report_to=[],
    )
    trainer = Trainer(
        model=encoder.model,
        args=arguments,
        train_dataset=data.rows,  # pyright: ignore[reportArgumentType] - a list is a map-style dataset
        eval_dataset=held.rows,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForMultipleChoice(encoder.tokenizer),
        processing_class=encoder.tokenizer,
        compute_metrics=_accuracy,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_TrainingProgress())
    return trainer


def _accuracy(found: Any) -> dict[str, float]:
    """Share of questions whose right option has the highest logit."""
    return {"accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())}


class _State(msgspec.Struct):
    """The one field of Trainer's state that resuming needs checked: weights are loaded from there."""

    best_model_checkpoint: str | None


def _last_checkpoint(checkpoints: Path) -> Path | None:
    """The last whole checkpoint; None where there is none. One that a kill cut short is left to be overwritten.

    Raises:
        ConfigError: the folder was moved since, so that Trainer would not find the best checkpoint.
    """
    numbered = [path for path in checkpoints.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    for path in sorted(numbered, key=lambda path: -int(path.name.partition("-")[2])):
        if not all(inside(checkpoints, f"{path.name}/{name}").exists() for name in _WHOLE):
            continue
        try:
            best = msgspec.json.decode(read_whole(path / _WHOLE[0]), type=_State).best_model_checkpoint
        except UNREADABLE:
            continue
        if best is not None and (Path(best).parent != checkpoints or not _CHECKPOINT.fullmatch(Path(best).name)):
            raise ConfigError(
                f"{checkpoints} was moved: its best checkpoint is noted as {best}; move the folder back, or train into "
                "another --out"
            )
        return path
    return None


def _metrics(
    encoder: Encoder, data: Data, held: Data, run: dict[str, Any], history: Sequence[dict[str, Any]]
) -> Metrics:
    """What Trainer logged, as one struct."""
    epochs = [
        Epoch(
            epoch=round(entry["epoch"]),
            step=entry["step"],
            accuracy=entry["eval_accuracy"],
            loss=entry["eval_loss"],
        )
        for entry in history
        if "eval_accuracy" in entry
    ]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not all(math.isfinite(value) for value in [*(loss for _, loss in losses), *(one.loss for one in epochs)]):
        raise ConfigError("the loss is not finite: training ran away; use a smaller --lr and another --out")
    best = max(epochs[1:], key=lambda one: one.accuracy)
    return Metrics(
        run=run,
        num_train=len(data.rows),
        num_eval=len(held.rows),
        num_choices=len(data.rows[0]["input_ids"]),
        num_truncated=data.num_cut + held.num_cut,
        is_head_fresh=encoder.is_head_fresh,
        accuracy_before=epochs[0].accuracy,
        accuracy=best.accuracy,
        best_epoch=best.epoch,
        epochs=epochs,
        train_steps=[step for step, _ in losses],
        train_losses=[loss for _, loss in losses],
    )


def draw_curve(metrics: Metrics) -> bytes:
    """The training curve as PNG: loss by step, and below it accuracy by epoch. Same numbers, same bytes."""
    with style():
        figure = canvas(height=6.4)
        losses, accuracies = figure.subplots(2, 1, sharex=True)
        steps = [one.step for one in metrics.epochs]
        losses.plot(metrics.train_steps, metrics.train_losses, color=BLUE, label="training")
        losses.plot(steps, [one.loss for one in metrics.epochs], color=ORANGE, marker="o", label="evaluation")
        losses.set_ylabel("loss (nats)")
        losses.set_title(f"Fine-tuning on CommonsenseQA\n{metrics.run['model']}", loc="left", parse_math=False)
        points = [100 * one.accuracy for one in metrics.epochs]
        accuracies.plot(steps, points, color=ORANGE, marker="o", label="evaluation")
        chance = 100 / metrics.num_choices
        accuracies.axhline(chance, color=INK, linestyle="--", linewidth=1, label="by chance")
        best = metrics.epochs[metrics.best_epoch]
        accuracies.plot([best.step], [100 * best.accuracy], "*", color=INK, markersize=14, label="kept")
        accuracies.set_ylim(0, 100)
        accuracies.set_ylabel("right answers (%)")
        accuracies.set_xlabel("step; a dot after every epoch")
        for axes in (losses, accuracies):
            axes.legend(frameon=False)
            grid(axes)
        return png(figure)
