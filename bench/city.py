"""What scripts share that start `segpipe run`: a city's tiles and city.yaml, the command, the memory of a process.

Measures nothing by itself: the scripts beside it import it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import rasterio
import yaml
from affine import Affine

from segpipe.pipeline.allocator import WORKER_ENVIRONMENT
from segpipe.pipeline.inputs import natural
from segpipe.pipeline.plan import find_model

SEGPIPE = (sys.executable, "-c", "from segpipe.pipeline.cli import main; main()")
"""The command line of `segpipe`, as this Python has it."""
BEFORE = "SEGPIPE_BENCH_BEFORE"
"""Variable of a script that was started anew with the environment of workers: what of that the user had set."""


def repeat_tiles(tiles: Path, folder: Path, times: int, first: int | None = None) -> None:
    """Copy tiles times x times, each copy shifted by whole pixels of the lattice; pixels stay as they are encoded.

    first: only so many tiles, in natural order.
    """
    folder.mkdir(parents=True)
    paths = sorted(tiles.glob("*.tif"), key=lambda path: natural(path.name))[:first]
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


def write_city(folder: Path, model: str, /, **settings: object) -> Path:
    """A city.yaml in a folder, whose run goes to `run` there. model: as it is called in the working directory."""
    config = folder / "city.yaml"
    file = find_model(model, Path.cwd()).resolve()
    job = {"name": "bench", "images": "tiles/*.tif", "model": str(file), "output": "run"}
    config.write_text(yaml.safe_dump(job | settings))
    return config


def as_worker() -> None:
    """Start this script anew with the environment of workers, unless it has that: a process reads it as it starts."""
    if WORKER_ENVIRONMENT.items() - os.environ.items():
        own = {name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ}
        environment = os.environ | WORKER_ENVIRONMENT | {BEFORE: json.dumps(own)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def users_environment() -> dict[str, str]:
    """The environment that this script was started with by its user."""
    if BEFORE not in os.environ:
        return dict(os.environ)
    changed = {BEFORE, *WORKER_ENVIRONMENT}
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return kept | json.loads(os.environ[BEFORE])


def start_run(config: Path) -> psutil.Popen:
    """Start `segpipe run` as a user would. It complains to a file: a pipe that nobody reads would stop it."""
    command = [*SEGPIPE, "run", str(config)]
    with config.with_suffix(".errors").open("w") as errors:
        return psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=users_environment())


def finish_run(process: psutil.Popen, config: Path) -> None:
    """Wait for a run to end; if it fails, end this script with what the run complained of."""
    if code := process.wait():
        raise SystemExit(f"exit {code}: {config.with_suffix('.errors').read_text()}")


def run_city(config: Path) -> float:
    """Seconds of `segpipe run`, from the start of the command to its end."""
    start = time.perf_counter()
    finish_run(start_run(config), config)
    return time.perf_counter() - start


def peak_mib(pid: int) -> float:
    """The largest resident set (VmHWM) that a process has had so far; 0 where it has ended.

    Not by getrusage or wait4: those of a process know the peak of the one that started it too.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024
