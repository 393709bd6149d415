"""Peak memory and seconds of `segpipe evaluate` for few and for very many buildings.

    python bench/evaluate.py --buildings 10000 --buildings 1000000

Draws a run and its truth (boxes on a grid, those of the truth a little off, both as GeoPackages), and evaluates it in a
process of its own. Peak memory is the resident set (RSS) that the system has noted for it. Prints Markdown.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyogrio.raw
import rasterio
import shapely
from affine import Affine

STEP_PX = 24
PLACE = Affine(0.3, 0, 400_000, 0, -0.3, 5_300_000)
SCRIPT = """
import json, re, sys
from pathlib import Path
from segpipe.pipeline.evaluate import evaluate_runs
run, truth, out = map(Path, sys.argv[1:])
found = evaluate_runs([run], [truth], out).cities[0].whole.buildings
# Not by getrusage: that of a process that was just started knows its parent's peak too.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([peak, found.tp, found.fp, found.fn]))
"""


def write_boxes(path: Path, side: int, shift_px: float) -> None:
    """Boxes in side rows and columns as a layer `buildings`."""
    row, col = (it.ravel() * STEP_PX for it in np.mgrid[:side, :side])
    x, y = PLACE.c + 0.3 * (col + 4 + shift_px), PLACE.f - 0.3 * (row + 4)
    size = 0.3 * (8 + (row // STEP_PX + col // STEP_PX) % 8)
    boxes = shapely.box(x, y - size, x + size, y)
    numbers = np.arange(side * side)
    pyogrio.raw.write(
        path, shapely.to_wkb(boxes), [numbers, np.round(np.sin(numbers) / 4 + 0.7, 4)], ["building_id", "confidence"],
        layer="buildings", driver="GPKG", geometry_type="Polygon", crs="EPSG:32633",
    )  # fmt: skip


def write_mask(path: Path, side: int) -> None:
    """The boxes as a raster with a hole without data, strip by strip."""
    size = side * STEP_PX
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": size, "width": size, "nodata": 255}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=PLACE, **profile) as raster:
        for row_off in range(0, size, 512):
            height = min(512, size - row_off)
            row, col = np.mgrid[row_off : row_off + height, :size]
            house = 8 + (row // STEP_PX + col // STEP_PX) % 8
            inside = (row % STEP_PX >= 4) & (row % STEP_PX < 4 + house)
            mask_HW = (inside & (col % STEP_PX >= 4) & (col % STEP_PX < 4 + house)).astype(np.uint8)
            mask_HW[(row < size // 10) & (col < size // 10)] = 255
            raster.write(mask_HW, 1, window=((row_off, row_off + height), (0, size)))


@click.command()
@click.option("--buildings", multiple=True, type=int, default=(10_000, 1_000_000), show_default=True)
def main(buildings: tuple[int, ...]) -> None:
    """Print a row for each number of buildings."""
    print("| buildings | Mpx | seconds | peak, MiB | hits | false alarms | misses |\n|" + "---|" * 7)
    for count in buildings:
        side = math.isqrt(count)
        with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as folder:
            run = Path(folder) / "run"
            run.mkdir()
            write_mask(run / "mask.tif", side)
            write_boxes(run / "buildings.gpkg", side, 0)
            write_boxes(Path(folder) / "truth.gpkg", side, 2.5)
            start = time.perf_counter()
            command = [sys.executable, "-c", SCRIPT, str(run), f"{folder}/truth.gpkg", f"{folder}/out"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            peak, *verdicts = json.loads(done.stdout.splitlines()[-1])
            cells = [f"{side**2:,}", f"{(side * STEP_PX) ** 2 / 1e6:.0f}", f"{seconds:.0f}", f"{peak / 2**20:.0f}"]
            print("| " + " | ".join([*cells, *(f"{number:,}" for number in verdicts)]) + " |", flush=True)


if __name__ == "__main__":
    main()
