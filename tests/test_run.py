"""The laws, on tiny cities mapped in this process with a network that looks 10 px far."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.features
import shapely
import yaml
from affine import Affine
from conftest import (
    ORIGIN,
    RESOLUTION,
    STRIDE,
    City,
    FakePredictor,
    draw_blobs,
    map_it,
    outputs,
    raster,
    stages_since,
    tasks_done,
    write_city,
    write_tile,
)
from numpy.typing import NDArray

from segpipe.pipeline import flow, network, publish, rasters, run, run_rasters, stages
from segpipe.pipeline.config import load_city
from segpipe.pipeline.ledger import Ledger
from segpipe.pipeline.manifest import nothing_changed
from segpipe.pipeline.plan import make_plan
from segpipe.pipeline.store import Store
from segpipe.tasks.errors import RunError, TileError, UserError
from segpipe.tasks.grid import Window

MakeCity = Callable[..., City]
Kill = Callable[[Path, int], bool]

pytestmark = pytest.mark.usefixtures("in_process")

TILE = 144
SMALL: dict[str, Any] = {"tile_px": TILE, "grid": {"chunk_px": 64, "block_px": 128}, "nodata_min_m2": 50}


@pytest.fixture
def city(make_city: MakeCity) -> City:
    return make_city(**SMALL)


@pytest.fixture
def mapped(tmp_path_factory: pytest.TempPathFactory, bundle: Path, in_process: type[FakePredictor]) -> City:
    """The same city with a finished run, as it was before the last test had it."""
    folder = tmp_path_factory.getbasetemp() / "mapped"
    pristine = folder.with_name("mapped-pristine")
    if not pristine.exists():
        map_it(write_city(folder, bundle, **SMALL).config)
        shutil.copytree(folder, pristine)
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)
    image = draw_blobs(2 * TILE, 2 * TILE)
    image[:, 40:160, 50:200] = 0
    return City(folder / "city.yaml", image)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def touch(path: Path) -> None:
    """The same bytes at another time."""
    path.write_bytes(path.read_bytes())


# Law 1: one city, not a heap of tiles. Law 2: the answer does not depend on the cut.


@pytest.mark.parametrize(("chunk_px", "block_px"), [(64, 64), (64, 192), (128, 256), (96, 96), (512, 1024)])
def test_any_chunk_and_block_size_gives_the_same_bytes(mapped: City, chunk_px: int, block_px: int) -> None:
    map_it(mapped.config, f"grid.chunk_px={chunk_px}", f"grid.block_px={block_px}", "output=other")
    folder = mapped.folder
    assert outputs(folder / "other") == outputs(folder / "run")
    assert pyogrio.read_info(folder / "run" / "buildings.gpkg")["features"] > 10


def test_blocks_equal_one_forward_pass_over_the_grid_in_a_margin_of_fill(mapped: City) -> None:
    found = raster(mapped.folder / "run" / "probability.tif")
    height, width = mapped.image_CHW.shape[1:]
    bounds = Window(*ORIGIN, height, width)
    grid = bounds.pad(32).snap(STRIDE)
    image = np.zeros((3, *grid.shape_yx), np.uint8)
    valid = np.zeros(grid.shape_yx, np.bool_)
    image[(..., *bounds.within(grid))] = mapped.image_CHW
    valid[bounds.within(grid)] = (mapped.image_CHW != 0).any(axis=0)
    assert np.array_equal(found, FakePredictor().predict(image, valid)[bounds.within(grid)])


def test_any_tiling_of_the_same_pixels_gives_the_same_bytes(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(**SMALL)
    map_it(city.config)
    for row, height in ((0, 100), (100, 2 * TILE - 100)):
        for col, width in ((0, 250), (250, 2 * TILE - 250)):
            part = city.image_CHW[:, row : row + height, col : col + width]
            write_tile(tmp_path / "cut" / f"{row} {col}.tif", part, ORIGIN[0] + row, ORIGIN[1] + col)
    map_it(city.config, "images=cut", "output=other")
    assert outputs(tmp_path / "other", tiles=False) == outputs(tmp_path / "run", tiles=False)


def test_a_building_on_the_edge_of_two_tiles_is_one_polygon(make_city: MakeCity) -> None:
    city = make_city(1, 2, tile_px=128, nodata=None, grid={"chunk_px": 64, "block_px": 64})
    dark = np.full((3, 128, 256), 40, np.uint8)
    dark[:, 50:80, 108:148] = 230
    for number, part in enumerate((dark[:, :, :128], dark[:, :, 128:]), 1):
        write_tile(city.folder / "tiles" / f"tile{number}.tif", part, ORIGIN[0], ORIGIN[1] + (number - 1) * 128)
    map_it(city.config)
    _, _, geometries, _ = pyogrio.raw.read(city.folder / "run" / "buildings.gpkg")
    (building,) = shapely.from_wkb(geometries)
    seam = 0.1 + (ORIGIN[1] + 128) * 0.3
    assert building.bounds[0] < seam - 2
    assert building.bounds[2] > seam + 2


def test_the_later_tile_wins_where_it_is_valid(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 1, **SMALL | {"tile_px": 128})
    first = np.full((3, 128, 128), 100, np.uint8)
    second = np.full((3, 128, 128), 200, np.uint8)
    second[:, :, :70] = 0
    write_tile(tmp_path / "over" / "a.tif", first, *ORIGIN)
    write_tile(tmp_path / "over" / "b.tif", second, ORIGIN[0], ORIGIN[1] + 32)
    map_it(city.config, "images=over")
    plan = make_plan(load_city(city.config, ["images=over"]))
    found = Store(tmp_path / "run").read("image", plan.bounds, 0)[0]
    expected = np.concatenate([np.full((128, 102), 100), np.full((128, 58), 200)], axis=1)
    assert np.array_equal(found, expected)
    map_it(city.config, "images=[over/b.tif, over/a.tif]")
    found = Store(tmp_path / "run").read("image", plan.bounds, 0)[0]
    assert np.array_equal(found, np.where(np.arange(160) < 128, 100, 200)[None].repeat(128, 0))


def test_a_city_with_no_buildings_is_an_empty_layer_that_opens(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 1, **SMALL)
    write_tile(tmp_path / "tiles" / "tile1.tif", np.full((3, TILE, TILE), 60, np.uint8), *ORIGIN)
    assert map_it(city.config).buildings == 0
    info = pyogrio.read_info(tmp_path / "run" / "buildings.gpkg", layer="buildings")
    assert (info["features"], info["geometry_type"]) == (0, "Polygon")
    assert not raster(tmp_path / "run" / "mask.tif").any()
    assert nothing_changed(load_city(city.config)) is not None


def test_of_a_sparse_city_only_what_lies_under_tiles_exists(
    make_city: MakeCity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cells of the order of publishing that hold no block at all come in between.
    monkeypatch.setattr(publish, "ORDER_CELL_PX", 256)
    city = make_city(1, 1, **SMALL)
    write_tile(tmp_path / "tiles" / "tile2.tif", draw_blobs(TILE, TILE, 1), ORIGIN[0] + 900, ORIGIN[1] + 1300)
    map_it(city.config)
    files = [p for p in (tmp_path / "run" / "store.zarr" / "valid" / "c").rglob("*") if p.is_file()]
    plan = make_plan(load_city(city.config))
    under = {cell for tile in plan.tiles for cell in tile.window.cells(64)}
    assert len(files) == len(under) <= 2 * 16
    assert set(plan.chunks()) == under
    map_it(city.config, "grid.block_px=512", "grid.chunk_px=128", "output=other")
    assert outputs(tmp_path / "other") == outputs(tmp_path / "run")


# Law 7: nodata


def test_no_building_holds_an_invalid_pixel_and_each_has_its_pixels(city: City) -> None:
    map_it(city.config, "vectorize.simplify_m=0", "vectorize.min_area_m2=0", "vectorize.fill_holes_m2=0")
    folder = city.folder / "run"
    with rasterio.open(folder / "mask.tif") as dataset:
        mask, transform = dataset.read(1), dataset.transform
    columns = ["building_id", "area_m2", "pixels", "confidence"]
    _, _, wkb, (ids, areas, pixels, confidence) = pyogrio.raw.read(folder / "buildings.gpkg", columns=columns)
    burnt = rasterio.features.rasterize(
        zip(shapely.from_wkb(wkb), range(1, len(wkb) + 1), strict=True), mask.shape, transform=transform, dtype="int32"
    )
    assert np.array_equal(burnt > 0, mask == 1)
    assert (mask[40:160, 50:200] == 255).all()
    assert np.array_equal(np.bincount(burnt.ravel())[1:], pixels)
    assert areas.sum() == pytest.approx((mask == 1).sum() * 0.09, rel=2e-3)
    prob = raster(folder / "probability.tif")
    mean = np.bincount(burnt.ravel(), prob.ravel())[1:] / pixels / 250
    assert confidence == pytest.approx(mean, abs=5.1e-5)
    assert len(set(ids)) == len(ids)


def masked_tile(path: Path, image: np.ndarray, mask: np.ndarray, row: int, col: int) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_tile(path, image, row, col)
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(mask)


@pytest.fixture
def masked(make_city: MakeCity, tmp_path: Path) -> tuple[City, np.ndarray]:
    """A city of one tile, of which a mask band leaves a crooked part."""
    city = make_city(1, 1, tile_px=260, nodata=None, grid={"chunk_px": 64, "block_px": 128})
    rows, cols = np.mgrid[:260, :260]
    mask = (rows > 60) & (rows < 233) & (cols > 77) & (cols < 219) & ((rows - 150) ** 2 + (cols - 150) ** 2 > 500)
    masked_tile(tmp_path / "tiles" / "tile1.tif", city.image_CHW, mask, *ORIGIN)
    return city, mask


def test_what_lies_under_nodata_never_matters(masked: tuple[City, np.ndarray], tmp_path: Path) -> None:
    city, mask = masked
    map_it(city.config)
    noise = np.random.default_rng(5).integers(0, 255, city.image_CHW.shape).astype(np.uint8)
    masked_tile(tmp_path / "noisy" / "tile.tif", np.where(mask, city.image_CHW, noise), mask, *ORIGIN)
    map_it(city.config, "images=noisy", "output=other")
    assert outputs(tmp_path / "other", tiles=False) == outputs(tmp_path / "run", tiles=False)


def test_cropping_to_any_rectangle_of_all_valid_pixels_changes_nothing(
    masked: tuple[City, np.ndarray], tmp_path: Path
) -> None:
    city, mask = masked
    map_it(city.config)
    whole = tmp_path / "run"
    for number, (top, left, bottom, right) in enumerate(((61, 78, 233, 219), (13, 64, 260, 220), (37, 1, 240, 259))):
        folder = tmp_path / f"crop{number}"
        part = np.s_[top:bottom, left:right]
        masked_tile(folder / "tile.tif", city.image_CHW[:, *part], mask[part], ORIGIN[0] + top, ORIGIN[1] + left)
        map_it(city.config, f"images={folder}", f"output={folder}/run")
        found, expected = outputs(folder / "run", tiles=False), outputs(whole, tiles=False)
        assert found["rows"] == expected["rows"]
        for name in ("mask", "probability"):
            assert np.array_equal(raster(folder / "run" / f"{name}.tif"), raster(whole / f"{name}.tif")[part])


def test_a_block_without_a_valid_pixel_is_not_predicted(make_city: MakeCity, in_process: type[FakePredictor]) -> None:
    city = make_city(1, 1, tile_px=384, grid={"chunk_px": 128, "block_px": 128})
    city.image_CHW[:, :, 190:] = 0
    write_tile(city.folder / "tiles" / "tile1.tif", city.image_CHW, *ORIGIN)
    map_it(city.config)
    cells = list(make_plan(load_city(city.config)).blocks())
    valid = raster(city.folder / "run" / "probability.tif") != 255
    frame = Window(*ORIGIN, 384, 384)
    with_valid = [c for c in cells if valid[Window.cell(*c, 128).intersect(frame).within(frame)].any()]
    assert in_process.calls == len(with_valid) < len(cells)


# Law 5: killed anywhere, run again


def test_killed_anywhere_it_goes_on_and_does_nothing_twice(city: City, killed_after: Kill) -> None:
    folder = city.folder
    map_it(city.config, "output=whole")
    whole = tasks_done(folder / "whole")
    total = sum(whole.values())
    joins = sum(1 for stage, _ in whole if stage == "join")
    assert joins >= 3
    moments = [1, 20, total - joins - 5, total - 3]
    for moment in moments:
        shutil.rmtree(folder / "run", ignore_errors=True)
        assert killed_after(city.config, moment)
        assert killed_after(city.config, 1)
        map_it(city.config)
        assert outputs(folder / "run") == outputs(folder / "whole"), moment
        assert tasks_done(folder / "run") == whole, moment


def test_outputs_of_a_run_killed_while_publishing_are_not_taken_for_the_last_ones(
    mapped: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(mapped.folder / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run.publish, "place_geopackage", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            map_it(mapped.config, "vectorize.threshold=0.3")
    assert nothing_changed(load_city(mapped.config)) is None
    map_it(mapped.config)
    assert outputs(mapped.folder / "run") == expected


@pytest.mark.parametrize(
    ("module", "step"),
    [(run.publish, "write_geopackage"), (run_rasters, "write_cog"), (run.publish, "place_geopackage")],
)
def test_killed_while_publishing_it_only_publishes_again(
    city: City, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    folder = city.folder / "run"
    with monkeypatch.context() as patch:
        publish = getattr(module, step)

        def killed(*arguments: Any, **options: Any) -> Any:
            publish(*arguments, **options)
            raise KeyboardInterrupt

        patch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            map_it(city.config)
    before = tasks_done(folder)
    assert map_it(city.config).geopackage.name == "buildings.gpkg"
    assert stages_since(folder, before) == {"publish": 1}
    map_it(city.config, "output=whole")
    assert outputs(folder) == outputs(folder.with_name("whole"))
    assert not list(folder.rglob("*partial*"))
    assert not (folder / "buildings-2.gpkg").exists()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("probability", "_add_overviews"),
        ("probability", "_check_cog"),
        ("mask", "_write_flat"),
        ("mask", "_add_overviews"),
    ],
)
def test_a_stop_while_footprints_are_written_gives_the_rasters_up_at_the_end_of_their_step(
    city: City, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    folder, reached, stopped = city.folder / "run", threading.Event(), threading.Event()
    with monkeypatch.context() as patch:
        whole_step, whole_close = getattr(rasters, step), run_rasters.Rasters.close

        def do_step(path: Path, *arguments: Any) -> Any:
            if path.name.startswith(name):
                reached.set()
                assert stopped.wait(60)
            return whole_step(path, *arguments)

        def close(it: run_rasters.Rasters) -> None:
            it._given_up.set()
            stopped.set()
            whole_close(it)

        def stop(*_: Any) -> None:
            assert reached.wait(60)
            raise KeyboardInterrupt

        patch.setattr(rasters, step, do_step)
        patch.setattr(run_rasters.Rasters, "close", close)
        patch.setattr(run.publish, "write_geopackage", stop)
        with pytest.raises(KeyboardInterrupt):
            map_it(city.config)
    assert stopped.is_set()
    assert not (folder / f"{name}.tif").exists()
    assert not list(folder.rglob("*partial*"))
    assert not [it.name for it in threading.enumerate() if it.name.startswith("rasters")]


def test_what_was_published_stays_until_all_buildings_are_joined(mapped: City, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = mapped.folder / "run", threading.Event()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in {".tif", ".gpkg", ".html"}}
    with monkeypatch.context() as patch:
        counted = run_rasters.Counts.with_part

        def count(*arguments: Any) -> run_rasters.Counts:
            read.set()
            return counted(*arguments)

        def join(*_: Any) -> Any:
            assert read.wait(60), "rasters begin beside the joins"
            raise RunError("joining failed")

        patch.setattr(run_rasters.Counts, "with_part", count)
        patch.setattr(run, "run_joins", join)
        with pytest.raises(RunError, match="joining failed"):
            map_it(mapped.config, "vectorize.threshold=0.6")
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert nothing_changed(load_city(mapped.config)) is not None
    assert not list(folder.rglob("*partial*"))


def test_once_a_raster_is_replaced_no_run_finds_that_nothing_has_changed(
    mapped: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        write_cog = run_rasters.write_cog

        def stop(*arguments: Any, **options: Any) -> None:
            write_cog(*arguments, **options)
            assert nothing_changed(load_city(mapped.config)) is None
            raise KeyboardInterrupt

        patch.setattr(run_rasters, "write_cog", stop)
        with pytest.raises(KeyboardInterrupt):
            map_it(mapped.config, "vectorize.threshold=0.6")


@pytest.mark.parametrize("name", ["probability.tif", "mask.tif"])
def test_a_raster_that_cannot_be_written_fails_the_run_and_its_footprints_are_not_placed(
    city: City, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_cog = run_rasters.write_cog

    def write(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == name:
            raise RunError(f"{path}: cannot be written")
        write_cog(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_rasters, "write_cog", write)
        with pytest.raises(RunError, match=rf"{name}: cannot be written"):
            map_it(city.config)
    assert not (city.folder / "run" / "buildings.gpkg").exists()
    assert not list(city.folder.rglob("*partial*")), "they would keep a full disk full"
    assert map_it(city.config).geopackage.name == "buildings.gpkg"


@pytest.mark.parametrize(
    ("step", "error"),
    [("write_tile_masks", RunError), ("write_changes", RunError), ("place_geopackage", KeyboardInterrupt)],
)
def test_what_fails_after_footprints_are_written_leaves_none_beside(
    city: City, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    folder = city.folder / "run"

    def fail(*_: Any) -> None:
        assert list(folder.glob("buildings.partial*"))
        raise error("the disk is full")

    monkeypatch.setattr(run.publish, step, fail)
    with pytest.raises(error, match="the disk is full"):
        map_it(city.config)
    assert not list(folder.rglob("*partial*"))


def test_a_second_run_computes_nothing_and_imports_neither_torch_nor_dask(mapped: City) -> None:
    assert nothing_changed(load_city(mapped.config)) is not None
    code = (
        "import sys; from segpipe.pipeline.cli import main; main(['run', sys.argv[1]], standalone_mode=False)\n"
        "heavy = {'torch', 'distributed', 'dask', 'rasterio', 'zarr'} & set(sys.modules); assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code, str(mapped.config)], capture_output=True, text=True, check=True)
    assert "nothing to do" in found.stdout


@pytest.mark.parametrize("name", ["buildings.gpkg", "mask.tif", "preview.png"])
def test_a_missing_output_is_published_again_and_nothing_else_is_done(mapped: City, name: str) -> None:
    folder = mapped.folder / "run"
    before, expected = tasks_done(folder), outputs(folder)
    (folder / name).unlink()
    assert nothing_changed(load_city(mapped.config)) is None
    map_it(mapped.config)
    assert stages_since(folder, before) == {"publish": 1}
    assert outputs(folder) == expected


def test_a_new_threshold_redoes_the_vectors_only(mapped: City) -> None:
    folder = mapped.folder / "run"
    before = tasks_done(folder)
    map_it(mapped.config, "vectorize.threshold=0.3")
    done = stages_since(folder, before)
    assert set(done) == {"vectorize", "join", "publish"}
    assert done["vectorize"] == sum(1 for stage, _ in before if stage == "vectorize")
    map_it(mapped.config, "vectorize.threshold=0.3", "output=other")
    assert outputs(folder) == outputs(folder.with_name("other"))


def test_another_recipe_or_other_weights_redo_predict_and_later(city: City, bundle: Path) -> None:
    folder = city.folder / "run"
    map_it(city.config, "cluster.threads=1", "predict.precision=float32")
    before = tasks_done(folder)
    map_it(city.config, "cluster.threads=2", "predict.precision=float32")
    assert set(stages_since(folder, before)) >= {"predict", "vectorize", "join", "publish"}
    assert not {"scan", "read"} & set(stages_since(folder, before))
    other = city.folder / "other.safetensors"
    other.write_bytes(bundle.read_bytes().replace(b"not stated", b"all rights"))
    before = tasks_done(folder)
    map_it(city.config, "cluster.threads=2", "predict.precision=float32", "model=other.safetensors")
    assert stages_since(folder, before)["predict"] == sum(1 for stage, _ in before if stage == "predict")


def test_a_touched_tile_costs_a_digest_and_nothing_more(mapped: City) -> None:
    folder = mapped.folder / "run"
    before, expected = tasks_done(folder), outputs(folder)
    touch(mapped.folder / "tiles" / "tile2.tif")
    assert nothing_changed(load_city(mapped.config)) is None
    map_it(mapped.config)
    assert stages_since(folder, before) == {"scan": 1, "publish": 1}
    assert outputs(folder) == expected
    assert nothing_changed(load_city(mapped.config)) is not None


def expected_units(config: Path, tile: int) -> tuple[set[str], set[str]]:
    """Chunks that a tile touches, and blocks that see one of them."""
    plan = make_plan(load_city(config))
    chunks = {f"{r}_{c}" for r, c in plan.tiles[tile].window.cells(plan.chunk_px)}
    blocks = {
        f"{r}_{c}"
        for r, c in plan.blocks()
        if chunks & {f"{i}_{j}" for i, j in plan.core(r, c).pad(plan.recipe.halo_px).cells(plan.chunk_px)}
    }
    return chunks, blocks


def test_a_changed_tile_redoes_its_chunks_and_the_blocks_that_see_them(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(2, 3, **SMALL)
    folder = tmp_path / "run"
    map_it(city.config)
    before = tasks_done(folder)
    write_tile(tmp_path / "tiles" / "tile6.tif", draw_blobs(TILE, TILE, 9), ORIGIN[0] + TILE, ORIGIN[1] + 2 * TILE)
    map_it(city.config)
    done = set(tasks_done(folder) - before)
    chunks, blocks = expected_units(city.config, 5)
    assert {unit for stage, unit in done if stage == "read"} == chunks
    assert {unit for stage, unit in done if stage == "predict"} == blocks
    assert {unit for stage, unit in done if stage == "vectorize"} == blocks
    assert len(blocks) < sum(1 for stage, _ in before if stage == "predict")
    map_it(city.config, "output=other")
    assert outputs(folder) == outputs(tmp_path / "other")


@pytest.mark.parametrize(("row", "col"), [(0, -1), (-1, 0), (-1, 2)])
def test_a_tile_added_in_the_north_or_west_redoes_only_what_sees_it(
    make_city: MakeCity, tmp_path: Path, row: int, col: int
) -> None:
    city = make_city(1, 2, **SMALL)
    folder = tmp_path / "run"
    map_it(city.config)
    before = tasks_done(folder)
    place = (ORIGIN[0] + row * TILE, ORIGIN[1] + col * TILE)
    write_tile(tmp_path / "tiles" / "tile0.tif", draw_blobs(TILE, TILE, 9), *place)
    map_it(city.config)
    done = set(tasks_done(folder) - before)
    chunks, blocks = expected_units(city.config, 0)
    assert {unit for stage, unit in done if stage == "scan"} == {
        unit for stage, unit in done if stage == "scan" and unit.startswith("tile0")
    }
    assert {unit for stage, unit in done if stage == "read"} == chunks
    assert {unit for stage, unit in done if stage == "predict"} == blocks
    map_it(city.config, "output=other")
    assert outputs(folder) == outputs(tmp_path / "other")


@pytest.mark.parametrize("wording", ["other digits", "no CRS"])
def test_a_tile_that_comes_first_and_says_the_same_in_other_digits_re_keys_nothing(
    make_city: MakeCity, tmp_path: Path, wording: str
) -> None:
    city = make_city(**SMALL, images_crs="EPSG:32633")
    map_it(city.config)
    before = tasks_done(tmp_path / "run")
    size = RESOLUTION * (1 + 1e-10)
    row, col = ORIGIN[0], ORIGIN[1] - TILE
    place = Affine(size, 0, 0.1 + col * RESOLUTION, 0, -size, 0.1 - row * RESOLUTION)
    options: dict[str, Any] = {"transform": place} if wording == "other digits" else {"crs": None}
    write_tile(tmp_path / "tiles" / "tile0.tif", draw_blobs(TILE, TILE, 5), row, col, **options)
    map_it(city.config)
    blocks = {unit for stage, unit in before if stage == "predict"}
    again = {unit for stage, unit in tasks_done(tmp_path / "run") - before if stage == "predict"} & blocks
    assert len(again) < len(blocks), "only what sees the new tile"


def test_the_threads_that_were_settled_first_stay_whatever_the_workers(city: City) -> None:
    map_it(city.config)
    before = tasks_done(city.folder / "run")
    map_it(city.config, "cluster.workers=7", "vectorize.threshold=0.3")
    assert not {"read", "predict"} & set(stages_since(city.folder / "run", before))


def test_a_building_that_reaches_further_than_a_block_is_told_of(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 2, tile_px=128, nodata=None, grid={"chunk_px": 64, "block_px": 64})
    long = np.full((3, 128, 256), 40, np.uint8)
    long[:, 50:80, 20:230] = 230
    for number, part in enumerate((long[:, :, :128], long[:, :, 128:]), 1):
        write_tile(tmp_path / "tiles" / f"tile{number}.tif", part, ORIGIN[0], ORIGIN[1] + (number - 1) * 128)
    assert any("further than a block" in note for note in map_it(city.config).notes)
    assert not map_it(city.config, "grid.block_px=512", "output=other").notes


def test_a_removed_tile_redoes_its_chunks_and_what_saw_them(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 3, **SMALL)
    folder = tmp_path / "run"
    map_it(city.config)
    first = outputs(folder)
    before = tasks_done(folder)
    (tmp_path / "tiles" / "tile1.tif").rename(tmp_path / "away.tif")
    map_it(city.config)
    done = stages_since(folder, before)
    assert "scan" not in done
    assert done["predict"] < sum(1 for stage, _ in before if stage == "predict")
    map_it(city.config, "output=other")
    assert outputs(folder) == outputs(tmp_path / "other")
    (tmp_path / "away.tif").rename(tmp_path / "tiles" / "tile1.tif")
    map_it(city.config)
    assert outputs(folder) == first


def test_a_renamed_tile_is_the_same_tile(mapped: City) -> None:
    before, expected = tasks_done(mapped.folder / "run"), outputs(mapped.folder / "run", tiles=False)
    (mapped.folder / "tiles" / "tile4.tif").rename(mapped.folder / "tiles" / "tile7.tif")
    map_it(mapped.config)
    assert stages_since(mapped.folder / "run", before) == {"scan": 1, "publish": 1}
    assert outputs(mapped.folder / "run", tiles=False) == expected


def test_fresh_starts_over(mapped: City) -> None:
    first, expected = tasks_done(mapped.folder / "run"), outputs(mapped.folder / "run")
    map_it(mapped.config, fresh=True)
    assert tasks_done(mapped.folder / "run") == first
    assert outputs(mapped.folder / "run") == expected
    assert not (mapped.folder / "run" / "buildings-2.gpkg").exists()


def test_going_back_to_another_chunk_size_and_again_gives_the_same_bytes(mapped: City) -> None:
    expected = outputs(mapped.folder / "run")
    map_it(mapped.config, "grid.chunk_px=128")
    map_it(mapped.config)
    assert outputs(mapped.folder / "run") == expected


def test_the_block_size_that_was_settled_first_stays(city: City) -> None:
    map_it(city.config, "grid.block_px=192")
    before = tasks_done(city.folder / "run")
    map_it(city.config, "grid.block_px=auto", "cluster.memory=64 GiB")
    assert stages_since(city.folder / "run", before) == {"publish": 1}


def test_what_is_kept_of_the_store_changes_nothing_but_what_can_be_reused(mapped: City) -> None:
    folder = mapped.folder / "run"
    expected = outputs(folder)
    map_it(mapped.config, "store.keep=probability")
    assert not (folder / "store.zarr" / "image").exists()
    assert outputs(folder) == expected
    before = tasks_done(folder)
    map_it(mapped.config, "store.keep=probability", "vectorize.threshold=0.3")
    assert set(stages_since(folder, before)) == {"vectorize", "join", "publish"}
    map_it(mapped.config, "store.keep=none")
    assert not (folder / "store.zarr").exists()
    assert not (folder / "ledger").exists()
    assert outputs(folder) == expected
    assert nothing_changed(load_city(mapped.config, ["store.keep=none"])) is not None
    write_tile(mapped.folder / "tiles" / "tile3.tif", draw_blobs(TILE, TILE, 4), ORIGIN[0] + TILE, ORIGIN[1])
    map_it(mapped.config, "store.keep=none")
    map_it(mapped.config, "output=other")
    assert outputs(folder) == outputs(mapped.folder / "other")


def test_somebody_elses_rows_are_left_alone(mapped: City) -> None:
    table = pyogrio.read_dataframe(mapped.folder / "run" / "buildings.gpkg").iloc[:5]
    pyogrio.write_dataframe(table, mapped.folder / "run" / "buildings.gpkg", layer="buildings")
    mine = (mapped.folder / "run" / "buildings.gpkg").read_bytes()
    published = map_it(mapped.config, "vectorize.threshold=0.3")
    assert published.geopackage.name == "buildings-2.gpkg"
    assert (mapped.folder / "run" / "buildings.gpkg").read_bytes() == mine
    assert map_it(mapped.config, "vectorize.threshold=0.4").geopackage.name == "buildings-2.gpkg"


# Tiles that cannot be read


def breaking(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A tile that becomes unreadable after its validity was decided."""
    read_window = stages.read_window

    def broken(tiles: Any, window: Window, invalid: Any) -> Any:
        for tile in tiles:
            if tile.path.endswith(name):
                raise TileError(tile.path, "cannot be read: input/output error")
        return read_window(tiles, window, invalid)

    monkeypatch.setattr(stages, "read_window", broken)


