"""Judge the footprints of a run: hits, false alarms and misses, cell by cell, with a few numbers for each of them.

A pair of footprints is looked at in one cell only, the one that holds the upper left corner of what their bounding
boxes share. What nobody can judge is left apart: most of it lies where one side has no valid pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import rasterio.features
import shapely
from affine import Affine
from numpy.typing import NDArray

from segpipe.tasks.grid import Window
from segpipe.tasks.match import LEAST_IOU, Pairs, ious, match, overlaps
from segpipe.tasks.outlines import Geometries

from .footprints import FOUND, TRUE, Cell, Cells, Footprints

APART_SHARE = 0.5
"""A footprint is left apart if more than this share of it lies where it cannot be judged."""
HIT, FALSE_ALARM, MISS, APART = "hit", "false alarm", "miss", "not judged"
KINDS = (HIT, FALSE_ALARM, MISS, APART)


class Verdicts:
    """What is known of each footprint by its number: 12 bytes for one found, 6 for a true one, 24 for a hidden pair.

    partner, iou: of a footprint found the number of the true one that it hits (-1: none) and their IoU. hit: True for a
    true one that is hit. hidden_px: of each kind, area in pixels that cannot be judged.
    """

    def __init__(self, found: int, true: int) -> None:
        self.partner = np.full(found, -1, np.int32)
        self.iou = np.zeros(found, np.float32)
        self.hit = np.zeros(true, np.bool_)
        self.hidden_px = {FOUND: np.zeros(found, np.float32), TRUE: np.zeros(true, np.float32)}
        self.apart = np.zeros(true, np.bool_)
        self.open: list[Pairs] = []
        """Pairs that cannot be decided in the cell that they were found in."""
        self.hidden_pairs: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
        """Numbers of one found and of a true one, and the hidden pixels that lie in both."""

    def take(self, pairs: Pairs) -> None:
        """Enter matches."""
        self.partner[pairs.found] = pairs.true
        self.iou[pairs.found] = pairs.iou
        self.hit[pairs.true] = True


def judge_cell(
    verdicts: Verdicts, cells: Cells, cell: Cell, sides: dict[int, Footprints], judged_HW: NDArray[np.bool_]
) -> None:
    """Look at all pairs of one cell, and at how much of its footprints cannot be judged.

    sides: the footprints of both kinds in it. judged_HW: True where both run and truth are valid, over its window.
    """
    window, extent = cells.window(cell), cells.extent
    hidden = {kind: hidden_pixels(it.geometry, ~judged_HW, window) for kind, it in sides.items()}
    for kind, footprints in sides.items():
        outside = np.where(footprints.is_home, _area_outside(footprints.geometry, extent), 0)
        np.add.at(verdicts.hidden_px[kind], footprints.number, hidden[kind] + outside)
    twice = _hidden_pairs(sides, hidden, ~judged_HW, window)
    if len(twice[0]):
        verdicts.hidden_pairs.append(twice)
    found, true = sides[FOUND], sides[TRUE]
    first, second = _pairs_of_cell(found, true, window, extent)
    iou = ious(found.geometry[first], true.geometry[second])
    near = iou >= LEAST_IOU
    first, second = first[near], second[near]
    pairs = Pairs(found.number[first], true.number[second], iou[near], found.confidence[first])
    # What lies in this cell alone has all of its pairs here; if it has but one, and so has its partner, that is it.
    alone = _within(found.geometry[first], window) & _within(true.geometry[second], window)
    for numbers in (pairs.found, pairs.true):
        _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        alone &= counts[inverse] == 1
    verdicts.take(pairs.take(alone))
    if not alone.all():
        verdicts.open.append(pairs.take(~alone))


def settle(verdicts: Verdicts, cells: Cells) -> None:
    """When all cells are looked at: decide what was left open, and what is apart.

    A true footprint is apart if it is hidden by more than half; one found, if that is so together with what lies in
    true ones that are apart, less what is hidden there and counted already. What is a match is judged all the same.
    """
    verdicts.take(match(Pairs.concatenate(verdicts.open)))
    verdicts.open.clear()
    for cell in cells.cells():
        true = cells.read(cell, TRUE)
        hidden = verdicts.hidden_px[TRUE][true.number] > APART_SHARE * shapely.area(true.geometry)
        true = true.take(hidden & ~verdicts.hit[true.number])
        if len(true):
            verdicts.apart[true.number] = True
            found = cells.read(cell, FOUND)
            first, second = _pairs_of_cell(found, true, cells.window(cell), cells.extent)
            common = shapely.intersection(found.geometry[first], true.geometry[second])
            inside = shapely.area(common) - _area_outside(common, cells.extent)
            np.add.at(verdicts.hidden_px[FOUND], found.number[first], inside)
    for one, other, both in verdicts.hidden_pairs:
        np.subtract.at(verdicts.hidden_px[FOUND], one, both * verdicts.apart[other])
    verdicts.hidden_pairs.clear()


def _hidden_pairs(
    sides: dict[int, Footprints], hidden: dict[int, NDArray[np.float64]], hidden_HW: NDArray[np.bool_], window: Window
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs with hidden pixels of a window in both: their numbers, and how many. hidden: of each footprint, by kind."""
    found, true = (sides[kind].take(hidden[kind] > 0) for kind in (FOUND, TRUE))
    of_found, of_true = (hidden[kind][hidden[kind] > 0] for kind in (FOUND, TRUE))
    first, second = overlaps(found.geometry, true.geometry)
    # By way of the union, which has an area always; what two polygons share may be a line.
    either = hidden_pixels(shapely.union(found.geometry[first], true.geometry[second]), hidden_HW, window)
    both = of_found[first] + of_true[second] - either
    some = both > 0
    return found.number[first[some]], true.number[second[some]], both[some]


