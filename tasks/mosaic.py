"""Warping: tiles that do not lie on the lattice, put together as they are and then resampled onto it as one.

The lattice is resampled in fixed cells, whatever the chunk: what GDAL makes of a pixel depends a little on the window
that it is asked for (a fifth of a percent of the pixels differed between windows of 256 and 512 px). And tiles are put
together before, not after: what is interpolated at a tile's edge sees the neighbour's pixels.

Axes: B or C band, H row, W column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.warp import reproject, transform

from .grid import Lattice, Window, apply

CELL_PX = 512
"""Side of the cells of the lattice that are warped at a time."""
_POINTS = 33  # by so many points along each side is a window's outline carried over
_DUST_PX = 1e-3
_MARGIN_PX = 4  # pixels around what a cell covers, in its source: more than any kernel here reaches at its own scale

Pixels = tuple[NDArray[np.uint8], NDArray[np.bool_]]
"""image_CHW, and valid_HW: True where a pixel is valid."""


@dataclass(frozen=True)
class Mosaic:
    """A pixel grid other than the lattice's, on which tiles lie side by side, and how it comes onto the lattice.

    transform is Affine's first six numbers, from (column, row) of that grid to (x, y) of its CRS: it may be turned,
    flipped, oblong or in degrees. average is the mean over a pixel's area, for grids finer than the lattice.
    """

    crs_wkt: str
    transform: tuple[float, float, float, float, float, float]
    lattice: Lattice
    resampling: Literal["bilinear", "average"]

    def bounds(self, window: Window) -> Window:
        """The window of the lattice that a window of the mosaic's grid lies in."""
        x, y = apply(Affine(*self.transform), *_points(window))
        return _bounding(*apply(~self.lattice.transform(), *_carry(self.crs_wkt, self.lattice.crs_wkt, x, y)))

    def cover(self, window: Window) -> Window:
        """The window of the lattice that holds all pixels in whose value a window of the mosaic's grid has a share."""
        lies = self.bounds(window)
        # A pixel's value spreads to the pixels of the next one on its own grid.
        coarser = max(lies.height / window.height, lies.width / window.width, 1.0)
        return lies.pad(int(np.ceil(coarser)) + 1)

    def source(self, cell: Window) -> Window:
        """The window of the mosaic's grid that decides the pixels of a window of the lattice."""
        x, y = apply(self.lattice.transform(), *_points(cell))
        window = _bounding(*apply(~Affine(*self.transform), *_carry(self.lattice.crs_wkt, self.crs_wkt, x, y)))
        finer = max(window.height / cell.height, window.width / cell.width, 1.0)
        return window.pad(int(_MARGIN_PX * finer) + 1)

    def scale(self, cell: Window) -> tuple[float, float]:
        """Pixels of the lattice for one of the mosaic's grid, along its columns and rows, in the middle of a cell."""
        row, col = cell.row_off + cell.height / 2, cell.col_off + cell.width / 2
        ends = np.array([col, col + 1, col]), np.array([row, row, row + 1])
        at = apply(self.lattice.transform(), *ends)
        columns, rows = apply(~Affine(*self.transform), *_carry(self.lattice.crs_wkt, self.crs_wkt, *at))
        return 1 / float(np.hypot(*np.diff(columns[[1, 0, 2]]))), 1 / float(np.hypot(*np.diff(rows[[1, 0, 2]])))


def warp_cell(mosaic: Mosaic, cell: Window, read: Callable[[Window], Pixels]) -> Pixels:
    """One whole cell of the lattice, (C, H, W) uint8 and (H, W), from what read gives of the mosaic's grid.

    The transformer is exact, not interpolated. Pixels are smoothed by how large they are alone: GDAL would take a
    turned grid for a finer one, since the window of it that a cell lies in is larger. A pixel is valid where the
    mosaic's pixel under its centre is, or, for averages, where at least half of its area is; invalid pixels have no
    share in any value. Invalid pixels are 0.
    """
    source = mosaic.source(cell)
    image_CHW, valid_HW = read(source)
    bands = len(image_CHW)
    if not valid_HW.any():
        return np.zeros((bands, *cell.shape_yx), np.uint8), np.zeros(cell.shape_yx, np.bool_)
    columns, rows = mosaic.scale(cell)
    place = {
        "src_transform": Affine(*mosaic.transform) * Affine.translation(source.col_off, source.row_off),
        "src_crs": _crs(mosaic.crs_wkt),
        "dst_transform": mosaic.lattice.transform(cell.row_off, cell.col_off),
        "dst_crs": _crs(mosaic.lattice.crs_wkt),
        "resampling": Resampling[mosaic.resampling],
        "tolerance": 0,
        "num_threads": 1,
        "XSCALE": columns,
        "YSCALE": rows,
    }
    alpha_HW = np.where(valid_HW, np.uint8(255), np.uint8(0))
    warped_CHW = np.zeros((bands + 1, *cell.shape_yx), np.uint8)
    reproject(
        np.concatenate([image_CHW, alpha_HW[None]]), warped_CHW, src_alpha=bands + 1, dst_alpha=bands + 1, **place
    )
    warped_valid_HW = warped_CHW[-1] > 0
    if mosaic.resampling == "average" and not valid_HW.all():
        share_HW = np.zeros(cell.shape_yx, np.float32)
        reproject(alpha_HW.astype(np.float32), share_HW, **place)
        warped_valid_HW &= share_HW >= 127.5
    return np.where(warped_valid_HW, warped_CHW[:-1], np.uint8(0)), warped_valid_HW


def _points(window: Window) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Columns and rows of points all over a window and along its sides: a projection may bulge in the middle."""
    rows = np.linspace(window.row_off, window.row_stop, _POINTS)
    cols = np.linspace(window.col_off, window.col_stop, _POINTS)
    return np.tile(cols, _POINTS), np.repeat(rows, _POINTS)


def _carry(
    src_wkt: str, dst_wkt: str, x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates in another CRS, by the same GDAL that warps."""
    if src_wkt == dst_wkt:
        return x, y
    xs, ys = transform(_crs(src_wkt), _crs(dst_wkt), x.tolist(), y.tolist())
    return np.asarray(xs, np.float64), np.asarray(ys, np.float64)


def _bounding(col: NDArray[np.float64], row: NDArray[np.float64]) -> Window:
    """The whole pixels in which points lie; what is left of divisions of large numbers makes no further pixel."""
    if not (np.isfinite(row).all() and np.isfinite(col).all()):
        raise ValueError("a window that reaches outside of what the projection can show")
    low, high = (
        np.floor([row.min() + _DUST_PX, col.min() + _DUST_PX]),
        np.ceil([row.max() - _DUST_PX, col.max() - _DUST_PX]),
    )
    return Window.between(int(low[0]), int(low[1]), int(high[0]), int(high[1]))


@lru_cache(maxsize=64)
def _crs(wkt: str) -> CRS:
    return CRS.from_wkt(wkt)
