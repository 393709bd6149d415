"""Cities as people have them, run end to end: what comes out equals what the same pixels in plain form give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from conftest import ORIGIN, RESOLUTION, City, map_it, outputs, raster, stages_since, tasks_done, write_tile
from rasterio.warp import Resampling, calculate_default_transform, reproject

from segpipe.pipeline.config import load_city
from segpipe.pipeline.plan import make_plan

MakeCity = Callable[..., City]

pytestmark = pytest.mark.usefixtures("in_process")

SMALL: dict[str, Any] = {"grid": {"chunk_px": 64, "block_px": 128}, "nodata": None, "tile_px": 200}
UTM = "EPSG:32633"


def carried(path: Path, crs: str, resolution: float | None = None) -> tuple[np.ndarray, Affine]:
    """A tile's pixels in another CRS, 0 outside of it."""
    with rasterio.open(path) as source:
        transform, width, height = calculate_default_transform(
            source.crs, crs, source.width, source.height, *source.bounds, resolution=resolution
        )
        image = np.zeros((source.count, height, width), np.uint8)
        reproject(
            source.read(), image, src_transform=source.transform, src_crs=source.crs, dst_transform=transform,
            dst_crs=crs, resampling=Resampling.bilinear,
        )  # fmt: skip
    return image, transform


def cut(folder: Path, image: np.ndarray, transform: Affine, crs: str, side: int, jitter: float = 0.0) -> None:
    """Tiles of an image; jitter: by which share the pixel heights of the tiles differ."""
    rng = np.random.default_rng(1)
    for row in range(0, image.shape[1], side):
        for col in range(0, image.shape[2], side):
            place = transform * Affine.translation(col, row)
            e = place.e * (1 + rng.uniform(-jitter, jitter))
            own = Affine(place.a, 0, place.c, 0, e, place.f)
            part = image[:, row : row + side, col : col + side]
            write_tile(folder / f"{row} {col}.tif", part, 0, 0, crs=crs, transform=own)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
def test_tiles_in_another_crs_give_the_same_bytes_however_the_work_and_the_source_were_cut(
    make_city: MakeCity, tmp_path: Path, crs: str
) -> None:
    city = make_city(1, 2, **SMALL)
    write_tile(tmp_path / "whole.tif", city.image_CHW, *ORIGIN)
    image, transform = carried(tmp_path / "whole.tif", crs)
    image, transform = image[:, 15:-15, 15:-15], transform * Affine.translation(15, 15)
    cut(tmp_path / "one", image, transform, crs, 10_000)
    cut(tmp_path / "many", image, transform, crs, 67, jitter=3e-9)
    settings = (f"grid.crs={UTM}", "grid.resolution_m=0.3")
    map_it(city.config, "images=one", *settings)
    map_it(city.config, "images=many", "output=many-run", *settings)
    map_it(city.config, "images=one", "output=other", "grid.chunk_px=256", "grid.block_px=256", *settings)
    plan = make_plan(load_city(city.config, ["images=one", *settings]))
    around = plan.layout.grid.pad(plan.block_px).cells(plan.block_px)
    assert [block for block in around if plan.is_predicted(block)] == list(plan.blocks())
    expected = outputs(tmp_path / "run", tiles=False)
    assert outputs(tmp_path / "other", tiles=False) == expected
    found = outputs(tmp_path / "many-run", tiles=False)
    assert found["rows"] == expected["rows"]
    assert found["probability"] == expected["probability"]


def test_a_building_over_tile_edges_in_degrees_is_one_polygon(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 1, **SMALL)
    image = np.full((3, 200, 200), 40, np.uint8)
    image[:, 60:110, 70:150] = 230
    write_tile(tmp_path / "plain.tif", image, *ORIGIN)
    turned, transform = carried(tmp_path / "plain.tif", "EPSG:4326")
    cut(tmp_path / "many", turned, transform, "EPSG:4326", 23, jitter=3e-9)
    map_it(city.config, "images=many", "grid.resolution_m=0.3")
    _, _, geometries, _ = pyogrio.raw.read(tmp_path / "run" / "buildings.gpkg", layer="buildings")
    (building,) = shapely.from_wkb(geometries)
    assert building.area == pytest.approx(50 * 80 * 0.09, rel=0.05)


NEW_YORK = Affine(0.3, 0, 584_000, 0, -0.3, 4_508_000)
"""A place in UTM zone 18 north, where a State Plane counts in US feet."""


