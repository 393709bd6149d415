"""How far a run is: written into its folder by the run every few seconds, and read there by anybody, from anywhere."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from segpipe.tasks.bucket import BucketFolder
from segpipe.tasks.errors import StorageError, UserError

from .ledger import as_json
from .lock import BEAT_S, check_lock, holder_of, is_alive
from .manifest import read_manifest
from .run_folder import folder_of

if TYPE_CHECKING:
    from .plan import Plan
    from .progress import Listener

PROGRESS = "progress.json"
SHARE = 0.05
"""Of the time, that may go into sending the records of tasks to a bucket: they are sent as a whole."""


@contextmanager
def following(plan: Plan, listener: Listener) -> Iterator[None]:
    """Write how far a run is while the block runs. Done well, what stands in the manifest is all that is to be told.

    Nothing is written in a folder that another run has by now, or of which all is gone with its lock.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(plan, listener, stop), daemon=True)
    thread.start()
    told = ""
    try:
        yield
    except StorageError:
        stop.set()
        raise  # nobody would hear it
    except BaseException as error:
        told = " ".join(str(error).split()) or "stopped"
        raise
    finally:
        if not stop.is_set():
            stop.set()
            thread.join()
            with suppress(StorageError, OSError):
                check_lock(plan.folder.hasty(), plan.lock)
                _send_records(plan)
                if told:
                    _write(plan, listener, told)
                else:
                    plan.folder.hasty().remove(PROGRESS)


def _follow(plan: Plan, listener: Listener, stop: threading.Event) -> None:
    sent, pause_s, since = -1, 0.0, time.monotonic()
    while True:
        # A full disk or a silent server is no reason to end: it is tried again.
        with suppress(StorageError, OSError):
            check_lock(plan.folder.hasty(), plan.lock)
            _write(plan, listener)
            records = sum(it.units + it.failed for it in list(listener.stages.values()))
            if records != sent and time.monotonic() - since >= pause_s:
                begun = time.monotonic()
                _send_records(plan)
                sent, since = records, time.monotonic()
                pause_s = (since - begun) / SHARE
        if stop.wait(BEAT_S):
            return


def _send_records(plan: Plan) -> None:
    from .desk import RECORDS

    if isinstance(plan.folder, BucketFolder):
        plan.folder.hasty().upload(plan.output / RECORDS, RECORDS)


def _write(plan: Plan, listener: Listener, told: str = "") -> None:
    stages = {
        stage: {
            "total": listener.totals.get(stage),
            "done": sums.units,
            "reused": sums.reused,
            "failed": sums.failed,
            "mpx_per_s": round(sums.mpx_per_s, 3),
        }
        for stage, sums in list(listener.stages.items())
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    values = {"name": plan.name, "host": socket.gethostname(), "pid": os.getpid(), "at": now, "failed": told}
    plan.folder.hasty().write(PROGRESS, as_json(values | {"stages": stages}))


def status_of(run: str) -> list[tuple[str, str]]:
    """How far a run is, as labelled lines. run: a run folder, its s3:// URL, or the city.yaml of it.

    UserError where no run has left a trace.
    """
    folder = folder_of(run)
    folder.check("RUN")
    data, holder, manifest = folder.read(PROGRESS), holder_of(folder), read_manifest(folder)
    progress: dict[str, Any] = json.loads(data) if data else {}
    rows = [("run", f"{progress['name']}, {folder}" if progress else str(folder))]
    if holder is not None and is_alive(folder, holder):
        rows.append(("state", f"running: process {holder['pid']} on {holder['host']}"))
    elif progress:
        why = f"failed: {progress['failed']}" if progress["failed"] else "killed"
        rows.append(("state", f"{why}; run the same command again to go on"))
    elif manifest is None:
        raise UserError(f"{folder}: no run has left a trace here; expected a run folder, or the city.yaml of one")
    rows += [_stage_row(stage, it) for stage, it in progress.get("stages", {}).items()]
    if progress:
        rows.append(("as of", progress["at"]))
    if manifest is not None:
        counts = manifest["counts"]
        rows.append(
            ("published", f"{manifest['finished']}: {counts['buildings']} buildings on {counts['tiles']} tiles")
        )
    return rows


def _stage_row(stage: str, it: dict[str, Any]) -> tuple[str, str]:
    ended = it["done"] + it["reused"]
    total = "" if it["total"] is None else f" of {it['total']}"
    more = [f"{it['reused']} found done"] if it["reused"] else []
    more += [f"{it['failed']} failed"] if it["failed"] else []
    more += [f"{it['mpx_per_s']:.2f} Mpx/s"] if it["mpx_per_s"] else []
    return stage, f"{ended}{total}" + (f" ({', '.join(more)})" if more else "")
