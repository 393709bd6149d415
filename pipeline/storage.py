"""Where the files of a run lie: in a folder of this machine, or in one of a bucket. Files are named relative to it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

from segpipe.tasks.ahead import Found, Item
from segpipe.tasks.bucket import BucketFolder

OWN_FOLDERS = ("store.zarr", "fragments", "ledger", "validity")
"""Folders of a run folder in which everything is ours."""
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.partial$|\.partial-segpipe\.")


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine. Files are written beside and renamed into place, so that each is whole or not there."""

    path: Path
    is_remote = False

    def __str__(self) -> str:
        return str(self.path)

    def file(self, name: str) -> str:
        """What a person is told of a file."""
        return str(self.path / name)

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file in place of what is there."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Give a file to write to, which is there under its name, whole, when it is over."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(path)
        try:
            with beside.open("w+b") as file:
                yield file
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def open(self, name: str) -> IO[bytes]:
        """A file to read from. FileNotFoundError where there is none."""
        return (self.path / name).open("rb")

    def check(self, key: str) -> None:
        """Whether a folder can be used is seen when it is."""

    def start_of(self, name: str, count: int) -> bytes:
        """The first bytes of a file that is there."""
        with self.open(name) as file:
            return file.read(count)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def top(self) -> set[str]:
        """Names of the files and folders that are in the folder itself."""
        try:
            return {path.name for path in self.path.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def names(self, folder: str) -> list[str]:
        """Names of all files below a folder, at any depth."""
        return [str(path.relative_to(self.path)) for path in (self.path / folder).rglob("*") if path.is_file()]

    def remove(self, *names: str) -> None:
        """Delete files; those that are not there count as deleted."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def remove_all(self, folder: str) -> None:
        """Delete a folder with all that is below it."""
        shutil.rmtree(self.path / folder, ignore_errors=True)

    def move(self, name: str, to: str) -> None:
        """Give a file another name."""
        target = self.path / to
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).rename(target)

    def exchange(self, folder: str, other: str) -> None:
        """Put a folder in the place of another one. Killed in between, it can be called again."""
        if (self.path / folder).exists():
            shutil.rmtree(self.path / other, ignore_errors=True)
            (self.path / folder).rename(self.path / other)

    def each(self, function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """What a function gives for each item, in their order."""
        return map(function, items)

    def hasty(self) -> LocalFolder:
        """Itself: a disk makes nobody wait."""
        return self

    def opened(self, folder: str) -> Path:
        """The folder in it as Zarr takes it."""
        return self.path / folder

    def errors(self, name: str = "") -> AbstractContextManager[None]:
        """A disk's errors are told as they are."""
        return nullcontext()


Folder = LocalFolder | BucketFolder


def folder_at(place: str | Path | Folder) -> Folder:
    """The folder at a path or an s3:// URL."""
    if isinstance(place, LocalFolder | BucketFolder):
        return place
    if str(place).startswith("s3://"):
        return BucketFolder(str(place).rstrip("/"))
    return LocalFolder(Path(place))


def desk_of(folder: Folder) -> Path:
    """Where published files are written: the folder itself, or one of this machine's for temporary files."""
    if isinstance(folder, LocalFolder):
        return folder.path
    name = blake2b(f"{folder.server} {folder.url}".encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"segpipe-{os.getuid()}-{name}"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of this machine beside and rename it into place."""
    beside = _beside(path)
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def remove_leftovers(folder: Folder | Path) -> int:
    """Delete what killed writers have left half-written in a run folder, by their names; returns how many files.

    In a bucket there is none: an object is seen when all of it is there.
    """
    place, count = folder_at(folder), 0
    if isinstance(place, BucketFolder):
        return 0
    root = place.path
    for part in (root, *(root / name for name in OWN_FOLDERS)):
        for path in part.glob("*") if part == root else part.rglob("*"):
            # The lock's are of a process that is alive, ours or one that waits for the lock.
            if _LEFTOVER.search(path.name) and path.is_file() and not path.name.startswith("lock."):
                path.unlink(missing_ok=True)
                count += 1
    return count
