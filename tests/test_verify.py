"""Laws of verify: a finished run passes, for any cut, area and setting, and each planted fault is found and named."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from conftest import City, FakePredictor, map_it
from numpy.typing import NDArray
from pyproj import CRS, Transformer

from segpipe.models.weights import file_digest
from segpipe.pipeline import network, verify
from segpipe.pipeline import run as run_module
from segpipe.pipeline.geopackage import rows_digest
from segpipe.pipeline.manifest import read_manifest
from segpipe.pipeline.verify import Claims, choose_strip, verify_quickly, verify_run
from segpipe.tasks.errors import RunError, UserError

MakeCity = Callable[..., City]


@pytest.fixture
def run(make_city: MakeCity, in_process: type[FakePredictor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the city, done once and copied."""
    city, first = make_city(), tmp_path_factory.getbasetemp() / "run-to-verify"
    if not first.exists():
        map_it(city.config)
        (city.folder / "run").rename(first)
    return Path(shutil.copytree(first, city.folder / "run"))


def difference(run: Path) -> str:
    """The message of the one difference that is found."""
    with pytest.raises(RunError) as caught:
        list(verify_run(run))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], **profile: Any) -> None:
    """Write a raster anew with other pixels, or another place."""
    with rasterio.open(path) as raster:
        pixels, kept = raster.read(1), raster.profile
    with rasterio.open(path, "w", **(kept | {"driver": "GTiff"} | profile)) as raster:
        raster.write(change(pixels), 1)


def flipped(pixels_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One pixel that is no building becomes one."""
    row, col = np.argwhere(pixels_HW == 0)[1000]
    changed = pixels_HW.copy()
    changed[row, col] = 1
    return changed


def claim(run: Path, **values: Any) -> None:
    """Change what the manifest says."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | values))


def covered_up(run: Path, name: str) -> None:
    """Make the digests of the manifest right again, so that another check has to find the fault."""
    manifest = json.loads((run / "manifest.json").read_text())
    if name.endswith(".gpkg"):
        claim(run, rows_digests={name: rows_digest(run / name)})
    else:
        claim(run, digests=manifest["digests"] | {name: file_digest(run / name)})


def sql(run: Path, *statements: str, values: tuple[Any, ...] = ()) -> None:
    """Change the footprints behind their back. Triggers of the spatial index want functions that SQLite lacks."""
    with closing(sqlite3.connect(run / "buildings.gpkg")) as database, database:
        triggers = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            database.execute(f'DROP TRIGGER "{name}"')
        for statement in statements:
            database.execute(statement, values if "?" in statement else ())
        for _, text in triggers:
            database.execute(text)


def move_polygon(run: Path, metres: float = 0.3) -> None:
    frame = pyogrio.read_dataframe(run / "buildings.gpkg", layer="buildings", fid_as_index=True)
    shape = shapely.affinity.translate(frame.geometry.iloc[7], metres)
    set_geometry(run, int(frame.index[7]), shape)


def set_geometry(run: Path, fid: int, shape: shapely.Polygon) -> None:
    with closing(sqlite3.connect(run / "buildings.gpkg")) as database:
        (old,) = database.execute("SELECT geom FROM buildings WHERE fid = ?", (fid,)).fetchone()
    # The header of a geometry with a bounding box is 40 bytes long; the box is moved along.
    bounds = np.array([shape.bounds[i] for i in (0, 2, 1, 3)], "<f8").tobytes()
    values = (old[:8] + bounds + shapely.to_wkb(shape, byte_order=1), fid)
    sql(run, "UPDATE buildings SET geom = ? WHERE fid = ?", values=values)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grid": {"chunk_px": 64, "block_px": 192}},
        {"grid": {"chunk_px": 1024, "block_px": 1024}},
        {"store": {"keep": "none"}},
        {"store": {"keep": "probability"}},
        {"vectorize": {"min_area_m2": 30, "fill_holes_m2": 20, "simplify_m": 0}},
        {"publish": {"tile_masks": True}},
        {"vectorize": {"min_area_m2": 2, "regularize": "orthogonal"}},
        {"outputs": {"formats": ["geoparquet", "flatgeobuf", "filegdb", "geojson"], "crs": "EPSG:4326"}},
    ],
)
def test_a_finished_run_passes_whatever_its_settings(
    make_city: MakeCity, in_process: type[FakePredictor], settings: dict[str, Any]
) -> None:
    city = make_city(**settings)
    map_it(city.config)
    found = dict(verify_run(city.folder / "run"))
    assert [*found] == ["files", "rasters", "pixels", "store", "rows", "areas", "strip"]
    assert (found["store"] == "not kept") == (settings.get("store") == {"keep": "none"})


