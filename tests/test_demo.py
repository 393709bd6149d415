"""The drawn city: what it must hold, that colour alone does not give its roofs away, and how it is written."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.features
import shapely
from affine import Affine
from click.testing import CliRunner
from numpy.typing import NDArray
from rasterio.merge import merge
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier

from segpipe.pipeline.cli import main
from segpipe.pipeline.config import load_city
from segpipe.pipeline.demo import DemoFiles, write_demo
from segpipe.pipeline.draw import DrawnCity, draw_city
from segpipe.tasks.errors import UserError

PX_M2 = 0.09


@pytest.fixture(scope="module")
def city() -> DrawnCity:
    return draw_city(7, 640, 704)


@pytest.fixture(scope="module")
def other_city() -> DrawnCity:
    return draw_city(101, 640, 704)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("demo") / "städtchen 1", tile_px=512)


def best_iou_of_a_threshold(score_u8: NDArray[np.uint8], truth: NDArray[np.bool_]) -> float:
    """The best IoU over all thresholds, buildings above it or below it."""
    hits = np.bincount(score_u8[truth], minlength=256)
    misses = np.bincount(score_u8[~truth], minlength=256)
    ious = [h.cumsum() / (truth.sum() + m.cumsum()) for h, m in ((hits, misses), (hits[::-1], misses[::-1]))]
    return float(np.max(ious))


def test_the_best_iou_of_a_threshold_is_one_where_colour_tells_all() -> None:
    truth = np.array([True, True, False])
    assert best_iou_of_a_threshold(np.array([9, 8, 7], np.uint8), truth) == 1
    assert best_iou_of_a_threshold(np.array([1, 2, 7], np.uint8), truth) == 1
    assert best_iou_of_a_threshold(np.array([1, 7, 3], np.uint8), truth) == pytest.approx(2 / 3)


def test_a_seed_gives_the_same_city_and_another_seed_another(city: DrawnCity) -> None:
    again = draw_city(7, 640, 704)
    assert np.array_equal(city.image_HW3, again.image_HW3)
    assert np.array_equal(city.mask_HW, again.mask_HW)
    assert shapely.equals_exact(city.footprints, again.footprints).all()
    assert (draw_city(8, 640, 704).mask_HW != city.mask_HW).mean() > 0.1


@pytest.mark.parametrize("seed", [101, 3])
def test_the_mask_is_the_footprints(seed: int) -> None:
    city = draw_city(seed, 640, 704)
    shapes = [(shape, 1) for shape in city.footprints]
    oracle = rasterio.features.rasterize(shapes, city.mask_HW.shape, transform=Affine.identity()).astype(bool)
    assert city.image_HW3.shape == (640, 704, 3)
    assert city.image_HW3.dtype == np.uint8
    assert (oracle != city.mask_HW).sum() <= 20  # centres that lie on an outline


@pytest.mark.parametrize("seed", range(20, 23))
def test_footprints_are_valid_of_30_to_1500_m2_and_never_overlap(seed: int) -> None:
    shapes = np.array(draw_city(seed, 512, 512).footprints)
    areas = shapely.area(shapes) * PX_M2
    assert len(shapes) > 10
    assert shapely.is_valid(shapes).all()
    assert set(shapely.get_type_id(shapes)) == {shapely.GeometryType.POLYGON}
    assert areas.min() >= 30
    assert areas.max() <= 1500
    assert areas.sum() - shapely.union_all(shapes).area * PX_M2 < 0.01 * areas.sum()


def test_seeds_differ_in_brightness_density_and_colour() -> None:
    cities = [draw_city(seed, 512, 512) for seed in range(40, 45)]
    covers = [city.mask_HW.mean() for city in cities]
    means = np.array([city.image_HW3.reshape(-1, 3).mean(0) for city in cities])
    assert max(covers) > 1.5 * min(covers)
    assert np.ptp(means.mean(1)) > 15
    assert np.ptp(means[:, 0] - means[:, 2]) > 10


def test_shadows_fall_to_one_side(city: DrawnCity) -> None:
    grey = city.image_HW3.mean(2)
    around = ndimage.binary_dilation(city.mask_HW, iterations=14) & ~ndimage.binary_dilation(city.mask_HW, iterations=2)
    means = []
    for angle in np.arange(0, 2 * np.pi, np.pi / 8):  # ground with a roof a few pixels away in each direction
        shift = np.round(9 * np.array([np.sin(angle), np.cos(angle)])).astype(int)
        behind = np.roll(city.mask_HW, tuple(shift), (0, 1)) & around
        means.append(grey[behind].mean())
    darkest, brightest = int(np.argmin(means)), int(np.argmax(means))
    assert max(means) - min(means) > 20
    assert min((darkest - brightest) % 16, (brightest - darkest) % 16) >= 5  # on opposite sides


def test_no_threshold_on_a_colour_finds_the_roofs(city: DrawnCity, other_city: DrawnCity) -> None:
    for drawn in (city, other_city):
        bands = [*np.moveaxis(drawn.image_HW3, 2, 0), drawn.image_HW3.mean(2).astype(np.uint8)]
        assert max(best_iou_of_a_threshold(band, drawn.mask_HW) for band in bands) < 0.45


def test_a_random_forest_on_colour_does_not_find_the_roofs(city: DrawnCity, other_city: DrawnCity) -> None:
    for known, unknown in ((city, other_city), (other_city, city)):
        forest = RandomForestClassifier(n_estimators=20, max_depth=12, random_state=0, n_jobs=1)
        forest.fit(known.image_HW3.reshape(-1, 3)[::5], known.mask_HW.ravel()[::5])
        probability = forest.predict_proba(unknown.image_HW3.reshape(-1, 3))[:, 1]
        score = np.round(255 * probability).astype(np.uint8)
        assert best_iou_of_a_threshold(score, unknown.mask_HW.ravel()) < 0.45


def test_tiles_lie_on_one_lattice_without_gap(demo: DemoFiles) -> None:
    assert [tile.name for tile in demo.tiles] == ["tile1.tif", "tile2.tif", "tile3.tif", "tile4.tif"]
    origins = []
    for path in demo.tiles:
        with rasterio.open(path) as tile:
            assert (tile.crs.to_epsg(), tile.res, tile.shape, tile.count) == (32633, (0.3, 0.3), (512, 512), 3)
            assert tile.profile["tiled"]
            assert tile.compression.name == "deflate"
            origins.append(((tile.transform.c - 440000.1) / 0.3, (5300000.1 - tile.transform.f) / 0.3))
    assert np.allclose(origins, [(0, 0), (512, 0), (0, 512), (512, 512)], atol=1e-4)


def test_the_truth_is_what_the_tiles_show(demo: DemoFiles) -> None:
    mosaic, transform = merge(demo.tiles)
    truth = gpd.read_file(demo.truth, layer="buildings")
    assert truth.crs.to_epsg() == 32633
    assert len(truth) == demo.buildings
    # Brightness is steeper on the outlines of the truth than anywhere if they are shifted.
    grey = mosaic.mean(0)
    steep = ndimage.gaussian_gradient_magnitude(grey, 1.0)
    outlines = rasterio.features.rasterize(truth.boundary, grey.shape, transform=transform).astype(bool)
    here = steep[outlines].mean()
    for shift in [(4, 0), (-4, 0), (0, 4), (0, -4), (6, 6), (-6, -6)]:
        assert steep[np.roll(outlines, shift, (0, 1))].mean() < 0.9 * here


def test_buildings_stand_across_tile_edges_and_on_the_corner_of_four_tiles(demo: DemoFiles) -> None:
    truth = gpd.read_file(demo.truth)
    middle = 440000.1 + 0.3 * 512, 5300000.1 - 0.3 * 512
    size = 0.3 * 512
    assert truth.contains(shapely.Point(middle)).sum() == 1
    for edge in (
        shapely.LineString([(middle[0], middle[1] - size), (middle[0], middle[1] + size)]),
        shapely.LineString([(middle[0] - size, middle[1]), (middle[0] + size, middle[1])]),
    ):
        assert truth.crosses(edge).sum() >= 2


@pytest.mark.parametrize("seed", [1, 2])
def test_a_house_stands_on_the_corner_for_other_seeds_and_shapes_too(seed: int, tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo", seed, (2, 3), 256)
    corner = shapely.Point(440000.1 + 0.3 * 256, 5300000.1 - 0.3 * 256)
    assert len(demo.tiles) == 6
    assert gpd.read_file(demo.truth).contains(corner).sum() == 1


def test_only_the_hole_is_zero_and_it_is_one_patch_of_1000_m2(demo: DemoFiles) -> None:
    for path in demo.tiles:
        with rasterio.open(path) as tile:
            black = (tile.read() == 0).all(0)
        opened = ndimage.binary_opening(black, np.ones((5, 5)))
        if path == demo.tiles[-1]:
            assert ndimage.label(opened)[1] == 1
            assert opened.sum() * PX_M2 > 1000
            assert black.sum() * PX_M2 == pytest.approx(demo.hole_m2)
            assert not black[[0, -1]].any()
            assert not black[:, [0, -1]].any()
        else:
            assert not black.any()


def test_the_config_is_one_that_run_takes_with_every_option_at_its_default(demo: DemoFiles, tmp_path: Path) -> None:
    written = load_city(demo.config)
    assert (written.name, written.images, written.nodata) == ("demo", ("tiles/*.tif",), (0.0,))
    text = demo.config.read_text(encoding="utf-8")
    head, options = text.split("# What else may be said, with its default:\n")
    opened = tmp_path / "city.yaml"
    opened.write_text(head + "\n".join(line.removeprefix("# ") for line in options.splitlines()), encoding="utf-8")
    assert load_city(opened).model_dump() == written.model_dump()


def test_writing_the_same_demo_again_changes_nothing(tmp_path: Path) -> None:
    first = write_demo(tmp_path, tiles=(1, 1), tile_px=256)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert write_demo(tmp_path, tiles=(1, 1), tile_px=256) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert set(before) == {first.config, first.truth, *first.tiles}  # nothing half-written stays


@pytest.mark.parametrize("name", ["city.yaml", "truth.gpkg", "tiles/tile1.tif", "tiles/mine.tif"])
def test_a_file_in_the_way_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "tiles").mkdir()
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=name):
        write_demo(tmp_path, tiles=(1, 1), tile_px=256)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(name).name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_a_demo_of_another_seed_is_not_overwritten(tmp_path: Path) -> None:
    demo = write_demo(tmp_path, tiles=(1, 1), tile_px=256)
    before = demo.tiles[0].read_bytes()
    with pytest.raises(UserError, match=r"tile1\.tif"):
        write_demo(tmp_path, seed=8, tiles=(1, 1), tile_px=256)
    assert demo.tiles[0].read_bytes() == before


def test_a_directory_that_is_a_file_and_nonsense_sizes_are_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="taken"):
        write_demo(tmp_path / "taken", tiles=(1, 1), tile_px=256)
    for tiles, tile_px in (((0, 1), 512), ((1, 1), 100)):
        with pytest.raises(UserError, match=f"{tile_px} px"):
            write_demo(tmp_path / "new", tiles=tiles, tile_px=tile_px)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("in_process")
def test_demo_draws_maps_and_evaluates(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", str(tmp_path / "city"), "--run"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "city" / "run" / "evaluation" / "evaluation.json").is_file()
