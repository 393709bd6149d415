"""Publish: footprints to a GeoPackage and rasters to COGs, each written beside, checked, and renamed into place.

The only module that writes GeoPackages. Nothing is held as a whole: footprints stream through in Arrow batches and
rasters in windows, so memory is set by the batch and the block, not by the city.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyogrio
import pyogrio.errors
import pyogrio.raw
import rasterio
import rasterio.errors
import rasterio.shutil
import rasterio.windows
import shapely
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # the base of what rasterio.shutil.copy raises; it has no public name

from segpipe.tasks.errors import RunError
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.predict import INVALID

from . import changes

LAYER = "buildings"
CHANGES_LAYER = "changes"
BATCH_ROWS = 1024
"""Most rows of a batch, in and out: a large city takes as little memory as a small one, and no more time."""

SCHEMA = pa.schema(
    [
        pa.field("building_id", pa.string()),
        pa.field("area_m2", pa.float64()),
        pa.field("pixels", pa.int64()),
        pa.field("confidence", pa.float64()),
        pa.field("cut", pa.bool_()),
        pa.field("geometry", pa.binary()),
    ]
)
"""Columns of the batches: area_m2 on the ground, pixels of the mask, cut: it goes on into imagery that was not
predicted, geometry as WKB in coordinates of the CRS."""

PARTIAL = ".partial-segpipe"
"""Marks what is not finished: `mask.partial-segpipe.tif` beside `mask.tif`."""

TILE_PX = 512
"""Internal tiles of the COGs."""


@dataclass(frozen=True)
class Written:
    """What a GeoPackage holds: number of features, digest of its rows, (xmin, ymin, xmax, ymax) or None if empty."""

    features: int
    digest: str
    bounds: tuple[float, float, float, float] | None


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
        raise _write_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_error(path: Path, error: Exception) -> RunError:
    free_mb = shutil.disk_usage(path.parent).free / 1e6 if path.parent.is_dir() else 0
    return RunError(f"{path}: cannot be written ({error}); {free_mb:,.0f} MB are free in this folder")


# GeoPackage


def write_geopackage(path: Path, batches: Iterable[pa.RecordBatch], crs_wkt: str) -> Written:
    """Write footprints as layer `buildings`, in the order given, with a spatial index and a default QGIS style.

    The batches have the columns of SCHEMA. They are checked as they stream through (valid Polygons only), and the file
    is read back: number, extent and rows must be those that went in. Raises RunError otherwise, and leaves no file.
    """
    _remove_with_siblings(path)
    with _whole_or_gone(path):
        return _write_checked(path, LAYER, _CheckedStream(batches, SCHEMA), crs_wkt, STYLE_QML, "translucent outlines")


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
            stream = _CheckedStream(small, changes.SCHEMA)
            _write_checked(path, CHANGES_LAYER, stream, crs_wkt, CHANGES_QML, "by kind of change")
        beside.unlink()
    return counts


@contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """Remove a file that could not be written whole. What libraries raise becomes a RunError."""
    try:
        yield
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, sqlite3.Error, OSError) as error:
        _remove_with_siblings(path)
        raise _write_error(path, error) from error
    except BaseException:
        _remove_with_siblings(path)
        raise


def rows_digest(path: Path) -> str:
    """Digest of the rows of layer `buildings` in the order of their fid: ids, attributes and geometries.

    Of the rows, not of the file: QGIS changes a file by opening it. An added, missing or retyped column changes it too;
    other layers do not. Raises pyogrio.errors.DataSourceError or DataLayerError if there is no such file or layer.
    """
    return _layer_digest(path, LAYER, SCHEMA, {})


def _layer_digest(path: Path, layer: str, schema: pa.Schema, options: Mapping[str, str]) -> str:
    """Digest of the rows of any layer that should have these columns. options: GDAL's for opening the file."""
    how: dict[str, Any] = {"layer": layer, "batch_size": BATCH_ROWS, "use_pyarrow": True, **options}
    with pyogrio.raw.open_arrow(path, **how) as (meta, reader):
        geometry_name = meta["geometry_name"] or "wkb_geometry"
        columns = [(field.name, str(field.type)) for field in reader.schema if field.name != geometry_name]
        if columns != [(name, str(schema.field(name).type)) for name in schema.names if name != "geometry"]:
            return hashlib.sha256(repr(columns).encode()).hexdigest()
        digest = _RowsDigest(schema)
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


def find_published(folder: Path, published: Mapping[str, Collection[str]], last: str | None) -> tuple[Path, str] | None:
    """The GeoPackage that holds what was published last, and the digest of its rows; None where there is none.

    published: digests by file name, as for `place_geopackage`; last: the name under which it was published. Where that
    file holds other rows, or is gone, it is the one with the highest number that holds rows that were published.
    """
    paths = sorted((folder / name for name in published), key=lambda path: (path.name == last, _number(path)))
    for path in reversed(paths):
        try:
            digest = _layer_digest(path, LAYER, SCHEMA, UNTOUCHED)
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