def test_a_run_of_an_area_passes_and_so_does_the_city_that_goes_on_from_it(
    make_city: MakeCity, in_process: type[FakePredictor]
) -> None:
    city = make_city(grid={"chunk_px": 64, "block_px": 128})
    x, y = 0.1 + 1_666_500 * 0.3, 0.1 + 17_666_700 * 0.3
    area = [x + 31.3, y - 140.2, x + 120.4, y - 60.9]
    map_it(city.set(grid={"chunk_px": 64, "block_px": 128, "area": area}))
    for _ in range(5):
        list(verify_run(city.folder / "run"))
    map_it(city.config)
    list(verify_run(city.folder / "run"))


@pytest.mark.parametrize("code", [3067, 3179, 3879, 5110, 25832, 2180, 28992])
def test_a_run_in_any_national_crs_passes_and_its_tiles_are_copied_be_it_asked_for_or_found(
    make_city: MakeCity, in_process: type[FakePredictor], code: int
) -> None:
    """GDAL and pyproj come with lists of different years: what one calls EUREF-FIN the other calls ETRS89."""
    city = make_city(1, 1, tile_px=96, nodata=None, grid={"chunk_px": 64, "block_px": 64})
    area = CRS.from_epsg(code).area_of_use
    assert area is not None
    to_crs = Transformer.from_crs(4326, code, always_xy=True)
    x, y = to_crs.transform((area.west + area.east) / 2, (area.south + area.north) / 2)
    with rasterio.open(city.folder / "tiles" / "tile1.tif", "r+") as tile:
        tile.crs, tile.transform = f"EPSG:{code}", Affine(0.3, 0, x, 0, -0.3, y)
    for output, overrides in {"found": (), "asked": (f"grid.crs=EPSG:{code}",)}.items():
        map_it(city.config, f"output={output}", *overrides)
        run = city.folder / output
        list(verify_run(run))
        manifest = read_manifest(run)
        assert manifest is not None
        assert [tile["warped"] for tile in manifest["tiles"]] == [None]
        assert manifest["bounds"]["height"] == manifest["bounds"]["width"] == 96
        assert pyogrio.read_info(run / "buildings.gpkg", layer="buildings")["crs"] == f"EPSG:{code}"


def test_looking_at_a_run_in_a_gis_changes_nothing_that_is_proved(run: Path) -> None:
    """What QGIS does on opening: it writes statistics beside rasters, and touches the GeoPackage."""
    with rasterio.open(run / "probability.tif") as raster:
        raster.statistics(1)
    (run / "mask.tif.aux.xml").write_text("<PAMDataset/>")
    with closing(sqlite3.connect(run / "buildings.gpkg")) as database, database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE qgis_projects (name TEXT)")
    list(verify_run(run))


def test_any_strip_of_a_city_passes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(run)
    assert manifest is not None
    monkeypatch.setattr(verify, "STRIP_PX", (60, 300))
    windows = [choose_strip(Claims(run, manifest), np.random.default_rng(seed)) for seed in range(40)]
    block_px = manifest["recipe"]["block_px"]
    for window in windows:
        rows, cols = range(window.row_off + 1, window.row_stop), range(window.col_off + 1, window.col_stop)
        assert any(row % block_px == 0 for row in rows) or any(col % block_px == 0 for col in cols), "across a seam"
        assert sorted(window.shape_yx) == [60, 300], "as large as the city allows"
    assert len(set(windows)) > 20
    for _ in range(20):
        verify_quickly(run, manifest)


def move_a_polygon(run: Path) -> None:
    move_polygon(run)


