"""The truth that a run is compared with: mask rasters or footprints, in any CRS, put on the pixels of the run's mask.

Footprints are held as polygons in pixels of that raster (x = column, y = row), whichever side they are of.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyogrio.errors
import pyogrio.raw
import rasterio
import rasterio.errors
import rasterio.features
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError
from rasterio.enums import ColorInterp, Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterWindow

from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Lattice, Window, apply
from segpipe.tasks.outlines import Geometries
from segpipe.tasks.vectorize import building_ids

from .footprints import TRUE, Cells, Footprints
from .inputs import natural
from .regions import regions

BATCH_ROWS = 1024
LATTICE_TOLERANCE_PX = 1e-3
WARP_TOLERANCE_PX = 0.01
OPEN_RASTERS = 8
IDS = ("building_id", "id", "osm_id")
"""Columns that are taken for the truth's own ids, the first that there is; else its feature numbers."""

Masks = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""(building_HW, valid_HW) of a window."""


@dataclass(frozen=True)
class Truth:
    """A truth on the pixels of a run's mask.

    read gives (building_HW, valid_HW) of a window, which the true footprints that it is given as well are of. outside:
    footprints that lie outside the run, and are left out.
    """

    read: Callable[[Window, Footprints], Masks]
    outside: int = 0
    notes: tuple[str, ...] = ()


def open_truth(path: Path, mask: Any, offset: tuple[int, int], cells: Cells, id_column: str | None) -> Truth:
    """Open a truth, and put its footprints into the cells of the run's mask, an open raster.

    path: a mask raster of one band (any value but 0 is building; its nodata, mask or alpha is left out), a folder of
    such (tile by tile), or a vector file with one layer or a layer `buildings`; of any CRS. offset: row and column of
    the mask's first pixel on the lattice. Raises UserError where it cannot be used.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; expected a mask raster, a folder of these, or a file of footprints")
    layers = {} if path.is_dir() else _vector_layers(path)
    if layers:
        return _vector_truth(path, choose_layer(path, layers), mask, cells, id_column)
    if id_column is not None:
        raise UserError(f"--truth-id {id_column}: {path} is no vector file; expected footprints with such a column")
    rasters = _rasters_of(path)
    read, notes = _raster_truth(path, rasters, mask)

    def read_alone(window: Window) -> NDArray[np.bool_]:
        building_HW, valid_HW = read(window)
        return building_HW & valid_HW

    add_mask_footprints(cells, TRUE, read_alone, mask, offset)
    return Truth(lambda window, _: read(window), notes=notes)


# Rasters


def _rasters_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [it for it in path.iterdir() if it.suffix.lower() in (".tif", ".tiff", ".png", ".vrt", ".jp2", ".img")]
    if not found:
        raise UserError(f"{path}: no mask raster in this folder; expected files such as austin1.tif")
    return sorted(found, key=lambda it: natural(str(it)))


def _raster_truth(path: Path, rasters: Sequence[Path], mask: Any) -> tuple[Callable[[Window], Masks], tuple[str, ...]]:
    """Read windows of one or more mask rasters, each copied where it lies on the run's lattice, else warped."""
    extents = [_extent_on(raster, mask) for raster in rasters]
    tree = shapely.STRtree(extents)
    if not tree.query(shapely.box(0, 0, mask.width, mask.height)).size:
        raise UserError(f"{path}: does not overlap the run; {_both_bounds(rasters[0], mask)}")
    opened: OrderedDict[Path, ExitStack] = OrderedDict()
    readers: dict[Path, Callable[[Window], Masks]] = {}
    notes: list[str] = []

    def reader_of(raster: Path) -> Callable[[Window], Masks]:
        if raster not in opened:
            if len(opened) >= OPEN_RASTERS:
                oldest, stack = opened.popitem(last=False)
                stack.close()
                del readers[oldest]
            opened[raster] = ExitStack()
            readers[raster] = _open_raster(raster, mask, opened[raster])
        opened.move_to_end(raster)
        return readers[raster]

    def read(window: Window) -> Masks:
        building_HW, valid_HW = np.zeros(window.shape_yx, np.bool_), np.zeros(window.shape_yx, np.bool_)
        box = shapely.box(window.col_off, window.row_off, window.col_stop, window.row_stop)
        for index in np.sort(tree.query(box)).tolist():
            is_building_HW, is_valid_HW = reader_of(rasters[index])(window)
            building_HW = np.where(is_valid_HW, is_building_HW, building_HW)
            valid_HW |= is_valid_HW
        return building_HW, valid_HW

    for raster in rasters[:1]:
        with rasterio.open(raster) as dataset:
            if dataset.nodata == 0:
                notes.append(
                    f"{raster.name} declares 0 as nodata: only its building pixels were compared, wrong finds are not"
                    " seen"
                )
            if _offset(dataset, mask) is None:
                notes.append(f"{raster.name} is not on the run's pixels: it was warped to them, by nearest neighbour")
    return read, tuple(notes)


