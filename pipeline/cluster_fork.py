"""The process that this machine's workers are forked from: it imports what they need while a run is planned."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing import forkserver, resource_tracker
from typing import Any

from .allocator import WORKER_ENVIRONMENT

STARTED_WITH = {"OPENBLAS_NUM_THREADS": "1", **WORKER_ENVIRONMENT}
"""Environment that any worker process is started with, but for variables that the user has exported."""
IMPORTED = ["distributed", "segpipe.pipeline.cluster_worker", "segpipe.pipeline.predict"]
"""Nothing of this may start a thread of Python, or use a GPU, at its import: no fork would bear it."""

_forking = ContextVar("_forking", default=False)


@contextmanager
def forking() -> Iterator[None]:
    """Within it workers of this machine are forked from one process, which starts at once; it ends with the block.

    Started each by itself, and after the plan, they would import for 6 s on two cores, and again after each death. On
    Linux alone: elsewhere libraries of the system do not bear a fork.
    """
    if sys.platform != "linux":
        yield
        return
    token = _forking.set(False)
    try:
        _forking.set(_start())
        yield
    finally:
        _forking.reset(token)
        _end()


def starting_method() -> str:
    """How worker processes are to be started now, by multiprocessing's name for it."""
    return "forkserver" if _forking.get() else "spawn"


@contextmanager
def held_back(*signals: signal.Signals) -> Iterator[None]:
    """Hold signals to this thread back; they come when it is over. Whatever starts within holds them back for ever."""
    # Multiprocessing's own helper, were it started later, would let the thread that starts it take signals again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> bool:
    """Start the process, which leaves Ctrl-C to this one; False where there is no place for its socket.

    As with workers that start by themselves, what the user has exported counts.
    """
    # Started by -c it would take a module in the working directory for the library of that name.
    added = {name: value for name, value in (STARTED_WITH | {"PYTHONSAFEPATH": "1"}).items() if name not in os.environ}
    forkserver.set_forkserver_preload(IMPORTED)
    os.environ.update(added)
    try:
        with held_back(signal.SIGINT):
            forkserver.ensure_running()
    except OSError:
        return False
    finally:
        for name in added:
            os.environ.pop(name)
    return True


def _end() -> None:
    """Kill it, which may still import: all that waits for this command's output would wait for that too."""
    server: Any = forkserver._forkserver  # there is no other way to end it
    try:
        if server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()
    except OSError:  # it was gone already, with its socket, or this process is not told how its children end
        server._forkserver_pid = None
