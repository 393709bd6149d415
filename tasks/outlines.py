"""Outlines of pixel regions as exact integer polygons, for all regions of a mask at once and without a loop over them.

A region's outline is kept as its vertical sides: maximal vertical segments (column, top row, bottom row) which have the
region on their right (`starts`: a run of pixels starts there) or on their left. That is all there is to know: the
corners of the outline are the ends of the segments, and in every row of the lattice the corners, sorted by column,
pair up into the horizontal sides. Regions in pieces are united by adding up their segments (the sides along which two
pieces meet cancel) and tracing them again.

Coordinates are absolute lattice pixels: x = column, y = row, growing downwards. Canonical form of a polygon: no
collinear points, every ring starts at its smallest (row, col) vertex and has the region on the right hand of one who
walks it with y pointing downwards, holes are sorted by their first vertex, the ring is closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

Int64s = NDArray[np.int64]
Geometries = NDArray[np.object_]


@dataclass(frozen=True)
class Runs:
    """Horizontal runs of True in a mask_HW, row by row, and the 4-connected region that each belongs to.

    row, col, col_stop are counted from the mask's corner. label counts regions from 0 in the order of their first
    pixels (smallest row, then column), so a region's first run holds its first pixel.
    """

    row: Int64s
    col: Int64s
    col_stop: Int64s
    label: Int64s

    @property
    def regions(self) -> int:
        """Number of 4-connected regions."""
        return int(self.label.max()) + 1 if self.label.size else 0


@dataclass(frozen=True)
class Segments:
    """Maximal vertical sides of labelled regions: column x, rows top to bottom, the region on the right if starts."""

    x: Int64s
    top: Int64s
    bottom: Int64s
    starts: NDArray[np.bool_]
    label: Int64s


def find_runs(mask_HW: NDArray[np.bool_]) -> tuple[Runs, Segments]:
    """Runs and vertical sides of the 4-connected regions of a mask, in pixels from the mask's corner."""
    height, width = mask_HW.shape
    stride = width + 1
    # One empty column ends every row and starts the next; an empty row above and below.
    padded = np.zeros((height + 2) * stride, np.bool_)
    padded.reshape(height + 2, stride)[1:-1, :-1] = mask_HW
    edges: Int64s = np.flatnonzero(padded[1:] != padded[:-1]) + 1
    start, stop = edges[::2], edges[1::2]
    label = _label_runs(start, stop, stride)
    runs = Runs(start // stride - 1, start % stride, stop - start + start % stride, label)
    return runs, _segments_of_edges(edges, np.repeat(label, 2), stride, height)


def _label_runs(start: Int64s, stop: Int64s, stride: int) -> Int64s:
    """4-connected regions of runs at flat positions start to stop, rows being stride apart, in order of first run."""
    first = np.searchsorted(stop, start + stride, "right")
    counts = np.searchsorted(start, stop + stride, "left") - first
    indptr = np.concatenate([[0], np.cumsum(counts)])
    below = np.repeat(first - indptr[:-1], counts) + np.arange(indptr[-1])
    return _number_by_first(_components(indptr, below))


def _components(indptr: Int64s, indices: Int64s, connection: str = "weak") -> Int64s:
    """Connected components of a graph in CSR form: a number per node, in no particular order."""
    size = len(indptr) - 1
    if not size:
        return np.zeros(0, np.int64)
    graph = csr_array((np.ones(len(indices), np.int8), indices, indptr), shape=(size, size))
    labels: Int64s = connected_components(graph, connection=connection)[1].astype(np.int64)
    return labels


def _number_by_first(label: Int64s) -> Int64s:
    """Renumber labels from 0 in the order in which they first occur."""
    if not label.size:
        return label
    order = np.argsort(first_of(label, int(label.max()) + 1))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[label]


def first_of(label: Int64s, count: int) -> Int64s:
    """Index of the first element of every label 0 to count - 1."""
    first = np.full(count, len(label), np.int64)
    np.minimum.at(first, label, np.arange(len(label)))
    return first


def _segments_of_edges(edges: Int64s, label: Int64s, stride: int, height: int) -> Segments:
    """Merge the pixels' vertical sides (flat positions, starts and stops of runs in turn) into maximal segments."""
    side = np.zeros((height + 2) * stride, np.int8)
    kind = np.ones(len(edges), np.int8)
    kind[1::2] = 2
    side[edges] = kind
    is_top = side[edges - stride] != kind
    tops, bottoms = edges[is_top], edges[side[edges + stride] != kind]
    top, x = np.divmod(tops, stride)
    bottom_row, bottom_x = np.divmod(bottoms, stride)
    # In one column segments do not overlap, so the k-th top and the k-th bottom belong together.
    bottom = np.empty_like(tops)
    bottom[stable_order(x)] = bottom_row[stable_order(bottom_x)]
    return Segments(x, top - 1, bottom, kind[is_top] == 1, label[is_top])


def trace(segments: Segments, regions: int, row_off: int = 0, col_off: int = 0) -> Geometries:
    """Canonical polygons of regions 0 to regions - 1 from their vertical sides.

    The segments are sorted by (top, x), every region has at least one, and each region is 4-connected: then every ring
    is simple and every polygon valid, a hole touching its shell in single points at most.
    """
    count = len(segments.x)
    if not count:
        return np.zeros(0, np.object_)
    follower = _followers(segments)
    ring = _components(np.arange(count + 1), follower, "strong")
    # The smallest (row, col) vertex of a ring is the top of its first segment. A region's shell comes before its holes.
    first = first_of(ring, int(ring.max()) + 1)
    first = first[np.lexsort((first, segments.label[first]))]
    order = _walk(follower, first)
    begins = np.where(segments.starts, segments.bottom, segments.top)[order]
    ends = np.where(segments.starts, segments.top, segments.bottom)[order]
    corners = np.empty((2 * count, 2), np.float64)
    corners[:, 0] = np.repeat(segments.x[order] + col_off, 2)
    corners[0::2, 1] = begins + row_off
    corners[1::2, 1] = ends + row_off
    at = np.empty_like(order)
    at[order] = np.arange(count)
    offset = 2 * at[first]
    length = np.diff(np.append(offset, 2 * count))
    # A shell's first segment is walked upwards, so that its smallest vertex is the second corner of the walk.
    rolled = segments.starts[first].astype(np.int64)
    index = np.repeat(np.arange(len(first)), length + 1)
    step = np.arange(len(index)) - np.repeat(offset + np.arange(len(first)), length + 1)
    source = offset[index] + (step + rolled[index]) % length[index]
    rings = shapely.linearrings(corners[source], indices=index)
    polygons: Geometries = shapely.polygons(rings, indices=segments.label[first])
    if len(polygons) != regions:
        raise ValueError(f"{len(polygons)} outlines traced: expected {regions}, one for each region")
    return polygons


def _followers(segments: Segments) -> Int64s:
    """For every vertical segment the one that is walked next: at the other end of the horizontal side at its end."""
    count = len(segments.x)
    # Where two corners of one region meet in a point, each goes around its own empty pixel, so that two rings touch
    # there and none crosses itself: the segment that starts the region joins the side on its left, the other the right.
    column_key = 2 * segments.x + ~segments.starts
    columns = 2 * int(segments.x.max()) + 2
    key = np.concatenate([segments.top * columns + column_key, segments.bottom * columns + column_key])
    by_column = stable_order(segments.x)
    bottoms = by_column[stable_order(segments.bottom[by_column])]
    # Both halves are in order by now: a stable sort takes little more than a merge.
    ends = np.append(np.arange(count), count + bottoms)
    ends = ends[np.argsort(key[ends], kind="stable")]
    order = ends[stable_order(np.tile(segments.label, 2)[ends])]
    partner = np.empty(2 * count, np.int64)
    partner[order[0::2]] = order[1::2]
    partner[order[1::2]] = order[0::2]
    end = np.where(segments.starts, 0, count) + np.arange(count)
    follower = partner[end]
    return np.where(follower < count, follower, follower - count)


def _walk(follower: Int64s, first: Int64s) -> Int64s:
    """Segments in walking order, ring after ring, each from its first segment on."""
    count = len(follower)
    last = np.empty_like(follower)
    last[follower] = np.arange(count)
    chain = follower.copy()
    chain[last[first]] = np.roll(first, -1)
    graph = csr_array((np.ones(count, np.int8), chain, np.arange(count + 1)), shape=(count, count))
    order: Int64s = breadth_first_order(graph, first[0], return_predecessors=False).astype(np.int64)
    return order


def segments_of(rings: Geometries, label: Int64s) -> Segments:
    """Vertical sides of canonical rectilinear rings (as traced here, in any number per label), in the rings' order."""
    coords, ring = shapely.get_coordinates(rings, return_index=True)
    xy = coords.astype(np.int64)
    vertical = np.flatnonzero((ring[1:] == ring[:-1]) & (xy[1:, 0] == xy[:-1, 0]))
    begins, ends = xy[vertical, 1], xy[vertical + 1, 1]
    return Segments(
        x=xy[vertical, 0],
        top=np.minimum(begins, ends),
        bottom=np.maximum(begins, ends),
        starts=ends < begins,
        label=label[ring[vertical]],
    )


def unite(polygons: Geometries, label: Int64s) -> Geometries:
    """Canonical polygons of the unions of canonical polygons that share a label (0 to the largest, none left out).

    Polygons of one label share sides but no pixels, and their union is 4-connected. Exact: integers throughout.
    Raises ValueError where two of them overlap.
    """
    if not len(polygons):
        return np.zeros(0, np.object_)
    rings, owner = shapely.get_rings(polygons, return_index=True)
    parts = segments_of(rings, label[owner])
    row_off, col_off = int(parts.top.min()), int(parts.x.min())
    united = _add_up(
        Segments(parts.x - col_off, parts.top - row_off, parts.bottom - row_off, parts.starts, parts.label)
    )
    return trace(united, int(label.max()) + 1, row_off, col_off)


def _add_up(parts: Segments) -> Segments:
    """Maximal segments of the sum of the given ones, column by column: opposite ones cancel, adjoining ones merge."""
    sign = np.where(parts.starts, 1, -1)
    y = np.concatenate([parts.top, parts.bottom])
    change = np.concatenate([sign, -sign])
    columns = int(parts.x.max()) + 1
    line = np.tile(parts.label * columns + parts.x, 2)
    order = np.lexsort((y, line))
    y, line, change = y[order], line[order], change[order]
    new = np.flatnonzero(np.append(True, (y[1:] != y[:-1]) | (line[1:] != line[:-1])))
    change = np.add.reduceat(change, new)
    kept = np.flatnonzero(change)
    y, line, level = y[new][kept], line[new][kept], np.cumsum(change[kept])
    if np.abs(level).max(initial=0) > 1:
        raise ValueError("pieces of one building overlap: a block's pixels were counted twice")
    # Every line ends at level 0, so the row of the next change is on the same line wherever a segment is open.
    is_open = np.flatnonzero(level)
    united = Segments(line[is_open] % columns, y[is_open], y[is_open + 1], level[is_open] > 0, line[is_open] // columns)
    by_top = np.lexsort((united.x, united.top))
    return Segments(
        united.x[by_top], united.top[by_top], united.bottom[by_top], united.starts[by_top], united.label[by_top]
    )


def stable_order(values: Int64s) -> Int64s:
    """Indices that sort values of 0 or more, equal ones staying in their order: in linear time, 16 bits at a time."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    rest = values >> 16
    while rest.any():
        order = order[np.argsort(rest[order].astype(np.uint16), kind="stable")]
        rest >>= 16
    return order


def ranges(start: Int64s, length: Int64s) -> Int64s:
    """start[0], start[0] + 1, ... for length[0] numbers, then the same for the next, in one array."""
    before = np.cumsum(length) - length
    ranges: Int64s = np.repeat(start - before, length) + np.arange(int(length.sum()))
    return ranges
