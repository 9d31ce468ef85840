"""Outcomes: what a model made of each sample of a configuration, as columns whatever the task.

Which of a task's fields says what stands in the dataset (`TraceStore.about`); a dataset that does not say it has inputs
and nothing else.

Confidence is calibrated against the most probable letter, everywhere: it is there for every labelled question, whether
the output named a letter or not. Passes that ask for confidence ask about another pass, another configuration of the
same dataset (`Outcome.judged_in`), and are judged by its most probable letter, joined by question. Accuracy of what
the outputs named is a number of its own.

Drawn answers beside a deterministic one (`--trace-samples`) do not count, unless a filter chooses a `sample_index`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tracekit.card.calibration import NUM_BINS, Calibration, calibrate
from tracekit.errors import ConfigError
from tracekit.read.filters import dig, parse_filter, rows_where
from tracekit.read.remote import Listing
from tracekit.read.store import TraceStore
from tracekit.records import Outcome

__all__ = [
    "Outcomes",
    "accuracy_most_probable",
    "accuracy_of",
    "calibration_of",
    "number_label",
    "read_outcomes",
]

_PERCENT = 100.0

_CONDITIONS = (
    *("model.dtype", "model.quantization"),
    *("generation.do_sample", "generation.num_beams", "generation.max_new_tokens"),
    *("generation.temperature", "generation.top_p", "generation.top_k"),
)
"""Conditions of every task."""


class Outcomes(NamedTuple):
    """What a model made of some samples; every list and array has one entry a sample."""

    keys: list[str]
    """Keys."""
    questions: list[tuple[str, int]]
    """`question_id` and `sample_index`."""
    occasions: dict[str, list[Any]]
    """What tells answers to the same question apart, by dotted path."""
    inputs: list[str]
    """SHA-256 of the user's own text."""
    same: list[dict[str, Any]]
    """The fields that have to be equal where two samples are of the same question."""
    has_verdicts: bool
    """False where nothing is judged in this task, or in this pass."""
    verdicts: list[bool | None]
    """Whether the answer is right; None where it was not judged."""
    answers: list[Any] | None
    """The answers, None where there is none; None for a task without."""
    numbers: dict[str, np.ndarray]
    """(N,) float64 by name; nan where a sample has none."""
    units: dict[str, str]
    """The unit of each; empty where it has none."""
    most_probable: list[Any] | None
    """The most probable of the allowed answers; None where that is the answer itself."""
    most_probable_verdicts: list[bool | None]
    """Whether it is right; None where it was not judged."""
    asked_for: str | None
    """Which confidence was asked for, by its field; None elsewhere."""
    is_about_others: bool
    """Whether that is confidence in somebody else."""
    confidence_name: str
    """What `confidences` are, in words."""
    is_of_answer: bool
    """Whether they are stated beside the answer itself, whose verdict says whether they are justified."""
    confidences: np.ndarray
    """(N,) float64, 0 to 1: expected, or of the most probable option; nan where a sample has none."""
    confidence_verdicts: list[bool | None]
    """Whether the most probable letter, or the answer, is right, by which confidence is calibrated; None where it is
    not known."""
    confidence_note: str | None
    """Why calibration cannot be told; None where it can."""
    conditions: dict[str, list[Any]]
    """What each sample was made under, by dotted path."""
    differ_by_pass: tuple[str, ...]
    """Paths that differ by design between two passes that ask for confidence."""
    num_extra: int
    """Drawn answers beside deterministic ones, which are not among the samples."""

    def take(self, rows: Sequence[int]) -> "Outcomes":
        """These samples, in this order."""
        picked: dict[str, Any] = {}
        for name, value in self._asdict().items():
            if isinstance(value, list):
                picked[name] = [value[row] for row in rows]
            elif isinstance(value, np.ndarray):
                picked[name] = value[list(rows)]
        numbers = {name: values[list(rows)] for name, values in self.numbers.items()}
        further = {
            part: {name: [values[row] for row in rows] for name, values in getattr(self, part).items()}
            for part in ("conditions", "occasions")
        }
        return self._replace(**picked, **further, numbers=numbers)

    def is_calibrated(self) -> np.ndarray:
        """(N,) bool: the samples whose confidence and judgement are both there."""
        judged = np.array([verdict is not None for verdict in self.confidence_verdicts], dtype=np.bool_)
        return judged & ~np.isnan(self.confidences)

    def calibrated_against(self) -> str | None:
        """What confidence is calibrated against, in words; None where the task states none."""
        if np.isnan(self.confidences).all():
            return None
        if self.is_of_answer:
            return "the answer"
        return "the most probable letter" + (" (this model's own answers)" if self.is_about_others else "")


