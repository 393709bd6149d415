"""Laws of `grid.area`: a district is mapped as the whole city would map it, and the whole city goes on from it."""

import json
import pickle
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyogrio
import pytest
import rasterio
import shapely
from conftest import (
    HALO,
    ORIGIN,
    RESOLUTION,
    STRIDE,
    City,
    map_it,
    outputs,
    raster,
    stages_since,
    tasks_done,
    write_city,
    write_tile,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyproj import CRS, Transformer
from scipy.ndimage import binary_dilation, label

from segpipe.pipeline.config import load_city
from segpipe.pipeline.describe import describe
from segpipe.pipeline.district import District, resolve_area
from segpipe.pipeline.manifest import nothing_changed
from segpipe.pipeline.plan import make_plan
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.vectorize import first_pixels

MakeCity = Callable[..., City]

pytestmark = pytest.mark.usefixtures("in_process")

TILE, CHUNK, BLOCK = 144, 64, 64
SMALL: dict[str, Any] = {"tile_px": TILE, "grid": {"chunk_px": CHUNK, "block_px": BLOCK}, "nodata_min_m2": 50}
CORNER = np.array([ORIGIN[1], ORIGIN[0]])
HEIGHT, WIDTH = 2 * TILE, 3 * TILE
WKT = CRS(32633).to_wkt()
LATTICE = Lattice(WKT, RESOLUTION, 0.1, 0.1)


def in_crs(polygon: shapely.Geometry) -> shapely.Geometry:
    """A polygon in pixels of the city (column, row from its upper left corner) in the CRS."""

    def forward(col_row: np.ndarray) -> np.ndarray:
        return np.array([0.1, 0.1]) + (col_row + CORNER) * [RESOLUTION, -RESOLUTION]

    return shapely.transform(polygon, forward)


def bounds(left: float, top: float, right: float, bottom: float) -> str:
    """An override of `grid.area` from pixels of the city."""
    return "grid.area=" + json.dumps(list(in_crs(shapely.box(left, top, right, bottom)).bounds))


def write_area(path: Path, *polygons: shapely.Geometry, crs: str | None = "EPSG:32633", **options: Any) -> Path:
    """A vector file of polygons in pixels of the city."""
    shapes = in_crs(np.array(polygons, np.object_))
    if crs and CRS(crs) != CRS(32633):
        move = Transformer.from_crs(32633, crs, always_xy=True).transform
        shapes = shapely.transform(shapes, lambda xy: np.stack(move(xy[:, 0], xy[:, 1]), axis=1))
    pyogrio.raw.write(path, shapely.to_wkb(shapes), [], [], crs=crs, geometry_type="Polygon", **options)
    return path


DISTRICT = (150.3, 150.7, 265.5, 250.2)
CROOKED = shapely.Polygon([(20, 130), (110, 100), (190, 190), (120, 260), (100, 170), (60, 220)])


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory, bundle: Path, in_process: type) -> City:
    """A city that was mapped as a whole, as it was before the last test had it."""
    folder = tmp_path_factory.getbasetemp() / "whole"
    pristine = folder.with_name("whole-pristine")
    if not pristine.exists():
        map_it(write_city(folder, bundle, 2, 3, seed=2, **SMALL).config)
        shutil.copytree(folder, pristine)
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)
    return City(folder / "city.yaml", np.zeros((3, HEIGHT, WIDTH), np.uint8))


def buildings(folder: Path) -> dict[str, Any]:
    frame = pyogrio.read_dataframe(folder / "buildings.gpkg", layer="buildings")
    return {row.building_id: row for row in frame.itertuples(index=False, name="Building")}


def units(folder: Path, stage: str) -> set[tuple[int, int]]:
    found = (unit.split("_") for it, unit in tasks_done(folder) if it == stage)
    return {(int(row), int(col)) for row, col in found}