def _remove_with_siblings(path: Path) -> None:
    """Remove a file and what SQLite and GDAL write beside it: journals, temporary indices and overviews."""
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink(missing_ok=True)


def _write_checked(path: Path, layer: str, stream: _CheckedStream, crs_wkt: str, qml: str, style: str) -> Written:
    """Write one layer and its default style, read it back, and say what it holds."""
    _write_layer(path, layer, stream, crs_wkt)
    _add_style(path, layer, qml, style)
    written = Written(stream.features, stream.digest.hexdigest(), stream.bounds)
    _check_layer(path, layer, stream.schema, written)
    return written


def _write_layer(path: Path, layer: str, stream: _CheckedStream, crs_wkt: str) -> None:
    try:
        # The index is sorted in memory, 70 bytes a building, until this many bytes; from there on it grows on disk.
        pyogrio.set_gdal_config_options({"OGR_GPKG_MAX_RAM_USAGE_RTREE": str(64 << 20)})
        pyogrio.raw.write_arrow(
            pa.RecordBatchReader.from_batches(stream.schema, iter(stream)),
            path,
            layer=layer,
            driver="GPKG",
            geometry_name="geometry",
            geometry_type="Polygon",
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
    if _layer_digest(path, layer, schema, {}) != written.digest:
        raise RunError(f"{path}: the rows of {layer} read back are not those written; the disk may be faulty")


class _CheckedStream:
    """Batches on their way to the writer: counts, bounds and digest grow with every batch that passes."""

    def __init__(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
        self._batches = batches
        self.schema = schema
        self.features = 0
        self.bounds: tuple[float, float, float, float] | None = None
        self.digest = _RowsDigest(schema)
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
        good = (shapely.get_type_id(geometries) == shapely.GeometryType.POLYGON) & shapely.is_valid(geometries)
        good &= ~shapely.is_empty(geometries)
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            reason = shapely.is_valid_reason(geometries[row])
            raise RunError(f"building {batch.column('building_id')[row]}: not a valid Polygon ({reason})")
        if batch.num_rows:
            bounds = shapely.total_bounds(geometries)
            if self.bounds is not None:
                bounds = np.concatenate([np.minimum(bounds, self.bounds)[:2], np.maximum(bounds, self.bounds)[2:]])
            self.bounds = (float(bounds[0]), float(bounds[1]), float(bounds[2]), float(bounds[3]))
        self.digest.update(batch, geometries)
        self.features += batch.num_rows
        return batch


class _RowsDigest:
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
                self._update_texts(field.name, [text.encode() for text in column.fill_null("").to_pylist()])
            else:
                values = column.fill_null(False if pa.types.is_boolean(field.type) else 0).to_numpy(
                    zero_copy_only=False
                )
                self._hashes[field.name].update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        wkb = shapely.to_wkb(geometries, output_dimension=2, byte_order=1, flavor="iso")
        self._update_texts("geometry", [part or b"" for part in wkb])

    def _update_texts(self, name: str, parts: list[bytes]) -> None:
        self._hashes[name].update(b"".join(parts))
        self._hashes[f"{name} length"].update(np.fromiter((len(part) for part in parts), "<i8", len(parts)).tobytes())

    def hexdigest(self) -> str:
        """The digest so far."""
        return hashlib.sha256(b"".join(column.digest() for column in self._hashes.values())).hexdigest()


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


@dataclass(frozen=True)
class _Fill:
    """How a polygon is drawn. Colours are red, green, blue and opacity, 0 to 255."""

    fill_rgba: str
    outline_rgba: str
    outline_mm: float = 0.3


def _symbol(number: int, fill: _Fill) -> str:
    """A simple fill in QGIS's terms. Options are read by 3.18 and newer, props by older ones."""
    values = {
        "color": fill.fill_rgba,
        "joinstyle": "miter",
        "offset": "0,0",
        "offset_unit": "MM",
        "outline_color": fill.outline_rgba,
        "outline_style": "solid",
        "outline_width": str(fill.outline_mm),
        "outline_width_unit": "MM",
        "style": "solid",
    }
    options = "".join(f'<Option name="{name}" type="QString" value="{value}"/>' for name, value in values.items())
    props = "".join(f'<prop k="{name}" v="{value}"/>' for name, value in values.items())
    return (
        f'<symbol type="fill" name="{number}" alpha="1" clip_to_extent="1" force_rhr="0">'
        f'<layer class="SimpleFill" enabled="1" locked="0" pass="0">'
        f'<Option type="Map">{options}</Option>{props}</layer></symbol>'
    )


def _style_qml(fills: Mapping[str, _Fill], attribute: str | None = None) -> str:
    """A QGIS 3 layer style: one symbol for all, or one for each value of an attribute."""
    symbols = "".join(_symbol(number, fill) for number, fill in enumerate(fills.values()))
    categories = "".join(
        f'<category render="true" type="string" symbol="{number}" value="{value}" label="{value}"/>'
        for number, value in enumerate(fills)
    )
    kind = "singleSymbol" if attribute is None else "categorizedSymbol"
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.22.0" styleCategories="Symbology">'
        f'<renderer-v2 type="{kind}" symbollevels="0" enableorderby="0" forceraster="0"'
        + (f' attr="{attribute}"><categories>{categories}</categories>' if attribute else ">")
        + f"<symbols>{symbols}</symbols><rotation/><sizescale/></renderer-v2>"
        "<blendMode>0</blendMode><featureBlendMode>0</featureBlendMode><layerGeometryType>2</layerGeometryType></qgis>"
    )


STYLE_QML = _style_qml({LAYER: _Fill("255,127,14,80", "214,78,0,255")})
CHANGES_QML = _style_qml(
    {
        "added": _Fill("44,160,44,110", "23,110,23,255"),
        "removed": _Fill("214,39,40,110", "140,15,20,255"),
        "modified": _Fill("31,119,180,110", "15,75,125,255"),
    },
    attribute="change",
)


# Cloud-optimised GeoTIFF


def write_cog(
    path: Path,
    read: Callable[[Window], NDArray[Any]],
    window: Window,
    lattice: Lattice,
    *,
    resampling: Literal["mode", "average"],
    block_px: int,
) -> None:
    """Write the raster that covers window as a cloud-optimised GeoTIFF with overviews, and rename it to path.

    read gives uint8 pixels (height, width) of a part of window, 255 for nodata; it is called once per part, of block_px
    x block_px rounded down to whole internal tiles. Areas of nothing but nodata take no space. The pixels are read back
    and compared. Raises RunError if that fails or the disk is full; unfinished files are removed.
    """
    if not window.pixels:
        raise ValueError(f"window of {window.height} x {window.width} px: a raster has at least one pixel")
    flat, cog = partial_path(path.with_stem(f"{path.stem}.flat")), partial_path(path)
    parts = list(_parts(window, block_px))
    # Smooth values deflate better as differences; a mask's runs do not.
    options = {"COMPRESS": "DEFLATE", "PREDICTOR": "YES" if resampling == "average" else "NO", "BIGTIFF": "IF_SAFER"}
    try:
        with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES, GDAL_NUM_THREADS="ALL_CPUS"):
            checksum = _write_flat(flat, read, window, lattice, parts)
            options |= {"BLOCKSIZE": str(TILE_PX), "OVERVIEWS": "IGNORE_EXISTING", "SPARSE_OK": "YES"}
            options["OVERVIEW_RESAMPLING"] = resampling.upper()
            rasterio.shutil.copy(flat, cog, driver="COG", **options)
            _check_cog(cog, window, parts, checksum)
        cog.replace(path)
    except (rasterio.errors.RasterioError, CPLE_BaseError, OSError) as error:
        raise _write_error(path, error) from error
    finally:
        _remove_with_siblings(flat)
        _remove_with_siblings(cog)


