"""Difference: what a comparison of two datasets came to, as Structs that are JSON too. See diff.py."""

import msgspec

from tracekit.analysis.distances import SiteDistance
from tracekit.card.calibration import Calibration

__all__ = [
    "AnswerChange",
    "AnswerChanges",
    "ConfigDifference",
    "Difference",
    "Histogram",
    "Shift",
    "Side",
    "SideScores",
]


class Side(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the two datasets."""

    path: str
    """Folder, or address on the Hub."""
    where: list[str]
    """Filters `field=value` that its samples passed."""


class SideScores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one side did on the common samples."""

    config: str
    """Its configuration."""
    model: str
    """Its model: id, revision, adapter and quantization where it has any."""
    model_name: str
    """The same in short: the last part of the id, and the adapter's name."""
    asked_for: str | None
    """Which confidence the pass asks for, by its field; null elsewhere."""
    confidence_name: str
    """What its confidence is, in words."""
    num_judged: int
    """Samples that were judged right or wrong on this side."""
    num_unjudged: int
    """Samples without a judgement: nothing could be parsed, or the source is unlabelled; 0 where a pass judges none."""
    accuracy: float | None
    """Share that is right of the samples judged on both sides, `num_judged_both`; null where there are none."""
    accuracy_most_probable: float | None
    """Share of all judged samples whose most probable allowed answer is right, parsed or not; null where that is the
    answer itself."""
    num_without_answer: int
    """Samples from whose output no answer could be read."""
    calibration: Calibration | None
    """Confidence against what `calibration_against` names being right, over the samples that both sides can calibrate,
    or this one alone where the other cannot at all; null where it cannot be told. Ten bins of equal width."""
    calibration_against: str | None
    """The most probable letter, or the answer; null for a task without confidence. Confidence in others is
    held against the model's own answers."""
    calibration_note: str | None
    """Why calibration cannot be told, or what was left out of it; null where there is nothing to say."""


class Histogram(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counts in bins of equal width."""

    edges: list[float]
    """Edges, one more than there are bins."""
    counts: list[int]
    """Values in each bin."""


class Shift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a number moved from a to b, over the common samples that have it on both sides."""

    name: str
    """The number, as the task calls it; `confidence` (0 to 1), expected by the probabilities where it was asked for,
    else the probability of the most probable option; `stated_confidence` (0 to 1), the midpoint of the bin that the
    output named."""
    unit: str
    """Its unit in a, as `nats`; empty where it has none."""
    num: int
    """Samples."""
    mean_a: float
    """Mean in a."""
    mean_b: float
    """Mean in b."""
    shift: float
    """Mean of b - a."""
    shift_std: float
    """Standard deviation of b - a over samples (population)."""
    histogram: Histogram
    """Distribution of b - a; its range holds 0."""


class AnswerChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples whose answer was one and became another."""

    a: str | None
    """The answer in a; null where nothing was parsed."""
    b: str | None
    """The answer in b."""
    count: int
    """Samples."""


class AnswerChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the answers to the common samples changed."""

    num: int
    """Samples with an answer on one side or both; 0 where none could be parsed."""
    num_changed: int
    """Those whose answer is another, or is there on one side alone."""
    num_right_to_wrong: int
    """Samples right in a and wrong in b."""
    num_wrong_to_right: int
    """Samples wrong in a and right in b."""
    confusions: list[AnswerChange]
    """Every change with its count, most frequent first; empty for answers in free text."""


class ConfigDifference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One configuration of both."""

    config: str
    """Its name; `name_a, name_b` where they were named apart."""
    task: str
    """Its task."""
    aligned_by: str
    """`question` (question_id and sample_index), with what tells its samples apart (`question, repeat`), or `key`."""
    notes: list[str]
    """What differs beside the model: a side that is not finished, how it was asked and how answers were generated."""
    num_common: int
    """Samples that both have. Nothing else is compared: activations and the counts of each side are over all of these,
    accuracy over those judged in both, calibration over those that both can calibrate, and each shift over those that
    have the number in both."""
    num_only_a: int
    """Samples that only a has."""
    num_only_b: int
    """Samples that only b has."""
    num_judged_both: int
    """Those that were judged right or wrong on both sides."""
    a: SideScores
    """How a did."""
    b: SideScores
    """How b did."""
    shifts: list[Shift]
    """Every number of the task that both have."""
    answers: AnswerChanges | None
    """How the answers changed; null for a task without answers."""
    most_probable: AnswerChanges | None
    """How the most probable of the allowed answers changed, parsed or not; null where that is the answer itself."""
    activations: list[SiteDistance]
    """Distances at every site and layer that both have; empty where they cannot be compared."""
    activations_note: str | None
    """Why they cannot be, or what was left out; null where there is nothing to say."""


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two datasets side by side."""

    a: Side
    """One dataset."""
    b: Side
    """The other."""
    configs: list[ConfigDifference]
    """The configurations that were compared."""
    configs_only_a: list[str]
    """Configurations that only a has."""
    configs_only_b: list[str]
    """Configurations that only b has."""
