"""Options of a multiple-choice question, and what records of CommonsenseQA have in common."""

import msgspec

from tracekit.records import Number, Outcome, Record, accuracy

__all__ = ["CHOICE_OUTCOME", "Choice", "ChoiceRecord"]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One option of a question."""

    label: str
    """Its letter."""
    text: str
    """Its text."""


class ChoiceRecord(Record, frozen=True, kw_only=True):
    """A question with options, and the option that a model prefers."""

    question: str
    """The question."""
    concept: str | None
    """The question's concept in ConceptNet; null where the source has none."""
    choices: list[Choice]
    """The options, in order."""
    label_idx: int | None
    """Number of the right option; null for an unlabelled split."""
    gold_label: str | None
    """Its letter; null for an unlabelled split."""
    pred_idx: int
    """Number of the option that the model prefers."""
    pred_label: str
    """Its letter."""
    is_correct: bool | None
    """Whether the preferred option is the right one; null for an unlabelled split."""
    entropy: float
    """Entropy of the distribution over the options, nats."""
    margin: float
    """Probability of the preferred option minus that of the next best."""
    num_layers: int
    """Number of transformer blocks."""
    num_truncated: int
    """Tokens cut off to fit `--max-seq-len`, all options together; never of an option's text."""


CHOICE_OUTCOME = Outcome(
    asked="question",
    answer="pred_label",
    gold="gold_label",
    correct="is_correct",
    has_letters=True,
    options="choices",
    numbers=[Number(name="entropy", field="entropy", unit="nats"), Number(name="margin", field="margin")],
    means=[accuracy("is_correct")],
    most_probable_correct="is_correct",
    same=["question", "choices", "label_idx"],
)
"""What the fields of a ChoiceRecord say."""
