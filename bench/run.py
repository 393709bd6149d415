"""Speed and memory of `segpipe run` against bare forward passes, on a city repeated on the lattice.

    python bench/run.py ../shared/data/banepa/tiles --model buildings-mobilenetv2 --repeat 1 2 4

Every row is measured in one go on one machine, so its ratios hold even where its speeds do not. Prints Markdown.
repeat n stands for n x n copies of the city side by side. Bare passes: the same network, precision, threads and window,
on a tensor already in memory. Peak memory is the resident set (RSS), sampled every 0.1 s.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import psutil
import rasterio
import yaml
from affine import Affine


def repeat_tiles(tiles: Path, folder: Path, times: int) -> None:
    """Copy tiles times x times, each copy shifted by whole pixels of the lattice; pixels stay as they are encoded."""
    folder.mkdir(parents=True)
    paths = sorted(tiles.glob("*.tif"))
    bounds = []
    for path in paths:
        with rasterio.open(path) as dataset:
            bounds.append((*dataset.bounds, dataset.transform.a))
    step = bounds[0][4]
    width = round((max(b[2] for b in bounds) - min(b[0] for b in bounds)) / step)
    height = round((max(b[3] for b in bounds) - min(b[1] for b in bounds)) / step)
    for row in range(times):
        for col in range(times):
            for path in paths:
                copy = folder / f"{path.stem}_{row}_{col}.tif"
                shutil.copy(path, copy)
                copy.chmod(0o644)
                with rasterio.open(copy, "r+") as dataset:
                    dataset.transform = Affine.translation(col * width * step, -row * height * step) * dataset.transform


def write_config(folder: Path, model: str, settings: dict[str, object]) -> Path:
    """A city.yaml for the tiles in a folder."""
    config = folder / "city.yaml"
    job = {"name": "bench", "images": "tiles/*.tif", "model": model, "output": "run", "nodata": [0, 255]}
    config.write_text(yaml.safe_dump(job | settings))
    return config


def run_and_watch(config: Path) -> tuple[float, dict[str, float]]:
    """Seconds of one `segpipe run`, and the peak memory of the driver and of the largest worker in MiB."""
    peak = {"driver": 0.0, "worker": 0.0}
    start = time.perf_counter()
    command = [sys.executable, "-c", "from segpipe.pipeline.cli import main; main()", "run", str(config)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        for role, member in [("driver", process), *(("worker", child) for child in children(process))]:
            try:
                peak[role] = max(peak[role], member.memory_info().rss / 2**20)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.stderr.read())
    return time.perf_counter() - start, peak


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def bare_passes(folder: Path, windows: int) -> float:
    """Megapixels a second of bare forward passes with the recipe and the largest window of a run."""
    import numpy as np
    import torch

    from segpipe.pipeline.config import load_city
    from segpipe.pipeline.plan import make_plan
    from segpipe.pipeline.run import read_settled
    from segpipe.pipeline.stages import load_predictor

    plan = make_plan(load_city(folder / "city.yaml"), read_settled(folder / "run"))
    predictor = load_predictor(plan)
    side = plan.block_px + 2 * plan.recipe.halo_px
    image = np.random.default_rng(0).integers(0, 256, (plan.layout.bands, side, side), np.uint8)
    image_BCHW = predictor.normalise(image, np.ones((side, side), np.bool_))
    seconds = []
    with torch.inference_mode():
        predictor.network(image_BCHW)
        for _ in range(windows):
            start = time.perf_counter()
            predictor.network(image_BCHW)
            seconds.append(time.perf_counter() - start)
    return side**2 / 1e6 / statistics.median(seconds)


@click.command()
@click.argument("tiles", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="buildings-mobilenetv2", show_default=True)
@click.option("--repeat", "repeats", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--settings", default="{}", help="More of city.yaml, as YAML: '{grid: {block_px: 2048}}'.")
@click.option("--windows", default=3, show_default=True, help="Bare passes that are timed.")
def main(tiles: Path, model: str, repeats: tuple[int, ...], settings: str, windows: int) -> None:
    print(
        "| city | Mpx | whole run, Mpx/s | predict, Mpx/s of cores | predict, Mpx/s of windows | bare, Mpx/s |"
        " predict / bare | driver, MiB | worker, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for times in repeats:
        with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as name:
            folder = Path(name)
            repeat_tiles(tiles, folder / "tiles", times)
            config = write_config(folder, model, yaml.safe_load(settings))
            seconds, peak = run_and_watch(config)
            records = [json.loads(line) for line in (folder / "run" / "tasks.jsonl").read_text().splitlines()]
            predicted = [r["values"] for r in records if r["stage"] == "predict"]
            manifest = json.loads((folder / "run" / "manifest.json").read_text())
            mpx = manifest["counts"]["valid_px"] / 1e6
            busy = sum(r["seconds"] for r in records if r["stage"] == "predict") / 1.0
            seen = sum(v["seen_px"] for v in predicted) / 1e6
            network = sum(v["seconds_network"] for v in predicted)
            bare = bare_passes(folder, windows)
            print(
                f"| {times} x {times} | {mpx:.1f} | {mpx / seconds:.3f} | {mpx / busy:.3f} | {seen / network:.3f} |"
                f" {bare:.3f} | {seen / network / bare:.2f} | {peak['driver']:.0f} | {peak['worker']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
