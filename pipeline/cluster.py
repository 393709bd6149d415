"""The only dask: workers started or attached, tasks sent to them, outcomes taken back; and an in-process twin."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from segpipe.tasks.errors import RunError, UserError

from .plan import Plan
from .stages import Receipt, Site

Stage = Callable[..., Receipt]

WORKER_TIMEOUT_S = 15
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**27),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment of workers: memory of activations is kept instead of being faulted in afresh at every layer, or, where
glibc gives a thread's large allocations back all the same, faulted in by huge pages (torch's own switch).

Not MALLOC_ARENA_MAX=1 too: blocks were up to twice as fast, but one fragmented arena took a worker from 8 to 16 GiB.
"""
THREADS_PER_WORKER = 2
"""One for the task that holds the GPU, one for reading and vectorizing meanwhile."""


@dataclass(frozen=True)
class Task:
    """A call stage(site, *arguments). gpu: it takes the resource GPU of a worker. Lower priorities come first."""

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


class Pool(Protocol):
    """Somewhere to run tasks. capacity: how many in flight keep it busy. dashboard: an address, or an empty text."""

    capacity: int
    dashboard: str

    def submit(self, task: Task) -> None:
        """Send a task on its way."""
        ...

    def next(self) -> Outcome:
        """Wait for any task to end. To be called only while some are under way."""
        ...


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

    def next(self) -> Outcome:
        """Run the first task of the queue."""
        _, _, task = self._waiting.pop(0)
        try:
            return Outcome(task, task.stage(self._site, *task.arguments), None, "here")
        except Exception as error:
            return Outcome(task, None, error, "here")


class Distributed:
    """Tasks on a Dask cluster. Only names travel: arrays stay in the store."""

    def __init__(self, client: Any, plan: Plan, capacity: int) -> None:
        from distributed import as_completed

        self._client = client
        self.capacity = capacity
        self.dashboard = client.dashboard_link if _has_dashboard(client) else ""
        self._done = as_completed(loop=client.loop, with_results=False, raise_errors=False)
        self._tasks: dict[Any, Task] = {}
        self._plan = pickle.dumps(plan)
        self._run = f"segpipe-{plan.name}-{time.time_ns():x}"
        client.register_plugin(_site_plugin(self._run, self._plan))

    def submit(self, task: Task) -> None:
        """Send a task on its way; work that dies with its worker is sent again by the scheduler."""
        future = self._client.submit(
            _work,
            self._run,
            task.stage.__name__,
            task.arguments,
            key=f"{task.stage.__name__}-{'-'.join(str(a) for a in task.arguments[:3])}-{time.time_ns():x}",
            resources={"GPU": 1} if task.gpu else None,
            priority=-task.priority,
            pure=False,
        )
        self._tasks[future] = task
        self._done.add(future)

    def next(self) -> Outcome:
        """Wait for the next task to end."""
        future = next(self._done)
        task = self._tasks.pop(future)
        if future.status == "finished":
            receipt, worker = future.result()
            return Outcome(task, receipt, None, worker)
        if future.cancelled():
            raise RunError("the Dask scheduler was lost; what is done is kept; run the same command again to go on")
        error = future.exception()
        return Outcome(task, None, _explained(error), "")

    def leave(self) -> None:
        """Let workers that live on drop the plan and the network of this run; those of other runs stay."""
        with contextlib.suppress(Exception):
            self._client.unregister_worker_plugin(_plugin_name(self._run))


def _plugin_name(run: str) -> str:
    return f"site-{run}"


def _has_dashboard(client: Any) -> bool:
    return bool(client.scheduler_info(n_workers=0).get("services", {}).get("dashboard"))


def _explained(error: BaseException) -> BaseException:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return RunError(
            "its worker died each time that it was tried, most likely for want of memory;"
            " cure: more `cluster: {memory: …}`, or a smaller `grid: {block_px: …}`"
        )
    return error


_sites: dict[str, Site] = {}


