"""The only dask: workers started or attached, tasks sent to them, outcomes taken back; and an in-process twin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Protocol

from segpipe.tasks.errors import RunError, UserError

from .allocator import WORKER_ENVIRONMENT
from .plan import Plan
from .stages import Receipt, Site

Stage = Callable[..., Receipt]

WORKER_TIMEOUT_S = 15
CLOSING_S = 3
"""What a client or a cluster is given to close in: all of it must end within 10 s of Ctrl-C."""
LOOK_EVERY_S = 15.0
GONE_FOR_S = 60.0
"""A run that has waited so long without a worker for its tasks ends: a nanny, or a batch system, has had its time."""
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
        """Wait for the next task to end. RunError if nobody is left that could end one."""
        alone_since: float | None = None
        while True:
            outcome = self._take() if self._arrived() else None
            if outcome is not None:
                return outcome
            if self._has_worker():
                alone_since = None
                continue
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since >= GONE_FOR_S:
                raise RunError(
                    f"no worker that could go on was seen for {GONE_FOR_S:.0f} s; what is done is kept; start workers"
                    ' (with --resources "GPU=1") and run the same command again to go on'
                )

    def _arrived(self) -> bool:
        """Wait until a task has ended, but not longer than until it is time to look after the workers."""
        with self._done.thread_condition:
            return bool(self._done.thread_condition.wait_for(self._done.has_ready, LOOK_EVERY_S))

    def _take(self) -> Outcome | None:
        """The outcome of a task that has ended; None if its worker has died with it, so that it is done again."""
        future = next(self._done)
        if future.cancelled():
            raise RunError("the Dask scheduler was lost; what is done is kept; run the same command again to go on")
        if future.status == "error":
            return Outcome(self._tasks.pop(future), None, _explained(future.exception()), "")
        if future.status == "finished":
            with contextlib.suppress(Exception, asyncio.CancelledError):
                receipt, worker = future.result(timeout=LOOK_EVERY_S)
                return Outcome(self._tasks.pop(future), receipt, None, worker)
        self._done.add(future)
        return None

    def _has_worker(self) -> bool:
        """True if some task that is under way has a worker that it could run on."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return any(_has_gpu(worker) or not task.gpu for worker in workers for task in self._tasks.values())

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
    """A pool on a cluster of this machine, or on the scheduler at an address.

    UserError if that has no worker which can take this plan's tasks.
    """
    import dask

    threads = str(plan.workers.threads)
    settings = {
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": 0.9,
        "distributed.comm.timeouts.connect": f"{WORKER_TIMEOUT_S}s",
        "distributed.comm.timeouts.tcp": f"{WORKER_TIMEOUT_S}s",
        "distributed.nanny.pre-spawn-environ": {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": "1",
            **WORKER_ENVIRONMENT,
        },
    }
    with dask.config.set(settings), _attached(plan, scheduler) if scheduler is not None else _local(plan) as pool:
        yield pool


