"""The footprints in other vector formats than the GeoPackage, made from its rows: streamed, beside, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pyogrio.errors
import pyogrio.raw
import shapely
from pyproj import CRS, Transformer

from segpipe.tasks.errors import RunError

from .beside import partial_path, write_error
from .geopackage import LAYER, read_rows
from .manifest import FORMAT_FILES
from .rows import SCHEMA

DRIVERS = {"flatgeobuf": "FlatGeobuf", "filegdb": "OpenFileGDB", "geojson": "GeoJSON"}
LAYER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "flatgeobuf": {"SPATIAL_INDEX": "YES"},
    "filegdb": {"GEOMETRY_NAME": "SHAPE"},
    # RFC 7946 knows WGS84 only; GDAL reprojects. 8 decimals are a millimetre.
    "geojson": {"RFC7946": "YES", "COORDINATE_PRECISION": "8"},
}
SCHEMA_32 = pa.schema([field.with_type(pa.int32()) if field.type == pa.int64() else field for field in SCHEMA])
"""Of file geodatabases: only the newest programs read one with integers of 64 bits."""

GROUP_BATCHES = 16
"""Batches in a row group of a Parquet file."""

Batches = Iterator[pa.RecordBatch]


def write_formats(
    folder: Path, geopackage: Path, formats: Sequence[str], crs_wkt: str, out_wkt: str | None
) -> list[str]:
    """Write the rows of a published GeoPackage in each format; paths of the files relative to the folder.

    crs_wkt: of the rows; out_wkt: that of the files, None for the same. GeoJSON is in WGS84 whatever is asked for. The
    number of features read back must be that of the GeoPackage. Raises RunError, and leaves what was there before.
    """
    count = pyogrio.read_info(geopackage, layer=LAYER, force_feature_count=True)["features"]
    written: list[str] = []
    for each in formats:
        path = folder / FORMAT_FILES[each]
        partial = partial_path(path)
        to_wkt = crs_wkt if out_wkt is None or each == "geojson" else out_wkt
        _remove(partial)
        try:
            batches = _reprojected(read_rows(geopackage), crs_wkt, to_wkt)
            found = _write_one(each, partial, batches, to_wkt)
            if found != count:
                raise RunError(f"{path}: {found} features found after writing {count}")
            _remove(path)
            partial.rename(path)
        except (OSError, pa.ArrowException, pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
            raise write_error(path, error) from error
        finally:
            _remove(partial)
        parts = sorted(it for it in path.rglob("*") if it.is_file()) if path.is_dir() else [path]
        written += [str(part.relative_to(folder)) for part in parts]
    return written


def remove_formats(folder: Path, formats: Collection[str], own: Collection[str]) -> None:
    """Delete what earlier runs have written in formats that are no longer asked for: it would tell of other rows."""
    ours = {name.partition("/")[0] for name in own}
    for each, name in FORMAT_FILES.items():
        if each not in formats and name in ours:
            _remove(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reprojected(batches: Batches, from_wkt: str, to_wkt: str) -> Batches:
    if to_wkt == from_wkt:
        yield from batches
        return
    transformer = Transformer.from_crs(CRS.from_wkt(from_wkt), CRS.from_wkt(to_wkt), always_xy=True)
    at = SCHEMA.get_field_index("geometry")
    for batch in batches:
        geometries = shapely.from_wkb(batch.column(at).to_numpy(zero_copy_only=False))
        moved = shapely.transform(geometries, transformer.transform, interleaved=False)
        wkb = shapely.to_wkb(shapely.orient_polygons(moved), byte_order=1)
        yield batch.set_column(at, SCHEMA.field(at), pa.array(wkb, pa.binary()))


def _write_one(each: str, path: Path, batches: Batches, crs_wkt: str) -> int:
    """Write one file, and count the features in it."""
    if each == "geoparquet":
        return _write_geoparquet(path, batches, crs_wkt)
    failed: list[BaseException] = []
    schema = SCHEMA_32 if each == "filegdb" else SCHEMA
    cast = (batch.cast(schema) for batch in _noting(batches, failed.append))
    try:
        pyogrio.raw.write_arrow(
            pa.RecordBatchReader.from_batches(schema, cast),
            path,
            layer=LAYER,
            driver=DRIVERS[each],
            geometry_name="geometry",
            geometry_type="Polygon",
            crs=crs_wkt,
            layer_options=dict(LAYER_OPTIONS[each]),
        )
    finally:
        # An exception in the generator comes through the C stream as a text without its kind.
        if failed:
            raise failed[0]
    return int(pyogrio.read_info(path, layer=LAYER, force_feature_count=True)["features"])


def _noting(batches: Batches, note: Callable[[BaseException], None]) -> Batches:
    try:
        yield from batches
    except Exception as error:
        note(error)
        raise


BBOX = pa.struct([pa.field(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])


def _write_geoparquet(path: Path, batches: Batches, crs_wkt: str) -> int:
    """GeoParquet 1.1 with a bbox column, by which readers skip row groups; the number of its rows."""
    schema = SCHEMA.append(pa.field("bbox", BBOX, nullable=False))
    total: list[Any] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _in_groups(batches):
            geometries = shapely.from_wkb(group.column("geometry").to_numpy())
            bounds = shapely.bounds(geometries)
            total.append(shapely.total_bounds(geometries))
            bbox = pa.StructArray.from_arrays([pa.array(side) for side in bounds.T], fields=list(BBOX))
            writer.write_table(group.append_column(schema.field("bbox"), bbox))
        writer.add_key_value_metadata({"geo": json.dumps(_geo_metadata(total, crs_wkt))})
    return int(pq.read_metadata(path).num_rows)


def _in_groups(batches: Batches) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if len(held) == GROUP_BATCHES:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def _geo_metadata(bounds: list[Any], crs_wkt: str) -> dict[str, Any]:
    """The `geo` key of GeoParquet 1.1.0."""
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"],
        "crs": CRS.from_wkt(crs_wkt).to_json_dict(),
        "orientation": "counterclockwise",
        "covering": {"bbox": {side.name: ["bbox", side.name] for side in BBOX}},
    }
    if bounds:
        stacked = np.array(bounds)
        column["bbox"] = [*stacked[:, :2].min(axis=0).tolist(), *stacked[:, 2:].max(axis=0).tolist()]
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
