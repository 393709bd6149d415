"""Speed and memory of `segpipe run` against bare forward passes, on a city repeated on the lattice.

    python bench/run.py ../shared/data/banepa/tiles --model buildings-mobilenetv2 --repeat 1 --repeat 4

Every row is measured in one go on one machine, so its ratios hold even where its speeds do not. Prints Markdown.
repeat n stands for n x n copies of the city side by side. The predict task and the bare pass of the same network,
precision, threads and window (on a tensor already in memory) are timed in one process. Peak memory is the largest
resident set that Linux tells of a process (VmHWM), looked at every second. With --compiled compiled passes of the same
network, in the precision that a worker chooses and without any halo, are timed before and after the run: what is left
of the faster ones' speed is told of the run without its start, which is until its first task.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import psutil
import rasterio
import yaml
from affine import Affine

from segpipe.pipeline.allocator import WORKER_ENVIRONMENT

COMPILED_PX, COMPILED_S = (1024, 2048), 10
"""Sides of the windows of compiled passes, and how many seconds each is timed."""


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
            peak[role] = max(peak[role], peak_mib(member.pid))
        # Not more often: looking through all processes for children takes from the run what it measures.
        with suppress(psutil.TimeoutExpired):
            process.wait(1)
    if process.returncode:
        raise SystemExit(process.stderr.read())
    return time.perf_counter() - start, peak


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def peak_mib(pid: int) -> float:
    """The largest resident set that a process has had so far; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def predict_and_bare(folder: Path, passes: int) -> tuple[float, float]:
    """Megapixels of window a second: of the whole predict task of the fullest block, and of bare passes of its window.

    Both in this process, turn about. The task reads its chunks, normalises, predicts, quantises and writes.
    """
    import torch

    from segpipe.pipeline import stages
    from segpipe.pipeline.config import load_city
    from segpipe.pipeline.plan import make_plan, read_settled

    plan = make_plan(load_city(folder / "city.yaml"), read_settled(folder / "run"))
    site = stages.Site(plan)
    predictor = site.network.predictor
    entries = {block: site.ledger.entry("predict", stages.cell_unit(*block)) for block in plan.blocks()}
    block = max(entries, key=lambda block: entries[block]["valid_px"])
    seen = []

    def bare_pass():
        with torch.inference_mode():
            predictor.forward(seen[0])

    def remember(window):
        seen.append(predictor._normalised(window, predictor._kept).clone())
        return type(predictor).run(predictor, window)

    predictor.run = remember
    site.ledger.forget("predict", stages.cell_unit(*block))
    stages.predict(site, *block, entries[block]["key"])
    del predictor.run
    mpx = seen[0].shape[2] * seen[0].shape[3] / 1e6
    task, bare = [], []
    for _ in range(passes):
        site.ledger.forget("predict", stages.cell_unit(*block))
        start = time.perf_counter()
        stages.predict(site, *block, entries[block]["key"])
        task.append(time.perf_counter() - start)
        start = time.perf_counter()
        # In the network's thread: a second one would have a pool of its own, and each slows down the other.
        site.network._thread.submit(bare_pass).result()
        bare.append(time.perf_counter() - start)
    return mpx / statistics.median(task), mpx / statistics.median(bare)


def compiled_passes(model: str) -> list[Callable[[], float]]:
    """Each gives megapixels a second, the median of passes on a window of one size."""
    import torch

    from segpipe.models.fold import fold_batchnorm
    from segpipe.models.predictor import fast_bfloat16, resolve_device
    from segpipe.models.weights import load_bundle
    from segpipe.pipeline.plan import find_model

    network = load_bundle(find_model(model, Path.cwd())).network.eval()
    fold_batchnorm(network)
    dtype = torch.bfloat16 if fast_bfloat16(resolve_device()) else torch.float32
    network = network.to(dtype).to(memory_format=torch.channels_last)
    compiled = torch.compile(network, dynamic=False, options={"freezing": True})

    def timed(side: int) -> float:
        image_BCHW = torch.randn(1, 3, side, side).to(dtype).to(memory_format=torch.channels_last)
        seconds: list[float] = []
        with torch.inference_mode():
            compiled(image_BCHW)
            while sum(seconds) < COMPILED_S:
                start = time.perf_counter()
                compiled(image_BCHW)
                seconds.append(time.perf_counter() - start)
        return side**2 / 1e6 / statistics.median(seconds)

    return [partial(timed, side) for side in COMPILED_PX]


@click.command()
@click.argument("tiles", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="buildings-mobilenetv2", show_default=True)
@click.option("--repeat", "repeats", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--settings", default="{}", help="More of city.yaml, as YAML: '{grid: {block_px: 2048}}'.")
@click.option("--passes", default=3, show_default=True, help="How often the task and the bare pass are timed.")
@click.option("--compiled", "against_compiled", is_flag=True, help="Time compiled passes before and after runs.")
def main(tiles: Path, model: str, repeats: tuple[int, ...], settings: str, passes: int, against_compiled: bool) -> None:
    if WORKER_ENVIRONMENT.items() - os.environ.items():
        # The allocator reads its settings when a process starts: this one is to have those of the workers.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | WORKER_ENVIRONMENT)
    compiled = compiled_passes(model) if against_compiled else []
    columns = ["city", "valid Mpx", "whole run, s", "whole run, Mpx/s", "predict task, Mpx/s of window"]
    columns += ["bare pass, Mpx/s", "task / bare", "window px / valid px", "driver, MiB", "worker, MiB"]
    columns += ["start, s", "compiled, before and after, Mpx/s", "run without start / compiled"] if compiled else []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for times in repeats:
        with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as name:
            folder = Path(name)
            repeat_tiles(tiles, folder / "tiles", times)
            config = write_config(folder, model, yaml.safe_load(settings))
            before = [timed() for timed in compiled]
            begun = time.time()
            seconds, peak = run_and_watch(config)
            after = [timed() for timed in compiled]
            records = [json.loads(line) for line in (folder / "run" / "tasks.jsonl").read_text().splitlines()]
            manifest = json.loads((folder / "run" / "manifest.json").read_text())
            mpx = manifest["counts"]["valid_px"] / 1e6
            seen = sum(r["values"]["seen_px"] for r in records if r["stage"] == "predict") / 1e6
            task, bare = predict_and_bare(folder, passes)
            cells = [f"{times} x {times}", f"{mpx:.1f}", f"{seconds:.0f}", f"{mpx / seconds:.3f}", f"{task:.3f}"]
            cells += [f"{bare:.3f}", f"{task / bare:.2f}", f"{seen / mpx:.2f}"]
            cells += [f"{peak['driver']:.0f}", f"{peak['worker']:.0f}"]
            if compiled:
                started = min(r["ended"] - r["seconds"] for r in records) - begun
                fastest = max((one + other) / 2 for one, other in zip(before, after, strict=True))
                told = ", ".join(f"{one:.3f} {other:.3f}" for one, other in zip(before, after, strict=True))
                cells += [f"{started:.1f}", told, f"{mpx / (seconds - started) / fastest:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
