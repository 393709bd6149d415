"""Laws of evaluation by pixels: scores are scikit-learn's over valid pixels, for any kind of truth, in any cells."""

import itertools
from pathlib import Path

import geopandas
import numpy as np
import pandas
import pytest
import rasterio
import rasterio.features
import shapely
import sklearn.metrics
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.warp import calculate_default_transform, reproject
from scipy.ndimage import binary_dilation

from segpipe.pipeline import footprints as cells
from segpipe.pipeline.evaluate import evaluate_runs
from segpipe.pipeline.score_tables import terminal_rows
from segpipe.pipeline.scores import City, Evaluation
from segpipe.tasks.errors import UserError
from segpipe.tasks.evaluate import (
    Counts,
    Tally,
    bootstrap,
    code_pixels,
    count,
    histogram,
    mean_over,
    near,
    row_of_codes,
)

ORIGIN = Affine(0.3, 0, 353_881.5, 0, -0.3, 3_057_560.4)


def evaluate_run(run: Path, truth: Path) -> City:
    return evaluate_runs([run], [truth], run.parent / "out").cities[0]


def write_raster(
    path: Path, pixels_HW: NDArray[np.uint8], transform: Affine = ORIGIN, crs: str | None = "EPSG:32645", **more: object
) -> Path:
    path.parent.mkdir(exist_ok=True)
    height, width = pixels_HW.shape
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": height, "width": width, "crs": crs}
    with rasterio.open(path, "w", transform=transform, **profile, **more) as raster:
        raster.write(pixels_HW, 1)
    return path


@pytest.fixture(name="mask_HW")
def random_mask() -> NDArray[np.uint8]:
    rng = np.random.default_rng(3)
    mask_HW = (rng.random((130, 170)) < 0.3).astype(np.uint8)
    mask_HW[:20, 100:] = 255
    return mask_HW


@pytest.fixture
def run(tmp_path: Path, mask_HW: NDArray[np.uint8]) -> Path:
    return write_raster(tmp_path / "run" / "mask.tif", mask_HW, nodata=255).parent


@pytest.mark.parametrize(
    ("found", "true", "valid"), list(itertools.product([0.0, 0.2, 1.0], [0.0, 0.4, 1.0], [0.0, 0.7, 1.0]))
)
def test_scores_are_those_of_scikit_learn_over_valid_pixels(found: float, true: float, valid: float) -> None:
    rng = np.random.default_rng(0)
    pred_HW, truth_HW, valid_HW = (rng.random((60, 70)) < share for share in (found, true, valid))
    counts = count(pred_HW, truth_HW, valid_HW)
    pred, truth = pred_HW[valid_HW], truth_HW[valid_HW]
    assert counts.pixels == pred.size
    if pred.size:
        matrix = sklearn.metrics.confusion_matrix(truth, pred, labels=[False, True])
        assert matrix.ravel().tolist() == [counts.tn, counts.fp, counts.fn, counts.tp]
        assert counts.accuracy == pytest.approx(sklearn.metrics.accuracy_score(truth, pred))
        assert counts.precision == pytest.approx(sklearn.metrics.precision_score(truth, pred, zero_division=1))
        assert counts.recall == pytest.approx(sklearn.metrics.recall_score(truth, pred, zero_division=1))
        assert counts.dice == pytest.approx(sklearn.metrics.f1_score(truth, pred, zero_division=1))
        assert counts.iou == pytest.approx(sklearn.metrics.jaccard_score(truth, pred, zero_division=1))
    scores = (counts.iou, counts.dice, counts.accuracy, counts.precision, counts.recall)
    assert all(0 <= score <= 1 for score in scores), "a score is never NaN"
    divided = counts.tp + counts.fp and counts.tp + counts.fn
    assert bool(counts.notes) == (not divided), "a score over nothing is said to be one"


def test_counts_add_up_over_any_cut() -> None:
    rng = np.random.default_rng(1)
    layers = [rng.random((40, 50)) < 0.5 for _ in range(3)]
    whole = count(*layers)
    assert sum((count(*(layer[:, col : col + 7] for layer in layers)) for col in range(0, 50, 7)), Counts()) == whole


