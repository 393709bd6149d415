"""How well a network does: pooled pixel counts, soft indices averaged over batches, and the sums that both come from.

Two kinds that must not be mixed. Thresholded and pooled: the pixels of all images are counted into one table, then
divided. Soft and averaged: an index of probabilities for every batch, then the mean over batches. Nothing over nothing
is 1, and `notes` says where that was so. Axes: B batch, K classes, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 250  # a stored probability is round(250 * p): 0..250
EDGE_PX = 64
"""How far the outer edge of an area reaches in: there a network sees fill instead of surroundings."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Pixels of a predicted against a true mask; counts of several images are added before anything is divided."""

    true_positive: int = 0
    false_positive: int = 0
    false_negative: int = 0
    true_negative: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
            self.true_negative + other.true_negative,
        )

    @property
    def pixels(self) -> int:
        """All that were counted."""
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative

    @property
    def iou(self) -> float:
        """Intersection over union of the buildings, also called the Jaccard index."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive + self.false_negative)

    @property
    def dice(self) -> float:
        """2 x intersection over the sum of both, also called F1."""
        return _ratio(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)

    @property
    def precision(self) -> float:
        """Share of the predicted pixels that are true."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float:
        """Share of the true pixels that are predicted."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def accuracy(self) -> float:
        """Share of all pixels that are right."""
        return _ratio(self.true_positive + self.true_negative, self.pixels)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which of the scores are 1 only because there was nothing to divide by, in words."""
        if not self.pixels:
            return ("no valid pixel was compared: all scores are 1 by convention",)
        found, true = self.true_positive + self.false_positive, self.true_positive + self.false_negative
        if not found and not true:
            return ("nothing found and nothing to find: IoU, Dice, precision and recall are 1 by convention",)
        if not found:
            return ("nothing found: precision is 1 by convention",)
        if not true:
            return ("nothing to find: recall is 1 by convention",)
        return ()


@dataclass(frozen=True)
class Histogram:
    """How often each stored probability (0..250) occurs among true and among other pixels: the counts of any threshold.

    positive and negative are int64 tensors of 251 entries.
    """

    positive: Tensor
    negative: Tensor

    @staticmethod
    def empty(device: torch.device | None = None) -> Histogram:
        """Nothing counted yet."""
        positive, negative = torch.zeros(2, STEPS + 1, dtype=torch.int64, device=device)
        return Histogram(positive, negative)

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.positive + other.positive, self.negative + other.negative)

    def at(self, threshold: float) -> Counts:
        """Counts of the mask `stored >= ceil(250 * threshold)`, the rule by which a run makes its mask."""
        level = math.ceil(STEPS * threshold)
        hit, false = int(self.positive[level:].sum()), int(self.negative[level:].sum())
        return Counts(hit, false, int(self.positive[:level].sum()), int(self.negative[:level].sum()))

    def best_threshold(self) -> float:
        """The threshold, a multiple of 0.02 from 0.1 to 0.9, of the highest IoU to three decimals.

        Of those that are equal so far the one nearest 0.5: smaller differences are chance.
        """
        candidates = sorted((step / 50 for step in range(5, 46)), key=lambda threshold: abs(threshold - 0.5))
        return max(candidates, key=lambda threshold: round(self.at(threshold).iou, 3))


def histogram(stored_HW: Tensor, target_HW: Tensor, valid_HW: Tensor) -> Histogram:
    """Count the stored probabilities (uint8, 0..250) of the valid pixels, apart for target 1 and 0; any shape.

    The counts lie on the device of the pixels, and on a GPU are not waited for.
    """
    keep, true = valid_HW.bool().flatten(), target_HW.bool().flatten()
    # What is not valid goes into a last bin, which is dropped: picking the valid ones would have to wait for a GPU.
    level = torch.where(keep, stored_HW.flatten().long() + (STEPS + 1) * true, 2 * (STEPS + 1))
    counts = torch.zeros(2 * (STEPS + 1) + 1, dtype=torch.int64, device=level.device)
    counts.scatter_add_(0, level, torch.ones_like(level))
    return Histogram(counts[STEPS + 1 : -1], counts[: STEPS + 1])


