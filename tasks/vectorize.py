"""Probabilities of one block to buildings: whole ones at once, those that touch a side of the block kept for joining.

A pixel is a building's where its probability reaches the threshold; buildings are 4-connected. Everything decided here
about a building (holes, least area, simplification, id, attributes) is a function of the whole building in absolute
lattice pixels, never of the block. Geometry: x = column, y = row downwards; only `publishable` goes to the CRS.

prob_HW: uint8, 0..250 = 0..1, 255 = no valid pixel there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from .edges import CELL_PX, Edges, edges_of_mask, edges_of_outlines
from .grid import Lattice, Window
from .outlines import Geometries, Int64s, Runs, find_runs, first_of, ranges, segments_of, trace
from .regularize import orthogonal

FULL_U8 = 250
"""The stored value of probability 1; larger values are invalid pixels."""

UNKNOWN = 254
"""Stands for a pixel that has imagery but was not predicted: no building's, and not without data either."""

FORMS = ("raw", "simplified", "orthogonal")
"""What an outline may be: the mask's own, with fewer corners, or with right angles."""

_TOPOLOGY_CORNERS = 20_000
"""Most corners of an outline to simplify with its topology: 0.2 s here, and GEOS's time grows with their square."""


@dataclass(frozen=True, slots=True)
class VectorSettings:
    """What makes buildings of probabilities.

    threshold_u8: the least probability of a building's pixel in steps of 1/250, ceil(250 x threshold).
    min_area_m2, fill_holes_m2: smaller buildings are dropped, smaller holes filled. simplify_m: tolerance, 0 for none.
    regularize: orthogonal for outlines with right angles, where one overlaps the raw outline with an IoU of
    regularize_min_iou or more.
    """

    threshold_u8: int
    min_area_m2: float
    fill_holes_m2: float
    simplify_m: float
    regularize: Literal["none", "orthogonal"] = "none"
    regularize_min_iou: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.threshold_u8 <= FULL_U8:
            raise ValueError(f"threshold_u8 {self.threshold_u8}: expected 1 to {FULL_U8}")
        for name in ("min_area_m2", "fill_holes_m2", "simplify_m"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value}: expected a number of 0 or more")
        if not 0 < self.regularize_min_iou <= 1:
            raise ValueError(f"regularize_min_iou {self.regularize_min_iou}: expected a number above 0 and up to 1")


@dataclass(frozen=True)
class Components:
    """Connected buildings or pieces of them, one per element of equally long arrays, before anything is decided.

    key_row, key_col: the first pixel (smallest row, then column). pixels: their number. prob_sum: sum of their uint8
    probabilities. geometry: canonical polygons (see outlines) in absolute lattice pixels.
    """

    key_row: Int64s
    key_col: Int64s
    pixels: Int64s
    prob_sum: Int64s
    geometry: Geometries

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, chosen: NDArray[np.bool_] | Int64s) -> Self:
        """Those that a mask or an array of indices chooses."""
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """All of the parts, in their order."""
        if not parts:
            return cls.empty()
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @classmethod
    def empty(cls) -> Self:
        """No element."""
        dtypes = {"geometry": "O", "raw": "O", "pixel_m": "f8", "form": "i1", "cut": "?", "touches_nodata": "?"}
        return cls(*(np.zeros(0, dtypes.get(field.name, "i8")) for field in fields(cls)))

    @classmethod
    def from_arrow(cls, batch: pa.RecordBatch) -> Self:
        """The inverse of to_arrow."""
        columns: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            column = batch.column(name)
            columns[name] = _from_wkb(column) if name in _GEOMETRIES else _values(column)
        return cls(**columns)

    def to_arrow(self) -> pa.RecordBatch:
        """A column per field, geometries as little-endian WKB."""
        names = [field.name for field in fields(self)]
        columns: dict[int, pa.Array] = {}
        for name in names:
            value = getattr(self, name)
            # Outlines that are published as they are in the mask are one array under two names.
            if id(value) not in columns:
                columns[id(value)] = _to_wkb(value) if name in _GEOMETRIES else pa.array(value)
        return pa.RecordBatch.from_arrays([columns[id(getattr(self, name))] for name in names], names)


