"""Calibration: by hand, and against scikit-learn where it has the function."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from tracekit.card.calibration import auroc, brier_score, calibrate, expected_calibration_error, reliability
from tracekit.errors import ConfigError

CONFIDENCE = [0.95, 0.85, 0.85, 0.35, 0.35]
RIGHT = [True, True, False, False, True]


def test_ece_by_hand():
    # bins: 0.95 right 1 of 1; 0.85 right 1 of 2; 0.35 right 1 of 2
    expected = 0.2 * 0.05 + 0.4 * 0.35 + 0.4 * 0.15
    assert expected_calibration_error(CONFIDENCE, RIGHT) == pytest.approx(expected, abs=1e-12)


def test_ece_of_one_bin_is_the_distance_of_the_means():
    assert expected_calibration_error(CONFIDENCE, RIGHT, num_bins=1) == pytest.approx(abs(0.67 - 0.6))


def test_brier_by_hand():
    assert brier_score(CONFIDENCE, RIGHT) == pytest.approx((0.05**2 + 0.15**2 + 0.85**2 + 0.35**2 + 0.65**2) / 5)


def test_auroc_by_hand_with_ties_counted_half():
    # right: .95 .85 .35, wrong: .85 .35: of six pairs .95 wins two, .85 ties one and wins one, .35 ties one
    assert auroc(CONFIDENCE, RIGHT) == pytest.approx((2 + 0.5 + 1 + 0 + 0.5) / 6)
    assert auroc([0.5] * 4, [True, False, True, False]) == 0.5


@pytest.mark.parametrize("right", [[True, True], [False, False]])
def test_auroc_of_one_class_is_none(right: list[bool]):
    assert auroc([0.1, 0.9], right) is None


@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_finds_the_same(seed: int):
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.random(300), 2)  # ties, and values on the edges of bins
    right = rng.random(300) < confidence
    found = calibrate(confidence, right)
    assert found.brier == pytest.approx(brier_score_loss(right, confidence), abs=1e-12)
    assert found.auroc == pytest.approx(roc_auc_score(right, confidence), abs=1e-12)
    shares, means = calibration_curve(right, confidence, n_bins=10)
    filled = [one for one in found.bins if one.num]
    np.testing.assert_allclose([one.accuracy for one in filled], shares, atol=1e-12)
    np.testing.assert_allclose([one.mean_confidence for one in filled], means, atol=1e-12)
    weights = np.array([one.num for one in filled]) / 300
    assert found.ece == pytest.approx(float((weights * np.abs(shares - means)).sum()), abs=1e-12)
    assert (found.num, found.accuracy) == (300, right.mean())


def test_bins_hold_their_upper_edge_and_the_first_holds_zero():
    bins = reliability([0.0, 0.1, 0.1000001, 0.3, 0.7, 1.0], [True] * 6)
    assert [one.num for one in bins] == [2, 1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert (bins[2].low, bins[2].high) == (0.2, 0.3)
    assert bins[3].accuracy is None
    assert bins[3].mean_confidence is None


def test_perfect_confidence_has_no_error():
    found = calibrate([1.0, 0.0, 1.0], [True, False, True])
    assert (found.ece, found.brier, found.auroc) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("confidence", "right", "message"),
    [
        ([], [], r"N not 0"),
        ([0.5], [True, False], r"confidence has shape \(1,\), is_correct \(2,\)"),
        ([0.5, 70.0], [True, False], r"confidence\[1\] is 70.0, expected 0 to 1; divide percent by 100"),
        ([0.5, float("nan")], [True, False], r"confidence\[1\] is nan"),
        ([0.5, 0.5], [True, None], "leave answers that were not judged out"),
    ],
)
def test_what_cannot_be_scored_is_refused(confidence: list[float], right: list[bool], message: str):
    for score in (brier_score, auroc, expected_calibration_error, calibrate):
        with pytest.raises(ConfigError, match=message):
            score(confidence, right)


def test_no_bins_are_refused():
    with pytest.raises(ConfigError, match="num_bins is 0"):
        reliability([0.5], [True], num_bins=0)
