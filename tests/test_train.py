"""Training from a train.yaml to a bundle: the whole story on tiny data, and what is refused before it."""

import csv
import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from PIL import Image
from rasterio.transform import from_origin
from rich.console import Console

from segpipe.models.augment import Augmentation, Framing, Normalisation, prepare
from segpipe.models.field import Field, probe_field
from segpipe.models.losses import resolve_loss
from segpipe.models.networks import build_network
from segpipe.models.weights import Reach, load_bundle
from segpipe.pipeline import job as job_module
from segpipe.pipeline import train as story
from segpipe.pipeline.config import load_train
from segpipe.pipeline.job import Batches, plan_job, resolve_augmentation, resolve_normalisation
from segpipe.pipeline.measure import Eye, View, effective_halo, look, measure, plan_views
from segpipe.pipeline.sources import plan_sources, read_sources
from segpipe.pipeline.train import train
from segpipe.tasks.errors import RunError, StorageError, UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.sample import Area, CropSampler

PX_M = 0.3
RECIPES = sorted((Path(__file__).parent.parent / "conf" / "train").glob("*.yaml"))
CPU = torch.device("cpu")


def draw(height, width, seed):
    """Bright houses on dark ground: image_CHW and label_HW, 0 or 255."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    for row, col in rng.integers(2, (height - 30, width - 30), (height * width // 1500, 2)).tolist():
        label[row : row + 14, col : col + 21] = 255
    image = np.where(label, 190, 70) + rng.integers(-30, 30, (3, height, width))
    return image.astype(np.uint8), label


def write_raster(path, array_CHW, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array_CHW.shape
    place = {"crs": "EPSG:32633", "transform": from_origin(500_000.1, 4_000_000.2, PX_M, PX_M)}
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype="uint8", **(place | profile)
    ) as file:
        file.write(array_CHW)


LEAST = {
    "name": "tiny",
    "areas": [{"images": "a_image.tif", "labels": "a_mask.tif"}],
    "validate": [{"images": "b_image.tif", "labels": "b_mask.tif"}],
    "network": {"name": "unet-mobilenetv2"},
    "fit": {
        "epochs": 2,
        "steps_per_epoch": 1,
        "crop_px": 64,
        "batch": 2,
        "loaders": 0,
        "precision": "float32",
        "validate_px": 64,
    },
    "output": "run",
}


@pytest.fixture
def job(tmp_path):
    """A folder with two labelled areas, and a function that gives a train.yaml for two steps on them."""
    for seed, (name, *shape) in enumerate((("a", 130, 150), ("b", 90, 100))):
        image, label = draw(*shape, seed)
        write_raster(tmp_path / f"{name}_image.tif", image)
        write_raster(tmp_path / f"{name}_mask.tif", label[None])

    def configured(*overrides, **changes):
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(LEAST | changes))
        return load_train(tmp_path / "train.yaml", overrides)

    return tmp_path, configured


quiet = partial(Console, quiet=True)
LIGHT = {"network": {"name": "own_networks:everywhere", "initialisation": "default"}}
"""A network of one layer, for what has nothing to do with the network."""


def test_training_gives_a_bundle_with_all_that_run_needs_and_is_not_done_twice(job):
    folder, configured = job
    model = train(configured(), quiet())
    bundle = load_bundle(model)
    card, metrics = bundle.card, bundle.card.metrics
    assert model == folder / "run" / "model.safetensors"
    assert (card.halo_px, card.effective_halo_px, card.stride) == (320, 320, 32)
    assert card.resolution_m == pytest.approx(0.3, abs=0.001)
    assert card.temperature != 1.0
    assert metrics["calibration_error"]["after"] <= metrics["calibration_error"]["before"] + 1e-3
    with (folder / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    best = max(rows, key=lambda row: (float(row["validation_iou"]), int(row["epoch"])))
    assert metrics["epoch"] == int(best["epoch"])
    # The temperature and a finer choice of the threshold move the mask by next to nothing.
    assert metrics["validation"]["iou"] == pytest.approx(float(best["validation_iou"]), abs=0.02)
    page = (folder / "run" / "report.html").read_text()
    assert page.count("<svg") == 5 and page.count("data:image/jpeg") >= 3
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert json.loads((folder / "run" / "split.json").read_text())["validate"] == ["b_image"]
    first, chunks = model.read_bytes(), stamps(folder / "run" / "areas")
    train(configured(), quiet())
    assert model.read_bytes() == first
    (folder / "run" / "report.html").unlink()
    train(configured(), quiet())
    assert model.read_bytes() == first, "the end comes out the same if it is done again"
    assert chunks and stamps(folder / "run" / "areas") == chunks


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("c/*/*")}


def test_another_training_in_the_same_folder_is_refused(job):
    folder, configured = job
    (folder / "run").mkdir()
    (folder / "run" / "train.yaml").write_text("name: other\n")
    with pytest.raises(UserError, match="another training"):
        train(configured(), quiet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"areas": [], "validate": []}, "expected `areas:`, `inria:` or `pairs:`"),
        ({"validate": []}, "validate: missing"),
        ({"split": {"validate": 0.5}}, "both are given"),
        ({"network": {"name": "unet-large"}}, "unet-mobilenetv2"),
        ({"network": {"name": "unet-mobilenetv2", "args": {"depth": 9}}}, "depth"),
        ({"network": {"name": "unet-mobilenetv2", "initialisation": "a_image.tif"}}, r"a_image\.tif"),
        ({"network": {"name": "nowhere.at_all:Net"}}, "nowhere"),
        ({"fit": {"loss": "focal"}}, "expected bce-jaccard"),
        ({"fit": {"args": {"gamma": 2}}}, "gamma"),
        ({"fit": LEAST["fit"] | {"warmup_steps": 2}}, "warmup_steps 2 of 2 steps"),
        ({"augment": {"zoom": 3}}, r"augment\.zoom: unknown key"),
        ({"augment": {"gain": [0, 1.1]}}, "augment: gain"),
        ({"network": {"name": "unet-mobilenetv2", "args": {"bands": 4}}}, r"network\.args: bands .*`bands:`"),
        ({"network": {"name": "unet-mobilenetv2", "args": {"classes": 2}}}, r"network\.args: classes"),
        ({"normalisation": {"mean": [0.5], "std": [0.2]}}, "expected 3"),
        ({"bands": [1, 2]}, "imagenet has 3 bands"),
        (
            {"areas": [{"images": "a_image.tif", "labels": "a_image.tif", "foreground": [1], "background": [0]}]},
            "values",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(job, changes, message):
    folder, configured = job
    with pytest.raises(UserError, match=message) as caught:
        train(configured(**changes), quiet())
    assert "\n" not in str(caught.value)
    assert message == "values" or not (folder / "run").exists(), "before any work"


@pytest.mark.parametrize("changed", ["areas", "pairs"])
def test_a_training_neither_goes_on_nor_is_done_once_its_images_or_labels_are_others(job, changed):
    folder, configured = job
    changes = dict(LIGHT)
    if changed == "pairs":
        for n in range(3):
            write_pair(folder, n, n)
        pairs = {"images": "images/*.png", "masks": "masks/{stem}.png"}
        changes |= {"areas": [], "validate": [], "pairs": pairs, "split": {"validate": 1}}
    train(configured(**changes), quiet())
    chunks = stamps(folder / "run" / "areas")
    if changed == "pairs":
        write_pair(folder, 1, 9)
    else:
        write_raster(folder / "a_mask.tif", draw(130, 150, 9)[1][None])
    with pytest.raises(UserError, match=r"of other images or labels.*another `output:`") as caught:
        train(configured(**changes), quiet())
    assert "\n" not in str(caught.value)
    (folder / "run" / "report.html").unlink()
    with pytest.raises(UserError, match="of other images or labels"):
        train(configured(**changes), quiet())
    assert chunks and stamps(folder / "run" / "areas") == chunks
    (folder / "run" / "basis.json").unlink()
    train(configured(**changes), quiet())
    assert (folder / "run" / "report.html").exists(), "a folder of an older version goes on"


def write_pair(folder, number, seed):
    image, label = draw(96, 110, seed)
    for kind, pixels in (("images", image.transpose(1, 2, 0)), ("masks", label)):
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"p{number}.png")


def test_labels_that_are_mended_before_the_first_step_are_no_other_training(job):
    folder, configured = job
    mask = (folder / "a_mask.tif").read_bytes()
    write_raster(folder / "a_mask.tif", np.zeros((1, 130, 150), np.uint8))
    with pytest.raises(UserError, match="none of 1 has a building pixel"):
        train(configured(**LIGHT), quiet())
    (folder / "a_mask.tif").write_bytes(mask)
    train(configured(**LIGHT), quiet())


def test_a_training_does_not_go_on_with_another_precision_than_auto_was_at_first_but_stays_done(job, monkeypatch):
    folder, configured = job
    changes = LIGHT | {"fit": LEAST["fit"] | {"precision": "auto"}}
    monkeypatch.setattr(job_module, "fast_bfloat16", lambda device: False)
    train(configured(**changes), quiet())
    monkeypatch.setattr(job_module, "fast_bfloat16", lambda device: True)
    train(configured(**changes), quiet())
    (folder / "run" / "report.html").unlink()
    with pytest.raises(UserError, match=r"precision was float32, and is bfloat16.*another `output:`"):
        train(configured(**changes), quiet())


def test_another_number_of_processes_that_read_is_the_same_training_and_another_batch_is_not(job):
    folder, configured = job
    model = train(configured(**LIGHT), quiet()).read_bytes()
    console = Console(record=True, file=(folder / "log").open("w"), width=200)
    train(configured("fit.loaders=1", "readers=1", **LIGHT), console)
    assert "trained already" in console.export_text()
    assert (folder / "run" / "model.safetensors").read_bytes() == model
    with pytest.raises(UserError, match="another training"):
        train(configured("fit.batch=3", **LIGHT), quiet())


@pytest.mark.parametrize("part", ["validate", "test"])
def test_central_crops_without_a_label_are_refused_before_the_first_step(job, part):
    folder, configured = job
    image, label = draw(300, 300, 3)
    label[100:200, 100:200] = 7
    write_raster(folder / "c_image.tif", image)
    write_raster(folder / "c_mask.tif", label[None])
    changes = LIGHT | {part: [{"images": "c_image.tif", "labels": "c_mask.tif", "ignore": [7]}]}
    with pytest.raises(UserError, match=rf"fit\.validate_px: 64 .*{part}.*c_image.*a larger one, or all") as caught:
        train(configured(**changes), quiet())
    assert "\n" not in str(caught.value)
    assert not (folder / "run" / "split.json").exists()
    train(configured("fit.validate_px=150", **changes), quiet())


def test_the_first_weights_of_an_own_network_come_from_the_seed(job):
    _, configured = job

    def weights(seed):
        return story.new_network(configured(f"fit.seed={seed}", **LIGHT)).get_parameter("own.weight")

    torch.manual_seed(1)
    first = weights(5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(weights(5), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weights(6), first)


@pytest.mark.parametrize(
    ("body", "changes", "message"),
    [
        ("def net():\n    return nn.Conv2d(3, 1, 2, stride=2)\n", "network", "network: .*logits"),
        ("def net():\n    return nn.Conv2d(5, 1, 1)\n", "network", "network: .*RuntimeError.*channels"),
        ("def net(:\n", "network", "network: .*cannot be imported.*SyntaxError"),
        ("1 / 0\n", "network", "network: .*cannot be imported.*ZeroDivisionError"),
        ("def net(:\n", "loss", r"fit\.loss: .*cannot be imported.*SyntaxError"),
    ],
)
def test_mistakes_in_a_users_own_code_are_told_in_one_line(job, request, body, changes, message):
    folder, configured = job
    module = f"mistake{abs(hash(request.node.name))}"
    (folder / f"{module}.py").write_text(f"from torch import nn\n\n{body}")
    name = f"{module}:net"
    with pytest.raises(UserError, match=message) as caught:
        train(configured(**({"network": {"name": name}} if changes == "network" else {"fit": {"loss": name}})), quiet())
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists(), "before any work"


def test_areas_without_any_building_are_refused_and_one_among_others_is_told_of(job):
    folder, configured = job
    write_raster(folder / "a_mask.tif", np.zeros((1, 130, 150), np.uint8))
    with pytest.raises(UserError, match="none of 1 has a building pixel"):
        train(configured(), quiet())
    write_raster(folder / "b_mask.tif", draw(90, 100, 1)[1][None])
    areas = [{"images": f"{name}_image.tif", "labels": f"{name}_mask.tif"} for name in "ab"]
    console = Console(record=True, file=(folder / "log").open("w"), width=200)
    train(configured("output=other", areas=areas), console)
    assert "no building in a_image" in console.export_text()


def test_a_loss_that_is_no_number_stops_and_the_user_is_told_the_batch(job):
    folder, configured = job
    (folder / "broken_loss.py").write_text(
        "def broken(logits, target, valid, after):\n    return logits.sum() * float('nan')\n"
    )
    fit = LEAST["fit"] | {"loss": "broken_loss:broken", "args": {"after": 3}}
    with pytest.raises(RunError, match="batch 0"):
        train(configured(fit=fit), quiet())


def test_a_network_of_the_users_own_is_trained_and_named_in_the_card(job):
    folder, configured = job
    (folder / "my_networks.py").write_text(
        "from torch import nn\n\n\nclass Tiny(nn.Sequential):\n    stride = 4\n\n"
        "    def __init__(self, width):\n        super().__init__(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),"
        " nn.Conv2d(width, 1, 1))\n"
    )
    model = train(configured(network={"name": "my_networks:Tiny", "args": {"width": 4}}), quiet())
    bundle = load_bundle(model, allowed_module="my_networks:Tiny")
    assert bundle.card.module == "my_networks:Tiny" and bundle.card.arguments["width"] == 4


def test_a_training_whose_folder_another_one_has_by_now_ends_and_writes_no_bundle(job):
    folder, configured = job
    lock = folder / "run" / "lock.json"

    class Sleeper(Console):
        def print(self, *parts, **style):
            if str(parts[0]).startswith("epoch 1:"):
                lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "another"}))

    with pytest.raises(StorageError, match="another run is at work here"):
        train(configured(), Sleeper(quiet=True))
    assert not (folder / "run" / "model.safetensors").exists()
    assert json.loads(lock.read_text())["token"] == "another"


def test_a_training_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(job):
    folder, configured = job
    (folder / "stopped_loss.py").write_text(
        "from pathlib import Path\n\nimport torch.nn.functional as F\n\nstop = Path(__file__).with_name('stop')\n\n\n"
        "def stopped(logits, target, valid):\n"
        "    if logits.requires_grad and stop.exists() and stop.read_text() == 'x':\n"
        "        raise KeyboardInterrupt\n"
        "    if logits.requires_grad and stop.exists():\n"
        "        stop.write_text(stop.read_text()[1:])\n"
        "    return F.binary_cross_entropy_with_logits(logits, target)\n"
    )
    (folder / "two_layers.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1)\n"
        "    module = nn.Sequential(*layers)\n    module.stride = 4\n    return module\n"
    )
    changes = {
        "network": {"name": "two_layers:net"},
        "fit": LEAST["fit"] | {"epochs": 3, "steps_per_epoch": 2, "loss": "stopped_loss:stopped"},
    }
    whole = train(configured("output=whole", **changes), quiet()).read_bytes()
    (folder / "stop").write_text("xxxx")
    with pytest.raises(KeyboardInterrupt):
        train(configured("output=stopped", **changes), quiet())
    assert not (folder / "stopped" / "model.safetensors").exists()
    (folder / "stop").unlink()
    assert train(configured("output=stopped", **changes), quiet()).read_bytes() == whole


@pytest.mark.parametrize(("device", "processors", "loaders"), [("cpu", 2, 0), ("cpu", 16, 8), ("cuda", 2, 1)])
def test_a_network_on_a_small_cpu_shares_it_with_no_loader(job, monkeypatch, device, processors, loaders):
    _, configured = job
    monkeypatch.setattr(job_module, "resolve_device", lambda: torch.device(device))
    monkeypatch.setattr(job_module, "fast_bfloat16", lambda device: False)
    monkeypatch.setattr(job_module, "allowance", lambda: (processors, 2**34))
    assert job_module.resolve_settings(configured("fit.loaders=auto"), 10).loaders == loaders
    assert job_module.resolve_settings(configured("fit.loaders=3"), 10).loaders == 3


def test_what_goes_to_loaders_and_to_processes_of_devices_can_be_sent(job):
    folder, configured = job
    config = configured()
    sources = plan_sources(config, folder / "areas")
    read_sources(sources, 1, quiet())
    network = build_network("unet-mobilenetv2")
    decided = plan_job(config, network, sources, Field(Reach(0, 0, 0, 0), 0))
    for value in (decided.crops, decided.views):
        assert pickle.loads(pickle.dumps(value)) == value
    ours, theirs = decided.crops[3], pickle.loads(pickle.dumps(decided.crops))[3]
    assert torch.equal(ours["image_BCHW"], theirs["image_BCHW"]) and ours["seed"] == theirs["seed"]


# What a batch is


def small_areas(count, side=70):
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 256, (3, side, side), np.uint8) for _ in range(count)]
    return [Area.of_arrays(f"a{n}", it, it[0] % 2, np.ones((side, side), np.uint8)) for n, it in enumerate(images)]


def test_the_same_number_is_the_same_batch_and_an_epoch_takes_each_pair_once():
    areas = small_areas(5)
    batches = Batches(CropSampler(areas, 70), 2, 7, "once", per_epoch=3)
    firsts = [
        [int(image[0, 0, 0]) * 1000 + int(image[1, 0, 0]) for image in batches[n]["image_BCHW"]] for n in range(6)
    ]
    own = sorted(int(area.image[0, 0, 0]) * 1000 + int(area.image[1, 0, 0]) for area in areas)
    for epoch in (firsts[:3], firsts[3:]):
        assert sorted(value for batch in epoch for value in batch) == own
    assert firsts[:3] != firsts[3:]
    for order in ("weighted", "replacement", "once"):
        again = Batches(CropSampler(areas, 64), 2, 7, order, 3)
        one, other = again[4], again[4]
        assert all(torch.equal(one[key], other[key]) for key in ("image_BCHW", "label_BHW", "valid_BHW"))
        assert one["seed"] == other["seed"] != again[5]["seed"]


@pytest.mark.parametrize(("name", "crop_px"), [("unet-valid", 64), ("unet-valid", 68), ("unet-mobilenetv2", 80)])
def test_what_is_scored_in_training_is_the_crop_with_its_real_surroundings(name, crop_px):
    network = build_network(name)
    (area,) = small_areas(1, 400)
    framing = Framing((crop_px, crop_px), network.border_px, network.stride, network.remainder_px)
    batches = Batches(CropSampler([area], crop_px, framing.border_px), 2, 0, "weighted", 1)
    raw = batches[0]
    batch = prepare(raw, CPU, framing, Normalisation(1.0, (0.0,) * 3, (1.0,) * 3), None)
    assert (batch.image_BCHW.shape[2] - network.remainder_px) % network.stride == 0
    assert batch.target_BKHW.shape[2] == batch.image_BCHW.shape[2] - 2 * network.border_px
    assert int(batch.valid_BHW.sum()) == 2 * crop_px**2, "scored on its own pixels"
    scored = batch.image_BCHW[..., network.border_px :, network.border_px :][..., :crop_px, :crop_px]
    assert torch.equal(batch.target_BKHW[..., :crop_px, :crop_px], scored[:, :1] % 2)


def test_statistics_are_those_of_all_labelled_pixels(job):
    _, configured = job
    areas = small_areas(3)
    parts = [area.part(area.name, keep=[Window(0, 0, 70, 40)]) for area in areas]
    found = resolve_normalisation(configured(normalisation="statistics"), parts)
    pixels = np.concatenate([area.image[:, :, :40].reshape(3, -1) for area in areas], axis=1) / 255
    assert found.mean == pytest.approx(pixels.mean(axis=1), abs=1e-5)
    assert found.std == pytest.approx(pixels.std(axis=1), abs=1e-5)
    assert resolve_normalisation(configured(normalisation="unit"), ()).std == (1.0, 1.0, 1.0)
    assert resolve_augmentation(configured(augment="none")) is None
    assert resolve_augmentation(configured(augment={"scale": [1, 1]})) == Augmentation(scale=(1, 1))


# How it is measured


class Local(torch.nn.Module):
    """A probability from the mean of (2 r + 1) squared pixels: its field is r px. Stands in for a network."""

    stride, border_px, remainder_px = 8, 0, 0

    def __init__(self, radius):
        super().__init__()
        self.radius = radius
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, image_BCHW):
        side, pool = 2 * self.radius + 1, torch.nn.functional.avg_pool2d
        mean = pool(pool(image_BCHW[:, :1], (side, 1), 1, (self.radius, 0)), (1, side), 1, (0, self.radius))
        return (mean - 0.5) * 40 * self.scale


UNIT = Normalisation(255.0, (0.0,) * 3, (1.0,) * 3)


def test_measuring_in_cores_gives_the_counts_of_one_pass_over_the_whole():
    image, label = draw(1100, 1300, 4)
    valid = np.ones(label.shape, np.uint8)
    valid[500:560, 700:] = 0
    area = Area.of_arrays("a", image * valid, label // 255, valid)
    eye = Eye(Local(9), UNIT, 16, CPU, "float32")
    loss = resolve_loss("bce", {})
    scores = measure(eye, plan_views([area], None), 4, loss)
    with torch.no_grad():
        whole = torch.sigmoid(eye.logits((image * valid)[None], valid[None] != 0)[0]).numpy()
    for threshold in (0.3, 0.5, 0.8):
        found, mask = scores.histogram.at(threshold), np.round(whole * 250) >= np.ceil(250 * threshold)
        truth, keep = label != 0, valid != 0
        assert (found.true_positive, found.false_positive) == (
            (mask & truth & keep).sum(),
            (mask & ~truth & keep).sum(),
        )
    padded = np.pad(valid, 64)
    edge = sum(
        int(valid[row, col])
        for row, col in np.argwhere(valid)[::1009]
        if not padded[row : row + 129, col : col + 129].all()
    )
    everywhere = len(np.argwhere(valid)[::1009])
    share = (scores.edge.positive.sum() + scores.edge.negative.sum()) / valid.sum()
    assert float(share) == pytest.approx(edge / everywhere, abs=0.03)


def test_soft_scores_and_the_loss_are_means_over_batches_of_windows_of_any_size():
    areas = [draw(height, 96, seed) for seed, height in enumerate((70, 96, 80, 90, 96))]
    areas = [Area.of_arrays(f"a{n}", it, label // 255, np.ones_like(label)) for n, (it, label) in enumerate(areas)]
    eye, loss = Eye(Local(4), UNIT, 8, CPU, "float32"), resolve_loss("dice", {})
    views = plan_views(areas, 128)
    found = measure(eye, views, 2, loss).measures(0.5)
    seen = [one for several in look(eye, views, 1) for one in several]
    dice = []
    for batch in (seen[:2], seen[2:4], seen[4:]):
        prob = np.concatenate([torch.sigmoid(one.logits_HW).numpy().ravel() for one in batch])
        true = np.concatenate([one.label_HW.ravel() for one in batch])
        dice.append(2 * (prob * true).sum() / (prob.sum() + true.sum()))
    assert found.soft_dice == pytest.approx(np.mean(dice), abs=1e-6)
    assert found.loss == pytest.approx(-np.mean(dice), abs=1e-6)


def test_central_crops_are_all_that_is_seen_and_scored():
    image, label = draw(300, 200, 5)
    area = Area.of_arrays("a", image, label // 255, np.ones_like(label))
    (view,) = plan_views([area], 96)
    assert view.core == Window(102, 52, 96, 96)
    eye = Eye(Local(9), UNIT, 16, CPU, "float32")
    ((seen,),) = look(eye, [view], 4)
    with torch.no_grad():
        alone = eye.logits(image[None, :, 102:198, 52:148], np.ones((1, 96, 96), np.bool_))[0]
    assert torch.equal(seen.logits_HW, alone)
    assert np.array_equal(seen.image_CHW, image[:, 102:198, 52:148])


def test_a_network_without_padding_answers_for_every_pixel_with_its_surroundings_from_the_lattice_on():
    torch.manual_seed(0)
    network = build_network("unet-valid").eval()
    image, label = draw(150, 170, 6)
    area = Area.of_arrays("a", image, label // 255, np.ones_like(label))
    eye = Eye(network, UNIT, 0, CPU, "float32")
    ((seen,),) = look(eye, [View(area, Window(16, 32, 100, 120), False)], 1)
    outer = np.zeros((3, 300, 316), np.uint8)
    outer[:, 80:230, 64:234] = image
    present = np.zeros((300, 316), np.bool_)
    present[80:230, 64:234] = True
    with torch.no_grad():
        theirs = eye.logits(outer[None], present[None])[0][4:104, 4:124]
    assert torch.allclose(seen.logits_HW, theirs, atol=1e-5)


def test_the_effective_halo_is_how_far_a_network_sees_in_effect_and_small_areas_cannot_tell():
    image, label = draw(1024, 1056, 7)
    area = Area.of_arrays("a", image, label // 255, np.ones_like(label))
    found = effective_halo(Eye(Local(13), UNIT, 40, CPU, "float32"), area, 40)
    assert found is not None and found.halo_px == 16 and found.largest <= 2 / 250
    small = Area.of_arrays("b", image[:, :1000], label[:1000] // 255, np.ones_like(label[:1000]))
    assert effective_halo(Eye(Local(13), UNIT, 40, CPU, "float32"), small, 40) is None


# Recipes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny stand-ins for every data set that a recipe names."""
    folder = tmp_path_factory.mktemp("data")
    for n, name in enumerate(("austin1", "austin6", "vienna7")):
        image, label = draw(96, 96, n)
        write_raster(folder / "inria" / "train" / "images" / f"{name}.tif", image)
        write_raster(folder / "inria" / "train" / "gt" / f"{name}.tif", label[None])
    for kind in ("images", "masks"):
        (folder / "pairs" / kind).mkdir(parents=True)
    for n in range(8):
        image, label = draw(96, 110, 10 + n)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / "pairs" / "images" / f"p{n}.png")
        Image.fromarray(np.where(label, 1, 2).astype(np.uint8)).save(folder / "pairs" / "masks" / f"p{n}.png")
    return folder


