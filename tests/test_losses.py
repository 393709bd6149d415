import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score

from segpipe.models.losses import bce_jaccard
from segpipe.models.metrics import Counts, Histogram, histogram


def make_batch(seed=0, batch=3, side=16):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (batch, 1, side, side)))
    target = torch.from_numpy((rng.random((batch, 1, side, side)) < 0.3).astype(np.float64))
    valid = torch.from_numpy(rng.random((batch, side, side)) < 0.7)
    return logits, target, valid


def test_loss_is_mean_cross_entropy_minus_log_of_the_soft_jaccard_of_the_whole_batch():
    logits, target, valid = make_batch()
    p, t = torch.sigmoid(logits)[:, 0][valid].numpy(), target[:, 0][valid].numpy()
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    jaccard = (t * p).sum() / (t.sum() + p.sum() - (t * p).sum())
    assert bce_jaccard(logits, target, valid).item() == pytest.approx(entropy - math.log(jaccard), rel=1e-5)
    assert bce_jaccard(logits, target, valid[:, None]) == bce_jaccard(logits, target, valid)


def test_what_lies_under_invalid_pixels_changes_neither_loss_nor_gradient():
    logits, target, valid = make_batch()
    results = []
    for junk in (0.0, 1e4, math.nan):
        x = torch.where(valid[:, None], logits, junk).requires_grad_()
        loss = bce_jaccard(x, torch.where(valid[:, None], target, junk), valid)
        loss.backward()
        results.append((loss.item(), x.grad))
    assert all(torch.equal(grad, results[0][1]) and loss == results[0][0] for loss, grad in results)
    assert torch.count_nonzero(results[0][1][~valid[:, None]]) == 0
    assert torch.count_nonzero(results[0][1]) == int(valid.sum())


@pytest.mark.parametrize("case", ["no building", "no valid pixel", "sure and wrong", "sure and right"])
def test_loss_and_gradient_stay_finite_in_bfloat16(case):
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, :4] = 0 if case == "no building" else 1
    valid = torch.full((2, 8, 8), case != "no valid pixel")
    sign = -1 if case == "sure and wrong" else 1
    logits = (sign * 80 * (2 * target - 1)).to(torch.bfloat16).requires_grad_()
    loss = bce_jaccard(logits, target, valid)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and logits.grad.isfinite().all()
    if case in ("sure and right", "no valid pixel"):
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_counts_of_the_histogram_are_those_of_scikit_learn_over_valid_pixels():
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 251, (2, 20, 30)).astype(np.uint8)
    target, valid = rng.random((2, 20, 30)) < 0.4, rng.random((2, 20, 30)) < 0.8
    pooled = Histogram.empty()
    for image in range(2):
        pooled = pooled + histogram(*(torch.from_numpy(a[image]) for a in (stored, target, valid)))
    for threshold in (0.1, 0.5, 0.62):
        predicted = stored[valid] >= math.ceil(250 * threshold)
        counts, truth = pooled.at(threshold), target[valid]
        assert counts.iou == pytest.approx(jaccard_score(truth, predicted))
        assert counts.dice == pytest.approx(f1_score(truth, predicted))
        assert counts.precision == pytest.approx(precision_score(truth, predicted))
        assert counts.recall == pytest.approx(recall_score(truth, predicted))
        assert counts.accuracy == pytest.approx(accuracy_score(truth, predicted))


def test_best_threshold_has_the_highest_iou_and_is_nearest_to_a_half_among_equals():
    true, false = torch.zeros(251, dtype=torch.int64), torch.zeros(251, dtype=torch.int64)
    true[180], false[60] = 5, 5
    assert Histogram(true, false).best_threshold() == 0.5
    false[140] = 5
    best = Histogram(true, false)
    assert best.at(best.best_threshold()).iou == 1.0
    assert best.best_threshold() == 0.58


def test_counts_add_up_and_nothing_to_find_is_not_a_number():
    assert Counts(1, 2, 3, 4) + Counts(10, 20, 30, 40) == Counts(11, 22, 33, 44)
    assert math.isnan(Counts(0, 0, 0, 9).iou)
    assert math.isnan(Histogram.empty().at(0.5).accuracy)