@dataclass(frozen=True)
class Measures:
    """Scores as numbers. Pooled at `threshold`: iou to recall. Means over batches: loss, soft_dice to mean_iou.

    soft_accuracy: the mean of p where there is a building and of 1 - p elsewhere. mean_iou: of the batches' masks at
    0.5. edge_iou: pooled, of the outer 64 px of the areas. A loss that was not measured is 0.
    """

    threshold: float
    loss: float
    iou: float
    dice: float
    accuracy: float
    precision: float
    recall: float
    soft_dice: float
    soft_iou: float
    mean_iou: float
    edge_iou: float
    soft_accuracy: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Sums that all scores of any number of batches come from: add them, then take `measures`.

    histogram: of all valid pixels; edge: of those near the outer edge of their area. sums: float64 of 6 entries, the
    soft Dice, the soft IoU, the IoU at 0.5, the loss and the soft accuracy of every batch, added up, and the number of
    batches.
    """

    histogram: Histogram
    edge: Histogram
    sums: Tensor

    @staticmethod
    def empty() -> Scores:
        """Nothing measured yet."""
        return Scores(Histogram.empty(), Histogram.empty(), torch.zeros(6, dtype=torch.float64))

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.histogram + other.histogram, self.edge + other.edge, self.sums + other.sums)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, in the order that `of_tensors` takes."""
        return (self.histogram.positive, self.histogram.negative, self.edge.positive, self.edge.negative, self.sums)

    @staticmethod
    def of_tensors(tensors: tuple[Tensor, ...]) -> Scores:
        """Put together again what `tensors` gave."""
        positive, negative, edge_positive, edge_negative, sums = tensors
        return Scores(Histogram(positive, negative), Histogram(edge_positive, edge_negative), sums)

    def to(self, device: torch.device) -> Scores:
        """The same on a device."""
        return Scores.of_tensors(tuple(tensor.to(device) for tensor in self.tensors))

    def measures(self, threshold: float | None = None) -> Measures:
        """The scores; pooled ones at a threshold, by default the one with the best IoU."""
        threshold = self.histogram.best_threshold() if threshold is None else threshold
        pooled, edge = self.histogram.at(threshold), self.edge.at(threshold)
        soft_dice, soft_iou, mean_iou, loss, soft_accuracy, batches = self.sums.tolist()
        notes = pooled.notes if batches else (*pooled.notes, "no batch was measured: soft scores are 1 by convention")
        if not edge.pixels:
            notes = (*notes, "no valid pixel near the edge was compared: its IoU is 1 by convention")
        return Measures(
            threshold=threshold,
            loss=loss / max(batches, 1),
            iou=pooled.iou,
            dice=pooled.dice,
            accuracy=pooled.accuracy,
            precision=pooled.precision,
            recall=pooled.recall,
            soft_dice=_ratio(soft_dice, batches),
            soft_iou=_ratio(soft_iou, batches),
            mean_iou=_ratio(mean_iou, batches),
            edge_iou=edge.iou,
            soft_accuracy=_ratio(soft_accuracy, batches),
            notes=notes,
        )


@torch.no_grad()
def score(
    prob_BKHW: Tensor,
    target_BKHW: Tensor,
    valid_BHW: Tensor,
    loss: Tensor | float = 0.0,
    edge_BHW: Tensor | None = None,
) -> Scores:
    """Scores of one batch, on its device: soft and thresholded ones, and the loss that was found for it.

    Soft Dice is 2 Σyp / (Σy + Σp), soft IoU Σyp / (Σy + Σp - Σyp), and soft accuracy the mean of yp + (1 - y)(1 - p),
    over the batch's valid pixels. edge_BHW is True
    near the outer edge of the area that the batch comes from; without it no pixel counts as edge.
    """
    prob, true = prob_BKHW.detach().float(), target_BKHW.bool()
    keep = valid_BHW.bool().reshape(prob.shape[0], 1, *prob.shape[2:]).expand_as(prob)
    prob = prob.masked_fill(~keep, 0.0)
    true = true & keep
    stored = torch.round(prob * STEPS).to(torch.uint8)
    edge = None if edge_BHW is None else keep & edge_BHW.bool().reshape(-1, 1, *prob.shape[2:])
    both, sum_true, sum_prob, pixels = (prob * true).sum(), true.sum(), prob.sum(), keep.sum()
    mask = stored >= STEPS / 2  # invalid pixels have probability 0
    union, common = (mask | true).sum(), (mask & true).sum()
    sums = torch.stack(
        [
            _quotient(2 * both, sum_true + sum_prob),
            _quotient(both, sum_true + sum_prob - both),
            _quotient(common, union),
            torch.as_tensor(loss, dtype=torch.float64, device=prob.device),
            # Σyp + Σ(1-y)(1-p) is N - Σy - Σp + 2Σyp; in float64, since N is large.
            _quotient(pixels - sum_true - sum_prob.double() + 2 * both.double(), pixels),
            torch.ones((), dtype=torch.float64, device=prob.device),
        ]
    )
    outer = Histogram.empty(prob.device) if edge is None else histogram(stored, true, edge)
    return Scores(histogram(stored, true, keep), outer, sums)


def _quotient(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole, 1 where both are 0, without waiting for a GPU."""
    part, whole = part.double(), whole.double()
    return torch.where(whole > 0, part / whole.clamp(min=1e-300), 1.0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
