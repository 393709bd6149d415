"""Write the demonstration city: georeferenced tiles, the city.yaml that maps them, and the true footprints.

The picture is drawn (draw.py), cut into tiles of one lattice, and given a hole without data.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyogrio.errors
import rasterio
import shapely.affinity
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import geometry_mask
from shapely.geometry import box

from segpipe.pipeline.draw import PX_M, DrawnCity, draw_city
from segpipe.tasks.errors import UserError

CRS = "EPSG:32633"
ORIGIN = (440000.1, 5300000.1)
"""Upper left corner of the first tile, in metres of the CRS; off the round numbers, as real tiles are."""

HOLE_PX = 124
MARGIN_PX = 128
LEAST_TILE_PX = 256

CITY_YAML = """\
# A demonstration city, drawn by segpipe. Map it with:       segpipe run city.yaml
# and then compare the footprints with the true ones:        segpipe evaluate run --truth truth.gpkg
name: demo
images: tiles/*.tif             # a glob, a list, a folder, or a VRT; paths are relative to this file
model: buildings-mobilenetv2    # a model bundle, or the name of one in the package
output: run                     # the folder of the results: buildings.gpkg, mask.tif, report.html ...
nodata: 0                       # there is a hole in the imagery where all bands are 0

# What else may be said, with its default:
# bands: [1, 2, 3]              # which bands are red, green and blue
# images_crs: null              # given to tiles that have none, for example EPSG:32633
# nodata_tolerance: auto        # 0 for lossless tiles, 12 for JPEG, WebP and lossy JP2
# nodata_min_m2: 1000           # smaller patches of the nodata value are white roofs and black shadows
# on_tile_error: fail           # or skip: what cannot be read becomes nodata
# grid:
#   chunk_px: 1024              # side of a stored chunk
#   block_px: auto              # side of what one task predicts; follows the memory of a worker
# predict:
#   halo: auto                  # context around a block: auto, exact, or pixels
#   precision: auto             # bfloat16 where the device is fast at it, else float32
# vectorize:
#   threshold: null             # least probability of a building; null: the model's own
#   min_area_m2: 10             # smaller buildings are dropped
#   fill_holes_m2: 2            # smaller holes are filled
#   simplify_m: 0.3             # how far an outline may move to lose corners
# cluster:
#   workers: auto               # processes that predict
#   threads: auto               # threads of each
#   memory: auto                # of all of them together, for example 8 GiB
# store:
#   keep: all                   # after publishing: all, probability, or none
"""


@dataclass(frozen=True)
class DemoFiles:
    """What was written.

    Attributes:
        config: city.yaml.
        truth: GeoPackage with the layer `buildings`, whole footprints also where the hole or the border cuts them.
        tiles: GeoTIFFs, row by row from the north-west.
        buildings: number of footprints.
        hole_m2: area without data.
    """

    config: Path
    truth: Path
    tiles: tuple[Path, ...]
    buildings: int
    hole_m2: float


def write_demo(directory: Path, seed: int = 7, tiles: tuple[int, int] = (2, 2), tile_px: int = 768) -> DemoFiles:
    """Write a city of (rows, columns) tiles into a directory; its files appear whole or not at all.

    Raises UserError, before anything is changed, if a file is in the way that is not the same demonstration already.
    """
    rows, cols = tiles
    if rows < 1 or cols < 1 or tile_px < LEAST_TILE_PX:
        raise UserError(f"{rows} x {cols} tiles of {tile_px} px: expected at least 1 x 1 of {LEAST_TILE_PX} px")
    city = draw_tiled_city(seed, rows, cols, tile_px)
    hole_HW = punch_hole(city.image_HW3, tile_px)
    names = [f"tiles/tile{number + 1}.tif" for number in range(rows * cols)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=directory) as beside:
            fresh = Path(beside)
            (fresh / "tiles").mkdir()
            for number, name in enumerate(names):
                row, col = divmod(number, cols)
                write_tile(fresh / name, city.image_HW3, row * tile_px, col * tile_px, tile_px)
            write_truth(fresh / "truth.gpkg", city)
            (fresh / "city.yaml").write_bytes(CITY_YAML.encode())
            place(fresh, directory, [*names, "truth.gpkg", "city.yaml"])
    except OSError as error:
        raise UserError(f"{directory}: the demonstration cannot be written there: {error}") from None
    return DemoFiles(
        config=directory / "city.yaml",
        truth=directory / "truth.gpkg",
        tiles=tuple(directory / name for name in names),
        buildings=len(city.footprints),
        hole_m2=float(hole_HW.sum()) * PX_M**2,
    )


def draw_tiled_city(seed: int, rows: int, cols: int, tile_px: int) -> DrawnCity:
    """Draw a city somewhat larger than the tiles, and shift the tiles so that a house stands on their middle corner."""
    height, width = rows * tile_px, cols * tile_px
    city = draw_city(seed, height + 2 * MARGIN_PX, width + 2 * MARGIN_PX)
    corner_x = cols // 2 * tile_px if cols > 1 else width / 2
    corner_y = rows // 2 * tile_px if rows > 1 else height / 2
    left, top, largest = MARGIN_PX, MARGIN_PX, 0.0
    for outline in city.footprints:
        inside = outline.representative_point()
        shift_x, shift_y = round(inside.x - corner_x), round(inside.y - corner_y)
        within = 0 <= shift_x <= 2 * MARGIN_PX and 0 <= shift_y <= 2 * MARGIN_PX
        if within and outline.area > largest:
            left, top, largest = shift_x, shift_y, outline.area
    frame = box(left, top, left + width, top + height)
    seen = [shapely.affinity.translate(shape, -left, -top) for shape in city.footprints if shape.intersects(frame)]
    rows_cols = slice(top, top + height), slice(left, left + width)
    return DrawnCity(city.image_HW3[rows_cols].copy(), tuple(seen), city.mask_HW[rows_cols].copy())


def punch_hole(image_HW3: NDArray[np.uint8], tile_px: int) -> NDArray[np.bool_]:
    """Set a tilted square in the middle of the last tile to 0, in place. Returns where."""
    height, width = image_HW3.shape[:2]
    middle_x, middle_y, half = width - tile_px / 2, height - tile_px / 2, HOLE_PX / 2
    square = box(middle_x - half, middle_y - half, middle_x + half, middle_y + half)
    tilted = shapely.affinity.rotate(square, 17)
    hole_HW: NDArray[np.bool_] = geometry_mask([tilted], (height, width), Affine.identity(), invert=True)
    image_HW3[hole_HW] = 0
    return hole_HW


def transform(row: int = 0, col: int = 0) -> Affine:
    """From (column, row), counted from the given pixel of the city, to coordinates of the CRS."""
    return Affine(PX_M, 0, ORIGIN[0] + PX_M * col, 0, -PX_M, ORIGIN[1] - PX_M * row)


def write_tile(path: Path, image_HW3: NDArray[np.uint8], row: int, col: int, tile_px: int) -> None:
    """One tile of the city as a GeoTIFF, from the given pixel on."""
    bands = np.moveaxis(image_HW3[row : row + tile_px, col : col + tile_px], 2, 0)
    with rasterio.open(
        path, "w", driver="GTiff", width=tile_px, height=tile_px, count=3, dtype="uint8", crs=CRS,
        transform=transform(row, col), tiled=True, blockxsize=256, blockysize=256, compress="deflate", predictor=2,
        photometric="RGB",
    ) as tile:  # fmt: skip
        tile.write(bands)


def write_truth(path: Path, city: DrawnCity) -> None:
    """The footprints as the layer `buildings` of a GeoPackage, in the CRS of the tiles."""
    to_crs = transform()
    shapes = [shapely.affinity.affine_transform(shape, to_crs.to_shapely()) for shape in city.footprints]
    rows = {"building_id": [f"{number + 1}" for number in range(len(shapes))], "area_m2": [s.area for s in shapes]}
    frame = gpd.GeoDataFrame(rows, geometry=shapes, crs=CRS)
    frame.to_file(path, layer="buildings", driver="GPKG", engine="pyogrio", geometry_type="Polygon", VERSION="1.2")


def place(fresh: Path, directory: Path, names: list[str]) -> None:
    """Rename finished files into the directory. Raises UserError before the first if another file is in the way."""
    for found in sorted((directory / "tiles").glob("*.tif")):
        if f"tiles/{found.name}" not in names:
            raise UserError(f"{found}: is not a tile of this demonstration; expected an empty or new directory")
    missing = []
    for name in names:
        if not (directory / name).exists():
            missing.append(name)
        elif not _same(directory / name, fresh / name):
            raise UserError(f"{directory / name}: exists and would be overwritten; expected an empty or new directory")
    (directory / "tiles").mkdir(exist_ok=True)
    for name in missing:
        (fresh / name).replace(directory / name)


def _same(old: Path, new: Path) -> bool:
    """True if two files say the same; of GeoPackages the rows count, for opening one in a GIS changes the file."""
    if new.suffix != ".gpkg":
        return old.read_bytes() == new.read_bytes()
    try:
        frames = [gpd.read_file(path, layer="buildings", engine="pyogrio") for path in (old, new)]
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError):
        return False
    return bool(frames[0].equals(frames[1]))
