"""Laws of evaluation by buildings: hits, misses and false alarms are those of shapely by brute force, in any cells."""

import json
from collections import Counter
from collections.abc import Callable
from csv import DictReader
from itertools import combinations, product
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.features
import shapely
import sklearn.metrics
from affine import Affine
from conftest import City as TinyCity
from conftest import FakePredictor, map_it, raster
from numpy.typing import NDArray

from segpipe.pipeline import footprints as cells
from segpipe.pipeline.evaluate import evaluate_runs, evaluate_to, near_seams
from segpipe.pipeline.scores import CLASSES_M2
from segpipe.tasks.errors import UserError
from segpipe.tasks.match import Pairs, ious, match

PLACE = Affine(0.3, 0, 353_881.5, 0, -0.3, 3_057_560.4)
HEIGHT, WIDTH = 300, 420
CRS = "EPSG:32645"


def houses(rng: np.random.Generator, count: int, most_px: int = 30) -> list[shapely.Polygon]:
    """Turned rectangles in pixels, some of them beyond the edge of the raster."""
    found = []
    for _ in range(count):
        x, y = rng.uniform(-5, WIDTH + 5), rng.uniform(-5, HEIGHT + 5)
        w, h = rng.uniform(4, most_px, 2)
        found.append(shapely.affinity.rotate(shapely.box(x, y, x + w, y + h), rng.choice([0, 0, 30])))
    return found


def moved(shapes: list[shapely.Polygon], rng: np.random.Generator) -> list[shapely.Polygon]:
    """The same a little off, so that some are hits and some are not; every tenth twice, every seventh not at all."""
    found = []
    for number, shape in enumerate(shapes):
        for _ in range(2 if number % 10 == 0 else number % 7 != 0):
            found.append(shapely.affinity.translate(shape, *rng.uniform(-5, 5, 2)))
    return found


def write_layer(path: Path, shapes: list[shapely.Polygon], **columns: Any) -> Path:
    to_crs = [shapely.affinity.affine_transform(shape, PLACE.to_shapely()) for shape in shapes]
    geopandas.GeoDataFrame(columns, geometry=to_crs, crs=CRS).to_file(path, layer="buildings")
    return path


def write_mask(path: Path, mask_HW: NDArray[np.uint8]) -> None:
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": HEIGHT, "width": WIDTH, "nodata": 255}
    with rasterio.open(path, "w", transform=PLACE, crs=CRS, **profile) as dataset:
        dataset.write(mask_HW, 1)