_GEOMETRIES = ("geometry", "raw")
WKB_AT_ONCE = 256
"""Polygons that are read from their bytes at a time."""


@dataclass(frozen=True)
class Buildings(Components):
    """Finished buildings: geometry is what is to be published of each, as long as no neighbour is in its way.

    pixels and prob_sum are the mask's. raw: the mask's outline with small holes filled, canonical; no two overlap.
    form: which of FORMS geometry is. area_px: pixels with those of the filled holes, the area of raw. pixel_m: side of
    a pixel on the ground at the building's centre, in metres. edge_px, edge_sum: number and sum of probabilities of
    the pixels with a 4-neighbour outside the building. touches_nodata: one of those neighbours has no valid imagery.
    cut: True where the building goes on into imagery that was not predicted.
    """

    area_px: Int64s
    pixel_m: NDArray[np.float64]
    cut: NDArray[np.bool_]
    raw: Geometries
    form: NDArray[np.int8]
    edge_px: Int64s
    edge_sum: Int64s
    touches_nodata: NDArray[np.bool_]


@dataclass(frozen=True)
class Sides:
    """What the neighbours of a block must know of it.

    top, right, bottom, left: int32 labels of the buildings' pixels along the block's sides, 0 = no building; label n is
    element n - 1 of the block's border components. key_row, key_col: first pixel of each border component.
    """

    window: Window
    top: NDArray[np.int32]
    right: NDArray[np.int32]
    bottom: NDArray[np.int32]
    left: NDArray[np.int32]
    key_row: Int64s
    key_col: Int64s


@dataclass(frozen=True)
class Fragment:
    """The vectors of one block: finished buildings, pieces that touch its sides, and numbers that add up over blocks.

    Every side of a block counts as one to join over, the grid's outer rim too: there no neighbour will be found.
    """

    sides: Sides
    finished: Buildings
    border: Components
    valid_pixels: int
    invalid_pixels: int
    mask_pixels: int


def vectorize_block(prob_HW: NDArray[np.uint8], window: Window, lattice: Lattice, settings: VectorSettings) -> Fragment:
    """Buildings of one block, window being its place on the lattice."""
    if prob_HW.shape != window.shape_yx:
        raise ValueError(f"probabilities of shape {prob_HW.shape}: expected {window.shape_yx}, the window's")

    def read_prob(part: Window) -> NDArray[np.uint8]:
        return prob_HW[part.within(window)]

    mask_HW = mask_of(prob_HW, settings.threshold_u8)
    runs, components = polygonize(mask_HW, prob_HW, window.row_off, window.col_off)
    touches = _touches_side(runs, window)
    border = components.take(touches)
    number = np.where(touches, np.cumsum(touches), 0).astype(np.int32)
    top, right, bottom, left = _labels_of_sides(runs, number, window)
    valid_pixels = int(np.count_nonzero(prob_HW <= FULL_U8))
    edges = edges_of_mask(mask_HW, prob_HW, runs).take(~touches)
    return Fragment(
        sides=Sides(window, top, right, bottom, left, border.key_row, border.key_col),
        finished=finish(components.take(~touches), settings, lattice, read_prob, edges=edges),
        border=border,
        valid_pixels=valid_pixels,
        invalid_pixels=window.pixels - valid_pixels,
        mask_pixels=int(components.pixels.sum()),
    )


def mask_of(prob_HW: NDArray[np.uint8], threshold_u8: int) -> NDArray[np.bool_]:
    """True where a valid pixel reaches the threshold."""
    mask_HW: NDArray[np.bool_] = (prob_HW >= threshold_u8) & (prob_HW <= FULL_U8)
    return mask_HW


