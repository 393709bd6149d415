"""Tasks sent to Dask workers, outcomes taken back, and what becomes of tasks whose worker dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from segpipe.tasks.errors import RunError, UserError, WorkerError

from .cluster import GpuUse, Jobs, Outcome, Task
from .cluster_check import own_versions
from .cluster_worker import WORKER_TIMEOUT_S, plugin_name, refusal, site_plugin, work
from .logs import tell
from .plan import Plan
from .stages import Receipt

LOOK_EVERY_S = 1.0
GONE_FOR_S = 60.0
"""A run that has waited so long without a worker for its tasks ends: a nanny, or a batch system, has had its time."""
MOST_LOST = 3
"""Times that a task may go down alone with a worker whose host goes too: that may be a batch system's doing."""
TASKS_PER_GPU = 2
"""While one block is in the network, the next one is read, or the last one written."""
READS_AT_ONCE = 4
"""Chunks that are one task to Dask, whose scheduler takes some 2 ms for each, and a worker 0.1 s for a chunk."""
OWN_FAILURES = 0
"""`distributed.scheduler.allowed-failures` of schedulers that are ours: of the tasks of a worker that dies it is not
known which has killed it, so none is sent again in company."""


@dataclass
class _Sent:
    """A task under way. deaths: of workers, while it was alone on them; alone_on: address of such a one; name: its."""

    task: Task
    deaths: int = 0
    alone_on: str = ""
    name: str = ""