def cut_by_pixels(folder: Path, wanted: set[Any], every: set[Any], names: set[str]) -> dict[str, bool]:
    """Whether a building touches the pixels of a block with tiles that is not predicted, from the whole city's mask."""
    frame = Window(*ORIGIN, HEIGHT, WIDTH)

    def pixels_of(blocks: set[Any]) -> np.ndarray:
        found = np.zeros(frame.shape_yx, np.bool_)
        for block in blocks:
            found[Window.cell(*block, BLOCK).intersect(frame).within(frame)] = True
        return found

    labels, _ = label((raster(folder / "mask.tif") == 1) & pixels_of(wanted))
    beside = binary_dilation(pixels_of(every - wanted))
    row, col = first_pixels(pa.array(sorted(names)))
    own = labels[row - ORIGIN[0], col - ORIGIN[1]]
    assert (own > 0).all()
    cut = np.isin(own, labels[beside])
    return dict(zip(sorted(names), cut.tolist(), strict=True))


# The district as the whole city would map it


@pytest.mark.parametrize("area", ["bounds", "crooked"])
def test_a_district_is_a_part_of_the_whole_city_and_the_whole_city_goes_on_from_it(whole: City, area: str) -> None:
    folder, trial = whole.folder, whole.folder / "trial"
    shape = shapely.box(*DISTRICT) if area == "bounds" else CROOKED
    write_area(folder / "area.gpkg", shape)
    override = bounds(*DISTRICT) if area == "bounds" else "grid.area=area.gpkg"
    published = map_it(whole.config, override, "output=trial")

    # What is computed is what lies within a halo of it, and what that sees.
    placed = shapely.transform(shape, lambda xy: xy + CORNER)
    every = units(folder / "run", "predict")
    boxes = {block: shapely.box(*np.array([block[1], block[0], block[1] + 1, block[0] + 1]) * BLOCK) for block in every}
    wanted = {block for block, box in boxes.items() if box.distance(placed) <= HALO + 1e-6}
    assert units(trial, "predict") == units(trial, "vectorize") == wanted
    assert len(wanted) < len(every)
    seen = {chunk for block in wanted for chunk in Window.cell(*block, BLOCK).pad(HALO).snap(STRIDE).cells(CHUNK)}
    assert units(trial, "read") == seen & units(folder / "run", "read")
    assert published.stages["predict"].units == len(wanted)

    # Buildings: those that meet it, each equal to the whole city's, or marked as cut.
    found, expected = buildings(trial), buildings(folder / "run")
    meet = {name for name, row in expected.items() if row.geometry.intersects(in_crs(shape))}
    assert len(meet) >= 3
    uncut = {name: row for name, row in found.items() if not row.cut}
    assert all(row.geometry.intersects(in_crs(shape)) for row in found.values())
    assert uncut == {name: expected[name] for name in uncut}
    assert {*uncut} <= meet
    for name in meet - {*uncut}:
        assert any(row.geometry.intersects(expected[name].geometry) for row in found.values() if row.cut), name
    assert not any(row.cut for row in expected.values())
    assert {name: row.cut for name, row in found.items()} == cut_by_pixels(folder / "run", wanted, every, {*found})

    # Rasters: the whole city's where it reaches, 255 elsewhere.
    frame = Window(*ORIGIN, HEIGHT, WIDTH)
    left, top, right, bottom = placed.bounds
    window = Window.between(int(np.floor(top)), int(np.floor(left)), int(np.ceil(bottom)), int(np.ceil(right)))
    pixels = shapely.box(
        *np.meshgrid(np.arange(window.col_off, window.col_stop), np.arange(window.row_off, window.row_stop)),
        *np.meshgrid(np.arange(window.col_off, window.col_stop) + 1, np.arange(window.row_off, window.row_stop) + 1),
    )
    covered = shapely.area(shapely.intersection(pixels, placed))
    for name in ("mask", "probability"):
        part, city = raster(trial / f"{name}.tif"), raster(folder / "run" / f"{name}.tif")[window.within(frame)]
        assert (part[covered > 0.01] == city[covered > 0.01]).all()
        assert (part[covered == 0] == 255).all()
        with rasterio.open(trial / f"{name}.tif") as dataset:
            assert dataset.bounds == pytest.approx(LATTICE.bounds(window), abs=1e-6)
    with Image.open(trial / "preview.png") as preview:
        assert preview.size == window.shape_yx[::-1]

    # The whole city from here: the same bytes, and nothing twice.
    map_it(whole.config, "output=trial")
    assert outputs(trial) == outputs(folder / "run")
    done = tasks_done(trial)
    kept = {it: count for it, count in done.items() if it[0] not in ("join", "publish")}
    assert {*kept} == {it for it in tasks_done(folder / "run") if it[0] not in ("join", "publish")}
    assert {*kept.values()} == {1}

    # And back: nothing but joining where it is cut, and publishing.
    before = tasks_done(trial)
    map_it(whole.config, override, "output=trial")
    assert set(stages_since(trial, before)) <= {"join", "publish"}
    assert buildings(trial) == found