@pytest.fixture
def one_house(make_city: MakeCity, tmp_path: Path) -> Callable[[str], Path]:
    """A city of one large turned house on one tile in a CRS, always at the same place; gives its YAML."""

    def write(crs: str) -> Path:
        city = make_city(1, 1, **SMALL)
        rows, cols = np.mgrid[:600, :600]
        along, across = (rows + cols - 600) / np.sqrt(2), (rows - cols) / np.sqrt(2)
        image = np.full((3, 600, 600), 40, np.uint8)
        image[:, (np.abs(along) < 150) & (np.abs(across) < 90)] = 230
        options = {"crs": "EPSG:32618", "transform": NEW_YORK}
        path = write_tile(tmp_path / "plain.tif", image, 0, 0, **options)
        turned, transform = carried(path, crs)
        folder = tmp_path / crs.replace(":", "")
        write_tile(folder / "a.tif", turned, 0, 0, crs=crs, transform=transform)
        settings = {"images": folder.name, "output": f"run-{folder.name}", "nodata": 0, "nodata_min_m2": 200}
        return city.set(**settings, grid={"chunk_px": 256, "block_px": 256, "resolution_m": 0.3})

    return write


def buildings(folder: Path) -> Any:
    return pyogrio.read_dataframe(folder / "buildings.gpkg", layer="buildings")


def test_a_building_and_the_settings_in_metres_are_the_same_in_any_crs(
    one_house: Callable[[str], Path], tmp_path: Path
) -> None:
    raw, simple = [], []
    for crs in ("EPSG:32618", "EPSG:3857", "EPSG:4326", "EPSG:2263"):
        config, folder = one_house(crs), tmp_path / f"run-{crs.replace(':', '')}"
        for found, simplify_m in ((raw, 0), (simple, 1.5)):
            map_it(config, f"vectorize.simplify_m={simplify_m}")
            found.append(buildings(folder).to_crs("EPSG:32618").geometry[0])
        moved = shapely.hausdorff_distance(raw[-1], simple[-1])
        assert 0.2 < moved <= 1.51, (crs, moved)
        assert abs(shapely.get_num_coordinates(simple[-1]) - shapely.get_num_coordinates(simple[0])) <= 6
        map_it(config)
        area = buildings(folder).area_m2[0]
        if crs == "EPSG:32618":
            expected = area
        assert area == pytest.approx(expected, rel=0.01)
        for limit, count in ((0.97, 1), (1.03, 0)):
            assert map_it(config, f"vectorize.min_area_m2={limit * expected}").buildings == count, (crs, limit)


def without_crs(tile: Path, image: np.ndarray, transform: Affine) -> list[str]:
    """Tiles that only a world file places."""
    write_tile(tile, image, 0, 0, crs=None, transform=None)
    numbers = (transform.a, 0, 0, transform.e, transform.c + transform.a / 2, transform.f + transform.e / 2)
    tile.with_suffix(".tfw").write_text("\n".join(f"{number:.10f}" for number in numbers))
    return [f"images_crs={UTM}"]


def lossless_jpeg_2000(tile: Path, image: np.ndarray, transform: Affine) -> list[str]:
    write_tile(
        tile.with_suffix(".jp2"), image, 0, 0, transform=transform, driver="JP2OpenJPEG", compress=None,
        QUALITY="100", REVERSIBLE="YES", YCBCR420="NO",
    )  # fmt: skip
    return []


def sixteen_bits(tile: Path, image: np.ndarray, transform: Affine) -> list[str]:
    write_tile(tile, image.astype(np.uint16) * 257, 0, 0, transform=transform)
    return ["scale=[0, 65535]"]


def floats_with_nan(tile: Path, image: np.ndarray, transform: Affine) -> list[str]:
    samples = np.where((image == 0).all(axis=0), np.float32(np.nan), image / np.float32(255))
    write_tile(tile, samples.astype(np.float32), 0, 0, transform=transform)
    return ["scale=[0, 1]", "nodata=null"]


def near_infrared_first(tile: Path, image: np.ndarray, transform: Affine) -> list[str]:
    write_tile(tile, np.concatenate([image[::-1], image[:1]]), 0, 0, transform=transform)
    return ["bands=[3, 2, 1]"]


def in_a_vrt(tile: Path, image: np.ndarray, transform: Affine) -> list[str]:
    write_tile(tile, image, 0, 0, transform=transform)
    sources = "".join(
        f'<SimpleSource><SourceFilename relativeToVRT="1">{path.name}</SourceFilename><SourceBand>1</SourceBand>'
        f'<SrcRect xOff="0" yOff="0" xSize="200" ySize="200"/><DstRect xOff="{200 * number}" yOff="0" xSize="200"'
        ' ySize="200"/></SimpleSource>'
        for number, path in enumerate(sorted(tile.parent.glob("*.tif")))
    )
    band = f'<VRTRasterBand dataType="Byte" band="1">{sources}</VRTRasterBand>'
    (tile.parent / "all.vrt").write_text(f'<VRTDataset rasterXSize="400" rasterYSize="200">{band}</VRTDataset>')
    return ["images=messy/all.vrt"]


