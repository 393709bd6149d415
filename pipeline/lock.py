"""The lock on a run folder: one run at a time, also where its host or process has died without a word."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from segpipe.tasks.bucket import BucketFolder
from segpipe.tasks.errors import RunError, StorageError, UserError

from .storage import Folder, LocalFolder, folder_at

LOCK = "lock.json"
BEAT_S = 5.0
_STALE_S = 30.0
_PROC = Path("/proc")
_TORN = {"host": "?", "pid": 0, "started": 0.0, "token": "", "counter": -1}


class _Lock(Protocol):
    """A file that only one of many can make, named in a folder."""

    def take(self, token: str) -> bool:
        """Make it; False if it is there."""
        ...

    def holder(self) -> dict[str, Any] | None:
        """Who holds it, None if nobody does."""
        ...

    def take_over(self, stale: dict[str, Any], token: str) -> bool:
        """Put an end to a stale lock; True if it is ours by that, False if it is to be taken again."""
        ...

    def beat(self, token: str, counter: int) -> bool:
        """Move the counter; False if the lock is somebody else's by now."""
        ...

    def give_back(self, token: str) -> None:
        """Remove it if it is ours."""
        ...


@contextmanager
def locked(folder: Folder | Path) -> Iterator[str]:
    """Hold the lock on a run folder: a file with a counter that moves every 5 s, the process, and where that is.

    A lock is stale when its process could be seen from here and is dead, or else when the counter has not moved for
    30 s of our own clock; a stale one is taken over. Gives the lock's token, by which tasks know whose run they are of.
    UserError if somebody else holds it.
    """
    lock, token = _lock_in(folder), uuid.uuid4().hex
    while not lock.take(token):
        holder = lock.holder()
        if holder is None:
            continue
        if not _stale(lock, holder):
            raise UserError(
                f"{folder}: another run is at work here (process {holder['pid']} on {holder['host']});"
                " expected to be alone; wait for it, or stop it"
            )
        if lock.take_over(holder, token):
            break
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, token, stop), daemon=True)
    beat.start()
    try:
        yield token
    finally:
        stop.set()
        beat.join()
        lock.give_back(token)


def lock_token(folder: Folder | Path) -> str | None:
    """The token of the lock on a run folder, None if nobody holds it."""
    holder = holder_of(folder)
    return None if holder is None else str(holder["token"])


def check_lock(folder: Folder | Path, token: str) -> None:
    """StorageError if a run's lock is another's by now, or gone. token: the run's; an empty text: nobody asks."""
    if not token or (found := lock_token(folder)) == token:
        return
    if found:
        what = f"another run is at work here, as this one was silent for {_STALE_S:.0f} s (asleep, or cut off)"
        cure = "wait for the other, then run the same command again"
    else:
        what, cure = "its lock is gone, and perhaps all else that was here", "run the same command again"
    raise StorageError(f"{folder}: {what}; expected the lock of the run that writes; cure: {cure}")


def holder_of(folder: Folder | Path) -> dict[str, Any] | None:
    """Who holds the lock on a run folder: host, pid, started, token, counter. None if nobody does."""
    return _lock_in(folder).holder()


def is_alive(folder: Folder | Path, holder: dict[str, Any], wait_s: float = 2 * BEAT_S) -> bool:
    """Whether who holds a lock is at work: its process is seen, or if it cannot be, its counter moves while we look."""
    return not _stale(_lock_in(folder), holder, wait_s)


def _lock_in(folder: Folder | Path) -> _Lock:
    place = folder_at(folder)
    return _FileLock(place) if isinstance(place, LocalFolder) else _ObjectLock(place)


