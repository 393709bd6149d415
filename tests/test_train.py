import csv
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from rich.console import Console
from shapely.affinity import affine_transform
from shapely.geometry import box

from segpipe.models.weights import load_bundle
from segpipe.pipeline.areas import common_resolution, plan_area, read_area
from segpipe.pipeline.config import load_train
from segpipe.pipeline.train import train
from segpipe.tasks.errors import UserError
from segpipe.tasks.sample import Area, CropSampler

ORIGIN_X, ORIGIN_Y, PX_M = 500_000.1, 4_000_000.2, 0.3


def write_raster(path, array_CHW, off_px=0.0, **profile):
    transform = from_origin(ORIGIN_X + off_px * PX_M, ORIGIN_Y, PX_M, PX_M)
    count, height, width = array_CHW.shape
    options = {"crs": "EPSG:32633", "transform": transform, "dtype": "uint8"} | profile
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, **options) as f:
        f.write(array_CHW)


def write_area(folder, name, height, width, seed):
    """Bright houses on dark ground, as an image, a mask and footprints."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    houses = []
    for row, col in rng.integers(2, (height - 20, width - 20), (9, 2)).tolist():
        label[row : row + 14, col : col + 11] = 255
        houses.append(box(col, row, col + 11, row + 14))
    image = np.where(label, 190, 70) + rng.integers(-30, 30, (3, height, width))
    write_raster(folder / f"{name}_image.tif", image.astype(np.uint8))
    write_raster(folder / f"{name}_mask.tif", label[None])
    shapes = [affine_transform(house, (PX_M, 0, 0, -PX_M, ORIGIN_X, ORIGIN_Y)) for house in houses]
    gpd.GeoDataFrame(geometry=shapes, crs="EPSG:32633").to_crs(4326).to_file(folder / f"{name}_houses.gpkg")
    return image.astype(np.uint8), label


@pytest.fixture
def job(tmp_path):
    """A folder with two labelled areas and a train.yaml for two steps of two crops of 64 px."""
    images = {name: write_area(tmp_path, name, *shape) for name, *shape in (("a", 130, 150, 1), ("b", 40, 50, 2))}
    (tmp_path / "train.yaml").write_text(
        """
name: tiny
areas: [{images: a_image.tif, labels: a_mask.tif}]
validate: [{images: b_image.tif, labels: b_mask.tif}]
network: {name: unet-mobilenetv2}
fit: {epochs: 2, steps_per_epoch: 1, crop_px: 64, batch: 2}
output: run
"""
    )
    return tmp_path, images


def read_config(folder, *overrides):
    return load_train(folder / "train.yaml", overrides)


def test_training_gives_a_bundle_with_its_threshold_and_metrics_and_is_not_done_twice(job):
    folder, _ = job
    model = train(read_config(folder), Console(quiet=True))
    bundle = load_bundle(model)
    assert model == folder / "run" / "model.safetensors"
    assert bundle.card.halo_px == 320 and bundle.card.stride == 32
    assert bundle.card.resolution_m == pytest.approx(0.3, abs=0.001)
    with (folder / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    best = max(rows, key=lambda row: (float(row["iou"]), int(row["step"])))
    assert bundle.card.threshold == float(best["threshold"])
    assert bundle.card.metrics["validation_iou"] == pytest.approx(float(best["iou"]), abs=1e-4)
    assert "validation IoU" in (folder / "run" / "report.html").read_text()
    first = model.read_bytes()
    chunks = {path: path.stat().st_mtime_ns for path in (folder / "run" / "areas").rglob("c/*/*")}
    train(read_config(folder), Console(quiet=True))
    assert model.read_bytes() == first
    assert chunks and all(path.stat().st_mtime_ns == mtime for path, mtime in chunks.items())


def test_another_training_in_the_same_folder_is_refused(job):
    folder, _ = job
    (folder / "run").mkdir()
    (folder / "run" / "train.yaml").write_text("name: other\n")
    with pytest.raises(UserError, match="another training"):
        train(read_config(folder), Console(quiet=True))


@pytest.mark.parametrize("labels", ["a_mask.tif", "a_houses.gpkg"])
def test_crops_from_the_chunks_are_those_of_the_files_for_masks_and_footprints(job, labels):
    folder, images = job
    config = read_config(folder)
    area = read_area(plan_area(config, config.areas[0].model_copy(update={"labels": (labels,)}), folder / "area"))
    image, label = images["a"]
    whole = Area.of_arrays("a", image, label, np.ones_like(label))
    assert (area.window.shape_yx, area.valid_pixels) == (whole.window.shape_yx, whole.valid_pixels)
    ours, theirs = (CropSampler([one], 64, 40).draw(4, np.random.default_rng(0)) for one in (area, whole))
    assert np.array_equal(ours.image_BCHW, theirs.image_BCHW)
    assert np.array_equal(ours.label_BHW, theirs.label_BHW)
    assert np.array_equal(ours.valid_BHW, theirs.valid_BHW)


def test_nodata_and_pixels_without_a_label_are_neither_learned_nor_counted(job):
    folder, images = job
    image, label = images["a"]
    image[:, :, 110:] = 0
    write_raster(folder / "a_image.tif", image)
    write_raster(folder / "a_mask.tif", label[None, 20:].copy(), nodata=0)
    with rasterio.open(folder / "a_mask.tif", "r+") as file:
        file.transform = from_origin(ORIGIN_X, ORIGIN_Y - 20 * PX_M, PX_M, PX_M)
    config = read_config(folder)
    area = read_area(plan_area(config, config.areas[0].model_copy(update={"nodata": (0.0,)}), folder / "area"))
    assert area.window.shape_yx == (110, 110)
    assert area.valid_pixels == 110 * 110


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, label: write_raster(folder / "a_mask.tif", label[None], off_px=0.4), "off the lattice"),
        (lambda folder, label: write_raster(folder / "a_mask.tif", label[None], crs="EPSG:32634"), "CRS"),
        (lambda folder, label: write_raster(folder / "a_image.tif", label[None]), "1 bands of uint8"),
        (lambda folder, label: (folder / "a_mask.tif").unlink(), "matches no file"),
    ],
)
def test_labels_and_images_that_do_not_fit_are_refused_before_any_work(job, change, message):
    folder, images = job
    change(folder, images["a"][1])
    with pytest.raises(UserError, match=message):
        train(read_config(folder), Console(quiet=True))
    assert not (folder / "run").exists()


def test_a_network_that_is_not_known_and_weights_that_do_not_fit_are_refused(job):
    folder, _ = job
    with pytest.raises(UserError, match="unet-mobilenetv2"):
        train(read_config(folder, "network.name=unet-large"), Console(quiet=True))
    (folder / "encoder.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"encoder\.pth"):
        train(read_config(folder, "network.initialisation=encoder.pth"), Console(quiet=True))


def test_areas_of_another_resolution_are_refused(job):
    folder, _ = job
    config = read_config(folder)
    plan = plan_area(config, config.areas[0], folder / "area")
    coarse = replace(plan, lattice=replace(plan.lattice, pixel_size=0.6))
    assert common_resolution([plan, plan]) == pytest.approx(0.3, abs=0.001)
    with pytest.raises(UserError, match="one resolution"):
        common_resolution([plan, plan, coarse])
