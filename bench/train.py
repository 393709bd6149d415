"""Speed of the steps of `segpipe train` against bare steps on tensors that are already in memory.

    python bench/train.py conf/train/buildings.yaml --set fit.crop_px=256 --set fit.batch=8 --steps 20

Both take turns in one process, with the same network, loss, optimiser, precision and threads, so the ratio holds even
where the speeds do not. A step of the training draws its crops from the chunks, here or in other processes, augments
them, measures them, averages weights and writes checkpoints; a bare one is forward, loss and backward of as many
batches (fit.accumulate), and the step of the optimiser.
Prints Markdown: medians over the rounds, also of the ratios of each round. Processor seconds are of all threads and of
the processes that read crops; on a machine that does other work besides, only their ratio tells something.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import psutil
import torch
from rich.console import Console

from segpipe.models.augment import Batch, prepare
from segpipe.models.field import probe_field
from segpipe.models.fit import FitSettings, Fitted, Record, fit
from segpipe.models.loop import compute_repeatably, freeze, keep_statistics, make_optimiser
from segpipe.models.losses import Loss
from segpipe.models.metrics import Scores
from segpipe.models.networks import Network
from segpipe.models.predictor import resolve_device
from segpipe.pipeline import train
from segpipe.pipeline.allocator import keep_memory
from segpipe.pipeline.config import load_train

HELD = 4
"""Batches that are held in memory for the bare steps."""


def bare_seconds(
    network: Network, loss: Loss, batches: list[Batch], settings: FitSettings, steps: int
) -> tuple[float, float]:
    """Seconds of one bare step, of so many: of as many batches, and of what learns, as in the fit."""
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    network = copy.deepcopy(network).to(resolve_device(), dtype).to(memory_format=torch.channels_last).train()
    freeze(network, settings)
    keep_statistics(network, settings)
    optimiser = make_optimiser(network, settings)
    device = next(network.parameters()).device
    endless = itertools.cycle(batches)

    def step() -> None:
        optimiser.zero_grad()
        for batch in itertools.islice(endless, settings.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                value = loss(network(batch.image_BCHW.to(dtype)), batch.target_BKHW, batch.valid_BHW)
            (value / settings.accumulate).backward()
        optimiser.step()

    step()
    start = spent()
    for _ in range(steps):
        step()
    return per_step(start, spent(), steps)


def per_step(start: tuple[float, float], end: tuple[float, float], steps: int) -> tuple[float, float]:
    return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps


def spent() -> tuple[float, float]:
    """Seconds on the clock, and of processors in this process and its children; a GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    this = psutil.Process()
    cpu = sum(times.user + times.system for times in (one.cpu_times() for one in (this, *this.children())))
    return time.perf_counter(), cpu


def fit_seconds(run: Callable[..., Fitted], settings: FitSettings, steps: int) -> tuple[float, float]:
    """Seconds of one step of a fit, of so many after as many to warm up."""
    settings = replace(settings, epochs=2, steps_per_epoch=steps, patience=None, warmup_steps=0)
    ends: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as name:
        run(settings, Path(name), lambda record: ends.append(spent()))
    return per_step(ends[0], ends[1], steps)


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change a key of the YAML.")
@click.option("--steps", default=20, show_default=True, help="Steps of each kind in a round.")
@click.option("--rounds", default=3, show_default=True)
def main(config: Path, overrides: tuple[str, ...], steps: int, rounds: int) -> None:
    keep_memory()
    compute_repeatably()
    with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as name:
        job_config = load_train(config, (*overrides, f"output={name}"))
        network, loss = train.new_network(job_config), train.new_loss(job_config)
        sources = train.plan_sources(job_config, Path(name) / "areas")
        train.read_sources(sources, job_config.readers, Console(quiet=True))
        job = train.plan_job(job_config, network, sources, probe_field(network, network.stride, len(job_config.bands)))
        settings, device = job.settings, resolve_device()
        prepared = partial(prepare, framing=job.framing, normalisation=job.normalisation, augmentation=job.augmentation)
        held = [prepared(job.crops[number], device) for number in range(HELD)]

        def run(settings: FitSettings, folder: Path, report: Callable[[Record], None]) -> Fitted:
            own = copy.deepcopy(network).to(device)
            return fit(own, loss, job.crops, prepared, lambda network: Scores.empty(), settings, folder, report)

        bare, whole = [], []
        for _ in range(rounds):
            bare.append(bare_seconds(network, loss, held, settings, steps))
            whole.append(fit_seconds(run, settings, steps))
        columns = [
            *zip(*bare, strict=True),
            *zip(*whole, strict=True),
            *([w[kind] / b[kind] for b, w in zip(bare, whole, strict=True)] for kind in (0, 1)),
        ]
        numbers = " | ".join(f"{statistics.median(column):.3f}" for column in columns)
        print(
            "| network | batch | crop px | precision | loaders | threads | bare step, s | processor s | of a fit, s |"
            " processor s | fit / bare | of processor s |"
        )
        print("|" + "---|" * 12)
        print(
            f"| {job_config.network.name} | {job_config.fit.batch} | {job.framing.crop_yx[0]} | {settings.precision} |"
            f" {settings.loaders} | {torch.get_num_threads()} | {numbers} |"
        )


if __name__ == "__main__":
    main()