@pytest.mark.parametrize("px", [1, 2, 5, 7])
def test_near_is_a_square_dilation(px: int) -> None:
    mask_HW = np.random.default_rng(px).random((30, 41)) < 0.02
    expected_HW = binary_dilation(mask_HW, np.ones((2 * px + 1, 2 * px + 1)))
    np.testing.assert_array_equal(near(mask_HW, px), expected_HW)


@pytest.mark.parametrize("px", [1, 3])
def test_boundary_iou_is_that_of_rims_found_pixel_by_pixel(px: int) -> None:
    rng = np.random.default_rng(2)
    pred_HW, truth_HW = (np.kron(rng.random((6, 8)) < 0.5, np.ones((7, 7))).astype(bool) for _ in range(2))
    valid_HW = rng.random(pred_HW.shape) < 0.95
    height, width = pred_HW.shape

    def rim(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
        out_HW = np.zeros_like(mask_HW)
        for row, col in itertools.product(range(height), range(width)):
            around = slice(max(0, row - px), row + px + 1), slice(max(0, col - px), col + px + 1)
            outside = (~mask_HW[around] & valid_HW[around]).any()
            out_HW[row, col] = mask_HW[row, col] and valid_HW[row, col] and outside
        return out_HW

    tally = Tally.of_row(row_of_codes(histogram(code_pixels(pred_HW, truth_HW, valid_HW, px))))
    assert tally.pixels == count(pred_HW, truth_HW, valid_HW)
    assert tally.boundary.iou == pytest.approx(
        sklearn.metrics.jaccard_score(rim(truth_HW).ravel(), rim(pred_HW).ravel())
    )
    assert Tally.of_row(tally.as_row()) == tally


def test_intervals_are_percentiles_of_resampled_places() -> None:
    rng = np.random.default_rng(0)
    rows = np.zeros((40, 12), np.int64)
    rows[:, :4] = rng.integers(1, 100, (40, 4))
    low, high = bootstrap(rows)["iou"]
    draws = np.random.default_rng(99).integers(0, 40, (20_000, 40))
    tp, fp, fn = (rows[:, place][draws].sum(axis=1) for place in range(3))
    assert np.quantile(tp / (tp + fp + fn), [0.025, 0.975]) == pytest.approx([low, high], abs=0.01)
    means, intervals = mean_over(rows)
    ious = rows[:, 0] / rows[:, :3].sum(axis=1)
    assert means["iou"] == pytest.approx(ious.mean())
    assert np.quantile(ious[draws].mean(axis=1), [0.025, 0.975]) == pytest.approx(intervals["iou"], abs=0.01)
    assert bootstrap(rows[:1]) == {}
    assert bootstrap(np.repeat(rows[:1], 9, axis=0))["iou"] == (ious[0], ious[0])


def test_counts_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        Counts(tp=-1)
    with pytest.raises(ValueError, match="same three times"):
        count(np.ones((2, 2), bool), np.ones((2, 1), bool), np.ones((2, 2), bool))


def expected(
    mask_HW: NDArray[np.uint8], truth_HW: NDArray[np.uint8], valid_HW: NDArray[np.bool_] | None = None
) -> Counts:
    valid_HW = (mask_HW != 255) & (True if valid_HW is None else valid_HW)
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(
        truth_HW[valid_HW] != 0, mask_HW[valid_HW] == 1, labels=[False, True]
    ).ravel()
    return Counts(int(tp), int(fp), int(fn), int(tn))


@pytest.mark.parametrize("window_px", [32, 100, 4096])
def test_any_window_gives_the_counts_of_the_whole_raster(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_px: int
) -> None:
    truth_HW = np.random.default_rng(4).choice(np.array([0, 0, 7, 255], np.uint8), mask_HW.shape)
    monkeypatch.setattr(cells, "CELL_PX", window_px)
    found = evaluate_run(run, write_raster(tmp_path / "truth.tif", truth_HW))
    assert found.whole.pixels == expected(mask_HW, truth_HW)
    assert (found.hidden_px, found.untold_px) == (20 * 70, 0)


def test_the_overlap_of_a_shifted_truth_is_compared_and_its_nodata_left_out(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path
) -> None:
    truth_HW = np.random.default_rng(4).choice(np.array([0, 1, 9], np.uint8), (100, 300))
    path = write_raster(tmp_path / "truth.tif", truth_HW, ORIGIN @ Affine.translation(-30, 50), nodata=9)
    inner_HW, part_HW = mask_HW[50:130], truth_HW[:80, 30:200]
    found = evaluate_run(run, path)
    assert found.whole.pixels == expected(inner_HW, part_HW, part_HW != 9)
    assert found.hidden_px == 20 * 70
    assert found.untold_px == 130 * 170 - 20 * 70 - found.whole.pixels.pixels


def test_a_truth_whose_background_is_nodata_is_noted(run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path) -> None:
    found = evaluate_run(run, write_raster(tmp_path / "truth.tif", (mask_HW == 1).astype(np.uint8), nodata=0))
    assert any("0 as nodata" in note for note in found.notes)


def footprints(crs: str | None = "EPSG:32645") -> geopandas.GeoDataFrame:
    rng = np.random.default_rng(8)
    col, row = rng.uniform(0, 160, 60), rng.uniform(0, 120, 60)
    x, y = ORIGIN @ (col, row)
    houses = shapely.affinity.rotate
    polygons = [
        houses(shapely.box(a, b, a + 4, b + 6), angle) for a, b, angle in zip(x, y, rng.uniform(0, 90, 60), strict=True)
    ]
    return geopandas.GeoDataFrame({"storeys": np.arange(60)}, geometry=polygons, crs=crs)


@pytest.mark.parametrize("window_px", [50, 4096])
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp"])
def test_footprints_of_any_format_and_crs_count_as_their_pixels(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, window_px: int
) -> None:
    monkeypatch.setattr(cells, "CELL_PX", window_px)
    frame = footprints()
    truth_HW = rasterio.features.rasterize(frame.geometry, mask_HW.shape, transform=ORIGIN)
    path = tmp_path / f"houses{suffix}"
    (frame if suffix == ".gpkg" else frame.to_crs(4326)).to_file(path)
    found = evaluate_run(run, path)
    there_and_back_px = 0 if suffix == ".gpkg" else 4
    assert (
        abs(found.whole.pixels.tp + found.whole.pixels.fn - np.count_nonzero(truth_HW[mask_HW != 255]))
        <= there_and_back_px
    )
    assert found.whole.pixels.iou == pytest.approx(expected(mask_HW, truth_HW).iou, abs=1e-3)
    if suffix == ".gpkg":
        assert found.whole.pixels == expected(mask_HW, truth_HW)


def test_the_layer_named_buildings_is_taken_among_several(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "town.gpkg"
    footprints().iloc[:1].to_file(path, layer="parks")
    footprints().to_file(path, layer="buildings")
    truth_HW = rasterio.features.rasterize(footprints().geometry, mask_HW.shape, transform=ORIGIN)
    assert evaluate_run(run, path).whole.pixels == expected(mask_HW, truth_HW)


def test_a_run_compared_with_itself_scores_1(run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path) -> None:
    shapes = rasterio.features.shapes(mask_HW, mask_HW == 1, transform=ORIGIN)
    polygons = [shapely.geometry.shape(shape) for shape, _ in shapes]
    geopandas.GeoDataFrame(geometry=polygons, crs="EPSG:32645").to_file(tmp_path / "self.gpkg")
    for truth in (tmp_path / "self.gpkg", run / "mask.tif"):
        found = evaluate_run(run, truth)
        assert set(found.whole.scores.values()) == {1.0}
        rows = dict(terminal_rows(Evaluation((found,))))
        assert all(rows[name].startswith("1.0000") for name in ("IoU", "boundary IoU", "building F1"))
        assert (found.whole.buildings.fp, found.whole.buildings.fn) == (0, 0)


def refused(run: Path, truth: Path, *says: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate_run(run, truth)
    message = str(caught.value)
    assert "\n" not in message
    for text in says:
        assert text in message


def test_a_folder_without_a_mask_or_with_a_broken_one_is_refused(run: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", run / "mask.tif", "nowhere", "mask.tif")
    truth = write_raster(tmp_path / "truth.tif", np.zeros((9, 9), np.uint8))
    (run / "mask.tif").write_text("no raster")
    refused(run, truth, "mask.tif", "not a readable raster")


def test_a_truth_that_is_missing_or_no_geodata_is_refused_and_nothing_is_left(run: Path, tmp_path: Path) -> None:
    refused(run, tmp_path / "truth.tif", "truth.tif: no such file")
    assert not (tmp_path / "out").exists()
    (tmp_path / "truth.tif").write_text("hello")
    refused(run, tmp_path / "truth.tif", "neither a readable raster nor a readable vector file")


def test_a_truth_without_crs_or_elsewhere_is_refused_with_both_places_shown(run: Path, tmp_path: Path) -> None:
    truth_HW = np.zeros((130, 170), np.uint8)
    path = tmp_path / "truth.tif"
    refused(run, write_raster(path, truth_HW, crs=None), "no CRS", "EPSG:32645")
    refused(run, write_raster(path, truth_HW, ORIGIN @ Affine.translation(500, 0)), "does not overlap", "353881.5")


@pytest.mark.parametrize("kind", ["finer", "shifted", "another CRS", "degrees"])
def test_a_mask_of_any_crs_and_pixel_grid_is_warped_by_nearest_neighbour(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    truth_HW = np.kron(rng.random((10, 12)) < 0.4, np.ones((40, 40))).astype(np.uint8)
    run = write_raster(tmp_path / "run" / "mask.tif", truth_HW, nodata=255).parent
    path = tmp_path / "truth.tif"
    if kind == "finer":
        write_raster(path, np.kron(truth_HW, np.ones((2, 2), np.uint8)), ORIGIN @ Affine.scale(0.5))
    elif kind == "shifted":
        write_raster(path, truth_HW, ORIGIN @ Affine.translation(0.3, -0.2))
    else:
        crs = "EPSG:32644" if kind == "another CRS" else "EPSG:4326"
        bounds = rasterio.transform.array_bounds(*truth_HW.shape, ORIGIN)
        place, width, height = calculate_default_transform("EPSG:32645", crs, 480, 400, *bounds, resolution=None)
        warped_HW = np.zeros((4 * height, 4 * width), np.uint8)
        place = place @ Affine.scale(0.25)
        reproject(truth_HW, warped_HW, src_transform=ORIGIN, src_crs="EPSG:32645", dst_transform=place, dst_crs=crs)
        write_bands(path, np.stack([warped_HW, np.full_like(warped_HW, 255)]), "LA", place, crs)
    found = evaluate_run(run, path)
    assert found.whole.pixels.iou > 0.97
    assert found.whole.pixels.pixels > 0.97 * truth_HW.size
    assert any("warped" in note for note in found.notes)
    monkeypatch.setattr(cells, "CELL_PX", 64)
    assert evaluate_run(run, path).whole == found.whole, "a pixel does not depend on the window that it is read in"


def test_a_folder_of_masks_is_one_truth(run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path) -> None:
    truth_HW = np.random.default_rng(4).choice(np.array([0, 255], np.uint8), mask_HW.shape)
    for number in range(17):
        write_raster(
            tmp_path / "gt" / f"town{number}.tif",
            truth_HW[:, 10 * number : 10 * number + 10],
            ORIGIN @ Affine.translation(10 * number, 0),
        )
    whole = evaluate_run(run, write_raster(tmp_path / "truth.tif", truth_HW))
    assert evaluate_run(run, tmp_path / "gt").whole == whole.whole
    # A mask of the other side of the Earth is none of this run's.
    write_raster(tmp_path / "gt" / "austin1.tif", truth_HW, Affine(0.3, 0, 600_000, 0, -0.3, 3_300_000), "EPSG:32614")
    assert evaluate_run(run, tmp_path / "gt").whole == whole.whole
    refused(run, tmp_path / "gt" / "austin1.tif", "does not overlap", "EPSG:32614")
    (tmp_path / "empty").mkdir()
    refused(run, tmp_path / "empty", "no mask raster in this folder")


@pytest.mark.parametrize(
    ("count", "colours", "says"), [(3, "RGB", "3 bands"), (4, "RGBA", "3 bands"), (2, "", "2 bands")]
)
def test_a_truth_of_several_bands_is_refused_with_their_number(
    run: Path, tmp_path: Path, count: int, colours: str, says: str
) -> None:
    path = write_bands(tmp_path / "rgb.tif", np.ones((count, 130, 170), np.uint8), colours)
    refused(run, path, f"{says} besides alpha", "one band")


def write_bands(
    path: Path, pixels_CHW: NDArray[np.uint8], colours: str, transform: Affine = ORIGIN, crs: str = "EPSG:32645"
) -> Path:
    kinds = {"R": ColorInterp.red, "G": ColorInterp.green, "B": ColorInterp.blue, "A": ColorInterp.alpha}
    kinds["L"] = ColorInterp.gray
    count, height, width = pixels_CHW.shape
    profile = {"driver": "GTiff", "dtype": "uint8", "count": count, "height": height, "width": width}
    with rasterio.open(path, "w", transform=transform, crs=crs, **profile) as raster:
        raster.colorinterp = [kinds[colour] for colour in colours] or [ColorInterp.undefined] * count
        raster.write(pixels_CHW)
    return path


def test_the_alpha_band_of_a_truth_says_where_it_is_valid(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    truth_HW, alpha_HW = ((rng.random(mask_HW.shape) < 0.5).astype(np.uint8) * 255 for _ in range(2))
    path = write_bands(tmp_path / "truth.tif", np.stack([truth_HW, alpha_HW]), "LA")
    assert evaluate_run(run, path).whole.pixels == expected(mask_HW, truth_HW, alpha_HW == 255)


def test_footprints_that_cannot_be_reprojected_are_refused_and_never_taken_for_none(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "houses.gpkg"
    footprints().set_crs("EPSG:4326", allow_override=True).to_file(path)
    refused(run, path, "60 of 60 footprints cannot be reprojected from EPSG:4326 to EPSG:32645")
    degrees, metres = footprints().to_crs("EPSG:4326"), footprints().iloc[:7]
    mixed = pandas.concat([degrees, metres.set_crs("EPSG:4326", allow_override=True)])
    mixed.to_file(path)
    refused(run, path, "7 of 67 footprints cannot be reprojected")


def test_footprints_without_crs_or_polygons_or_elsewhere_are_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "houses.shp"
    footprints(crs=None).to_file(path)
    refused(run, path, "layer houses has no CRS", "EPSG:32645")
    frame = footprints()
    frame.set_geometry(frame.centroid).to_file(path)
    refused(run, path, "points or lines")
    frame.set_geometry(frame.translate(9000)).to_file(path)
    refused(run, path, "none of the 60 footprints")


def test_an_empty_layer_says_that_there_is_no_building(run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "none.gpkg"
    footprints().iloc[:0].to_file(path)
    found = evaluate_run(run, path)
    assert found.whole.pixels == Counts(fp=np.count_nonzero(mask_HW == 1), tn=np.count_nonzero(mask_HW == 0))
    assert found.notes


def test_several_layers_none_named_buildings_are_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "town.gpkg"
    for layer in ("parks", "sheds"):
        footprints().to_file(path, layer=layer)
    refused(run, path, "parks, sheds", "`buildings`")


def test_real_footprints_agree_with_their_real_mask(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "val" / "banepa_mask.tif"
    with rasterio.open(source) as raster:
        run = write_raster(
            tmp_path / "run" / "mask.tif", (raster.read(1) != 0).astype(np.uint8), raster.transform
        ).parent
    assert evaluate_run(run, source).whole.pixels.iou == 1
    assert evaluate_run(run, source.with_name("banepa_buildings.gpkg")).whole.pixels.iou > 0.97
