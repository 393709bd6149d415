"""IoU of a bundle on the same imagery at other resolutions, each mapped by `segpipe run` as a city of its own.

    python bench/resolutions.py ../shared/data/val

Imagery of 0.3 m is brought to each resolution, finer ones by cubic interpolation and coarser ones by the mean of the
area: what is finer than 0.3 m has no more detail than 0.3 m. The truth is the footprints (NAME_buildings.gpkg), put on
the pixels of each run. Prints Markdown.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import rasterio
from affine import Affine
from city import run_city, write_city
from rasterio.warp import Resampling, reproject

from segpipe.pipeline.evaluate import evaluate_runs
from segpipe.tasks.evaluate import Counts

NATIVE_M = 0.3


def resample(image: Path, target: Path, resolution_m: float) -> None:
    """The same imagery in pixels of another size, in the CRS that it has."""
    with rasterio.open(image) as source:
        scale = resolution_m / NATIVE_M
        width, height = round(source.width / scale), round(source.height / scale)
        transform = source.transform * Affine.scale(source.width / width, source.height / height)
        # Square pixels: what is left over at the right and lower edge is less than one of them.
        transform = Affine(transform.a, 0, transform.c, 0, -transform.a, transform.f)
        pixels = np.zeros((source.count, height, width), np.uint8)
        resampling = Resampling.average if scale > 1 else Resampling.cubic
        place = {"src_transform": source.transform, "dst_transform": transform}
        crs = {"src_crs": source.crs, "dst_crs": source.crs}
        reproject(source.read(), pixels, resampling=resampling, **place, **crs)
        profile = {"driver": "GTiff", "count": source.count, "height": height, "width": width, "dtype": "uint8"}
        with rasterio.open(target, "w", crs=source.crs, transform=transform, compress="deflate", **profile) as dataset:
            dataset.write(pixels)


def map_and_count(image: Path, truth: Path, model: str, resolution_m: float | None, folder: Path) -> Counts:
    """Pixel counts of a run on one image against its footprints."""
    folder.mkdir()
    grid = {"resolution_m": resolution_m}
    run_city(write_city(folder, model, images=str(image), store={"keep": "none"}, grid=grid))
    return evaluate_runs([folder / "run"], [truth], folder / "evaluation").cities[0].whole.pixels


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--model", default="buildings-mobilenetv2", show_default=True)
@click.option("--resolution", "resolutions", type=float, multiple=True, default=(0.15, 0.2, 0.3, 0.5))
def main(data: Path, model: str, resolutions: tuple[float, ...]) -> None:
    """Map every NAME_image.tif in DATA at each resolution, and compare it with NAME_buildings.gpkg."""
    names = sorted(path.name.removesuffix("_image.tif") for path in data.glob("*_image.tif"))
    click.echo("| tiles, m | lattice | " + " | ".join(names) + " | all |")
    click.echo("|---" * (len(names) + 3) + "|")
    for resolution_m in resolutions:
        # Tiles coarser than the model's resolution stay as they are unless they are asked to be resampled.
        for lattice_m in (None, NATIVE_M) if resolution_m > NATIVE_M else (None,):
            pooled, row = Counts(), []
            with tempfile.TemporaryDirectory() as scratch:
                for name in names:
                    image = Path(scratch) / f"{name}.tif"
                    resample(data / f"{name}_image.tif", image, resolution_m)
                    truth = data / f"{name}_buildings.gpkg"
                    counts = map_and_count(image, truth, model, lattice_m, Path(scratch) / name)
                    pooled += counts
                    row.append(counts.iou)
            lattice = f"{max(resolution_m, NATIVE_M) if lattice_m is None else lattice_m:g} m"
            figures = " | ".join(f"{value:.4f}" for value in (*row, pooled.iou))
            click.echo(f"| {resolution_m:g} | {lattice} | {figures} |")


if __name__ == "__main__":
    main()