GDAL_CACHE_BYTES = 16 * 2**20
"""rasterio takes a number of bytes."""


def _parts(window: Window, block_px: int) -> Iterator[Window]:
    """Parts of window, row by row, counted from its corner: whole internal tiles, so each is compressed only once."""
    step = max(1, block_px // TILE_PX) * TILE_PX
    for row_off in range(window.row_off, window.row_stop, step):
        for col_off in range(window.col_off, window.col_stop, step):
            yield Window(row_off, col_off, step, step).intersect(window)


def _write_flat(
    path: Path, read: Callable[[Window], NDArray[Any]], window: Window, lattice: Lattice, parts: list[Window]
) -> int:
    """Write a tiled GeoTIFF without overviews, part by part; returns the checksum of its pixels."""
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "height": window.height, "width": window.width}
    profile |= {"crs": rasterio.crs.CRS.from_wkt(lattice.crs_wkt), "nodata": INVALID}
    profile |= {"tiled": True, "blockxsize": TILE_PX, "blockysize": TILE_PX, "compress": "deflate", "zlevel": 1}
    profile |= {"sparse_ok": True, "bigtiff": "IF_SAFER", "interleave": "pixel"}
    checksum = 0
    with rasterio.open(path, "w", transform=lattice.transform(window.row_off, window.col_off), **profile) as raster:
        for part in parts:
            pixels_HW = np.asarray(read(part), np.uint8).reshape(part.shape_yx)
            checksum = zlib.crc32(pixels_HW.tobytes(), checksum)
            if (pixels_HW != INVALID).any():
                raster.write(pixels_HW, 1, window=_rasterio_window(part, window))
    return checksum


def _check_cog(path: Path, window: Window, parts: list[Window], checksum: int) -> None:
    found = 0
    with rasterio.open(path) as raster:
        layout = raster.tags(ns="IMAGE_STRUCTURE").get("LAYOUT")
        for part in parts:
            found = zlib.crc32(raster.read(window=_rasterio_window(part, window)).tobytes(), found)
    if layout != "COG" or found != checksum:
        # GDAL only logs what fails when it closes a file: a full disk is first noticed here.
        raise OSError("the pixels read back are not those that were written: the disk is full or faulty")


def _rasterio_window(part: Window, window: Window) -> rasterio.windows.Window:
    return rasterio.windows.Window(
        part.col_off - window.col_off, part.row_off - window.row_off, part.width, part.height
    )
