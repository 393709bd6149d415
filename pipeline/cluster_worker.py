"""What runs on a worker process of Dask: it takes the plan of a run, looks whether it can follow it, and does tasks."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from typing import Any

from segpipe.tasks.errors import SegpipeError, WorkerError

from .cluster_check import unfit_because
from .devices import take_own_device
from .stages import Receipt, Site

WORKER_TIMEOUT_S = 15

_sites: dict[str, Site] = {}
_refusals: dict[str, str] = {}
"""Why this process cannot work on a run."""


def plugin_name(run: str) -> str:
    """The name by which a scheduler knows the plugin of a run."""
    return f"site-{run}"


def site_plugin(run: str, plan: bytes, versions: Mapping[str, str], check: bool) -> Any:
    """What every worker is told of a run. plan: pickled; versions: the driver's; check: let it look around."""
    from distributed import WorkerPlugin

    class SitePlugin(WorkerPlugin):
        """Hands the plan to every worker process, now and when one joins later."""

        name = plugin_name(run)

        def setup(self, worker: Any) -> None:
            # This class travels by value, with copies of the globals that it names; functions travel by name.
            _take_plan(run, plan, versions, check)

        def teardown(self, worker: Any) -> None:
            _leave_plan(run)

    return SitePlugin()


def _take_plan(run: str, plan: bytes, versions: Mapping[str, str], check: bool) -> None:
    if check:
        take_own_device()
    try:
        taken = pickle.loads(plan)
        if any(site.plan.storage != taken.storage for site in _sites.values()):
            _refusals[run] = "it works on another run, with another `storage:`; expected the same, or other workers"
            return
        site = Site(taken)
    except (AttributeError, ImportError, TypeError) as error:
        _refusals[run] = f"it cannot take the plan: {error}; expected the driver's version of segpipe"
        return
    _refusals[run] = unfit_because(site, versions) if check else ""
    _sites[run] = site


def _leave_plan(run: str) -> None:
    _sites.pop(run, None)
    _refusals.pop(run, None)


def refusal(run: str) -> str:
    """Why this process cannot work on a run; an empty text: it can."""
    return _refusals.get(run, "it did not take the plan; its log says why")


def work(run: str, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> tuple[list[Receipt | Exception], str]:
    """Tasks on a worker, one after the other: stage and arguments. What one of several raises is told in its place."""
    from distributed import get_worker

    from . import stages

    worker = get_worker()
    # A worker that has just joined may be given a task before its plugins are set up.
    deadline = time.monotonic() + WORKER_TIMEOUT_S
    while run not in _refusals and time.monotonic() < deadline:
        time.sleep(0.05)
    if reason := refusal(run):
        raise WorkerError(reason, worker.address)
    ended: list[Receipt | Exception] = []
    for stage, arguments in calls:
        try:
            ended.append(getattr(stages, stage)(_sites[run], *arguments))
        except WorkerError as error:
            raise WorkerError(str(error), worker.address) from None
        except SegpipeError as error:
            if len(calls) == 1:
                raise
            ended.append(error)
    return ended, str(worker.name)
