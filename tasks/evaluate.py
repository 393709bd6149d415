"""Evaluate: how far a mask agrees with the truth, as counts that may be added over windows, images and cities.

Axes: H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BOUNDARY_PX = 5
"""How wide the rim of a building is that boundary IoU looks at: 1.5 m at 0.3 m a pixel, about what outlines are off."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Pixels by what they are: building or not, in the mask (positive or negative) and in truth (true or false).

    Of buildings tp are hits, fp false alarms, fn misses, and tn is 0. The scores pool all that was counted. Where there
    is nothing to find and nothing was found, a score is 1.
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


@dataclass(frozen=True, slots=True)
class Tally:
    """All counts of one place: of valid pixels, of those in rims of buildings, and of buildings (both without tn)."""

    pixels: Counts = Counts()
    boundary: Counts = Counts()
    buildings: Counts = Counts()

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.pixels + other.pixels, self.boundary + other.boundary, self.buildings + other.buildings)

    @property
    def scores(self) -> dict[str, float]:
        """All scores by name, each pooled over the place."""
        pixels, buildings = self.pixels, self.buildings
        return {
            "iou": pixels.iou,
            "dice": pixels.dice,
            "accuracy": pixels.accuracy,
            "precision": pixels.precision,
            "recall": pixels.recall,
            "boundary_iou": self.boundary.iou,
            "building_precision": buildings.precision,
            "building_recall": buildings.recall,
            "building_f1": buildings.dice,
        }

    def as_row(self) -> NDArray[np.int64]:
        """The counts as numbers, in an order that `of_row` knows."""
        parts = (self.pixels, self.boundary, self.buildings)
        return np.array([n for it in parts for n in (it.tp, it.fp, it.fn, it.tn)], np.int64)

    @staticmethod
    def of_row(row: NDArray[np.int64]) -> Tally:
        """The inverse of as_row."""
        numbers = row.tolist()
        return Tally(Counts(*numbers[:4]), Counts(*numbers[4:8]), Counts(*numbers[8:]))


ROW = 12
"""Numbers in a tally's row."""
HIT, FALSE_ALARM, MISS = 8, 9, 10
"""Where buildings are counted in it."""
_FOUND, _TRUE, _FOUND_RIM, _TRUE_RIM, _INVALID = 1, 2, 4, 8, 16
CODES = _INVALID + 1
"""Codes of pixels are below this."""


def code_pixels(
    pred_HW: NDArray[np.bool_], truth_HW: NDArray[np.bool_], valid_HW: NDArray[np.bool_], boundary_px: int = BOUNDARY_PX
) -> NDArray[np.uint8]:
    """What each pixel is: building in mask and truth, and in the rim of one, as a code below CODES that may be counted.

    The rim of a mask is what lies within boundary_px (as a king moves) of a valid pixel outside it: boundary IoU after
    Cheng et al., Boundary IoU (CVPR 2021), section 4, but with no rim along invalid pixels or the edge of the raster,
    where nobody knows the outline. Codes within boundary_px of the edge of the arrays may lack a rim beyond it.
    """
    pred_HW, truth_HW = pred_HW & valid_HW, truth_HW & valid_HW
    code_HW = np.full(valid_HW.shape, _INVALID, np.uint8)
    code_HW[valid_HW] = 0
    for mask_HW, is_in, in_rim in ((pred_HW, _FOUND, _FOUND_RIM), (truth_HW, _TRUE, _TRUE_RIM)):
        rim_HW = mask_HW & near(valid_HW & ~mask_HW, boundary_px)
        code_HW += mask_HW * np.uint8(is_in) + rim_HW * np.uint8(in_rim)
    return code_HW


def near(mask_HW: NDArray[np.bool_], px: int) -> NDArray[np.bool_]:
    """True within px of True, along rows, columns and diagonals (a square of 2 px + 1 around each)."""
    for _ in ("down", "across"):
        reach = 0
        while reach < px:
            # A copy of what reaches r, moved by r + 1 at most, leaves no gap, at the edge of the array neither.
            step = min(reach + 1, px - reach)
            wider_HW = mask_HW.copy()
            wider_HW[step:] |= mask_HW[:-step]
            wider_HW[:-step] |= mask_HW[step:]
            mask_HW, reach = wider_HW, reach + step
        mask_HW = mask_HW.T
    return mask_HW


def row_of_codes(histogram: NDArray[np.int64]) -> NDArray[np.int64]:
    """A tally's row (see Tally.as_row) of how often each code occurs, without buildings."""
    return histogram @ _ROW_OF_CODE


def _rows_of_codes() -> NDArray[np.int64]:
    rows = np.zeros((CODES, ROW), np.int64)
    for code in range(_INVALID):
        for first, found, true in ((0, _FOUND, _TRUE), (4, _FOUND_RIM, _TRUE_RIM)):
            is_found, is_true = bool(code & found), bool(code & true)
            place = 0 if is_found and is_true else 1 if is_found else 2 if is_true else 3
            if first == 0 or place < 3:
                rows[code, first + place] = 1
    return rows


_ROW_OF_CODE = _rows_of_codes()


def histogram(code_HW: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each code occurs."""
    return np.bincount(code_HW.ravel(), minlength=CODES).astype(np.int64)


RESAMPLINGS = 1000
LOW, HIGH = 0.025, 0.975


def bootstrap(rows: NDArray[np.int64], seed: int = 0) -> dict[str, tuple[float, float]]:
    """Of every pooled score the interval that holds 95 % of its values over resamplings of the places, by percentiles.

    rows: a tally's row a place. As many places are drawn as there are, with replacement (Efron 1979). Empty where there
    is one place or none: nothing can be said of its spread.
    """
    if len(rows) < 2:
        return {}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLINGS):
        weights = np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows))
        for name, value in Tally.of_row(weights @ rows).scores.items():
            drawn.setdefault(name, []).append(value)
    return _intervals(drawn)


def mean_over(rows: NDArray[np.int64], seed: int = 0) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The mean of each score over images, each counting alike, and its interval over resamplings of the images.

    rows: a tally's row an image; at least one.
    """
    scores = [Tally.of_row(row).scores for row in rows]
    values = {name: np.array([it[name] for it in scores]) for name in scores[0]}
    means = {name: float(of.mean()) for name, of in values.items()}
    if len(rows) < 2:
        return means, {}
    rng = np.random.default_rng(seed)
    chosen = [rng.integers(0, len(rows), len(rows)) for _ in range(RESAMPLINGS)]
    return means, _intervals({name: [float(of[it].mean()) for it in chosen] for name, of in values.items()})


def _intervals(drawn: Mapping[str, list[float]]) -> dict[str, tuple[float, float]]:
    quantiles = {name: np.quantile(values, [LOW, HIGH]) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}
