"""Settings of finetune_csqa."""

from typing import Annotated, Literal

import msgspec

from tracekit.config import Positive

__all__ = ["FinetuneConfig", "TrainingConfig"]


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which encoder, and how it is trained."""

    model: str = "google-bert/bert-base-uncased"
    """Encoder: Hub id (`org/name` or `org/name@revision`) or local folder."""
    max_seq_len: Annotated[int, msgspec.Meta(ge=8)] = 128
    """Most tokens of a question with one option; longer ones lose the beginning of their question."""
    batch_size: Positive = 8
    """Questions a step."""
    lr: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 2e-5
    """Learning rate at the start; it falls to 0 in a straight line."""
    epochs: Positive = 2
    """Times that every question is seen."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 41
    """Seed of the fresh head, of dropout and of the order of the questions."""


class FinetuneConfig(TrainingConfig, frozen=True, kw_only=True):
    """Fine-tune an encoder on CommonsenseQA's questions, for builders.csqa_mcq."""

    train_source: str = "default"
    """Questions to train on: `default` (the Hub's train split), a Hub id, a JSONL, Parquet or CSV file, or `sample`."""
    eval_source: str = "default"
    """Questions to evaluate on after each epoch: `default` (the Hub's validation split), and so on. The file that is
    trained on, or `sample` twice: every fifth question is kept for evaluation."""
    limit: Positive | None = None
    """Most rows of each source; all by default."""
    question_column: str | None = None
    """Column with the question; by default the names that CommonsenseQA's copies have. So for the columns below."""
    choices_columns: tuple[str, ...] = ()
    """Column with the list of options, or a column for each option."""
    label_column: str | None = None
    """Column with the right option."""
    id_column: str | None = None
    """Column with the id of the row."""
    label_start: Literal[0, 1] | None = None
    """Number of the first option, where the right option is a number. Default: as the options are numbered."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop, or be counted, reported and left out."""
    out: str | None = None
    """Folder of the checkpoint; a readable name under checkpoints/ by default."""
    dry_run: bool = False
    """Print what would be done, with the time of a step measured here, and write nothing."""