def _extent_on(raster: Path, mask: Any) -> shapely.Polygon:
    """Where a raster may have pixels, in pixels of the mask; empty where it lies beyond the run's CRS.

    UserError for one that cannot be a truth.
    """
    try:
        with rasterio.open(raster) as dataset:
            _truth_band(raster, dataset)
            if not dataset.crs:
                raise UserError(f"{raster}: no CRS; expected one, that of the run is {crs_name(mask.crs)}")
            bounds = shapely.box(*dataset.bounds)
            to_pixels = _to_pixels(raster, CRS.from_user_input(dataset.crs), mask)
    except rasterio.errors.RasterioIOError as error:
        raise UserError(
            f"{raster}: neither a readable raster nor a readable vector file ({' '.join(str(error).split())})"
        ) from error
    # A straight side may bend in another CRS.
    outline = shapely.segmentize(bounds, bounds.length / 80)
    extent = shapely.bounds(to_pixels(np.array([outline], np.object_)))[0]
    return shapely.box(*extent) if np.isfinite(extent).all() else shapely.Polygon()


def _truth_band(path: Path, dataset: Any) -> int:
    bands = [band for band, colour in enumerate(dataset.colorinterp, 1) if colour != ColorInterp.alpha]
    if len(bands) != 1:
        found = f"{len(bands)} bands" if bands else "no band"
        raise UserError(f"{path}: {found} besides alpha; expected a mask of one band, or a vector file of footprints")
    return bands[0]


def _open_raster(path: Path, mask: Any, stack: ExitStack) -> Callable[[Window], Masks]:
    """Read (building_HW, valid_HW) of windows of the run from one raster; beyond it nothing is valid."""
    dataset = stack.enter_context(rasterio.open(path))
    band, offset = _truth_band(path, dataset), _offset(dataset, mask)
    if offset is None:
        how = {"crs": mask.crs, "transform": mask.transform, "width": mask.width, "height": mask.height}
        has_alpha = ColorInterp.alpha in dataset.colorinterp
        dataset = stack.enter_context(
            WarpedVRT(
                dataset, resampling=Resampling.nearest, add_alpha=not has_alpha, tolerance=WARP_TOLERANCE_PX, **how
            )
        )
        offset = (0, 0)
    row_off, col_off = offset
    extent = Window(row_off, col_off, dataset.height, dataset.width)

    def read(window: Window) -> Masks:
        building_HW, valid_HW = np.zeros(window.shape_yx, np.bool_), np.zeros(window.shape_yx, np.bool_)
        part = window.intersect(extent)
        if part.pixels:
            inner = RasterWindow(part.col_off - col_off, part.row_off - row_off, part.width, part.height)
            building_HW[part.within(window)] = dataset.read(band, window=inner) != 0
            valid_HW[part.within(window)] = dataset.read_masks(band, window=inner) != 0
        return building_HW, valid_HW

    return read


def _offset(raster: Any, mask: Any) -> tuple[int, int] | None:
    """Row and column of the mask's pixel on which a raster's first pixel lies; None if it is on another lattice."""
    if CRS.from_user_input(raster.crs) != CRS.from_user_input(mask.crs):
        return None
    here, there = mask.transform, raster.transform
    # The far corner of the larger raster must not drift off the lattice either.
    side = max(raster.width, raster.height, mask.width, mask.height)
    steps = np.array([there.a - here.a, there.b - here.b, there.d - here.d, there.e - here.e])
    col, row = (there.c - here.c) / here.a, (there.f - here.f) / here.e
    drifts = np.abs(steps).max() * side > LATTICE_TOLERANCE_PX * abs(here.a)
    if drifts or max(abs(col - round(col)), abs(row - round(row))) > LATTICE_TOLERANCE_PX:
        return None
    return round(row), round(col)