def delete_a_chunk(run: Path) -> None:
    sorted((run / "store.zarr" / "probability" / "c").rglob("*"))[-1].unlink()


def flip_a_pixel(run: Path) -> None:
    rewrite(run / "mask.tif", flipped)


def change_a_byte(run: Path) -> None:
    data = bytearray((run / "probability.tif").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "probability.tif").write_bytes(bytes(data))


def delete_a_building(run: Path) -> None:
    sql(run, "DELETE FROM buildings WHERE fid = 5")


def double_a_building(run: Path) -> None:
    columns = "building_id, area_m2, pixels, confidence, cut, geom"
    sql(run, f"INSERT INTO buildings ({columns}) SELECT {columns} FROM buildings WHERE fid = 5")


def change_an_attribute(run: Path) -> None:
    sql(run, "UPDATE buildings SET confidence = confidence - 0.01 WHERE fid = 5")


def damage_a_chunk(run: Path) -> None:
    path = max(
        (path for path in (run / "store.zarr" / "valid" / "c").rglob("*") if path.is_file()),
        key=lambda p: p.stat().st_size,
    )
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(bytes(data))


def delete_a_file(run: Path) -> None:
    (run / "preview.png").unlink()


def forget_a_block(run: Path) -> None:
    sorted((run / "ledger" / "predict").glob("*.json"))[0].unlink()


