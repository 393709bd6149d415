"""The same city cut in different ways, and killed at random moments: are the bytes the same.

    python bench/cuts.py ../shared/data/banepa/tiles --model buildings-mobilenetv2

Runs the city with several chunk sizes, block sizes and worker counts (one thread each), then kills the driver, and then
a worker, with SIGKILL at random moments and runs it again. Prints a Markdown table of digests: of all rows of the
GeoPackage (ids, attributes, geometries), and of the pixels of probability.tif and mask.tif. Exits 1 if any differ.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click
import psutil
import rasterio
from city import finish_run, run_city, start_run, write_city

CUTS = [(1024, 2048, 2), (256, 2048, 1), (512, 2048, 2), (1024, 4096, 1), (512, 3072, 2)]
"""(chunk_px, block_px, workers) of the undisturbed runs; the first is also the one that is killed."""


def write_config(folder: Path, tiles: Path, model: str, cut: tuple[int, int, int]) -> Path:
    """A city.yaml for a cut, in a folder of its own."""
    folder.mkdir(parents=True)
    chunk_px, block_px, workers = cut
    return write_city(
        folder,
        model,
        name="cuts",
        images=str(tiles.resolve() / "*.tif"),
        nodata=[0, 255],
        grid={"chunk_px": chunk_px, "block_px": block_px},
        cluster={"workers": workers, "threads": 1},
    )


def workers_of(process: psutil.Popen) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.Error):  # one that is just dying has no command line
            started_by = " ".join(child.cmdline())
            if "spawn_main" in started_by or ("forkserver" in started_by and child.ppid() != process.pid):
                found.append(child)
    return found


def kill_driver(process: psutil.Popen) -> bool:
    """Kill a run's driver; False if it had ended by itself."""
    if process.poll() is None:
        process.kill()
    return bool(process.wait() == -signal.SIGKILL)


def kill_worker(process: psutil.Popen) -> bool:
    """Kill one of a run's workers; False if there was none."""
    with suppress(psutil.NoSuchProcess):
        for worker in workers_of(process):
            worker.kill()
            return True
    return False


def digests(run: Path) -> tuple[str, str, str]:
    """Digests of rows, probabilities and mask."""
    from segpipe.pipeline.geopackage import rows_digest

    rasters = []
    for name in ("probability.tif", "mask.tif"):
        with rasterio.open(run / name) as dataset:
            rasters.append(hashlib.sha256(dataset.read(1).tobytes()).hexdigest()[:12])
    return rows_digest(run / "buildings.gpkg")[:12], rasters[0], rasters[1]


def done_twice(run: Path) -> int:
    """Units of work that were entered as finished more than once."""
    seen, twice = set(), 0
    for line in (run / "tasks.jsonl").read_text().splitlines():
        record = json.loads(line)
        unit = (record["stage"], record["unit"])
        twice += unit in seen and record["stage"] != "publish"
        seen.add(unit)
    return twice


@click.command()
@click.argument("tiles", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="buildings-mobilenetv2", show_default=True)
@click.option("--kills", default=5, show_default=True, help="Random moments, for the driver and for a worker each.")
@click.option("--seed", default=0, show_default=True)
@click.option("--cuts", "first_cuts", default=len(CUTS), show_default=True, help="How many of the cuts to run.")
def main(tiles: Path, model: str, kills: int, seed: int, first_cuts: int) -> None:
    rng = random.Random(seed)
    rows: list[tuple[str, ...]] = []
    print("| run | seconds | rows | probability | mask | done twice |\n|---|---|---|---|---|---|")

    def note(name: str, seconds: float, run: Path) -> None:
        found = digests(run)
        rows.append(found)
        print(f"| {name} | {seconds:.0f} | {' | '.join(found)} | {done_twice(run)} |", flush=True)

    with tempfile.TemporaryDirectory(prefix="segpipe-cuts-") as name:
        folder = Path(name)
        usual = 0.0
        for number, cut in enumerate(CUTS[:first_cuts]):
            begun = time.monotonic()
            config = write_config(folder / f"cut{number}", tiles, model, cut)
            run_city(config)
            usual = usual or time.monotonic() - begun
            note("chunk {}, block {}, {} workers".format(*cut), time.monotonic() - begun, config.parent / "run")
        for number in range(kills):
            config = write_config(folder / f"driver{number}", tiles, model, CUTS[0])
            moment = rng.uniform(0.1, 0.95) * usual
            begun = time.monotonic()
            process = start_run(config)
            time.sleep(moment)
            if killed := kill_driver(process):
                run_city(config)
            else:
                finish_run(process, config)
            told = "driver killed" if killed else "driver not killed: it had ended"
            note(f"{told} after {moment:.0f} s", time.monotonic() - begun, config.parent / "run")
        for number in range(kills):
            config = write_config(folder / f"worker{number}", tiles, model, CUTS[0])
            moment = rng.uniform(0.15, 0.8) * usual
            begun = time.monotonic()
            process = start_run(config)
            time.sleep(moment)
            told = "worker killed" if kill_worker(process) else "worker not killed: there was none"
            finish_run(process, config)
            note(f"{told} after {moment:.0f} s", time.monotonic() - begun, config.parent / "run")
    if len(set(rows)) != 1:
        raise SystemExit(f"{len(set(rows))} different results; expected one")
    print(f"\nall {len(rows)} runs gave the same bytes")


if __name__ == "__main__":
    main()
