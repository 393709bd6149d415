"""Law 6: memory is set by the block, not by the city."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, resource, sys
from pathlib import Path
from conftest import FakePredictor, write_city
from contextlib import contextmanager
from segpipe.models import field
from segpipe.pipeline import network, run
from segpipe.pipeline.allocator import spare_memory
from segpipe.pipeline.cluster import InProcess
from conftest import map_it

folder, bundle, side = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

@contextmanager
def open_pool(plan, scheduler):
    yield InProcess(plan)

spare_memory()
run.open_pool = open_pool
network.load_predictor = lambda plan: FakePredictor()
field.peak_bytes_per_px = lambda network, dtype, bands, run: 500.0
if not folder.exists():
    write_city(folder, bundle, side, side, tile_px=512, grid={"chunk_px": 256, "block_px": 512}, nodata=None)
published = map_it(folder / "city.yaml")
blocks = published.stages["predict"].units + published.stages["predict"].reused
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([peak, blocks, published.buildings]))
"""


def peak_of(folder: Path, bundle: Path, side: int) -> tuple[int, int, int]:
    """Peak memory in bytes, blocks and buildings of the driver of a city of side x side tiles.

    First this process does the workers' share too; what is measured is another one that finds all of it done.
    """
    command = [sys.executable, "-c", SCRIPT, str(folder), str(bundle), str(side)]
    for _ in ("all", "the driver's share"):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "run" / "mask.tif").unlink()
    peak, blocks, buildings = json.loads(done.stdout.splitlines()[-1])
    return peak, blocks, buildings


def test_16_times_the_area_takes_a_tenth_more_memory_and_a_little_for_each_block_and_building(
    tmp_path: Path, bundle: Path
) -> None:
    small, few, _ = peak_of(tmp_path / "small", bundle, 2)
    large, many, buildings = peak_of(tmp_path / "large", bundle, 8)
    assert many > 8 * few
    assert large <= 1.1 * small + 100 * many + 32 * buildings, f"{small / 2**20:.0f} MiB and {large / 2**20:.0f} MiB"