@pytest.fixture(scope="module")
def fields():
    """Fields of networks that were probed before: it takes longer than two steps."""
    return {}


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path.stem not in ("train", "buildings")], ids=lambda p: p.stem
)
def test_every_recipe_runs_two_steps(recipe, data, tmp_path, fields, monkeypatch):
    def probe(network, stride, bands):
        if type(network) not in fields:
            fields[type(network)] = probe_field(network, stride, bands)
        return fields[type(network)]

    monkeypatch.setattr(story, "probe_field", probe)
    settings = yaml.safe_load(recipe.read_text())
    changes = [
        "fit.epochs=1", "fit.steps_per_epoch=2", "fit.batch=1", "fit.crop_px=64", "fit.loaders=0",
        "fit.validate_px=64", "network.initialisation=lecun", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    if "inria" in settings:
        changes += [f"inria={data / 'inria'}"]
    else:
        pairs = data / "pairs"
        changes += [f"pairs.images={pairs / 'images' / '*.png'}", f"pairs.masks={pairs / 'masks'}/{{stem}}.png"]
        changes += ["pairs.foreground=1", "pairs.background=2", "pairs.ignore=[]", "split.validate=1", "split.test=1"]
        changes += ["pairs.resize_px=[64, 64]"] if "resize_px" in settings["pairs"] else []
    config = load_train(recipe, changes)
    bundle = load_bundle(train(config, quiet()))
    assert bundle.card.architecture == settings["network"]["name"]
    assert bundle.card.temperature == 1.0, "no calibration that the paper does not have"


def test_the_reference_of_all_keys_has_every_key_with_its_default(tmp_path):
    text = (RECIPES[0].parent / "train.yaml").read_text()
    given = yaml.safe_load(text)
    least = tmp_path / "train.yaml"
    least.write_text(yaml.safe_dump({"name": "t", "network": {"name": given["network"]["name"]}, "output": "o"}))
    defaults = load_train(least).model_dump(mode="json", by_alias=True)
    documented = load_train(RECIPES[0].parent / "train.yaml").model_dump(mode="json", by_alias=True)

    def keys(section, found, path=""):
        for key, value in section.items():
            assert key in found, f"{path}{key} is not in train.yaml"
            if isinstance(value, dict) and value:
                keys(value, found[key], f"{path}{key}.")

    keys(defaults, given)
    for section in ("split", "network", "fit"):
        assert documented[section] == defaults[section] | {
            key: given[section][key] for key in ("name",) if key in given[section]
        }


def test_recipes_mean_the_same_after_they_are_resolved(tmp_path):
    for path in RECIPES:
        config, resolved = load_train(path), tmp_path / path.name
        resolved.write_text(config.resolved_yaml())
        assert load_train(resolved).deciding() == config.deciding()


def test_the_story_plans_before_it_works(job):
    folder, configured = job
    sources = plan_sources(configured(), folder / "areas")
    assert [plan.name for plan in sources.areas] == ["a_image", "b_image"]
    assert not (folder / "areas").exists()
    assert story.BUNDLE == "model.safetensors"