class _FileLock:
    """On a disk: a hard link is made by one alone."""

    def __init__(self, folder: LocalFolder) -> None:
        self._path = folder.path / LOCK

    def take(self, token: str) -> bool:
        beside = self._path.with_name(f"lock.{token}.partial")
        beside.write_text(_lock_text(token, 0))
        try:
            os.link(beside, self._path)
        except FileExistsError:
            return False
        finally:
            beside.unlink()
        return True

    def holder(self) -> dict[str, Any] | None:
        return _read(self._path)

    def take_over(self, stale: dict[str, Any], token: str) -> bool:
        """Remove a lock that was judged stale; one that another observer has put there meanwhile is put back."""
        aside = self._path.with_name(f"lock.{token}.stale")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return False
        taken = _read(aside)
        if taken is not None and taken["token"] != stale["token"]:
            with suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)
        return False

    def beat(self, token: str, counter: int) -> bool:
        beside = self._path.with_name(f"lock.{token}.partial")
        # On a disk that is full or fails the counter stands still, but the lock is held on: the next beat may succeed.
        with suppress(OSError):
            holder = self.holder()
            if holder is None or holder["token"] != token:
                return False
            beside.write_text(_lock_text(token, counter))
            beside.replace(self._path)
        return True

    def give_back(self, token: str) -> None:
        # A lock that cannot be given back grows stale.
        with suppress(OSError):
            holder = self.holder()
            if holder is not None and holder["token"] == token:
                self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return None


class _ObjectLock:
    """In a bucket: a conditional put is done for one alone."""

    def __init__(self, folder: BucketFolder) -> None:
        self._folder = folder
        self._tag: str | None = None

    def take(self, token: str) -> bool:
        data = _lock_text(token, 0).encode()
        self._tag = self._folder.write_where(LOCK, data, None)
        if self._tag is None:
            return False
        if self._folder.write_where(LOCK, data, None) is not None:
            self._folder.remove(LOCK)
            raise RunError(
                f"{self._folder}: the server writes over an object in spite of If-None-Match; expected one that knows"
                " conditional writes, by which a run is kept from working beside another"
            )
        return True

    def holder(self) -> dict[str, Any] | None:
        found = self._folder.read_tagged(LOCK)
        if found is None:
            return None
        self._tag = found[1]
        return _parsed(found[0])

    def take_over(self, stale: dict[str, Any], token: str) -> bool:
        holder = self.holder()
        if holder is None or holder["token"] != stale["token"]:
            return False
        self._tag = self._folder.write_where(LOCK, _lock_text(token, 0).encode(), self._tag)
        return self._tag is not None

    def beat(self, token: str, counter: int) -> bool:
        # Whatever fails, the server is asked again at the next beat.
        with suppress(StorageError, OSError):
            tag = self._folder.hasty().write_where(LOCK, _lock_text(token, counter).encode(), self._tag)
            if tag is None:
                # Ours still, if the answer to an earlier beat was lost.
                holder = self.holder()
                return holder is not None and holder["token"] == token
            self._tag = tag
        return True

    def give_back(self, token: str) -> None:
        # A lock that cannot be given back grows stale.
        with suppress(StorageError):
            hasty = self._folder.hasty()
            found = hasty.read_tagged(LOCK)
            if found is not None and _parsed(found[0])["token"] == token:
                hasty.remove(LOCK)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads(data)
    except ValueError:
        return _TORN
    return holder


def _lock_text(token: str, counter: int) -> str:
    me = psutil.Process()
    values = {"pid": me.pid, "started": me.create_time(), "token": token, "counter": counter}
    return json.dumps(_sight() | values)


def _sight() -> dict[str, str]:
    """Host, boot and pid namespace: processes with the same three see each other. Without /proc only the host."""
    host = {"host": socket.gethostname()}
    try:
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return host | {"boot_id": boot_id, "pid_namespace": str((_PROC / "self/ns/pid").readlink())}
    except OSError:
        return host


def _is_dead(holder: dict[str, Any]) -> bool | None:
    """Whether the process that holds a lock is dead; None where that cannot be seen from here.

    A host's name does not tell: clones have the same, and so may containers that do not see each other's processes.
    """
    here = _sight()
    if "boot_id" not in here or not here.items() <= holder.items():
        return None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's, and alive
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["started"]) >= 1 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None  # /proc may hide what is somebody else's


def _stale(lock: _Lock, holder: dict[str, Any], wait_s: float | None = None) -> bool:
    dead = _is_dead(holder)
    if dead is not None:
        return dead
    seen = time.monotonic()
    while time.monotonic() - seen < (_STALE_S if wait_s is None else wait_s):
        time.sleep(1.0)
        now = lock.holder()
        if now is None or (now["token"], now["counter"]) != (holder["token"], holder["counter"]):
            return False
    return True


def _beat(lock: _Lock, token: str, stop: threading.Event) -> None:
    counter = 0
    while not stop.wait(BEAT_S):
        counter += 1
        if not lock.beat(token, counter):
            return
