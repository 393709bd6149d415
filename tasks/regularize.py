"""Footprints with right angles: every edge laid along the building's dominant direction, or across it.

A building is regularized by itself, as a whole, before anything is known of its neighbours; all buildings of an array
are worked on at once, and what becomes of one does not depend on the others beside it. Where two outlines would then
overlap, `neighbours.keep_apart` decides pair by pair.

Geometry: absolute lattice pixels, x = column, y = row downwards. Raw outlines are canonical (see outlines): integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from .outlines import Geometries, Int64s

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

REACH_PX = 16
"""A regularized outline stays within the bounds of the raw one, grown by so much: nobody farther off is a neighbour."""

TOLERANCE_M = 0.6
"""How far the raw outline may leave the straight line of an edge: two pixels of 0.3 m."""

SHORTEST_M = 0.9
"""Shorter edges are steps of the mask, not of the building: the two edges beside them become one."""


def orthogonal(raw: Geometries, pixel_m: Floats, min_iou: float) -> tuple[Geometries, Bools]:
    """Right-angled forms of raw outlines, and True where there is one that is a valid Polygon.

    It overlaps the raw outline with an IoU of min_iou or more, has as many holes and stays within REACH_PX of its
    bounds; where there is none the raw outline is given. pixel_m: side of a pixel on the ground for each building.
    """
    result = raw.copy()
    if not len(raw):
        return result, np.zeros(0, np.bool_)
    rings, owner = shapely.get_rings(raw, return_index=True)
    origin = shapely.bounds(raw)[:, :2]  # counted from there coordinates are small, wherever the building stands
    edges, angle = _edges(rings, owner, origin, TOLERANCE_M / pixel_m)
    lines = _drop_short(_merge(edges), SHORTEST_M / pixel_m[owner])
    squared = _polygons(lines, owner, angle, origin)
    chosen = np.flatnonzero(shapely.is_valid(squared) & ~shapely.is_missing(squared))
    chosen = chosen[shapely.get_num_interior_rings(squared[chosen]) == shapely.get_num_interior_rings(raw[chosen])]
    grown = shapely.bounds(raw[chosen]) + np.array([-REACH_PX, -REACH_PX, REACH_PX, REACH_PX])
    bounds = shapely.bounds(squared[chosen])
    chosen = chosen[((bounds[:, :2] >= grown[:, :2]) & (bounds[:, 2:] <= grown[:, 2:])).all(axis=1)]
    chosen = chosen[iou(squared[chosen], raw[chosen]) >= min_iou]
    result[chosen] = squared[chosen]
    good = np.zeros(len(raw), np.bool_)
    good[chosen] = True
    return result, good


def iou(one: Geometries, other: Geometries) -> Floats:
    """Intersection over union of valid polygons, pair by pair."""
    common = shapely.area(shapely.intersection(one, other))
    ratio: Floats = common / (shapely.area(one) + shapely.area(other) - common)
    return ratio


@dataclass(frozen=True)
class _Lines:
    """Edges of rings in walking order, all of one ring together, in the frame of the building's direction.

    ring: index of the ring. along: True for an edge in the dominant direction, which has a place across it, and the
    other way round. place: in pixels from the building's origin. weight: the length that the place is a mean over.
    """

    ring: Int64s
    along: Bools
    place: Floats
    weight: Floats

    def take(self, chosen: NDArray[np.generic]) -> _Lines:
        """Those that a mask or indices choose."""
        return _Lines(self.ring[chosen], self.along[chosen], self.place[chosen], self.weight[chosen])


def _edges(rings: Geometries, owner: Int64s, origin: Floats, tolerance_px: Floats) -> tuple[_Lines, Floats]:
    """The long edges of every ring, and the dominant direction of every building (radians, of the first quadrant).

    An edge runs between two corners that Douglas and Peucker's algorithm keeps. Its place is the one that leaves the
    area under the stretch of raw outline between them as it is, in integers until the last step: nothing is summed
    over buildings.
    """
    raw, ring = shapely.get_coordinates(rings, return_index=True)
    xy = (raw - origin[owner[ring]]).astype(np.int64)
    coarse = shapely.simplify(rings, tolerance_px[owner], preserve_topology=False)
    collapsed = (shapely.get_type_id(coarse) != shapely.GeometryType.LINEARRING) | (
        shapely.get_num_coordinates(coarse) < 5
    )
    coarse[collapsed] = rings[collapsed]
    kept, kept_ring = shapely.get_coordinates(coarse, return_index=True)
    kept_xy = (kept - origin[owner[kept_ring]]).astype(np.int64)
    start, stop, edge_ring = _stretches(xy, ring, kept_xy, kept_ring)
    # Twice the area between the outline and the y axis, from the first corner on.
    steps = np.where(ring[1:] == ring[:-1], (xy[1:, 0] + xy[:-1, 0]) * (xy[1:, 1] - xy[:-1, 1]), 0)
    swept = np.append(0, np.cumsum(steps))
    (x0, y0), (x1, y1) = xy[start].T, xy[stop].T
    dx, dy = (x1 - x0).astype(np.float64), (y1 - y0).astype(np.float64)
    angle = _directions(dx, dy, owner[edge_ring], int(owner.max()) + 1)
    cos, sin = np.cos(angle)[owner[edge_ring]], np.sin(angle)[owner[edge_ring]]
    # In the turned frame u = cos x + sin y, v = cos y - sin x, so that the integral of v du is this sum of integers'.
    xdy = (swept[stop] - swept[start]) / 2
    ydx = (x1 * y1 - x0 * y0) - xdy
    xdx, ydy = (x1 * x1 - x0 * x0) / 2, (y1 * y1 - y0 * y0) / 2
    vdu = cos * cos * ydx - sin * sin * xdy + sin * cos * (ydy - xdx)
    u0, v0, u1, v1 = cos * x0 + sin * y0, cos * y0 - sin * x0, cos * x1 + sin * y1, cos * y1 - sin * x1
    udv = u1 * v1 - u0 * v0 - vdu
    along = np.abs(u1 - u0) >= np.abs(v1 - v0)
    run = np.where(along, u1 - u0, v1 - v0)
    return _Lines(edge_ring, along, np.where(along, vdu, udv) / run, np.abs(run)), angle


def _stretches(xy: Int64s, ring: Int64s, kept_xy: Int64s, kept_ring: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Start and stop of every edge between kept vertices as indices of all vertices, and the ring of each."""
    side = int(xy.max()) + 1
    last = np.flatnonzero(np.append(ring[1:] != ring[:-1], True))
    key = (ring * side + xy[:, 0]) * side + xy[:, 1]
    key[last] = -1
    order = np.argsort(key, kind="stable")
    index = order[np.searchsorted(key[order], (kept_ring * side + kept_xy[:, 0]) * side + kept_xy[:, 1])]
    # A ring ends where it began.
    ends = np.append(kept_ring[1:] != kept_ring[:-1], True)
    index[ends] = last[kept_ring[ends]]
    edge = np.flatnonzero(~ends)
    return index[edge], index[edge + 1], kept_ring[edge]


