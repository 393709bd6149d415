"""The only zarr: the arrays on the grid, image, valid and probability, created, grown, and read and written by chunks.

They are the `store.zarr` of a run folder, on a disk or in a bucket. One writer a chunk.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.storage
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, ZstdCodec

from segpipe.tasks.errors import RunError
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.predict import INVALID

from .ledger import as_json
from .storage import Folder, folder_at

STORE = "store.zarr"
LEVELS = {"image": -1, "valid": 1, "probability": 1}
"""Of zstd, by array. At level 1 aerial imagery takes 10 % less space, and twice as long to write and to read."""
MOVING = f"{STORE}/moving.json"


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

    def __init__(self, folder: Folder | Path) -> None:
        """Open the store in a run folder. RunError where there is none."""
        self._folder = folder_at(folder)
        self._root = self._folder.file(STORE)
        try:
            with self._folder.errors(STORE):
                self._group = _open_group(self._folder, "r+")
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
            with self._folder.errors(STORE):
                out[(..., *inside.within(window))] = source[(..., *inside.within(self.grid))]
        return out

    def write_chunk(self, array: str, row: int, col: int, data: NDArray[np.uint8]) -> int:
        """Write one whole chunk with absolute index (row, col); returns its checksum."""
        window = Window.cell(row, col, self.chunk_px)
        if data.shape[-2:] != window.shape_yx or not self.grid.contains(window):
            raise ValueError(f"chunk {row}, {col} of {array}: {data.shape} px; expected a whole chunk of {self.grid}")
        target = self._array(array)
        with self._folder.errors(self._chunk(array, row, col)):
            target[(..., *window.within(self.grid))] = data
        return checksum(data)

    def read_chunk(self, array: str, row: int, col: int, expected: int) -> NDArray[np.uint8]:
        """Read one whole chunk and compare it with its checksum. RunError if it is missing or another one."""
        window = Window.cell(row, col, self.chunk_px)
        name = f"{self._root}: chunk {row}, {col} of {array}"
        source = self._array(array)
        try:
            with self._folder.errors(self._chunk(array, row, col)):
                data = np.asarray(source[(..., *window.within(self.grid))], np.uint8)
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"{name} is damaged: {error}") from None
        found = checksum(data)
        # What is not there is read as fill: it is asked for only where that is what came.
        if (found != expected or (data == source.fill_value).all()) and not self._is_there(array, row, col):
            raise RunError(f"{name} is missing; expected the one that the ledger names")
        if found != expected:
            raise RunError(f"{name} has checksum {found}; expected {expected}, which the ledger names")
        return data

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            try:
                with self._folder.errors(STORE):
                    array = self._group[name]
            except (FileNotFoundError, KeyError):
                raise RunError(f"{self._root}: has no array {name} any more; expected the one of this run") from None
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _is_there(self, array: str, row: int, col: int) -> bool:
        return self._folder.size(self._chunk(array, row, col)) is not None

    def _chunk(self, array: str, row: int, col: int) -> str:
        """The name of a chunk's file."""
        at = Window.cell(row, col, self.chunk_px).within(self.grid)
        index = [str(s.start // self.chunk_px) for s in at]
        bands = ["0"] * (self._array(array).ndim - 2)
        return "/".join((STORE, array, "c", *bands, *index))


def _open_group(folder: Folder, mode: Any) -> zarr.Group:
    place = folder.opened(STORE)
    root = place if isinstance(place, Path) else zarr.storage.ObjectStore(place)
    return zarr.open_group(root, mode=mode, zarr_format=3)


def checksum(data: NDArray[np.uint8]) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(data).data)


def prepare_store(folder: Folder | Path, layout: Layout) -> Store:
    """Create the store of a run, or let an existing one grow to a larger grid. What is done stays; it never shrinks.

    A store of another lattice, chunk size or bands is replaced, and what the ledger says of its chunks is forgotten:
    a later run that goes back to the first chunk size would else find entries of files that are gone.
    """
    place = folder_at(folder)
    with place.errors(STORE):
        old = _stored_layout(place)
    if old is None or (old.lattice, old.chunk_px, old.bands) != (layout.lattice, layout.chunk_px, layout.bands):
        for stage in ("read", "predict"):
            place.remove_all(f"ledger/{stage}")
        place.remove_all(STORE)
        _write_metadata(place, layout)
        return Store(place)
    grid = _finish_move(place) or old.grid
    grown = replace(layout, grid=grid.union(layout.grid))
    # Zarr counts chunks from the array's corner: when that moves, the files are renamed, not written anew.
    shift = [
        (grid.row_off - grown.grid.row_off) // grown.chunk_px,
        (grid.col_off - grown.grid.col_off) // grown.chunk_px,
    ]
    if shift != [0, 0]:
        place.write(MOVING, as_json({"phase": "collect", "shift": shift, "grid": _as_list(grown.grid)}))
        _finish_move(place)
    _write_metadata(place, grown)
    place.remove(MOVING)
    return Store(place)


def _as_list(window: Window) -> list[int]:
    return [window.row_off, window.col_off, window.height, window.width]


def _stored_layout(folder: Folder) -> Layout | None:
    try:
        attributes: dict[str, Any] = dict(_open_group(folder, "r").attrs)
        own = attributes["segpipe"]
        lattice = Lattice(attributes["crs_wkt"], own["pixel_size"], own["phase_x"], own["phase_y"])
        return Layout(lattice, Window(*own["grid"]), own["chunk_px"], own["bands"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _finish_move(folder: Folder) -> Window | None:
    """Carry a begun move of the chunk files through; returns the grid that they are numbered for, None if none began.

    May be killed at any file and called again: first all files are collected beside under their new names, then,
    which is written down in between, the folders are exchanged.
    """
    marker = folder.read(MOVING)
    if marker is None:
        return None
    move = json.loads(marker)
    corners = [f"{STORE}/{corner}" for corner in ("image/c/0", "valid/c", "probability/c")]
    if move["phase"] == "collect":
        for corner in corners:
            for _ in folder.each(lambda names: folder.move(*names), _moves(folder, corner, move["shift"])):
                pass
        folder.write(MOVING, as_json(move | {"phase": "exchange"}))
    for corner in corners:
        folder.exchange(_aside(corner), corner)
    return Window(*move["grid"])


def _aside(corner: str) -> str:
    return corner.rpartition("/")[0] + "/moved"


def _moves(folder: Folder, corner: str, shift: list[int]) -> list[tuple[str, str]]:
    """The name of each chunk's file below a corner, and the one that it is to have."""
    moves = []
    for name in folder.names(corner):
        row, _, col = name.removeprefix(f"{corner}/").partition("/")
        if row.isdigit() and col.isdigit():
            moves.append((name, f"{_aside(corner)}/{int(row) + shift[0]}/{int(col) + shift[1]}"))
    return moves


def _write_metadata(folder: Folder, layout: Layout) -> None:
    """Write the metadata of group and arrays; chunks stay. CRS and transform are put where GDAL and rioxarray look."""
    lattice, grid, chunk = layout.lattice, layout.grid, layout.chunk_px
    transform = lattice.transform(grid.row_off, grid.col_off)
    with folder.errors(STORE), zarr.config.set({"array.write_empty_chunks": True}):
        group = _open_group(folder, "a")
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
                    metadata = f"{STORE}/{name}/zarr.json"
                    folder.write(metadata, as_json(json.loads(folder.read(metadata) or b"{}") | {"shape": list(shape)}))
                continue
            group.create_array(
                name,
                shape=shape,
                dtype="uint8",
                chunks=(*leading, chunk, chunk),
                compressors=[ZstdCodec(level=LEVELS[name], checksum=True)],
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
