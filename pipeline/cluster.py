"""The words between a run and its workers: tasks, outcomes, pools, and workers that come and go; an in-process twin.

Dask is known to the modules named cluster_ alone: `cluster_kinds` starts or finds workers, `cluster_check` looks at
them, `cluster_pool` sends them tasks, `cluster_worker` does these.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .plan import Plan
from .stages import Receipt, Site
from .workers import Crew

Stage = Callable[..., Receipt]


@dataclass(frozen=True)
class Task:
    """A call stage(site, *arguments). gpu: it takes a share of a worker's GPU. Lower priorities come first."""

    stage: Stage
    arguments: tuple[Any, ...]
    gpu: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a receipt or an error, and where."""

    task: Task
    receipt: Receipt | None
    error: BaseException | None
    worker: str


@dataclass(frozen=True)
class GpuUse:
    """Seconds that workers with the resource GPU were there, added up, and how many of them the network ran."""

    held_s: float
    busy_s: float


class Pool(Protocol):
    """Somewhere to run tasks. dashboard: an address, or an empty text."""

    dashboard: str

    @property
    def capacity(self) -> int:
        """How many tasks in flight keep it busy."""
        ...

    def submit(self, task: Task) -> None:
        """Send a task on its way."""
        ...

    def next(self) -> Outcome:
        """Wait for any task to end. To be called only while some are under way."""
        ...

    def spare_gpus(self) -> None:
        """Nothing is left to be predicted: give workers back that were asked for because of their GPUs."""
        ...

    def gpu_use(self) -> GpuUse | None:
        """How GPUs were used so far; None where that is nobody's concern."""
        ...

    def reporting(self, file: Path | None) -> AbstractContextManager[object]:
        """Write Dask's own page on what is done in the context, where there is Dask and a file."""
        ...

    def staff(self) -> list[str]:
        """The workers that are there, a line each."""
        ...


class Jobs:
    """Workers that a pool asks for and gives back; here those that stand by themselves, or that somebody else starts.

    elastic: those with GPUs come and go while a run goes on.
    """

    elastic = False

    def begin(self) -> None:
        """Ask for workers that read and vectorize, where they are asked for."""

    def end(self) -> None:
        """Nothing is left to be done by workers: give all back that were asked for."""

    def want_gpus(self) -> None:
        """Something is to be predicted: ask for workers with GPUs, where they are asked for."""

    def spare_gpus(self) -> None:
        """Nothing is left to be predicted."""

    def sample(self) -> None:
        """Ask for one worker of each kind, where they are asked for."""

    def upkeep(self, workers: Mapping[str, Mapping[str, Any]]) -> int:
        """Replace what was lost; how many worker threads are still to come. RunError if that is hopeless.

        workers: by address, as the scheduler tells of them.
        """
        return 0


@dataclass(frozen=True)
class Cluster:
    """Workers that are not those of `kind: local`, and a client of their scheduler.

    unfit: addresses of workers that were left out when the crew was chosen. count_gpus: what they cost is told.
    """

    client: Any
    jobs: Jobs
    crew: Crew
    unfit: frozenset[str] = frozenset()
    count_gpus: bool = False


class InProcess:
    """Runs a task when its outcome is asked for, in this process and thread. For tests and for one timed block."""

    capacity = 2
    dashboard = ""

    def __init__(self, plan: Plan) -> None:
        self._site = Site(plan)
        self._waiting: list[tuple[int, int, Task]] = []
        self._count = itertools.count()

    def submit(self, task: Task) -> None:
        """Put a task in the queue."""
        self._waiting.append((task.priority, next(self._count), task))
        self._waiting.sort(key=lambda entry: entry[:2])

    def spare_gpus(self) -> None:
        """There is nothing to be given back."""

    def gpu_use(self) -> GpuUse | None:
        """Nobody's concern."""
        return None

    def reporting(self, file: Path | None) -> AbstractContextManager[object]:
        """There is no Dask to tell of."""
        return contextlib.nullcontext()

    def staff(self) -> list[str]:
        """Nobody but ourselves."""
        return ["this process"]

    def next(self) -> Outcome:
        """Run the first task of the queue."""
        _, _, task = self._waiting.pop(0)
        try:
            return Outcome(task, task.stage(self._site, *task.arguments), None, "here")
        except Exception as error:
            return Outcome(task, None, error, "here")