def test_what_was_predicted_outside_with_other_weights_is_not_mixed_in(whole: City) -> None:
    folder = whole.folder
    overrides = [bounds(*DISTRICT), "vectorize.threshold=0.3", "vectorize.fill_holes_m2=100000"]
    other = folder / "other.safetensors"
    bundle = Path(load_city(whole.config).model)
    other.write_bytes(bundle.read_bytes().replace(b"not stated", b"all rights"))
    map_it(whole.config, *overrides, "model=other.safetensors")
    map_it(whole.config, *overrides, "model=other.safetensors", "output=other")
    assert outputs(folder / "run") == outputs(folder / "other")


def test_a_building_that_goes_on_into_what_is_not_predicted_is_marked_and_no_other_is(
    make_city: MakeCity, tmp_path: Path
) -> None:
    city = make_city(1, 2, tile_px=192, nodata=None, grid={"chunk_px": 64, "block_px": 64})
    image = np.full((3, 192, 384), 40, np.uint8)
    image[:, 10:30, 5:380] = 230
    image[:, 60:80, 20:110] = 230
    image[:, 100:120, 30:50] = 230
    image[:, 150:170, 300:340] = 230
    for number in range(2):
        part = image[:, :, number * 192 : number * 192 + 192]
        write_tile(tmp_path / "tiles" / f"tile{number + 1}.tif", part, ORIGIN[0], ORIGIN[1] + number * 192)
    published = map_it(city.config, bounds(0, 0, 60, 192))
    rows = sorted(buildings(tmp_path / "run").values(), key=lambda row: -row.geometry.bounds[3])
    assert [row.cut for row in rows] == [True, False, False]
    edge = in_crs(shapely.Point(60 + HALO, 0)).x
    assert rows[0].geometry.bounds[2] > edge, "whole as far as the halo reaches"
    assert published.buildings == 3
    map_it(city.config)
    assert [row.cut for row in buildings(tmp_path / "run").values()] == [False] * 4


def test_at_the_rim_of_the_tiles_nothing_is_cut(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 1, tile_px=128, nodata=None, grid={"chunk_px": 64, "block_px": 64})
    write_tile(tmp_path / "tiles" / "tile1.tif", np.full((3, 128, 128), 230, np.uint8), *ORIGIN)
    map_it(city.config, bounds(-50, -50, 300, 300))
    assert [row.cut for row in buildings(tmp_path / "run").values()] == [False]
    assert raster(tmp_path / "run" / "mask.tif").shape == (128, 128)