class Distributed:
    """Tasks on a Dask cluster. Only names travel: arrays stay in the store.

    The tasks of a worker that dies are suspects: they wait until nothing else is under way, and are then sent each to a
    worker of its own. Whoever kills that one too is set aside.
    """

    def __init__(
        self,
        client: Any,
        plan: Plan,
        jobs: Jobs | None = None,
        unfit: frozenset[str] = frozenset(),
        check: bool = False,
        count_gpus: bool = False,
    ) -> None:
        """unfit: addresses of workers that are left out; check: let each worker look at tile, weights and store.

        UserError for a worker that finds something wrong.
        """
        from distributed import as_completed

        self._client, self._run_plan = client, plan
        self._jobs = jobs if jobs is not None else Jobs()
        self.dashboard = client.dashboard_link if _has_dashboard(client) else ""
        self._done = as_completed(loop=client.loop, with_results=False, raise_errors=False)
        self._unsent: list[_Sent] = []
        self._sent: dict[Any, list[_Sent]] = {}
        self._suspects: list[_Sent] = []
        self._ended: list[Outcome] = []
        self._unfit = dict.fromkeys(unfit, "another kind of device")
        self._workers: Mapping[str, Mapping[str, Any]] = {}
        self._coming = 0
        self._sparing = False
        self._looked = 0.0
        self._alone_since: float | None = None
        self._count_gpus, self._held_s, self._busy_s = count_gpus, 0.0, 0.0
        self._run = f"segpipe-{plan.name}-{time.time_ns():x}"
        plugin = site_plugin(self._run, pickle.dumps(plan), own_versions(), check)
        _patiently(lambda: client.register_plugin(plugin))
        self._jobs.begin()
        self._look()
        if check:
            self._refuse_unfit()

    def _refuse_unfit(self) -> None:
        for address, reason in self._client.run(refusal, self._run, on_error="ignore").items():
            if reason and address not in self._unfit:
                self.leave()
                raise UserError(f"worker {self._name(address)}: {reason}")

    def _name(self, address: str) -> str:
        name = str(self._workers.get(address, {}).get("name", address))
        return address if name in ("", address) else f"{name} ({address})"

    @property
    def capacity(self) -> int:
        """Twice as many tasks as threads are there, or to come."""
        return 2 * max(1, self._coming + sum(int(it["nthreads"]) for it in self._workers.values()))

    def submit(self, task: Task) -> None:
        """Send a task on its way, with those that are submitted before the next outcome is waited for."""
        if task.gpu:
            self._sparing = False
            self._jobs.want_gpus()
        self._unsent.append(_Sent(task))

    def _send_all(self) -> None:
        """Send what was submitted: alike tasks in one message, for the scheduler takes about as long for one task."""
        alike: defaultdict[tuple[bool, int, str], list[list[_Sent]]] = defaultdict(list)
        for sent in self._unsent:
            calls = alike[sent.task.gpu, sent.task.priority, sent.alone_on]
            if calls and sent.task.stage.__name__ == "read" and not sent.alone_on and len(calls[-1]) < READS_AT_ONCE:
                calls[-1].append(sent)
            else:
                calls.append([sent])
        self._unsent = []
        for (gpu, priority, alone_on), calls in alike.items():
            workers = [alone_on] if alone_on else self._chosen_workers()
            futures = self._client.map(
                work,
                [self._run] * len(calls),
                [[(sent.task.stage.__name__, sent.task.arguments) for sent in call] for call in calls],
                key=[_key_of(call[0].task) for call in calls],
                resources={"GPU": 1 / TASKS_PER_GPU} if gpu else None,
                workers=workers,
                # Fit workers may be gone and others have come: those say so themselves.
                allow_other_workers=bool(workers) and not alone_on,
                priority=-priority,
                pure=False,
            )
            self._sent.update(zip(futures, calls, strict=True))
            self._done.update(futures)

    def _chosen_workers(self) -> list[str] | None:
        """Addresses of the workers that are to have what is sent, None if all are."""
        if not (self._unfit or self._sparing):
            return None
        return [it for it in self._workers if it not in self._unfit and it not in self._to_be_spared()] or None

    def next(self) -> Outcome:
        """Wait for the next task to end. RunError if nobody is left that could end one."""
        while not self._ended:
            if self._suspects and all(sent.alone_on for sent in (*self._under_way(), *self._unsent)):
                self._try_alone()
            self._send_all()
            if self._arrived():
                self._take()
            if time.monotonic() - self._looked >= LOOK_EVERY_S:
                self._look()
        return self._ended.pop(0)

    def _under_way(self) -> Iterator[_Sent]:
        return chain.from_iterable(self._sent.values())

    def _arrived(self) -> bool:
        """Wait until a task has ended, but not longer than until it is time to look after the workers."""
        with self._done.thread_condition:
            return bool(self._done.thread_condition.wait_for(self._done.has_ready, LOOK_EVERY_S))

    def _take(self) -> None:
        """See what tasks have come to that have ended: they may have to be done again."""
        from distributed.scheduler import KilledWorker

        finished = []
        for future in self._done.next_batch(block=False):
            if future not in self._sent:
                continue  # taken back: its worker was gone
            if future.cancelled():
                raise _scheduler_lost()
            if future.status == "finished":
                finished.append(future)
            elif future.status != "error":
                self._done.add(future)
            else:
                error = future.exception()
                for sent in self._sent.pop(future):
                    if isinstance(error, KilledWorker):
                        self._suspect(sent)
                    elif isinstance(error, WorkerError) and error.worker:
                        self._leave_out(error)
                        self._unsent.append(sent)
                    else:
                        self._ended.append(Outcome(sent.task, None, error, ""))
        if finished:
            self._fetch(finished)

    def _fetch(self, futures: list[Any]) -> None:
        """Fetch the receipts of finished tasks, all in one message; what a worker takes with it is waited for again."""
        found: list[tuple[list[Receipt | Exception], str]] = []
        with contextlib.suppress(Exception, asyncio.CancelledError):
            found = self._client.sync(
                lambda: self._client.gather(futures, errors="skip", asynchronous=True),
                callback_timeout=WORKER_TIMEOUT_S,
            )
        if len(found) != len(futures):
            self._done.update(futures)
            return
        for future, (ended, worker) in zip(futures, found, strict=True):
            for sent, end in zip(self._sent.pop(future), ended, strict=True):
                if isinstance(end, Exception):
                    self._ended.append(Outcome(sent.task, None, end, ""))
                    continue
                self._busy_s += end.values.get("device", {}).get("network", 0.0)
                self._ended.append(Outcome(sent.task, end, None, worker))

    # Looking after the workers

    def _look(self) -> None:
        """See who is there, replace what was lost, and take back what was sent to one alone who is gone."""
        now = time.monotonic()
        if self._count_gpus and self._looked:
            self._held_s += (now - self._looked) * sum(1 for it in self._workers.values() if _has_gpu(it))
        self._workers, self._looked = workers_of(self._client), now
        self._coming = self._jobs.upkeep(self._workers)
        if (spared := self._to_be_spared()) and not any(self._client.processing(workers=spared).values()):
            self._sparing = False
            self._jobs.spare_gpus()
        self._unfit = {address: why for address, why in self._unfit.items() if address in self._workers}
        if self._coming or self._has_worker():
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since >= GONE_FOR_S:
            raise RunError(
                f"no worker that could go on was seen for {GONE_FOR_S:.0f} s{self._told_of_unfit()}; what is done is"
                ' kept; start workers (with --resources "GPU=1") and run the same command again to go on'
            )
        for future, (sent, *_) in list(self._sent.items()):
            if sent.alone_on and sent.alone_on not in self._workers and not future.done():
                # Sent to that one alone it would wait for ever.
                del self._sent[future]
                future.cancel()
                self._suspect(sent, sure=False)

    def _has_worker(self) -> bool:
        """True if some task that is under way has a worker that it could run on, or none is under way."""
        tasks = [sent.task for sent in (*self._under_way(), *self._suspects)]
        fit = [worker for address, worker in self._workers.items() if address not in self._unfit]
        return not tasks or any(_has_gpu(worker) or not task.gpu for worker in fit for task in tasks)

    def _leave_out(self, error: WorkerError) -> None:
        if error.worker not in self._unfit:
            tell(f"worker {self._name(error.worker)} is left out: {error}", logging.WARNING, event="left out")
        self._unfit[error.worker] = str(error)

    def _told_of_unfit(self) -> str:
        return "".join(f"; {self._name(address)} is left out: {why}" for address, why in self._unfit.items())

    # Tasks whose worker has died

    def _try_alone(self) -> None:
        """Send suspects to workers, one to each."""
        self._workers = workers_of(self._client)
        taken = {sent.alone_on for sent in self._under_way()} | self._unfit.keys()
        free = {address: worker for address, worker in self._workers.items() if address not in taken}
        for sent in list(self._suspects):
            able = [address for address, worker in free.items() if _has_gpu(worker) or not sent.task.gpu]
            if able:
                self._suspects.remove(sent)
                sent.alone_on, sent.name = able[0], str(free.pop(able[0])["name"])
                self._unsent.append(sent)
            elif sent.task.gpu:
                self._jobs.want_gpus()

    def _suspect(self, sent: _Sent, sure: bool = True) -> None:
        """Set a task aside whose worker has died while it was alone there, or have it tried alone.

        sure: the scheduler says that the worker died of it; else it is only gone, perhaps before it had begun.
        """
        address, sent.alone_on = sent.alone_on, ""
        if address:
            sent.deaths += 1
            if sent.deaths >= MOST_LOST or (self._comes_back(sent.name) and (sure or sent.deaths > 1)):
                self._ended.append(Outcome(sent.task, None, RunError(self._cause(address, sent.name)), ""))
                return
        self._suspects.append(sent)

    def _comes_back(self, name: str) -> bool:
        """Whether a nanny starts a worker anew, so that it was the process alone that died, and not its host or job."""
        deadline = time.monotonic() + WORKER_TIMEOUT_S
        while time.monotonic() < deadline:
            self._workers = workers_of(self._client)
            if any(str(worker["name"]) == name for worker in self._workers.values()):
                return True
            time.sleep(0.2)
        return False

    def _cause(self, address: str, name: str) -> str:
        """Why a task that was alone on a worker has most likely killed it."""
        plan, gib = self._run_plan, 2**30
        again = "its worker died twice, the second time with nothing else to do"
        estimate = f"the plan's estimate is {plan.task_bytes / gib:.1f} GiB a block"
        cure = "cure: more memory for each worker, or a smaller `grid: {block_px: …}`"
        limit = f"{plan.workers.memory_bytes / gib:.1f} GiB"
        events = self._client.get_events("worker-restart-memory")
        if over := [event for _, event in events if event["worker"] == address]:
            return f"{again}: it took {over[-1]['rss'] / gib:.1f} GiB of a limit of {limit}; {estimate}; {cure}"
        told = self._last_words(name)
        if " status " in told:
            return f"{again}: {told}; not for want of memory: it ended itself"
        told = f": {told}" if told else ""
        return f"{again}{told}; most likely for want of memory: its limit is {limit}, {estimate}; {cure}"

    def _last_words(self, name: str) -> str:
        """What the nanny of a worker has told of the last death of its process; an empty text if it cannot be asked."""
        deadline = time.monotonic() + WORKER_TIMEOUT_S
        while time.monotonic() < deadline:
            addresses = [address for address, worker in self._workers.items() if str(worker["name"]) == name]
            if not addresses:
                return ""
            # Of a worker that has only just been started anew, asking may fail.
            with contextlib.suppress(Exception):
                for logs in self._client.get_worker_logs(workers=addresses, nanny=True).values():
                    # The latest comes first.
                    for _, line in logs:
                        if "Worker process" in line:
                            return "the process" + str(line).partition("Worker process")[2].partition("\n")[0]
            time.sleep(0.5)
        return ""

    def spare_gpus(self) -> None:
        """Nothing is left to be predicted: when nothing else runs on them either, they are given back."""
        self._sparing = self._jobs.elastic

    def _to_be_spared(self) -> list[str]:
        """Addresses of workers with GPUs that are to go: only if others are there for what is left."""
        gpus = [address for address, worker in self._workers.items() if _has_gpu(worker)]
        return gpus if self._sparing and len(gpus) < len(self._workers) else []

    def gpu_use(self) -> GpuUse | None:
        """None where the workers predict on what is there anyway."""
        return GpuUse(self._held_s, self._busy_s) if self._count_gpus else None

    @contextlib.contextmanager
    def reporting(self, file: Path | None) -> Iterator[None]:
        """Write Dask's performance report to a file, also of a run that fails."""
        from distributed import performance_report

        if file is None:
            yield
            return
        with self._client.as_current(), performance_report(filename=str(file)):
            yield

    def staff(self) -> list[str]:
        """Name, address, what it can do, and whether it is left out, of each worker; of jobs, of one of each kind."""
        if self._jobs.elastic:
            self._jobs.sample()
            self._look()
            while self._coming:
                time.sleep(LOOK_EVERY_S)
                self._look()
            self._refuse_unfit()
        return [self._told_of(address, worker) for address, worker in self._workers.items()]

    def _told_of(self, address: str, worker: Mapping[str, Any]) -> str:
        limit = f"{(worker.get('memory_limit') or 0) / 2**30:.1f} GiB"
        predicts = ", predicts" if _has_gpu(worker) else ""
        left_out = f"; left out: {self._unfit[address]}" if address in self._unfit else ""
        return f"{self._name(address)}: {worker['nthreads']} tasks at once, {limit}{predicts}{left_out}"

    def leave(self) -> None:
        """Let workers that live on drop the plan and the network of this run; those of other runs stay."""
        with contextlib.suppress(Exception):
            self._jobs.end()
            self._client.unregister_worker_plugin(plugin_name(self._run))


