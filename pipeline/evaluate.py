"""Evaluate: the mask of a finished run against a mask raster or footprints, window by window."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyogrio.errors
import rasterio
import rasterio.errors
import rasterio.features
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError
from rasterio.enums import ColorInterp
from rasterio.windows import Window as RasterWindow

from segpipe.tasks.errors import RunError, UserError
from segpipe.tasks.evaluate import Counts, count
from segpipe.tasks.grid import Window
from segpipe.tasks.predict import INVALID

WINDOW_PX = 4096
LATTICE_TOLERANCE_PX = 1e-3

TruthReader = Callable[[Window], tuple[NDArray[np.bool_], NDArray[np.bool_]]]
"""Truth of a window of the mask raster: (building_HW, valid_HW)."""


@dataclass(frozen=True)
class Evaluation:
    """The pooled pixel counts of a run against a truth. ignored: pixels of the overlap that are invalid in either."""

    run: Path
    truth: Path
    counts: Counts
    ignored: int
    outside: int
    """Pixels of the run's raster that the truth does not cover."""
    notes: tuple[str, ...] = ()


def evaluate_run(run_folder: Path, truth: Path) -> Evaluation:
    """Compare RUN/mask.tif with the truth where both are valid.

    truth is a raster on the run's pixel lattice (one band; any value but 0 is building; its nodata, mask or alpha is
    left out), or a vector file with one layer or a layer `buildings` (reprojected; a pixel is building if its centre is
    in a polygon; the whole run is compared). Raises UserError where either cannot be used.
    """
    mask_path = run_folder / "mask.tif"
    if not mask_path.is_file():
        raise UserError(f"{run_folder}: no mask.tif in it; expected the output folder of a finished `segpipe run`")
    if not truth.exists():
        raise UserError(f"{truth}: no such file; expected a mask raster or a vector file of footprints")
    with ExitStack() as stack:
        try:
            mask = stack.enter_context(rasterio.open(mask_path))
        except rasterio.errors.RasterioIOError as error:
            raise UserError(f"{mask_path}: not a readable raster ({error})") from error
        layers = _vector_layers(truth)
        if layers:
            covered, read, notes = _vector_truth(truth, _choose_layer(truth, layers), mask)
        else:
            covered, read, notes = _raster_truth(truth, mask, stack)
        try:
            counts = _count_windows(mask, covered, read)
        except rasterio.errors.RasterioIOError as error:
            raise RunError(f"{mask_path} or {truth}: cannot be read to the end ({error})") from error
    outside = mask.height * mask.width - covered.pixels
    return Evaluation(run_folder, truth, counts, covered.pixels - counts.pixels, outside, notes + counts.notes)


