"""Buildings cut by seams made whole: which pieces belong together, and what they are together.

Two pieces belong together where their pixels face each other straight across a seam (4-connectivity: never over a
corner). A piece is a node: the border components of all blocks, numbered block by block. Only integers are kept of
it until its polygon is wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from .errors import RunError
from .grid import Window
from .outlines import Int64s, unite
from .vectorize import Components, Sides


@dataclass(frozen=True)
class Joins:
    """All pieces of buildings, sorted by home block, then first pixel of the building, then block and label.

    Equally long arrays. home: index of the block that holds the building's first pixel and so answers for it.
    building: number of the building, rising by one in this order. block, label: the piece, element label - 1 of the
    block's border components. Pieces that face no neighbour are buildings of one piece.
    """

    home: NDArray[np.int32]
    building: NDArray[np.int32]
    block: NDArray[np.int32]
    label: NDArray[np.int32]

    def at(self, home: int) -> Joins:
        """The pieces of the buildings of one home block."""
        # Asked in their own type: else all of them would be copied into another one for every home.
        part = slice(*np.searchsorted(self.home, np.array([home, home + 1], self.home.dtype)))
        return Joins(self.home[part], self.building[part], self.block[part], self.label[part])


def plan_joins(windows: Collection[Window], read_sides: Callable[[int], Sides]) -> Joins:
    """Find the pieces of every building that touches a side of its block.

    windows: of all blocks, of any sizes, overlapping nowhere; best row by row, for then the sides of one row of blocks
    are held at a time. read_sides gives those of a block by its index and is called once for each.
    Raises ValueError where two blocks overlap along a seam.
    """
    first_node, key, pairs = _read_nodes(windows, read_sides)
    group = group_nodes(pairs, len(key))
    block = np.repeat(np.arange(len(windows)), np.diff(first_node))
    # The first node of every group in the order of first pixels holds the building's first pixel.
    by_key = np.lexsort((key[:, 1], key[:, 0]))
    rank = np.empty_like(by_key)
    rank[by_key] = np.arange(len(by_key))
    first_rank = np.full(len(key), len(key), np.int64)
    np.minimum.at(first_rank, group, rank)
    first = first_rank[group]
    home = block[by_key[first]]
    order = np.lexsort((np.arange(len(key)), first, home))
    building = np.cumsum(np.append(False, np.diff(first[order]) != 0)[: len(order)])
    label = np.arange(len(key)) - first_node[block] + 1
    return Joins(*(column.astype(np.int32) for column in (home[order], building, block[order], label[order])))


def _read_nodes(
    windows: Collection[Window], read_sides: Callable[[int], Sides]
) -> tuple[Int64s, NDArray[np.int64], NDArray[np.int64]]:
    """Number of the first node of every block (and one past the last), first pixels (row, col) and pairs of nodes."""
    seams = neighbours(windows)
    complete = seams.max(axis=1)
    seams = seams[np.argsort(complete, kind="stable")]
    seam_from = np.searchsorted(np.sort(complete), np.arange(len(windows) + 1))
    last_use = np.arange(len(windows))
    np.maximum.at(last_use, seams.ravel(), np.repeat(seams.max(axis=1), 2))
    expiring = np.argsort(last_use, kind="stable")
    expiring_from = np.searchsorted(last_use[expiring], np.arange(len(windows) + 1))
    first_node = np.zeros(len(windows) + 1, np.int64)
    # Plain arrays of integers that grow: a list of small arrays would cost more than what is in them.
    keys, pairs = array("q"), array("q")
    held: dict[int, Sides] = {}
    for index, window in enumerate(windows):
        held[index] = sides = read_sides(index)
        if sides.window != window:
            raise RunError(f"block {index}: its fragment covers {sides.window}, expected {window}")
        first_node[index + 1] = first_node[index] + len(sides.key_row)
        keys.frombytes(np.stack([sides.key_row, sides.key_col], axis=1).tobytes())
        for one, other in seams[seam_from[index] : seam_from[index + 1]].tolist():
            labels = facing_pairs(*facing_labels(held[one], held[other]))
            pairs.frombytes((first_node[[one, other]] + labels - 1).tobytes())
        for gone in expiring[expiring_from[index] : expiring_from[index + 1]].tolist():
            del held[gone]
    return first_node, np.array(keys).reshape(-1, 2), np.array(pairs).reshape(-1, 2)


def neighbours(windows: Collection[Window]) -> NDArray[np.int64]:
    """Index pairs (above, below) and (left, right) of all windows that share a stretch of seam, each pair once."""
    each = (edge for w in windows for edge in (w.row_off, w.row_stop, w.col_off, w.col_stop))
    offs = np.fromiter(each, np.int64).reshape(-1, 4)
    row_off, row_stop, col_off, col_stop = offs.T
    below = _facing(row_stop, row_off, col_off, col_stop)
    beside = _facing(col_stop, col_off, row_off, row_stop)
    return np.concatenate([below, beside])


def _facing(line_of_one: Int64s, line_of_other: Int64s, start: Int64s, stop: Int64s) -> NDArray[np.int64]:
    """Pairs (one, other) on equal lines whose intervals start to stop overlap; those of one kind on a line do not."""
    span = int(stop.max(initial=0)) - int(start.min(initial=0)) + 1
    origin = int(start.min(initial=0))
    other_start, other_stop = line_of_other * span + start - origin, line_of_other * span + stop - origin
    order = np.argsort(other_start, kind="stable")
    other_start, other_stop = other_start[order], other_stop[order]
    if (other_start[1:] < other_stop[:-1]).any():
        raise ValueError("blocks overlap along a seam: expected every pixel in one block")
    first = np.searchsorted(other_stop, line_of_one * span + start - origin, "right")
    last = np.searchsorted(other_start, line_of_one * span + stop - origin, "left")
    counts = np.maximum(last - first, 0)
    one = np.repeat(np.arange(len(start)), counts)
    other = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
    return np.stack([one, order[other]], axis=1)


def facing_labels(one: Sides, other: Sides) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Labels on either bank of the seam between two blocks, other lying below one or to the right of it."""
    a, b = one.window, other.window
    if a.row_stop == b.row_off:
        start, stop = max(a.col_off, b.col_off), min(a.col_stop, b.col_stop)
        return one.bottom[start - a.col_off : stop - a.col_off], other.top[start - b.col_off : stop - b.col_off]
    if a.col_stop == b.col_off:
        start, stop = max(a.row_off, b.row_off), min(a.row_stop, b.row_stop)
        return one.right[start - a.row_off : stop - a.row_off], other.left[start - b.row_off : stop - b.row_off]
    raise ValueError(f"blocks {a} and {b} share no seam")


