"""The part of a city that is asked for, `grid.area`: read, put onto the lattice, and asked what lies in it.

Imagery outside is context: it is read as far as a block in the area sees it, and nothing of it is published.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import rasterio.features
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError

from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Lattice, Window

Geometries = NDArray[np.object_]

CELL_PX = 512
"""Which pixels are inside is decided in fixed cells of the lattice, whatever window is asked for."""
SLIVER_PX = 1e-3
"""A pixel into which the area reaches less than this is outside: coordinates are not exact."""
EDGE_PARTS = 256
"""Edges are cut so fine, against the whole, before they are transformed: straight lines are not so in another CRS."""
_ASKING = threading.Lock()
"""Held while a prepared geometry is asked: GEOS completes it meanwhile, and two threads at that crash."""


@dataclass(frozen=True)
class District:
    """A part of the lattice. geometry: (Multi)Polygon, x = column, y = row; source: where it is from, for a person."""

    source: str
    geometry: shapely.Geometry

    def __reduce__(self) -> tuple[type[District], tuple[str, shapely.Geometry]]:
        """Sent without what is cached: a prepared geometry does not arrive as one, so each process prepares its own."""
        return type(self), (self.source, self.geometry)

    @cached_property
    def window(self) -> Window:
        """Its bounds, snapped outward to whole pixels."""
        xmin, ymin, xmax, ymax = shapely.bounds(self._inner).tolist()
        return Window.between(math.floor(ymin), math.floor(xmin), math.ceil(ymax), math.ceil(xmax))

    def ground_km2(self, lattice: Lattice) -> float:
        """Its area on the ground."""
        centre = shapely.centroid(self.geometry)
        side = lattice.ground_pixel_m(np.array([shapely.get_y(centre)]), np.array([shapely.get_x(centre)]))
        return float(shapely.area(self.geometry) * side[0] ** 2 / 1e6)

    def is_near(self, window: Window, px: float) -> bool:
        """Whether a window lies at most px pixels away."""
        with _ASKING:
            return bool(shapely.dwithin(self._prepared, _box(window), px))

    def meets(self, geometries: Geometries) -> NDArray[np.bool_]:
        """True for geometries in lattice pixels that have a point in common with it."""
        with _ASKING:
            found: NDArray[np.bool_] = shapely.intersects(self._prepared, geometries)
        return found

    def reaches_into(self, boxes: Geometries) -> NDArray[np.bool_]:
        """True for boxes with a part in common with it, that is more than a line."""
        with _ASKING:
            found: NDArray[np.bool_] = shapely.intersects(self._inner, boxes)
        return found

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """True for the pixels of a window that it reaches into."""
        inside_HW = np.zeros(window.shape_yx, np.bool_)
        for cell in window.cells(CELL_PX):
            whole = Window.cell(*cell, CELL_PX)
            common = whole.intersect(window)
            inside_HW[common.within(window)] = self._inside_cell(whole)[common.within(whole)]
        return inside_HW

    def _inside_cell(self, cell: Window) -> NDArray[np.bool_]:
        box = _box(cell)
        with _ASKING:
            is_whole, is_met = shapely.contains(self._inner, box), shapely.intersects(self._inner, box)
        if is_whole or not is_met:
            return np.full(cell.shape_yx, is_whole)
        burnt = rasterio.features.rasterize(
            [(self._inner, 1)],
            cell.shape_yx,
            transform=Affine.translation(cell.col_off, cell.row_off),
            all_touched=True,
            dtype="uint8",
        )
        return np.asarray(burnt, np.bool_)

    @cached_property
    def _prepared(self) -> shapely.Geometry:
        shapely.prepare(self.geometry)
        return self.geometry

    @cached_property
    def _inner(self) -> shapely.Geometry:
        inner = shapely.buffer(self.geometry, -SLIVER_PX, join_style="mitre")
        inner = self.geometry if shapely.is_empty(inner) else inner
        shapely.prepare(inner)
        return inner


def resolve_area(
    area: Path | tuple[float, float, float, float] | None, lattice: Lattice, covers: Sequence[Window]
) -> District | None:
    """The area of a city on its lattice: from a vector file, or from (xmin, ymin, xmax, ymax) in the lattice's CRS.

    covers: windows of the tiles. UserError for a file that cannot be read, has no polygon or no CRS, for bounds that
    are none, and for an area that meets no tile.
    """
    if area is None:
        return None
    if isinstance(area, Path):
        source, geometry = _read_polygons(area, lattice)
    else:
        source, geometry = _bounds(area)
    to_col_row = ~lattice.transform()

    def to_lattice(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = xy.T
        return np.stack([to_col_row.a * x + to_col_row.c, to_col_row.e * y + to_col_row.f], axis=1)

    district = District(source, shapely.transform(geometry, to_lattice))
    row_off, col_off = ([getattr(cover, name) for cover in covers] for name in ("row_off", "col_off"))
    row_stop, col_stop = ([getattr(cover, name) for cover in covers] for name in ("row_stop", "col_stop"))
    boxes = shapely.box(col_off, row_off, col_stop, row_stop)
    if not district.reaches_into(boxes).any():
        raise UserError(
            f"grid.area: {source} covers {_told(shapely.bounds(geometry))}, and no tile lies there; expected a part of"
            f" {_told(_crs_bounds(lattice, boxes))} (xmin, ymin, xmax, ymax in the CRS of the lattice)"
        )
    return district


def _box(window: Window) -> shapely.Polygon:
    return shapely.box(window.col_off, window.row_off, window.col_stop, window.row_stop)


def _told(bounds: NDArray[np.float64] | tuple[float, ...]) -> str:
    return ", ".join(f"{value:.8g}" for value in bounds)


def _crs_bounds(lattice: Lattice, boxes: Geometries) -> tuple[float, ...]:
    xmin, ymin, xmax, ymax = (int(value) for value in shapely.total_bounds(boxes))
    return lattice.bounds(Window.between(ymin, xmin, ymax, xmax))


def _bounds(area: tuple[float, float, float, float]) -> tuple[str, shapely.Geometry]:
    xmin, ymin, xmax, ymax = area
    for low, high, names in ((xmin, xmax, "xmin, xmax"), (ymin, ymax, "ymin, ymax")):
        if low >= high:
            raise UserError(
                f"grid.area: {names} are {low:.12g}, {high:.12g}; expected the first to be less, in"
                " [xmin, ymin, xmax, ymax]"
            )
    return f"bounds {', '.join(f'{value:.12g}' for value in area)}", shapely.box(*area)


def _read_polygons(path: Path, lattice: Lattice) -> tuple[str, shapely.Geometry]:
    """Name and union of the polygons of a file, of its first layer that has any, in the lattice's CRS."""
    # Here, for a run without an area can do without: machines that only predict may lack it.
    import pyogrio.errors
    import pyogrio.raw

    name = f"{path}"
    if not path.exists() and not name.startswith("/vsi"):
        raise UserError(f"grid.area: {name} is not there; expected a vector file, or [xmin, ymin, xmax, ymax]")
    try:
        for layer in pyogrio.list_layers(path)[:, 0]:
            meta, _, wkb, _ = pyogrio.raw.read(path, layer=layer, columns=[], force_2d=True)
            polygons = _polygons(wkb)
            if len(polygons):
                break
        else:
            raise UserError(f"grid.area: {name} has no polygon; expected one or more")
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.GEOSException) as error:
        raise UserError(f"grid.area: {name} cannot be read: {error}; expected a vector file") from None
    if not meta["crs"]:
        raise UserError(
            f"grid.area: {name}: no CRS; expected one in the file; cure: ogr2ogr -a_srs EPSG:… with-crs.gpkg"
            f" {path.name}, if you know which one it is"
        )
    geometry = _to_crs(shapely.union_all(polygons), str(meta["crs"]), lattice, name)
    return f"{path.name}, layer {layer}", geometry


