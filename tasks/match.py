"""Match: which of the footprints found are true ones, each at most once, by the rule of the SpaceNet challenges.

Footprints are in pixels: x = column, y = row downwards. Everything that is kept of a city is a few numbers a footprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from .outlines import Geometries

LEAST_IOU = 0.5
"""A footprint found is a hit if its IoU with a true one that is still free is at least this (Van Etten et al. 2018)."""


@dataclass(frozen=True)
class Pairs:
    """Footprints found and true, by number, that overlap by LEAST_IOU. Equally long arrays."""

    found: NDArray[np.int64]
    true: NDArray[np.int64]
    iou: NDArray[np.float64]
    confidence: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.found)

    def take(self, chosen: NDArray[np.bool_]) -> Pairs:
        """Those that a mask chooses."""
        return Pairs(self.found[chosen], self.true[chosen], self.iou[chosen], self.confidence[chosen])

    @staticmethod
    def concatenate(parts: Sequence[Pairs]) -> Pairs:
        """All of the parts, in their order."""
        empty = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
        parts = [empty, *parts]
        names = ("found", "true", "iou", "confidence")
        return Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def overlaps(one: Geometries, other: Geometries) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of all pairs whose bounding boxes meet."""
    if not (len(one) and len(other)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    first, second = shapely.STRtree(other).query(one)
    return first, second


def ious(one: Geometries, other: Geometries) -> NDArray[np.float64]:
    """Intersection over union of each pair, as far as it is LEAST_IOU or more; less may be told as 0."""
    area_one, area_other = shapely.area(one), shapely.area(other)
    iou = np.zeros(len(one))
    # What their sizes, or their boxes, do not allow is not intersected: that is what costs.
    a, b = shapely.bounds(one), shapely.bounds(other)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    most = np.minimum(np.minimum(area_one, area_other), np.prod(np.maximum(sides, 0), axis=1))
    # A little less, for a bound that rounding has made too small must not hide a pair.
    near = np.flatnonzero(most >= (LEAST_IOU - 1e-6) * (area_one + area_other - most))
    common = shapely.area(shapely.intersection(one[near], other[near]))
    iou[near] = common / (area_one[near] + area_other[near] - common)
    return iou


def match(pairs: Pairs) -> Pairs:
    """The pairs that are matches: no footprint in two of them.

    Those found choose in turn, the most confident first (then by number), and each takes, of the true ones still free,
    the one of the largest IoU (then by number).
    """
    alone = _only_once(pairs.found) & _only_once(pairs.true)
    rest = np.flatnonzero(~alone)
    order = rest[np.lexsort((pairs.true[rest], -pairs.iou[rest], pairs.found[rest], -pairs.confidence[rest]))]
    found_taken: set[int] = set()
    true_taken: set[int] = set()
    chosen = alone
    for place, found, true in zip(order.tolist(), pairs.found[order].tolist(), pairs.true[order].tolist(), strict=True):
        if found not in found_taken and true not in true_taken:
            chosen[place] = True
            found_taken.add(found)
            true_taken.add(true)
    return pairs.take(chosen)


def _only_once(numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    once: NDArray[np.bool_] = counts[inverse] == 1
    return once
