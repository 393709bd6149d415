"""Comparing trainings: figures are those that the trainings left, and crops show what their bundles predict."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import from_origin
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segpipe.models.weights import METADATA_KEY, load_bundle, save_bundle
from segpipe.pipeline.cli import main
from segpipe.pipeline.compare import compare_runs, differences, group, read_trainings
from segpipe.pipeline.compare_figures import GAP_PX, LEAST_WIDE_PX, TITLE_PX, find_crops, green, predict_view
from segpipe.pipeline.config import load_train
from segpipe.pipeline.train import train
from segpipe.tasks.errors import UserError
from segpipe.tasks.sample import cut

pytestmark = pytest.mark.usefixtures("signals")

NETWORK = "test_compare:Tiny"
FIT = {
    "epochs": 3,
    "steps_per_epoch": 2,
    "crop_px": 64,
    "batch": 2,
    "loaders": 0,
    "precision": "float32",
    "learning_rate": 0.01,
}


class Tiny(nn.Module):
    """An encoder of 3 * width * 9 + width parameters, and a head of width + 1."""

    stride = 1

    def __init__(self, bands: int = 3, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(bands, width, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Same H and W."""
        logits: Tensor = self.head(self.encoder(image))
        return logits


def write_area(folder: Path, name: str, seed: int) -> None:
    """Bright houses on dark ground, with a column of pixels that have no imagery."""
    rng = np.random.default_rng(seed)
    label = np.zeros((400, 700), np.uint8)
    for row, col in rng.integers(2, (370, 650), (120, 2)).tolist():
        label[row : row + 14, col : col + 21] = 255
    image = (np.where(label, 190, 70) + rng.integers(-30, 30, (3, 400, 700))).astype(np.uint8)
    place = from_origin(500_000.1, 4_000_000.2, 0.3, 0.3)
    for kind, array in (("image", image), ("mask", label[None])):
        with rasterio.open(
            folder / f"{name}_{kind}.tif",
            "w",
            driver="GTiff",
            height=400,
            width=700,
            count=len(array),
            dtype="uint8",
            crs="EPSG:32633",
            transform=place,
        ) as file:
            file.write(array)


