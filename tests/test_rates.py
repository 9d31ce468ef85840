"""Rates: what each is over, and their intervals."""

import numpy as np
import pytest

from builders.judging.rates import Rated, definitions, interval, rates_of
from tracekit.format.labels import Label, Rate


def rated(
    abstains: bool | None = None,
    verdict: str | None = None,
    *,
    failure: str | None = None,
    question: str | None = None,
    is_invented: bool = True,
    **groups: str,
) -> Rated:
    label = Label(
        key="k",
        judged_sha256="0",
        is_abstention=abstains,
        verdict=verdict,  # pyright: ignore[reportArgumentType]
        judge="rules",
        prompt_sha256="0",
        raw_outputs=[],
        failure=failure,
    )
    rated.number += 1
    return Rated(label, question or f"q{rated.number}", groups, is_invented)


rated.number = 0

MIXED = [
    *[rated(False, "correct") for _ in range(3)],
    *[rated(False, "incorrect") for _ in range(2)],
    *[rated(True) for _ in range(4)],
    rated(False, "unverifiable"),
    rated(None, failure="unreadable"),
    rated(False, failure="unreadable"),
]


def by_name(rates: list[Rate]) -> dict[str, Rate]:
    return {rate.name: rate for rate in rates if rate.group is None}


@pytest.mark.parametrize(
    ("name", "count", "num"),
    [
        ("refusal_rate", 4, 10),
        ("hallucination_rate", 2, 6),
        ("correct_rate", 3, 10),
        ("unverifiable_rate", 1, 6),
    ],
)
def test_a_rate_is_over_the_samples_that_its_definition_names(name: str, count: int, num: int):
    rate = by_name(rates_of(MIXED, "answers"))[name]
    assert (rate.count, rate.num, rate.value) == (count, num, count / num)
    assert rate.low is not None
    assert rate.high is not None
    assert 0 <= rate.low < count / num < rate.high <= 1
    assert name in definitions("answers")


def test_nothing_judged_is_null_and_not_nan():
    for rate in rates_of([rated(True)], "answers"):
        if rate.name == "refusal_rate":
            assert rate.value == 1
        elif rate.name != "correct_rate":
            assert (rate.count, rate.num, rate.value, rate.low, rate.high) == (0, 0, None, None, None)
    assert all(rate.value is None for rate in rates_of([], "answers"))


def test_rates_by_group_leave_out_what_no_sample_has():
    samples = [
        rated(None, "accepted", domain="plants"),
        rated(None, "rejected", domain="plants"),
        rated(None, "rejected", domain="animals"),
        rated(None, "rejected", domain="animals", is_invented=False),
        rated(None, "unverifiable", domain="animals"),
    ]
    found = {(rate.name, rate.group): (rate.count, rate.num) for rate in rates_of(samples, "existence")}
    assert found == {
        ("false_acceptance_rate", None): (1, 3),
        ("false_rejection_rate", None): (1, 1),
        ("unverifiable_rate", None): (1, 5),
        ("false_acceptance_rate", "domain=animals"): (0, 1),
        ("false_acceptance_rate", "domain=plants"): (1, 2),
        ("false_rejection_rate", "domain=animals"): (1, 1),
        ("unverifiable_rate", "domain=animals"): (1, 3),
        ("unverifiable_rate", "domain=plants"): (0, 2),
    }


def test_the_interval_is_that_of_the_binomial_where_samples_are_independent():
    counts = np.array([[1, 1]] * 30 + [[0, 1]] * 70)
    low, high = interval(counts)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert low == pytest.approx(0.3 - half, abs=0.015)
    assert high == pytest.approx(0.3 + half, abs=0.015)
    assert interval(counts) == (low, high)


def test_samples_of_one_question_are_drawn_together():
    alone = interval(np.array([[1, 1]] * 50 + [[0, 1]] * 50))
    together = interval(np.array([[10, 10]] * 5 + [[0, 10]] * 5))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


@pytest.mark.parametrize(
    ("num_questions", "far"),
    [(1, 0.79345), (8, 0.32441), (100, 0.03699)],  # upper ends for 0 of n
)
def test_a_rate_of_zero_or_one_has_wilsons_interval_over_questions(num_questions: int, far: float):
    for num_samples in (1, 5):  # more samples of the same questions tell nothing more
        none = interval(np.array([[0, num_samples]] * num_questions))
        every = interval(np.array([[num_samples, num_samples]] * num_questions))
        assert none == (0.0, pytest.approx(far, abs=1e-5))
        assert every == (pytest.approx(1 - far, abs=1e-5), 1.0)
    assert "Wilson" in definitions("answers")["interval"]
