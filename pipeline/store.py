"""The only zarr: the arrays on the grid, the ledger of what is done, and the lock on a run folder.

A run folder holds `store.zarr` (image, valid, probability; one writer a chunk), `fragments/` (a file a block) and
`ledger/` (a file a stage and unit of work, written last, so that what is in the ledger is whole).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, ZstdCodec

from segpipe.tasks.errors import RunError, UserError
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.predict import INVALID


@dataclass(frozen=True)
class Layout:
    """What the arrays of a store look like: the lattice, the grid on it (whole chunks), chunk size and bands."""

    lattice: Lattice
    grid: Window
    chunk_px: int
    bands: int

    def __post_init__(self) -> None:
        if self.grid.snap(self.chunk_px) != self.grid:
            raise ValueError(f"grid {self.grid}: expected whole chunks of {self.chunk_px} px")


class Store:
    """An open store.zarr. Arrays are addressed by windows of the absolute lattice."""

    def __init__(self, folder: Path) -> None:
        """Open the store in a run folder. RunError where there is none."""
        self._root = folder / "store.zarr"
        try:
            self._group = zarr.open_group(self._root, mode="r+", zarr_format=3)
            attributes: dict[str, Any] = dict(self._group.attrs)
            row_off, col_off, height, width = attributes["segpipe"]["grid"]
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise RunError(
                f"{self._root}: not a store of segpipe ({error}); expected one that this run has made"
            ) from None
        self.grid = Window(row_off, col_off, height, width)
        self.chunk_px = int(attributes["segpipe"]["chunk_px"])
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def read(self, array: str, window: Window, fill: int) -> NDArray[np.uint8]:
        """Read a window, (H, W) or (bands, H, W); pixels outside the grid are fill."""
        source = self._array(array)
        inside = window.intersect(self.grid)
        out = np.full((*source.shape[:-2], *window.shape_yx), fill, np.uint8)
        if inside.pixels:
            out[(..., *inside.within(window))] = source[(..., *inside.within(self.grid))]
        return out

    def write_chunk(self, array: str, row: int, col: int, data: NDArray[np.uint8]) -> int:
        """Write one whole chunk with absolute index (row, col); returns its checksum."""
        window = Window.cell(row, col, self.chunk_px)
        if data.shape[-2:] != window.shape_yx or not self.grid.contains(window):
            raise ValueError(f"chunk {row}, {col} of {array}: {data.shape} px; expected a whole chunk of {self.grid}")
        self._array(array)[(..., *window.within(self.grid))] = data
        return checksum(data)

    def read_chunk(self, array: str, row: int, col: int, expected: int) -> NDArray[np.uint8]:
        """Read one whole chunk and compare it with its checksum. RunError if it is missing or another one."""
        window = Window.cell(row, col, self.chunk_px)
        name = f"{self._root}: chunk {row}, {col} of {array}"
        if not self._chunk_path(array, row, col).is_file():
            raise RunError(f"{name} is missing; expected the one that the ledger names")
        try:
            data = np.asarray(self._array(array)[(..., *window.within(self.grid))], np.uint8)
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"{name} is damaged: {error}") from None
        if (found := checksum(data)) != expected:
            raise RunError(f"{name} has checksum {found}; expected {expected}, which the ledger names")
        return data

    def drop(self, array: str) -> None:
        """Delete an array with all its chunks."""
        self._arrays.pop(array, None)
        if array in self._group:
            del self._group[array]

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _chunk_path(self, array: str, row: int, col: int) -> Path:
        at = Window.cell(row, col, self.chunk_px).within(self.grid)
        index = [str(s.start // self.chunk_px) for s in at]
        bands = ["0"] * (self._array(array).ndim - 2)
        return self._root.joinpath(array, "c", *bands, *index)


def checksum(data: NDArray[np.uint8]) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(data).data)


def prepare_store(folder: Path, layout: Layout) -> Store:
    """Create the store of a run, or let an existing one grow to a larger grid. What is done stays; it never shrinks.

    A store of another lattice, chunk size or bands is replaced, and what the ledger says of its chunks is forgotten:
    a later run that goes back to the first chunk size would else find entries of files that are gone.
    """
    root = folder / "store.zarr"
    old = _stored_layout(root)
    if old is None or (old.lattice, old.chunk_px, old.bands) != (layout.lattice, layout.chunk_px, layout.bands):
        for stage in ("read", "predict"):
            shutil.rmtree(folder / "ledger" / stage, ignore_errors=True)
        if root.exists():
            shutil.rmtree(root)
        root.mkdir(parents=True)
        _write_metadata(root, layout)
        return Store(folder)
    grid = _finish_move(root) or old.grid
    grown = replace(layout, grid=grid.union(layout.grid))
    # Zarr counts chunks from the array's corner: when that moves, the files are renamed, not written anew.
    shift = [
        (grid.row_off - grown.grid.row_off) // grown.chunk_px,
        (grid.col_off - grown.grid.col_off) // grown.chunk_px,
    ]
    if shift != [0, 0]:
        write_json(root / "moving.json", {"phase": "collect", "shift": shift, "grid": _as_list(grown.grid)})
        _finish_move(root)
    _write_metadata(root, grown)
    (root / "moving.json").unlink(missing_ok=True)
    return Store(folder)


def _as_list(window: Window) -> list[int]:
    return [window.row_off, window.col_off, window.height, window.width]


def _stored_layout(root: Path) -> Layout | None:
    try:
        attributes: dict[str, Any] = dict(zarr.open_group(root, mode="r", zarr_format=3).attrs)
        own = attributes["segpipe"]
        lattice = Lattice(attributes["crs_wkt"], own["pixel_size"], own["phase_x"], own["phase_y"])
        return Layout(lattice, Window(*own["grid"]), own["chunk_px"], own["bands"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _finish_move(root: Path) -> Window | None:
    """Carry a begun move of the chunk files through; returns the grid that they are numbered for, None if none began.

    May be killed at any rename and called again: first all files are collected beside under their new names, then,
    which is written down in between, the folders are exchanged.
    """
    marker = root / "moving.json"
    if not marker.exists():
        return None
    move = json.loads(marker.read_text())
    corners = [root / "image" / "c" / "0", root / "valid" / "c", root / "probability" / "c"]
    if move["phase"] == "collect":
        for corner in corners:
            for row in _numbered(corner):
                target = corner.with_name("moved") / str(int(row.name) + move["shift"][0])
                target.mkdir(parents=True, exist_ok=True)
                for chunk in _numbered(row):
                    chunk.rename(target / str(int(chunk.name) + move["shift"][1]))
        write_json(marker, move | {"phase": "exchange"})
    for corner in corners:
        if (moved := corner.with_name("moved")).exists():
            shutil.rmtree(corner, ignore_errors=True)
            moved.rename(corner)
    return Window(*move["grid"])


def _numbered(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def _write_metadata(root: Path, layout: Layout) -> None:
    """Write the metadata of group and arrays; chunks stay. CRS and transform are put where GDAL and rioxarray look."""
    lattice, grid, chunk = layout.lattice, layout.grid, layout.chunk_px
    transform = lattice.transform(grid.row_off, grid.col_off)
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(root, mode="a", zarr_format=3)
        group.attrs.update(
            {
                "crs_wkt": lattice.crs_wkt,
                "transform": list(transform)[:6],
                "segpipe": {
                    "grid": _as_list(grid),
                    "chunk_px": chunk,
                    "bands": layout.bands,
                    "pixel_size": lattice.pixel_size,
                    "phase_x": lattice.phase_x,
                    "phase_y": lattice.phase_y,
                },
            }
        )
        shapes = {"image": (layout.bands,), "valid": (), "probability": ()}
        fills = {"image": 0, "valid": 0, "probability": INVALID}
        for name, leading in shapes.items():
            shape = (*leading, *grid.shape_yx)
            if name in group:
                stored = group[name]
                assert isinstance(stored, zarr.Array)
                if stored.shape != shape:
                    # By hand: the files have been moved before the shape, and a resize would look for them.
                    path = root / name / "zarr.json"
                    write_json(path, json.loads(path.read_text()) | {"shape": list(shape)})
                continue
            group.create_array(
                name,
                shape=shape,
                dtype="uint8",
                chunks=(*leading, chunk, chunk),
                compressors=[ZstdCodec(level=1, checksum=True)],
                serializer=BytesCodec(),
                fill_value=fills[name],
                dimension_names=(*("band" for _ in leading), "y", "x"),
                attributes={
                    "grid_mapping": "spatial_ref",
                    "coordinates": "spatial_ref",
                    "_CRS": {"wkt": lattice.crs_wkt},
                },
            )
        for name, size, start, step in (
            ("x", grid.width, transform.c, transform.a),
            ("y", grid.height, transform.f, transform.e),
        ):
            centres = start + step * (np.arange(size) + 0.5)
            group.create_array(name, data=centres, dimension_names=(name,), overwrite=True)
        spatial_ref = group.create_array("spatial_ref", shape=(), dtype="int64", overwrite=True)
        spatial_ref.attrs.update(
            {
                "crs_wkt": lattice.crs_wkt,
                "spatial_ref": lattice.crs_wkt,
                "GeoTransform": " ".join(repr(float(v)) for v in transform.to_gdal()),
            }
        )


class Ledger:
    """What is done: a JSON file a stage and unit, written last. Its key says from which inputs and settings."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "ledger"

    def done(self, stage: str, unit: str, key: str) -> dict[str, Any] | None:
        """The entry of a unit if it was done from the same inputs and settings, else None."""
        entry = self.entry(stage, unit)
        return entry if entry is not None and entry.get("key") == key else None

    def entry(self, stage: str, unit: str) -> dict[str, Any] | None:
        """The entry of a unit, whatever it was done from."""
        try:
            entry: dict[str, Any] = json.loads((self._folder / stage / f"{unit}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return entry

    def record(self, stage: str, unit: str, key: str, **values: object) -> None:
        """Write a unit's entry. To be called when all that it stands for is written."""
        path = self._folder / stage / f"{unit}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, **values})

    def forget(self, stage: str, unit: str) -> None:
        """Take an entry back: the unit will be done again."""
        (self._folder / stage / f"{unit}.json").unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file beside and rename it into place."""
    write_bytes(path, json.dumps(value, ensure_ascii=False, indent=1).encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside and rename it into place."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


OWN_FOLDERS = ("store.zarr", "fragments", "ledger", "validity")
"""Folders of a run folder in which everything is ours."""
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.partial$|\.partial-segpipe\.")


def remove_leftovers(folder: Path) -> int:
    """Delete what killed writers have left half-written in a run folder, by their names; returns how many files."""
    count = 0
    for part in (folder, *(folder / name for name in OWN_FOLDERS)):
        for path in part.glob("*") if part == folder else part.rglob("*"):
            # The lock's are of a process that is alive, ours or one that waits for the lock.
            if _LEFTOVER.search(path.name) and path.is_file() and not path.name.startswith("lock."):
                path.unlink(missing_ok=True)
                count += 1
    return count


_BEAT_S = 5.0
_STALE_S = 30.0


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Hold the lock on a run folder: a file with a counter that moves every 5 s, the host and the process.

    A lock is stale when its process is seen dead on this host, or when the counter has not moved for 30 s of our own
    clock; a stale one is taken over. Gives the lock's token, by which tasks know whose run they are of. UserError if
    somebody else holds it.
    """
    path = folder / "lock.json"
    token = uuid.uuid4().hex
    while not _try_lock(path, token):
        holder = _holder(path)
        if holder is None:
            continue
        if not _stale(path, holder):
            raise UserError(
                f"{folder}: another run is at work here (process {holder['pid']} on {holder['host']});"
                " expected to be alone; wait for it, or stop it"
            )
        _take_away(path, holder["token"], path.with_name(f"lock.{token}.stale"))
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, token, stop), daemon=True)
    beat.start()
    try:
        yield token
    finally:
        stop.set()
        beat.join()
        holder = _holder(path)
        if holder is not None and holder["token"] == token:
            path.unlink(missing_ok=True)