def _both_bounds(raster: Path, mask: Any) -> str:
    with rasterio.open(raster) as dataset:
        told = " and ".join(
            f"({b.left:.1f} {b.bottom:.1f} {b.right:.1f} {b.top:.1f})" for b in (dataset.bounds, mask.bounds)
        )
        return f"bounds of truth ({crs_name(dataset.crs)}) and run ({crs_name(mask.crs)}): {told}"


def add_mask_footprints(
    cells: Cells, kind: int, read: Callable[[Window], NDArray[np.bool_]], mask: Any, offset: tuple[int, int]
) -> None:
    """Put the 4-connected regions of a mask into cells as footprints, whole also where they cross cells.

    read gives the mask_HW of a window; offset: row and column of the first pixel on the lattice, for the ids.
    """
    place = mask.transform
    lattice = Lattice(mask.crs.to_wkt(), place.a, place.c, place.f)
    windows = (cells.window(cell) for cell in cells.cells())
    with tempfile.TemporaryDirectory(prefix="regions-", dir=cells.folder) as folder:
        for found in regions(windows, read, lattice, Path(folder)):
            ids = building_ids(found.key_row + offset[0], found.key_col + offset[1])
            cells.add(kind, found.geometry, ids, np.ones(len(found)))


# Footprints


def _vector_layers(path: Path) -> dict[str, str | None]:
    """Geometry type of each layer by name; empty if the file is no vector file."""
    try:
        layers = pyogrio.list_layers(path)
    except pyogrio.errors.DataSourceError:
        return {}
    return {str(name): kind for name, kind in layers}


def choose_layer(path: Path, layers: dict[str, str | None]) -> str:
    """The layer `buildings`, or the only one with geometries. UserError where there is neither."""
    spatial = [name for name, kind in layers.items() if kind is not None]
    if "buildings" in spatial:
        return "buildings"
    if len(spatial) == 1:
        return spatial[0]
    raise UserError(f"{path}: layers {', '.join(layers)}; expected one layer with geometries, or one named `buildings`")


def _vector_truth(path: Path, layer: str, mask: Any, cells: Cells, id_column: str | None) -> Truth:
    try:
        outside, repaired = add_file_footprints(cells, TRUE, path, layer, mask, id_column)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise UserError(f"{path}: layer {layer} cannot be read ({error})") from error
    if outside and not cells.count[TRUE]:
        where = f"({' '.join(f'{value:.1f}' for value in mask.bounds)})"
        raise UserError(f"{path}: none of the {outside} footprints of layer {layer} is in the run's bounds {where}")

    def read(window: Window, true: Footprints) -> Masks:
        truth_HW = np.zeros(window.shape_yx, np.uint8)
        if len(true):
            place = Affine.translation(window.col_off, window.row_off)
            rasterio.features.rasterize(true.geometry, out=truth_HW, transform=place, default_value=1)
        return truth_HW == 1, np.ones(window.shape_yx, np.bool_)

    notes = (f"{repaired} footprints of {path.name} were not valid, and were repaired",) if repaired else ()
    return Truth(read, outside, notes)