def _directions(dx: Floats, dy: Floats, owner: Int64s, count: int) -> Floats:
    """Mean direction of the edges of every building modulo a right angle, weighted by squared length."""
    fourfold = (dx + 1j * dy) ** 4 / np.maximum(dx * dx + dy * dy, 1)
    mean = np.bincount(owner, fourfold.real, count) + 1j * np.bincount(owner, fourfold.imag, count)
    angle: Floats = np.angle(mean) / 4
    return angle


def _merge(lines: _Lines) -> _Lines:
    """Neighbouring edges of one direction made one, so that directions alternate around every ring."""
    opens = lines.along != lines.along[_cyclic(lines.ring, -1)]
    run = np.cumsum(opens) - 1
    rings = int(lines.ring.max()) + 1
    first, last = np.full(rings, len(run), np.int64), np.full(rings, -1, np.int64)
    np.minimum.at(first, lines.ring[opens], np.flatnonzero(opens))
    np.maximum.at(last, lines.ring[opens], run[opens])
    # What stands before the first change of a ring goes on its last run; a ring of one direction is none.
    run = np.where(np.arange(len(run)) < first[lines.ring], last[lines.ring], run)
    kept = lines.take(run >= 0)
    run, count = run[run >= 0], int(opens.sum())
    weight = np.bincount(run, kept.weight, count).astype(np.float64)
    place = np.bincount(run, kept.weight * kept.place, count) / weight
    return _Lines(lines.ring[opens], lines.along[opens], place, weight)


def _cyclic(ring: Int64s, step: int) -> Int64s:
    """Index of the edge so many steps on in the same ring, around its end."""
    start = np.flatnonzero(np.append(True, ring[1:] != ring[:-1])[: len(ring)])
    length = np.diff(np.append(start, len(ring)))
    first, count = np.repeat(start, length), np.repeat(length, length)
    index: Int64s = first + (np.arange(len(ring)) - first + step) % count
    return index


def _drop_short(lines: _Lines, shortest_px: Floats) -> _Lines:
    """Rings without edges shorter than so much (by ring), the shortest of a neighbourhood first; four edges stay."""
    while len(lines.ring):
        one, other = _cyclic(lines.ring, -1), _cyclic(lines.ring, 1)
        length = np.abs(lines.place[other] - lines.place[one])
        size = np.bincount(lines.ring)[lines.ring]
        least = (length < shortest_px[lines.ring]) & (size > 4)
        for step in (-3, -2, -1, 1, 2, 3):
            near = _cyclic(lines.ring, step)
            own_first = (length < length[near]) | ((length == length[near]) & (np.arange(len(near)) < near))
            least &= own_first | ~((length[near] < shortest_px[lines.ring]) & (size > 4))
        dropped = np.flatnonzero(least)
        if not len(dropped):
            break
        place, weight = lines.place.copy(), lines.weight.copy()
        into, gone = one[dropped], other[dropped]
        weight[into] = lines.weight[into] + lines.weight[gone]
        place[into] = (lines.weight[into] * lines.place[into] + lines.weight[gone] * lines.place[gone]) / weight[into]
        stays = np.ones(len(place), np.bool_)
        stays[dropped] = stays[gone] = False
        lines = _Lines(lines.ring, lines.along, place, weight).take(stays)
    return lines


def _polygons(lines: _Lines, owner: Int64s, angle: Floats, origin: Floats) -> Geometries:
    """Polygons whose corners are where neighbouring edges meet; None where a ring has too few."""
    polygons = np.full(len(angle), None, np.object_)
    size = np.bincount(lines.ring, minlength=len(owner))
    whole = np.ones(len(angle), np.bool_)
    whole[owner[size < 4]] = False
    lines = lines.take(whole[owner[lines.ring]])
    if not len(lines.ring):
        return polygons
    after = _cyclic(lines.ring, 1)
    u = np.where(lines.along, lines.place[after], lines.place)
    v = np.where(lines.along, lines.place, lines.place[after])
    building = owner[lines.ring]
    cos, sin = np.cos(angle)[building], np.sin(angle)[building]
    corners = np.stack([cos * u - sin * v, sin * u + cos * v], axis=1) + origin[building]
    rings = shapely.linearrings(corners, indices=np.unique(lines.ring, return_inverse=True)[1])
    shapely.polygons(rings, indices=owner[np.unique(lines.ring)], out=polygons)
    return polygons