def lock_token(folder: Path) -> str | None:
    """The token of the lock on a run folder, None if nobody holds it."""
    holder = _holder(folder / "lock.json")
    return None if holder is None else str(holder["token"])


def _take_away(path: Path, stale_token: str, aside: Path) -> None:
    """Remove a lock that was judged stale; one that another observer has put in its place meanwhile is put back."""
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    taken = _holder(aside)
    if taken is not None and taken["token"] != stale_token:
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _lock_text(token: str, counter: int) -> str:
    me = psutil.Process()
    return json.dumps(
        {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time(), "token": token, "counter": counter}
    )


def _try_lock(path: Path, token: str) -> bool:
    beside = path.with_name(f"lock.{token}.partial")
    beside.write_text(_lock_text(token, 0))
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    finally:
        beside.unlink()
    return True


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return {"host": "?", "pid": 0, "started": 0.0, "token": "", "counter": -1}
    return holder


def _stale(path: Path, holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        try:
            process = psutil.Process(holder["pid"])
            alive = abs(process.create_time() - holder["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            alive = False
        return not alive
    seen = time.monotonic()
    while time.monotonic() - seen < _STALE_S:
        time.sleep(1.0)
        now = _holder(path)
        if now is None or (now["token"], now["counter"]) != (holder["token"], holder["counter"]):
            return False
    return True


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    counter = 0
    while not stop.wait(_BEAT_S):
        counter += 1
        holder = _holder(path)
        if holder is None or holder["token"] != token:
            return
        beside = path.with_name(f"lock.{token}.partial")
        # On a full disk the counter stands still, but the lock is held on: there may be room again.
        with suppress(OSError):
            beside.write_text(_lock_text(token, counter))
            beside.replace(path)
