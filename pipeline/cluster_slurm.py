"""Workers in jobs of SLURM, by dask-jobqueue: one group of jobs for reading, one for GPUs, and one scheduler here."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from segpipe.models.predictor import device_recipe, resolve_device
from segpipe.tasks.errors import RunError, UserError

from .cluster import Cluster, Jobs
from .cluster_check import ANSWER_S, Tls, facts_here
from .cluster_kinds import connect, dask_settings, security
from .cluster_local import THREADS_PER_WORKER, close_soon
from .cluster_pool import workers_of
from .config import CityConfig, GroupConfig, SlurmConfig
from .workers import Crew, bytes_of

ASK_EVERY_S = 10.0
"""How often SLURM is asked which jobs there are: a controller serves many."""
MOST_STILLBORN = 3
"""Jobs that may end before a worker has joined from them."""


def slurm_cluster(
    closing: ExitStack, config: CityConfig, kind: SlurmConfig, tls: Tls | None, say: Callable[[str], None]
) -> Cluster:
    """A scheduler here, and jobs that join it. UserError for a job that SLURM would not take."""
    if importlib.util.find_spec("dask_jobqueue") is None:
        raise UserError(
            "cluster.kind: slurm, but there is no dask-jobqueue; cure, in the checkout of segpipe:"
            " pip install -c constraints.txt '.[jobqueue]'"
        )
    if shutil.which("sbatch") is None:
        raise UserError("cluster.kind: slurm, but there is no sbatch; expected a machine that jobs are sent from")
    from distributed import Scheduler, SpecCluster

    encryption = security(tls)
    logs = None if kind.log_directory is None else config.path(kind.log_directory)
    groups = {name: group for name, group in (("cpu", kind.cpu), ("gpu", kind.gpu)) if group is not None}
    options = {name: job_options(name, groups, kind, encryption, logs) for name in groups}
    for name in groups:
        _check_script(name, options[name])
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    scheduler = {"protocol": "tcp://" if tls is None else "tls://", "interface": kind.interface, "security": encryption}
    try:
        cluster = SpecCluster(
            scheduler={"cls": Scheduler, "options": scheduler | {"port": 0, "dashboard_address": ":0"}},
            security=encryption,
            silence_logs="critical",
            name="segpipe",
        )
    except RuntimeError as error:
        raise UserError(f"cluster.interface: {kind.interface}: {error}") from None
    closing.callback(close_soon, cluster)
    jobs = SlurmJobs(cluster, groups, options)
    closing.callback(jobs.cancel_all)
    client = connect(closing, "cluster.kind: slurm", cluster, tls)
    jobs.begin()
    predicting = "gpu" if "gpu" in groups else "cpu"
    crew = _crew(client, jobs, predicting, groups[predicting], say)
    return Cluster(client, jobs, crew, count_gpus="gpu" in groups)


def job_options(
    name: str, groups: Mapping[str, GroupConfig], kind: SlurmConfig, encryption: Any, logs: Path | None
) -> dict[str, Any]:
    """What dask-jobqueue is told of the jobs of a group."""
    import dask
    import dask_jobqueue  # noqa: F401 its import adds the defaults of its jobs to Dask's configuration

    group, predicts = groups[name], name == "gpu" or "gpu" not in groups
    cores = group.cores // group.processes
    threads = kind.threads if kind.threads != "auto" else max(1, cores)
    settings = dask.config.serialize(dask_settings(threads))
    # Told twice, the last is taken: with its cores all at work on one window, a worker needs few threads besides.
    extra = ["--resources", "GPU=1", "--nthreads", str(THREADS_PER_WORKER)] if predicts else []
    told = [f'-{stream} "{logs}/segpipe-{name}-%J.{ending}"' for stream, ending in (("o", "out"), ("e", "err"))]
    told = ["-o /dev/null", "-e /dev/null"] if logs is None else told
    return {
        "config_name": "slurm",
        "cores": group.cores,
        "memory": group.memory,
        "processes": group.processes,
        "walltime": group.walltime,
        "queue": group.queue,
        "account": group.account,
        "job_name": f"segpipe-{name}",
        "job_extra_directives": [*told, *group.directives],
        "job_script_prologue": [f"export DASK_INTERNAL_INHERIT_CONFIG={settings}", *group.prologue],
        "worker_extra_args": ["--no-dashboard", *extra],
        # Written into a script of the shell as it is.
        "python": dask.config.get("jobqueue.slurm.python") or shlex.quote(sys.executable),
        "protocol": None if encryption is None else "tls://",
        "security": encryption,
    }


def _check_script(name: str, options: Mapping[str, Any]) -> None:
    """Let sbatch look at a script. UserError with its own words where it would not take it."""
    from dask_jobqueue.slurm import SLURMJob

    script = SLURMJob("tcp://127.0.0.1:0", name=name, **options).job_script()
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            found = subprocess.run(
                ["sbatch", "--test-only", file.name], capture_output=True, text=True, timeout=ANSWER_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"cluster.{name}: sbatch gives no answer within {ANSWER_S:.0f} s; is SLURM up?") from None
    if found.returncode:
        told = "; ".join(line.strip() for line in found.stderr.splitlines() if line.strip())
        raise UserError(f"cluster.{name}: SLURM would not take such a job: {told}")


def _crew(client: Any, jobs: SlurmJobs, name: str, group: GroupConfig, say: Callable[[str], None]) -> Crew:
    """The workers that are to predict, as they will be; their device is that of the first, if nothing says it."""
    own = device_recipe(resolve_device())
    device, torch, gpu_bytes = group.device, own["torch"], 0
    if device == "auto":
        say(f"waiting for one job of cluster.{name}, to see its device (`device:` there would say it)")
        if name == "gpu":
            jobs.scale("gpu", 1)
        found = _first_facts(client, jobs)
        device, torch, gpu_bytes = found.device, found.torch, found.gpu_bytes
        if name == "gpu":
            jobs.scale("gpu", 0)
            while any(it["resources"].get("GPU") for it in workers_of(client).values()):
                time.sleep(0.2)
    return Crew(
        device=device,
        torch=torch,
        workers=group.count * group.processes,
        cores=max(1, group.cores // group.processes),
        memory_bytes=bytes_of(group.memory) // group.processes,
        gpu_bytes=gpu_bytes,
    )


def _first_facts(client: Any, jobs: SlurmJobs) -> Any:
    """What the first worker is that can predict. It is waited for as long as SLURM has a job for it."""
    while True:
        workers = workers_of(client)
        if any(worker["resources"].get("GPU") for worker in workers.values()):
            for found in client.run(facts_here, on_error="ignore").values():
                if found.predicts:
                    return found
        jobs.upkeep(workers)
        time.sleep(0.2)


class SlurmJobs(Jobs):
    """The jobs of a run: asked for when there is work for them, replaced when they are lost, cancelled in the end."""

    elastic = True

    def __init__(self, cluster: Any, groups: Mapping[str, GroupConfig], options: Mapping[str, dict[str, Any]]) -> None:
        self._cluster, self._groups, self._options = cluster, groups, options
        self._wanted = dict.fromkeys(groups, 0)
        self._count = itertools.count()
        self._joined: set[str] = set()
        self._stillborn = 0
        self._asked = 0.0
        self._ids: set[str] = set()

    def begin(self) -> None:
        """Ask for the jobs without GPUs; where there are no others, they predict too."""
        if "cpu" in self._groups:
            self.scale("cpu", self._groups["cpu"].count)

    def end(self) -> None:
        """Cancel all jobs."""
        for name in self._groups:
            self.scale(name, 0)

    def want_gpus(self) -> None:
        """Ask for the jobs with GPUs, where there are such."""
        if "gpu" in self._groups and not self._wanted["gpu"]:
            self.scale("gpu", self._groups["gpu"].count)

    def spare_gpus(self) -> None:
        """Cancel the jobs with GPUs."""
        if self._wanted.get("gpu"):
            self.scale("gpu", 0)

    def sample(self) -> None:
        """Ask for one job of each group."""
        for name in self._groups:
            self.scale(name, 1)

    def scale(self, name: str, count: int) -> None:
        """Have so many jobs of a group, sent or running. RunError where sbatch does not take them."""
        from dask_jobqueue.slurm import SLURMJob

        self._wanted[name] = count
        spec, group = self._cluster.worker_spec, self._groups[name]
        have = [job for job in spec if job.startswith(f"{name}-")]
        for job in have[count:]:
            del spec[job]
        suffixes = {"group": [f"-{n}" for n in range(group.processes)]} if group.processes > 1 else {}
        for _ in range(count - len(have)):
            spec[f"{name}-{next(self._count)}"] = {"cls": SLURMJob, "options": self._options[name], **suffixes}

        async def settle() -> None:
            await self._cluster

        try:
            self._cluster.sync(settle)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"cluster.{name}: sbatch: {' '.join(str(error).split())}") from None
        self._ids |= {str(job.job_id) for job in self._cluster.workers.values() if job.job_id}

    def upkeep(self, workers: Mapping[str, Mapping[str, Any]]) -> int:
        """Send new jobs for those that ended; threads of workers to come. RunError if jobs end without ever joining."""
        here = {self._job_of(str(worker["name"])) for worker in workers.values()}
        self._joined |= here
        sent = self._cluster.workers
        away = [job for job in sent if job not in here]
        if away and time.monotonic() - self._asked >= ASK_EVERY_S:
            self._asked = time.monotonic()
            alive = _jobs_alive()
            ended = [job for job in away if alive is not None and str(sent[job].job_id) not in alive]
            for job in ended:
                self._stillborn += job not in self._joined
                sent.pop(job)
                self._cluster.worker_spec.pop(job, None)
            if self._stillborn >= MOST_STILLBORN:
                raise RunError(
                    f"{self._stillborn} jobs of SLURM ended before a worker joined from them; what they print is in"
                    " `cluster: {log_directory: …}`; what is done is kept; run the same command again to go on"
                )
            for name in {job.partition("-")[0] for job in ended}:
                self.scale(name, self._wanted[name])
        return THREADS_PER_WORKER * sum(
            self._groups[job.partition("-")[0]].processes for job in self._cluster.worker_spec if job not in here
        )

    def _job_of(self, worker: str) -> str:
        """The job that a worker is of: its name, without the number that workers of one job are told apart by."""
        return "-".join(worker.split("-")[:2])

    def cancel_all(self) -> None:
        """Cancel every job that was ever sent: closing the cluster may have failed. One that is done ends by itself."""
        if self._ids:
            with suppress(subprocess.SubprocessError, OSError):
                subprocess.run(["scancel", *sorted(self._ids)], capture_output=True, check=False, timeout=ANSWER_S)


def _jobs_alive() -> set[str] | None:
    """Ids of the jobs of this user that wait or run; None if SLURM does not say."""
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--format=%i", f"--user={os.getuid()}"],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return set(found.stdout.split()) if found.returncode == 0 else None
