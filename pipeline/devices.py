"""Which GPU is a worker process's own: one of those that its job, or the machine, has, and nobody else's."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

VISIBLE = "CUDA_VISIBLE_DEVICES"


def one_device_each(count: int, environment: Mapping[str, str]) -> Sequence[dict[str, str]]:
    """What each of so many worker processes finds in its environment: the one device that is its own."""
    visible = environment.get(VISIBLE)
    devices = visible.split(",") if visible else [str(number) for number in range(count)]
    return [{VISIBLE: devices[number % len(devices)].strip()} for number in range(count)]


_claims: list[TextIO] = []
"""The locked file of the device that this process has taken: open as long as the process lives."""


def take_own_device() -> None:
    """Leave this worker process one device of the list that it shares with those that were started with it.

    A device is taken by the lock on a file in the temporary folder, which ends with the process, so the worker that a
    nanny starts after a death finds the dead one's. To be called before CUDA is. Does nothing where there is one device
    or none, or where all are taken: then it is left to torch, which takes the first.
    """
    visible = os.environ.get(VISIBLE)
    devices = [it.strip() for it in visible.split(",")] if visible is not None else _all_devices()
    if _claims or len(devices) < 2:
        return
    for device in devices:
        # Workers of one job, and of no other, are children of one process.
        name = f"segpipe-{os.getuid()}-{os.getppid()}-{device.replace('/', '_')}.lock"
        claim = (Path(tempfile.gettempdir()) / name).open("a")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        os.environ[VISIBLE] = device
        return


def _all_devices() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
