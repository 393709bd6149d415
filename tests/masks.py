"""Masks that are hard to vectorize in pieces, ways to cut them, and all steps over the pieces in one process."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import pyproj
import shapely
import shapely.geometry
from affine import Affine
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.features import shapes

from segpipe.tasks.fragments import border_from_bytes, finished_from_bytes, fragment_to_bytes, sides_from_bytes
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.seams import collect, join, plan_joins
from segpipe.tasks.vectorize import Buildings, VectorSettings, finish, vectorize_block

# The full number of examples takes minutes: SEGPIPE_THOROUGH=1 asks for it, with other examples at every run.
THOROUGH = os.environ.get("SEGPIPE_THOROUGH") == "1"
THRESHOLD = 100
RAW = VectorSettings(THRESHOLD, 0, 0, 0)
LATTICE = Lattice(pyproj.CRS.from_epsg(32645).to_wkt(), 0.3, 0.11, 0.07)
CORNER = st.tuples(st.integers(-10_200_000, -10_100_000), st.integers(-90, 1_100_000))


def noise(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    return rng.random((height, width)) < rng.uniform(0.5, 0.7)


def rings(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    row, col = np.ogrid[:height, :width]
    distance = np.maximum(abs(row - height // 2), abs(col - width // 2))
    return distance // rng.integers(1, 5) % 2 == rng.integers(2)


def discs(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    row, col = np.ogrid[:height, :width]
    distance = np.hypot(row - rng.uniform(0, height), col - rng.uniform(0, width))
    return distance // rng.uniform(1, 9) % 2 == 0


def spiral(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), np.bool_)
    top, left, bottom, right = 0, 0, height - 1, width - 1
    while top <= bottom and left <= right:
        mask[top, max(0, left - 2) : right + 1] = True
        mask[top : bottom + 1, right] = True
        mask[bottom, left : right + 1] = True
        mask[top + 2 : bottom + 1, left] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return np.rot90(mask, rng.integers(4)) if height == width else mask


def comb(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), np.bool_)
    mask[:, :: rng.integers(2, 5)] = True
    mask[rng.integers(height)] = True
    return mask


def checkers(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    row, col = np.ogrid[:height, :width]
    size = rng.integers(1, 8)
    mask = (row // size + col // size) % 2 == 0
    mask[rng.integers(height)] = rng.integers(2)
    mask[:, rng.integers(width)] = True
    return mask


def houses(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    row, col = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.bool_)
    for _ in range(height * width // 300 + 1):
        turn, (u, v) = rng.uniform(0, np.pi), rng.uniform(2, 14, 2)
        y, x = row - rng.uniform(0, height), col - rng.uniform(0, width)
        across, along = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        house = (abs(across) < u) & (abs(along) < v)
        mask |= house & ~((abs(across) < u / 3) & (abs(along) < v / 3) & (rng.random() < 0.4))
    return mask


DRAWN = (noise, noise, noise, rings, discs, spiral, comb, checkers, houses, houses)


@st.composite
def cities(draw: st.DrawFn, largest: int = 200) -> tuple[NDArray[np.uint8], Window, int]:
    """Probabilities, their place on the lattice, and a seed for what goes on with them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Sizes come from numpy, for hypothesis by itself draws few large ones.
    least, most = draw(st.sampled_from([(1, 8), (4, 40), (largest // 4, largest), (largest // 2, largest)]))
    height, width = (int(side) for side in rng.integers(least, most + 1, 2))
    mask = draw(st.sampled_from(DRAWN))(rng, height, width)
    prob = np.where(mask, rng.integers(THRESHOLD, 251, mask.shape), rng.integers(0, THRESHOLD, mask.shape))
    for _ in range(draw(st.integers(0, 4))):
        row, col = rng.integers(height), rng.integers(width)
        prob[row : row + rng.integers(1, 12), col : col + rng.integers(1, 12)] = 255
    return prob.astype(np.uint8), Window(*draw(CORNER), height, width), int(rng.integers(2**32))


def cut(window: Window, rng: np.random.Generator, smallest: int = 3, largest: int = 64) -> list[Window]:
    """Blocks of a window: the lattice's own, an uneven grid, or rows or columns of blocks each cut in its own way."""
    kind = rng.choice(["lattice", "grid", "rows", "columns"])
    if kind == "lattice":
        step = int(rng.integers(smallest, largest + 1))
        return [Window.cell(row, col, step) for row, col in window.cells(step)]
    rows = _steps(window.row_off, window.row_stop, rng, smallest, largest)
    cols = _steps(window.col_off, window.col_stop, rng, smallest, largest)
    blocks = []
    for first, first_stop in cols if kind == "columns" else rows:
        if kind == "columns":
            rows = _steps(window.row_off, window.row_stop, rng, smallest, largest)
            blocks += [Window.between(row, first, row_stop, first_stop) for row, row_stop in rows]
        else:
            cols = _steps(window.col_off, window.col_stop, rng, smallest, largest) if kind == "rows" else cols
            blocks += [Window.between(first, col, first_stop, col_stop) for col, col_stop in cols]
    return blocks


def _steps(start: int, stop: int, rng: np.random.Generator, smallest: int, largest: int) -> list[tuple[int, int]]:
    steps = []
    while start < stop:
        size = min(int(rng.integers(smallest, largest + 1)), stop - start)
        steps.append((start, start + size))
        start += size
    return steps


def with_corner_contacts(
    prob: NDArray[np.uint8], window: Window, blocks: Sequence[Window], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The city with two buildings' corners, or one building's, meeting where four blocks do."""
    prob = prob.copy()
    for block in blocks:
        row, col = block.row_off - window.row_off, block.col_off - window.col_off
        if 0 < row < window.height and 0 < col < window.width and rng.random() < 0.7:
            pattern = np.eye(2, dtype=np.bool_)[:: rng.choice([-1, 1])]
            prob[row - 1 : row + 1, col - 1 : col + 1] = np.where(pattern, 250, 0)
    return prob


def reader(prob: NDArray[np.uint8], window: Window) -> Callable[[Window], NDArray[np.uint8]]:
    """Reads any window of a city, 255 outside, as a store does."""

    def read(part: Window) -> NDArray[np.uint8]:
        out = np.full(part.shape_yx, 255, np.uint8)
        common = part.intersect(window)
        if common.pixels:
            out[common.within(part)] = prob[common.within(window)]
        return out

    return read


def stored_fragments(
    prob: NDArray[np.uint8], window: Window, blocks: Sequence[Window], settings: VectorSettings
) -> list[bytes]:
    read = reader(prob, window)
    return [fragment_to_bytes(vectorize_block(read(block), block, LATTICE, settings)) for block in blocks]


def vectorize_in_pieces(
    prob: NDArray[np.uint8], window: Window, blocks: Sequence[Window], settings: VectorSettings
) -> Buildings:
    """All buildings of a city by way of stored fragments and joins, in the order of their first pixels."""
    stored = stored_fragments(prob, window, blocks, settings)
    joins = plan_joins(blocks, lambda index: sides_from_bytes(stored[index]))
    parts = [finished_from_bytes(data) for data in stored]
    for home in range(len(blocks)):
        pieces, building = collect(joins.at(home), lambda index: border_from_bytes(stored[index]))
        parts.append(finish(join(pieces, building), settings, LATTICE, reader(prob, window)))
    buildings = Buildings.concatenate(parts)
    return buildings.take(np.lexsort((buildings.key_col, buildings.key_row)))


def oracle_polygons(mask: NDArray[np.bool_], window: Window) -> list[shapely.Polygon]:
    """Polygons of one polygonize of the whole mask, by GDAL."""
    found = shapes(
        mask.astype(np.uint8),
        mask=mask,
        connectivity=4,
        transform=Affine.translation(window.col_off, window.row_off),
    )
    return [shapely.geometry.shape(geometry) for geometry, _ in found]


def as_set(polygons: Sequence[shapely.Polygon] | NDArray[np.object_]) -> list[bytes]:
    """Sorted WKB of polygons that are normal in shapely's sense and have no collinear points."""
    plain = [
        shapely.Polygon(
            _corners(polygon.exterior.coords), [_corners(interior.coords) for interior in polygon.interiors]
        )
        for polygon in polygons
    ]
    return sorted(polygon.normalize().wkb for polygon in plain)


def _corners(coords: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    points = np.asarray(coords)[:-1]
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
