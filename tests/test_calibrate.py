import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from segpipe.models.calibrate import (
    LogitHistogram,
    calibration_error,
    fit_temperature,
    logit_histogram,
    reliability,
)


def overconfident(temperature, pixels=200_000, seed=0):
    """Logits that are so many times what they should be, and labels drawn with the probabilities they should give."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(-1, 2, pixels)
    target = rng.random(pixels) < 1 / (1 + np.exp(-honest))
    return honest * temperature, target


def counted(logits, target):
    return logit_histogram(torch.from_numpy(logits), torch.from_numpy(target), torch.ones(len(target)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_logits_were_multiplied_by_is_found_and_makes_them_honest(temperature):
    logits, target = overconfident(temperature)
    counts = counted(logits, target)
    found = fit_temperature(counts)
    assert found == pytest.approx(temperature, rel=0.02)
    oracle = minimize_scalar(
        lambda t: log_loss(target, 1 / (1 + np.exp(-logits / t))), bounds=(0.1, 10), method="bounded"
    )
    assert found == pytest.approx(oracle.x, rel=2e-3)
    assert calibration_error(counts, found) < 0.005
    if temperature != 1:
        assert calibration_error(counts) > 5 * calibration_error(counts, found)


def test_calibration_error_and_reliability_are_those_of_bins_of_equal_width():
    logits, target = overconfident(2.0, pixels=20_000)
    # On the middles of the histogram's bins, so that no probability is rounded into another bin.
    logits = np.clip(np.round(logits / 0.02) * 0.02, -20, 20)
    prob = 1 / (1 + np.exp(-logits))
    share, mean = calibration_curve(target, prob, n_bins=15)
    rows = reliability(counted(logits, target))
    assert [row.share for row in rows] == pytest.approx(share, abs=1e-9)
    assert [row.probability for row in rows] == pytest.approx(mean, abs=1e-9)
    pixels = np.histogram(prob, 15, (0, 1))[0]
    error = (pixels * abs(share - mean)).sum() / pixels.sum()
    assert calibration_error(counted(logits, target)) == pytest.approx(error, abs=1e-9)
    assert [row.pixels for row in rows] == pixels.tolist()


def test_histograms_add_up_and_leave_out_invalid_pixels():
    logits, target = overconfident(1.0, pixels=1000)
    valid = np.arange(1000) % 3 != 0
    whole = logit_histogram(*(torch.from_numpy(a) for a in (logits, target, valid)))
    junk = np.where(valid, logits, np.nan)
    parts = [
        logit_histogram(*(torch.from_numpy(a[s]) for a in (junk, target, valid)))
        for s in (slice(300), slice(300, None))
    ]
    both = LogitHistogram.empty() + parts[0] + parts[1]
    assert torch.equal(both.positive, whole.positive) and torch.equal(both.negative, whole.negative)
    assert int(both.positive.sum()) == (target & valid).sum()


def test_nothing_to_calibrate_on_leaves_logits_as_they_are_and_certainty_stays_bounded():
    assert fit_temperature(LogitHistogram.empty()) == 1
    assert calibration_error(LogitHistogram.empty()) == 0
    right = counted(np.array([5.0, -5.0]), np.array([True, False]))
    wrong = counted(np.array([5.0, -5.0]), np.array([False, True]))
    assert fit_temperature(right) == pytest.approx(0.05) and fit_temperature(wrong) == pytest.approx(20)