def read_outcomes(store: TraceStore, listing: Listing, config: str, where: Sequence[str] = ()) -> Outcomes:
    """The outcomes of one configuration, or of those of its samples that filters let through, in row order.

    Args:
        store: The configuration, opened.
        listing: The dataset it is of: confidence passes are judged by another of its configurations.
        config: Name of the configuration.
        where: Filters `field=value`, see `tracekit.read.filters.rows_where`. They choose in the judging configuration
            too, where that answers a question several times.

    Raises:
        ConfigError: a filter cannot be read, names no field, or lets nothing through.
    """
    fields = store.about.outcome
    rows = rows_where(store, where)
    counted = rows if any(parse_filter(text)[0] == ["sample_index"] for text in where) else _not_extra(store, rows)
    columns = _columns(store, fields, counted)
    questions = list(zip(columns["question_id"], columns["sample_index"], strict=True))
    asked_for = next((name for name in fields.confidences if any(v is not None for v in columns[name])), None)
    numbers = {one.name: _numbers(columns[one.field]) for one in fields.numbers}
    note: str | None = None
    nothing: list[bool | None] = [None] * len(questions)
    verdicts = columns[fields.correct] if fields.correct is not None else nothing
    probable_verdicts = columns[fields.most_probable_correct] if fields.most_probable_correct is not None else nothing
    judged, confidences, stated = nothing, np.full(len(questions), np.nan), None
    name = "probability of the most probable letter"
    is_of_answer = asked_for is not None and fields.kind is None and fields.correct is not None
    if asked_for is not None:
        name = "stated confidence" if fields.bins is None else "expected confidence (from probabilities)"
        confidences = _numbers(columns[asked_for]) / _PERCENT
        stated = _stated(columns, fields) / _PERCENT
        judged = verdicts
        if not is_of_answer:
            judged, note = _joined_verdicts(listing, config, asked_for, fields, questions, where)
    elif fields.probs is not None and fields.most_probable_correct is not None:
        there = [[one for one in probs or () if one is not None] for probs in columns[fields.probs]]
        confidences = np.array([max(probs, default=np.nan) for probs in there], dtype=np.float64)
        judged = probable_verdicts
    else:
        note = "no confidence could be read" if fields.confidences else "the task states no confidence"
    numbers |= {"confidence": confidences} | ({} if stated is None else {"stated_confidence": stated})
    return Outcomes(
        keys=columns["key"],
        questions=questions,
        occasions=_at_paths(columns, fields.occasions),
        inputs=columns["input_sha256"],
        same=[{name: columns[name][row] for name in fields.same} for row in range(len(questions))],
        has_verdicts=fields.correct is not None and (asked_for is None or is_of_answer),
        verdicts=verdicts,
        answers=columns[fields.answer] if fields.answer else None,
        numbers={name: values for name, values in numbers.items() if not np.isnan(values).all()},
        units={one.name: one.unit for one in fields.numbers},
        most_probable=columns[fields.most_probable] if fields.most_probable else None,
        most_probable_verdicts=probable_verdicts,
        asked_for=asked_for,
        is_about_others=asked_for in fields.about_others,
        confidence_name=name,
        is_of_answer=is_of_answer,
        confidences=confidences,
        confidence_verdicts=judged,
        confidence_note=note,
        conditions=_at_paths(columns, (*_CONDITIONS, *fields.conditions)),
        differ_by_pass=(*([fields.kind] if fields.kind else []), *fields.conditions),
        num_extra=len(rows) - len(counted),
    )


def _not_extra(store: TraceStore, rows: Sequence[int]) -> Sequence[int]:
    """The rows that are no drawn answers beside deterministic ones."""
    if not store.about.outcome.drawn_are_extra:
        return rows
    indices = store.columns(["sample_index"])["sample_index"].to_numpy()
    return [row for row in rows if indices[row] == 0]


def _at_paths(columns: dict[str, list[Any]], paths: Sequence[str]) -> dict[str, list[Any]]:
    """What stands at dotted paths, sample by sample."""
    return {
        path: [dig(value, path.split(".")[1:], where=path) for value in columns[path.split(".")[0]]] for path in paths
    }


def _columns(store: TraceStore, fields: Outcome, rows: Sequence[int]) -> dict[str, list[Any]]:
    """All that the table of fields names, of these rows."""
    single = (
        *(fields.correct, fields.answer, fields.probs, fields.most_probable, fields.most_probable_correct),
        *(fields.bins, fields.kind),
    )
    wanted = (
        *("key", "question_id", "sample_index", "input_sha256"),
        *(*fields.same, *fields.confidences),
        *[one.field for one in fields.numbers],
        *[name for name in single if name],
        *[path.split(".")[0] for path in (*_CONDITIONS, *fields.conditions, *fields.occasions)],
    )
    table = store.columns(list(dict.fromkeys(wanted))).take(pa.array(rows, pa.int64()))
    return {name: table[name].to_pylist() for name in table.column_names}


