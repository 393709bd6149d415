"""Where workers come from: this machine, a scheduler that runs already, SLURM, or a class that the YAML names.

Whatever the kind, the driver ends with a client of a scheduler, and the workers that predict tell what they are before
the plan is made.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from segpipe.tasks.errors import UserError

from .cluster import Cluster, Jobs, Pool
from .cluster_check import Facts, Tls, address_in, check_address, choose_crew, facts_here, own_versions, tls_context
from .cluster_fork import STARTED_WITH
from .cluster_local import close_soon, local_pool
from .cluster_pool import OWN_FAILURES, Distributed
from .cluster_worker import WORKER_TIMEOUT_S
from .config import CityConfig, ClassConfig, SchedulerConfig, SlurmConfig, TlsConfig
from .plan import Plan

NETWORK_S = 12
"""A peer that has not answered for so long is gone: work moves on within 15 s of a cut. Dask takes nothing below 11."""


CLOSING_CLASS_S = 8
"""What a cluster of a named class is given to take its workers down in."""


def dask_settings(threads: int | str = "auto") -> dict[str, Any]:
    """What is asked of Dask, here and in workers: nothing spills, what is gone is soon noticed, logs are short."""
    environment = dict(STARTED_WITH)
    if threads != "auto":
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": 0.9,
        "distributed.scheduler.allowed-failures": OWN_FAILURES,
        "distributed.comm.timeouts.connect": f"{WORKER_TIMEOUT_S}s",
        "distributed.comm.timeouts.tcp": f"{NETWORK_S}s",
        # A worker that is lost for so long is closed by its cluster, nanny, job and all, even while it is started anew.
        "distributed.deploy.lost-worker-timeout": "1d",
        "distributed.nanny.pre-spawn-environ": environment,
        # The last so many messages of each connection, and all tasks they name: at 1,000 they took tens of MiB.
        "distributed.admin.low-level-log-length": 50,
        # At 10 ms looking at where threads are takes 2 % of what a network gets; at 20 ms whether loops keep up, 1 %.
        "distributed.worker.profile.interval": "100ms",
        "distributed.worker.profile.cycle": "10s",
        "distributed.admin.tick.interval": "500ms",
    }


@contextmanager
def _asked_of_dask(threads: int | str) -> Iterator[None]:
    import dask

    # Its defaults join Dask's configuration when it is imported: within `set` they would go again with what is set.
    importlib.import_module("distributed")
    with dask.config.set(dask_settings(threads)):
        yield


@contextmanager
def open_cluster(config: CityConfig, say: Callable[[str], None]) -> Iterator[Cluster | None]:
    """The cluster of a city, None for this machine's workers, which start with the pool.

    UserError, within 15 s, for what can never work.
    """
    kind = config.cluster
    if kind.kind == "local":
        yield None
        return
    with _asked_of_dask(kind.threads), ExitStack() as closing:
        tls = None if kind.tls is None else _tls_files(config, kind.tls)
        if isinstance(kind, SchedulerConfig):
            yield _running(closing, config, kind, tls)
        elif isinstance(kind, SlurmConfig):
            from .cluster_slurm import slurm_cluster

            yield slurm_cluster(closing, config, kind, tls, say)
        else:
            yield _of_class(closing, kind, tls)


@contextmanager
def open_pool(plan: Plan, cluster: Cluster | None) -> Iterator[Pool]:
    """A pool on a cluster, or on worker processes of this machine. UserError if some worker there cannot take part."""
    if cluster is None:
        with _asked_of_dask(plan.workers.threads), local_pool(plan) as pool:
            yield pool
        return
    pool = Distributed(cluster.client, plan, cluster.jobs, cluster.unfit, True, cluster.count_gpus)
    try:
        yield pool
    finally:
        pool.leave()


def _tls_files(config: CityConfig, tls: TlsConfig) -> Tls:
    return {"ca": config.path(tls.ca), "cert": config.path(tls.cert), "key": config.path(tls.key)}


def security(tls: Tls | None) -> Any:
    """Dask's own name for the same; None without encryption. UserError for files that are not what they should be."""
    from distributed import Security

    if tls is None:
        return None
    tls_context(tls)
    roles = ("client", "scheduler", "worker")
    of_role = {f"tls_{role}_{part}": str(tls[part]) for role in roles for part in ("cert", "key")}
    return Security(require_encryption=True, tls_ca_file=str(tls["ca"]), **of_role)


