"""Buildings as users get them: coordinates of the CRS, and what is said of each besides its outline.

Everything here is a function of the whole building and of the imagery's extent, never of how the work was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from .edges import edge_pixels
from .grid import Lattice, Window
from .outlines import Geometries
from .vectorize import FORMS, FULL_U8, Buildings, building_ids, to_crs

SCHEMA = pa.schema(
    [
        pa.field("building_id", pa.string()),
        pa.field("area_m2", pa.float64()),
        pa.field("perimeter_m", pa.float64()),
        pa.field("pixels", pa.int64()),
        pa.field("confidence", pa.float64()),
        pa.field("edge_confidence", pa.float64()),
        pa.field("rectangularity", pa.float64()),
        pa.field("holes", pa.int32()),
        pa.field("outline", pa.string()),
        pa.field("touches_nodata", pa.bool_()),
        pa.field("touches_edge", pa.bool_()),
        pa.field("cut", pa.bool_()),
        pa.field("tiles", pa.string()),
        pa.field("review", pa.float64()),
        pa.field("geometry", pa.binary()),
    ]
)
"""What is published of a building; `publishable` says what each is."""

REVIEW_SHARES = {"edge": 0.5, "inside": 0.3, "shape": 0.3, "cut off": 0.4}
"""How much of `review` each doubt makes by itself at most."""


class Imagery:
    """Where there is imagery: the names and windows of the tiles, and the bounds of all valid pixels if known."""

    def __init__(self, names: Sequence[str] = (), windows: Sequence[Window] = (), valid: Window | None = None) -> None:
        self._names = names
        self._boxes = _boxes(windows)
        self._inside = self._boxes if valid is None else _boxes([window.intersect(valid) for window in windows])

    @cached_property
    def _tiles(self) -> shapely.STRtree:
        return shapely.STRtree(self._boxes)

    @cached_property
    def _valid(self) -> shapely.Geometry:
        whole = shapely.union_all(self._inside)
        shapely.prepare(whole)
        return whole

    def tiles_under(self, outlines: Geometries) -> list[str]:
        """Names of the tiles that have a pixel in common with each outline, in the order of the list."""
        bounds, sides = shapely.bounds(outlines), shapely.bounds(self._boxes)
        outline, tile = self._tiles.query(shapely.box(*bounds.T))
        low, high = bounds[outline] >= sides[tile], bounds[outline] <= sides[tile]
        shared = low[:, :2].all(axis=1) & high[:, 2:].all(axis=1)
        # Within a tile by its bounds, an outline lies on it; of the others it is asked exactly.
        unsure = np.flatnonzero(~shared)
        some, boxes = outlines[outline[unsure]], self._boxes[tile[unsure]]
        shared[unsure] = shapely.intersects(some, boxes) & ~shapely.touches(some, boxes)
        outline, tile = outline[shared], tile[shared]
        order = np.lexsort((tile, outline))
        first = np.searchsorted(outline[order], np.arange(len(outlines) + 1))
        under = np.full(len(outlines), "", np.object_)
        alone = np.flatnonzero(np.diff(first) == 1)
        under[alone] = np.array(self._names, np.object_)[tile[order[first[alone]]]]
        for index in np.flatnonzero(np.diff(first) > 1).tolist():
            under[index] = ", ".join(self._names[it] for it in tile[order[first[index] : first[index + 1]]].tolist())
        names: list[str] = under.tolist()
        return names

    def ends_at(self, outlines: Geometries) -> NDArray[np.bool_]:
        """True for raw outlines with a 4-neighbour in no tile, or beyond the bounds of all valid pixels."""
        ends = np.zeros(len(outlines), np.bool_)
        # Most lie amid the tiles with all their neighbours: of the others each neighbour is looked at.
        around = shapely.box(*(shapely.bounds(outlines) + np.array([-1, -1, 1, 1])).T)
        others = np.flatnonzero(~shapely.covers(self._valid, around))
        _, _, row, col, index = edge_pixels(outlines[others])
        beyond = ~shapely.intersects_xy(self._valid, col + 0.5, row + 0.5)
        ends[others[index[beyond]]] = True
        return ends


def _boxes(windows: Sequence[Window]) -> Geometries:
    sides = np.array([(it.col_off, it.row_off, it.col_stop, it.row_stop) for it in windows], np.float64).reshape(-1, 4)
    boxes: Geometries = shapely.box(*sides.T)
    return boxes


def publishable(buildings: Buildings, lattice: Lattice, imagery: Imagery) -> pa.RecordBatch:
    """What users get of buildings, in the same order, with the columns of SCHEMA.

    building_id: text, the first pixel's place on the lattice. area_m2, perimeter_m: on the ground, of the published
    polygon with its holes, to the cm² and the cm. pixels: of the mask. confidence: mean probability of these;
    edge_confidence: of those with a 4-neighbour outside. rectangularity: share of the smallest rectangle around the
    polygon that it fills. holes: their number. outline: raw, simplified or orthogonal. touches_nodata: a pixel has a
    4-neighbour without valid imagery; touches_edge: one at which the imagery ends. cut: the building goes on into
    imagery that was not predicted. tiles: names of the tiles that it lies on. review: 0 to 1, those to look at first
    have the most. geometry: WKB in the lattice's CRS, shells counterclockwise. Shares to 4 decimals.
    """
    if not len(buildings):
        return pa.RecordBatch.from_pylist([], schema=SCHEMA)
    area_px = shapely.area(buildings.geometry)
    confidence = buildings.prob_sum / (FULL_U8 * buildings.pixels)
    edge_confidence = buildings.edge_sum / (FULL_U8 * buildings.edge_px)
    rectangularity = np.minimum(area_px / shapely.area(shapely.oriented_envelope(buildings.geometry)), 1)
    touches_edge = np.zeros(len(buildings), np.bool_)
    touching = np.flatnonzero(buildings.touches_nodata)
    touches_edge[touching] = imagery.ends_at(buildings.raw[touching])
    doubts = {
        "edge": 2 * (1 - edge_confidence),
        "inside": 2 * (1 - confidence),
        "shape": 1 - rectangularity,
        "cut off": (buildings.touches_nodata | buildings.cut).astype(np.float64),
    }
    columns = {
        "building_id": building_ids(buildings.key_row, buildings.key_col),
        "area_m2": np.round(area_px * buildings.pixel_m**2, 2),
        "perimeter_m": np.round(shapely.length(buildings.geometry) * buildings.pixel_m, 2),
        "pixels": buildings.pixels,
        "confidence": np.round(confidence, 4),
        "edge_confidence": np.round(edge_confidence, 4),
        "rectangularity": np.round(rectangularity, 4),
        "holes": shapely.get_num_interior_rings(buildings.geometry),
        "outline": np.array(FORMS, np.object_)[buildings.form],
        "touches_nodata": buildings.touches_nodata,
        "touches_edge": touches_edge,
        "cut": buildings.cut,
        "tiles": imagery.tiles_under(buildings.raw),
        "review": np.round(_review(doubts), 4),
        "geometry": shapely.to_wkb(shapely.orient_polygons(to_crs(buildings.geometry, lattice)), byte_order=1),
    }
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[field.name], field.type) for field in SCHEMA],
        schema=SCHEMA,
    )


def _review(doubts: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """One figure of several doubts of 0 to 1: none lowers it, and together they stay below 1."""
    trust = np.ones(len(doubts["shape"]))
    for name, doubt in doubts.items():
        trust *= 1 - REVIEW_SHARES[name] * np.clip(doubt, 0, 1)
    return 1 - trust
