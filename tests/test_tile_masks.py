"""`publish.tile_masks`: a mask for each tile, on the tile's own pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import ORIGIN, City, draw_blobs, map_it, raster, write_tile
from rasterio.warp import Resampling, calculate_default_transform, reproject

from segpipe.pipeline.config import load_city
from segpipe.pipeline.manifest import nothing_changed
from segpipe.tasks.errors import UserError

MakeCity = Callable[..., City]
ASKED = "publish.tile_masks=true"

pytestmark = pytest.mark.usefixtures("in_process")


def test_tile_masks_put_side_by_side_are_the_citys_mask(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(2, 2, tile_px=200)
    map_it(city.config, ASKED)
    mask = raster(tmp_path / "run" / "mask.tif")
    expected = np.where(mask == 1, 255, 0)
    found = np.zeros_like(expected)
    for number in range(4):
        row, col = divmod(number, 2)
        path = tmp_path / "run" / "tile_masks" / f"tile{number + 1}.tif"
        found[row * 200 : (row + 1) * 200, col * 200 : (col + 1) * 200] = raster(path)
        with rasterio.open(path) as own, rasterio.open(tmp_path / "tiles" / path.name) as tile:
            assert (own.crs, own.transform, own.shape) == (tile.crs, tile.transform, tile.shape)
            assert own.dtypes == ("uint8",)
    assert (found == expected).all()
    assert expected.any()


def test_the_mask_of_a_warped_tile_lies_on_the_tiles_own_pixels(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 2, tile_px=200, nodata=None)
    with rasterio.open(tmp_path / "tiles" / "tile2.tif") as source:
        transform, width, height = calculate_default_transform(
            source.crs, "EPSG:3857", source.width, source.height, *source.bounds
        )
        image = np.zeros((3, height, width), np.uint8)
        place: dict[str, Any] = {"dst_transform": transform, "dst_crs": "EPSG:3857"}
        reproject(source.read(), image, src_transform=source.transform, src_crs=source.crs, **place)
    write_tile(tmp_path / "tiles" / "tile2.tif", image, 0, 0, crs="EPSG:3857", transform=transform)
    map_it(city.config, ASKED)
    with rasterio.open(tmp_path / "run" / "mask.tif") as mask:
        expected = np.zeros((height, width), np.uint8)
        where: dict[str, Any] = {"resampling": Resampling.nearest, "tolerance": 0, "src_nodata": None}
        ones = (mask.read(1) == 1).astype(np.uint8)
        reproject(ones, expected, src_transform=mask.transform, src_crs=mask.crs, **place, **where)
    assert (raster(tmp_path / "run" / "tile_masks" / "tile2.tif") == expected * 255).all()
    assert expected.any()


def test_masks_that_are_gone_are_made_again_and_nothing_else(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 2, tile_px=200)
    map_it(city.config)
    assert not (tmp_path / "run" / "tile_masks").exists()
    assert nothing_changed(load_city(city.config, [ASKED])) is None
    map_it(city.config, ASKED)
    assert nothing_changed(load_city(city.config, [ASKED])) is not None
    before = raster(tmp_path / "run" / "tile_masks" / "tile1.tif")
    (tmp_path / "run" / "tile_masks" / "tile1.tif").unlink()
    assert nothing_changed(load_city(city.config, [ASKED])) is None
    map_it(city.config, ASKED)
    assert (raster(tmp_path / "run" / "tile_masks" / "tile1.tif") == before).all()


def test_two_tiles_of_one_name_are_refused_before_any_work(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 1, tile_px=200)
    write_tile(tmp_path / "more" / "Tile1.tif", draw_blobs(200, 200), ORIGIN[0], ORIGIN[1] + 200)
    with pytest.raises(UserError, match=r"tile1\.tif and .*Tile1\.tif would both be written as tile1\.tif"):
        map_it(city.config, "images=[tiles/*.tif, more/*.tif]", ASKED)
    assert not (tmp_path / "run").exists()