def test_beside_a_gap_in_the_imagery_a_district_is_mapped_as_the_whole_city_maps_it(
    make_city: MakeCity, tmp_path: Path
) -> None:
    city = make_city(1, 1, nodata=None, grid={"chunk_px": CHUNK, "block_px": 2 * BLOCK})
    # One village ends within a halo of a block's side, and in the next block there is nothing as far as a halo reaches.
    row, side = ORIGIN[0], ORIGIN[1] // (2 * BLOCK) * 2 * BLOCK
    (tmp_path / "tiles" / "tile1.tif").unlink()
    for name, col in (("west", side - 20 - TILE), ("east", side + HALO)):
        write_tile(tmp_path / "tiles" / f"{name}.tif", city.image_CHW[:, -TILE:, -TILE:], row, col)
    west = side - ORIGIN[1] - 20
    published = map_it(city.config, bounds(west - TILE, 0, west, TILE))
    assert published.buildings
    found = buildings(tmp_path / "run")
    map_it(city.config, "output=whole")
    edge = in_crs(shapely.Point(west, 0)).x
    every = buildings(tmp_path / "whole")
    assert found == {name: row for name, row in every.items() if row.geometry.bounds[0] < edge}


# Where it comes from


@pytest.fixture
def city(make_city: MakeCity) -> City:
    return make_city(2, 3, **SMALL)


def area_of(city: City, override: str) -> District:
    district = make_plan(load_city(city.config, [override])).area
    assert district is not None
    return district


@pytest.mark.parametrize(
    ("name", "crs"),
    [
        ("a.gpkg", "EPSG:32633"),
        ("a.gpkg", "EPSG:4326"),
        ("a.geojson", "EPSG:4326"),
        ("a.shp", "EPSG:3857"),
        ("a.fgb", "EPSG:3035"),
        ("a.gpkg", "EPSG:32634"),
    ],
)
def test_a_file_of_any_format_and_crs_is_the_same_area(city: City, name: str, crs: str) -> None:
    write_area(city.folder / name, CROOKED, crs=crs)
    expected = shapely.transform(CROOKED, lambda xy: xy + CORNER)
    found = area_of(city, f"grid.area={name}")
    assert shapely.symmetric_difference(found.geometry, expected).area < 1
    window = found.window
    left, top, right, bottom = expected.bounds
    assert (window.row_off, window.col_off) == (round(top), round(left))
    assert (window.row_stop, window.col_stop) == (round(bottom), round(right))


def test_polygons_of_a_file_are_one_area_without_what_else_is_in_it(city: City) -> None:
    path = city.folder / "mixed.gpkg"
    pieces = [shapely.box(10, 10, 50, 50), shapely.box(40, 40, 80, 80), shapely.box(200, 100, 230, 130)]
    bow = shapely.Polygon([(300, 200), (340, 240), (340, 200), (300, 240)])
    shapes = shapely.GeometryCollection([in_crs(bow), in_crs(shapely.Point(0, 0))])
    wkb = shapely.to_wkb(np.array([*map(in_crs, pieces), shapes, in_crs(shapely.Point(9, 9))], np.object_))
    points = shapely.to_wkb(np.array([shapely.Point(0, 0)]))
    pyogrio.raw.write(path, points, [], [], crs="EPSG:32633", geometry_type="Point", layer="points")
    pyogrio.raw.write(path, wkb, [], [], crs="EPSG:32633", geometry_type="Unknown", layer="parts")
    found = area_of(city, "grid.area=mixed.gpkg")
    assert found.geometry.area == pytest.approx(1600 + 1600 - 100 + 900 + 800)
    assert found.geometry.is_valid
    assert found.source == "mixed.gpkg, layer parts"


def test_a_long_straight_side_bends_with_the_crs(tmp_path: Path) -> None:
    lattice = Lattice(WKT, 1.0, 0.0, 0.0)
    box = shapely.box(15.2, 50.0, 15.6, 50.1)
    pyogrio.raw.write(
        tmp_path / "box.geojson", shapely.to_wkb(np.array([box])), [], [], crs="EPSG:4326", geometry_type="Polygon"
    )
    district = resolve_area(tmp_path / "box.geojson", lattice, [Window(-5_600_000, 500_000, 100_000, 100_000)])
    assert district is not None
    x, y = Transformer.from_crs(4326, 32633, always_xy=True).transform(15.4, 50.0)
    middle = shapely.Point(x, -y)
    assert district.geometry.boundary.distance(middle) < 0.05
    _, corner = Transformer.from_crs(4326, 32633, always_xy=True).transform(15.2, 50.0)
    assert abs(corner - y) > 10, "as a straight side it would be metres off"


