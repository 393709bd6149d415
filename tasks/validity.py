"""Validity: which pixels of a tile are no imagery. Decided once per tile, on the whole of it, before any cut.

Axes: C band, H row, W column. Patches are counted in the tile's own pixels, whatever the pieces in which it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .grid import Window
from .read import Tile, TileHeader, read_mask, read_samples

LOSSY_TOLERANCE = 12.0  # ringing of JPEG around a nodata value, in 8-bit steps
EDGE_RUN_PX = 64  # a patch along this much of a tile's side was cut by it: its size says nothing
_REACH_PX = 4  # an opening by 5 x 5 sees two pixels for the erosion and two for the dilation


@dataclass(frozen=True)
class Scan:
    """What a scan found: pixels that are invalid in all, and by reason. A pixel with two reasons counts under both."""

    invalid_px: int
    by_reason: dict[str, int]

    @property
    def any_invalid(self) -> bool:
        """True if the tile has an invalid pixel."""
        return self.invalid_px > 0


def resolve_tolerance(setting: Literal["auto"] | float, header: TileHeader) -> float:
    """Largest distance from a nodata value, in sample units: for auto 0 in lossless tiles and 12 in lossy ones."""
    if setting != "auto":
        return float(setting)
    return LOSSY_TOLERANCE if header.lossy else 0.0


def min_pixels(nodata_min_m2: float, ground_pixel_m2: float) -> int:
    """Pixels of the smallest patch of at least nodata_min_m2; ground_pixel_m2 is the ground area of one pixel."""
    # The small slack keeps 900 m2 of 0.3 m pixels at 10,000 of them, although 0.3 x 0.3 < 0.09 in floating point.
    return max(1, math.ceil(nodata_min_m2 / ground_pixel_m2 - 1e-6))


def scan_tile(
    tile: Tile,
    min_pixels: int,
    write_invalid: Callable[[Window, NDArray[np.bool_]], None],
    piece_px: int = 2048,
) -> Scan:
    """Decide which pixels of a tile are invalid, and hand them to write_invalid piece by piece.

    A nodata value makes candidates of the pixels where all selected bands lie within the tile's tolerance of it. They
    are opened by 5 x 5 (beyond the tile everything counts as candidate, so its edge cuts no patch short) and fall into
    4-connected patches. A patch is invalid if it has at least min_pixels pixels, or if it runs along 64 px of one side
    of the tile, or along the whole of a shorter side. Mask bands are taken as they are: invalid where 0. So is an alpha
    band if all its samples are 0 or 255; other alpha bands are imagery that was mislabelled, and are ignored.

    write_invalid(window, mask) is called once for each piece that has invalid pixels, with its window on the absolute
    lattice and the mask (True is invalid) of that shape. Memory is bounded by piece_px squared, and what is found does
    not depend on piece_px. Raises TileError where the tile cannot be read.
    """
    pieces = list(_pieces(tile.window, piece_px))
    patches = {value: _Patches(tile.window) for value in dict.fromkeys(tile.nodata)}
    alpha_is_mask = tile.mask == "alpha"
    for piece in pieces:
        for value, opened_HW in _opened(tile, piece, tuple(patches)):
            patches[value].add(piece, opened_HW)
        if alpha_is_mask:
            alpha_HW = read_mask(tile, piece)
            alpha_is_mask = alpha_HW is not None and bool(((alpha_HW == 0) | (alpha_HW == 255)).all())
    kept = {value: found.kept(min_pixels) for value, found in patches.items()}
    masked = tile.mask == "per_dataset" or alpha_is_mask

    by_reason: dict[str, int] = {}
    invalid_px = 0
    for piece in pieces:
        invalid_HW = np.zeros(piece.shape_yx, np.bool_)
        wanted = tuple(value for value in patches if patches[value].ids(piece, kept[value]).any())
        for value, opened_HW in _opened(tile, piece, wanted):
            patch_HW = patches[value].ids(piece, kept[value])[_labels(opened_HW)]
            _count(by_reason, f"nodata {value:g}", patch_HW)
            invalid_HW |= patch_HW
        mask_HW = read_mask(tile, piece) if masked else None
        if mask_HW is not None:
            _count(by_reason, "mask band" if tile.mask == "per_dataset" else "alpha", mask_HW == 0)
            invalid_HW |= mask_HW == 0
        if invalid_HW.any():
            invalid_px += int(invalid_HW.sum())
            write_invalid(piece, invalid_HW)
    return Scan(invalid_px, by_reason)


class _Patches:
    """The 4-connected patches of one nodata value, gathered from pieces that come row by row, joined over their seams.

    Patches of a piece are numbered from 1 in its own labels; ids are these plus the patches of all pieces before it.
    """

    def __init__(self, tile_window: Window) -> None:
        self._window = tile_window
        self._count = 0
        self._first: dict[Window, tuple[int, int]] = {}  # piece: patches before it, patches in it
        self._sizes: list[NDArray[np.int64]] = []
        self._pairs: list[NDArray[np.int64]] = []
        # Ids along the last rows of the pieces above, along the last column of the piece to the left, and along the
        # four sides of the tile (top, bottom, left, right); 0 is no patch.
        self._above = np.zeros(tile_window.width, np.int64)
        self._left = np.zeros(0, np.int64)
        self._sides = [np.zeros(length, np.int64) for length in tile_window.shape_yx[::-1] for _ in range(2)]

    def add(self, piece: Window, opened_HW: NDArray[np.bool_]) -> None:
        """Take in the patches of the next piece."""
        labels_HW = _labels(opened_HW)
        sizes = np.bincount(labels_HW[opened_HW])[1:]

        def ids(line: NDArray[np.int32]) -> NDArray[np.int64]:
            return np.where(line > 0, line.astype(np.int64) + self._count, 0)

        rows, cols = piece.within(self._window)
        top, bottom = ids(labels_HW[0]), ids(labels_HW[-1])
        left, right = ids(labels_HW[:, 0]), ids(labels_HW[:, -1])
        self._join(self._above[cols], top)
        if cols.start > 0:
            self._join(self._left, left)
        self._above[cols], self._left = bottom, right
        if rows.start == 0:
            self._sides[0][cols] = top
        if rows.stop == self._window.height:
            self._sides[1][cols] = bottom
        if cols.start == 0:
            self._sides[2][rows] = left
        if cols.stop == self._window.width:
            self._sides[3][rows] = right
        self._first[piece] = self._count, len(sizes)
        self._sizes.append(sizes)
        self._count += len(sizes)

    def _join(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        facing = (one > 0) & (other > 0)
        self._pairs.append(np.unique(np.stack([one[facing], other[facing]], axis=1), axis=0))

    def kept(self, min_pixels: int) -> NDArray[np.bool_]:
        """True for the ids (index 0 is no patch) of patches that are large enough or run along a side."""
        if not self._count:
            return np.zeros(1, np.bool_)
        one, other = np.concatenate(self._pairs).T
        links = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(self._count + 1, self._count + 1))
        _, group = connected_components(links, directed=False)
        pixels = np.zeros(self._count + 1, np.int64)
        np.add.at(pixels, group[1:], np.concatenate(self._sizes))
        keep = pixels >= min_pixels
        for side in self._sides:
            # A run along a side is 4-connected in itself, so all of it is one patch.
            steps = np.diff(np.concatenate([[False], side > 0, [False]]).astype(np.int8))
            starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
            keep[group[side[starts[stops - starts >= min(EDGE_RUN_PX, len(side))]]]] = True
        kept: NDArray[np.bool_] = keep[group]
        kept[0] = False
        return kept

    def ids(self, piece: Window, by_id: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The part of by_id that belongs to a piece, by its own labels: index 0 is no patch."""
        first, count = self._first.get(piece, (0, 0))
        return np.concatenate([by_id[:1], by_id[first + 1 : first + 1 + count]])