@contextmanager
def _attached(plan: Plan, scheduler: str) -> Iterator[Pool]:
    """A pool on a running scheduler, which is left as it was found."""
    from distributed import Client

    try:
        client = Client(scheduler, timeout=WORKER_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(
            f"--scheduler {scheduler}: no answer ({type(error).__name__}); expected a Dask scheduler"
        ) from None
    with ExitStack() as closing:
        closing.callback(_close, client)
        pool = Distributed(client, plan, _check_workers(client, scheduler, plan))
        closing.callback(pool.leave)
        yield pool


@contextmanager
def _local(plan: Plan) -> Iterator[Pool]:
    """A pool on worker processes of this machine, which end with it; what still runs in them then is abandoned."""
    options = {
        "nthreads": THREADS_PER_WORKER,
        "memory_limit": plan.workers.memory_bytes,
        "resources": {"GPU": 1},
    }
    with _local_client(options, _environments(plan, os.environ)) as client:
        yield Distributed(client, plan, 2 * plan.workers.count * THREADS_PER_WORKER)


def call_each(function: Callable[..., None], calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[int]:
    """Call a function of a module with each of the arguments, on worker processes; gives how many are done so far.

    With one worker, or for one call, in this process. The first error ends it all.
    """
    if min(workers, len(calls)) < 2:
        for done, arguments in enumerate(calls, start=1):
            function(*arguments)
            yield done
        return
    from distributed import as_completed

    options = {"nthreads": 1, "memory_limit": 0}
    with _local_client(options, [{}] * min(workers, len(calls))) as client:
        futures = [client.submit(function, *arguments, pure=False) for arguments in calls]
        for done, future in enumerate(as_completed(futures, loop=client.loop, raise_errors=False), start=1):
            error = future.exception() if future.status == "error" else None
            if error is not None:
                raise _explained(error)
            yield done


@contextmanager
def _local_client(options: Mapping[str, Any], environments: Sequence[Mapping[str, str]]) -> Iterator[Any]:
    """A client of worker processes of this machine, one for each of the environments."""
    from distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.utils import LoopRunner, silence_logging_cmgr

    here = {"host": "127.0.0.1", "protocol": "tcp://"}
    worker = here | dict(options) | {"dashboard": False, "silence_logs": logging.CRITICAL}
    with ExitStack() as closing:
        # A cluster that ends amid its work has much to tell, in tracebacks, and none of it is news.
        closing.enter_context(silence_logging_cmgr(logging.CRITICAL))
        # Multiprocessing's own helper, were it started later, would let the thread that starts it take signals again.
        resource_tracker.ensure_running()
        with _held_back(signal.SIGINT):
            # Ctrl-C in a terminal goes to all processes in it. What this thread holds back, the thread of the loop
            # holds back for ever, and so does each worker process, which is started from there, be it anew after a
            # death. So it comes to the main thread alone, and that ends the others.
            loop = LoopRunner()
            loop.start()
            closing.callback(loop.stop, CLOSING_S)
        loop.loop.asyncio_loop.set_exception_handler(lambda loop, context: None)
        with _held_back(signal.SIGINT, signal.SIGTERM):
            # Stopped in here, it would leave processes that nobody knows.
            cluster = SpecCluster(
                workers={
                    number: {"cls": Nanny, "options": worker | {"env": environment}}
                    for number, environment in enumerate(environments)
                },
                scheduler={
                    "cls": Scheduler,
                    "options": here | {"dashboard": True, "dashboard_address": "127.0.0.1:0"},
                },
                silence_logs=logging.CRITICAL,
                loop=loop.loop,
            )
            closing.callback(_close, cluster)
            closing.callback(_kill_workers, cluster)
        client = Client(cluster, set_as_default=False)
        closing.callback(_close, client)
        # Killed before anything is closed: closing would wait for what runs in them.
        closing.callback(_kill_workers, cluster)
        yield client


def _environments(plan: Plan, environment: Mapping[str, str]) -> Sequence[dict[str, str]]:
    """What each worker process finds in its environment besides: on GPUs, the one device that is its own."""
    count = plan.workers.count
    if not plan.recipe.device.startswith("cuda"):
        return [{}] * count
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": devices[number % len(devices)].strip()} for number in range(count)]


@contextmanager
def _held_back(*signals: signal.Signals) -> Iterator[None]:
    """Hold signals to this thread back; they come when it is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close(it: Any) -> None:
    """Close a client or a cluster within seconds."""
    with contextlib.suppress(Exception):
        it.close(timeout=CLOSING_S)


def _kill_workers(cluster: Any) -> None:
    """Kill the worker processes of a cluster; their nannies do not start others."""
    import psutil

    pids = []
    for nanny in list(cluster.workers.values()):
        nanny.close_gracefully()
        pids.append(nanny.pid)
    for pid in filter(None, pids):
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()


def _has_gpu(worker: Mapping[str, Any]) -> bool:
    return bool(worker["resources"].get("GPU", 0) >= 1)


def _check_workers(client: Any, scheduler: str, plan: Plan) -> int:
    """Threads of all workers, times two; UserError if no worker is there, has the resource GPU, or is large enough."""
    try:
        client.wait_for_workers(1, timeout=WORKER_TIMEOUT_S)
    except TimeoutError:
        raise UserError(f"--scheduler {scheduler}: no worker; expected at least one") from None
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    able = [worker for worker in workers if _has_gpu(worker)]
    if not able:
        raise UserError(
            f"--scheduler {scheduler}: {len(workers)} workers, none with the resource GPU; expected at least one"
            ' started with --resources "GPU=1"'
        )
    # A worker without a limit has None or 0.
    limits = [int(worker.get("memory_limit") or 0) for worker in able]
    if all(limits) and max(limits) < plan.task_bytes:
        raise UserError(
            f"--scheduler {scheduler}: the largest worker with the resource GPU has {max(limits) / 2**30:.1f} GiB, but"
            f" a block of {plan.block_px} px takes {plan.task_bytes / 2**30:.1f} GiB; cure: workers with a larger"
            " --memory-limit, or a smaller `grid: {block_px: …}`"
        )
    return 2 * sum(int(worker["nthreads"]) for worker in workers)