def polygonize(
    mask_HW: NDArray[np.bool_], prob_HW: NDArray[np.uint8], row_off: int, col_off: int
) -> tuple[Runs, Components]:
    """Runs, and 4-connected components in the order of first pixels, of a mask with this upper left pixel."""
    runs, segments = find_runs(mask_HW)
    if not runs.regions:
        return runs, Components.empty()
    length = runs.col_stop - runs.col
    run_sum = np.add.reduceat(prob_HW[mask_HW], np.cumsum(length) - length, dtype=np.int64)
    pixels, prob_sum = np.zeros(runs.regions, np.int64), np.zeros(runs.regions, np.int64)
    np.add.at(pixels, runs.label, length)
    np.add.at(prob_sum, runs.label, run_sum)
    first = first_of(runs.label, runs.regions)
    components = Components(
        key_row=runs.row[first] + row_off,
        key_col=runs.col[first] + col_off,
        pixels=pixels,
        prob_sum=prob_sum,
        geometry=trace(segments, runs.regions, row_off, col_off),
    )
    return runs, components


def _touches_side(runs: Runs, window: Window) -> NDArray[np.bool_]:
    """True for every component with a pixel in the outermost rows and columns."""
    touches = np.zeros(runs.regions, np.bool_)
    outer = (runs.row == 0) | (runs.row == window.height - 1) | (runs.col == 0) | (runs.col_stop == window.width)
    touches[runs.label[outer]] = True
    return touches