def test_a_tile_that_breaks_mid_run_is_named_after_the_rest_is_done(
    make_city: MakeCity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city(1, 3, **SMALL)
    with monkeypatch.context() as patch:
        breaking(patch, "tile3.tif")
        with pytest.raises(RunError, match=r"tile3\.tif.*run the same command again"):
            map_it(city.config)
    before = tasks_done(tmp_path / "run")
    chunks, blocks = expected_units(city.config, 2)
    every = {f"{r}_{c}" for r, c in make_plan(load_city(city.config)).blocks()}
    assert {unit for stage, unit in before if stage == "vectorize"} == every - blocks
    map_it(city.config)
    done = set(tasks_done(tmp_path / "run") - before)
    assert {unit for stage, unit in done if stage == "predict"} == blocks
    assert {unit for stage, unit in done if stage == "read"} >= chunks - {unit for s, unit in before if s == "read"}
    assert max(tasks_done(tmp_path / "run").values()) == 1
    map_it(city.config, "output=other")
    assert outputs(tmp_path / "run") == outputs(tmp_path / "other")


@pytest.mark.parametrize("scan_breaks", [False, True])
def test_a_tile_to_be_skipped_is_nodata_and_counted(
    make_city: MakeCity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan_breaks: bool
) -> None:
    city = make_city(1, 3, **SMALL | {"on_tile_error": "skip"})
    folder = tmp_path / "run"
    path = str(tmp_path / "tiles" / "tile2.tif")
    with monkeypatch.context() as patch:
        breaking(patch, "tile2.tif")
        if scan_breaks:
            digest = stages.file_digest

            def broken(it: str) -> str:
                if it == path:
                    raise TileError(it, "input/output error")
                return digest(it)

            patch.setattr(stages, "file_digest", broken)
        published = map_it(city.config)
        assert list(published.skipped) == [path]
        assert "input/output error" in manifest(folder)["skipped"][path]
        assert manifest(folder)["invalid_px"]["tile skipped"] == TILE**2
        assert (raster(folder / "mask.tif")[:, TILE : 2 * TILE] == 255).all()
        first = outputs(folder)
        map_it(city.config, "vectorize.threshold=0.3")
        map_it(city.config)
        assert outputs(folder) == first
        assert list(manifest(folder)["skipped"]) == [path]
    dark = np.zeros((3, TILE, TILE), np.uint8)
    expected = city.folder / "expected"
    shutil.copytree(tmp_path / "tiles", tmp_path / "blank")
    write_tile(tmp_path / "blank" / "tile2.tif", dark, ORIGIN[0], ORIGIN[1] + TILE)
    map_it(city.config, "images=blank", "output=expected")
    assert outputs(expected)["rows"] == first["rows"]
    assert outputs(expected)["probability"] == first["probability"]
    map_it(city.config, "vectorize.threshold=0.35")
    assert not manifest(folder)["skipped"], "a tile that can be read again is read again"
    map_it(city.config)
    map_it(city.config, "output=other")
    assert outputs(folder) == outputs(tmp_path / "other")


def test_a_tile_cut_short_is_refused_or_left_out_and_counted(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(1, 3, **SMALL)
    path = tmp_path / "tiles" / "tile3.tif"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"tile3\.tif"):
        map_it(city.config)
    assert not (tmp_path / "run").exists()
    published = map_it(city.config, "on_tile_error=skip")
    assert list(published.skipped) == list(manifest(tmp_path / "run")["skipped"]) == [str(path)]
    assert raster(tmp_path / "run" / "mask.tif").shape == (TILE, 2 * TILE)
    assert nothing_changed(load_city(city.config, ["on_tile_error=skip"])) is None, "a skipped tile is tried again"
    path.write_bytes(whole)
    map_it(city.config)
    map_it(city.config, "output=other")
    assert outputs(tmp_path / "run") == outputs(tmp_path / "other")


def test_where_everything_fails_it_gives_up_early(
    make_city: MakeCity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city(3, 6, tile_px=64, grid={"chunk_px": 64, "block_px": 64})

    def broken(path: str) -> str:
        raise TileError(path, "no such device")

    monkeypatch.setattr(stages, "file_digest", broken)
    with pytest.raises(RunError, match="no such device"):
        map_it(city.config)
    failed = [line for line in (tmp_path / "run" / "tasks.jsonl").read_text().splitlines() if "error" in line]
    assert flow.GIVE_UP_AFTER <= len(failed) < 18


# What a run leaves


def test_the_run_folder_is_what_the_contract_says(mapped: City) -> None:
    folder = mapped.folder / "run"
    names = {p.name for p in folder.iterdir()}
    wanted = {"city.yaml", "manifest.json", "store.zarr", "fragments", "ledger", "buildings.gpkg", "mask.tif"}
    assert wanted | {"probability.tif", "report.html", "preview.png"} <= names
    assert "lock.json" not in names
    assert not list(folder.rglob("*partial*"))
    known = manifest(folder)
    assert known["counts"]["valid_px"] == int((raster(folder / "probability.tif") != 255).sum())
    assert known["counts"]["mask_px"] == int((raster(folder / "mask.tif") == 1).sum())
    assert known["counts"]["buildings"] == pyogrio.read_info(folder / "buildings.gpkg")["features"]
    assert known["invalid_px"] == {"nodata 0": 120 * 150}
    assert {"versions", "recipe", "model", "stages", "tiles", "config", "skipped"} <= set(known)
    assert all(tile["digest"] for tile in known["tiles"])
    resolved = yaml.safe_load((folder / "city.yaml").read_text())
    assert resolved["predict"] == {"halo": "auto", "precision": "auto", "tta": "none"}


def test_rasters_cover_the_tiles_and_not_the_grid(mapped: City) -> None:
    with (
        rasterio.open(mapped.folder / "run" / "mask.tif") as mask,
        rasterio.open(mapped.folder / "tiles" / "tile1.tif") as tile,
    ):
        assert mask.shape == (2 * TILE, 2 * TILE)
        assert mask.crs == tile.crs
        assert mask.transform.almost_equals(tile.transform, 1e-6)
        assert set(np.unique(mask.read(1))) == {0, 1, 255}


def test_every_chunk_of_the_store_is_in_the_ledger_with_its_checksum(mapped: City) -> None:
    opened, ledger = Store(mapped.folder / "run"), Ledger(mapped.folder / "run")
    plan = make_plan(load_city(mapped.config))
    for row, col in plan.chunks():
        entry = ledger.entry("read", f"{row}_{col}")
        assert entry is not None
        for array in ("image", "valid"):
            opened.read_chunk(array, row, col, entry["checksum"][array])
    found = [name for b in plan.blocks() for name in (ledger.entry("predict", f"{b[0]}_{b[1]}") or {})["checksum"]]
    assert sorted(found) == sorted(f"{r}_{c}" for r, c in plan.chunks())


def test_a_block_that_is_done_is_not_predicted_again_when_it_is_sent_again(mapped: City) -> None:
    plan, ledger = make_plan(load_city(mapped.config)), Ledger(mapped.folder / "run")
    for row, col in plan.blocks():
        entry = ledger.entry("predict", f"{row}_{col}")
        assert entry is not None
        calls = FakePredictor.calls
        receipt = stages.predict(stages.Site(plan), row, col, entry["key"])
        assert FakePredictor.calls == calls
        assert receipt.pixels == entry["valid_px"]
        assert ledger.entry("predict", f"{row}_{col}") == entry


def test_a_block_that_a_worker_held_for_lost_had_finished_is_counted(
    mapped: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, ledger = make_plan(load_city(mapped.config)), Ledger(mapped.folder / "run")
    row, col = next(iter(plan.blocks()))
    entry = ledger.entry("predict", f"{row}_{col}")
    assert entry is not None
    ledger.forget("predict", f"{row}_{col}")
    others = [stages.Site(plan)]

    class Overtaken(FakePredictor):
        """While it is at work the one that was held for lost ends."""

        def predict(self, *window: Any) -> NDArray[np.uint8]:
            if others:
                stages.predict(others.pop(), row, col, entry["key"])
            return super().predict(*window)

    with monkeypatch.context() as patch:
        patch.setattr(network, "load_predictor", lambda plan: Overtaken())
        stages.predict(stages.Site(plan), row, col, entry["key"])
    (mapped.folder / "run" / "mask.tif").unlink()
    assert [note for note in map_it(mapped.config).notes if note.startswith("blocks predicted twice: 1;")]


def test_right_angles_are_the_same_for_any_cut_and_no_outline_overlaps(city: City) -> None:
    map_it(city.config, "vectorize.regularize=orthogonal")
    map_it(city.config, "vectorize.regularize=orthogonal", "grid.block_px=320", "grid.chunk_px=64", "output=other")
    folder = city.folder
    assert outputs(folder / "run") == outputs(folder / "other")
    rows = pyogrio.read_dataframe(folder / "run" / "buildings.gpkg", layer="buildings")
    assert (rows["outline"] == "orthogonal").sum() > 5
    shapes = rows.geometry.to_numpy()
    one, other = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    pairs = one < other
    assert not shapely.relate_pattern(shapes[one[pairs]], shapes[other[pairs]], "T********").any()
