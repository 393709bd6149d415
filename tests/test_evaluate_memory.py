"""Law 6 for evaluation: memory is set by cells of the raster, not by the city."""

import json
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import rasterio
import rasterio.features
import shapely
from affine import Affine

STEP_PX = 20
PLACE = Affine(0.3, 0, 400_000, 0, -0.3, 5_300_000)
SCRIPT = """
import json, re, sys
from pathlib import Path
from segpipe.pipeline import footprints
from segpipe.pipeline.allocator import spare_memory
from segpipe.pipeline.evaluate import evaluate_runs
spare_memory()
footprints.CELL_PX = 512
run, truth, out = map(Path, sys.argv[1:])
found = evaluate_runs([run], [truth], out).cities[0].whole.buildings
# Not by getrusage: that of a process that was just started knows its parent's peak too.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([peak, found.tp]))
"""


def peak_of(folder: Path, side: int) -> tuple[int, int]:
    """Peak memory in bytes, and hits, of a run with side x side boxes."""
    (folder / "run").mkdir(parents=True)
    row, col = (it.ravel() * STEP_PX for it in np.mgrid[:side, :side])
    boxes = shapely.box(col + 4, row + 4, col + 14, row + 12)
    size = side * STEP_PX
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": size, "width": size, "compress": "deflate"}
    with rasterio.open(folder / "run" / "mask.tif", "w", crs="EPSG:32633", transform=PLACE, **profile) as raster:
        raster.write(rasterio.features.rasterize(boxes, (size, size), dtype="uint8"), 1)
    on_map = [shapely.affinity.affine_transform(box, PLACE.to_shapely()) for box in boxes]
    for path in (folder / "run" / "buildings.gpkg", folder / "truth.gpkg"):
        geopandas.GeoDataFrame({"building_id": range(len(boxes))}, geometry=on_map, crs="EPSG:32633").to_file(
            path, layer="buildings"
        )
    command = [sys.executable, "-c", SCRIPT, str(folder / "run"), str(folder / "truth.gpkg"), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, hits = json.loads(done.stdout.splitlines()[-1])
    return peak, hits


def test_9_times_the_buildings_take_a_tenth_more_memory_and_a_little_for_each(tmp_path: Path) -> None:
    small, few = peak_of(tmp_path / "small", 60)
    large, many = peak_of(tmp_path / "large", 180)
    assert many == 9 * few
    assert large <= 1.1 * small + 2 * 32 * many, f"{small / 2**20:.0f} MiB and {large / 2**20:.0f} MiB"
