"""Pixel counts of a binary map against the truth, pooled over any number of images. Axes: H rows, W columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 250  # a stored probability is round(250 * p): 0..250


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
    def iou(self) -> float:
        """Intersection over union of the buildings; NaN where there are none, neither true nor predicted."""
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
        right = self.true_positive + self.true_negative
        return _ratio(right, right + self.false_positive + self.false_negative)


@dataclass(frozen=True)
class Histogram:
    """How often each stored probability (0..250) occurs among true and among other pixels: the counts of any threshold.

    positive and negative are int64 tensors of 251 entries.
    """

    positive: Tensor
    negative: Tensor

    @staticmethod
    def empty() -> Histogram:
        """Nothing counted yet."""
        return Histogram(torch.zeros(STEPS + 1, dtype=torch.int64), torch.zeros(STEPS + 1, dtype=torch.int64))

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
        return max(candidates, key=lambda threshold: round(_or_zero(self.at(threshold).iou), 3))


def histogram(stored_HW: Tensor, target_HW: Tensor, valid_HW: Tensor) -> Histogram:
    """Count the stored probabilities (uint8, 0..250) of the valid pixels, apart for target 1 and 0; any shape."""
    keep, true = valid_HW.bool(), target_HW.bool()
    return Histogram(
        torch.bincount(stored_HW[keep & true].long().flatten(), minlength=STEPS + 1)[: STEPS + 1].cpu(),
        torch.bincount(stored_HW[keep & ~true].long().flatten(), minlength=STEPS + 1)[: STEPS + 1].cpu(),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
