"""The papers' experiments on what imagery there is: TernausNet's figure 3, table 1 of the transfer-learning study.

    python bench/experiments.py figure3 ../shared runs/figure3
    python bench/experiments.py table1 ../shared runs/table1

Writes the data and a train.yaml for every run to a folder, trains each with `segpipe train` (what is done already, or
was stopped, goes on), and puts them side by side with `segpipe compare`.
"""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import rasterio
import yaml
from city import SEGPIPE
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

CROP_PX = 256
ROWS_PER_COLUMN = 19
"""An Inria crop's number is column * 19 + row of squares of 256 px."""
INRIA = {"austin": "EPSG:32614", "chicago": "EPSG:32616"}
"""Which CRS the crops, which have none, are given."""
PLACED = {"banepa": [0, 255], "zanzibar": None, "catanduanes": None}
"""The areas that have a place, and their nodata."""
RECIPES = Path(__file__).parents[1] / "conf" / "train"

BEFORE = "others"
"""The training that figure 3's third arm begins with: none of its arms."""

Job = dict[str, Any]


def read(path: Path) -> NDArray[np.uint8]:
    """All bands of a raster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as dataset:
            bands: NDArray[np.uint8] = dataset.read()
    return bands


def write_mosaic(images: list[Path], folder: Path, city: str, part: str) -> None:
    """Put crops of an Inria tile where they were in it; what is between them is masked."""
    squares = [divmod(int(re.findall(r"\d+", path.stem)[-1]), ROWS_PER_COLUMN) for path in images]
    cols, rows = zip(*squares, strict=True)
    left, top, wide, tall = min(cols), min(rows), max(cols) - min(cols) + 1, max(rows) - min(rows) + 1
    bands = {"image": 3, "mask": 1, "valid": 1}
    found = {name: np.zeros((count, tall * CROP_PX, wide * CROP_PX), np.uint8) for name, count in bands.items()}
    for path, (col, row) in zip(images, squares, strict=True):
        place = np.s_[:, (row - top) * CROP_PX :, (col - left) * CROP_PX :]
        parts = {"image": read(path), "mask": (read(path.parents[1] / "gt" / path.name) > 0) * 255, "valid": 255}
        for name, values in parts.items():
            found[name][place][:, :CROP_PX, :CROP_PX] = values
    profile = {
        "driver": "GTiff",
        "width": wide * CROP_PX,
        "height": tall * CROP_PX,
        "dtype": "uint8",
        "crs": INRIA[city],
        "transform": from_origin(600_000 + left * CROP_PX * 0.3, 3_350_000 - top * CROP_PX * 0.3, 0.3, 0.3),
        "compress": "deflate",
    }
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        for name in ("image", "mask"):
            with rasterio.open(folder / f"{part}_{city}_{name}.tif", "w", count=bands[name], **profile) as dataset:
                dataset.write(found[name])
                if name == "image":
                    dataset.write_mask(found["valid"][0])


def write_pairs(images: dict[str, list[tuple[Path, Path]]], folder: Path) -> None:
    """Cut images and their masks to squares, as PNGs, and list those that validate. images: by part of the data."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {part: [] for part in images}
    for part, pairs in images.items():
        for image, mask in pairs:
            image_CHW, mask_HW = read(image), read(mask)[0]
            for row in range(0, mask_HW.shape[0] - CROP_PX + 1, CROP_PX):
                for col in range(0, mask_HW.shape[1] - CROP_PX + 1, CROP_PX):
                    name = f"{part}_{image.stem}_{row}_{col}"
                    square = np.s_[row : row + CROP_PX, col : col + CROP_PX]
                    Image.fromarray(np.moveaxis(image_CHW, 0, 2)[square]).save(folder / "images" / f"{name}.png")
                    Image.fromarray((mask_HW[square] > 0) * np.uint8(255)).save(folder / "masks" / f"{name}.png")
                    names[part].append(name)
    (folder / "validate.txt").write_text("".join(f"{name}\n" for name in names["val"]))


