"""Outcomes: what a model made of each sample of a configuration, as columns whatever the task.

Which of a task's fields says what stands in one table, `FIELDS`; a task that is not in it has inputs and nothing else.
The confidence passes of introspection are judged by another configuration of the same dataset: whether the model was
right about a question is written in its pass `mcq`, and joined by question.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tracekit.calibration import Calibration, calibrate
from tracekit.errors import ConfigError
from tracekit.remote import Listing
from tracekit.store import TraceStore

__all__ = [
    "FIELDS",
    "Fields",
    "Outcomes",
    "accuracy_most_probable",
    "accuracy_of",
    "calibration_of",
    "parse_filter",
    "read_outcomes",
    "rows_where",
]

_JUDGING_CONFIG = "mcq"
_PERCENT = 100.0


class Fields(NamedTuple):
    """Names of a task's fields, by what they say."""

    same: tuple[str, ...] = ()
    """What has to be equal where two samples are of the same question, beside `input_sha256`."""
    verdict: str | None = None
    """Whether the answer is right; null where nothing was judged."""
    answer: str | None = None
    """The answer."""
    has_letters: bool = False
    """True where answers are letters, of which there are few."""
    numbers: tuple[tuple[str, str], ...] = ()
    """Numbers with their fields; of a field with a list its mean."""
    probs: str | None = None
    """Distribution over the options; its largest value is the confidence."""
    probs_verdict: str | None = None
    """Whether the option with the largest is right."""
    confidences: tuple[str, ...] = ()
    """Stated confidence in percent, one field a pass; null in the other passes."""


FIELDS: dict[str, Fields] = {
    "trivia_qa": Fields(
        same=("question",),
        verdict="is_correct",
        answer="generated_answer",
        numbers=(("entropy", "token_entropies"), ("logprob", "token_logprobs"), ("f1", "f1")),
    ),
    "next_token": Fields(
        same=("text",),
        numbers=(
            ("loss", "loss"),
            ("perplexity", "perplexity"),
            ("entropy", "next_entropy"),
            ("next_token_accuracy", "next_correct"),
        ),
    ),
    "csqa": Fields(
        same=("question", "choices", "label_idx"),
        verdict="is_correct",
        answer="pred_label",
        has_letters=True,
        numbers=(("entropy", "entropy"), ("margin", "margin")),
        probs="letter_probs",
        probs_verdict="is_correct",
    ),
    "csqa_mcq": Fields(
        same=("question", "choices", "label_idx"),
        verdict="is_correct",
        answer="pred_label",
        has_letters=True,
        numbers=(("entropy", "entropy"), ("margin", "margin")),
        probs="choice_probs",
        probs_verdict="is_correct",
    ),
    "introspection": Fields(
        same=("prompt_type", "question_text", "options", "correct_answer_letter", "bins"),
        verdict="is_correct",
        answer="parsed_answer",
        has_letters=True,
        numbers=(("entropy", "entropy"), ("allowed_mass", "allowed_mass"), ("logit_margin", "logit_margin")),
        probs="probs",
        probs_verdict="is_pred_correct",
        confidences=("self_confidence", "other_confidence"),
    ),
}
"""What the fields of each task say."""


class Outcomes(NamedTuple):
    """What a model made of some samples; every list and array has one entry a sample."""

    keys: list[str]
    """Keys."""
    questions: list[tuple[str, int]]
    """`question_id` and `sample_index`."""
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
    confidences: np.ndarray
    """(N,) float64, 0 to 1; nan where a sample has none."""
    confidence_verdicts: list[bool | None]
    """Whether that is right which the confidence is about; None where it is not known."""
    confidence_note: str | None
    """Why calibration cannot be told; None where it can."""

    def take(self, rows: Sequence[int]) -> "Outcomes":
        """These samples, in this order."""
        picked: dict[str, Any] = {}
        for name, value in self._asdict().items():
            if isinstance(value, list):
                picked[name] = [value[row] for row in rows]
            elif isinstance(value, np.ndarray):
                picked[name] = value[list(rows)]
        numbers = {name: values[list(rows)] for name, values in self.numbers.items()}
        return self._replace(**picked, numbers=numbers)


