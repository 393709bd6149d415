"""Changes: what is published now against what was published last, building by building.

Both are streams in the order of the lattice: cells row by row, and in a cell by first pixel, which the ids tell. So
they are merged cell by cell, and memory is set by the buildings of one cell, not by the city.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from segpipe.tasks.vectorize import first_pixels

SCHEMA = pa.schema(
    [
        pa.field("change", pa.string()),
        pa.field("building_id", pa.string()),
        pa.field("previous_id", pa.string()),
        pa.field("area_m2", pa.float64()),
        pa.field("previous_area_m2", pa.float64()),
        pa.field("geometry", pa.binary()),
    ]
)
"""A row a change: added, removed or modified. The geometry is the new one, and the old one of a removed building.

A removed building has no building_id and area_m2, an added one no previous_id and previous_area_m2.
"""

KINDS = ("added", "removed", "modified")
SAME_BUILDING_IOU = 0.3
"""A removed and an added building that overlap more than this are one that was modified."""

Cell = tuple[int, int]
Indices = NDArray[np.int64]


def compare(
    previous: Iterable[pa.RecordBatch], current: Iterable[pa.RecordBatch], cell_px: int
) -> Iterator[pa.RecordBatch]:
    """Changes from previous to current, both buildings in the order of cells of cell_px; a batch a cell with any.

    Which removed and which added building are one is decided among those with their first pixel in the same cell.
    """
    old_cells, new_cells = _cells(previous, cell_px), _cells(current, cell_px)
    old, new = next(old_cells, None), next(new_cells, None)
    while any_left := old or new:
        cell = min(one[0] for one in (old, new) if one is not None)
        here_old = here_new = any_left[1].slice(0, 0)
        if old is not None and old[0] == cell:
            here_old, old = old[1], next(old_cells, None)
        if new is not None and new[0] == cell:
            here_new, new = new[1], next(new_cells, None)
        changes = _compare_cell(here_old, here_new)
        if changes.num_rows:
            yield changes


def _cells(batches: Iterable[pa.RecordBatch], cell_px: int) -> Iterator[tuple[Cell, pa.RecordBatch]]:
    """The rows of batches cell by cell."""
    held: list[pa.RecordBatch] = []
    at: Cell | None = None
    for batch in batches:
        row, col = first_pixels(batch.column("building_id"))
        cells = np.stack([row // cell_px, col // cell_px], axis=1)
        starts = np.flatnonzero(np.append(True, (cells[1:] != cells[:-1]).any(axis=1))[: len(cells)]).tolist()
        for start, stop in pairwise([*starts, len(cells)]):
            cell = (int(cells[start, 0]), int(cells[start, 1]))
            if at is not None and cell != at:
                assert cell > at, f"buildings of cell {cell} after those of {at}: expected the order of the lattice"
                yield at, _one(held)
                held = []
            at = cell
            held.append(batch.slice(start, stop - start))
    if at is not None:
        yield at, _one(held)


def _one(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _compare_cell(old: pa.RecordBatch, new: pa.RecordBatch) -> pa.RecordBatch:
    """Changes of one cell, in the order of first pixels: the new ones, and of removed buildings the old ones."""
    at = pc.index_in(new.column("building_id"), value_set=old.column("building_id"))
    kept = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
    kept_old = at.drop_null().to_numpy().astype(np.int64)
    modified = _differ(old.take(pa.array(kept_old)), new.take(pa.array(kept)))
    removed = np.setdiff1d(np.arange(len(old)), kept_old)
    added = np.setdiff1d(np.arange(len(new)), kept)
    again_old, again_new = _pair(_geometries(old, removed), _geometries(new, added))
    pairs_old = np.concatenate([kept_old[modified], removed[again_old]])
    pairs_new = np.concatenate([kept[modified], added[again_new]])
    removed, added = np.delete(removed, again_old), np.delete(added, again_new)
    parts = [
        _rows("added", None, new.take(pa.array(added))),
        _rows("removed", old.take(pa.array(removed)), None),
        _rows("modified", old.take(pa.array(pairs_old)), new.take(pa.array(pairs_new))),
    ]
    if not any(len(part) for part in parts):
        return parts[0]
    changes = _one(parts)
    row, col = first_pixels(pc.coalesce(changes.column("building_id"), changes.column("previous_id")))
    return changes.take(pa.array(np.lexsort((changes.column("change").to_numpy(zero_copy_only=False), col, row))))


def _differ(old: pa.RecordBatch, new: pa.RecordBatch) -> NDArray[np.bool_]:
    """True for rows that are not equal in every attribute and in the bytes of their geometry."""
    differ = np.zeros(len(new), np.bool_)
    for name in new.schema.names:
        differ |= pc.not_equal(new.column(name), old.column(name)).to_numpy(zero_copy_only=False)
    return differ


def _geometries(rows: pa.RecordBatch, chosen: Indices) -> NDArray[np.object_]:
    wkb = rows.column("geometry").take(pa.array(chosen)).to_numpy(zero_copy_only=False)
    geometries: NDArray[np.object_] = shapely.from_wkb(wkb)
    return geometries


def _pair(old: NDArray[np.object_], new: NDArray[np.object_]) -> tuple[Indices, Indices]:
    """Indices of polygons that are one building: those that overlap most first, each in one pair at most."""
    of_new, of_old = shapely.STRtree(old).query(new, predicate="intersects")
    common = shapely.area(shapely.intersection(old[of_old], new[of_new]))
    iou = common / (shapely.area(old[of_old]) + shapely.area(new[of_new]) - common)
    free_old, free_new = np.ones(len(old), np.bool_), np.ones(len(new), np.bool_)
    pairs = []
    for pair in np.lexsort((of_old, of_new, -iou)).tolist():
        i, j = of_old[pair], of_new[pair]
        if iou[pair] > SAME_BUILDING_IOU and free_old[i] and free_new[j]:
            free_old[i] = free_new[j] = False
            pairs.append((i, j))
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _rows(change: str, old: pa.RecordBatch | None, new: pa.RecordBatch | None) -> pa.RecordBatch:
    """Changes of one kind, from equally many old and new buildings."""
    shown = new if new is not None else old
    assert shown is not None, "a change is one of an old building, a new one, or both"

    def column(rows: pa.RecordBatch | None, name: str) -> pa.Array:
        field = shown.schema.field(name)
        return pa.nulls(len(shown), field.type) if rows is None else rows.column(name)

    columns = [
        pa.array([change] * len(shown), pa.string()),
        column(new, "building_id"),
        column(old, "building_id"),
        column(new, "area_m2"),
        column(old, "area_m2"),
        shown.column("geometry"),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