def _site_plugin(run: str, plan: bytes) -> Any:
    from distributed import WorkerPlugin

    class SitePlugin(WorkerPlugin):
        """Hands the plan to every worker process, now and when one joins later."""

        name = _plugin_name(run)

        def setup(self, worker: Any) -> None:
            # This class travels by value, with copies of the globals that it names; functions travel by name.
            _take_plan(run, plan)

        def teardown(self, worker: Any) -> None:
            _leave_plan(run)

    return SitePlugin()


def _take_plan(run: str, plan: bytes) -> None:
    _sites[run] = Site(pickle.loads(plan))


def _leave_plan(run: str) -> None:
    _sites.pop(run, None)


def _work(run: str, stage: str, arguments: tuple[Any, ...]) -> tuple[Receipt, str]:
    """One task on a worker."""
    from distributed import get_worker

    from . import stages

    # A worker that has just joined may be given a task before its plugins are set up.
    deadline = time.monotonic() + WORKER_TIMEOUT_S
    while run not in _sites:
        if time.monotonic() > deadline:
            raise RunError("a worker joined without the plan of this run; its log says why")
        time.sleep(0.05)
    receipt: Receipt = getattr(stages, stage)(_sites[run], *arguments)
    return receipt, str(get_worker().name)


@contextmanager
def open_pool(plan: Plan, scheduler: str | None) -> Iterator[Pool]:
    """A pool on a cluster of this machine, or on the scheduler at an address. UserError if that has no worker."""
    import dask
    from distributed import Client, LocalCluster

    threads = str(plan.workers.threads)
    dask.config.set(
        {
            "distributed.worker.memory.target": False,
            "distributed.worker.memory.spill": False,
            "distributed.worker.memory.pause": 0.9,
            "distributed.comm.timeouts.connect": f"{WORKER_TIMEOUT_S}s",
            "distributed.comm.timeouts.tcp": f"{WORKER_TIMEOUT_S}s",
            "distributed.nanny.pre-spawn-environ": {
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "OPENBLAS_NUM_THREADS": "1",
                **ALLOCATOR,
            },
        }
    )
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=WORKER_TIMEOUT_S, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise UserError(
                f"--scheduler {scheduler}: no answer ({type(error).__name__}); expected a Dask scheduler"
            ) from None
        with _closing(client):
            pool = Distributed(client, plan, _check_workers(client, scheduler))
            try:
                yield pool
            finally:
                pool.leave()
        return
    cluster = LocalCluster(
        n_workers=plan.workers.count,
        threads_per_worker=THREADS_PER_WORKER,
        processes=True,
        memory_limit=plan.workers.memory_bytes,
        resources={"GPU": 1},
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
        host="127.0.0.1",
    )
    with _closing(cluster):
        client = Client(cluster, set_as_default=False)
        with _closing(client):
            yield Distributed(client, plan, 2 * plan.workers.count * THREADS_PER_WORKER)


@contextmanager
def _closing(it: Any) -> Iterator[None]:
    """Close a client or a cluster within seconds; running tasks are abandoned."""
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            it.close(timeout=3)
        for process in _children() if hasattr(it, "worker_spec") else []:
            with contextlib.suppress(Exception):
                process.kill()


def _children() -> list[Any]:
    """Worker processes of this one."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def _check_workers(client: Any, scheduler: str) -> int:
    """Threads of all workers, times two; UserError if there is no worker, or none with the resource GPU."""
    try:
        client.wait_for_workers(1, timeout=WORKER_TIMEOUT_S)
    except TimeoutError:
        raise UserError(f"--scheduler {scheduler}: no worker; expected at least one") from None
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not any(worker["resources"].get("GPU", 0) >= 1 for worker in workers):
        raise UserError(
            f"--scheduler {scheduler}: {len(workers)} workers, none with the resource GPU; expected at least one"
            ' started with --resources "GPU=1"'
        )
    return 2 * sum(int(worker["nthreads"]) for worker in workers)
