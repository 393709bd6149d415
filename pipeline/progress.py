"""A listener that turns what happens in a run into bars on a terminal, plain log lines elsewhere, and a summary."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from .logs import tell

if TYPE_CHECKING:
    from .cluster import Outcome
    from .stages import Receipt

LOG_EVERY_S = 10.0


@dataclass
class StageSums:
    """What one stage has done so far. seconds are of workers, added up; wall_s from its first to its last task."""

    units: int = 0
    reused: int = 0
    failed: int = 0
    pixels: int = 0
    seconds: float = 0.0
    first: float = field(default=0.0, repr=False)
    last: float = field(default=0.0, repr=False)

    @property
    def wall_s(self) -> float:
        """Seconds from the first task's beginning to the last one's end."""
        return self.last - self.first

    @property
    def mpx_per_s(self) -> float:
        """Megapixels a second of wall time."""
        return self.pixels / 1e6 / self.wall_s if self.wall_s > 0 else 0.0


class Listener:
    """Counts what happens, shows it, and writes a line for every task to a file. Use it inside `watching`."""

    def __init__(self, console: Console, records: TextIO) -> None:
        self._console = console
        self._records = records
        self.totals: dict[str, int] = {}
        self._bars: dict[str, TaskID] = {}
        self._logged = time.monotonic()
        self.started = time.time()
        """When this run began, in seconds of the epoch, as its tasks tell when they ended."""
        self.stages: dict[str, StageSums] = {}
        self.device: dict[str, float] = {}
        """Seconds of all devices: of `network`, and of each of network.WAITS."""
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:>22}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=4)

    def say(self, text: str) -> None:
        """One line of text."""
        self._console.print(text, highlight=False, soft_wrap=True)
        tell(text)

    def expect(self, stage: str, units: int) -> None:
        """A stage will have so many units in all."""
        self.totals[stage] = units
        self.stages.setdefault(stage, StageSums())
        if stage in self._bars:
            self._progress.update(self._bars[stage], total=units)
        else:
            self._bars[stage] = self._progress.add_task(stage, total=units, speed="")

    def reused(self, stage: str, count: int = 1) -> None:
        """Units were found done."""
        self.stages[stage].reused += count
        self._show(stage)

    def done(self, receipt: Receipt, outcome: Outcome | None = None) -> None:
        """A task has ended well."""
        sums, now = self.stages[receipt.stage], time.monotonic()
        if not sums.units:
            sums.first = now - receipt.seconds
        sums.units, sums.pixels, sums.last = sums.units + 1, sums.pixels + receipt.pixels, now
        sums.seconds += receipt.seconds
        for what, seconds in receipt.values.get("device", {}).items():
            self.device[what] = self.device.get(what, 0.0) + seconds
        worker = outcome.worker if outcome is not None else "driver"
        self._record(asdict(receipt) | {"worker": worker, "ended": time.time()})
        self._show(receipt.stage)

    def failed(self, stage: str, unit: str, error: BaseException) -> None:
        """A task has failed for good."""
        self.stages[stage].failed += 1
        self._record({"stage": stage, "unit": unit, "error": str(error), "ended": time.time()})
        tell(f"{stage} {unit}: {error}", logging.ERROR, event="failed", stage=stage, unit=unit)
        self._show(stage)

    def _record(self, values: dict[str, Any]) -> None:
        self._records.write(json.dumps(values) + "\n")

    def _show(self, stage: str) -> None:
        sums = self.stages[stage]
        ended = sums.units + sums.reused + sums.failed
        speed = f"{sums.mpx_per_s:.2f} Mpx/s" if sums.mpx_per_s else ""
        if stage == "predict" and self.device:
            speed = f"{speed} {busy_share(self.device):.0%} busy"
        self._progress.update(self._bars[stage], completed=ended, speed=speed)
        now = time.monotonic()
        if now - self._logged > LOG_EVERY_S:
            self._logged = now
            self._say_line()

    def _say_line(self) -> None:
        """How far it is: in words where there are no bars, and in the log."""
        line = self._line()
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)
        stages = {
            stage: {"total": total, **asdict(self.stages[stage]), "wall_s": self.stages[stage].wall_s}
            for stage, total in self.totals.items()
        }
        tell(line, event="progress", stages=stages)

    def _line(self) -> str:
        parts = []
        for stage, total in self.totals.items():
            sums = self.stages[stage]
            ended = sums.units + sums.reused + sums.failed
            speed = f" {sums.mpx_per_s:.2f} Mpx/s" if sums.mpx_per_s else ""
            left = (total - ended) * sums.wall_s / sums.units if sums.units else 0.0
            eta = f" eta {left:.0f} s" if ended < total and left else ""
            busy = f" device {busy_share(self.device):.0%} busy" if stage == "predict" and self.device else ""
            parts.append(f"{stage} {ended}/{total}{speed}{busy}{eta}")
        return "; ".join(parts)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show bars while the block runs."""
        with self._progress:
            yield
        if self.totals:
            self._say_line()


def busy_share(device: Mapping[str, float]) -> float:
    """The share of their time, from their first pass on, in which devices ran the network."""
    return device["network"] / sum(device.values())


def told_of_device(device: Mapping[str, float]) -> str:
    """How busy devices were, and what they waited for."""
    # Here: a run that finds nothing to do needs this module, and none of what the network's needs.
    from .network import WAITS

    waits = ", ".join(f"{device[what] / sum(device.values()):.0%} {told}" for what, told in WAITS.items())
    return f"{busy_share(device):.0%} of the time in the network; waited {waits}"


def show_summary(console: Console, stages: dict[str, StageSums]) -> None:
    """A table of what each stage has done."""
    table = Table("stage", *(Column(name, justify="right") for name in ("done", "found done", "seconds", "Mpx/s")))
    for stage, sums in stages.items():
        speed = f"{sums.mpx_per_s:.2f}" if sums.units else ""
        table.add_row(stage, str(sums.units), str(sums.reused), f"{sums.wall_s:.1f}", speed)
    console.print(table)


def terminal(quiet: bool = False) -> Console:
    """The console for messages: standard error, so that output can be piped. quiet: it says nothing.

    What it is given is said as it is: names of files may hold brackets, and colons.
    """
    return Console(file=sys.stderr, quiet=quiet, markup=False, emoji=False)


def _is_torn(path: Path) -> bool:
    """True if the last line of a file has no end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


@contextmanager
def watching(folder: Path, console: Console) -> Iterator[Listener]:
    """A listener that appends to tasks.jsonl in a run folder."""
    path = folder / "tasks.jsonl"
    torn = _is_torn(path)
    with path.open("a", encoding="utf-8", buffering=1) as records:
        if torn:
            # A run that was killed, or a full disk, has cut the last line short.
            records.write("\n")
        yield Listener(console, records)