def evaluation_table(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Rows (name, value) of what there is to say about an evaluation."""
    counts = evaluation.counts
    scores = [("IoU", counts.iou), ("Dice", counts.dice), ("accuracy", counts.accuracy)]
    scores += [("precision", counts.precision), ("recall", counts.recall)]
    rows = [(name, f"{value:.4f}") for name, value in scores]
    rows += [("pixels", f"{counts.pixels:,} compared, {evaluation.ignored:,} invalid")]
    if evaluation.outside:
        rows.append(("not covered", f"{evaluation.outside:,} pixels of the run lie outside the truth"))
    return rows + [("note", note) for note in evaluation.notes]


def _count_windows(mask: Any, covered: Window, read: TruthReader) -> Counts:
    counts = Counts()
    for cell in covered.cells(WINDOW_PX):
        window = Window.cell(*cell, WINDOW_PX).intersect(covered)
        mask_HW = mask.read(1, window=_to_rasterio(window))
        truth_HW, valid_HW = read(window)
        counts += count(mask_HW == 1, truth_HW, valid_HW & (mask_HW != INVALID))
    return counts


def _raster_truth(truth: Path, mask: Any, stack: ExitStack) -> tuple[Window, TruthReader, tuple[str, ...]]:
    try:
        raster = stack.enter_context(rasterio.open(truth))
    except rasterio.errors.RasterioIOError as error:
        raise UserError(f"{truth}: neither a readable raster nor a readable vector file ({error})") from error
    bands = [band for band, colour in enumerate(raster.colorinterp, 1) if colour != ColorInterp.alpha]
    if len(bands) != 1:
        found = f"{len(bands)} bands" if bands else "no band"
        raise UserError(f"{truth}: {found} besides alpha; expected a mask of one band, or a vector file of footprints")
    if not raster.crs:
        raise UserError(f"{truth}: no CRS; expected that of the run, {_crs_name(mask.crs)}")
    if CRS.from_user_input(raster.crs) != CRS.from_user_input(mask.crs):
        raise UserError(f"{truth}: CRS {_crs_name(raster.crs)}; expected that of the run, {_crs_name(mask.crs)}")
    row_off, col_off = _offset(truth, raster, mask)
    extent = Window(row_off, col_off, raster.height, raster.width)
    covered = extent.intersect(_extent(mask))
    if not covered.pixels:
        bounds = " and ".join(
            f"({b.left:.1f} {b.bottom:.1f} {b.right:.1f} {b.top:.1f})" for b in (raster.bounds, mask.bounds)
        )
        raise UserError(f"{truth}: does not overlap the run; bounds of truth and run: {bounds}")

    def read(window: Window) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        inner = RasterWindow(window.col_off - col_off, window.row_off - row_off, window.width, window.height)
        return raster.read(bands[0], window=inner) != 0, raster.read_masks(bands[0], window=inner) != 0

    notes: tuple[str, ...] = ()
    if raster.nodata == 0:
        notes = (
            f"{truth.name} declares 0 as nodata: only its building pixels were compared, wrong finds are not seen",
        )
    return covered, read, notes


def _offset(truth: Path, raster: Any, mask: Any) -> tuple[int, int]:
    """Row and column of the mask's pixel on which the truth's first pixel lies; UserError if off the lattice."""
    here, there = mask.transform, raster.transform
    # The far corner of the larger raster must not drift off the lattice either.
    side = max(raster.width, raster.height, mask.width, mask.height)
    steps = np.array([there.a - here.a, there.b - here.b, there.d - here.d, there.e - here.e])
    if np.abs(steps).max() * side > LATTICE_TOLERANCE_PX * abs(here.a):
        raise UserError(
            f"{truth}: pixels of {there.a:.9g} x {there.e:.9g}; expected those of the run, {here.a:.9g} x {here.e:.9g}"
        )
    col, row = (there.c - here.c) / here.a, (there.f - here.f) / here.e
    if max(abs(col - round(col)), abs(row - round(row))) > LATTICE_TOLERANCE_PX:
        raise UserError(
            f"{truth}: its corner ({there.c:.9g}, {there.f:.9g}) is {col % 1:.3f} px right of and {row % 1:.3f} px "
            f"below a pixel corner of the run, whose first is ({here.c:.9g}, {here.f:.9g}); expected one lattice"
        )
    return round(row), round(col)


def _vector_layers(path: Path) -> dict[str, str | None]:
    """Geometry type of each layer by name; empty if the file is no vector file."""
    try:
        layers = pyogrio.list_layers(path)
    except pyogrio.errors.DataSourceError:
        return {}
    return {str(name): kind for name, kind in layers}


def _choose_layer(path: Path, layers: dict[str, str | None]) -> str:
    spatial = [name for name, kind in layers.items() if kind is not None]
    if "buildings" in spatial:
        return "buildings"
    if len(spatial) == 1:
        return spatial[0]
    raise UserError(f"{path}: layers {', '.join(layers)}; expected one layer with geometries, or one named `buildings`")


def _vector_truth(path: Path, layer: str, mask: Any) -> tuple[Window, TruthReader, tuple[str, ...]]:
    """All footprints near the run are held, in coordinates of its CRS; their pixels only window by window."""
    try:
        frame = pyogrio.read_dataframe(path, layer=layer, columns=[])
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise UserError(f"{path}: layer {layer} cannot be read ({error})") from error
    geometries = np.asarray(frame.geometry.array, dtype=object)
    geometries = geometries[~(shapely.is_missing(geometries) | shapely.is_empty(geometries))]
    if geometries.size and not (shapely.get_dimensions(geometries) == 2).all():
        raise UserError(f"{path}: layer {layer} has points or lines; expected polygons")
    if frame.crs is None:
        raise UserError(f"{path}: layer {layer} has no CRS; expected one, that of the run is {_crs_name(mask.crs)}")
    geometries = _reproject(path, geometries, CRS.from_user_input(frame.crs), CRS.from_user_input(mask.crs))
    tree = shapely.STRtree(geometries)
    if geometries.size and not tree.query(shapely.box(*mask.bounds)).size:
        where = f"({' '.join(f'{value:.1f}' for value in mask.bounds)})"
        raise UserError(
            f"{path}: none of the {geometries.size} footprints of layer {layer} is in the run's bounds {where}"
        )

    def read(window: Window) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        transform = mask.window_transform(_to_rasterio(window))
        bounds = rasterio.transform.array_bounds(*window.shape_yx, transform)
        shapes = geometries[np.sort(tree.query(shapely.box(*bounds)))]
        truth_HW = np.zeros(window.shape_yx, np.uint8)
        if shapes.size:
            rasterio.features.rasterize(shapes, out=truth_HW, transform=transform, all_touched=False, default_value=1)
        return truth_HW == 1, np.ones(window.shape_yx, bool)

    return _extent(mask), read, ()


def _reproject(path: Path, geometries: NDArray[np.object_], src: CRS, dst: CRS) -> NDArray[np.object_]:
    if src == dst:
        return geometries
    try:
        transformer = Transformer.from_crs(src, dst, always_xy=True)
    except CRSError as error:
        raise UserError(f"{path}: cannot be reprojected from {src.name} to {dst.name} ({error})") from error

    def to_dst(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack(transformer.transform(xy[:, 0], xy[:, 1]))

    projected: NDArray[np.object_] = np.asarray(shapely.transform(geometries, to_dst))
    xy, owner = shapely.get_coordinates(projected, return_index=True)
    lost = np.unique(owner[~np.isfinite(xy).all(axis=1)]).size
    if lost:
        raise UserError(
            f"{path}: {lost} of {geometries.size} footprints cannot be reprojected from {_crs_name(src)} to"
            f" {_crs_name(dst)}: their coordinates are beyond it; expected those of the CRS that the file names"
        )
    return projected


def _extent(mask: Any) -> Window:
    return Window(0, 0, mask.height, mask.width)


def _to_rasterio(window: Window) -> RasterWindow:
    return RasterWindow(window.col_off, window.row_off, window.width, window.height)


def _crs_name(crs: Any) -> str:
    parsed = CRS.from_user_input(crs)
    code = parsed.to_epsg()
    return f"EPSG:{code}" if code else parsed.name
