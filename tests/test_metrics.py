import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score

from segpipe.models.metrics import Counts, Histogram, Scores, histogram, score


def make_maps(seed=1, shape=(4, 20, 30)):
    """Probabilities in steps of 1/250, targets and validity."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 251, shape).astype(np.uint8), rng.random(shape) < 0.4, rng.random(shape) < 0.8


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def test_counts_of_the_histogram_are_those_of_scikit_learn_over_valid_pixels():
    stored, target, valid = make_maps()
    pooled = Histogram.empty()
    for image in range(len(stored)):
        pooled = pooled + histogram(*tensors(stored[image], target[image], valid[image]))
    for threshold in (0.1, 0.5, 0.62):
        predicted = stored[valid] >= math.ceil(250 * threshold)
        counts, truth = pooled.at(threshold), target[valid]
        assert counts.iou == pytest.approx(jaccard_score(truth, predicted))
        assert counts.dice == pytest.approx(f1_score(truth, predicted))
        assert counts.precision == pytest.approx(precision_score(truth, predicted))
        assert counts.recall == pytest.approx(recall_score(truth, predicted))
        assert counts.accuracy == pytest.approx(accuracy_score(truth, predicted))
        assert counts.pixels == valid.sum()


def test_best_threshold_has_the_highest_iou_and_is_nearest_to_a_half_among_equals():
    true, false = torch.zeros(251, dtype=torch.int64), torch.zeros(251, dtype=torch.int64)
    true[180], false[60] = 5, 5
    assert Histogram(true, false).best_threshold() == 0.5
    false[140] = 5
    best = Histogram(true, false)
    assert best.at(best.best_threshold()).iou == 1.0
    assert best.best_threshold() == 0.58
    assert Histogram.empty().best_threshold() == 0.5


@pytest.mark.parametrize(
    ("counts", "ones", "note"),
    [
        (Counts(0, 0, 0, 0), {"iou", "dice", "precision", "recall", "accuracy"}, "no valid pixel"),
        (Counts(0, 0, 0, 9), {"iou", "dice", "precision", "recall", "accuracy"}, "nothing to find"),
        (Counts(0, 0, 2, 9), {"precision"}, "nothing found"),
        (Counts(0, 2, 0, 9), {"recall"}, "nothing to find"),
        (Counts(1, 2, 3, 9), set(), None),
    ],
)
def test_nothing_over_nothing_is_one_and_a_note_says_so(counts, ones, note):
    names = ("iou", "dice", "precision", "recall", "accuracy")
    assert {name for name in names if getattr(counts, name) == 1} == ones
    assert all(0 <= getattr(counts, name) <= 1 for name in names)
    assert [note in text for text in counts.notes] == ([True] if note else [])


def test_soft_scores_are_means_over_batches_and_pooled_ones_those_of_all_pixels():
    stored, target, valid = make_maps()
    parts = [slice(0, 1), slice(1, 4)]  # batches of unlike size: a mean over them is no pooled score
    total = Scores.empty()
    soft_dice, soft_iou, soft_accuracy, mean_iou = [], [], [], []
    for number, part in enumerate(parts):
        prob, true, keep = stored[part] / 250, target[part], valid[part]
        total = total + score(*tensors(prob[:, None].astype(np.float32), true[:, None], keep), loss=number + 1.0)
        p, y = prob[keep], true[keep]
        soft_dice.append(2 * (y * p).sum() / (y.sum() + p.sum()))
        soft_iou.append((y * p).sum() / (y.sum() + p.sum() - (y * p).sum()))
        soft_accuracy.append(np.where(y, p, 1 - p).mean())
        mean_iou.append(jaccard_score(y, p >= 0.5))
    found = total.measures(0.5)
    assert found.soft_dice == pytest.approx(np.mean(soft_dice), rel=1e-6)
    assert found.soft_iou == pytest.approx(np.mean(soft_iou), rel=1e-6)
    assert found.soft_accuracy == pytest.approx(np.mean(soft_accuracy), rel=1e-6)
    assert found.mean_iou == pytest.approx(np.mean(mean_iou))
    assert found.iou == pytest.approx(jaccard_score(target[valid], stored[valid] >= 125))
    assert found.loss == 1.5
    assert abs(found.mean_iou - found.iou) > 1e-5
    assert total.measures().threshold == total.histogram.best_threshold()


def test_scores_of_nothing_are_one_with_a_note_for_each():
    found = Scores.empty().measures()
    assert (found.iou, found.soft_dice, found.soft_iou, found.mean_iou, found.edge_iou) == (1, 1, 1, 1, 1)
    assert found.soft_accuracy == 1
    assert (found.loss, len(found.notes)) == (0, 3)
    blank = score(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4)).measures(0.5)
    assert (blank.iou, blank.soft_dice, blank.soft_iou, blank.mean_iou) == (1, 1, 1, 1)


def test_what_lies_under_invalid_pixels_never_counts():
    stored, target, valid = make_maps()
    prob = (stored / 250).astype(np.float32)
    clean = score(*tensors(prob[:, None], target[:, None], valid))
    junk = np.where(valid, prob, np.nan).astype(np.float32), np.where(valid, target, ~target)
    other = score(*tensors(junk[0][:, None], junk[1][:, None], valid))
    assert all(torch.equal(a, b) for a, b in zip(clean.tensors, other.tensors, strict=True))


def test_the_edge_is_counted_apart():
    stored, target, valid = make_maps(shape=(1, 200, 150))
    edge = torch.ones(200, 150, dtype=torch.bool)
    edge[64:-64, 64:-64] = False
    scores = score(*tensors((stored / 250).astype(np.float32)[:, None], target[:, None], valid), edge_BHW=edge[None])
    outer = valid[0] & edge.numpy()
    assert scores.measures(0.5).edge_iou == pytest.approx(jaccard_score(target[0][outer], stored[0][outer] >= 125))
    assert Scores.of_tensors(scores.tensors).measures(0.5) == scores.measures(0.5)
