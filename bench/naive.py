"""`segpipe run` against the script that its users would write: seconds for a city, and IoU where there are labels.

    python bench/naive.py ../shared/data/banepa/tiles --labelled ../shared/data/val

The script: all tiles in memory as one image, windows of 512 px that overlap by half, float32, the mean of what they
say, one process with all threads, the whole mask polygonized at once and written with `to_file`. It knows no nodata,
and neither joins nor cleans anything. Both get the same bundle and threshold. --repeat n maps n x n copies of the
tiles side by side. Prints Markdown.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import geopandas as gpd
import numpy as np
import pyogrio
import rasterio
import rasterio.features
import torch
from affine import Affine
from city import repeat_tiles, run_city, write_city
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.merge import merge

from segpipe.models.weights import Bundle, load_bundle
from segpipe.pipeline.plan import find_model
from segpipe.tasks.evaluate import Counts, count

WINDOW_PX = 512
STEP_PX = WINDOW_PX // 2
NODATA = [0, 255]


def predict_naively(bundle: Bundle, image_CHW: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The mask of an image of any size, True where there is a building."""
    card, (_, height, width) = bundle.card, image_CHW.shape
    rows, cols = (max(-(-(side - WINDOW_PX) // STEP_PX), 0) * STEP_PX + WINDOW_PX for side in (height, width))
    padded_CHW = np.pad(image_CHW, ((0, 0), (0, rows - height), (0, cols - width)))
    total_HW, times_HW = np.zeros((rows, cols), np.float32), np.zeros((rows, cols), np.float32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))
    with torch.inference_mode():
        for row in range(0, rows - STEP_PX, STEP_PX):
            for col in range(0, cols - STEP_PX, STEP_PX):
                window = np.s_[row : row + WINDOW_PX, col : col + WINDOW_PX]
                pixels_CHW = torch.from_numpy(padded_CHW[:, *window].copy()).float()
                logits_BKHW = bundle.network(((pixels_CHW * card.scale - mean) / std)[None])
                total_HW[window] += torch.sigmoid(logits_BKHW[0, 0] / card.temperature).numpy()
                times_HW[window] += 1
    mask_HW: NDArray[np.bool_] = (total_HW / times_HW >= card.threshold)[:height, :width]
    return mask_HW


def write_polygons(mask_HW: NDArray[np.bool_], transform: Affine, crs: CRS, path: Path) -> int:
    """Polygonize a mask and write it as a GeoPackage; how many polygons."""
    shapes = rasterio.features.shapes(mask_HW.astype(np.uint8), mask_HW, transform=transform)
    features = [{"type": "Feature", "properties": {}, "geometry": shape} for shape, _ in shapes]
    frame = gpd.GeoDataFrame.from_features(features, crs=crs)
    frame.to_file(path)
    return len(frame)


def masks_of(image: Path, bundle: Bundle, model: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """The script's mask of a labelled image, that of `segpipe run`, and where that has an answer."""
    with rasterio.open(image) as dataset:
        naive_HW = predict_naively(bundle, dataset.read())
    with tempfile.TemporaryDirectory() as scratch:
        run_city(write_city(Path(scratch), model, images=str(image.resolve()), nodata=NODATA))
        with rasterio.open(Path(scratch) / "run" / "mask.tif") as dataset:
            mask_HW = dataset.read(1)
    return naive_HW, mask_HW == 1, mask_HW != 255


@click.command()
@click.argument("tiles", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="buildings-mobilenetv2", show_default=True)
@click.option("--repeat", default=1, show_default=True)
@click.option(
    "--labelled", type=click.Path(exists=True, file_okay=False, path_type=Path), help="NAME_image, NAME_mask."
)
def main(tiles: Path, model: str, repeat: int, labelled: Path | None) -> None:
    bundle = load_bundle(find_model(model, Path.cwd()))
    with tempfile.TemporaryDirectory() as scratch:
        if repeat > 1:
            repeat_tiles(tiles, Path(scratch) / "tiles", repeat)
            tiles = Path(scratch) / "tiles"
        start = time.perf_counter()
        image_CHW, transform = merge(sorted(tiles.glob("*.tif")))
        with rasterio.open(next(tiles.glob("*.tif"))) as dataset:
            crs = dataset.crs
        count_naive = write_polygons(
            predict_naively(bundle, image_CHW), transform, crs, Path(scratch) / "buildings.gpkg"
        )
        naive_s = time.perf_counter() - start
        run_s = run_city(write_city(Path(scratch), model, images=str(tiles.resolve() / "*.tif"), nodata=NODATA))
        count_run = pyogrio.read_info(Path(scratch) / "run" / "buildings.gpkg", layer="buildings")["features"]
    print("| | seconds | polygons or IoU |\n|---|---|---|")
    print(f"| script | {naive_s:.0f} | {count_naive} polygons |")
    print(f"| segpipe run | {run_s:.0f} | {count_run} polygons, {naive_s / run_s:.1f} times as fast |")
    sums = {"script": Counts(), "segpipe run": Counts()}
    for image in sorted(labelled.glob("*_image.tif")) if labelled is not None else ():
        naive_HW, mask_HW, valid_HW = masks_of(image, bundle, model)
        with rasterio.open(image.with_name(image.name.replace("_image", "_mask"))) as dataset:
            truth_HW = dataset.read(1) > 0
        for name, found_HW in (("script", naive_HW), ("segpipe run", mask_HW)):
            sums[name] += count(found_HW, truth_HW, valid_HW)
    for name, counts in sums.items() if labelled is not None else ():
        print(f"| {name}, labelled imagery | | IoU {counts.iou:.4f} |")


if __name__ == "__main__":
    main()