def claim_other_pixels(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    claim(run, counts=manifest["counts"] | {"valid_px": manifest["counts"]["valid_px"] - 1})


FAULTS = {
    move_a_polygon: "digest of the rows of buildings.gpkg",
    delete_a_chunk: "of probability is missing",
    flip_a_pixel: "digest of mask.tif",
    change_a_byte: "digest of probability.tif",
    delete_a_building: "digest of the rows of buildings.gpkg",
    double_a_building: "digest of the rows of buildings.gpkg",
    change_an_attribute: "digest of the rows of buildings.gpkg",
    damage_a_chunk: "of valid is damaged",
    delete_a_file: "preview.png: is missing",
    forget_a_block: "ledger of block",
    claim_other_pixels: "valid pixels",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_and_named(run: Path, plant: Callable[[Path], None]) -> None:
    plant(run)
    assert FAULTS[plant] in difference(run)


class OtherPredictor(FakePredictor):
    """A network that finds something else."""

    def predict(self, *window: Any, **options: Any) -> NDArray[np.uint8]:
        prob_HW = super().predict(*window, **options)
        return np.where(prob_HW == 255, prob_HW, 250 - prob_HW)


OTHER_GRID = {"chunk_px": 128, "block_px": 128}
COARSER = {"chunk_px": 64, "block_px": 128, "resolution_m": 0.6}


@pytest.mark.parametrize(
    ("change", "tasks", "looked_at"),
    [
        ({"predict": {"tta": "d4"}}, 0, True),
        ({"predict": {"tta": "d4"}}, 3, False),
        ({"grid": OTHER_GRID}, 0, False),
        ({"grid": OTHER_GRID}, 12, False),
        ({"grid": COARSER}, 0, False),
        ({"nodata": 30}, 6, False),
        ({"vectorize": {"min_area_m2": 9}}, 3, True),
    ],
)
def test_what_is_published_passes_after_a_later_run_was_stopped(
    make_city: MakeCity, killed_after: Callable[[Path, int], bool], monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any], tasks: int, looked_at: bool,
) -> None:  # fmt: skip
    city = make_city(1, 2, tile_px=160, grid={"chunk_px": 64, "block_px": 128})
    map_it(city.config)
    whole = dict(verify_run(city.folder / "run"))
    monkeypatch.setattr(network, "load_predictor", lambda plan: OtherPredictor())
    assert killed_after(city.set(**change), tasks)
    store = whole["store"] if looked_at else "not looked at: a later run has begun in the store"
    found = dict(verify_run(city.folder / "run"))
    assert found | {"strip": ""} == whole | {"strip": "", "store": store}


def test_a_sum_of_areas_passes_to_the_last_digits_that_are_kept_of_it(run: Path) -> None:
    areas = pyogrio.read_dataframe(run / "buildings.gpkg", layer="buildings", columns=["area_m2"])["area_m2"]
    # A sum of .x5 that is rounded to a decimal, from floats that differ in their last bits.
    sql(run, "UPDATE buildings SET area_m2 = area_m2 + ? WHERE fid = 4", values=(3705950.4499999993 - areas.sum(),))
    covered_up(run, "buildings.gpkg")
    counts = json.loads((run / "manifest.json").read_text())["counts"]
    claim(run, counts=counts | {"buildings_m2": 3705950.45})
    list(verify_run(run))
    claim(run, counts=counts | {"buildings_m2": 3705950.47})
    assert "sum of area_m2: found 3705950.450; expected 3705950.47" in difference(run)


def moved_raster(run: Path) -> str:
    rewrite(run / "mask.tif", lambda it: it, transform=Affine(0.3, 0, 0, 0, -0.3, 0))
    return "mask.tif"


def other_crs(run: Path) -> str:
    rewrite(run / "probability.tif", lambda it: it, crs="EPSG:32634")
    return "probability.tif"


def flipped_pixel(run: Path) -> str:
    flip_a_pixel(run)
    return "mask.tif"


def other_probability(run: Path) -> str:
    def lower(pixels_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
        row, col = np.argwhere((pixels_HW > 0) & (pixels_HW < 90))[500]
        changed = pixels_HW.copy()
        changed[row, col] -= 1
        return changed

    rewrite(run / "probability.tif", lower)
    return "probability.tif"


def moved_polygon(run: Path) -> str:
    frame = pyogrio.read_dataframe(run / "buildings.gpkg", layer="buildings", fid_as_index=True)
    for fid, shape in frame.geometry.items():
        set_geometry(run, int(fid), shapely.affinity.translate(shape, 0.3))
    return "buildings.gpkg"


def crossed_polygon(run: Path) -> str:
    frame = pyogrio.read_dataframe(run / "buildings.gpkg", layer="buildings", fid_as_index=True)
    xmin, ymin, xmax, ymax = frame.geometry.iloc[3].bounds
    bow = shapely.Polygon([(xmin, ymin), (xmax, ymax), (xmax, ymin), (xmin, ymax)])
    set_geometry(run, int(frame.index[3]), bow)
    return "buildings.gpkg"


def other_pixels(run: Path) -> str:
    sql(run, "UPDATE buildings SET pixels = pixels + 1 WHERE fid = 4")
    return "buildings.gpkg"


def other_id(run: Path) -> str:
    sql(run, "UPDATE buildings SET building_id = 'N1E1' WHERE fid = 4")
    return "buildings.gpkg"


def other_area(run: Path) -> str:
    sql(run, "UPDATE buildings SET area_m2 = area_m2 + 9 WHERE fid = 4")
    return "buildings.gpkg"


COVERED = {
    moved_raster: "mask.tif: at (",
    other_crs: "CRS of probability.tif",
    flipped_pixel: "expected 0, the threshold being",
    other_probability: "in probability.tif",
    moved_polygon: "another outline",
    crossed_polygon: "no valid polygon",
    other_pixels: "pixels of building",
    other_id: "building N1E1: no region of the mask",
    other_area: "sum of area_m2",
}


@pytest.mark.parametrize("plant", COVERED, ids=lambda plant: plant.__name__)
def test_a_fault_is_found_from_the_outputs_themselves_where_its_digest_was_made_right(
    run: Path, plant: Callable[[Path], str]
) -> None:
    covered_up(run, plant(run))
    assert COVERED[plant] in difference(run)


def test_a_run_that_does_not_prove_itself_ends_with_the_difference_and_counts_as_not_done(
    make_city: MakeCity, in_process: type[FakePredictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city()

    def broken(*_: Any) -> Any:
        raise RunError("building N1E1 has another outline")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "verify_quickly", broken)
        with pytest.raises(RunError, match="another outline"):
            map_it(city.config)
    assert read_manifest(city.folder / "run") is None
    map_it(city.config)
    list(verify_run(city.folder / "run"))


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest of a finished run"):
        list(verify_run(tmp_path))