def areas(shared: Path, folder: Path, names: list[str], part: str) -> list[Job]:
    """Those areas as a train.yaml has them."""
    found = []
    for name in names:
        stem = folder / "data" / f"{part}_{name}" if name in INRIA else shared / "data" / part / name
        found.append({"images": f"{stem}_image.tif", "labels": f"{stem}_mask.tif", "nodata": PLACED.get(name)})
    return found


def figure3(shared: Path, folder: Path) -> Iterator[Job]:
    """Banepa from three beginnings, three times each; and first what one begins with, a training on all other areas."""
    for part in ("train", "val"):
        for city in INRIA:
            (folder / "data").mkdir(exist_ok=True)
            images = sorted((shared / "data" / "inria" / part / "images").glob(f"{city}*.tif"))
            write_mosaic(images, folder / "data", city, part)
    imagenet = str(shared / "weights" / "mobilenet_v2-imagenet.pth")
    others = ["zanzibar", "catanduanes", *INRIA]

    def job(name: str, where: list[str], initialisation: str, seed: int, epochs: int) -> Job:
        return {
            "name": name,
            "areas": areas(shared, folder, where, "train"),
            "validate": areas(shared, folder, where, "val"),
            "network": {"name": "unet-mobilenetv2", "initialisation": initialisation},
            "fit": {"epochs": epochs, "steps_per_epoch": 20, "crop_px": CROP_PX, "batch": 8, "seed": seed},
            "output": f"runs/{name}",
        }

    yield job(BEFORE, others, imagenet, 0, 8)
    beginnings = {"lecun": "lecun", "imagenet": imagenet, "others": "runs/others/model.safetensors"}
    for seed in range(3):
        for arm, initialisation in beginnings.items():
            yield job(f"{arm}-{seed}", ["banepa"], initialisation, seed, 6)


def table1(shared: Path, folder: Path) -> Iterator[Job]:
    """The study's six recipes as they are in conf/train, on squares of 256 px; few epochs, so a larger rate."""
    images: dict[str, list[tuple[Path, Path]]] = {}
    for part in ("train", "val"):
        placed = [shared / "data" / part / f"{name}_image.tif" for name in PLACED]
        images[part] = [(path, path.with_name(path.name.replace("image", "mask"))) for path in placed]
        crops = sorted((shared / "data" / "inria" / part / "images").glob("*.tif"))
        images[part] += [(path, path.parents[1] / "gt" / path.name) for path in crops]
    write_pairs(images, folder / "pairs")
    for row in ("unet", "v-unet", "ft-v-unet", "d-unet", "r-unet", "m-unet"):
        recipe: Job = yaml.safe_load((RECIPES / f"study-{row}.yaml").read_text())
        recipe["pairs"] = {"images": "pairs/images/*.png", "masks": "pairs/masks/{stem}.png"}
        recipe["pairs"] |= {"resize_px": [CROP_PX, CROP_PX], "resolution_m": 0.3}
        recipe["split"] = {"validate": "pairs/validate.txt"}
        recipe["fit"] |= {"epochs": 6, "batch": 4, "learning_rate": 0.0001, "precision": "bfloat16"}
        network = recipe["network"]
        mobilenet = network["initialisation"] == "mobilenet_v2-imagenet"
        network["initialisation"] = str(shared / "weights" / "mobilenet_v2-imagenet.pth") if mobilenet else "default"
        yield recipe | {"output": f"runs/{recipe['name']}"}


EXPERIMENTS = {"figure3": figure3, "table1": table1}


@click.command()
@click.argument("experiment", type=click.Choice(list(EXPERIMENTS)))
@click.argument("shared", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(experiment: str, shared: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for job in EXPERIMENTS[experiment](shared, folder.resolve()):
        config = folder / f"{job['name']}.yaml"
        config.write_text(yaml.safe_dump(job, sort_keys=False))
        click.echo(f"{job['name']}")
        subprocess.run([*SEGPIPE, "train", str(config)], check=True)
        if job["name"] != BEFORE:
            runs.append(str(folder / job["output"]))
    subprocess.run([*SEGPIPE, "compare", *runs, "--output", str(folder / "compare")], check=True)


if __name__ == "__main__":
    main()