def _running(closing: ExitStack, config: CityConfig, kind: SchedulerConfig, tls: Tls | None) -> Cluster:
    """A scheduler that runs already, which is left as it was found."""
    if kind.address is not None:
        named, address = "cluster.address", kind.address
    else:
        assert kind.scheduler_file is not None
        named, address = "cluster.scheduler_file", address_in(config.path(kind.scheduler_file))
    check_address(named, address, tls)
    client = connect(closing, f"{named}: {address}", address, tls)
    _check_scheduler(client, f"{named}: {address}")
    facts = wait_for_facts(client, f"{named}: {address}", WORKER_TIMEOUT_S)
    crew, unfit = choose_crew(f"{named}: {address}", facts)
    return Cluster(client, Jobs(), crew, unfit, crew.device.startswith("cuda"))


def _check_scheduler(client: Any, named: str) -> None:
    """UserError for a scheduler with other versions: it reads the tasks that it hands on."""
    ours = own_versions()
    for package, found in client.get_versions(packages=list(ours))["scheduler"]["packages"].items():
        if package in ours and str(found).partition("+")[0] != ours[package]:
            raise UserError(f"{named}: it has {package} {found or 'none'}; expected {ours[package]}, as the driver")


def connect(closing: ExitStack, named: str, address: Any, tls: Tls | None) -> Any:
    """A client, closed in the end. UserError where there is no scheduler."""
    from distributed import Client
    from distributed.utils import silence_logging_cmgr

    # A scheduler that is lost has much to tell, in tracebacks, and it is told here in one line.
    closing.enter_context(silence_logging_cmgr(logging.CRITICAL))
    try:
        client = Client(address, security=security(tls), timeout=WORKER_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError, ImportError) as error:
        raise UserError(f"{named}: no answer ({type(error).__name__}); expected a Dask scheduler") from None
    closing.callback(close_soon, client)
    return client


def wait_for_facts(client: Any, named: str, seconds: float) -> list[Facts]:
    """What the workers are, as soon as one is there. UserError if none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        found = [it for it in client.run(facts_here, on_error="ignore").values() if isinstance(it, Facts)]
        if found:
            return found
        if time.monotonic() > deadline:
            raise UserError(f"{named}: no worker within {seconds:.0f} s; expected at least one")
        time.sleep(0.2)


def _of_class(closing: ExitStack, kind: ClassConfig, tls: Tls | None) -> Cluster:
    """Any subclass of distributed's Cluster. Nothing is imported that the YAML does not name."""
    from distributed.deploy.cluster import Cluster as AnyCluster

    module, _, name = kind.class_.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cluster.class: {kind.class_}: {error}; expected the name of an installed class") from None
    if not (isinstance(found, type) and issubclass(found, AnyCluster)):
        raise UserError(f"cluster.class: {kind.class_}: expected a subclass of distributed's Cluster")
    arguments = dict(kind.kwargs) | ({} if tls is None else {"security": security(tls)})
    try:
        cluster = found(**arguments)
    except Exception as error:
        # Any class may be named, so any error may come.
        raise UserError(f"cluster.class: {kind.class_} with these kwargs: {type(error).__name__}: {error}") from None
    closing.callback(close_soon, cluster, CLOSING_CLASS_S)
    if kind.workers is not None:
        cluster.scale(kind.workers)
    client = connect(closing, f"cluster.class: {kind.class_}", cluster, tls)
    facts = wait_for_facts(client, f"cluster.class: {kind.class_}", kind.wait_s)
    crew, unfit = choose_crew(f"cluster.class: {kind.class_}", facts)
    return Cluster(client, Jobs(), crew, unfit, crew.device.startswith("cuda"))
