"""Calibration: how well stated confidence agrees with being right. numpy alone; nothing here knows records or files.

    expected_calibration_error   how far confidence lies from accuracy, bin by bin (Guo et al. 2017)
    brier_score                  mean squared distance of confidence from being right (Brier 1950)
    auroc                        whether right answers have the higher confidence (Mann and Whitney 1947)
    reliability                  the bins themselves, for a diagram

Confidence is a probability, 0 to 1, one per answer, of that answer being right.
"""

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from tracekit.errors import ConfigError

__all__ = [
    "Calibration",
    "ReliabilityBin",
    "auroc",
    "brier_score",
    "calibrate",
    "expected_calibration_error",
    "reliability",
]

NUM_BINS = 10
"""Bins where none are asked for."""


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answers whose confidence lies in `(low, high]`; the first bin holds 0 too."""

    low: float
    """Lower edge, 0 to 1."""
    high: float
    """Upper edge."""
    num: int
    """Answers in it."""
    mean_confidence: float | None
    """Their mean confidence; null where there are none."""
    accuracy: float | None
    """Share of them that are right; null where there are none."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How confidence and being right go together over some answers."""

    num: int
    """Answers."""
    accuracy: float
    """Share that is right."""
    mean_confidence: float
    """Mean confidence, 0 to 1."""
    ece: float
    """Expected calibration error over equal-width bins, 0 (calibrated) to 1."""
    brier: float
    """Brier score, 0 (sure and right) to 1 (sure and wrong)."""
    auroc: float | None
    """Chance that a right answer has more confidence than a wrong one; null where all are right, or all wrong."""
    bins: list[ReliabilityBin]
    """The bins that `ece` is over, in order."""


def expected_calibration_error(confidence: ArrayLike, is_correct: ArrayLike, *, num_bins: int = NUM_BINS) -> float:
    """Mean distance of accuracy from mean confidence over equal-width bins, weighted by their answers; 0 to 1.

    Guo et al., On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599, equation 3.

    Args:
        confidence: (N,) probabilities of being right, 0 to 1.
        is_correct: (N,) whether each answer is right.
        num_bins: Bins of equal width over 0 to 1; a bin is `(low, high]`.

    Raises:
        ConfigError: no answers, shapes that differ, confidence outside 0 to 1, or no bins.
    """
    bins = reliability(confidence, is_correct, num_bins=num_bins)
    total = sum(one.num for one in bins)
    return sum(one.num / total * abs(_gap(one)) for one in bins if one.num)


def brier_score(confidence: ArrayLike, is_correct: ArrayLike) -> float:
    """Mean of (confidence - right)², right being 1 or 0; 0 to 1.

    The half of Brier's score (Verification of forecasts expressed in terms of probability, Monthly Weather Review 78,
    1950) that is usual for events with two outcomes.

    Args:
        confidence: (N,) probabilities of being right, 0 to 1.
        is_correct: (N,) whether each answer is right.

    Raises: as `expected_calibration_error`.
    """
    values, right = _checked(confidence, is_correct)
    return float(np.mean((values - right) ** 2))


def auroc(confidence: ArrayLike, is_correct: ArrayLike) -> float | None:
    """Chance that a right answer drawn at random has more confidence than a wrong one, ties counted half; 0 to 1.

    The area under the ROC curve, as the rank statistic U / (right answers x wrong answers) of Mann and Whitney, On a
    Test of Whether one of Two Random Variables is Stochastically Larger than the Other, 1947.

    Args:
        confidence: (N,) probabilities of being right, 0 to 1; only their order counts.
        is_correct: (N,) whether each answer is right.

    Returns:
        The area; None where every answer is right, or every one wrong.

    Raises: as `expected_calibration_error`.
    """
    values, right = _checked(confidence, is_correct)
    num_right = int(right.sum())
    num_wrong = len(right) - num_right
    if not num_right or not num_wrong:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of tied values the mean of their ranks, counted from 1
    statistic = ranks[inverse.reshape(-1)][right].sum() - num_right * (num_right + 1) / 2
    return float(statistic / (num_right * num_wrong))


def reliability(confidence: ArrayLike, is_correct: ArrayLike, *, num_bins: int = NUM_BINS) -> list[ReliabilityBin]:
    """The bins of a reliability diagram, `num_bins` of equal width over 0 to 1, in order, empty ones too.

    Args and Raises: as `expected_calibration_error`.
    """
    if num_bins < 1:
        raise ConfigError(f"num_bins is {num_bins}, expected 1 or more")
    values, right = _checked(confidence, is_correct)
    edges = np.arange(num_bins + 1) / num_bins
    numbers = np.maximum(np.searchsorted(edges, values, side="left") - 1, 0)
    counts = np.bincount(numbers, minlength=num_bins)
    sums = np.bincount(numbers, weights=values, minlength=num_bins)
    rights = np.bincount(numbers, weights=right, minlength=num_bins)
    return [
        ReliabilityBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            num=int(counts[i]),
            mean_confidence=float(sums[i] / counts[i]) if counts[i] else None,
            accuracy=float(rights[i] / counts[i]) if counts[i] else None,
        )
        for i in range(num_bins)
    ]


def calibrate(confidence: ArrayLike, is_correct: ArrayLike, *, num_bins: int = NUM_BINS) -> Calibration:
    """All of this module's numbers at once.

    Args and Raises: as `expected_calibration_error`.
    """
    values, right = _checked(confidence, is_correct)
    return Calibration(
        num=len(values),
        accuracy=float(right.mean()),
        mean_confidence=float(values.mean()),
        ece=expected_calibration_error(values, right, num_bins=num_bins),
        brier=brier_score(values, right),
        auroc=auroc(values, right),
        bins=reliability(values, right, num_bins=num_bins),
    )


def _gap(one: ReliabilityBin) -> float:
    assert one.accuracy is not None, one
    assert one.mean_confidence is not None, one
    return one.accuracy - one.mean_confidence


def _checked(confidence: ArrayLike, is_correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Confidence as float64 (N,), being right as bool (N,)."""
    values, right = np.asarray(confidence, dtype=np.float64), np.asarray(is_correct)
    if values.ndim != 1 or values.shape != right.shape or not len(values):
        raise ConfigError(
            f"confidence has shape {values.shape}, is_correct {right.shape}; expected the same (N,) of both, N not 0"
        )
    is_outside = ~((values >= 0) & (values <= 1))
    if is_outside.any():
        place = int(np.argmax(is_outside))
        raise ConfigError(f"confidence[{place}] is {values[place]}, expected 0 to 1; divide percent by 100")
    if not np.isin(right, (0, 1)).all():
        raise ConfigError("is_correct holds values other than true and false; leave answers that were not judged out")
    return values, right.astype(np.bool_)