def _polygons(wkb: Geometries | None) -> Geometries:
    """Valid polygons in two dimensions: whatever else a layer holds is passed over."""
    if wkb is None:
        return np.zeros(0, np.object_)
    parts = shapely.get_parts(shapely.make_valid(shapely.from_wkb(wkb)))
    parts = shapely.get_parts(parts)
    is_polygon = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
    found: Geometries = parts[is_polygon & ~shapely.is_empty(parts)]
    return found


def _to_crs(geometry: shapely.Geometry, crs: str, lattice: Lattice, name: str) -> shapely.Geometry:
    try:
        src, dst = CRS.from_user_input(crs), CRS.from_wkt(lattice.crs_wkt)
        if src == dst:
            return geometry
        transformer = Transformer.from_crs(src, dst, always_xy=True)
        xmin, ymin, xmax, ymax = shapely.bounds(geometry).tolist()
        fine = shapely.segmentize(geometry, max(xmax - xmin, ymax - ymin) / EDGE_PARTS)
        moved = shapely.transform(
            fine, lambda xy: np.stack(transformer.transform(xy[:, 0], xy[:, 1], errcheck=True), axis=1)
        )
    except (CRSError, ProjError) as error:
        raise UserError(f"grid.area: {name} cannot be put into the CRS of the lattice: {error}") from None
    if not np.isfinite(shapely.get_coordinates(moved)).all():
        raise UserError(f"grid.area: {name} reaches to where the CRS of the lattice is not defined")
    return shapely.union_all(_polygons(shapely.to_wkb(np.array([moved]))))
