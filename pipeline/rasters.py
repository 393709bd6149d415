"""Rasters to cloud-optimised GeoTIFFs, window by window: memory is set by the block, not by the city."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
import rasterio.errors
import rasterio.shutil
import rasterio.windows
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # the base of what rasterio.shutil.copy raises; it has no public name
from rasterio.enums import Resampling

from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.predict import INVALID

from .beside import partial_path, remove_with_siblings, write_error

TILE_PX = 512
"""Internal tiles of the COGs."""


PROBABILITY_SCALE = 0.004
"""Stored values times this are probabilities: 250 is 1."""


@dataclass(frozen=True)
class Look:
    """What a raster's values mean and how they are shown: value x scale, and a colour (red, green, blue) for each."""

    scale: float
    colours: Mapping[int, tuple[int, int, int]]


def write_cog(
    path: Path,
    read: Callable[[Window], NDArray[Any]],
    window: Window,
    lattice: Lattice,
    *,
    resampling: Literal["mode", "average"],
    block_px: int,
    look: Look | None = None,
    stop_if_given_up: Callable[[], None] = lambda: None,
) -> None:
    """Write the raster that covers window as a cloud-optimised GeoTIFF with overviews, and rename it to path.

    read gives uint8 pixels (height, width) of a part of window, 255 for nodata; it is called once per part, of block_px
    x block_px rounded down to whole internal tiles. Areas of nothing but nodata take no space. look: what the values
    mean, and how they are shown. stop_if_given_up: called before each part and each step of GDAL, and before the
    rename; it raises what is to end this. The pixels are read back and compared, and tiles of overviews looked for.
    Raises RunError if that fails or the disk is full; unfinished files are removed.
    """
    if not window.pixels:
        raise ValueError(f"window of {window.height} x {window.width} px: a raster has at least one pixel")
    flat, cog = partial_path(path.with_stem(f"{path.stem}.flat")), partial_path(path)
    # Smooth values deflate better as differences; at level 6 they take twice as long to be 2 % smaller. Of masks LZW
    # makes less than deflate at level 6, in half the time.
    smooth = {"COMPRESS": "DEFLATE", "PREDICTOR": "YES", "LEVEL": "3"}
    options = {"BIGTIFF": "IF_SAFER", **(smooth if resampling == "average" else {"COMPRESS": "LZW"})}
    try:
        with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES, GDAL_NUM_THREADS="ALL_CPUS"):
            written = _write_flat(flat, read, window, lattice, block_px, stop_if_given_up)
            stop_if_given_up()
            _add_overviews(flat, resampling)
            stop_if_given_up()
            if look is not None:
                _give_look(flat, look)
            options |= {"BLOCKSIZE": str(TILE_PX), "SPARSE_OK": "YES"}
            rasterio.shutil.copy(flat, cog, driver="COG", **options)
            _check_cog(cog, written, block_px, stop_if_given_up)
        stop_if_given_up()
        cog.replace(path)
    except (rasterio.errors.RasterioError, CPLE_BaseError, OSError) as error:
        raise write_error(path, error) from error
    finally:
        remove_with_siblings(flat)
        remove_with_siblings(cog)


@contextmanager
def reading_cog(path: Path, bounds: Window) -> Iterator[Callable[[Window], NDArray[np.uint8]]]:
    """Read windows of the lattice, uint8 (height, width), from a raster that covers bounds, while the block runs.

    Several threads may read.
    """
    # An open raster is for one thread at a time.
    lock = threading.Lock()
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES), rasterio.open(path) as raster:

        def read(window: Window) -> NDArray[np.uint8]:
            with lock:
                pixels_HW: NDArray[np.uint8] = raster.read(1, window=_rasterio_window(window, bounds))
            return pixels_HW

        yield read


GDAL_CACHE_BYTES = 16 * 2**20
"""rasterio takes a number of bytes."""


