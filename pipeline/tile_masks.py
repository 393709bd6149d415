"""One mask a tile, under the tile's name and on its pixels: what the Inria benchmark takes as a submission."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.warp import reproject
from rasterio.windows import Window as RasterWindow

from segpipe.tasks.errors import RunError, UserError
from segpipe.tasks.files import tile_name
from segpipe.tasks.grid import Lattice
from segpipe.tasks.predict import INVALID
from segpipe.tasks.read import Tile

from .beside import partial_path

FOLDER = "tile_masks"
BUILDING, OTHER = 255, 0
STRIP_PX = 512
"""Rows that are held at a time."""


def file_names(tiles: Sequence[Tile]) -> tuple[str, ...]:
    """The name of each tile's mask. UserError where two tiles have one name."""
    names = tuple(f"{PurePosixPath(tile_name(tile.path)).stem}.tif" for tile in tiles)
    name, count = Counter(name.casefold() for name in names).most_common(1)[0]
    if count > 1:
        first, second = [tile.path for tile, own in zip(tiles, names, strict=True) if own.casefold() == name][:2]
        raise UserError(
            f"publish.tile_masks: {first} and {second} would both be written as {name}; expected a name for each tile;"
            " cure: rename one, or `publish: {tile_masks: false}`"
        )
    return names


def write_tile_masks(folder: Path, mask: Path, tiles: Sequence[Tile], lattice: Lattice) -> list[str]:
    """Write RUN/tile_masks/NAME.tif for each tile: uint8, 255 building and 0 not, on the tile's own pixels and CRS.

    mask: the published mask.tif. Where it has no data, and beyond it, there is no building. The folder is written
    beside and renamed into place; masks of an earlier run go. Returns the paths of its files relative to the run
    folder. Raises RunError.
    """
    target, partial = folder / FOLDER, partial_path(folder / FOLDER)
    shutil.rmtree(partial, ignore_errors=True)
    if not tiles:
        shutil.rmtree(target, ignore_errors=True)
        return []
    names = file_names(tiles)
    try:
        partial.mkdir()
        with rasterio.open(mask) as city:
            for tile, name in zip(tiles, names, strict=True):
                _write_one(partial / name, city, tile, lattice)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, RasterioError) as error:
        raise RunError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [f"{FOLDER}/{name}" for name in names]


def _write_one(path: Path, city: rasterio.DatasetReader, tile: Tile, lattice: Lattice) -> None:
    window = tile.window
    if tile.mosaic is None:
        crs, transform = city.crs, lattice.transform(window.row_off, window.col_off)
    else:
        crs = rasterio.crs.CRS.from_wkt(tile.mosaic.crs_wkt)
        transform = Affine(*tile.mosaic.transform) * Affine.translation(window.col_off, window.row_off)
    height, width = window.shape_yx
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": height, "width": width}
    profile |= {"crs": crs, "transform": transform, "compress": "lzw"}
    with rasterio.open(path, "w", **profile) as raster:
        for row in range(0, height, STRIP_PX):
            part = RasterWindow(0, row, width, min(STRIP_PX, height - row))
            mask_HW = np.full((part.height, width), INVALID, np.uint8)
            # Of the same pixels this is a copy; of others it takes the one under the centre, each found exactly.
            reproject(
                rasterio.band(city, 1),
                mask_HW,
                dst_crs=crs,
                dst_transform=transform * Affine.translation(0, row),
                resampling=Resampling.nearest,
                tolerance=0,
            )
            raster.write(np.where(mask_HW == 1, np.uint8(BUILDING), np.uint8(OTHER)), 1, window=part)