def facing_pairs(labels_a: NDArray[np.int32], labels_b: NDArray[np.int32]) -> NDArray[np.int64]:
    """Different pairs (a, b) of labels that face each other over a seam, as an array of two columns; 0 is no label."""
    both = (labels_a > 0) & (labels_b > 0)
    # One number a pair: sorting rows of an array takes ten times as long.
    keys = (labels_a[both].astype(np.int64) << 32) + labels_b[both]
    keys = np.unique(keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]])
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)


def group_nodes(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Group of each of count nodes, nodes of a pair being in one group."""
    if not count:
        return np.zeros(0, np.int64)
    graph = csr_array((np.ones(len(pairs), np.int32), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    groups: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def collect(joins: Joins, read_border: Callable[[int], Components]) -> tuple[Components, Int64s]:
    """The pieces that joins names, and the number of the building of each.

    read_border gives the border components of a block by its index and is called once for each.
    """
    by_block = np.argsort(joins.block, kind="stable")
    blocks, starts = np.unique(joins.block[by_block], return_index=True)
    parts = [part for part in np.split(by_block, starts[1:]) if len(part)]
    pieces = [
        read_border(block).take(joins.label[part].astype(np.int64) - 1)
        for block, part in zip(blocks.tolist(), parts, strict=True)
    ]
    return Components.concatenate(pieces), joins.building[by_block].astype(np.int64)


def cut_buildings(
    pieces: Components,
    building: NDArray[np.int64],
    block_px: int,
    open_sides: Callable[[tuple[int, int]], Collection[str]],
) -> NDArray[np.bool_]:
    """True for each building, in the order of their numbers, one of whose pieces touches an open side of its block.

    block_px: side of a block; open_sides gives top, right, bottom, left, as far as they are open, by a block's index.
    """
    numbers, label = np.unique(building, return_inverse=True)
    bounds = shapely.bounds(pieces.geometry).astype(np.int64)
    blocks = bounds[:, [1, 0]] // block_px
    cut = np.zeros(len(numbers), np.bool_)
    for row, col in np.unique(blocks, axis=0).tolist():
        here = (blocks == (row, col)).all(axis=1)
        lines = {"left": col, "top": row, "right": col + 1, "bottom": row + 1}
        for (side, line), edge in zip(lines.items(), bounds.T, strict=True):
            if side in open_sides((row, col)):
                cut[label[here & (edge == line * block_px)]] = True
    return cut


def join(pieces: Components, building: NDArray[np.int64]) -> Components:
    """Unite the pieces of each building; the result is in the order of the buildings' numbers.

    Polygons are united exactly and canonical again, pixels and sums added, the first pixel is the least of the pieces'.
    Raises RunError where pixels are missing or doubled.
    """
    numbers, label = np.unique(building, return_inverse=True)
    if not len(numbers):
        return Components.empty()
    by_key = np.lexsort((pieces.key_col, pieces.key_row, label))
    first = by_key[np.searchsorted(label[by_key], np.arange(len(numbers)))]
    pixels, prob_sum = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), np.int64)
    np.add.at(pixels, label, pieces.pixels)
    np.add.at(prob_sum, label, pieces.prob_sum)
    try:
        geometry = unite(pieces.geometry, label)
    except ValueError as error:
        raise RunError(f"joining the pieces of buildings over seams: {error}") from error
    outline_px = shapely.area(geometry)
    for one in np.flatnonzero(outline_px != pixels)[:1]:
        raise RunError(
            f"building at row {pieces.key_row[first[one]]}, column {pieces.key_col[first[one]]}: outline of "
            f"{outline_px[one]:.0f} px, expected the {pixels[one]} px of its pieces: a piece is missing or doubled"
        )
    return Components(pieces.key_row[first], pieces.key_col[first], pixels, prob_sum, geometry)