class Case:
    """A run without a manifest, its truth, and what brute force makes of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.true = houses(rng, 150)
        self.found = [*moved(self.true, rng), *houses(rng, 20)]
        self.confidence = np.round(rng.uniform(0.5, 1, len(self.found)), 1)
        self.hidden_HW = np.zeros((HEIGHT, WIDTH), bool)
        self.hidden_HW[100:170, 200:310] = True
        mask_HW = rasterio.features.rasterize(self.found, (HEIGHT, WIDTH), dtype="uint8")
        mask_HW[self.hidden_HW] = 255
        self.run = folder / "run"
        self.run.mkdir()
        write_mask(self.run / "mask.tif", mask_HW)
        names = [f"b{number}" for number in range(len(self.found))]
        write_layer(self.run / "buildings.gpkg", self.found, building_id=names, confidence=self.confidence)
        ids = [f"t{number}" for number in range(len(self.true))]
        self.truth = write_layer(folder / "truth.gpkg", self.true, id=ids)

    def verdicts(self) -> Counter[tuple[str, str | None, str | None]]:
        """(verdict, truth id, building id) of all, one after the other."""
        inside = shapely.box(0, 0, WIDTH, HEIGHT)
        free = {number for number, shape in enumerate(self.true) if touches(shape, inside)}
        told: Counter[tuple[str, str | None, str | None]] = Counter()
        alone = []
        for number in sorted(range(len(self.found)), key=lambda n: (-self.confidence[n], n)):
            shape = self.found[number]
            if not touches(shape, inside):
                continue
            best = max(
                ((shape.intersection(self.true[t]).area / shape.union(self.true[t]).area, -t) for t in free),
                default=(0.0, 0),
            )
            if best[0] >= 0.5:
                free.remove(-best[1])
                told["hit", f"t{-best[1]}", f"b{number}"] += 1
            else:
                alone.append(number)
        apart = {t for t in free if self.hidden_share(self.true[t]) > 0.5}
        for t in free:
            told["not judged" if t in apart else "miss", f"t{t}", None] += 1
        for number in alone:
            shape = self.found[number]
            covered = sum(self.judged_px(shape.intersection(self.true[t])) for t in apart) / shape.area
            verdict = "not judged" if self.hidden_share(shape) + covered > 0.5 else "false alarm"
            told[verdict, None, f"b{number}"] += 1
        return told

    def hidden_share(self, shape: shapely.Polygon) -> float:
        outside = shape.difference(shapely.box(0, 0, WIDTH, HEIGHT)).area
        return float((self.hidden_px(shape) + outside) / shape.area)

    def judged_px(self, shape: shapely.Polygon) -> float:
        """Area in the raster less the pixels that are hidden, each counted if its centre is in the shape."""
        return shape.intersection(shapely.box(0, 0, WIDTH, HEIGHT)).area - self.hidden_px(shape)

    def hidden_px(self, shape: shapely.Polygon) -> int:
        if shape.is_empty:
            return 0
        inside_HW = rasterio.features.geometry_mask([shape], (HEIGHT, WIDTH), Affine.identity(), invert=True)
        return np.count_nonzero(inside_HW & self.hidden_HW)


def touches(shape: shapely.Polygon, other: shapely.Polygon) -> bool:
    return bool(shapely.box(*shape.bounds).intersection(other).area > 0)


def layer_of(path: Path) -> Counter[tuple[str, str | None, str | None]]:
    frame = pyogrio.read_dataframe(path, layer="evaluation")
    rows = zip(frame.verdict, frame.truth_id, frame.building_id, strict=True)
    return Counter(tuple(value if isinstance(value, str) else None for value in row) for row in rows)


@pytest.mark.parametrize("cell_px", [64, 170, 4096])
@pytest.mark.parametrize("seed", [0, 1])
def test_verdicts_are_those_of_brute_force_in_any_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, cell_px: int
) -> None:
    monkeypatch.setattr(cells, "CELL_PX", cell_px)
    case = Case(tmp_path, seed)
    expected = case.verdicts()
    evaluation = evaluate_runs([case.run], [case.truth], tmp_path / "out")
    assert layer_of(tmp_path / "out" / "evaluation.gpkg") == expected
    kinds = Counter(verdict for verdict, _, _ in expected.elements())
    assert min(kinds.values()) > 4, "each verdict occurs"
    (city,) = evaluation.cities
    buildings = city.whole.buildings
    assert (buildings.tp, buildings.fp, buildings.fn) == (kinds["hit"], kinds["false alarm"], kinds["miss"])
    assert city.apart_true + city.apart_found == kinds["not judged"]
    assert city.true_classes.sum(axis=0).tolist() == [kinds["hit"], kinds["miss"]]
    assert city.found_classes.sum(axis=0).tolist() == [kinds["hit"], kinds["false alarm"]]


@pytest.mark.parametrize("cell_px", [64, 4096])
def test_what_cannot_be_judged_for_two_reasons_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell_px: int
) -> None:
    monkeypatch.setattr(cells, "CELL_PX", cell_px)
    case = Case(tmp_path, 0)
    # The hidden pixels begin at column 200, and the raster ends at column 420. Both true ones are apart; of each one
    # found 48 % cannot be judged, which would be 70 and 67 % if what lies there and in the true one counted twice.
    true = [shapely.box(190, 110, 240, 130), shapely.box(410, 15, 450, 35)]
    found = [shapely.box(170, 105, 215, 135), shapely.box(395, 10, 430, 40)]
    write_layer(tmp_path / "two.gpkg", true, id=["t0", "t1"])
    (case.run / "buildings.gpkg").unlink()
    write_layer(case.run / "buildings.gpkg", found, building_id=["b0", "b1"], confidence=[0.9, 0.9])
    evaluate_runs([case.run], [tmp_path / "two.gpkg"], tmp_path / "out")
    assert layer_of(tmp_path / "out" / "evaluation.gpkg") == Counter(
        [
            ("not judged", "t0", None),
            ("not judged", "t1", None),
            ("false alarm", None, "b0"),
            ("false alarm", None, "b1"),
        ]
    )


def test_classes_of_area_sort_true_and_found_buildings_by_their_own_area(tmp_path: Path) -> None:
    case = Case(tmp_path, 3)
    evaluation = evaluate_runs([case.run], [case.truth], tmp_path / "out")
    (city,) = evaluation.cities
    true, found = np.zeros_like(city.true_classes), np.zeros_like(city.found_classes)
    for (verdict, truth_id, building_id), _ in case.verdicts().items():
        if verdict == "not judged":
            continue
        for name, shapes, table in ((truth_id, case.true, true), (building_id, case.found, found)):
            if name is not None:
                area_m2 = shapes[int(name[1:])].area * 0.09
                table[sum(area_m2 >= low for low in CLASSES_M2) - 1, int(verdict != "hit")] += 1
    # On the ground a pixel is 0.03 % smaller or larger than on the map: nothing lies so near an end of a class here.
    np.testing.assert_array_equal(city.true_classes, true)
    np.testing.assert_array_equal(city.found_classes, found)


def test_matching_is_greedy_by_confidence_and_one_to_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 12))
        every = [*product(range(4), range(4))]
        chosen = [every[i] for i in rng.permutation(16)[:count]]
        confidence = rng.integers(1, 3, 4) / 2
        iou = rng.integers(5, 9, count) / 10
        pairs = Pairs(
            np.array([f for f, _ in chosen]), np.array([t for _, t in chosen]), iou,
            np.array([confidence[f] for f, _ in chosen]),
        )  # fmt: skip
        expected = set()
        free = set(range(4))
        for f in sorted(range(4), key=lambda n: (-confidence[n], n)):
            own = [(iou[i], -t) for i, (g, t) in enumerate(chosen) if g == f and t in free]
            if own:
                expected.add((f, -max(own)[1]))
                free.remove(-max(own)[1])
        found = match(pairs)
        assert set(zip(found.found.tolist(), found.true.tolist(), strict=True)) == expected


def test_iou_of_pairs_is_shapelys_wherever_it_is_half_or_more() -> None:
    shapes = houses(np.random.default_rng(4), 60, most_px=90)
    one, other = (np.array(side, dtype=object) for side in zip(*combinations(shapes, 2), strict=True))
    expected = shapely.area(shapely.intersection(one, other)) / shapely.area(shapely.union(one, other))
    found = ious(one, other)
    near = expected >= 0.5
    assert near.any()
    np.testing.assert_allclose(found[near], expected[near], rtol=1e-9)
    assert (found[~near] < 0.5).all()


def test_truth_of_several_parts_of_no_validity_or_of_no_area_is_one_building_or_none(tmp_path: Path) -> None:
    case = Case(tmp_path, 0)
    bow = shapely.Polygon([(10, 10), (30, 30), (30, 10), (10, 30)])
    parts = shapely.MultiPolygon([shapely.box(50, 50, 60, 60), shapely.box(70, 50, 80, 60)])
    flat = shapely.Polygon([(90, 90), (95, 95), (90, 90)])
    path = write_layer(tmp_path / "odd.gpkg", [bow, parts, flat, shapely.box(-99, -99, -50, -50)], OSM_ID=[7, 8, 9, 10])
    evaluation = evaluate_runs([case.run], [path], tmp_path / "out")
    (city,) = evaluation.cities
    assert city.whole.buildings.tp + city.whole.buildings.fn + city.apart_true == 2
    assert city.outside == 1
    assert any("repaired" in note for note in city.notes)
    ids = {truth_id for _, truth_id, _ in layer_of(tmp_path / "out" / "evaluation.gpkg")}
    assert ids - {None} == {"7", "8"}, "the truth's own ids"


def test_the_column_of_the_truths_ids_may_be_named(tmp_path: Path) -> None:
    case = Case(tmp_path, 0)
    path = write_layer(tmp_path / "own.gpkg", case.true, id=["x"] * 150, parcel=[f"p{n}" for n in range(150)])
    evaluate_runs([case.run], [path], tmp_path / "out", truth_id="parcel")
    ids = {truth_id for _, truth_id, _ in layer_of(tmp_path / "out" / "evaluation.gpkg")} - {None}
    assert ids <= {f"p{n}" for n in range(150)}
    with pytest.raises(UserError, match=r"--truth-id street: .* expected one of id, parcel"):
        evaluate_runs([case.run], [path], tmp_path / "out", truth_id="street")


def test_a_run_whose_layer_is_in_another_crs_gets_the_same_verdicts(tmp_path: Path) -> None:
    case = Case(tmp_path, 1)
    expected = case.verdicts()
    for path in (case.run / "buildings.gpkg", case.truth):
        frame = geopandas.read_file(path, layer="buildings").to_crs(4326)
        path.unlink()
        frame.to_file(path, layer="buildings")
    evaluate_runs([case.run], [case.truth], tmp_path / "out")
    assert layer_of(tmp_path / "out" / "evaluation.gpkg") == expected


@pytest.mark.parametrize("cell_px", [100, 4096])
def test_a_mask_as_truth_has_its_regions_as_buildings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell_px: int
) -> None:
    monkeypatch.setattr(cells, "CELL_PX", cell_px)
    case = Case(tmp_path, 0)
    truth_HW = rasterio.features.rasterize(case.true, (HEIGHT, WIDTH), dtype="uint8")
    write_mask(tmp_path / "truth.tif", truth_HW)
    shapes = [shapely.geometry.shape(it) for it, _ in rasterio.features.shapes(truth_HW, truth_HW == 1)]
    layer = write_layer(tmp_path / "shapes.gpkg", shapes)
    results = []
    for truth in (tmp_path / "truth.tif", layer):
        (city,) = evaluate_runs([case.run], [truth], tmp_path / "out").cities
        results.append((city.whole, city.apart_true, city.apart_found))
    assert results[0] == results[1]


def test_near_seams_are_the_pixels_within_32_of_lines_between_blocks() -> None:
    for offset, size, block_px in ((-70, 400, 128), (0, 300, 100), (5, 90, 256), (256, 256, 256)):
        lines = [line for line in range(-1024, 1025, block_px) if offset < line < offset + size]
        expected = [any(line - 32 <= offset + n < line + 32 for line in lines) for n in range(size)]
        if block_px != 100:
            assert near_seams(offset, size, block_px).tolist() == expected
    assert not near_seams(0, 50, None).any()


def test_images_groups_and_seams_of_a_run_are_counted_as_scikit_learn_would(
    make_city: Callable[..., TinyCity], in_process: type[FakePredictor], tmp_path: Path
) -> None:
    city = make_city(grid={"chunk_px": 128, "block_px": 256})
    map_it(city.config)
    run = city.folder / "run"
    mask_HW = raster(run / "mask.tif")
    truth_HW = np.roll(mask_HW == 1, 3, axis=1).astype(np.uint8)
    with rasterio.open(run / "mask.tif") as dataset:
        profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": 600, "width": 600}
        with rasterio.open(tmp_path / "truth.tif", "w", crs=dataset.crs, transform=dataset.transform, **profile) as out:
            out.write(truth_HW, 1)
    output = tmp_path / "out"
    lines = evaluate_to(output, [run], [tmp_path / "truth.tif"], group=r"tile([12]|\d)")

    def iou(chosen_HW: Any) -> float:
        valid_HW = (mask_HW != 255)[chosen_HW]
        return float(sklearn.metrics.jaccard_score(truth_HW[chosen_HW][valid_HW], mask_HW[chosen_HW][valid_HW]))

    scores = {(it["scope"], it["name"]): it for it in json.loads((output / "evaluation.json").read_text())["scores"]}
    corners = {
        f"tile{n + 1}": (slice(n // 2 * 300, n // 2 * 300 + 300), slice(n % 2 * 300, n % 2 * 300 + 300))
        for n in range(4)
    }
    for name, corner in corners.items():
        assert scores["image", name]["scores"]["iou"] == pytest.approx(iou(corner))
        assert scores["group", name[-1]]["scores"]["iou"] == pytest.approx(iou(corner))
    assert scores["pooled", "all"]["scores"]["iou"] == pytest.approx(iou(slice(None)))
    mean = np.mean([iou(corner) for corner in corners.values()])
    assert scores["mean over images", "all"]["scores"]["iou"] == pytest.approx(mean)
    rows, cols = (near_seams(offset, 600, 256) for offset in (-17_666_700, 1_666_500))
    band_HW = rows[:, None] | cols[None, :]
    assert scores["seams", "32 px about seams"]["scores"]["iou"] == pytest.approx(iou(band_HW))
    assert scores["seams", "elsewhere"]["scores"]["iou"] == pytest.approx(iou(~band_HW))
    pooled = scores["pooled", "all"]["counts"]
    for part in ("pixels_tp", "pixels_fp", "pixels_tn", "buildings_tp", "buildings_fn"):
        images = sum(it["counts"][part] for (scope, _), it in scores.items() if scope == "image")
        seams = sum(it["counts"][part] for (scope, _), it in scores.items() if scope == "seams")
        assert images == seams == pooled[part], part
    with (output / "evaluation.csv").open() as file:
        table = {(row["scope"], row["name"]): row for row in DictReader(file)}
    for key, it in scores.items():
        assert float(table[key]["building_f1"]) == it["scores"]["building_f1"]
    text = (output / "evaluation.md").read_text()
    for it in scores.values():
        assert f"{it['scores']['iou']:.4f}" in text
    page = (output / "worst.html").read_text()
    wrong_HW = (truth_HW != mask_HW) & (mask_HW != 255)
    places = sum(wrong_HW[row : row + 256, col : col + 256].any() for row, col in product((0, 256, 512), repeat=2))
    assert page.count("<figure>") == places
    assert "no pictures" not in dict(lines)
    assert "http" not in page


def test_two_cities_are_pooled_and_told_apart(tmp_path: Path) -> None:
    cases = []
    for number in range(2):
        (tmp_path / f"c{number}").mkdir()
        case = Case(tmp_path / f"c{number}", number)
        cases.append((case.run.rename(tmp_path / f"city{number}"), case.truth))
    runs, truths = zip(*cases, strict=True)
    evaluation = evaluate_runs(runs, truths, tmp_path / "out")
    by_name = {(it.scope, it.name): it for it in evaluation.rows}
    singles = [evaluate_runs([run], [truth], tmp_path / "one").cities[0].whole for run, truth in cases]
    assert by_name["pooled", "all"].tally == singles[0] + singles[1]
    assert [by_name["city", f"city{n}"].tally for n in range(2)] == singles
    low, high = by_name["pooled", "all"].intervals["building_f1"]
    assert low <= by_name["pooled", "all"].scores["building_f1"] <= high
    assert {it.name for it in (tmp_path / "out").iterdir()} == {"city0.gpkg", "city1.gpkg"}
    with pytest.raises(UserError, match="2 runs and 1 truths"):
        evaluate_runs(runs, truths[:1], tmp_path / "out")
    with pytest.raises(UserError, match="different names"):
        evaluate_runs([runs[0], runs[0]], truths, tmp_path / "out")


def test_a_pattern_that_is_none_or_finds_nothing_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, 0)
    for pattern, says in (("(", "not a regular expression"), ("austin", "finds nothing in the image name mask")):
        with pytest.raises(UserError, match=says):
            evaluate_runs([case.run], [case.truth], tmp_path / "out", group=pattern)
