"""Fragments as files: what one block leaves for joining and publishing, in columns that can be read apart."""

from __future__ import annotations

import pyarrow as pa

from .grid import Window
from .vectorize import Buildings, Components, Fragment, Sides


def fragment_to_bytes(fragment: Fragment) -> bytes:
    """A fragment as an Arrow IPC file of one row, whose columns can be read apart. Equal fragments give equal bytes."""
    sides, window = fragment.sides, fragment.sides.window
    columns = {f"window_{name}": pa.array([getattr(window, name)], pa.int64()) for name in _WINDOW}
    columns |= {name: pa.array([getattr(fragment, name)], pa.int64()) for name in _COUNTS}
    columns |= {f"side_{name}": _in_one_row(pa.array(getattr(sides, name))) for name in _SIDES}
    for part in ("border", "finished"):
        batch = getattr(fragment, part).to_arrow()
        columns |= {f"{part}_{name}": _in_one_row(batch.column(name)) for name in batch.schema.names}
    row = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with pa.ipc.new_file(sink, row.schema, options=options) as writer:
        writer.write_batch(row)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def sides_from_bytes(data: bytes | pa.Buffer) -> Sides:
    """The sides of a stored fragment alone: no polygon is read."""
    return _sides_of(_read_row(data, "window_", "side_", "border_key_"))


def border_from_bytes(data: bytes | pa.Buffer) -> Components:
    """The pieces of a stored fragment that touch its sides: element n - 1 is the one with label n."""
    return Components.from_arrow(_batch_of(_read_row(data, "border_"), "border_"))


def finished_from_bytes(data: bytes | pa.Buffer) -> Buildings:
    """The finished buildings of a stored fragment."""
    return Buildings.from_arrow(_batch_of(_read_row(data, "finished_"), "finished_"))


_WINDOW = ("row_off", "col_off", "height", "width")
_COUNTS = ("valid_pixels", "invalid_pixels", "mask_pixels")
_SIDES = ("top", "right", "bottom", "left")


def _in_one_row(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _read_row(data: bytes | pa.Buffer, *prefixes: str) -> pa.RecordBatch:
    """The one row of a fragment file with the columns whose names begin so; the others are not decompressed."""
    names = pa.ipc.open_file(data).schema.names
    wanted = [index for index, name in enumerate(names) if name.startswith(prefixes)]
    options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
    return pa.ipc.open_file(data, options=options).get_batch(0)


def _batch_of(row: pa.RecordBatch, prefix: str) -> pa.RecordBatch:
    """The list columns with a prefix as a batch of their own."""
    names = [name for name in row.schema.names if name.startswith(prefix)]
    return pa.RecordBatch.from_arrays([row.column(name).flatten() for name in names], [n[len(prefix) :] for n in names])


def _sides_of(row: pa.RecordBatch) -> Sides:
    window = Window(*(row.column(f"window_{name}")[0].as_py() for name in _WINDOW))
    sides = [row.column(f"side_{name}").flatten().to_numpy() for name in _SIDES]
    keys = [row.column(f"border_key_{name}").flatten().to_numpy() for name in ("row", "col")]
    return Sides(window, *sides, *keys)
