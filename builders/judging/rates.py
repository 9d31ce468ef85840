"""Rates: what labels come to, as shares with intervals, over all samples and by group. Pure.

Intervals are the 2.5th and 97.5th percentile of the rate over bootstrap resamples (Efron and Tibshirani 1993, An
Introduction to the Bootstrap, chapter 13). What is drawn are questions (`question_id`), whose samples stay together
(Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8): several answers to one question, or
several questions about one thing, are not independent. With one sample a question that is the plain bootstrap over
samples. Resampling knows of nothing that was not seen: where a rate is 0 or 1 it would give that point, and the
interval is the score interval of as many independent draws as there are questions instead (Wilson 1927, Probable
Inference, the Law of Succession, and Statistical Inference, Journal of the American Statistical Association 22).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from builders.judging.judges import What
from tracekit.format.labels import Label, Rate

__all__ = ["GROUP_FIELDS", "Rated", "definitions", "interval", "rates_of"]

GROUP_FIELDS = ("domain", "difficulty")
"""Fields of records by which rates are given too."""
NUM_RESAMPLES = 2000
_SEED = 0
_CHUNK = 100
_Z_SQUARED = 1.959964**2
"""Square of the normal distribution's 97.5th percentile."""


class Rated(NamedTuple):
    """One sample with its label."""

    label: Label
    question_id: str
    """Samples of one question are drawn together."""
    groups: Mapping[str, str]
    """Value of each group field that the record has."""
    is_invented: bool = True
    """False for a real thing, asked about as a control."""


class _Definition(NamedTuple):
    """What a rate counts."""

    text: str
    """In words."""
    counts: Callable[[Rated], bool | None]
    """Whether a sample counts; None where the rate is not over it."""


def _refused(one: Rated) -> bool | None:
    return None if one.label.failure is not None else one.label.is_abstention


def _correct(one: Rated) -> bool | None:
    if one.label.failure is not None:
        return None
    return one.label.verdict == "correct"


def _hallucinated(one: Rated) -> bool | None:
    return None if one.label.verdict is None else one.label.verdict == "incorrect"


def _unverifiable(one: Rated) -> bool | None:
    return None if one.label.verdict is None else one.label.verdict == "unverifiable"


def _accepted(one: Rated) -> bool | None:
    is_judged = one.is_invented and one.label.verdict in ("accepted", "rejected")
    return one.label.verdict == "accepted" if is_judged else None


def _rejected(one: Rated) -> bool | None:
    is_judged = not one.is_invented and one.label.verdict in ("accepted", "rejected")
    return one.label.verdict == "rejected" if is_judged else None


_DEFINITIONS: Mapping[What, Mapping[str, _Definition]] = {
    "answers": {
        "refusal_rate": _Definition("abstentions, of all samples with a label", _refused),
        "hallucination_rate": _Definition(
            "incorrect answers, of all that are no abstention, unverifiable ones among them", _hallucinated
        ),
        "correct_rate": _Definition(
            "correct answers, of all samples with a label, abstentions and unverifiable answers among them", _correct
        ),
        "unverifiable_rate": _Definition("unverifiable answers, of all that are no abstention", _unverifiable),
    },
    "existence": {
        "false_acceptance_rate": _Definition(
            "answers that take an invented thing for real, of all about invented things that do or do not", _accepted
        ),
        "false_rejection_rate": _Definition(
            "answers that do not take a real thing for real, of all about real things, the controls, that do or do not",
            _rejected,
        ),
        "unverifiable_rate": _Definition(
            "answers that do not speak of the thing at all, of all samples with a label, controls among them; they are "
            "in neither of the other rates",
            _unverifiable,
        ),
    },
}


def definitions(what: What) -> dict[str, str]:
    """What each rate is, and its interval, in words."""
    texts = {name: one.text for name, one in _DEFINITIONS[what].items()}
    interval_text = (
        f"95 %, percentile bootstrap, {NUM_RESAMPLES} resamples of the questions (question_id), seed {_SEED}; "
        "where the rate is 0 or 1, the Wilson score interval of as many draws as there are questions"
    )
    return {**texts, "interval": interval_text, "failures": "samples without a label are in no rate"}


def rates_of(rated: Sequence[Rated], what: What) -> list[Rate]:
    """Every rate over all samples, then by group, groups by value; a group without any sample of a rate is left out."""
    found = [_rate(name, None, rated, one) for name, one in _DEFINITIONS[what].items()]
    for field in GROUP_FIELDS:
        values = sorted({one.groups[field] for one in rated if field in one.groups})
        for value in values:
            members = [one for one in rated if one.groups.get(field) == value]
            rates = [_rate(name, f"{field}={value}", members, one) for name, one in _DEFINITIONS[what].items()]
            found += [rate for rate in rates if rate.num]
    return found


def _rate(name: str, group: str | None, rated: Sequence[Rated], definition: _Definition) -> Rate:
    """One rate over these samples."""
    by_question: dict[str, list[int]] = {}
    for one in rated:
        counts = definition.counts(one)
        if counts is not None:
            pair = by_question.setdefault(one.question_id, [0, 0])
            pair[0] += counts
            pair[1] += 1
    counts_Q2 = np.array(list(by_question.values()), dtype=np.int64).reshape(-1, 2)
    count, num = (int(total) for total in counts_Q2.sum(axis=0))
    low, high = interval(counts_Q2) if num else (None, None)
    return Rate(name=name, group=group, count=count, num=num, value=count / num if num else None, low=low, high=high)


def interval(counts_Q2: np.ndarray, *, seed: int = _SEED) -> tuple[float, float]:
    """95 % interval of a rate.

    Args:
        counts_Q2: For each of Q questions, Q at least 1, how many of its samples count, and how many there are: (Q, 2)
            integers, the second at least 1.
        seed: Seed of the resamples.
    """
    num_questions = len(counts_Q2)
    assert num_questions, "no question to draw from"
    count, num = counts_Q2.sum(axis=0)
    if count in (0, num):
        far = _Z_SQUARED / (num_questions + _Z_SQUARED)
        return (0.0, far) if count == 0 else (1 - far, 1.0)
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(0, NUM_RESAMPLES, _CHUNK):  # in chunks, for memory: a row has as many numbers as there are questions
        drawn_BQ = rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions), size=_CHUNK)
        totals_B2 = drawn_BQ @ counts_Q2
        rates.append(totals_B2[:, 0] / totals_B2[:, 1])
    low, high = np.percentile(np.concatenate(rates), [2.5, 97.5])
    return float(low), float(high)