def write_pets(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        mask = np.zeros((80 + number, 90), np.uint8)
        mask[20:50, 10:60] = 255
        image = (np.where(mask, 200, 60)[..., None] + rng.integers(-20, 20, (*mask.shape, 3))).astype(np.uint8)
        Image.fromarray(image).save(folder / f"pet{number}.jpg")
        Image.fromarray(mask).save(folder / f"pet{number}_truth.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trainings unet-seed0, unet-seed1, frozen, and of pairs pets, each in a folder runs/NAME."""
    folder = tmp_path_factory.mktemp("trained")
    write_area(folder, "a", 0)
    write_area(folder, "b", 1)
    write_pets(folder)
    areas = {
        "areas": [{"images": "a_image.tif", "labels": "a_mask.tif"}],
        "validate": [{"images": "b_image.tif", "labels": "b_mask.tif"}],
    }
    pairs = {
        "pairs": {"images": "pet*.jpg", "masks": "{stem}_truth.png", "resize_px": [64, 64]},
        "split": {"validate": 2, "test": 2},
        "augment": "none",
    }
    network: dict[str, Any] = {"name": NETWORK}
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("unet-seed0", areas),
        ("unet-seed1", areas | {"fit": FIT | {"seed": 1}}),
        ("frozen", areas | {"network": network | {"freeze_encoder": True}, "calibrate": "none"}),
        ("pets", pairs | {"fit": FIT | {"loss": "dice", "best_by": "soft_dice"}}),
    ]
    for name, changes in jobs:
        file = folder / f"{name}.yaml"
        settings = {"name": name, "network": network, "fit": FIT, "output": f"runs/{name}"} | changes
        file.write_text(yaml.safe_dump(settings))
        train(load_train(file), Console(quiet=True))
    return folder / "runs"


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_figures_are_those_that_each_training_left(trained: Path, tmp_path: Path) -> None:
    names = ["unet-seed0", "unet-seed1", "frozen", "pets"]
    compare_runs([trained / name for name in names], tmp_path)
    rows = {row["run"]: row for row in rows_of(tmp_path / "runs.csv")}
    assert list(rows) == names
    for name, row in rows.items():
        metrics: dict[str, Any] = load_bundle(trained / name / "model.safetensors", NETWORK).card.metrics
        epochs = [{key: float(value) for key, value in it.items()} for it in rows_of(trained / name / "metrics.csv")]
        best = epochs[metrics["epoch"] - 1]
        for part in ("validation", "test"):
            for score, column in (
                ("iou", "iou_pooled"),
                ("dice", "dice_pooled"),
                ("accuracy", "accuracy_pooled"),
                ("soft_iou", "soft_iou_batches"),
                ("soft_dice", "soft_dice_batches"),
                ("soft_accuracy", "soft_accuracy_batches"),
                ("mean_iou", "iou_at_half_batches"),
                ("image_dice", "dice_images"),
                ("image_accuracy", "accuracy_images"),
            ):
                told = row[f"{part}_{column}"]
                assert told == (str(metrics[part][score]) if part in metrics else "")
        assert float(row["gap"]) == pytest.approx(best["validation_loss"] - best["train_loss"])
        assert float(row["seconds"]) == pytest.approx(
            sum(it["train_seconds"] + it["validation_seconds"] for it in epochs)
        )
        enough = [
            it["epoch"] for it in epochs if it["validation_iou"] >= 0.95 * max(e["validation_iou"] for e in epochs)
        ]
        assert float(row["epochs_to_95_percent"]) == enough[0]
        assert float(row["best_epoch"]) == best["epoch"]
    assert {name: row["seed"] for name, row in rows.items()} == dict(zip(names, "0100", strict=True))
    # Of 4 filters of 3 x 3 on 3 bands and their biases, and a head of 4 weights and a bias.
    assert {row["parameters"] for row in rows.values()} == {"117"}
    assert [row["trained_parameters"] for row in rows.values()] == ["117", "117", "5", "117"]
    assert [row["encoder_frozen"] for row in rows.values()] == ["no", "no", "yes", "no"]
    by_area = load_bundle(trained / "pets" / "model.safetensors", NETWORK).card.metrics["test"]
    assert isinstance(by_area, dict) and isinstance(by_area["iou_by_area"], dict)
    mean = statistics.fmean(float(str(value)) for value in by_area["iou_by_area"].values())
    assert float(rows["pets"]["test_iou_images"]) == pytest.approx(mean, abs=2e-4)


def test_means_and_deviations_are_over_trainings_that_differ_only_in_their_seed(trained: Path, tmp_path: Path) -> None:
    compare_runs([trained / name for name in ("unet-seed1", "frozen", "unet-seed0")], tmp_path)
    rows = {row["run"]: row for row in rows_of(tmp_path / "runs.csv")}
    means = {row["group"]: row for row in rows_of(tmp_path / "means.csv")}
    assert {name: row["runs"] for name, row in means.items()} == {"unet": "2", "frozen": "1"}
    for column in ("validation_iou_pooled", "validation_soft_dice_batches", "gap", "seconds", "best_epoch"):
        values = np.array([float(rows[f"unet-seed{seed}"][column]) for seed in (0, 1)])
        assert float(means["unet"][column]) == pytest.approx(values.mean())
        assert float(means["unet"][f"{column}_deviation"]) == pytest.approx(values.std(ddof=1))
        assert means["frozen"][column] == rows["frozen"][column]
        assert means["frozen"][f"{column}_deviation"] == ""
    text = (tmp_path / "compare.md").read_text()
    assert f"{float(means['unet']['validation_iou_pooled']):.4f} ± " in text


def test_another_setting_than_the_seed_makes_another_group(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained / "unet-seed1", other)
    settings = yaml.safe_load((other / "train.yaml").read_text())
    settings["fit"]["learning_rate"] = 0.02
    (other / "train.yaml").write_text(yaml.safe_dump(settings))
    groups = group(read_trainings([trained / "unet-seed0", trained / "unet-seed1", other]))
    assert [len(it.trainings) for it in groups] == [2, 1]


def test_every_score_is_told_with_its_protocol_and_what_cannot_be_compared_too(trained: Path, tmp_path: Path) -> None:
    names = ("unet-seed0", "unet-seed1", "pets")
    compare_runs([trained / name for name in names], tmp_path)
    text = (tmp_path / "compare.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("|  | threshold")]
    assert len(heads) == 4, "validation and test, of means and of each training"
    for head in heads:
        scores = [cell.strip() for cell in head.strip("|").split("|")][2:]
        assert scores
        assert all(cell.endswith(("(pooled)", "(mean over batches)", "(mean over images)")) for cell in scores)
    told = differences(read_trainings([trained / name for name in names]))
    assert len(told) == 3
    assert all("in pets than in unet-seed0" in line and line in text for line in told)
    assert not differences(read_trainings([trained / "unet-seed0", trained / "frozen"]))


def cells(sheet: NDArray[np.uint8], shapes: list[tuple[int, ...]], columns: int) -> list[list[NDArray[np.uint8]]]:
    """The pictures on the sheet of crops, row by row: two rows a crop of each shape."""
    found, top, wide = [], TITLE_PX, max(LEAST_WIDE_PX, *(shape[1] for shape in shapes))
    for height, width in (shape for shape in shapes for _ in range(2)):
        lefts = [column * (wide + GAP_PX) for column in range(columns)]
        found.append([sheet[top : top + height, left : left + width] for left in lefts])
        top += height + GAP_PX
    assert top - GAP_PX == len(sheet)
    return found


@pytest.mark.parametrize("first", ["unet-seed0", "pets"])
def test_crops_show_truth_masks_and_probabilities_as_the_bundles_predict_them(
    trained: Path, tmp_path: Path, first: str
) -> None:
    names = [first, "frozen"]
    compare_runs([trained / name for name in names], tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "crops.png"))
    bundles = [load_bundle(trained / name / "model.safetensors", NETWORK) for name in names]
    views = find_crops(load_train(trained / first / "train.yaml"), trained / first, bundles[0].card)
    assert len(views) == 2
    assert views[0].area.name != views[1].area.name or not views[0].core.intersect(views[1].core).pixels
    assert all(view.area.whole.contains(view.core) for view in views)
    shown = cells(sheet, [view.core.shape_yx for view in views], 3)
    for view, upper, lower in zip(views, shown[::2], shown[1::2], strict=True):
        image_CHW, label_HW, _ = cut(view.area, view.core)
        assert 0.05 < label_HW.mean() < 0.95
        image = np.moveaxis(image_CHW, 0, 2)
        assert np.array_equal(upper[0], green(image, label_HW != 0))
        assert np.array_equal(lower[0], image)
        for column, bundle in enumerate(bundles, start=1):
            # The whole area at once is the oracle: what is seen of it must not depend on the crop.
            whole_CHW, _, there_HW = cut(view.area, view.area.whole)
            prob_HW = bundle.predict(np.moveaxis(whole_CHW, 0, 2), there_HW != 0)[view.core.within(view.area.whole)]
            assert np.abs(lower[column] - prob_HW[..., None] * 255).max() <= 0.51
            level = np.ceil(250 * bundle.card.threshold)
            clear_HW = np.abs(prob_HW * 250 - (level - 0.5)) > 1e-3
            painted = green(image, prob_HW * 250 >= level - 0.5)
            assert np.array_equal(upper[column][clear_HW], painted[clear_HW])


def test_green_is_seen_where_the_mask_is_and_nowhere_else() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    mask = np.arange(72).reshape(9, 8) % 3 == 0
    painted = green(image, mask).astype(int)
    assert np.array_equal(painted[~mask], image[~mask])
    assert (painted[mask][:, 1] >= painted[mask][:, [0, 2]].max(axis=1)).all()


def test_a_bundle_of_resized_images_sees_the_crop_alone_and_answers_at_its_size(trained: Path) -> None:
    bundle = load_bundle(trained / "pets" / "model.safetensors", NETWORK)
    card = load_bundle(trained / "frozen" / "model.safetensors", NETWORK).card
    views = find_crops(load_train(trained / "frozen" / "train.yaml"), trained / "frozen", card)
    image_CHW, _, valid_HW = cut(views[0].area, views[0].core)
    prob_HW = predict_view(bundle, views[0])
    assert np.array_equal(prob_HW, bundle.predict(np.moveaxis(image_CHW, 0, 2), valid_HW != 0), equal_nan=True)


def segpipe(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_tells_what_it_found_and_where_it_is(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = segpipe("compare", trained / "unet-seed0", trained / "unet-seed1", "--output", out)
    assert found.exit_code == 0, found.stderr
    assert "unet (2 seeds): IoU 0." in found.stdout and str(out / "compare.md") in found.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.md",
        "crops.png",
        "curves.png",
        "means.csv",
        "runs.csv",
    ]
    with Image.open(out / "curves.png") as picture:
        assert min(picture.size) > 500


def test_without_its_imagery_the_tables_are_made_and_the_crops_left_out(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained / "unet-seed0", moved)
    shutil.rmtree(moved / "areas")
    told = compare_runs([moved], tmp_path / "out")
    assert any(line.startswith("no crops: ") and "areas" in line for line in told)
    assert not (tmp_path / "out" / "crops.png").exists()
    assert "crops.png" not in (tmp_path / "out" / "compare.md").read_text()
    assert not (moved / "areas").exists()


def not_done(folder: Path) -> None:
    (folder / "report.html").unlink()


def other_network(folder: Path) -> None:
    settings = yaml.safe_load((folder / "train.yaml").read_text())
    settings["network"]["name"] = "unet11"
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))