def _pairs_of_cell(
    found: Footprints, true: Footprints, window: Window, extent: Window
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of those pairs whose bounding boxes meet, and for which this cell answers."""
    first, second = overlaps(found.geometry, true.geometry)
    bounds = [shapely.bounds(it.geometry[at]) for it, at in ((found, first), (true, second))]
    corner = np.maximum(bounds[0][:, :2], bounds[1][:, :2])
    corner = np.clip(np.floor(corner), 0, [extent.width - 1, extent.height - 1])
    here = (corner >= [window.col_off, window.row_off]).all(axis=1)
    here &= (corner < [window.col_stop, window.row_stop]).all(axis=1)
    return first[here], second[here]


def _within(geometry: Geometries, window: Window) -> NDArray[np.bool_]:
    """True for footprints that lie in no other cell, nor over the edge of this one."""
    xmin, ymin, xmax, ymax = shapely.bounds(geometry).T
    inside: NDArray[np.bool_] = (xmin > window.col_off) & (ymin > window.row_off)
    inside &= (xmax < window.col_stop) & (ymax < window.row_stop)
    return inside


def _area_outside(geometry: Geometries, extent: Window) -> NDArray[np.float64]:
    """Area in pixels beyond the raster."""
    out = np.zeros(len(geometry))
    over = np.flatnonzero(~_within(geometry, extent))
    box = shapely.box(0, 0, extent.width, extent.height)
    out[over] = shapely.area(geometry[over]) - shapely.area(shapely.intersection(geometry[over], box))
    return out


def hidden_pixels(geometry: Geometries, hidden_HW: NDArray[np.bool_], window: Window) -> NDArray[np.float64]:
    """Pixels of a window that are hidden and have their centre in each footprint."""
    counts = np.zeros(len(geometry))
    if not (len(geometry) and hidden_HW.any()):
        return counts
    sums = np.zeros((window.height + 1, window.width + 1), np.int32)
    np.cumsum(np.cumsum(hidden_HW, axis=0, dtype=np.int32), axis=1, out=sums[1:, 1:])
    xmin, ymin, xmax, ymax = shapely.bounds(geometry).T
    left, right = (
        np.clip(it, 0, window.width).astype(np.int64)
        for it in (_low(xmin, window.col_off), _high(xmax, window.col_off))
    )
    top, bottom = (
        np.clip(it, 0, window.height).astype(np.int64)
        for it in (_low(ymin, window.row_off), _high(ymax, window.row_off))
    )
    near = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    for index in np.flatnonzero(near).tolist():
        rows, cols = slice(top[index], bottom[index]), slice(left[index], right[index])
        place = Affine.translation(window.col_off + cols.start, window.row_off + rows.start)
        part_HW = hidden_HW[rows, cols]
        inside_HW = rasterio.features.geometry_mask([geometry[index]], part_HW.shape, place, invert=True)
        counts[index] = np.count_nonzero(inside_HW & part_HW)
    return counts


def _low(values: NDArray[np.float64], offset: int) -> NDArray[np.float64]:
    return np.floor(values) - offset


def _high(values: NDArray[np.float64], offset: int) -> NDArray[np.float64]:
    return np.ceil(values) - offset


@dataclass(frozen=True)
class Judged:
    """Footprints of one cell with their verdicts, equally long arrays.

    kind: one of KINDS. truth_id, building_id: None where there is none on that side. iou: with its partner, else NaN;
    confidence: of a building found, else NaN. geometry: of a hit the one found.
    """

    kind: NDArray[np.object_]
    truth_id: NDArray[np.object_]
    building_id: NDArray[np.object_]
    iou: NDArray[np.float64]
    confidence: NDArray[np.float64]
    geometry: Geometries
    is_true: NDArray[np.bool_]
    """False for what was found by the run, True for what is of the truth."""
    is_hit: NDArray[np.bool_]
    """True of either side of a match: true footprints that are hit are told here too, with kind hit."""


def judged(verdicts: Verdicts, cells: Cells) -> Iterator[Judged]:
    """All footprints of both kinds with their verdicts, each in one cell, in the order of cells and numbers."""
    for cell in cells.cells():
        found, true = (it.take(it.is_home) for it in (cells.read(cell, FOUND), cells.read(cell, TRUE)))
        partner = verdicts.partner[found.number]
        names = dict(zip(true.number.tolist(), true.id.tolist(), strict=True))
        truth_id = [None if one < 0 else names.get(one) or cells.id_of(TRUE, one) for one in partner.tolist()]
        hidden = verdicts.hidden_px[FOUND][found.number] > APART_SHARE * shapely.area(found.geometry)
        is_hit = np.concatenate([partner >= 0, verdicts.hit[true.number]])
        apart = np.concatenate([hidden, verdicts.apart[true.number]])
        is_true = np.repeat([False, True], [len(found), len(true)])
        kind = np.where(is_hit, HIT, np.where(apart, APART, np.where(is_true, MISS, FALSE_ALARM))).astype(np.object_)
        nothing = np.full(len(true), np.nan)
        yield Judged(
            kind=kind,
            truth_id=np.array([*truth_id, *true.id.tolist()], np.object_),
            building_id=np.array([*found.id.tolist(), *[None] * len(true)], np.object_),
            iou=np.concatenate([np.where(partner >= 0, verdicts.iou[found.number], np.nan), nothing]),
            confidence=np.concatenate([found.confidence, nothing]),
            geometry=np.concatenate([found.geometry, true.geometry]),
            is_true=is_true,
            is_hit=is_hit,
        )
