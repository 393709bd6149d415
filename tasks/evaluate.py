"""Evaluate: how far a mask agrees with the truth, as counts of pixels that may be added over windows, areas and cities.

Axes: H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Counts:
    """Valid pixels by what they are: building or not, in the mask (positive or negative) and in truth (true or false).

    The scores pool all pixels that were counted. Where there is nothing to find and nothing was found, a score is 1.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    def __post_init__(self) -> None:
        if min(self.tp, self.fp, self.fn, self.tn) < 0:
            raise ValueError(f"{self}: expected counts of 0 or more")

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def pixels(self) -> int:
        """All pixels that were counted."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def iou(self) -> float:
        """Intersection over union of the buildings (Jaccard index)."""
        return _share(self.tp, self.tp + self.fp + self.fn)

    @property
    def dice(self) -> float:
        """Twice the intersection over the sum of both areas (F1)."""
        return _share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def accuracy(self) -> float:
        """Share of all pixels that are right."""
        return _share(self.tp + self.tn, self.pixels)

    @property
    def precision(self) -> float:
        """Share of the pixels found that are buildings in truth."""
        return _share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of the true building pixels that were found."""
        return _share(self.tp, self.tp + self.fn)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which scores are 1 only because there was nothing to divide by, in words."""
        if not self.pixels:
            return ("no valid pixel was compared: all scores are 1 by convention",)
        found, true = self.tp + self.fp, self.tp + self.fn
        if not found and not true:
            return (
                "no building in the mask and none in the truth: IoU, Dice, precision and recall are 1 by convention",
            )
        if not found:
            return ("no building in the mask: precision is 1 by convention",)
        if not true:
            return ("no building in the truth: recall is 1 by convention",)
        return ()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def count(pred_HW: NDArray[np.bool_], truth_HW: NDArray[np.bool_], valid_HW: NDArray[np.bool_]) -> Counts:
    """Compare a mask with the truth where valid_HW is True; True means building. All three have the same shape."""
    if not pred_HW.shape == truth_HW.shape == valid_HW.shape:
        raise ValueError(
            f"shapes {pred_HW.shape}, {truth_HW.shape} and {valid_HW.shape}: expected the same three times"
        )
    pred_HW, truth_HW = pred_HW & valid_HW, truth_HW & valid_HW
    tp = int(np.count_nonzero(pred_HW & truth_HW))
    found, true = int(np.count_nonzero(pred_HW)), int(np.count_nonzero(truth_HW))
    fp, fn = found - tp, true - tp
    return Counts(tp, fp, fn, int(np.count_nonzero(valid_HW)) - tp - fp - fn)
