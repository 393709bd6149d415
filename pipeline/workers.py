"""Who predicts: worker processes, their threads and memory, from the configuration and what a machine allows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from .config import ClusterConfig, LocalConfig


@dataclass(frozen=True)
class Workers:
    """Worker processes, threads of torch in each, and the memory that each may use.

    gpu_bytes: memory of the smallest GPU that one of them has; 0 for CPUs, and where nobody has looked.
    """

    count: int
    threads: int
    memory_bytes: int
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Crew:
    """The workers that predict, where they are not of this machine. cores and bytes: of the least of them."""

    device: str
    torch: str
    workers: int
    cores: int
    memory_bytes: int
    gpu_bytes: int = 0
    notes: tuple[str, ...] = ()


def resolve_workers(config: ClusterConfig, stored_threads: int | None = None, crew: Crew | None = None) -> Workers:
    """Workers, threads and memory from the configuration and what this process may use of the machine.

    Not what happens to be free: that would decide the block size. stored_threads: those of the first run in this
    folder, which are part of the recipe. crew: workers that are not of this machine.
    """
    if crew is not None:
        threads = config.threads if config.threads != "auto" else stored_threads or crew.cores
        return Workers(crew.workers, threads, crew.memory_bytes, crew.gpu_bytes)
    if not isinstance(config, LocalConfig):
        config = LocalConfig(threads=config.threads)
    gpus = gpus_bytes()
    cores, memory_bytes = allowance()
    count = config.workers if config.workers != "auto" else len(gpus) or max(1, cores // 8)
    count = min(count, len(gpus)) if gpus else count
    threads = config.threads if config.threads != "auto" else stored_threads or max(1, cores // count)
    total = int(memory_bytes * 0.8) if config.memory == "auto" else bytes_of(config.memory)
    return Workers(count, threads, total // count, min(gpus, default=0))


def bytes_of(text: str) -> int:
    """A number with its unit, such as 8 GiB, in bytes."""
    unit = text.lstrip("0123456789. ")
    number = float(text.removesuffix(unit))
    return int(number * {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}[unit])


def gpus_bytes() -> list[int]:
    """Memory of each CUDA device that this process sees."""
    import torch

    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]


def allowance() -> tuple[int, int]:
    """Cores and bytes of memory that this process may use: of the machine, its CPU affinity, and its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = psutil.virtual_memory().total
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    limit = _cgroup("memory.max").strip()
    return cores, min(memory_bytes, int(limit)) if limit.isdigit() else memory_bytes


def _cgroup(name: str) -> str:
    """A limit of this process's control group (version 2), an empty text where there is none."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / own, Path("/sys/fs/cgroup")):
            if (folder / name).is_file():
                return (folder / name).read_text()
    except OSError:
        pass
    return ""
