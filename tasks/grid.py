"""The absolute pixel lattice and the integer windows on it: everything is counted in whole pixels from here on.

Rows grow downwards (south), columns to the right (east). Row and column numbers are absolute: they are counted from
the origin of the CRS, not from the city's corner, so they are often negative and never change when a city grows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of lattice pixels: rows row_off to row_stop (exclusive), columns col_off to col_stop (exclusive)."""

    row_off: int
    col_off: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 0 or self.width < 0:
            raise ValueError(f"window of {self.height} x {self.width} px: expected sides of 0 or more")

    @property
    def row_stop(self) -> int:
        """First row below the window."""
        return self.row_off + self.height

    @property
    def col_stop(self) -> int:
        """First column to the right of the window."""
        return self.col_off + self.width

    @property
    def shape_yx(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def pixels(self) -> int:
        """Height x width."""
        return self.height * self.width

    def pad(self, px: int) -> Window:
        """The window with a margin of px pixels on all four sides."""
        return Window(self.row_off - px, self.col_off - px, self.height + 2 * px, self.width + 2 * px)

    def snap(self, step: int) -> Window:
        """The smallest window around this one whose four sides lie on multiples of step."""
        row_off, col_off = _floor_to(self.row_off, step), _floor_to(self.col_off, step)
        return Window.between(row_off, col_off, -_floor_to(-self.row_stop, step), -_floor_to(-self.col_stop, step))

    def intersect(self, other: Window) -> Window:
        """The common part; a window of no pixels where there is none."""
        row_off, col_off = max(self.row_off, other.row_off), max(self.col_off, other.col_off)
        row_stop, col_stop = min(self.row_stop, other.row_stop), min(self.col_stop, other.col_stop)
        return Window(row_off, col_off, max(0, row_stop - row_off), max(0, col_stop - col_off))

    def union(self, other: Window) -> Window:
        """The bounding window of both."""
        return Window.between(
            min(self.row_off, other.row_off),
            min(self.col_off, other.col_off),
            max(self.row_stop, other.row_stop),
            max(self.col_stop, other.col_stop),
        )

    def contains(self, other: Window) -> bool:
        """True if every pixel of other is in this window."""
        return self.intersect(other) == other

    def meets(self, other: Window) -> bool:
        """True if the two have a pixel in common."""
        return (
            self.row_off < other.row_off + other.height
            and other.row_off < self.row_off + self.height
            and self.col_off < other.col_off + other.width
            and other.col_off < self.col_off + self.width
            and self.pixels > 0
            and other.pixels > 0
        )

    def within(self, outer: Window) -> tuple[slice, slice]:
        """Slices that cut this window out of an array that covers outer."""
        row, col = self.row_off - outer.row_off, self.col_off - outer.col_off
        return slice(row, row + self.height), slice(col, col + self.width)

    def cells(self, step: int) -> Iterator[tuple[int, int]]:
        """Absolute indices (row, col) of the cells of step x step pixels that the window meets, row by row."""
        if not self.pixels:
            return
        for row in range(self.row_off // step, (self.row_stop - 1) // step + 1):
            for col in range(self.col_off // step, (self.col_stop - 1) // step + 1):
                yield row, col

    def cell_count(self, step: int) -> int:
        """How many cells of step x step pixels the window meets."""
        if not self.pixels:
            return 0
        rows = (self.row_stop - 1) // step - self.row_off // step + 1
        return rows * ((self.col_stop - 1) // step - self.col_off // step + 1)

    def halves(self, step: int) -> tuple[Window, Window] | None:
        """Cut across the longer side at a multiple of step near its middle; None where there is none within."""
        tall = self.height >= self.width
        off, side = (self.row_off, self.height) if tall else (self.col_off, self.width)
        first = _floor_to(off + side // 2 + step // 2, step) - off
        if not 0 < first < side:
            return None
        if tall:
            one = Window(self.row_off, self.col_off, first, self.width)
            return one, Window(one.row_stop, self.col_off, self.height - first, self.width)
        one = Window(self.row_off, self.col_off, self.height, first)
        return one, Window(self.row_off, one.col_stop, self.height, self.width - first)

    @staticmethod
    def cell(row: int, col: int, step: int) -> Window:
        """The cell of step x step pixels with absolute index (row, col): a chunk or a block."""
        return Window(row * step, col * step, step, step)

    @staticmethod
    def around(there_HW: NDArray[np.bool_], row_off: int = 0, col_off: int = 0) -> Window | None:
        """The smallest window around what is True in a mask with this upper left pixel; None where nothing is."""
        rows = np.flatnonzero(there_HW.any(axis=1))
        if not len(rows):
            return None
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        cols = np.flatnonzero(there_HW[top:bottom].any(axis=0))
        return Window.between(row_off + top, col_off + int(cols[0]), row_off + bottom, col_off + int(cols[-1]) + 1)

    @staticmethod
    def between(row_off: int, col_off: int, row_stop: int, col_stop: int) -> Window:
        """The window between two corners."""
        return Window(row_off, col_off, row_stop - row_off, col_stop - col_off)


def _floor_to(value: int, step: int) -> int:
    return value // step * step


class Cells(Collection[tuple[int, int]]):
    """Absolute indices (row, col) of many cells, rising row by row: 8 bytes each, where a list of pairs takes 120."""

    def __init__(self, cells: Iterable[tuple[int, int]]) -> None:
        self._keys = np.fromiter((_key_of_cell(*cell) for cell in cells), np.int64)
        if (np.diff(self._keys) <= 0).any():
            raise ValueError("cells out of order: expected each once, row by row")

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (_cell_of_key(int(key)) for key in self._keys)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return _cell_of_key(int(self._keys[index]))

    def __contains__(self, cell: object) -> bool:
        if not isinstance(cell, tuple):
            return False
        row, col = cell
        return len(self.within(row, col, col + 1)) > 0

    def within(self, row: int, col: int, col_stop: int) -> range:
        """Places of those in one row, from a column up to another one."""
        ends = [_key_of_cell(row, col), _key_of_cell(row, col_stop)]
        return range(*np.searchsorted(self._keys, np.array(ends, np.int64)).tolist())

    def take(self, places: Iterable[int]) -> Cells:
        """Those at rising places."""
        return Cells(self[place] for place in places)


def _key_of_cell(row: int, col: int) -> int:
    return (row << 32) + col


def _cell_of_key(key: int) -> tuple[int, int]:
    row = (key + 2**31) >> 32
    return row, key - (row << 32)


@dataclass(frozen=True)
class CellWindows(Collection[Window]):
    """The windows of cells of step x step pixels, each made when its turn comes."""

    cells: Cells
    step: int

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Window]:
        return (Window.cell(*cell, self.step) for cell in self.cells)

    def __contains__(self, window: object) -> bool:
        return any(window == one for one in self)


class WindowIndex:
    """Windows, to be asked again and again which of them another window meets.

    They are entered in the cells of a coarse grid. Its step is about a window's side, and as much larger as it takes
    that the cells of all windows together are few for each of them: one may be as large as a thousand others.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = tuple(windows)
        sides = sorted(max(1, *window.shape_yx) for window in self._windows)
        self._step = sides[len(sides) // 2] if sides else 1
        while sum(window.cell_count(self._step) for window in self._windows) > 8 * len(self._windows):
            self._step *= 2
        cells: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, window in enumerate(self._windows):
            for cell in window.cells(self._step):
                cells[cell].append(index)
        self._cells = dict(cells)

    def meeting(self, window: Window) -> list[int]:
        """Indices of the windows that have a pixel in common with one, in their order."""
        count = window.cell_count(self._step)
        if count == 1:
            found: Iterable[int] = self._cells.get((window.row_off // self._step, window.col_off // self._step), ())
        elif count < len(self._cells):
            found = sorted({index for cell in window.cells(self._step) for index in self._cells.get(cell, ())})
        else:
            found = range(len(self._windows))
        return [index for index in found if self._windows[index].meets(window)]


@dataclass(frozen=True)
class Lattice:
    """The absolute pixel lattice of a projected CRS.

    Pixel (0, 0) has its upper left corner at (phase_x, phase_y) in CRS units; 0 <= phase < pixel_size.
    """

    crs_wkt: str
    pixel_size: float
    phase_x: float
    phase_y: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.pixel_size) and self.pixel_size > 0):
            raise ValueError(f"pixel_size {self.pixel_size}: expected a positive number of CRS units")

    def transform(self, row_off: int = 0, col_off: int = 0) -> Affine:
        """Affine transform from (col, row), counted from the given pixel, to CRS coordinates (x, y)."""
        size = self.pixel_size
        return Affine(size, 0.0, self.phase_x + col_off * size, 0.0, -size, self.phase_y - row_off * size)

    def bounds(self, window: Window) -> tuple[float, float, float, float]:
        """(xmin, ymin, xmax, ymax) of a window in CRS units."""
        xmin, ymax = self.transform() * (window.col_off, window.row_off)
        xmax, ymin = self.transform() * (window.col_stop, window.row_stop)
        return xmin, ymin, xmax, ymax

    def ground_pixel_m(self, row: NDArray[np.float64], col: NDArray[np.float64]) -> NDArray[np.float64]:
        """Side in ground metres of a lattice pixel at the given positions: unit and local scale of the CRS taken out.

        The square of it is the ground area of a pixel. For conformal projections it is also the length along any
        direction; for others it is the geometric mean of the two principal directions.
        """
        return ground_pixel_m(self.crs_wkt, self.transform(), row, col)


def ground_pixel_m(
    crs_wkt: str, transform: Affine, row: NDArray[np.float64], col: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Side in ground metres of the pixels of any raster: the square root of their area on the ellipsoid.

    transform leads from (col, row) to (x, y) of the CRS, which may be projected or geographic and count in any unit.
    """
    to_lonlat, radians, a, b = _geodesy(crs_wkt)
    row, col = np.asarray(row, np.float64), np.asarray(col, np.float64)
    # Measured on the ellipsoid over a few pixels: PROJ's own factors take Web Mercator for one of a sphere, which is
    # 7 in 10,000 off in area.
    ends = np.asarray(
        [
            to_lonlat.transform(*apply(transform, col + dc, row + dr))
            for dc, dr in ((-_STEP_PX, 0), (_STEP_PX, 0), (0, _STEP_PX), (0, -_STEP_PX))
        ],
        np.float64,
    )
    lon, lat = ends[:, 0] * radians, ends[:, 1] * radians
    cos = np.cos(lat.mean(axis=0))
    root = a**2 * cos**2 + b**2 * (1 - cos**2)
    # Metres east and north of a step along columns and along rows, by the radii of curvature of parallel and meridian.
    east = ((lon[1::2] - lon[::2] + np.pi) % (2 * np.pi) - np.pi) * cos * a**2 / np.sqrt(root)
    north = (lat[1::2] - lat[::2]) * (a * b) ** 2 / root**1.5
    side: NDArray[np.float64] = np.sqrt(np.abs(east[0] * north[1] - east[1] * north[0])) / (2 * _STEP_PX)
    return side


_STEP_PX = 8


def apply(
    transform: Affine, x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An affine transform of arrays of coordinates: of (col, row) to (x, y), or by its inverse back."""
    a, b, c, d, e, f = transform[:6]
    return a * x + b * y + c, d * x + e * y + f


@lru_cache(maxsize=64)
def _geodesy(crs_wkt: str) -> tuple[Transformer, float, float, float]:
    """How a CRS leads to longitude and latitude, radians in a unit of them, and the semi-axes of its ellipsoid in m.

    Most CRSs count in degrees, some of France in grads.
    """
    crs = CRS.from_wkt(crs_wkt)
    geodetic = crs.geodetic_crs or CRS.from_epsg(4326)
    ellipsoid = crs.ellipsoid
    assert ellipsoid is not None, "a CRS of the Earth has an ellipsoid"
    radians = float(geodetic.axis_info[0].unit_conversion_factor)
    to_lonlat = Transformer.from_crs(crs, geodetic, always_xy=True)
    return to_lonlat, radians, float(ellipsoid.semi_major_metre), float(ellipsoid.semi_minor_metre)
