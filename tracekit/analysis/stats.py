"""Stats: what a run came to, configuration by configuration: accuracy, calibration, confidence, parse failures, sizes.

    for one in stats("traces/run"):
        print(one.config, one.accuracy, one.calibration)

What a task does not say is null or empty. Every number is over all samples; drawn answers beside a deterministic one
count in sizes and lengths alone. Nothing but the record tables is read.
"""

from collections import Counter, defaultdict
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET

from tracekit.analysis.outcomes import (
    Outcomes,
    accuracy_most_probable,
    accuracy_of,
    calibration_of,
    read_outcomes,
)
from tracekit.card.calibration import Calibration
from tracekit.errors import DatasetError
from tracekit.format.labels import LabelSummary, read_summaries
from tracekit.format.layout import Layout, choose_config
from tracekit.format.manifest import Manifest, Metric, TaskReport, read_struct
from tracekit.hub import HubPath
from tracekit.plots import Picture
from tracekit.read.remote import Listing, list_configs
from tracekit.read.store import TraceStore
from tracekit.records import Outcome
from tracekit.task import find_task

__all__ = [
    "Bar",
    "ConfigStats",
    "Count",
    "Lengths",
    "LetterCount",
    "NumberStats",
    "SubjectAccuracy",
    "range_text",
    "stats",
]

_NUM_SUBJECTS = 10
_NUM_BINS = 10