def _labels_of_sides(
    runs: Runs, number: NDArray[np.int32], window: Window
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Labels along top, right, bottom and left, number being the label of each component."""
    label = number[runs.label]

    def row_of_labels(row: int) -> NDArray[np.int32]:
        here = runs.row == row
        change = np.zeros(window.width + 1, np.int32)
        change[runs.col[here]] += label[here]
        change[runs.col_stop[here]] -= label[here]
        return np.cumsum(change[:-1], dtype=np.int32)

    def column_of_labels(here: NDArray[np.bool_]) -> NDArray[np.int32]:
        column = np.zeros(window.height, np.int32)
        column[runs.row[here]] = label[here]
        return column

    right, left = column_of_labels(runs.col_stop == window.width), column_of_labels(runs.col == 0)
    return row_of_labels(0), right, row_of_labels(window.height - 1), left


def finish(
    components: Components,
    settings: VectorSettings,
    lattice: Lattice,
    read_prob: Callable[[Window], NDArray[np.uint8]],
    cut: NDArray[np.bool_] | None = None,
    edges: Edges | None = None,
) -> Buildings:
    """Whole components to buildings: small holes filled, then small buildings dropped, then outlines simplified.

    read_prob gives prob_HW of a window inside the components' bounds, with 255 where nothing is stored. cut: True for
    components that go on into imagery that was not predicted; None for none of them. edges: of the components, where
    they are known; None: they are found along the outlines.
    """
    if not len(components):
        return Buildings.empty()
    pixel_m = _pixel_m(components.geometry, lattice)
    raw, filled_px = _fill_holes(components.geometry, settings, pixel_m, read_prob)
    area_px = components.pixels + filled_px
    large = area_px * pixel_m**2 >= settings.min_area_m2
    kept, raw, pixel_m = components.take(large), raw[large], pixel_m[large]
    geometry, form = _published_form(raw, pixel_m, settings, lattice)
    edges = edges_of_outlines(kept.geometry, read_prob) if edges is None else edges.take(large)
    return Buildings(
        key_row=kept.key_row,
        key_col=kept.key_col,
        pixels=kept.pixels,
        prob_sum=kept.prob_sum,
        geometry=geometry,
        area_px=area_px[large],
        pixel_m=pixel_m,
        cut=np.zeros(len(pixel_m), np.bool_) if cut is None else cut[large],
        raw=raw,
        form=form,
        edge_px=edges.pixels,
        edge_sum=edges.prob_sum,
        touches_nodata=edges.touches_nodata,
    )


def _published_form(
    raw: Geometries, pixel_m: NDArray[np.float64], settings: VectorSettings, lattice: Lattice
) -> tuple[Geometries, NDArray[np.int8]]:
    """The outlines that the settings ask for, and which of FORMS each is."""
    geometry, form = raw, np.zeros(len(raw), np.int8)
    if settings.simplify_m:
        geometry, simple = _simplify(raw, settings.simplify_m / pixel_m, lattice)
        form[simple] = FORMS.index("simplified")
    if settings.regularize == "orthogonal":
        regular, good = orthogonal(raw, pixel_m, settings.regularize_min_iou)
        good[good] = _is_valid(regular[good], lattice)
        geometry = np.where(good, regular, geometry)
        form[good] = FORMS.index("orthogonal")
    return geometry, form


def _pixel_m(geometry: Geometries, lattice: Lattice) -> NDArray[np.float64]:
    """Side of a pixel on the ground at the centres of the polygons' bounds, metres."""
    xmin, ymin, xmax, ymax = shapely.bounds(geometry).T
    return lattice.ground_pixel_m((ymin + ymax) / 2, (xmin + xmax) / 2)


def _fill_holes(
    geometry: Geometries,
    settings: VectorSettings,
    pixel_m: NDArray[np.float64],
    read_prob: Callable[[Window], NDArray[np.uint8]],
) -> tuple[Geometries, Int64s]:
    """Polygons without their small holes of valid pixels outside the mask, and the pixels gained by each."""
    filled_px = np.zeros(len(geometry), np.int64)
    with_holes = np.flatnonzero(shapely.get_num_interior_rings(geometry) > 0)
    if not len(with_holes) or not settings.fill_holes_m2:
        return geometry, filled_px
    rings, owner = shapely.get_rings(geometry[with_holes], return_index=True)
    is_hole = np.append(False, owner[1:] == owner[:-1])
    ring_px = np.abs(shapely.area(shapely.polygons(rings))).astype(np.int64)
    small = np.flatnonzero(is_hole & (ring_px * pixel_m[with_holes][owner] ** 2 < settings.fill_holes_m2))
    gone = np.zeros(len(rings), np.bool_)
    gone[small] = _is_plain(rings[small], settings.threshold_u8, read_prob)
    np.add.at(filled_px, with_holes[owner[gone]], ring_px[gone])
    changed = np.zeros(len(geometry), np.bool_)
    changed[with_holes[owner[gone]]] = True
    staying = ~gone & changed[with_holes][owner]
    geometry = geometry.copy()
    if staying.any():
        index = np.unique(owner[staying], return_inverse=True)[1]
        geometry[changed] = shapely.polygons(rings[staying], indices=index)
    return geometry, filled_px


def _is_plain(
    holes: Geometries, threshold_u8: int, read_prob: Callable[[Window], NDArray[np.uint8]]
) -> NDArray[np.bool_]:
    """True for every hole (canonical ring) all of whose pixels are valid and below the threshold."""
    plain = np.ones(len(holes), np.bool_)
    if not len(holes):
        return plain
    row, col, hole = _pixels_inside(holes)
    cell = np.stack([row // CELL_PX, col // CELL_PX])
    first = np.searchsorted(hole, np.arange(len(holes)))
    _, group = np.unique(cell[:, first], axis=1, return_inverse=True)
    by_group = np.argsort(group[hole], kind="stable")
    for pixels in np.split(by_group, np.flatnonzero(np.diff(group[hole][by_group])) + 1):
        rows, cols = row[pixels], col[pixels]
        window = Window.between(int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1)
        prob_HW = read_prob(window)
        # Invalid pixels are above every threshold too.
        blocked = prob_HW[rows - window.row_off, cols - window.col_off] >= threshold_u8
        plain[hole[pixels[blocked]]] = False
    return plain


def _pixels_inside(holes: Geometries) -> tuple[Int64s, Int64s, Int64s]:
    """Row, column and index of the hole of every pixel inside canonical rings, sorted by hole."""
    sides = segments_of(holes, np.arange(len(holes)))
    height = sides.bottom - sides.top
    row, x, hole = ranges(sides.top, height), np.repeat(sides.x, height), np.repeat(sides.label, height)
    order = np.lexsort((x, row, hole))
    row, x, hole = row[order], x[order], hole[order]
    width = x[1::2] - x[0::2]
    return np.repeat(row[0::2], width), ranges(x[0::2], width), np.repeat(hole[0::2], width)


def _simplify(
    geometry: Geometries, tolerance_px: NDArray[np.float64], lattice: Lattice
) -> tuple[Geometries, NDArray[np.bool_]]:
    """Polygons with fewer corners, and True for them; those whose simple form is no valid Polygon as they are."""
    # Douglas-Peucker ring by ring is ten times faster than GEOS's form that keeps the topology, and mostly enough.
    simple, good = _simplify_rings(geometry, tolerance_px)
    good[good] = _is_valid(simple[good], lattice)
    rest = np.flatnonzero(~good & (shapely.get_num_coordinates(geometry) <= _TOPOLOGY_CORNERS))
    simple[rest] = shapely.simplify(geometry[rest], tolerance_px[rest], preserve_topology=True)
    is_polygon = (shapely.get_type_id(simple[rest]) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(simple[rest])
    good[rest] = is_polygon & _is_valid(simple[rest], lattice)
    simple[~good] = geometry[~good]
    return simple, good


def _simplify_rings(geometry: Geometries, tolerance_px: NDArray[np.float64]) -> tuple[Geometries, NDArray[np.bool_]]:
    """Polygons with every ring simplified for itself, None where one has collapsed; and True where none has."""
    simple = np.full(len(geometry), None, np.object_)
    rings, owner = shapely.get_rings(geometry, return_index=True)
    lines = shapely.simplify(rings, tolerance_px[owner], preserve_topology=False)
    whole = (shapely.get_type_id(lines) == shapely.GeometryType.LINEARRING) & (shapely.get_num_coordinates(lines) > 3)
    good = np.ones(len(geometry), np.bool_)
    good[owner[~whole]] = False
    staying = good[owner]
    if staying.any():
        shapely.polygons(lines[staying], indices=owner[staying], out=simple)
    return simple, good


def _is_valid(geometry: Geometries, lattice: Lattice) -> NDArray[np.bool_]:
    """True for what is valid and stays so in the CRS: rounding may push a hole through an oblique side it touches."""
    valid: NDArray[np.bool_] = shapely.is_valid(geometry) & shapely.is_valid(to_crs(geometry, lattice))
    return valid


def to_crs(geometry: Geometries, lattice: Lattice) -> Geometries:
    """Polygons in CRS coordinates, from lattice pixels."""
    to_x_y = lattice.transform()
    moved: Geometries = shapely.transform(
        geometry,
        lambda col, row: (to_x_y.c + to_x_y.a * col, to_x_y.f + to_x_y.e * row),
        interleaved=False,
    )
    return moved


def building_ids(key_row: Int64s, key_col: Int64s) -> list[str]:
    """Ids of buildings by their first pixels, such as N15240E1822: rows north or south, columns east or west."""
    return [
        f"{'N' if row < 0 else 'S'}{abs(row)}{'E' if col >= 0 else 'W'}{abs(col)}"
        for row, col in zip(key_row.tolist(), key_col.tolist(), strict=True)
    ]


def first_pixels(ids: pa.Array) -> tuple[Int64s, Int64s]:
    """The inverse of building_ids: rows and columns of first pixels. ValueError for a text that is no such id."""
    parts = pc.extract_regex(ids, r"^(?P<ns>[NS])(?P<row>[0-9]+)(?P<ew>[EW])(?P<col>[0-9]+)$")
    if parts.null_count:
        raise ValueError(f"building {ids.filter(parts.is_null())[0]}: expected an id such as N15240E1822")
    row, col = (parts.field(name).cast(pa.int64()).to_numpy() for name in ("row", "col"))
    north, west = (
        pc.equal(parts.field(name), sign).to_numpy(zero_copy_only=False) for name, sign in (("ns", "N"), ("ew", "W"))
    )
    return np.where(north, -row, row), np.where(west, -col, col)


def _to_wkb(geometry: Geometries) -> pa.Array:
    return pa.array(shapely.to_wkb(geometry, byte_order=1), pa.binary())


def _from_wkb(wkb: pa.Array) -> Geometries:
    geometry = np.empty(len(wkb), np.object_)
    # Of all at once every byte would be held twice more: as Python's, and in the polygons.
    for first in range(0, len(wkb), WKB_AT_ONCE):
        some = slice(first, first + WKB_AT_ONCE)
        geometry[some] = shapely.from_wkb(_values(wkb[some]))
    return geometry


def _values(column: pa.Array) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values
