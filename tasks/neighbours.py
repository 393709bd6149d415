"""Neighbours kept apart: no published outline overlaps another.

A building whose outline to be published overlaps the one, or the raw outline, of another is published with its raw
outline, and raw outlines never overlap. So what is published overlaps nowhere, and what becomes of a building follows
from the pairs that it is in, in whatever order and from wherever they are looked at. Of a pair whose outlines overlap
each other both give way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import shapely
from numpy.typing import NDArray

from .grid import Lattice
from .outlines import Geometries, Int64s
from .vectorize import FORMS, Buildings, to_crs

PAIRS_AT_ONCE = 1024
"""Pairs whose outlines are held in coordinates of the CRS at a time, each once."""


def keep_apart(buildings: Buildings, others: Buildings, lattice: Lattice) -> Buildings:
    """Buildings as they are to be published, among themselves and between others: all that `meeting` finds."""
    blocked = _in_the_way(buildings, Buildings.concatenate([buildings, others]), lattice)
    if not blocked.any():
        return buildings
    return replace(
        buildings,
        geometry=np.where(blocked, buildings.raw, buildings.geometry),
        form=np.where(blocked, np.int8(FORMS.index("raw")), buildings.form),
    )


def meeting(buildings: Buildings, around: Iterable[Buildings]) -> Buildings:
    """Those whose bounds meet the bounds of one of the buildings, of others in any number of parts, held one by one."""
    bounds = bounds_of(buildings)
    tree = shapely.STRtree(shapely.box(*bounds.T))
    return Buildings.concatenate([_meeting(part, tree, bounds) for part in around if len(part) and len(buildings)])


def _meeting(part: Buildings, tree: shapely.STRtree, bounds: NDArray[np.float64]) -> Buildings:
    """Those whose bounds meet some of these bounds, which a tree holds as boxes."""
    own = bounds_of(part)
    # Most are far from all of them: no box is made of those.
    least, most = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
    close = (own[:, :2] <= most).all(axis=1) & (own[:, 2:] >= least).all(axis=1)
    chosen = np.flatnonzero(close)
    return part.take(chosen[np.unique(tree.query(shapely.box(*own[chosen].T))[0])])


def bounds_of(buildings: Buildings) -> NDArray[np.float64]:
    """Left, top, right and bottom of each building's outlines together, the raw one and the one to be published."""
    published, raw = shapely.bounds(buildings.geometry), shapely.bounds(buildings.raw)
    return np.hstack([np.minimum(published, raw)[:, :2], np.maximum(published, raw)[:, 2:]])


def _in_the_way(buildings: Buildings, others: Buildings, lattice: Lattice) -> NDArray[np.bool_]:
    """True for buildings whose outline overlaps one of the others'; nothing is in its own way."""
    blocked = np.zeros(len(buildings), np.bool_)
    shaped = np.flatnonzero(buildings.form != FORMS.index("raw"))
    if not len(shaped):
        return blocked
    own, key, other_key = buildings.geometry[shaped], _key(buildings)[shaped], _key(others)
    for theirs in (others.geometry, others.raw):
        one, other = shapely.STRtree(theirs).query(own)
        different = key[one] != other_key[other]
        one, other = one[different], other[different]
        # The larger of a pair is prepared, and its pairs are looked at together: one that winds through a town is in
        # thousands, and to prepare it takes longer than to look at most of them.
        swapped = shapely.get_num_coordinates(own)[one] < shapely.get_num_coordinates(theirs)[other]
        order = np.argsort(np.where(swapped, len(own) + other, one), kind="stable")
        for first in range(0, len(order), PAIRS_AT_ONCE):
            some = order[first : first + PAIRS_AT_ONCE]
            in_crs = _in_crs(own, one[some], lattice), _in_crs(theirs, other[some], lattice)
            blocked[shaped[one[some][_overlap(*in_crs, swapped[some])]]] = True
    return blocked


def _in_crs(geometry: Geometries, chosen: Int64s, lattice: Lattice) -> Geometries:
    """Some polygons, many of them chosen several times, as they are published."""
    once, place = np.unique(chosen, return_inverse=True)
    moved: Geometries = to_crs(geometry[once], lattice)[place]
    return moved


def _overlap(one: Geometries, other: Geometries, swapped: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the insides of polygons meet, pair by pair, exactly. swapped: the other one is prepared."""
    prepared, second = np.where(swapped, other, one), np.where(swapped, one, other)
    shapely.prepare(prepared)
    overlap: NDArray[np.bool_] = shapely.relate_pattern(prepared, second, "T********")
    return overlap


def _key(buildings: Buildings) -> Int64s:
    """One number for each first pixel."""
    return (buildings.key_row << 32) + buildings.key_col
