"""Laws of the other formats: the same rows, files that validators accept, and nobody's own file written over."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pyogrio
import pytest
import rasterio
import shapely
from conftest import City, map_it, outputs
from published_rows import published_rows
from pyproj import CRS, Transformer

from segpipe.pipeline.config import load_city
from segpipe.pipeline.formats import write_formats
from segpipe.pipeline.geopackage import write_geopackage
from segpipe.pipeline.manifest import FORMAT_FILES, nothing_changed
from segpipe.pipeline.plan import make_plan
from segpipe.tasks.errors import RunError, UserError

WKT = CRS(32645).to_wkt()
ALL = f"outputs.formats=[{', '.join(FORMAT_FILES)}]"


@pytest.fixture
def city(make_city: Callable[..., City], in_process: Any) -> City:
    return make_city(tile_px=144, grid={"chunk_px": 64, "block_px": 128})


@pytest.fixture
def geopackage(tmp_path: Path) -> Path:
    numbers = np.arange(3000)
    x, y = 500_000 + numbers % 100 * 20.0, 3_000_000 + numbers // 100 * 20.0
    boxes = shapely.box(x, y, x + 3 + numbers % 5, y + 7 + 0.1 * (numbers % 3))
    rows = published_rows(boxes, building_id=[f"N{n}E7" for n in numbers], confidence=numbers / 3000, pixels=numbers)
    path = tmp_path / "buildings.gpkg"
    write_geopackage(path, (rows.slice(first, 1000) for first in range(0, 3000, 1000)), WKT)
    return path


def table(path: Path) -> gpd.GeoDataFrame:
    frame = gpd.read_parquet(path) if path.suffix == ".parquet" else pyogrio.read_dataframe(path, layer="buildings")
    return frame.sort_values("building_id", ignore_index=True)


@pytest.mark.parametrize("each", FORMAT_FILES)
def test_every_format_reads_back_equal_to_the_geopackage(geopackage: Path, each: str) -> None:
    expected = table(geopackage)
    write_formats(geopackage.parent, geopackage, [each], WKT, None)
    found = table(geopackage.parent / FORMAT_FILES[each])
    for name in expected.columns.drop("geometry"):
        assert (found[name] == expected[name]).all(), name
    if each == "geojson":
        found = found.to_crs(32645)
    tolerance = {"geojson": 2e-3, "filegdb": 2e-4}.get(each, 0)
    moved = shapely.hausdorff_distance(found.geometry, expected.geometry)
    assert moved.max() <= tolerance
    assert CRS(found.crs) == CRS(32645)
    assert not [path for path in geopackage.parent.iterdir() if "partial" in path.name]


def test_geojson_is_that_of_rfc_7946(geopackage: Path) -> None:
    write_formats(geopackage.parent, geopackage, ["geojson"], WKT, CRS(3857).to_wkt())
    data = json.loads((geopackage.parent / "buildings.geojson").read_text())
    assert "crs" not in data
    assert len(data["features"]) == 3000
    rings = [feature["geometry"]["coordinates"][0] for feature in data["features"]]
    assert all(shapely.LinearRing(ring).is_ccw for ring in rings)
    lon, lat = Transformer.from_crs(32645, 4326, always_xy=True).transform(500_000, 3_000_000)
    assert np.abs(np.array(rings[0]) - (lon, lat)).max() < 1e-3


def test_geoparquet_is_1_1_with_a_covering_by_which_parts_are_read(geopackage: Path) -> None:
    write_formats(geopackage.parent, geopackage, ["geoparquet"], WKT, None)
    path = geopackage.parent / "buildings.parquet"
    geo = json.loads(pq.read_metadata(path).metadata[b"geo"])
    column = geo["columns"][geo["primary_column"]]
    assert geo["version"] == "1.1.0"
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    expected = table(geopackage)
    assert column["bbox"] == expected.total_bounds.tolist()
    part = (500_100, 3_000_100, 500_300, 3_000_200)
    assert len(gpd.read_parquet(path, bbox=part)) == len(expected.cx[part[0] : part[2], part[1] : part[3]]) > 10


def test_a_crs_that_is_asked_for_is_that_of_the_added_files_and_places_stay(geopackage: Path) -> None:
    write_formats(geopackage.parent, geopackage, ["geoparquet", "flatgeobuf"], WKT, CRS(4326).to_wkt())
    expected = table(geopackage)
    for name in ("buildings.parquet", "buildings.fgb"):
        found = table(geopackage.parent / name)
        assert CRS(found.crs) == CRS(4326)
        assert shapely.hausdorff_distance(found.to_crs(32645).geometry, expected.geometry).max() < 1e-5


def test_a_disk_that_cannot_be_written_to_is_one_line(geopackage: Path) -> None:
    (geopackage.parent / "buildings.parquet").mkdir()
    (geopackage.parent / "buildings.partial-segpipe.parquet").mkdir()
    ours = geopackage.parent / "gone"
    with pytest.raises(RunError, match="cannot be written"):
        write_formats(ours, geopackage, ["geoparquet"], WKT, None)


def test_a_run_writes_all_that_is_asked_for_and_takes_back_what_no_longer_is(city: City) -> None:
    map_it(city.config, ALL)
    folder = city.folder / "run"
    assert all((folder / name).exists() for name in FORMAT_FILES.values())
    assert nothing_changed(load_city(city.config, [ALL])) is not None
    before = outputs(folder)
    map_it(city.config)
    assert not [name for name in FORMAT_FILES.values() if (folder / name).exists()]
    assert outputs(folder) == before


def test_a_file_of_somebodys_own_is_refused_and_kept(city: City) -> None:
    map_it(city.config)
    mine = city.folder / "run" / "buildings.geojson"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"outputs\.formats: buildings\.geojson .* was not written by a run"):
        map_it(city.config, ALL)
    map_it(city.config, "outputs.formats=[flatgeobuf]")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(("crs", "told"), [("EPSG:0", "no known coordinate system"), ("EPSG:4979", "has 3 axes")])
def test_a_crs_that_is_none_is_refused_before_any_work(city: City, crs: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"^outputs\.crs: {crs} .*{told}|^outputs\.crs: {crs} {told}"):
        make_plan(load_city(city.config, [f"outputs.crs={crs}"]))
    assert not (city.folder / "run").exists()


def test_the_geopackage_says_what_it_was_made_from(city: City) -> None:
    published = map_it(city.config)
    path = published.geopackage
    assert [*pyogrio.list_layers(path)[:, 0]] == ["buildings", "changes", "tiles", "skipped", "run", "layer_styles"]
    tiles = pyogrio.read_dataframe(path, layer="tiles")
    assert tiles["name"].tolist() == ["tile1.tif", "tile2.tif", "tile3.tif", "tile4.tif"]
    assert (tiles["status"].tolist(), tiles["warped"].tolist()) == (["used"] * 4, [False] * 4)
    with rasterio.open(city.folder / "tiles" / "tile3.tif") as tile:
        assert shapely.box(*tile.bounds).symmetric_difference(tiles.geometry[2]).area < 1e-3
    assert len(pyogrio.read_dataframe(path, layer="skipped")) == 0
    (run,) = pyogrio.read_dataframe(path, layer="run").to_dict("records")
    assert (run["name"], run["buildings"], run["mask_px"]) == ("tiny", published.buildings, published.mask_px)
    assert "on_tile_error" in run["config"]
    with closing(sqlite3.connect(path)) as database:
        styled = {name for (name,) in database.execute("SELECT f_table_name FROM layer_styles WHERE useAsDefault")}
        assert styled == {"buildings", "changes", "tiles", "skipped", "run"}
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    assert "Building footprints of tiny" in str(pyogrio.read_info(path, layer="buildings")["layer_metadata"])
    assert not [it.name for it in path.parent.iterdir() if it.name.endswith(".aux.xml")]


def test_a_tile_that_was_skipped_is_shown_with_its_reason(city: City) -> None:
    bad = city.folder / "tiles" / "tile2.tif"
    bad.write_bytes(b"no tile")
    path = map_it(city.config, "on_tile_error=skip").geopackage
    (row,) = pyogrio.read_dataframe(path, layer="skipped").to_dict("records")
    assert row["name"] == "tile2.tif"
    assert row["geometry"] is None
    assert row["reason"]


def test_rasters_are_cogs_and_probabilities_carry_their_scale_and_colours(city: City) -> None:
    validate = pytest.importorskip("rio_cogeo.cogeo").cog_validate
    map_it(city.config)
    folder = city.folder / "run"
    for name in ("mask.tif", "probability.tif"):
        valid, errors, warnings = validate(folder / name, strict=True)
        assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(folder / "probability.tif") as raster:
        assert (raster.scales, raster.offsets, raster.nodata) == ((0.004,), (0.0,), 255)
        colours = raster.colormap(1)
    assert colours[0][:3] == (68, 1, 84)
    assert colours[250][:3] == (253, 231, 37)


def test_the_item_beside_them_is_valid_and_its_checksums_are_the_files(city: City) -> None:
    pystac = pytest.importorskip("pystac")
    map_it(city.config, ALL)
    folder = city.folder / "run"
    item = pystac.Item.from_file(folder / "item.json")
    # The core's schemas come with pystac; those of extensions would be fetched.
    assert pystac.Item.from_dict(json.loads((folder / "item.json").read_text()) | {"stac_extensions": []}).validate()
    with rasterio.open(folder / "mask.tif") as raster:
        assert item.properties["proj:shape"] == [*raster.shape]
        assert item.properties["proj:transform"] == pytest.approx([*raster.transform][:6])
        assert item.properties["proj:code"] == raster.crs.to_string()
        lon, lat = raster.lnglat()
        assert shapely.geometry.shape(item.geometry).contains(shapely.Point(lon, lat))
    assert {*item.assets} >= {"buildings.gpkg", "mask.tif", "probability.tif", "buildings.parquet"}
    for name, asset in item.assets.items():
        data = (folder / name).read_bytes()
        assert asset.extra_fields["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
        assert asset.extra_fields["file:size"] == len(data)
    (band,) = item.assets["probability.tif"].extra_fields["raster:bands"]
    assert (band["scale"], band["nodata"], band["data_type"]) == (0.004, 255, "uint8")
