"""Laws of publishing: what is published is what went in, whole or not at all, and nobody's work is written over."""

import itertools
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyogrio
import pytest
import rasterio
import rasterio.shutil
import shapely
from pyproj import CRS

from segpipe.pipeline import changes, placing, rasters
from segpipe.pipeline.beside import partial_path
from segpipe.pipeline.geopackage import add_changes, read_rows, rows_digest, write_geopackage
from segpipe.pipeline.placing import find_published, place_geopackage
from segpipe.pipeline.rasters import Look, write_cog
from segpipe.pipeline.rows import BATCH_ROWS, SCHEMA
from segpipe.tasks.errors import RunError
from segpipe.tasks.grid import Lattice, Window

WKT = CRS(32645).to_wkt()
LATTICE = Lattice(WKT, 0.3, 0.1, 0.2)


def rows(numbers: np.ndarray, geometries: np.ndarray | None = None) -> pa.RecordBatch:
    if geometries is None:
        x, y = 500_000 + numbers % 1000 * 10.0, 3_000_000 + numbers // 1000 * 10.0
        geometries = shapely.box(x, y, x + 3 + numbers % 5, y + 7)
    share = 0.5 + numbers % 100 / 200
    columns = {
        "building_id": [f"r{number}c7" for number in numbers],
        "area_m2": numbers * 0.09,
        "perimeter_m": numbers * 0.3,
        "pixels": numbers,
        "confidence": share,
        "edge_confidence": share / 2,
        "rectangularity": 1 - share / 3,
        "holes": numbers % 4,
        "outline": np.array(["raw", "simplified", "orthogonal"])[numbers % 3],
        "touches_nodata": numbers % 5 == 0,
        "touches_edge": numbers % 10 == 0,
        "cut": numbers % 3 == 0,
        "tiles": np.array(["a.tif", "a.tif, b.tif"])[numbers % 2],
        "review": share,
        "geometry": shapely.to_wkb(geometries),
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def write(path: Path, count: int, first: int = 0) -> str:
    return write_geopackage(path, [rows(np.arange(first, first + count))], WKT).digest


def changed(count: int, first: int = 0) -> pa.RecordBatch:
    numbers = np.arange(first, first + count)
    buildings = rows(numbers)
    kinds = np.array(changes.KINDS)[numbers % 3].tolist()
    new, old = numbers % 3 != 1, numbers % 3 != 0
    columns = {
        "change": kinds,
        "building_id": pa.array(buildings.column("building_id").to_pylist(), mask=~new),
        "previous_id": pa.array(buildings.column("building_id").to_pylist(), mask=~old),
        "area_m2": pa.array(numbers * 0.09, mask=~new),
        "previous_area_m2": pa.array(numbers * 0.1, mask=~old),
        "geometry": buildings.column("geometry"),
    }
    return pa.record_batch([pa.array(columns[it.name], it.type) for it in changes.SCHEMA], schema=changes.SCHEMA)


def edit(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for (trigger,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f'DROP TRIGGER "{trigger}"')  # they call functions that only GDAL and QGIS have
        database.execute(statement)


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(statement).fetchall()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes past this size fail, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_120_000_footprints_stream_to_the_file_in_order_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "buildings.gpkg"
    size_at: list[int] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, 120_000, BATCH_ROWS):
            size_at.append(path.stat().st_size if path.exists() else 0)
            yield rows(np.arange(first, min(120_000, first + BATCH_ROWS)))

    written = write_geopackage(path, batches(), WKT)
    assert size_at[1] > 200_000, "the first batch was not on disk when the second was asked for"
    assert size_at[0] < size_at[1] < size_at[2]
    frame = pyogrio.read_dataframe(path, layer="buildings")
    expected = pa.Table.from_batches(list(batches())).to_pandas()
    assert written.features == len(frame) == 120_000
    assert tuple(frame.total_bounds) == written.bounds
    for name in [name for name in SCHEMA.names if name != "geometry"]:
        assert (frame[name] == expected[name]).all()
    assert (frame.geometry.to_wkb() == expected["geometry"]).all()
    assert CRS(frame.crs) == CRS(32645)
    assert rows_digest(path) == written.digest


def test_geopackage_is_version_1_2_with_an_index_and_registered_tables(tmp_path: Path) -> None:
    path = tmp_path / "buildings.gpkg"
    write(path, 50)
    assert query(path, "PRAGMA user_version") == [(10200,)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    assert query(path, "SELECT count(*) FROM rtree_buildings_geom") == [(50,)]
    assert query(path, "SELECT geometry_type_name, z, m FROM gpkg_geometry_columns") == [("POLYGON", 0, 0)]
    contents = query(path, "SELECT table_name, data_type FROM gpkg_contents ORDER BY 1")
    assert contents == [("buildings", "features"), ("layer_styles", "attributes")]


def test_the_default_style_colours_by_confidence_where_qgis_looks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "buildings.gpkg"
    write(path, 1)
    key = "f_table_catalog, f_table_schema, f_table_name, f_geometry_column, useAsDefault"
    [(*found, qml)] = query(path, f"SELECT {key}, styleQML FROM layer_styles")
    assert found == ["", "", "buildings", "geom", 1]
    renderer = ElementTree.fromstring(str(qml)).find("renderer-v2")
    assert renderer is not None
    assert (renderer.get("type"), renderer.get("attr")) == ("graduatedSymbol", "confidence")
    limits = [(float(it.get("lower", "")), float(it.get("upper", ""))) for it in renderer.iter("range")]
    assert (limits[0][0], limits[-1][1]) == (0, 1)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(limits)), "every confidence has a colour"
    fills = [it.find("layer/prop[@k='color']") for it in renderer.iter("symbol")]
    assert len({it.get("v") for it in fills if it is not None}) == len(limits)


def test_changes_stand_beside_the_buildings_unchanged_with_index_style_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "buildings.gpkg"
    digest = write(path, 50)
    whole = changed(2 * BATCH_ROWS)
    counts = add_changes(path, [whole.slice(0, 10), whole.slice(10)], WKT)
    assert counts == {"added": 683, "removed": 683, "modified": 682}
    (layers,) = zip(*(pyogrio.list_layers(path)[:, :1]), strict=True)
    assert [*layers] == ["buildings", "changes", "layer_styles"]
    found = pa.Table.from_batches(read_rows(path, "changes", changes.SCHEMA))
    assert found.equals(pa.Table.from_batches([whole]))
    assert rows_digest(path) == digest
    assert query(path, "SELECT count(*) FROM rtree_changes_geom") == [(2 * BATCH_ROWS,)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    contents = query(path, "SELECT table_name, data_type FROM gpkg_contents ORDER BY 1")
    assert contents == [("buildings", "features"), ("changes", "features"), ("layer_styles", "attributes")]
    [(qml,)] = query(path, "SELECT styleQML FROM layer_styles WHERE f_table_name = 'changes' AND useAsDefault")
    renderer = ElementTree.fromstring(str(qml)).find("renderer-v2")
    assert renderer is not None
    assert (renderer.get("type"), renderer.get("attr")) == ("categorizedSymbol", "change")
    fills = {it.get("name"): it.find("layer/prop[@k='color']") for it in renderer.iter("symbol")}
    shown = {it.get("value"): fills[it.get("symbol")] for it in renderer.iter("category")}
    assert {*shown} == {*changes.KINDS}
    assert len({it.get("v") for it in shown.values() if it is not None}) == 3
    assert [it.name for it in tmp_path.iterdir()] == ["buildings.gpkg"]


def test_a_full_disk_while_changes_are_added_leaves_nothing(tmp_path: Path) -> None:
    path = partial_path(tmp_path / "buildings.gpkg")
    write(path, 10)
    with largest_file(1_000_000), pytest.raises(RunError, match="cannot be written"):
        add_changes(path, [changed(12 * BATCH_ROWS)], WKT)
    assert not list(tmp_path.iterdir())


def test_what_was_published_last_is_found_by_its_rows_even_while_it_is_open(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"buildings{n}.gpkg", count) for n, count in (("", 10), ("-2", 11)))
    known = {"buildings.gpkg": {one}, "buildings-2.gpkg": {two}, "buildings-10.gpkg": {one}}
    first, second = tmp_path / "buildings.gpkg", tmp_path / "buildings-2.gpkg"
    assert find_published(tmp_path, known, "buildings.gpkg") == (first, one)
    assert find_published(tmp_path, known, None) == (second, two)
    before = first.read_bytes()
    with closing(sqlite3.connect(first, isolation_level=None)) as somebody:
        somebody.execute("BEGIN EXCLUSIVE")
        assert find_published(tmp_path, known, "buildings.gpkg") == (first, one)
    edit(second, "DELETE FROM buildings WHERE fid = 4")
    assert find_published(tmp_path, known, "buildings-2.gpkg") == (first, one)
    assert find_published(tmp_path, {"buildings.gpkg": set()}, None) is None
    assert first.read_bytes() == before
    assert sorted(it.name for it in tmp_path.iterdir()) == ["buildings-2.gpkg", "buildings.gpkg"]


@pytest.mark.parametrize("batches", [[], [rows(np.arange(0))]], ids=["no batch", "one batch without rows"])
def test_a_city_without_buildings_is_an_empty_valid_layer(tmp_path: Path, batches: list[pa.RecordBatch]) -> None:
    path = tmp_path / "buildings.gpkg"
    written = write_geopackage(path, batches, WKT)
    info = pyogrio.read_info(path, layer="buildings")
    assert (written.features, written.bounds, info["features"]) == (0, None, 0)
    assert list(info["fields"]) == [name for name in SCHEMA.names if name != "geometry"]
    assert info["geometry_type"] == "Polygon"
    assert CRS(info["crs"]) == CRS(32645)
    assert rows_digest(path) == written.digest


def test_the_digest_does_not_depend_on_the_cut_into_batches_nor_on_byte_order(tmp_path: Path) -> None:
    numbers = np.arange(100)
    digests = {
        write_geopackage(tmp_path / f"{n}.gpkg", [rows(p) for p in np.array_split(numbers, n)], WKT).digest
        for n in (1, 3, 7)
    }
    batch = rows(numbers)
    big_endian = pa.array(shapely.to_wkb(shapely.from_wkb(batch.column("geometry")), byte_order=0), pa.binary())
    batch = batch.set_column(len(SCHEMA) - 1, SCHEMA.field("geometry"), big_endian)
    digests.add(write_geopackage(tmp_path / "big.gpkg", [batch], WKT).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "VACUUM",
        "PRAGMA journal_mode = WAL",
        "CREATE TABLE notes (text TEXT)",
        "UPDATE gpkg_contents SET last_change = '2020-01-01T00:00:00.000Z', description = 'seen'",
        "UPDATE layer_styles SET styleName = 'mine'",
    ],
)
def test_the_digest_of_rows_survives_what_changes_the_file_only(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "buildings.gpkg"
    digest = write(path, 20)
    before = path.read_bytes()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement)
    assert path.read_bytes() != before
    assert rows_digest(path) == digest


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE buildings SET building_id = 'house' WHERE fid = 7",
        "UPDATE buildings SET building_id = NULL WHERE fid = 7",
        "UPDATE buildings SET area_m2 = area_m2 + 1e-9 WHERE fid = 7",
        "UPDATE buildings SET pixels = NULL WHERE fid = 1",
        "UPDATE buildings SET cut = NOT cut WHERE fid = 5",
        "DELETE FROM buildings WHERE fid = 20",
        "UPDATE buildings SET fid = 99 WHERE fid = 3",
        "ALTER TABLE buildings ADD COLUMN storeys INTEGER",
    ],
)
def test_the_digest_of_rows_changes_with_any_edit(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "buildings.gpkg"
    digest = write(path, 20)
    edit(path, statement)
    assert rows_digest(path) != digest


def test_coordinates_that_need_all_17_digits_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "buildings.gpkg"
    house = shapely.box(353881.49999999994, 3057170.4, 354281.69999999995, 3057560.4)
    write_geopackage(path, [rows(np.arange(1), np.array([house]))], WKT)
    assert pyogrio.read_dataframe(path, layer="buildings").geometry[0].equals_exact(house, 0)


def test_the_digest_of_rows_changes_with_a_moved_corner(tmp_path: Path) -> None:
    boxes = shapely.box(np.arange(5.0), 0, np.arange(5.0) + 1, 1)
    moved = np.append(boxes[:4], shapely.box(4, 0, 5, 1.001))
    one = write_geopackage(tmp_path / "1.gpkg", [rows(np.arange(5), boxes)], WKT).digest
    two = write_geopackage(tmp_path / "2.gpkg", [rows(np.arange(5), moved)], WKT).digest
    assert one != two


@pytest.mark.parametrize(
    "wkt",
    [
        "POLYGON ((0 0, 1 1, 1 0, 0 1, 0 0))",
        "MULTIPOLYGON (((0 0, 1 0, 1 1, 0 0)))",
        "POINT (0 0)",
        "POLYGON EMPTY",
    ],
)
def test_what_is_not_a_valid_polygon_is_refused_by_id_and_nothing_is_left(tmp_path: Path, wkt: str) -> None:
    geometries = np.array([shapely.box(0, 0, 1, 1), shapely.from_wkt(wkt)])
    with pytest.raises(RunError, match=r"building r1c7: not a valid Polygon"):
        write_geopackage(tmp_path / "buildings.gpkg", [rows(np.arange(2), geometries)], WKT)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_source_of_batches_comes_through_as_it_is(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield rows(np.arange(10))
        raise RunError("fragment 3_4 is damaged")

    with pytest.raises(RunError, match=r"^fragment 3_4 is damaged$"):
        write_geopackage(tmp_path / "buildings.gpkg", batches(), WKT)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_no_partial_geopackage(tmp_path: Path) -> None:
    batches = [rows(np.arange(first, first + BATCH_ROWS)) for first in range(0, 8 * BATCH_ROWS, BATCH_ROWS)]
    with largest_file(1_000_000), pytest.raises(RunError, match="cannot be written"):
        write_geopackage(tmp_path / "buildings.gpkg", batches, WKT)
    assert not list(tmp_path.iterdir())


def place(folder: Path, count: int, **published: str) -> tuple[Path, str, dict[str, str]]:
    """Where a city of so many buildings was placed, its digest, and what was left alone and why."""
    temporary = partial_path(folder / "buildings.gpkg")
    digest = write(temporary, count)
    left: dict[str, str] = {}
    known = {f"{name.replace('_', '-')}.gpkg": {"of a killed run", rows} for name, rows in published.items()}
    placed = place_geopackage(temporary, folder, known, lambda path, why: left.update({path.name: why}))
    assert not temporary.exists()
    assert rows_digest(placed) == digest
    return placed, digest, left


CHANGED = "holds other rows than were published"
OPEN = "is open in another program"


def test_what_was_published_is_replaced_even_if_the_file_was_opened(tmp_path: Path) -> None:
    placed, first, _ = place(tmp_path, 10)
    assert placed == tmp_path / "buildings.gpkg"
    edit(placed, "UPDATE gpkg_contents SET last_change = '2020-01-01T00:00:00.000Z'")
    placed, _, left = place(tmp_path, 11, buildings=first)
    assert (placed, left) == (tmp_path / "buildings.gpkg", {})
    assert [path.name for path in tmp_path.iterdir()] == ["buildings.gpkg"]


def test_a_run_killed_before_it_noted_what_it_published_replaces_its_own_rows(tmp_path: Path) -> None:
    place(tmp_path, 10)
    assert place(tmp_path, 10)[0] == tmp_path / "buildings.gpkg"


def test_edited_rows_are_left_alone_and_the_new_file_is_named_2_then_3(tmp_path: Path) -> None:
    mine, one, _ = place(tmp_path, 10)
    edit(mine, "UPDATE buildings SET building_id = 'town hall' WHERE fid = 4")
    edited = mine.read_bytes()
    second, two, left = place(tmp_path, 11, buildings=one)
    assert (second, left) == (tmp_path / "buildings-2.gpkg", {"buildings.gpkg": CHANGED})
    again, two, _ = place(tmp_path, 12, buildings=one, buildings_2=two)
    assert again == second, "rows published under the second name may be replaced there"
    edit(second, "UPDATE buildings SET building_id = 'church' WHERE fid = 4")
    third, _, left = place(tmp_path, 13, buildings=one, buildings_2=two)
    assert (third, left) == (tmp_path / "buildings-3.gpkg", {"buildings.gpkg": CHANGED, "buildings-2.gpkg": CHANGED})
    assert mine.read_bytes() == edited


def test_a_file_that_nobody_has_open_any_more_is_replaced_again(tmp_path: Path) -> None:
    mine, one, _ = place(tmp_path, 10)
    wal = tmp_path / "buildings.gpkg-wal"
    wal.touch()
    second, two, _ = place(tmp_path, 11, buildings=one)
    assert second == tmp_path / "buildings-2.gpkg"
    wal.unlink()
    assert place(tmp_path, 12, buildings=one, buildings_2=two)[0] == mine


def test_a_copy_that_somebody_made_under_the_second_name_is_left_alone(tmp_path: Path) -> None:
    mine, one, _ = place(tmp_path, 10)
    shutil.copy(mine, tmp_path / "buildings-2.gpkg")
    edit(mine, "DELETE FROM buildings WHERE fid = 4")
    assert place(tmp_path, 11, buildings=one)[0] == tmp_path / "buildings-3.gpkg"


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_a_file_that_somebody_has_open_is_left_alone(tmp_path: Path, suffix: str) -> None:
    mine, published, _ = place(tmp_path, 10)
    (tmp_path / f"buildings.gpkg{suffix}").write_bytes(b"")
    before = mine.read_bytes()
    placed, _, left = place(tmp_path, 11, buildings=published)
    assert (placed, left) == (tmp_path / "buildings-2.gpkg", {"buildings.gpkg": OPEN})
    assert mine.read_bytes() == before


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_file_that_another_program_has_locked_is_left_alone_without_waiting_for_it(
    tmp_path: Path, lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, published, _ = place(tmp_path, 10)
    read: list[Path] = []
    monkeypatch.setattr(placing, "rows_digest", lambda path: read.append(path) or rows_digest(path))
    with closing(sqlite3.connect(mine, isolation_level=None)) as somebody:
        somebody.execute(lock)
        placed, _, left = place(tmp_path, 11, buildings=published)
    assert (placed, left) == (tmp_path / "buildings-2.gpkg", {"buildings.gpkg": OPEN})
    assert mine not in read, "a locked file was read, for which GDAL waits"


def test_asking_whether_a_file_is_locked_does_not_change_it(tmp_path: Path) -> None:
    mine, published, _ = place(tmp_path, 10)
    edit(mine, "DELETE FROM buildings WHERE fid = 4")
    before, time = mine.read_bytes(), mine.stat().st_mtime_ns
    place(tmp_path, 11, buildings=published)
    assert (mine.read_bytes(), mine.stat().st_mtime_ns) == (before, time)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["buildings-2.gpkg", "buildings.gpkg"]


def test_a_file_with_somebodys_table_is_left_alone(tmp_path: Path) -> None:
    mine, published, _ = place(tmp_path, 10)
    edit(mine, "CREATE TABLE field_notes (text TEXT)")
    placed, _, left = place(tmp_path, 11, buildings=published)
    assert placed == tmp_path / "buildings-2.gpkg"
    assert left == {"buildings.gpkg": "holds a table field_notes that was not published"}


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0 torn"])
def test_a_file_that_is_no_geopackage_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "buildings.gpkg").write_bytes(content)
    placed, _, left = place(tmp_path, 5)
    assert (placed, left) == (tmp_path / "buildings-2.gpkg", {"buildings.gpkg": CHANGED})
    assert (tmp_path / "buildings.gpkg").read_bytes() == content


def test_a_folder_named_like_the_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "buildings.gpkg").mkdir()
    assert place(tmp_path, 5)[0] == tmp_path / "buildings-2.gpkg"


def city_pixels(window: Window, high: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    pixels = np.kron(rng.integers(0, high + 1, (-(-window.height // 8), -(-window.width // 8))), np.ones((8, 8)))
    pixels = pixels[: window.height, : window.width].astype(np.uint8)
    pixels[: window.height // 2, window.width // 2 :] = 255
    return pixels


@pytest.mark.parametrize(("resampling", "high"), [("mode", 1), ("average", 250)])
@pytest.mark.parametrize("block_px", [512, 1024])
def test_a_cog_holds_the_same_pixels_in_the_right_place(
    tmp_path: Path, resampling: str, high: int, block_px: int
) -> None:
    window = Window(-700, -1300, 1200, 2100)
    pixels = city_pixels(window, high)
    read: list[Window] = []

    def part(inner: Window) -> np.ndarray:
        read.append(inner)
        return pixels[inner.within(window)]

    path = tmp_path / "raster.tif"
    write_cog(path, part, window, LATTICE, resampling=resampling, block_px=block_px)  # type: ignore[arg-type]
    assert max(inner.pixels for inner in read) <= block_px**2
    assert sum(inner.pixels for inner in read) == window.pixels
    with rasterio.open(path) as raster:
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.overviews(1) == [2, 4, 8]
        assert raster.nodata == 255
        assert raster.block_shapes == [(512, 512)]
        assert raster.transform == LATTICE.transform(window.row_off, window.col_off)
        assert raster.bounds == pytest.approx(LATTICE.bounds(window))
        assert CRS(raster.crs) == CRS(32645)
        np.testing.assert_array_equal(raster.read(1), pixels)
    with rasterio.open(path, OVERVIEW_LEVEL=0) as half:
        overview = half.read(1)
    assert (overview[:300, 530:] == 255).all()
    assert (overview[302:] != 255).all()
    if resampling == "average":
        inner = pixels[600:, :].astype(float).reshape(300, 2, 1050, 2).mean(axis=(1, 3))
        assert np.abs(overview[302:] - inner[2:]).max() <= 0.5
    else:
        np.testing.assert_array_equal(overview[302:], pixels[604::2, ::2])
    assert [left.name for left in tmp_path.iterdir()] == ["raster.tif"]


def test_a_cog_is_the_same_file_for_any_block(tmp_path: Path) -> None:
    window = Window(3, 5, 1100, 1300)
    pixels = city_pixels(window, 250)
    files = []
    for block_px in (300, 512, 2048):
        path = tmp_path / f"{block_px}.tif"
        write_cog(
            path, lambda part: pixels[part.within(window)], window, LATTICE, resampling="average", block_px=block_px
        )
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_areas_without_data_take_no_space_and_a_small_raster_needs_no_overview(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    nothing = Window(0, 0, 8192, 8192)
    write_cog(path, lambda part: np.full(part.shape_yx, 255), nothing, LATTICE, resampling="mode", block_px=4096)
    assert path.stat().st_size < 20_000
    with rasterio.open(path) as raster:
        assert (raster.read(1, window=((4000, 4200), (0, 100))) == 255).all()
    write_cog(path, lambda part: np.ones(part.shape_yx), Window(0, 0, 7, 1), LATTICE, resampling="mode", block_px=512)
    with rasterio.open(path) as raster:
        assert raster.read(1).tolist() == [[1]] * 7


@pytest.mark.parametrize("shape_yx", [(2100, 1537), (5000, 3), (3, 5000), (1, 1)])
@pytest.mark.parametrize("resampling", ["mode", "average"])
def test_a_raster_of_any_shape_with_a_few_valid_pixels_is_found_whole(
    tmp_path: Path, shape_yx: tuple[int, int], resampling: Literal["mode", "average"]
) -> None:
    window, rng = Window(0, 0, *shape_yx), np.random.default_rng(0)
    pixels = np.full(shape_yx, 255, np.uint8)
    pixels[tuple(rng.integers(0, side, 5) for side in shape_yx)] = 1
    pixels[-1, -1] = 0
    path = tmp_path / "mask.tif"
    write_cog(path, lambda part: pixels[part.within(window)], window, LATTICE, resampling=resampling, block_px=1024)
    with rasterio.open(path) as raster:
        np.testing.assert_array_equal(raster.read(1), pixels)


@pytest.mark.parametrize(
    ("shape_yx", "end"),
    [((512, 1025), 1024), ((1537, 512), 1024), ((2049, 2049), 1024), ((2050, 2050), 2048), ((3000, 3001), 2048)],
)
@pytest.mark.parametrize("resampling", ["mode", "average"])
def test_a_raster_of_any_size_whose_data_end_with_a_tile_is_found_whole(
    tmp_path: Path, shape_yx: tuple[int, int], end: int, resampling: Literal["mode", "average"]
) -> None:
    """Of an odd side the last pixel of a tile is found in the next tile of an overview too."""
    window, path = Window(0, 0, *shape_yx), tmp_path / "mask.tif"
    row, col = np.ogrid[: window.height, : window.width]
    a_tile, all_but_a_corner = (row < end) & (col < end), (row < end) | (col < end)
    for known in (a_tile, all_but_a_corner, a_tile & ((row == end - 1) | (col == end - 1))):
        pixels = np.where(known, np.uint8(1), np.uint8(255))
        write_cog(
            path, lambda part, it=pixels: it[part.within(window)], window, LATTICE, resampling=resampling, block_px=1024
        )
        with rasterio.open(path) as raster:
            np.testing.assert_array_equal(raster.read(1), pixels)


@pytest.mark.parametrize("shape_yx", [(2048, 2048), (2049, 2049)])
@pytest.mark.parametrize("resampling", ["mode", "average"])
def test_a_raster_that_lacks_a_tile_of_an_overview_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape_yx: tuple[int, int],
    resampling: Literal["mode", "average"],
) -> None:
    whole = rasters._add_overviews

    def add_without_a_tile(path: Path, resampling: Literal["mode", "average"]) -> None:
        """From a raster without the pixels under it, which come back later."""
        hole = ((0, 1024), (1023, shape_yx[1]))
        with rasterio.open(path, "r+") as raster:
            pixels = raster.read(1, window=hole)
            raster.write(np.full_like(pixels, 255), 1, window=hole)
        whole(path, resampling)
        with rasterio.open(path, "r+") as raster:
            raster.write(pixels, 1, window=hole)

    monkeypatch.setattr(rasters, "_add_overviews", add_without_a_tile)
    window = Window(0, 0, *shape_yx)
    with pytest.raises(RunError, match="the pixels read back are not those that were written"):
        write_cog(
            tmp_path / "mask.tif",
            lambda part: np.ones(part.shape_yx),
            window,
            LATTICE,
            resampling=resampling,
            block_px=1024,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [100_000, 1_050_000, 1_100_000, 1_300_000])
@pytest.mark.parametrize("look", [None, Look(0.004, {1: (9, 8, 7)})])
def test_a_full_disk_is_found_out_and_the_old_raster_stays(tmp_path: Path, size: int, look: Look | None) -> None:
    """Before the pixels are written, in their last bytes, and while overviews are."""
    path = tmp_path / "probability.tif"
    path.write_bytes(b"old")
    window = Window(0, 0, 1024, 1024)
    noise = np.random.default_rng(0).integers(0, 250, (1024, 1024), dtype=np.uint8)
    with largest_file(size), pytest.raises(RunError, match=r"probability\.tif: cannot be written"):
        write_cog(
            path,
            lambda part: noise[part.within(window)],
            window,
            LATTICE,
            resampling="average",
            block_px=512,
            look=look,
        )
    assert [left.name for left in tmp_path.iterdir()] == ["probability.tif"]
    assert path.read_bytes() == b"old"


def test_a_reader_that_fails_leaves_the_old_raster_and_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    path.write_bytes(b"old")

    def read(part: Window) -> np.ndarray:
        if part.row_off:
            raise RunError("chunk 3_4 is missing")
        return np.zeros(part.shape_yx, np.uint8)

    with pytest.raises(RunError, match="chunk 3_4 is missing"):
        write_cog(path, read, Window(0, 0, 1024, 512), LATTICE, resampling="mode", block_px=512)
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [("mask.tif", b"old")]


@pytest.mark.parametrize("step", ["_write_flat", "_add_overviews", "copy", "_check_cog"])
def test_a_raster_that_is_given_up_ends_with_its_step_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path, window = tmp_path / "mask.tif", Window(0, 0, 1024, 600)
    path.write_bytes(b"old")
    done: list[str] = []

    def watch(owner: ModuleType, name: str) -> None:
        whole = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            result = whole(*arguments, **options)
            done.append(name)
            return result

        monkeypatch.setattr(owner, name, watched)

    def stop_if_given_up() -> None:
        if step in done:
            raise RunError("given up")

    for name in ("_write_flat", "_add_overviews", "_check_cog"):
        watch(rasters, name)
    watch(rasterio.shutil, "copy")
    with pytest.raises(RunError, match="given up"):
        write_cog(
            path,
            lambda part: np.ones(part.shape_yx),
            window,
            LATTICE,
            resampling="mode",
            block_px=512,
            stop_if_given_up=stop_if_given_up,
        )
    assert done[-1] == step
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [("mask.tif", b"old")]


def test_a_raster_that_is_given_up_while_it_is_read_is_read_no_further(tmp_path: Path) -> None:
    window, read = Window(0, 0, 1024, 600), list[Window]()

    def part(inner: Window) -> np.ndarray:
        read.append(inner)
        return np.ones(inner.shape_yx)

    def stop_if_given_up() -> None:
        if len(read) == 3:
            raise RunError("given up")

    with pytest.raises(RunError, match="given up"):
        write_cog(
            tmp_path / "mask.tif",
            part,
            window,
            LATTICE,
            resampling="mode",
            block_px=512,
            stop_if_given_up=stop_if_given_up,
        )
    assert len(read) == 3
    assert not list(tmp_path.iterdir())