def test_it_is_told_in_the_plan_and_the_manifest_with_its_ground_area(city: City) -> None:
    override = bounds(100, 100, 200, 150)
    rows = dict(describe(make_plan(load_city(city.config, [override]))))
    km2 = 100 * 50 * RESOLUTION**2 / 1e6
    assert rows["area"].startswith("bounds 499")
    assert "0.000 km2 on the ground, 100 x 50 px" in rows["area"]
    assert f"{WIDTH} x {HEIGHT} px in all" in rows["tiles"]
    map_it(city.config, override)
    told = json.loads((city.folder / "run" / "manifest.json").read_text())
    # At 0.08 m above the ellipsoid of UTM's rim, a square metre of the map is not quite one of the ground.
    assert told["area"]["ground_km2"] == pytest.approx(km2, rel=2e-3)
    assert told["counts"]["valid_px"] == 5000 - (raster(city.folder / "run" / "mask.tif") == 255).sum()
    assert "area" not in dict(describe(make_plan(load_city(city.config))))


def test_a_changed_file_is_noticed(city: City) -> None:
    path = write_area(city.folder / "a.gpkg", shapely.box(10, 10, 50, 50))
    map_it(city.config, "grid.area=a.gpkg")
    job = load_city(city.config, ["grid.area=a.gpkg"])
    assert nothing_changed(job) is not None
    assert nothing_changed(load_city(city.config)) is None
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE other (text TEXT)")
        assert nothing_changed(job) is None, "what is not yet in the file itself counts too"
    assert nothing_changed(job) is None
    write_area(path, shapely.box(10, 10, 60, 60))
    assert map_it(city.config, "grid.area=a.gpkg").valid_px == 2500 - 200, "less what the hole takes"
    assert raster(city.folder / "run" / "mask.tif").shape == (50, 50)
    assert nothing_changed(job) is not None


def test_the_resolved_yaml_means_the_same_area_in_any_folder(city: City, tmp_path: Path) -> None:
    write_area(city.folder / "a.gpkg", shapely.box(10, 10, 50, 50))
    map_it(city.config, "grid.area=a.gpkg")
    again = load_city(city.folder / "run" / "city.yaml")
    assert again.area == city.folder / "a.gpkg"


# What cannot be an area


def refusal(city: City, override: str) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(load_city(city.config, [override]))
    assert "\n" not in str(caught.value)
    assert not (city.folder / "run").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("area", "words"),
    [
        ("[3, 0, 2, 1]", ["xmin, xmax are 3, 2", "expected the first to be less"]),
        ("[0, 1, 2, 1]", ["ymin, ymax are 1, 1"]),
        ("[0, 0, 5, 5]", ["no tile lies there", "0, 0, 5, 5"]),
        ("[1, 2, 3]", ["grid.area", "[xmin, ymin, xmax, ymax]"]),
        ("[a, 2, 3, 4]", ["grid.area", "[xmin, ymin, xmax, ymax]"]),
        ("7", ["grid.area", "a vector file"]),
        ("not-there.gpkg", ["not-there.gpkg is not there"]),
        ("city.yaml", ["city.yaml cannot be read"]),
        ("tiles", ["tiles", "expected a vector file"]),
    ],
)
def test_what_is_no_area_is_refused_in_a_line(city: City, area: str, words: list[str]) -> None:
    message = refusal(city, f"grid.area={area}")
    assert all(word in message for word in words), message


