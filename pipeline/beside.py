"""Files written beside the place that they are for, and renamed into it when they are whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segpipe.tasks.errors import RunError

PARTIAL = ".partial-segpipe"
"""Marks what is not finished: `mask.partial-segpipe.tif` beside `mask.tif`."""


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed to path: beside it, with the same suffix."""
    return path.with_name(f"{path.stem}{PARTIAL}{path.suffix}")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a path to write to, which is renamed to path at the end; RunError if writing fails, and nothing is left."""
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_error(path: Path, error: Exception) -> RunError:
    """The one line for a file that cannot be written, with the space that is left."""
    free_mb = shutil.disk_usage(path.parent).free / 1e6 if path.parent.is_dir() else 0
    # What libraries say of a full disk is not always that.
    room = "its disk is full" if free_mb < 1 else f"{free_mb:,.0f} MB are free in this folder"
    return RunError(f"{path}: cannot be written ({error}); {room}")


def remove_with_siblings(path: Path) -> None:
    """Remove a file and what SQLite and GDAL write beside it: journals, temporary indices and overviews."""
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink(missing_ok=True)
