"""Rows of a layer on their way to a file and back: their columns, what is checked of them, and their digest.

Nothing is held as a whole: rows stream through in Arrow batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from segpipe.tasks import attributes
from segpipe.tasks.errors import RunError

BATCH_ROWS = 1024
"""Most rows of a batch, in and out: a large city takes as little memory as a small one, and no more time."""

SCHEMA = attributes.SCHEMA
"""Columns of buildings, as `segpipe.tasks.attributes.publishable` makes them."""


@dataclass(frozen=True)
class Written:
    """What a GeoPackage holds: number of features, digest of its rows, (xmin, ymin, xmax, ymax) or None if empty."""

    features: int
    digest: str
    bounds: tuple[float, float, float, float] | None


class CheckedStream:
    """Batches on their way to the writer: counts, bounds and digest grow with every batch that passes."""

    def __init__(
        self,
        batches: Iterable[pa.RecordBatch],
        schema: pa.Schema,
        geometry_type: Literal["Polygon", "MultiPolygon"] = "Polygon",
        may_miss: bool = False,
    ) -> None:
        """may_miss: rows without a geometry are let through."""
        self._batches = batches
        self.schema = schema
        self.geometry_type = geometry_type
        self._may_miss = may_miss
        self.features = 0
        self.bounds: tuple[float, float, float, float] | None = None
        self.digest = RowsDigest(schema)
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._batches:
                yield self._check(batch)
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise

    def _check(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        assert batch.num_rows <= BATCH_ROWS, f"batch of {batch.num_rows} rows: at most {BATCH_ROWS} are written at once"
        batch = batch.select(self.schema.names).cast(self.schema)
        geometries = shapely.from_wkb(batch.column("geometry").to_numpy(zero_copy_only=False))
        expected = shapely.GeometryType[self.geometry_type.upper()]
        good = (shapely.get_type_id(geometries) == expected) & shapely.is_valid(geometries)
        good &= ~shapely.is_empty(geometries)
        if self._may_miss:
            good |= shapely.is_missing(geometries)
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            reason = shapely.is_valid_reason(geometries[row])
            raise RunError(f"building {batch.column('building_id')[row]}: not a valid {self.geometry_type} ({reason})")
        if not shapely.is_missing(geometries).all():
            bounds = shapely.total_bounds(geometries)
            if self.bounds is not None:
                bounds = np.concatenate([np.minimum(bounds, self.bounds)[:2], np.maximum(bounds, self.bounds)[2:]])
            self.bounds = (float(bounds[0]), float(bounds[1]), float(bounds[2]), float(bounds[3]))
        self.digest.update(batch, geometries)
        self.features += batch.num_rows
        return batch


class RowsDigest:
    """SHA-256 over columns of rows; how the rows are cut into batches does not matter."""

    def __init__(self, schema: pa.Schema) -> None:
        self._attributes = [field for field in schema if field.name != "geometry"]
        parts = [part for name in schema.names for part in (name, f"{name} length")]
        self._hashes = {part: hashlib.sha256() for part in (*parts, "null")}

    def update(self, batch: pa.RecordBatch, geometries: NDArray[np.object_]) -> None:
        """Add rows: the attributes from batch, and the geometries as little-endian WKB in two dimensions."""
        nulls = [batch.column(field.name).is_null().to_numpy(zero_copy_only=False) for field in self._attributes]
        self._hashes["null"].update(np.stack([*nulls, shapely.is_missing(geometries)], axis=1).tobytes())
        for field in self._attributes:
            column = batch.column(field.name)
            if pa.types.is_string(field.type):
                self._update_texts(field.name, column.fill_null(""))
            else:
                values = column.fill_null(False if pa.types.is_boolean(field.type) else 0).to_numpy(
                    zero_copy_only=False
                )
                self._hashes[field.name].update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        wkb = shapely.to_wkb(geometries, output_dimension=2, byte_order=1, flavor="iso")
        self._update_texts("geometry", pa.array(wkb, pa.binary()).fill_null(b""))

    def _update_texts(self, name: str, texts: pa.Array) -> None:
        """Add texts or bytes, none of them null: their bytes one after another, and the length of each."""
        _, offsets, data = texts.buffers()
        ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
        if len(texts) and data is not None:
            self._hashes[name].update(memoryview(data)[int(ends[0]) : int(ends[-1])])
        self._hashes[f"{name} length"].update(np.diff(ends).astype("<i8").tobytes())

    def hexdigest(self) -> str:
        """The digest so far."""
        return hashlib.sha256(b"".join(column.digest() for column in self._hashes.values())).hexdigest()