class Count(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often something is there."""

    value: str
    """What."""
    count: int
    """Samples."""


class NumberStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number of the task over all samples that have it."""

    name: str
    """The number, as the task calls it; `confidence` (0 to 1), expected by the probabilities where it was asked for,
    else the probability of the most probable option; `stated_confidence` (0 to 1), the midpoint of the bin that the
    output named."""
    unit: str
    """Its unit, as `nats`; empty where it has none."""
    num: int
    """Samples."""
    mean: float
    """Mean."""
    std: float
    """Standard deviation over samples (population)."""


class Bar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bin of confidence."""

    label: str
    """The bin's letter and range in percent, or a range of ten percent."""
    num_expected: int
    """Samples whose confidence (expected, or of the most probable option) lies in it."""
    num_answered: int | None
    """Samples whose output named this bin; null where confidence is not asked for."""
    mean_probability: float | None
    """Mean probability of the bin's letter; null likewise, and where no sample has one."""


class LetterCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One letter of the allowed answers: a model that prefers a position shows it here."""

    letter: str
    """The letter."""
    num_answered: int
    """Samples whose answer is this letter."""
    num_most_probable: int | None
    """Samples in which it is the most probable one; null where that is the answer."""
    num_right: int | None
    """Samples in which it is the right one; null where no letter is right."""


class SubjectAccuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One subject of the source."""

    subject: str
    """Its name."""
    num: int
    """Samples."""
    accuracy: float | None
    """Share of the judged ones that is right; null where none is judged."""


class Lengths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths in tokens."""

    shortest: int
    """Smallest."""
    mean: float
    """Mean."""
    longest: int
    """Largest."""


class ConfigStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One configuration, summed up."""

    config: str
    """Its name."""
    task: str
    """Its task."""
    models: list[str]
    """Ids of its models."""
    is_open: bool
    """True where the run is not finished."""
    num_samples: int
    """Samples."""
    num_extra: int
    """Drawn answers among them beside a deterministic one; accuracy and means leave them out."""
    num_bytes: int
    """Bytes of its shards."""
    prompt_tokens: Lengths | None
    """Tokens of the prompts; null where there is no sample."""
    answer_tokens: Lengths | None
    """Tokens that were generated; null likewise."""
    num_judged: int
    """Samples that were judged right or wrong."""
    accuracy: float | None
    """Share of the judged ones that is right: of the answers that were read from the output; null where none is."""
    accuracy_most_probable: float | None
    """The same of the most probable allowed answer, where that is another question; null where it is not."""
    num_without_answer: int
    """Samples from whose output no answer could be read."""
    failures: list[Count]
    """Why, most frequent first."""
    asked_for: str | None
    """Which confidence the pass asks for, by its field; null elsewhere."""
    confidence_name: str
    """What its confidence is, in words."""
    calibration: Calibration | None
    """Confidence against what `calibration_against` names being right, ten bins of equal width; null where it cannot
    be told."""
    calibration_against: str | None
    """The most probable letter, or the answer; null for a task without confidence. Confidence in others is
    held against the model's own answers."""
    calibration_note: str | None
    """Why it cannot, or what was left out; null where there is nothing to say."""
    confidence: list[Bar]
    """Histogram of confidence; empty for a task without."""
    means: list[NumberStats]
    """Every number of the task."""
    letters: list[LetterCount]
    """Answers by letter; empty where answers are no letters."""
    subjects: list[SubjectAccuracy]
    """The ten largest subjects; empty for a source without."""
    report: Any
    """What the task itself says of the configuration; null where it says nothing more, or is not installed."""
    report_lines: list[str]
    """The same for people."""
    pictures: list[Picture]
    """Pictures of it, for `--plots`."""
    metrics: list[Metric]
    """The manifest's numbers; empty where the run is not finished."""
    labels: list[LabelSummary]
    """What judges said of the answers, a summary a label set; empty where nobody judged."""


def stats(path: str | PathLike[str], *, config: str | None = None) -> list[ConfigStats]:
    """Sum a dataset up, one entry a configuration, by name.

    Args:
        path: Folder of a dataset, or `hf://datasets/owner/name@v1.0.0`.
        config: One configuration alone.

    Raises:
        DatasetError: no dataset, or no such configuration.
        HubError: a published dataset cannot be read.
    """
    listing = list_configs(HubPath.parse(str(path)) or Path(path))
    if config is not None:
        choose_config(listing.configs, config, listing.path)
    return [_stats_of(listing, name) for name in ([config] if config else listing.configs)]


def _stats_of(listing: Listing, config: str) -> ConfigStats:
    with TraceStore(str(listing.path), config=config) as store:
        info = store.info()
        fields = store.about.outcome
        path = Layout(listing.root, config).manifest
        manifest = read_struct(path, Manifest) if path.exists() else None
        report = _report(store, manifest)
        outcomes = read_outcomes(store, listing, config)
        calibration, note = calibration_of(outcomes, num_bins=_NUM_BINS)
        lengths = store.columns(["prompt_length", "token_ids"])
        prompts = lengths["prompt_length"].to_numpy()
        answers = np.array([len(ids) for ids in lengths["token_ids"].to_pylist()], dtype=np.int64) - prompts
        return ConfigStats(
            config=config,
            task=info.task,
            models=[model.id for model in info.models],
            is_open=info.is_open,
            num_samples=info.num_samples,
            num_extra=outcomes.num_extra,
            num_bytes=info.num_bytes,
            prompt_tokens=_lengths(prompts),
            answer_tokens=_lengths(answers),
            num_judged=sum(verdict is not None for verdict in outcomes.verdicts),
            accuracy=accuracy_of(outcomes.verdicts),
            accuracy_most_probable=accuracy_most_probable(outcomes, fields),
            num_without_answer=sum(answer is None for answer in outcomes.answers or []),
            failures=_failures(store, fields),
            asked_for=outcomes.asked_for,
            confidence_name=outcomes.confidence_name,
            calibration=calibration,
            calibration_against=outcomes.calibrated_against(),
            calibration_note=note,
            confidence=_confidence(store, outcomes, fields),
            means=_means(outcomes),
            letters=_letters(store, outcomes, fields),
            subjects=_subjects(store, outcomes, fields),
            report=None if report is None else report.data,
            report_lines=[] if report is None else report.lines,
            pictures=[] if report is None else report.pictures,
            metrics=[] if manifest is None else manifest.metrics,
            labels=read_summaries(Layout(listing.root, config)),
        )


def _report(store: TraceStore, manifest: Manifest | None) -> TaskReport | None:
    """What the task says of a configuration: as its manifest says; of a run that is not finished, or was finished by an
    older version, the installed task."""
    if manifest is not None and manifest.card is not UNSET:
        return manifest.report or None
    task = find_task(store.info().task)
    return None if task is None or task.report is None else task.call("report", (one.record for one in store))


def _column(store: TraceStore, name: str | None) -> list[Any] | None:
    """A field of all records; None for a task without it."""
    return None if name is None else store.columns([name])[name].to_pylist()


def _lengths(values: np.ndarray) -> Lengths | None:
    if not len(values):
        return None
    return Lengths(shortest=int(values.min()), mean=float(values.mean()), longest=int(values.max()))


def _failures(store: TraceStore, fields: Outcome) -> list[Count]:
    reasons = Counter(reason for reason in _column(store, fields.failure) or [] if reason is not None)
    return [Count(value=reason, count=count) for reason, count in reasons.most_common()]


def _confidence(store: TraceStore, outcomes: Outcomes, fields: Outcome) -> list[Bar]:
    """Confidence by the bins that were asked for, else by tenths."""
    values = outcomes.confidences[~np.isnan(outcomes.confidences)]
    if not len(values):
        return []
    asked = (_column(store, fields.bins) or [[]])[0]
    if not asked:
        edges = np.arange(_NUM_BINS + 1) / _NUM_BINS
        counts = _counts_between(values, edges)
        labels = [f"{100 * low:.0f} to {100 * high:.0f} %" for low, high in pairwise(edges)]
        return [
            Bar(label=label, num_expected=count, num_answered=None, mean_probability=None)
            for label, count in zip(labels, counts, strict=True)
        ]
    if any(bins != asked for bins in _column(store, fields.bins) or []):
        raise DatasetError(
            f"{store!r}: samples have different bins of confidence; run `tracekit verify` on the dataset"
        )
    counts = _counts_between(values, np.array([one["low"] for one in asked] + [asked[-1]["high"]]) / 100)
    rows = [probs or () for probs in _column(store, fields.probs) or []]
    there = [[row[n] for row in rows if n < len(row) and row[n] is not None] for n in range(len(asked))]
    answered = Counter(outcomes.answers or [])
    return [
        Bar(
            label=f"{one['label']}  {range_text(one['low'], one['high'])}",
            num_expected=counts[number],
            num_answered=answered[one["label"]],
            mean_probability=float(np.mean(there[number])) if there[number] else None,
        )
        for number, one in enumerate(asked)
    ]


def range_text(low: float, high: float) -> str:
    """A range of percent in words: `under 5 %`, `5 to 10 %`, `over 90 %`."""
    if low <= 0:
        return f"under {high:.12g} %"
    return f"over {low:.12g} %" if high >= 100 else f"{low:.12g} to {high:.12g} %"


def _counts_between(values: np.ndarray, edges: np.ndarray) -> list[int]:
    """Values in each `(low, high]`; the first holds its lower edge too."""
    numbers = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
    return [int(count) for count in np.bincount(numbers, minlength=len(edges) - 1)]


def _means(outcomes: Outcomes) -> list[NumberStats]:
    found = []
    for name, values in outcomes.numbers.items():
        there = values[np.isfinite(values)]
        if len(there):
            mean, std, unit = float(there.mean()), float(there.std()), outcomes.units.get(name, "")
            found.append(NumberStats(name=name, unit=unit, num=len(there), mean=mean, std=std))
    return found


def _letters(store: TraceStore, outcomes: Outcomes, fields: Outcome) -> list[LetterCount]:
    """How often each letter is the answer, the most probable one, and the right one."""
    if not fields.has_letters or outcomes.answers is None:
        return []
    answered = Counter(answer for answer in outcomes.answers if answer is not None)
    probable = _column(store, fields.most_probable)
    right = _column(store, fields.gold) if outcomes.has_verdicts else None
    counted = [Counter(letter for letter in letters or [] if letter is not None) for letters in (probable, right)]
    return [
        LetterCount(
            letter=letter,
            num_answered=answered[letter],
            num_most_probable=None if probable is None else counted[0][letter],
            num_right=counted[1][letter] if counted[1] else None,
        )
        for letter in sorted({*answered, *counted[0], *counted[1]})
    ]


def _subjects(store: TraceStore, outcomes: Outcomes, fields: Outcome) -> list[SubjectAccuracy]:
    """The largest subjects, with their accuracy."""
    by_subject: dict[str, list[bool | None]] = defaultdict(list)
    if outcomes.has_verdicts:
        for subject, verdict in zip(_column(store, fields.group) or [], outcomes.verdicts, strict=False):
            if subject is not None:
                by_subject[subject].append(verdict)
    largest = sorted(by_subject, key=lambda subject: (-len(by_subject[subject]), subject))[:_NUM_SUBJECTS]
    return [
        SubjectAccuracy(subject=subject, num=len(by_subject[subject]), accuracy=accuracy_of(by_subject[subject]))
        for subject in largest
    ]
