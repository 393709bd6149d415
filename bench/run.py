"""Speed and memory of `segpipe run` against bare forward passes, on a city repeated on the lattice.

    python bench/run.py ../shared/data/banepa/tiles --model buildings-mobilenetv2 --repeat 1 --repeat 4

Every row is measured in one go on one machine, so its ratios hold even where its speeds do not. Prints Markdown.
repeat n stands for n x n copies of the city side by side. The predict task and the bare pass of the same network,
precision, threads and window (on a tensor already in memory) are timed in one process. Peak memory is the largest
resident set that Linux tells of a process (VmHWM), looked at every second. The run's seconds in three: until its first
task begins, from there until the last block is joined, and until the command ends; --tiles 2 is a city of two tiles.
With --compiled passes of the same network, compiled and as a worker runs it, in the run's precision, with all cores and
without any halo, are timed before and after the run: what is left of the fastest ones' speed is told of the run without
its start.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import psutil
import yaml
from city import as_worker, finish_run, peak_mib, repeat_tiles, start_run, write_city

from segpipe.pipeline.config import load_city
from segpipe.pipeline.plan import Plan, make_plan, read_settled

BARE_PX, BARE_S = (1024, 2048), 10
"""Sides of the windows of the bare passes around a run, and how many seconds each is timed."""


def run_and_watch(config: Path) -> tuple[float, dict[str, float]]:
    """Seconds of one `segpipe run`, and the peak memory of the driver and of the largest worker in MiB."""
    peak = {"driver": 0.0, "worker": 0.0}
    start = time.perf_counter()
    process = start_run(config)
    while process.poll() is None:
        for role, member in [("driver", process), *(("worker", child) for child in children(process))]:
            peak[role] = max(peak[role], peak_mib(member.pid))
        # Not more often: looking through all processes for children takes from the run what it measures.
        with suppress(psutil.TimeoutExpired):
            process.wait(1)
    finish_run(process, config)
    return time.perf_counter() - start, peak


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def predict_and_bare(folder: Path, passes: int) -> tuple[float, float]:
    """Megapixels of window a second: of the whole predict task of the fullest block, and of bare passes of its window.

    Both in this process, turn about. The task reads its chunks, normalises, predicts, quantises and writes.
    """
    import torch

    from segpipe.pipeline import stages

    plan = make_plan(load_city(folder / "city.yaml"), read_settled(folder / "run"))
    site = stages.Site(plan)
    predictor = site.network.predictor
    entries = {block: site.ledger.entry("predict", stages.cell_unit(*block)) for block in plan.blocks()}
    block = max(entries, key=lambda block: entries[block]["valid_px"])
    seen = []

    def bare_pass():
        with torch.inference_mode():
            predictor.forward(seen[0])
            if seen[0].is_cuda:
                torch.cuda.synchronize()

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


def bare_passes(plan: Plan) -> dict[str, Callable[[], float]]:
    """Each gives megapixels a second, the median of passes on a window of one size.

    Compiled ones, and eager ones of the network made ready as a worker runs it: either may be the faster. On this
    process's device, in the precision of the plan, with all cores.
    """
    import torch
    from forward import compiled, waited

    from segpipe.models.predictor import input_side
    from segpipe.models.weights import load_bundle
    from segpipe.pipeline.network import load_predictor
    from segpipe.pipeline.plan import model_file
    from segpipe.pipeline.workers import allowance

    predictor = load_predictor(plan)
    network = load_bundle(model_file(plan), allowed_module=plan.card.module).network.eval()
    runs = {"compiled": compiled(network, predictor.device, predictor.dtype), "eager": predictor.forward}

    def timed(kind: str, side: int) -> float:
        torch.set_num_threads(allowance()[0])
        image_BCHW = torch.randn(1, len(plan.card.bands), side, side).to(predictor.device, predictor.dtype)
        once = waited(runs[kind], image_BCHW.to(memory_format=torch.channels_last))
        once()
        seconds: list[float] = []
        while sum(seconds) < BARE_S:
            start = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - start)
        return side**2 / 1e6 / statistics.median(seconds)

    sides = [input_side(predictor.network, plan.card.stride, side) for side in BARE_PX]
    return {f"{kind} {side} px": partial(timed, kind, side) for kind in runs for side in sides}


@click.command()
@click.argument("tiles", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="buildings-mobilenetv2", show_default=True)
@click.option("--repeat", "repeats", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--settings", default="{}", help="More of city.yaml, as YAML: '{grid: {block_px: 2048}}'.")
@click.option("--passes", default=3, show_default=True, help="How often the task and the bare pass are timed.")
@click.option(
    "--compiled", "against_compiled", is_flag=True, help="Time compiled and eager passes before and after runs."
)
@click.option("--tiles", "first", type=int, help="Only so many tiles, in natural order; else all.")
def main(
    tiles: Path,
    model: str,
    repeats: tuple[int, ...],
    settings: str,
    passes: int,
    against_compiled: bool,
    first: int | None,
) -> None:
    as_worker()
    timed: dict[str, Callable[[], float]] = {}
    columns = ["city", "valid Mpx", "whole run, s", "whole run, Mpx/s", "predict task, Mpx/s of window"]
    columns += ["bare pass, Mpx/s", "task / bare", "window px / valid px", "driver, MiB", "worker, MiB"]
    columns += ["until the first task, s", "blocks and joins, s", "publishing, s"]
    if against_compiled:
        columns += ["bare passes, before and after, Mpx/s", "run without start / fastest bare passes"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for times in repeats:
        with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as name:
            folder = Path(name)
            repeat_tiles(tiles, folder / "tiles", times, first)
            config = write_city(folder, model, **{"nodata": [0, 255]} | yaml.safe_load(settings))
            if against_compiled:
                timed = timed or bare_passes(make_plan(load_city(config)))
            before = [once() for once in timed.values()]
            begun = time.time()
            seconds, peak = run_and_watch(config)
            after = [once() for once in timed.values()]
            records = [json.loads(line) for line in (folder / "run" / "tasks.jsonl").read_text().splitlines()]
            manifest = json.loads((folder / "run" / "manifest.json").read_text())
            mpx = manifest["counts"]["valid_px"] / 1e6
            seen = sum(r["values"]["seen_px"] for r in records if r["stage"] == "predict") / 1e6
            task, bare = predict_and_bare(folder, passes)
            cells = [f"{times} x {times}", f"{mpx:.1f}", f"{seconds:.0f}", f"{mpx / seconds:.3f}", f"{task:.3f}"]
            cells += [f"{bare:.3f}", f"{task / bare:.2f}", f"{seen / mpx:.2f}"]
            cells += [f"{peak['driver']:.0f}", f"{peak['worker']:.0f}"]
            started = min(r["ended"] - r["seconds"] for r in records) - begun
            mapped = max(r["ended"] for r in records if r["stage"] != "publish") - begun
            cells += [f"{started:.1f}", f"{mapped - started:.1f}", f"{seconds - mapped:.1f}"]
            if against_compiled:
                pairs = [*zip(before, after, strict=True)]
                told = (f"{name}: {one:.3f} {other:.3f}" for name, (one, other) in zip(timed, pairs, strict=True))
                fastest = max(sum(pair) / 2 for pair in pairs)
                cells += [", ".join(told), f"{mpx / (seconds - started) / fastest:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
