"""Worker processes of this machine: they leave Ctrl-C to the driver, and end with it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from segpipe.tasks.errors import RunError

from .cluster import Pool
from .cluster_fork import held_back, starting_method
from .cluster_pool import TASKS_PER_GPU, Distributed
from .devices import one_device_each
from .plan import Plan

CLOSING_S = 3
"""What a client or a cluster is given to close in: all of it must end within 10 s of Ctrl-C."""
STARTING_METHOD = "distributed.worker.multiprocessing-method"
THREADS_PER_WORKER = TASKS_PER_GPU + 1
"""Those of the tasks that share the GPU, and one for reading and vectorizing meanwhile."""


@contextmanager
def local_pool(plan: Plan) -> Iterator[Pool]:
    """A pool on worker processes of this machine, which end with it; what still runs in them then is abandoned."""
    import dask

    options = {
        "nthreads": THREADS_PER_WORKER,
        "memory_limit": plan.workers.memory_bytes,
        "resources": {"GPU": 1},
    }
    count = plan.workers.count
    on_gpus = plan.recipe.device.startswith("cuda")
    environments = one_device_each(count, os.environ) if on_gpus else [{}] * count
    with dask.config.set({STARTING_METHOD: starting_method()}), _local_client(options, environments) as client:
        yield Distributed(client, plan)


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
    from distributed.scheduler import KilledWorker

    options = {"nthreads": 1, "memory_limit": 0}
    with _local_client(options, [{}] * min(workers, len(calls))) as client:
        futures = [client.submit(function, *arguments, pure=False) for arguments in calls]
        for done, future in enumerate(as_completed(futures, loop=client.loop, raise_errors=False), start=1):
            error = future.exception() if future.status == "error" else None
            if isinstance(error, KilledWorker):
                raise RunError("a worker process died; most likely for want of memory; run the same command again")
            if error is not None:
                raise error
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
        with held_back(signal.SIGINT):
            # Ctrl-C in a terminal goes to all processes in it. What this thread holds back, the thread of the loop
            # holds back for ever, and so does each worker process, which is started from there, be it anew after a
            # death. So it comes to the main thread alone, and that ends the others.
            loop = LoopRunner()
            loop.start()
            closing.callback(loop.stop, CLOSING_S)
        loop.loop.asyncio_loop.set_exception_handler(lambda loop, context: None)
        with held_back(signal.SIGINT, signal.SIGTERM):
            # Stopped in here, it would leave processes that nobody knows.
            cluster = SpecCluster(
                workers={
                    number: {"cls": Nanny, "options": worker | {"env": environment}}
                    for number, environment in enumerate(environments)
                },
                scheduler={
                    "cls": Scheduler,
                    "options": here | {"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                },
                silence_logs=logging.CRITICAL,
                loop=loop.loop,
            )
            closing.callback(close_soon, cluster)
            closing.callback(_kill_workers, cluster)
            _add_page(cluster.scheduler)
        client = Client(cluster, set_as_default=False)
        closing.callback(close_soon, client)
        # Killed before anything is closed: closing would wait for what runs in them.
        closing.callback(_kill_workers, cluster)
        yield client


def _add_page(scheduler: Any) -> None:
    """Let a scheduler serve Dask's page: imported when it is first looked at, as that takes a second of a start."""
    from tornado.httputil import HTTPServerRequest
    from tornado.web import Application

    pages = scheduler.http_application

    class Page(Application):
        """Asked last, for what no other application of the scheduler has; the page takes its place."""

        def find_handler(self, request: HTTPServerRequest, **named: Any) -> Any:
            """Import the page, and ask all again."""
            from distributed.dashboard.scheduler import connect

            pages.applications.remove(self)
            connect(pages, scheduler.http_server, scheduler)
            return pages.find_handler(request, **named)

    pages.add_application(Page())


def close_soon(it: Any, seconds: float = CLOSING_S) -> None:
    """Close a client or a cluster within seconds."""
    with contextlib.suppress(Exception):
        it.close(timeout=seconds)


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
