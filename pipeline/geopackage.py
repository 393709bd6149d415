"""The only module that writes GeoPackages: footprints and changes, streamed in, read back and compared."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyogrio
import pyogrio.errors
import pyogrio.raw
import shapely

from segpipe.tasks.errors import RunError

from . import changes
from .beside import partial_path, remove_with_siblings, write_error
from .rows import BATCH_ROWS, SCHEMA, CheckedStream, RowsDigest, Written
from .styles import CHANGES_QML, CONFIDENCE_QML, VERDICTS_QML

LAYER = "buildings"
CHANGES_LAYER = "changes"
VERDICTS_LAYER = "evaluation"


def write_geopackage(
    path: Path, batches: Iterable[pa.RecordBatch], crs_wkt: str, about: Mapping[str, str] | None = None
) -> Written:
    """Write footprints as layer `buildings`, in the order given, with a spatial index and a default QGIS style.

    The batches have the columns of SCHEMA. They are checked as they stream through (valid Polygons only), and the file
    is read back: number, extent and rows must be those that went in. Raises RunError otherwise, and leaves no file.
    about: what the layer's metadata say.
    """
    remove_with_siblings(path)
    with _whole_or_gone(path):
        stream = CheckedStream(batches, SCHEMA)
        written = _write_checked(path, LAYER, stream, crs_wkt, CONFIDENCE_QML, "by confidence")
        if about:
            _add_metadata(path, about)
        return written


def add_layer(path: Path, layer: str, rows: pa.RecordBatch, crs_wkt: str, qml: str) -> None:
    """Add a small layer of polygons, some of which may be missing, to a written GeoPackage, with its default style.

    Raises RunError, and leaves no file.
    """
    with _whole_or_gone(path):
        batches = (rows.slice(first, BATCH_ROWS) for first in range(0, rows.num_rows, BATCH_ROWS))
        _write_checked(path, layer, CheckedStream(batches, rows.schema, may_miss=True), crs_wkt, qml, layer)


def add_changes(path: Path, batches: Iterable[pa.RecordBatch], crs_wkt: str) -> dict[str, int]:
    """Add layer `changes` to a written GeoPackage, in the order given, as `write_geopackage` does; number of each kind.

    The batches have the columns of changes.SCHEMA, and may be read from the file itself: all are taken before the first
    is written, into a file beside it. Raises RunError, and leaves no file.
    """
    with _whole_or_gone(path):
        beside = path.with_name(f"{path.name}.changes")
        counts = dict.fromkeys(changes.KINDS, 0)
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, changes.SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
                for kind in changes.KINDS:
                    counts[kind] += batch.column("change").to_pylist().count(kind)
        with pa.OSFile(str(beside), "rb") as source, pa.ipc.open_stream(source) as reader:
            small = (
                batch.slice(first, BATCH_ROWS) for batch in reader for first in range(0, batch.num_rows, BATCH_ROWS)
            )
            stream = CheckedStream(small, changes.SCHEMA)
            _write_checked(path, CHANGES_LAYER, stream, crs_wkt, CHANGES_QML, "by kind of change")
        beside.unlink()
    return counts


def write_verdicts(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema, crs_wkt: str) -> int:
    """Write what an evaluation has judged as layer `evaluation`, MultiPolygons styled by `verdict`; number of rows.

    As `write_geopackage`: beside, checked, and renamed into place. Raises RunError, and leaves what was there.
    """
    partial = partial_path(path)
    remove_with_siblings(partial)
    with _whole_or_gone(partial):
        stream = CheckedStream(batches, schema, "MultiPolygon")
        written = _write_checked(partial, VERDICTS_LAYER, stream, crs_wkt, VERDICTS_QML, "by verdict")
        partial.replace(path)
    return written.features


@contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """Remove a file that could not be written whole. What libraries raise becomes a RunError."""
    try:
        yield
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, sqlite3.Error, OSError) as error:
        told = write_error(path, error)
        remove_with_siblings(path)
        raise told from error
    except BaseException:
        remove_with_siblings(path)
        raise


def rows_digest(path: Path) -> str:
    """Digest of the rows of layer `buildings` in the order of their fid: ids, attributes and geometries.

    Of the rows, not of the file: QGIS changes a file by opening it. An added, missing or retyped column changes it too;
    other layers do not. Raises pyogrio.errors.DataSourceError or DataLayerError if there is no such file or layer.
    """
    return layer_digest(path, LAYER, SCHEMA, {})


def layer_digest(path: Path, layer: str, schema: pa.Schema, options: Mapping[str, str]) -> str:
    """Digest of the rows of any layer that should have these columns. options: GDAL's for opening the file."""
    how: dict[str, Any] = {"layer": layer, "batch_size": BATCH_ROWS, "use_pyarrow": True, **options}
    with pyogrio.raw.open_arrow(path, **how) as (meta, reader):
        geometry_name = meta["geometry_name"] or "wkb_geometry"
        columns = [(field.name, str(field.type)) for field in reader.schema if field.name != geometry_name]
        if columns != [(name, str(schema.field(name).type)) for name in schema.names if name != "geometry"]:
            return hashlib.sha256(repr(columns).encode()).hexdigest()
        digest = RowsDigest(schema)
        for batch in reader:
            digest.update(batch, shapely.from_wkb(batch.column(geometry_name).to_numpy(zero_copy_only=False)))
    return digest.hexdigest()