def _key_of(task: Task) -> str:
    """A name for a task, another one whenever it is sent."""
    return f"{task.stage.__name__}-{'-'.join(str(it) for it in task.arguments[:3])}-{time.time_ns():x}"


def _patiently(call: Callable[[], object]) -> None:
    """Call what asks all workers: one that goes at that moment, as workers may, makes it fail."""
    deadline = time.monotonic() + WORKER_TIMEOUT_S
    while True:
        try:
            call()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(f"workers do not answer: {error}; run the same command again to go on") from None
            time.sleep(0.5)


def workers_of(client: Any) -> Mapping[str, Mapping[str, Any]]:
    """The workers that the scheduler has, by address. RunError if it is gone: the client has given it up."""
    found = client.scheduler_info(n_workers=-1)
    # What was last known stays, and says nothing, in a client that closes; one that has closed knows nothing at all.
    if client.status not in ("running", "connecting") or "workers" not in found:
        raise _scheduler_lost()
    workers: Mapping[str, Mapping[str, Any]] = found["workers"]
    return workers


def _scheduler_lost() -> RunError:
    return RunError("the Dask scheduler was lost; what is done is kept; run the same command again to go on")


def _has_dashboard(client: Any) -> bool:
    return bool(client.scheduler_info(n_workers=0).get("services", {}).get("dashboard"))


def _has_gpu(worker: Mapping[str, Any]) -> bool:
    return bool(worker["resources"].get("GPU", 0) >= 1)