def add_file_footprints(
    cells: Cells, kind: int, path: Path, layer: str, mask: Any, id_column: str | None = None
) -> tuple[int, int]:
    """Put the footprints of a vector file into cells; returns how many lie outside the run, and how many were repaired.

    Those without a geometry are left out; the confidence of those that have none is 1. Raises UserError.
    """
    info = pyogrio.read_info(path, layer=layer)
    if info["crs"] is None:
        raise UserError(f"{path}: layer {layer} has no CRS; expected one, that of the run is {crs_name(mask.crs)}")
    to_pixels = _to_pixels(path, CRS.from_user_input(info["crs"]), mask)
    names = [str(name) for name in info["fields"]]
    if id_column is not None and id_column not in names:
        raise UserError(f"--truth-id {id_column}: {path} has no such column; expected one of {', '.join(names)}")
    own = id_column or next((name for it in IDS for name in names if name.lower() == it), None)
    columns = [name for name in (own, "confidence") if name in names]
    outside = repaired = lost = seen = 0
    for ids, confidence, wkb in _batches(path, layer, columns, own):
        geometry = shapely.force_2d(shapely.from_wkb(wkb))
        good = ~(shapely.is_missing(geometry) | shapely.is_empty(geometry))
        if not (shapely.get_dimensions(geometry[good]) == 2).all():
            raise UserError(f"{path}: layer {layer} has points or lines; expected polygons")
        geometry[good] = to_pixels(geometry[good])
        reached = np.isfinite(shapely.bounds(geometry)).all(axis=1)
        seen, lost = seen + int(good.sum()), lost + int((good & ~reached).sum())
        wrong = good & reached & ~shapely.is_valid(geometry)
        geometry[wrong] = shapely.make_valid(geometry[wrong], method="structure", keep_collapsed=False)
        repaired += int(wrong.sum())
        good &= reached
        good[good] = shapely.area(geometry[good]) > 0
        told = np.where(np.isnan(confidence), 1.0, confidence)
        outside += cells.add(kind, geometry[good], ids[good].tolist(), told[good])
    if lost:
        raise UserError(
            f"{path}: {lost} of {seen} footprints cannot be reprojected from {crs_name(info['crs'])} to"
            f" {crs_name(mask.crs)}: their coordinates are beyond it; expected those of the CRS that the file names"
        )
    return outside, repaired


def _batches(
    path: Path, layer: str, columns: list[str], own: str | None
) -> Iterator[tuple[NDArray[np.object_], NDArray[np.float64], NDArray[np.object_]]]:
    """Ids, confidence (NaN where none is told) and WKB of the rows of a layer, some at a time."""
    how: dict[str, Any] = {"layer": layer, "columns": columns, "batch_size": BATCH_ROWS, "use_pyarrow": True}
    with pyogrio.raw.open_arrow(path, return_fids=True, **how) as (meta, reader):
        fid_name = meta["fid_column"] or "OGC_FID"
        for batch in reader:
            texts = batch.column(own or fid_name).to_pylist()
            fids = batch.column(fid_name).to_pylist()
            ids = [str(fid if text is None else text) for text, fid in zip(texts, fids, strict=True)]
            confidence = np.full(len(ids), np.nan)
            if "confidence" in columns:
                confidence = np.array(batch.column("confidence").to_pylist(), np.float64)
            wkb = batch.column(meta["geometry_name"] or "wkb_geometry").to_numpy(zero_copy_only=False)
            yield np.array(ids, np.object_), confidence, wkb


def _to_pixels(path: Path, src: CRS, mask: Any) -> Callable[[Geometries], Geometries]:
    """From a CRS to pixels of the mask. What cannot be reprojected gets coordinates that are not finite."""
    dst, back = CRS.from_user_input(mask.crs), ~mask.transform
    try:
        transformer = None if src == dst else Transformer.from_crs(src, dst, always_xy=True)
    except CRSError as error:
        raise UserError(f"{path}: cannot be reprojected from {src.name} to {dst.name} ({error})") from error

    def forward(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        moved = np.array(xy.T if transformer is None else transformer.transform(xy[:, 0], xy[:, 1]))
        lost = ~np.isfinite(moved).all(axis=0)
        moved[:, lost] = 0
        pixels = np.column_stack(apply(back, *moved))
        pixels[lost] = np.inf  # not NaN: a ring of these would not be closed
        return pixels

    def to_pixels(geometry: Geometries) -> Geometries:
        moved: Geometries = np.asarray(shapely.transform(geometry, forward), np.object_)
        return moved

    return to_pixels


def crs_name(crs: Any) -> str:
    """A CRS in a few letters: EPSG:32645."""
    parsed = CRS.from_user_input(crs)
    code = parsed.to_epsg()
    return f"EPSG:{code}" if code else parsed.name