def test_a_file_without_polygon_or_crs_or_far_away_is_refused(city: City) -> None:
    folder = city.folder
    lines = shapely.to_wkb(np.array([in_crs(shapely.LineString([(0, 0), (9, 9)]))]))
    pyogrio.raw.write(folder / "lines.gpkg", lines, [], [], crs="EPSG:32633", geometry_type="LineString")
    assert "lines.gpkg has no polygon" in refusal(city, "grid.area=lines.gpkg")
    with pytest.warns(UserWarning, match="crs"):
        write_area(folder / "bare.shp", CROOKED, crs=None)
    message = refusal(city, "grid.area=bare.shp")
    assert "no CRS" in message
    assert "ogr2ogr -a_srs" in message
    write_area(folder / "away.gpkg", shapely.box(5000, 0, 6000, 10), crs="EPSG:4326")
    message = refusal(city, "grid.area=away.gpkg")
    assert "away.gpkg" in message
    assert "no tile lies there" in message
    # It only touches the tiles' rim.
    assert "no tile lies there" in refusal(city, bounds(WIDTH, 0, WIDTH + 50, 50))


# Which pixels are inside

SIXTEENTHS = st.integers(-11_000, 11_000).map(lambda n: n / 16)
CORNERS = st.lists(st.tuples(SIXTEENTHS, SIXTEENTHS), min_size=3, max_size=7)


@settings(max_examples=40)
@given(CORNERS, st.integers(-700, 500), st.integers(-700, 500), st.integers(1, 300), st.integers(1, 300))
def test_a_pixel_is_inside_where_the_area_reaches_into_it_whatever_window_is_asked_for(
    corners: list[tuple[float, float]], row: int, col: int, height: int, width: int
) -> None:
    shape = shapely.make_valid(shapely.Polygon(corners))
    if shape.area < 1 or shape.geom_type not in ("Polygon", "MultiPolygon"):
        return
    district = District("drawn", shape)
    window = Window(row, col, height, width)
    found = district.inside(window)
    half = Window(row, col, height, width // 2)
    assert np.array_equal(district.inside(half), found[half.within(window)])
    rng = np.random.default_rng(0)
    rows, cols = rng.integers(row, row + height, 200), rng.integers(col, col + width, 200)
    pixels = shapely.box(cols, rows, cols + 1, rows + 1)
    share = shapely.area(shapely.intersection(pixels, shape))
    at = found[rows - row, cols - col]
    assert at[share > 0.05].all()
    assert not at[shapely.disjoint(pixels, shape)].any()


# Threads and processes


def test_a_district_is_sent_as_it_was_made_and_prepared_where_it_is_asked() -> None:
    district = District("drawn", shapely.Point(0, 0).buffer(1000))
    made, window = pickle.dumps(district), Window(0, 0, 8, 8)
    assert district.is_near(window, 0)
    assert district.inside(window).all()
    assert pickle.dumps(district) == made
    copy: District = pickle.loads(made)
    assert copy == district
    assert copy.is_near(window, 0)
    assert shapely.is_prepared(copy.geometry)


def test_a_prepared_geometry_is_asked_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, asked = threading.Lock(), []

    def watched(name: str) -> Callable[..., Any]:
        predicate = getattr(shapely, name)

        def ask(geometry: shapely.Geometry, *others: Any) -> Any:
            assert shapely.is_prepared(geometry)
            assert alone.acquire(blocking=False)
            asked.append(name)
            time.sleep(0.01)
            alone.release()
            return predicate(geometry, *others)

        return ask

    for name in ("contains", "dwithin", "intersects"):
        monkeypatch.setattr(shapely, name, watched(name))
    district, window = District("drawn", shapely.Point(0, 0).buffer(1000)), Window(0, 0, 8, 8)
    boxes = np.array([shapely.box(0, 0, 1, 1)])
    questions: list[Callable[[], Any]] = [
        lambda: district.is_near(window, 0),
        lambda: district.meets(boxes).all(),
        lambda: district.reaches_into(boxes).all(),
        lambda: district.inside(window).all(),
    ]
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda number: questions[number % 4](), range(16)))
    assert {*asked} == {"contains", "dwithin", "intersects"}
