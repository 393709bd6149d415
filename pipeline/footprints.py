"""Footprints of a raster, found and true, sorted into cells of it: as many as there are, a cell of them at a time.

They are kept in a file of SQLite that is thrown away: any order in, a cell's own out, and no more in memory than that.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from segpipe.tasks.grid import Window
from segpipe.tasks.outlines import Geometries

CELL_PX = 2048
FOUND, TRUE = 0, 1
"""The two kinds of footprints."""
CACHE_KIB = 4 * 1024

Cell = tuple[int, int]


@dataclass(frozen=True)
class Footprints:
    """Some footprints in the order of their numbers, which count those of a kind from 0. Equally long arrays.

    is_home: True in one of the cells that a footprint lies in. geometry: valid polygons or multipolygons, in pixels of
    the raster (x = column, y = row).
    """

    number: NDArray[np.int64]
    is_home: NDArray[np.bool_]
    id: NDArray[np.object_]
    confidence: NDArray[np.float64]
    geometry: Geometries

    def __len__(self) -> int:
        return len(self.number)

    def take(self, chosen: NDArray[np.bool_]) -> Footprints:
        """Those that a mask chooses."""
        return Footprints(
            self.number[chosen], self.is_home[chosen], self.id[chosen], self.confidence[chosen], self.geometry[chosen]
        )


class Cells:
    """Open file of footprints. Use it inside `footprint_cells`."""

    def __init__(self, database: sqlite3.Connection, folder: Path, extent: Window, pad_px: int) -> None:
        self._database = database
        self.folder = folder
        self.extent = extent
        self._pad_px = pad_px
        self._columns = -(-extent.width // CELL_PX)
        self.count = {FOUND: 0, TRUE: 0}
        """Footprints of each kind that lie in the raster."""

    def add(self, kind: int, geometry: Geometries, ids: list[str], confidence: NDArray[np.float64]) -> int:
        """Add some of a kind; returns how many of them lie outside the raster, and are left out."""
        bounds = shapely.bounds(geometry)
        height, width = self.extent.shape_yx
        inside = (bounds[:, 0] < width) & (bounds[:, 1] < height) & (bounds[:, 2] > 0) & (bounds[:, 3] > 0)
        at = np.flatnonzero(inside)
        first = np.floor((bounds[at, :2] - self._pad_px) / CELL_PX)
        last = np.floor((bounds[at, 2:] + self._pad_px) / CELL_PX)
        most = [(width - 1) // CELL_PX, (height - 1) // CELL_PX]
        ranges = np.hstack([np.clip(first, 0, most), np.clip(last, 0, most)]).astype(np.int64).tolist()
        wkb = shapely.to_wkb(geometry[at])
        rows = []
        for place, (col0, row0, col1, row1) in enumerate(ranges):
            number, index = self.count[kind] + place, int(at[place])
            cells = [row * self._columns + col for row in range(row0, row1 + 1) for col in range(col0, col1 + 1)]
            rows += [
                (cell, kind, number, home, ids[index], float(confidence[index]), wkb[place])
                for cell, home in zip(cells, [1] + [0] * len(cells), strict=False)
            ]
        self._database.execute("BEGIN")
        self._database.executemany("INSERT INTO footprints VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._database.execute("COMMIT")
        self.count[kind] += len(at)
        return len(geometry) - len(at)

    def seal(self) -> None:
        """Everything is added: make it quick to find."""
        self._database.execute("CREATE INDEX by_cell ON footprints (cell, kind, number)")
        self._database.execute("CREATE INDEX by_number ON footprints (kind, number) WHERE home")

    def cells(self) -> Iterator[Cell]:
        """All cells of the raster, row by row."""
        return self.extent.cells(CELL_PX)

    def window(self, cell: Cell) -> Window:
        """The part of the raster that a cell covers."""
        return Window.cell(*cell, CELL_PX).intersect(self.extent)

    def read(self, cell: Cell, kind: int) -> Footprints:
        """Those whose bounding box, with a margin of pad_px, meets a cell."""
        row, col = cell
        rows = self._database.execute(
            "SELECT number, home, id, confidence, wkb FROM footprints WHERE cell = ? AND kind = ? ORDER BY number",
            (row * self._columns + col, kind),
        ).fetchall()
        number, home, ids, confidence, wkb = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        return Footprints(
            np.array(number, np.int64),
            np.array(home, np.bool_),
            np.array(ids, np.object_),
            np.array(confidence, np.float64),
            shapely.from_wkb(np.array(wkb, np.object_)),
        )

    def id_of(self, kind: int, number: int) -> str:
        """The id of one of a kind."""
        query = "SELECT id FROM footprints WHERE kind = ? AND number = ? AND home"
        return str(self._database.execute(query, (kind, number)).fetchone()[0])


@contextmanager
def footprint_cells(path: Path, extent: Window, pad_px: int) -> Iterator[Cells]:
    """Cells for the footprints of a raster, in a file at path that is removed at the end.

    extent: the raster, from (0, 0). A footprint is in each cell that its bounding box, with a margin of pad_px, meets.
    """
    path.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}", "temp_store=FILE"):
                database.execute(f"PRAGMA {pragma}")
            database.execute(
                "CREATE TABLE footprints (cell INTEGER, kind INTEGER, number INTEGER, home INTEGER, id TEXT,"
                " confidence REAL, wkb BLOB)"
            )
            yield Cells(database, path.parent, extent, pad_px)
    finally:
        path.unlink(missing_ok=True)