def other_metrics(folder: Path) -> None:
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text(lines[0] + "\n")


def no_numbers(folder: Path) -> None:
    (folder / "metrics.csv").write_text((folder / "metrics.csv").read_text().replace("1,", "one,"))


def no_scores(folder: Path) -> None:
    bundle = load_bundle(folder / "model.safetensors", NETWORK)
    save_bundle(folder / "model.safetensors", bundle.network, bundle.card.model_copy(update={"metrics": {}}))


def damaged_split(folder: Path) -> None:
    (folder / "split.json").write_text(json.dumps({"validate": []})[:-3])


BAD: list[tuple[Callable[[Path], None], str]] = [
    (not_done, "not done"),
    (other_network, "train.yaml is of unet11"),
    (other_metrics, "not those of metrics.csv"),
    (no_numbers, "not as `segpipe train` leaves it"),
    (no_scores, "not those of metrics.csv"),
    (damaged_split, "not as `segpipe train` leaves it"),
]


@pytest.mark.parametrize(("damage", "words"), BAD)
def test_a_folder_that_is_no_finished_training_is_refused_in_one_line(
    trained: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(trained / "frozen", bad)
    damage(bad)
    found = segpipe("compare", trained / "unet-seed0", bad, "--output", tmp_path / "out")
    assert found.exit_code == 2
    assert len(found.stderr.splitlines()) == 1 and words in found.stderr and "bad" in found.stderr
    assert not (tmp_path / "out").exists()


def test_no_bundle_decides_what_code_runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained / "frozen", tmp_path / "bad")
    (tmp_path / "planted.py").write_text("from test_compare import Tiny\n")
    monkeypatch.syspath_prepend(tmp_path)
    bundle = tmp_path / "bad" / "model.safetensors"
    own = {"architecture": "planted:Tiny", "module": "planted:Tiny"}
    card = load_bundle(bundle, NETWORK).card.model_copy(update=own)
    save_file(load_file(bundle), bundle, {METADATA_KEY: card.model_dump_json()})
    with pytest.raises(UserError, match=r"of test_compare:Tiny, and model\.safetensors of planted:Tiny"):
        read_trainings([tmp_path / "bad"])
    assert "planted" not in sys.modules


def test_looking_for_crops_leaves_the_chunks_of_a_training_as_they_are(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "pets", tmp_path / "pets")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    card = load_bundle(trained / "pets" / "model.safetensors", NETWORK).card
    other = load_train(trained / "pets" / "train.yaml", ["pairs.resize_px=[80, 80]"])
    with pytest.raises(UserError, match="not made from the files"):
        find_crops(other, tmp_path / "pets", card)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_not_there_or_named_twice_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training"):
        compare_runs([tmp_path / "absent"], tmp_path / "out")
    with pytest.raises(UserError, match="named twice"):
        compare_runs([trained / "frozen", trained / "frozen" / ".." / "frozen"], tmp_path / "out")