def _parts(window: Window, block_px: int) -> Iterator[Window]:
    """Parts of window, row by row, counted from its corner: whole internal tiles, so each is compressed only once."""
    step = max(1, block_px // TILE_PX) * TILE_PX
    for row_off in range(window.row_off, window.row_stop, step):
        for col_off in range(window.col_off, window.col_stop, step):
            yield Window(row_off, col_off, step, step).intersect(window)


@dataclass
class _Pixels:
    """Of the pixels of a raster that have gone by, part by part: their checksum, and which internal tiles have data.

    tiles: with any data; inner: with data before their last row and column.
    """

    window: Window
    checksum: int = 0

    def __post_init__(self) -> None:
        shape_yx = [-(-side // TILE_PX) for side in self.window.shape_yx]
        self.tiles, self.inner = np.zeros(shape_yx, np.bool_), np.zeros(shape_yx, np.bool_)

    def add(self, pixels_HW: NDArray[np.uint8], part: Window) -> None:
        """Note the pixels of one more part of the window."""
        self.checksum = zlib.crc32(np.ascontiguousarray(pixels_HW).data, self.checksum)
        for tile in _parts(part, TILE_PX):
            known_HW = pixels_HW[tile.within(part)] != INVALID
            row, col = (side.start // TILE_PX for side in tile.within(self.window))
            self.tiles[row, col], self.inner[row, col] = known_HW.any(), known_HW[:-1, :-1].any()

    def tiles_of_half(self) -> NDArray[np.bool_]:
        """Which tiles must have data in the raster at half the size; others may.

        The half of an odd side is rounded up, so two pixels are a little more than one of it: nothing is asked for the
        last row and column of a tile, which lie in the next tile too. Nor for what is one pixel wide: GDAL makes that
        from the whole raster, not from the overview before.
        """
        rows, cols = self.inner.shape
        padded = np.pad(self.inner, [(0, rows % 2), (0, cols % 2)])
        return padded[::2, ::2] | padded[1::2, ::2] | padded[::2, 1::2] | padded[1::2, 1::2]


def _write_flat(
    path: Path,
    read: Callable[[Window], NDArray[Any]],
    window: Window,
    lattice: Lattice,
    block_px: int,
    stop_if_given_up: Callable[[], None],
) -> _Pixels:
    """Write a tiled GeoTIFF without overviews, part by part.

    It is not compressed, which would save space for a minute, and take as long as all else.
    """
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": window.height, "width": window.width}
    profile |= {"crs": rasterio.crs.CRS.from_wkt(lattice.crs_wkt), "nodata": INVALID}
    profile |= {"tiled": True, "blockxsize": TILE_PX, "blockysize": TILE_PX}
    profile |= {"sparse_ok": True, "bigtiff": "IF_SAFER", "interleave": "pixel"}
    written = _Pixels(window)
    with rasterio.open(path, "w", transform=lattice.transform(window.row_off, window.col_off), **profile) as raster:
        for part in _parts(window, block_px):
            stop_if_given_up()
            pixels_HW = np.asarray(read(part), np.uint8).reshape(part.shape_yx)
            written.add(pixels_HW, part)
            if (pixels_HW != INVALID).any():
                raster.write(pixels_HW, 1, window=_rasterio_window(part, window))
    return written


def _add_overviews(path: Path, resampling: Literal["mode", "average"]) -> None:
    """Those that the COG driver would add: it takes these, and would compress its own twice."""
    with rasterio.Env(SPARSE_OK_OVERVIEW="YES"), rasterio.open(path, "r+") as raster:
        if factors := _overviews(raster.shape):
            raster.build_overviews(factors, Resampling[resampling])


def _overviews(shape_yx: tuple[int, int]) -> list[int]:
    """By how much each overview is smaller: the last one is a tile."""
    return [2**n for n in range(1, 32) if max(shape_yx) > TILE_PX * 2 ** (n - 1)]


def _give_look(path: Path, look: Look) -> None:
    """Scale and colours, after the overviews: with a colour table GDAL would average colours, not values."""
    with rasterio.open(path, "r+") as raster:
        raster.scales, raster.offsets = (look.scale,), (0.0,)
        raster.write_colormap(1, dict(look.colours))


def _check_cog(path: Path, written: _Pixels, block_px: int, stop_if_given_up: Callable[[], None]) -> None:
    """OSError where pixels are not those that were written, or tiles of an overview are missing.

    GDAL only logs what fails when it closes a file: a full disk is first noticed here.
    """
    with rasterio.open(path) as raster:
        is_whole = raster.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
        is_whole &= len(raster.overviews(1)) == len(_overviews(raster.shape))
        found = _read_through(raster, block_px, stop_if_given_up)
    is_whole &= found.checksum == written.checksum
    for level in range(len(_overviews(written.window.shape_yx)) if is_whole else 0):
        expected = found.tiles_of_half()
        with rasterio.open(path, overview_level=level) as raster:
            found = _read_through(raster, block_px, stop_if_given_up)
        is_whole &= bool(found.tiles[expected].all())
    if not is_whole:
        raise OSError("the pixels read back are not those that were written: the disk is full or faulty")


def _read_through(raster: Any, block_px: int, stop_if_given_up: Callable[[], None]) -> _Pixels:
    found = _Pixels(Window(0, 0, *raster.shape))
    for part in _parts(found.window, block_px):
        stop_if_given_up()
        found.add(raster.read(1, window=_rasterio_window(part, found.window)), part)
    return found


def _rasterio_window(part: Window, window: Window) -> rasterio.windows.Window:
    return rasterio.windows.Window(
        part.col_off - window.col_off, part.row_off - window.row_off, part.width, part.height
    )