def read_outcomes(store: TraceStore, listing: Listing, config: str, where: Sequence[str] = ()) -> Outcomes:
    """The outcomes of one configuration, or of those of its samples that filters let through, in row order.

    Args:
        store: The configuration, opened.
        listing: The dataset it is of: confidence passes are judged by another of its configurations.
        config: Name of the configuration.
        where: Filters `field=value`, see `rows_where`. They choose in the judging configuration too, where that
            answers a question several times.

    Raises:
        ConfigError: a filter cannot be read, names no field, or lets nothing through.
    """
    fields = FIELDS.get(store.info().task, Fields())
    named = [fields.verdict, fields.answer, fields.probs, fields.probs_verdict, *fields.confidences]
    wanted = [*fields.same, *[field for _, field in fields.numbers], *[name for name in named if name]]
    always = ("key", "question_id", "sample_index", "input_sha256")
    rows = pa.array(rows_where(store, where), pa.int64())
    table = store.columns(list(dict.fromkeys((*always, *wanted)))).take(rows)
    columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in table.column_names}
    questions = list(zip(columns["question_id"], columns["sample_index"], strict=True))
    stated = next((name for name in fields.confidences if any(v is not None for v in columns[name])), None)
    numbers = {name: _numbers(columns[field]) for name, field in fields.numbers}
    note: str | None = None
    judged: list[bool | None] = [None] * len(questions)
    confidences = np.full(len(questions), np.nan)
    if stated is not None:
        confidences = _numbers(columns[stated]) / _PERCENT
        judged, note = _joined_verdicts(listing, config.replace(stated, _JUDGING_CONFIG), questions, where)
    elif fields.probs is not None and fields.probs_verdict is not None:
        confidences = np.array([max(probs, default=np.nan) for probs in columns[fields.probs]], dtype=np.float64)
        judged = columns[fields.probs_verdict]
    else:
        note = "the task states no confidence"
    if not np.isnan(confidences).all():
        numbers["confidence"] = confidences
    verdicts: list[bool | None] = [None] * len(questions)
    if fields.verdict is not None:
        verdicts = columns[fields.verdict]
    return Outcomes(
        keys=columns["key"],
        questions=questions,
        inputs=columns["input_sha256"],
        same=[{name: columns[name][row] for name in fields.same} for row in range(len(questions))],
        has_verdicts=fields.verdict is not None and stated is None,
        verdicts=verdicts,
        answers=columns[fields.answer] if fields.answer else None,
        numbers={name: values for name, values in numbers.items() if not np.isnan(values).all()},
        confidences=confidences,
        confidence_verdicts=judged,
        confidence_note=note,
    )


def calibration_of(outcomes: Outcomes, *, num_bins: int = 10) -> tuple[Calibration | None, str | None]:
    """Calibration over the samples whose confidence and judgement are both there; else None, and why.

    Also beside a calibration stands a note where samples were left out of it.
    """
    if outcomes.confidence_note is not None:
        return None, outcomes.confidence_note
    judged = np.array([verdict is not None for verdict in outcomes.confidence_verdicts], dtype=np.bool_)
    is_used = judged & ~np.isnan(outcomes.confidences)
    num_left_out = int((~is_used).sum())
    if not is_used.any():
        return None, "no sample has both a confidence and a judged answer"
    right = [bool(verdict) for verdict, used in zip(outcomes.confidence_verdicts, is_used, strict=True) if used]
    note = f"{num_left_out} of {len(is_used)} samples left out: no judged answer" if num_left_out else None
    return calibrate(outcomes.confidences[is_used], right, num_bins=num_bins), note