def _pieces(window: Window, piece_px: int) -> Iterator[Window]:
    """The window cut into pieces from its upper left corner, row by row."""
    for row in range(window.row_off, window.row_stop, piece_px):
        for col in range(window.col_off, window.col_stop, piece_px):
            yield Window(row, col, piece_px, piece_px).intersect(window)


def _opened(tile: Tile, piece: Window, values: tuple[float, ...]) -> Iterator[tuple[float, NDArray[np.bool_]]]:
    """Candidates for each nodata value over a piece, opened by 5 x 5."""
    if not values:
        return
    seen = piece.pad(_REACH_PX).intersect(tile.window)
    samples_CHW = read_samples(tile, seen)
    for value in values:
        candidates_HW = _candidates(samples_CHW, value, tile.tolerance)
        opened_HW = np.zeros(piece.shape_yx, np.bool_)
        if candidates_HW.any():
            outside_HW = np.ones(piece.pad(_REACH_PX).shape_yx, np.bool_)
            outside_HW[seen.within(piece.pad(_REACH_PX))] = candidates_HW
            opened_HW = open_5x5(outside_HW)
        yield value, opened_HW


def _candidates(samples_CHW: NDArray[Any], value: float, tolerance: float) -> NDArray[np.bool_]:
    if math.isnan(value):
        return np.asarray(np.isnan(samples_CHW).all(axis=0))
    low, high = value - tolerance, value + tolerance
    if samples_CHW.dtype.kind in "iu":
        low, high = math.ceil(low), math.floor(high)
    candidates_HW = np.ones(samples_CHW.shape[1:], np.bool_)
    for band_HW in samples_CHW:
        candidates_HW &= band_HW >= low
        candidates_HW &= band_HW <= high
    return candidates_HW


def open_5x5(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Morphological opening by a square of 5 x 5, of what lies 4 px or more inside the mask: 8 px smaller each way."""
    for combine in (np.logical_and, np.logical_or):
        for _ in range(2):  # a square is a row of pixels after a column of them
            length = len(mask_HW) - 4
            column_HW = mask_HW[:length].copy()
            for shift in range(1, 5):
                combine(column_HW, mask_HW[shift : shift + length], out=column_HW)
            mask_HW = column_HW.T
    return mask_HW


def _labels(opened_HW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """4-connected components, from 1 in the order in which rows meet them."""
    labels_HW: NDArray[np.int32] = label(opened_HW)[0] if opened_HW.any() else np.zeros(opened_HW.shape, np.int32)
    return labels_HW


def _count(by_reason: dict[str, int], reason: str, invalid_HW: NDArray[np.bool_]) -> None:
    if invalid_HW.any():
        by_reason[reason] = by_reason.get(reason, 0) + int(invalid_HW.sum())