def _stated(columns: dict[str, list[Any]], fields: Outcome) -> np.ndarray:
    """(N,) midpoint, percent, of the bin that each output named; nan where it named none."""
    if fields.bins is None or fields.answer is None:
        return np.full(len(columns["key"]), np.nan)
    midpoints = [{one["label"]: one["midpoint"] for one in bins or ()} for bins in columns[fields.bins]]
    return _numbers([of.get(answer) for of, answer in zip(midpoints, columns[fields.answer], strict=True)])


def calibration_of(outcomes: Outcomes, *, num_bins: int = NUM_BINS) -> tuple[Calibration | None, str | None]:
    """Calibration against the most probable letter, over the samples with confidence and judgement; else None, and why.

    Also beside a calibration stands a note where samples were left out of it.
    """
    if outcomes.confidence_note is not None:
        return None, outcomes.confidence_note
    is_used = outcomes.is_calibrated()
    num_left_out = int((~is_used).sum())
    if not is_used.any():
        return None, "no sample has both a confidence and a judgement: is the source labelled?"
    right = [bool(verdict) for verdict, used in zip(outcomes.confidence_verdicts, is_used, strict=True) if used]
    missing = "no confidence or not judged" if outcomes.is_of_answer else "not judged"
    note = f"{num_left_out} of {len(is_used)} samples left out: {missing}" if num_left_out else None
    return calibrate(outcomes.confidences[is_used], right, num_bins=num_bins), note


def number_label(name: str, confidence_name: str, unit: str = "") -> str:
    """What a number of `Outcomes.numbers` is called in a table."""
    if name == "stated_confidence":
        return "stated confidence (bin of the output)"
    if name == "confidence":
        return confidence_name
    return f"mean {name}{unit and ', '}{unit}"


def accuracy_of(verdicts: Sequence[bool | None]) -> float | None:
    """Share of the judged that is right; None where none is judged."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    return sum(judged) / len(judged) if judged else None


def accuracy_most_probable(outcomes: Outcomes, fields: Outcome) -> float | None:
    """Accuracy of the most probable answer; None where it is the answer itself, or where none is judged."""
    if fields.most_probable_correct in (None, fields.correct) or not outcomes.has_verdicts:
        return None
    return accuracy_of(outcomes.most_probable_verdicts)


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """Values as float64, lists as the means of what is not null in them; nan where nothing is left."""
    flat = [_mean(value) if isinstance(value, list) else value for value in values]
    return np.array([np.nan if value is None else float(value) for value in flat], dtype=np.float64)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _joined_verdicts(
    listing: Listing,
    config: str,
    asked_for: str,
    fields: Outcome,
    questions: Sequence[tuple[str, int]],
    where: Sequence[str],
) -> tuple[list[bool | None], str | None]:
    """Whether the most probable letter of the judging pass is right, by question; and why that cannot be told, if
    so."""
    nothing: list[bool | None] = [None] * len(questions)
    judge, kind, right = fields.judged_in, fields.kind, fields.most_probable_correct
    if judge is None or kind is None or right is None:
        return nothing, "the dataset does not say which pass says whether the model is right"
    if not config.endswith(asked_for):
        return nothing, f"configuration {config!r} is not named ...{asked_for}, so that its pass {judge} is not known"
    judging = config.removesuffix(asked_for) + judge
    if judging not in listing.configs:
        return nothing, f"the dataset has no configuration {judging!r} that says whether the model is right"
    with TraceStore(str(listing.path), config=judging) as store:
        if judge not in store.columns([kind])[kind].to_pylist()[:1]:
            return nothing, f"configuration {judging!r} is not the pass {judge!r}"
        names = ["question_id", "sample_index", right]
        table = store.columns(names)
        judged = list(zip(*[table[name].to_pylist() for name in names], strict=True))
        if where and len({row[:2] for row in judged}) < len(judged):
            try:
                judged = [judged[row] for row in rows_where(store, where)]
            except ConfigError as error:
                return nothing, f"configuration {judging!r}: {error}"
    verdict_of = {(question, index): verdict for question, index, verdict in judged}
    if len(verdict_of) < len(judged):
        return nothing, f"configuration {judging!r} answers a question several times; choose one with a filter"
    return [verdict_of.get((name, index), verdict_of.get((name, 0))) for name, index in questions], None