def accuracy_of(verdicts: Sequence[bool | None]) -> float | None:
    """Share of the judged that is right; None where none is judged."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    return sum(judged) / len(judged) if judged else None


def accuracy_most_probable(outcomes: Outcomes, fields: Fields) -> float | None:
    """Accuracy of the most probable answer; None where it is the answer itself, or where none is judged."""
    if fields.probs_verdict in (None, fields.verdict) or not outcomes.has_verdicts:
        return None
    return accuracy_of(outcomes.confidence_verdicts)


def parse_filter(text: str) -> tuple[list[str], Any]:
    """Read `field=value`: the dotted path of a field of the record, and a JSON value; what is no JSON is a string.

    Raises:
        ConfigError: there is no `=`, or nothing before it.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"{text!r} is no filter; expected field=value, as subject=history or level=0.1")
    try:
        return path.split("."), json.loads(value)
    except json.JSONDecodeError:
        return path.split("."), value


def rows_where(store: TraceStore, where: Sequence[str]) -> list[int]:
    """Rows of the samples that all filters let through; all rows where there is no filter.

    A filter is `field=value`: a dotted path into the record (`level=0.1`, `model.adapter=null`, `options.0.label=A`)
    and the JSON value that has to be there. Numbers are equal as numbers, true is not 1.

    Raises:
        ConfigError: a filter cannot be read, names no field, or they let nothing through.
    """
    rows = list(range(len(store)))
    for text in where:
        path, wanted = parse_filter(text)
        values = store.columns(path[:1])[path[0]].to_pylist()
        found = [_dig(values[row], path[1:], text) for row in rows]
        kept = [row for row, value in zip(rows, found, strict=True) if _is_same(value, wanted)]
        if not kept:
            there = ", ".join(name for name, _ in Counter(json.dumps(value) for value in found).most_common(5))
            name = ", ".join(store.info().configs)
            raise ConfigError(f"no sample of {name} passes the filter {text!r}; values there: {there or 'none'}")
        rows = kept
    return rows


def _dig(value: Any, path: Sequence[str], text: str) -> Any:
    """What lies at a path inside a field; None below a null."""
    for step in path:
        if value is None:
            return None
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            there = (
                ", ".join(value) if isinstance(value, dict) else "a number" if isinstance(value, list) else "nothing"
            )
            raise ConfigError(f"the filter {text!r} has {step!r}, where there is {there}")
    return value


def _is_same(value: Any, wanted: Any) -> bool:
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """Values as float64, lists as their means; nan for null and for empty lists."""
    flat = [(sum(value) / len(value) if value else None) if isinstance(value, list) else value for value in values]
    return np.array([np.nan if value is None else float(value) for value in flat], dtype=np.float64)


def _joined_verdicts(
    listing: Listing, config: str, questions: Sequence[tuple[str, int]], where: Sequence[str]
) -> tuple[list[bool | None], str | None]:
    """Whether the model was right about each question in the pass `mcq`; and why that cannot be told, if so."""
    nothing: list[bool | None] = [None] * len(questions)
    if config not in listing.configs:
        return nothing, f"the dataset has no configuration {config!r} that says whether the model is right"
    with TraceStore(str(listing.path), config=config) as store:
        if _JUDGING_CONFIG not in store.columns(["prompt_type"])["prompt_type"].to_pylist()[:1]:
            return nothing, f"configuration {config!r} is not the pass {_JUDGING_CONFIG!r}"
        names = ["question_id", "sample_index", "is_correct"]
        table = store.columns(names)
        judged = list(zip(*[table[name].to_pylist() for name in names], strict=True))
        if where and len({row[:2] for row in judged}) < len(judged):
            try:
                judged = [judged[row] for row in rows_where(store, where)]
            except ConfigError as error:
                return nothing, f"configuration {config!r}: {error}"
    verdict_of = {(question, index): verdict for question, index, verdict in judged}
    if len(verdict_of) < len(judged):
        return nothing, f"configuration {config!r} answers a question several times; choose one with a filter"
    return [verdict_of.get((name, index), verdict_of.get((name, 0))) for name, index in questions], None
