"""What was published in a folder, and where the new one goes: nobody's own work is written over."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from pathlib import Path

import pyogrio.errors

from .geopackage import LAYER, UNTOUCHED, layer_digest, rows_digest
from .rows import SCHEMA


def find_published(folder: Path, published: Mapping[str, Collection[str]], last: str | None) -> tuple[Path, str] | None:
    """The GeoPackage that holds what was published last, and the digest of its rows; None where there is none.

    published: digests by file name, as for `place_geopackage`; last: the name under which it was published. Where that
    file holds other rows, or is gone, it is the one with the highest number that holds rows that were published.
    """
    paths = sorted((folder / name for name in published), key=lambda path: (path.name == last, _number(path)))
    for path in reversed(paths):
        try:
            digest = layer_digest(path, LAYER, SCHEMA, UNTOUCHED)
        except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, OSError):
            continue
        if digest in published[path.name]:
            return path, digest
    return None


def _number(path: Path) -> int:
    """2 of buildings-2.gpkg, 1 of buildings.gpkg."""
    return int(path.stem.partition("-")[2] or 1)


def place_geopackage(
    written: Path,
    folder: Path,
    published: Mapping[str, Collection[str]],
    left_alone: Callable[[Path, str], None] = lambda path, reason: None,
) -> Path:
    """Rename a written GeoPackage to buildings.gpkg in folder, or to buildings-2.gpkg and so on, and say which.

    A file is only replaced if it holds rows that were published under its name (published: digests by file name) or
    the very rows of the new one, no tables of somebody's own, and nobody has it open. Any other is left alone, and
    left_alone is told which, and why, in words that go on from the file's name.
    """
    number = 1
    while True:
        path = folder / ("buildings.gpkg" if number == 1 else f"buildings-{number}.gpkg")
        reason = _why_left_alone(path, written, published.get(path.name, ())) if os.path.lexists(path) else None
        if reason is None:
            written.replace(path)
            return path
        left_alone(path, reason)
        number += 1


OPEN = "is open in another program"
CHANGED = "holds other rows than were published"


def _why_left_alone(path: Path, written: Path, published: Collection[str]) -> str | None:
    if any(path.with_name(path.name + suffix).exists() for suffix in ("-wal", "-journal")) or _is_locked(path):
        return OPEN
    try:
        digest = rows_digest(path)
        foreign_tables = _tables(path) - _tables(written)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, sqlite3.Error, OSError):
        return CHANGED
    if foreign_tables:
        return f"holds a table {', '.join(sorted(foreign_tables))} that was not published"
    return None if digest in published or digest == rows_digest(written) else CHANGED


def _is_locked(path: Path) -> bool:
    """Whether another program is writing to a database, asked without waiting: GDAL would wait for 25 s."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=0)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except sqlite3.OperationalError as error:
        return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    except sqlite3.DatabaseError:
        return False  # no database at all
    return False


def _tables(path: Path) -> set[str]:
    """Names of the tables with content, without those that SQLite and the GeoPackage libraries keep for themselves."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        names = {str(name) for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {name for name in names if not name.startswith(("sqlite_", "gpkg_", "rtree_"))}