def read_rows(path: Path, layer: str = LAYER, schema: pa.Schema = SCHEMA) -> Iterator[pa.RecordBatch]:
    """The rows of a published layer in the order of their fid, in batches of at most BATCH_ROWS.

    No row where the file has no such layer, or one with other columns. Nothing is written beside the file and nobody is
    waited for, even if another program has it open.
    """
    if layer not in pyogrio.list_layers(path)[:, 0]:
        return
    how: dict[str, Any] = {"layer": layer, "batch_size": BATCH_ROWS, "use_pyarrow": True, **UNTOUCHED}
    with pyogrio.raw.open_arrow(path, **how) as (meta, reader):
        geometry_name = meta["geometry_name"] or "wkb_geometry"
        if {*reader.schema.names} != {*schema.names} - {"geometry"} | {geometry_name}:
            return
        for batch in reader:
            columns = [batch.column(geometry_name if name == "geometry" else name) for name in schema.names]
            yield pa.RecordBatch.from_arrays(
                [column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
            )


UNTOUCHED = {"IMMUTABLE": "YES"}
"""Opens a GeoPackage as it lies on disk: no lock, no journal, no file beside it."""


def _write_checked(path: Path, layer: str, stream: CheckedStream, crs_wkt: str, qml: str, style: str) -> Written:
    """Write one layer and its default style, read it back, and say what it holds."""
    _write_layer(path, layer, stream, crs_wkt)
    _add_style(path, layer, qml, style)
    written = Written(stream.features, stream.digest.hexdigest(), stream.bounds)
    _check_layer(path, layer, stream.schema, written)
    return written


def _write_layer(path: Path, layer: str, stream: CheckedStream, crs_wkt: str) -> None:
    try:
        # The index is sorted in memory, 70 bytes a building, until this many bytes; from there on it grows on disk.
        pyogrio.set_gdal_config_options({"OGR_GPKG_MAX_RAM_USAGE_RTREE": str(64 << 20)})
        pyogrio.raw.write_arrow(
            pa.RecordBatchReader.from_batches(stream.schema, iter(stream)),
            path,
            layer=layer,
            driver="GPKG",
            geometry_name="geometry",
            geometry_type=stream.geometry_type,
            crs=crs_wkt,
            # Older QGIS warns about 1.4, which is GDAL's default.
            dataset_options={} if path.exists() else {"VERSION": "1.2"},
            layer_options={"SPATIAL_INDEX": "YES", "GEOMETRY_NAME": "geom", "FID": "fid"},
        )
    finally:
        pyogrio.set_gdal_config_options({"OGR_GPKG_MAX_RAM_USAGE_RTREE": None})
        # An exception in the generator comes through the C stream as a text without its kind: the first one counts.
        if stream.error is not None:
            raise stream.error


def _check_layer(path: Path, layer: str, schema: pa.Schema, written: Written) -> None:
    info = pyogrio.read_info(path, layer=layer, force_feature_count=True, force_total_bounds=True)
    if info["features"] != written.features:
        raise RunError(f"{path}: {info['features']} features found in {layer} after writing {written.features}")
    # The file keeps its extent in 16 digits: one less than a coordinate may need.
    if written.bounds is not None and not np.allclose(info["total_bounds"], written.bounds, rtol=1e-12, atol=1e-6):
        raise RunError(f"{path}: extent {info['total_bounds']} found in {layer} after writing {written.bounds}")
    if layer_digest(path, layer, schema, {}) != written.digest:
        raise RunError(f"{path}: the rows of {layer} read back are not those written; the disk may be faulty")


def _add_metadata(path: Path, about: Mapping[str, str]) -> None:
    """Put items into the tables of the GeoPackage metadata extension, as GDAL writes and shows them."""
    items = ElementTree.Element("GDALMultiDomainMetadata")
    metadata = ElementTree.SubElement(items, "Metadata")
    for key, value in about.items():
        ElementTree.SubElement(metadata, "MDI", key=key).text = value
    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(METADATA_TABLES)
        database.execute(
            "INSERT INTO gpkg_metadata (md_scope, md_standard_uri, mime_type, metadata)"
            " VALUES ('dataset', 'http://gdal.org', 'text/xml', ?)",
            (ElementTree.tostring(items, encoding="unicode"),),
        )
        database.execute(
            # Of the layer: where they are of the whole file GDAL 3.12 writes an .aux.xml beside it when it is opened.
            "INSERT INTO gpkg_metadata_reference (reference_scope, table_name, md_file_id) VALUES ('table', ?, 1)",
            (LAYER,),
        )


METADATA_TABLES = """
CREATE TABLE gpkg_metadata (
    id INTEGER CONSTRAINT m_pk PRIMARY KEY ASC NOT NULL, md_scope TEXT NOT NULL DEFAULT 'dataset',
    md_standard_uri TEXT NOT NULL, mime_type TEXT NOT NULL DEFAULT 'text/xml', metadata TEXT NOT NULL DEFAULT ''
);
CREATE TABLE gpkg_metadata_reference (
    reference_scope TEXT NOT NULL, table_name TEXT, column_name TEXT, row_id_value INTEGER,
    timestamp DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')), md_file_id INTEGER NOT NULL,
    md_parent_id INTEGER, CONSTRAINT crmr_mfi_fk FOREIGN KEY (md_file_id) REFERENCES gpkg_metadata(id),
    CONSTRAINT crmr_mpi_fk FOREIGN KEY (md_parent_id) REFERENCES gpkg_metadata(id)
);
INSERT INTO gpkg_extensions VALUES
    ('gpkg_metadata', NULL, 'gpkg_metadata', 'http://www.geopackage.org/spec120/#extension_metadata', 'read-write'),
    ('gpkg_metadata_reference', NULL, 'gpkg_metadata', 'http://www.geopackage.org/spec120/#extension_metadata',
     'read-write');
"""
"""The extension's own definitions (OGC 12-128r15, F.8)."""


def _add_style(path: Path, layer: str, qml: str, description: str) -> None:
    """Give a layer its default style in table layer_styles, which is made as QGIS makes it.

    QGIS finds a default style only where catalog and schema are empty texts, not NULL.
    """
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(STYLE_TABLE)
        database.execute(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName,"
            " styleQML, styleSLD, useAsDefault, description, owner) VALUES ('', '', ?, 'geom', ?, ?, '', 1, ?, '')",
            (layer, layer, qml, description),
        )
        database.execute(
            "INSERT OR IGNORE INTO gpkg_contents (table_name, data_type, identifier, description, srs_id)"
            " VALUES ('layer_styles', 'attributes', 'layer_styles', '', 0)"
        )


STYLE_TABLE = """CREATE TABLE IF NOT EXISTS layer_styles (
    id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
    f_table_catalog TEXT(256), f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256),
    styleName TEXT(30), styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT(30),
    ui TEXT(30), update_time DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now'))
)"""
