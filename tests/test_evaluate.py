"""Laws of evaluation: scores are scikit-learn's, pooled over valid pixels, and do not depend on windows."""

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

from segpipe.pipeline import evaluate
from segpipe.pipeline.evaluate import evaluate_run, evaluation_table
from segpipe.tasks.errors import UserError
from segpipe.tasks.evaluate import Counts, count

ORIGIN = Affine(0.3, 0, 353_881.5, 0, -0.3, 3_057_560.4)


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
    monkeypatch.setattr(evaluate, "WINDOW_PX", window_px)
    found = evaluate_run(run, write_raster(tmp_path / "truth.tif", truth_HW))
    assert found.counts == expected(mask_HW, truth_HW)
    assert (found.ignored, found.outside, found.notes) == (20 * 70, 0, ())


def test_the_overlap_of_a_shifted_truth_is_compared_and_its_nodata_left_out(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path
) -> None:
    truth_HW = np.random.default_rng(4).choice(np.array([0, 1, 9], np.uint8), (100, 300))
    path = write_raster(tmp_path / "truth.tif", truth_HW, ORIGIN @ Affine.translation(-30, 50), nodata=9)
    inner_HW, part_HW = mask_HW[50:130], truth_HW[:80, 30:200]
    found = evaluate_run(run, path)
    assert found.counts == expected(inner_HW, part_HW, part_HW != 9)
    assert found.outside == 50 * 170
    assert found.ignored == inner_HW.size - found.counts.pixels


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
    monkeypatch.setattr(evaluate, "WINDOW_PX", window_px)
    frame = footprints()
    truth_HW = rasterio.features.rasterize(frame.geometry, mask_HW.shape, transform=ORIGIN)
    path = tmp_path / f"houses{suffix}"
    (frame if suffix == ".gpkg" else frame.to_crs(4326)).to_file(path)
    found = evaluate_run(run, path)
    there_and_back_px = 0 if suffix == ".gpkg" else 4
    assert abs(found.counts.tp + found.counts.fn - np.count_nonzero(truth_HW[mask_HW != 255])) <= there_and_back_px
    assert found.counts.iou == pytest.approx(expected(mask_HW, truth_HW).iou, abs=1e-3)
    if suffix == ".gpkg":
        assert found.counts == expected(mask_HW, truth_HW)


def test_the_layer_named_buildings_is_taken_among_several(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "town.gpkg"
    footprints().iloc[:1].to_file(path, layer="parks")
    footprints().to_file(path, layer="buildings")
    truth_HW = rasterio.features.rasterize(footprints().geometry, mask_HW.shape, transform=ORIGIN)
    assert evaluate_run(run, path).counts == expected(mask_HW, truth_HW)


def test_a_run_compared_with_itself_scores_1(run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path) -> None:
    shapes = rasterio.features.shapes(mask_HW, mask_HW == 1, transform=ORIGIN)
    polygons = [shapely.geometry.shape(shape) for shape, _ in shapes]
    geopandas.GeoDataFrame(geometry=polygons, crs="EPSG:32645").to_file(tmp_path / "self.gpkg")
    for truth in (tmp_path / "self.gpkg", run / "mask.tif"):
        rows = dict(evaluation_table(evaluate_run(run, truth)))
        assert [rows[name] for name in ("IoU", "Dice", "accuracy", "precision", "recall")] == ["1.0000"] * 5


def test_the_table_has_a_line_for_every_score_and_note(run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path) -> None:
    nothing = write_raster(tmp_path / "truth.tif", np.zeros((20, 20), np.uint8))
    names = [name for name, _ in evaluation_table(evaluate_run(run, nothing))]
    assert names == ["IoU", "Dice", "accuracy", "precision", "recall", "pixels", "not covered", "note"]


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


def test_a_truth_that_is_missing_or_no_geodata_is_refused(run: Path, tmp_path: Path) -> None:
    refused(run, tmp_path / "truth.tif", "truth.tif: no such file")
    (tmp_path / "truth.tif").write_text("hello")
    refused(run, tmp_path / "truth.tif", "neither a readable raster nor a readable vector file")


def test_a_truth_on_another_lattice_or_crs_is_refused_with_both_shown(run: Path, tmp_path: Path) -> None:
    truth_HW = np.zeros((130, 170), np.uint8)
    path = tmp_path / "truth.tif"
    refused(run, write_raster(path, truth_HW, crs="EPSG:32644"), "EPSG:32644", "EPSG:32645")
    refused(run, write_raster(path, truth_HW, crs=None), "no CRS", "EPSG:32645")
    refused(run, write_raster(path, truth_HW, ORIGIN @ Affine.scale(2)), "0.6 x -0.6", "0.3 x -0.3")
    refused(run, write_raster(path, truth_HW, ORIGIN @ Affine.translation(3.25, 0)), "0.250 px right", "353881.5")
    refused(run, write_raster(path, truth_HW, ORIGIN @ Affine.translation(500, 0)), "does not overlap")


@pytest.mark.parametrize(
    ("count", "colours", "says"), [(3, "RGB", "3 bands"), (4, "RGBA", "3 bands"), (2, "", "2 bands")]
)
def test_a_truth_of_several_bands_is_refused_with_their_number(
    run: Path, tmp_path: Path, count: int, colours: str, says: str
) -> None:
    path = write_bands(tmp_path / "rgb.tif", np.ones((count, 130, 170), np.uint8), colours)
    refused(run, path, f"{says} besides alpha", "one band")


def write_bands(path: Path, pixels_CHW: NDArray[np.uint8], colours: str) -> Path:
    kinds = {"R": ColorInterp.red, "G": ColorInterp.green, "B": ColorInterp.blue, "A": ColorInterp.alpha}
    kinds["L"] = ColorInterp.gray
    count, height, width = pixels_CHW.shape
    profile = {"driver": "GTiff", "dtype": "uint8", "count": count, "height": height, "width": width}
    with rasterio.open(path, "w", transform=ORIGIN, crs="EPSG:32645", **profile) as raster:
        raster.colorinterp = [kinds[colour] for colour in colours] or [ColorInterp.undefined] * count
        raster.write(pixels_CHW)
    return path


def test_the_alpha_band_of_a_truth_says_where_it_is_valid(
    run: Path, mask_HW: NDArray[np.uint8], tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    truth_HW, alpha_HW = ((rng.random(mask_HW.shape) < 0.5).astype(np.uint8) * 255 for _ in range(2))
    path = write_bands(tmp_path / "truth.tif", np.stack([truth_HW, alpha_HW]), "LA")
    assert evaluate_run(run, path).counts == expected(mask_HW, truth_HW, alpha_HW == 255)


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
    assert found.counts == Counts(fp=np.count_nonzero(mask_HW == 1), tn=np.count_nonzero(mask_HW == 0))
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
    assert evaluate_run(run, source).counts.iou == 1
    assert evaluate_run(run, source.with_name("banepa_buildings.gpkg")).counts.iou > 0.97