@pytest.mark.parametrize(
    "write", [without_crs, lossless_jpeg_2000, sixteen_bits, floats_with_nan, near_infrared_first, in_a_vrt]
)
def test_tiles_of_any_kind_give_what_the_same_pixels_give_in_plain_form(
    make_city: MakeCity, tmp_path: Path, write: Callable[[Path, np.ndarray, Affine], list[str]]
) -> None:
    city = make_city(1, 2, **SMALL | {"nodata": 0})
    for tile in sorted((tmp_path / "tiles").glob("*.tif")):
        with rasterio.open(tile) as source:
            settings = write(tmp_path / "messy" / tile.name, source.read(), source.transform)
    least = "nodata_min_m2=100"
    map_it(city.config, least)
    map_it(city.config, "images=messy", "output=other", least, *settings)
    expected = outputs(tmp_path / "run", tiles=False)
    assert 255 in np.frombuffer(expected["probability"], np.uint8)
    assert outputs(tmp_path / "other", tiles=False) == expected


def test_a_stray_tile_in_another_crs_comes_onto_the_lattice_of_the_others(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 2, **SMALL)
    image, transform = carried(tmp_path / "tiles" / "tile2.tif", "EPSG:3857")
    write_tile(tmp_path / "tiles" / "tile2.tif", image, 0, 0, crs="EPSG:3857", transform=transform, nodata=0)
    map_it(city.config, "nodata_min_m2=10")
    found = raster(tmp_path / "run" / "probability.tif")
    assert (found[20:180, 20:380] != 255).all(), "no gap between the tiles"
    with rasterio.open(tmp_path / "run" / "mask.tif") as mask:
        assert mask.crs.to_epsg() == 32633
        assert mask.transform.a == RESOLUTION


def test_finer_and_coarser_tiles_share_a_city(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 2, **SMALL)
    with rasterio.open(tmp_path / "tiles" / "tile2.tif") as source:
        place = source.transform
    fine = np.repeat(np.repeat(city.image_CHW[:, :, 200:], 2, axis=1), 2, axis=2)
    half = Affine(place.a / 2, 0, place.c, 0, place.e / 2, place.f)
    write_tile(tmp_path / "mixed" / "a.tif", city.image_CHW[:, :, :200], *ORIGIN)
    write_tile(tmp_path / "mixed" / "b.tif", fine, 0, 0, transform=half)
    map_it(city.config)
    map_it(city.config, "images=mixed", "output=other")
    found, expected = outputs(tmp_path / "other", tiles=False), outputs(tmp_path / "run", tiles=False)
    assert found["probability"] == expected["probability"]
    assert found["rows"] == expected["rows"]


def test_a_warped_tile_added_in_the_west_redoes_only_what_sees_it(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 1, **SMALL | {"grid": {"chunk_px": 64, "block_px": 64}})
    image, transform = carried(tmp_path / "tiles" / "tile1.tif", "EPSG:4326")
    for number, part in enumerate(np.array_split(image, 4, axis=2)):
        place = transform * Affine.translation(sum(p.shape[2] for p in np.array_split(image, 4, axis=2)[:number]), 0)
        write_tile(tmp_path / "many" / f"{number}.tif", part, 0, 0, crs="EPSG:4326", transform=place)
    settings = (f"grid.crs={UTM}", "grid.resolution_m=0.3")
    map_it(city.config, "images=[many/1.tif, many/2.tif, many/3.tif]", *settings)
    before = tasks_done(tmp_path / "run")
    map_it(city.config, "images=many", *settings)
    assert 0 < stages_since(tmp_path / "run", before)["predict"] < sum(1 for stage, _ in before if stage == "predict")
    map_it(city.config, "images=many", "output=other", *settings)
    assert outputs(tmp_path / "run")["rows"] == outputs(tmp_path / "other")["rows"]


def test_plan_and_manifest_say_what_is_warped(make_city: MakeCity, tmp_path: Path) -> None:
    from segpipe.pipeline.config import load_city
    from segpipe.pipeline.describe import describe
    from segpipe.pipeline.plan import make_plan

    city = make_city(1, 2, **SMALL)
    image, transform = carried(tmp_path / "tiles" / "tile2.tif", "EPSG:3857")
    write_tile(tmp_path / "tiles" / "tile2.tif", image, 0, 0, crs="EPSG:3857", transform=transform)
    told = dict(describe(make_plan(load_city(city.config))))
    assert told["warped"] == "1 of 2 tiles, from EPSG:3857 (bilinear); the other 1 are copied"
    map_it(city.config)
    copied, warped = json.loads((tmp_path / "run" / "manifest.json").read_text())["tiles"]
    assert copied["warped"] is None
    assert warped["warped"]["resampling"] == "bilinear"
    assert "Pseudo-Mercator" in warped["warped"]["from_crs"]
