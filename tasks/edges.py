"""The pixels along the edges of buildings: those with a 4-neighbour outside.

Found from outlines, wherever these lie, or from the mask of a block for all its buildings at once, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from .grid import Window
from .outlines import Geometries, Int64s, Runs, ranges
from .predict import INVALID

CELL_PX = 512
"""Pixels are looked at together by cells of this side: few reads, each of a bounded window."""

_STRIP_PIXELS = 2**18
"""Pixels of a mask that are looked at together: what is made of them stays in a core's cache."""


@dataclass(frozen=True)
class Edges:
    """Of the pixels along the edge of each building: their number and the sum of their uint8 probabilities.

    touches_nodata: one of their neighbours outside has no valid imagery.
    """

    pixels: Int64s
    prob_sum: Int64s
    touches_nodata: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.bool_] | Int64s) -> Edges:
        """Those that a mask or an array of indices chooses."""
        return Edges(self.pixels[chosen], self.prob_sum[chosen], self.touches_nodata[chosen])


def edges_of_mask(mask_HW: NDArray[np.bool_], prob_HW: NDArray[np.uint8], runs: Runs) -> Edges:
    """The edges of all regions of a mask, by their labels: right for those that touch no side of it."""
    pixels, prob_sum = np.zeros(runs.regions, np.int64), np.zeros(runs.regions, np.int64)
    touches_nodata = np.zeros(runs.regions, np.bool_)
    if not runs.regions:
        return Edges(pixels, prob_sum, touches_nodata)
    width, prob = mask_HW.shape[1], prob_HW.ravel()
    edge = _flat_edge(mask_HW)
    # Every run begins with an edge pixel, and both come in the order of the rows.
    first = np.searchsorted(edge, runs.row * width + runs.col)
    count = np.diff(np.append(first, len(edge)))
    np.add.at(pixels, runs.label, count)
    np.add.at(prob_sum, runs.label, np.add.reduceat(prob[edge], first, dtype=np.int64))
    if prob.max() == INVALID:
        label = np.repeat(runs.label, count)
        for step in (-width, -1, 1, width):
            touches_nodata[label[prob.take(edge + step, mode="clip") == INVALID]] = True
    return Edges(pixels, prob_sum, touches_nodata)


def _flat_edge(mask_HW: NDArray[np.bool_]) -> Int64s:
    """Positions, row by row, of the pixels of a mask with a 4-neighbour that is not in it; beyond its sides none is."""
    height, width = mask_HW.shape
    found = []
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        strip_HW = mask_HW[top : top + step]
        inner_HW = np.zeros_like(strip_HW)
        np.logical_and(strip_HW[:, :-2], strip_HW[:, 2:], out=inner_HW[:, 1:-1])
        inner_HW &= strip_HW
        inner_HW[1:] &= strip_HW[:-1]
        inner_HW[:-1] &= strip_HW[1:]
        inner_HW[0] &= mask_HW[top - 1] if top else False
        inner_HW[-1] &= mask_HW[top + step] if top + step < height else False
        found.append(np.flatnonzero(strip_HW ^ inner_HW) + top * width)
    return np.concatenate(found)


def edge_pixels(outlines: Geometries) -> tuple[Int64s, Int64s, Int64s, Int64s, Int64s]:
    """Along canonical outlines, for every side of a pixel: row and column inside, row and column outside, the polygon.

    A pixel stands there as often as it has neighbours outside.
    """
    rings, owner = shapely.get_rings(outlines, return_index=True)
    coords, ring = shapely.get_coordinates(rings, return_index=True)
    xy = coords.astype(np.int64)
    here = np.flatnonzero(ring[1:] == ring[:-1])
    (x0, y0), (x1, y1) = xy[here].T, xy[here + 1].T
    index = owner[ring[here]]
    length = np.abs(x1 - x0) + np.abs(y1 - y0)
    upright = np.repeat(x0 == x1, length)
    step = ranges(np.zeros_like(length), length)
    left, top = np.repeat(np.minimum(x0, x1), length), np.repeat(np.minimum(y0, y1), length)
    row, col = np.where(upright, top + step, top), np.where(upright, left, left + step)
    # Who walks an outline has the building on the right: walking up (y falls) or to the right it lies beyond the line.
    beyond = np.repeat(np.where(x0 == x1, y1 < y0, x1 > x0), length)
    near_row, near_col = np.where(upright, row, row - 1), np.where(upright, col - 1, col)
    return (
        np.where(beyond, row, near_row),
        np.where(beyond, col, near_col),
        np.where(beyond, near_row, row),
        np.where(beyond, near_col, col),
        np.repeat(index, length),
    )


def edges_of_outlines(outlines: Geometries, read_prob: Callable[[Window], NDArray[np.uint8]]) -> Edges:
    """The edges of buildings by their canonical outlines, which have no pixel in common.

    read_prob gives prob_HW of a window inside their bounds or next to them, with 255 where nothing is stored.
    """
    count = len(outlines)
    if not count:
        return Edges(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    row, col, out_row, out_col, index = edge_pixels(outlines)
    inside, outside = np.split(_probabilities(np.append(row, out_row), np.append(col, out_col), read_prob), 2)
    row_off, col_off = int(row.min()), int(col.min())
    # A pixel stands there once for each of its sides: it is counted once.
    _, once = np.unique((row - row_off) * (int(col.max()) - col_off + 1) + col - col_off, return_index=True)
    prob_sum = np.zeros(count, np.int64)
    np.add.at(prob_sum, index[once], inside[once])
    touches_nodata = np.zeros(count, np.bool_)
    touches_nodata[index[outside == INVALID]] = True
    return Edges(np.bincount(index[once], minlength=count), prob_sum, touches_nodata)


def _probabilities(row: Int64s, col: Int64s, read_prob: Callable[[Window], NDArray[np.uint8]]) -> Int64s:
    """Stored values of single pixels, read cell by cell."""
    values = np.zeros(len(row), np.int64)
    cell_row, cell_col = row // CELL_PX, col // CELL_PX
    cell = (cell_row - cell_row.min()) * (int(np.ptp(cell_col)) + 1) + cell_col - cell_col.min()
    order = np.argsort(cell)
    for pixels in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):
        rows, cols = row[pixels], col[pixels]
        window = Window.between(int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1)
        values[pixels] = read_prob(window)[rows - window.row_off, cols - window.col_off]
    return values
