"""Validity: which pixels of a tile are no imagery. Decided once per tile, on the whole of it, before any cut.

Axes: C band, H row, W column. Patches are counted in the tile's own pixels, whatever the pieces in which it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
HELD_BYTES = 2**24  # of the patches of one nodata value, a bit a pixel
_REACH_PX = 4  # an opening by 5 x 5 sees two pixels for the erosion and two for the dilation

# What tells a collar that went through JPEG from one that did not (`collar_is_speckled`). Measured on Banepa's tiles,
# and on collars of 10 px and more drawn into three towns and put through JPEG of quality 75 to 95 or lossy JPEG 2000:
# a share of 0.72 to 1 and a depth of 1.4 px or more, also where the tile was shifted by part of a pixel after that.
# Clean collars: a share of at most 0.04. White areas at an edge of imagery that is heavily overexposed can pass.
FRINGE_SHARE = 0.7
FRINGE_DEPTH = 1.25
THIN_PX = 16  # JPEG works on 8 x 8 pixels, on 16 x 16 where colours are halved: no thinner collar has an exact part
THIN_RUN_PX = 256


@dataclass(frozen=True)
class Scan:
    """What a scan found: pixels that are invalid in all, and by reason. A pixel with two reasons counts under both."""

    invalid_px: int
    by_reason: dict[str, int]


@dataclass(frozen=True)
class Collar:
    """A patch of pixels near a nodata value that runs along a tile's side.

    pixels: of the patch; exact: those that are the nodata value itself. near and far count the sides of exact pixels
    (opened by 5 x 5) towards a pixel of the tile that is near the value and not it, and towards one that is not near.
    thin: runs along 256 px of a side or along the whole of it, and is 16 px deep on average or less.
    """

    pixels: int
    exact: int
    near: int
    far: int
    thin: bool


def collar_is_speckled(collars: Sequence[Collar]) -> bool:
    """True if a tile's collars of one nodata value look as if they had been through JPEG, whatever the file says now.

    A lossless collar ends where its exact pixels end. JPEG leaves a fringe of ringing between them and the imagery,
    nearly all along and several pixels deep; a dark lake or a shadow that meets a collar does so for a part of it, the
    blurred rim of a white roof is a pixel deep. A collar that is too thin for exact pixels is a strip of speckle.
    """
    near, far = sum(it.near for it in collars), sum(it.far for it in collars)
    unlike = sum(it.pixels - it.exact for it in collars)
    fringe = near >= max(EDGE_RUN_PX, FRINGE_SHARE * (near + far)) and unlike >= FRINGE_DEPTH * (near + far)
    return fringe or any(it.thin and it.pixels // 50 <= it.exact <= it.pixels // 2 for it in collars)


def resolve_tolerance(setting: Literal["auto"] | float, header: TileHeader) -> float:
    """Largest distance from a nodata value, in sample units: for auto 12 in lossy tiles of 8 bits, 0 in all others."""
    if setting != "auto":
        return float(setting)
    return LOSSY_TOLERANCE if header.lossy and header.dtype == "uint8" else 0.0


def resolve_speckle_tolerance(setting: Literal["auto"] | float, header: TileHeader) -> float:
    """The tolerance that a tile gets if its pixels show a speckled collar; 0 where that is not looked for."""
    return LOSSY_TOLERANCE if setting == "auto" and not header.lossy and header.dtype == "uint8" else 0.0


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
    of the tile, or along the whole of a shorter side. If the tile's collar of any nodata value is speckled
    (`collar_is_speckled`), its speckle_tolerance takes the place of its tolerance for all of them.

    A pixel with NaN in any selected band is invalid by itself. Mask bands are taken as they are: invalid where 0. So is
    an alpha band if it is 0 or opaque everywhere (255, or all bits set); other alpha bands are imagery that was
    mislabelled, and are ignored.

    write_invalid(window, mask) is called once for each piece that has invalid pixels, with its window in the frame of
    the tile's and the mask (True is invalid) of that shape. Memory is bounded by piece_px squared, and what is found
    does not depend on piece_px. A tile is read once, and a second time where it may have a speckled collar; what has
    found no room in HELD_BYTES is read again. Raises TileError where the tile cannot be read.
    """
    pieces = list(_pieces(tile.window, piece_px))
    look = _look(tile, pieces)
    kept = {value: patches.kept(min_pixels) for value, patches in look.patches.items()}
    masked = tile.mask == "per_dataset" or look.alpha_is_mask

    by_reason: dict[str, int] = {}
    invalid_px = 0
    for piece in pieces:
        invalid_HW = np.zeros(piece.shape_yx, np.bool_)
        seen = _see(tile, piece) if piece in look.with_nan else None
        for value, patches in look.patches.items():
            kept_here = patches.ids(piece, kept[value])
            if not kept_here.any():
                continue
            opened_HW = patches.opened(piece)
            if opened_HW is None:
                seen = seen or _see(tile, piece)
                opened_HW = _opened(seen, _candidates(seen.samples_CHW, value, look.tolerance))
            patch_HW = kept_here[_labels(opened_HW)]
            _count(by_reason, f"nodata {value:g}" + (", speckled" if look.speckled else ""), patch_HW)
            invalid_HW |= patch_HW
        if piece in look.with_nan:
            assert seen is not None
            _count(by_reason, "nan", seen.nan())
            invalid_HW |= seen.nan()
        mask_HW = read_mask(tile, piece) if masked else None
        if mask_HW is not None:
            _count(by_reason, "mask band" if tile.mask == "per_dataset" else "alpha", mask_HW == 0)
            invalid_HW |= mask_HW == 0
        if invalid_HW.any():
            invalid_px += int(invalid_HW.sum())
            write_invalid(piece, invalid_HW)
    return Scan(invalid_px, by_reason)


@dataclass(frozen=True)
class _Look:
    """What the first pass over a tile found. patches: by nodata value, of the candidates within tolerance."""

    patches: dict[float, _Patches]
    tolerance: float
    speckled: bool
    with_nan: frozenset[Window]
    alpha_is_mask: bool


def _look(tile: Tile, pieces: Sequence[Window]) -> _Look:
    """The first pass: gather the patches, and decide what only the whole tile can tell."""
    values = [value for value in dict.fromkeys(tile.nodata) if not math.isnan(value)]
    exact = {value: _Patches(tile.window) for value in values}
    near_sides = {value: _no_sides(tile.window, np.bool_) for value in values if tile.speckle_tolerance}
    corner = Window(tile.window.row_off, tile.window.col_off, 1, 1)
    floats = read_samples(tile, corner).dtype.kind == "f"
    with_nan: set[Window] = set()
    opaque: set[int] | None = None  # the values that may be the alpha band's other one besides 0
    for piece in pieces:
        if values or floats:
            seen = _see(tile, piece)
            if floats and seen.nan().any():
                with_nan.add(piece)
            for value, patches in exact.items():
                patches.add(piece, _opened(seen, _candidates(seen.samples_CHW, value, tile.tolerance)))
            for value, sides in near_sides.items():
                for number, part, line in _along_sides(piece, tile.window):
                    samples = seen.inner()[(slice(None), *line)]
                    sides[number][part] = _candidates(samples, value, tile.speckle_tolerance)
        if tile.mask == "alpha" and opaque != set():
            opaque = _opaque(read_mask(tile, piece), opaque)
    # Patches near a value are gathered only where one may be a collar: most tiles are read once.
    runs = [(len(side), _runs(side)[1]) for sides in near_sides.values() for side in sides]
    collared = any((lengths >= min(EDGE_RUN_PX, side)).any() for side, lengths in runs)
    near = _look_near(tile, pieces, values) if collared else {}
    speckled = any(collar_is_speckled(patches.collars()) for patches in near.values())
    return _Look(
        patches=near if speckled else exact,
        tolerance=tile.speckle_tolerance if speckled else tile.tolerance,
        speckled=speckled,
        with_nan=frozenset(with_nan),
        alpha_is_mask=bool(opaque),
    )


def _look_near(tile: Tile, pieces: Sequence[Window], values: Sequence[float]) -> dict[float, _Patches]:
    """The patches within speckle_tolerance of each value, and what is counted in their fringe."""
    near = {value: _Patches(tile.window) for value in values}
    for piece in pieces:
        seen = _see(tile, piece)
        for value, patches in near.items():
            exact_HW = _candidates(seen.samples_CHW, value, tile.tolerance)
            near_HW = _candidates(seen.samples_CHW, value, tile.speckle_tolerance)
            patches.add(piece, _opened(seen, near_HW), _fringe(seen, _opened(seen, exact_HW), exact_HW, near_HW))
    return near


def _opaque(alpha_HW: NDArray[Any] | None, among: set[int] | None) -> set[int]:
    """Those among the values (None: 255 and all bits set) for which the alpha samples are either it or 0."""
    if alpha_HW is None:
        return set()
    if among is None:
        among = {255, int(np.iinfo(alpha_HW.dtype).max)} if alpha_HW.dtype.kind in "iu" else {255}
    return {value for value in among if ((alpha_HW == 0) | (alpha_HW == value)).all()}


class _Patches:
    """The 4-connected patches of one nodata value, gathered from pieces that come row by row, joined over their seams.

    Patches of a piece are numbered from 1 in its own labels; ids are these plus the patches of all pieces before it.
    Counts are pixels and, where a fringe is given, what it counts: they are summed over a patch's pixels.
    """

    def __init__(self, tile_window: Window) -> None:
        self._window = tile_window
        self._count = 0
        self._first: dict[Window, tuple[int, int]] = {}  # piece: patches before it, patches in it
        self._counts: list[NDArray[np.int64]] = []
        self._pairs: list[NDArray[np.int64]] = []
        # Ids along the last rows of the pieces above, along the last column of the piece to the left, and along the
        # four sides of the tile (top, bottom, left, right); 0 is no patch.
        self._above = np.zeros(tile_window.width, np.int64)
        self._left = np.zeros(0, np.int64)
        self._sides = _no_sides(tile_window, np.int64)
        self._bits: dict[Window, tuple[Window, NDArray[np.uint8]]] = {}  # piece: where patches are, and which pixels
        self._bytes_left = HELD_BYTES

    def add(self, piece: Window, opened_HW: NDArray[np.bool_], fringe: Sequence[NDArray[np.uint8]] = ()) -> None:
        """Take in the patches of the next piece."""
        self._hold(piece, opened_HW)
        labels_HW = _labels(opened_HW)
        inside = labels_HW[opened_HW]
        sums = [np.bincount(inside), *(np.bincount(inside, weights=of_HW[opened_HW]) for of_HW in fringe)]
        counts = np.stack(sums, axis=1)[1:].astype(np.int64)

        def ids(line: NDArray[np.int32]) -> NDArray[np.int64]:
            return np.where(line > 0, line.astype(np.int64) + self._count, 0)

        _, cols = piece.within(self._window)
        top, bottom = ids(labels_HW[0]), ids(labels_HW[-1])
        left, right = ids(labels_HW[:, 0]), ids(labels_HW[:, -1])
        self._join(self._above[cols], top)
        if cols.start > 0:
            self._join(self._left, left)
        self._above[cols], self._left = bottom, right
        for number, part, line in _along_sides(piece, self._window):
            self._sides[number][part] = ids(labels_HW[line])
        self._first[piece] = self._count, len(counts)
        self._counts.append(counts)
        self._count += len(counts)

    def _hold(self, piece: Window, opened_HW: NDArray[np.bool_]) -> None:
        bounds = _bounds(opened_HW)
        if bounds.pixels <= 8 * self._bytes_left:
            bits = np.packbits(opened_HW[bounds.within(_frame(opened_HW))])
            self._bits[piece] = bounds, bits
            self._bytes_left -= bits.nbytes

    def opened(self, piece: Window) -> NDArray[np.bool_] | None:
        """The pixels of a piece that belong to patches; None where there was no room to hold them."""
        if piece not in self._bits:
            return None
        bounds, bits = self._bits[piece]
        opened_HW = np.zeros(piece.shape_yx, np.bool_)
        inner_HW = np.unpackbits(bits, count=bounds.pixels).reshape(bounds.shape_yx)
        opened_HW[bounds.within(_frame(opened_HW))] = inner_HW
        return opened_HW

    def _join(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        facing = (one > 0) & (other > 0)
        self._pairs.append(np.unique(np.stack([one[facing], other[facing]], axis=1), axis=0))

    @cached_property
    def _groups(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """By id, the number of the whole patch that it belongs to; by that number, the counts of the whole patch."""
        one, other = np.concatenate(self._pairs).T
        links = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(self._count + 1, self._count + 1))
        number, group = connected_components(links, directed=False)
        counts = np.concatenate(self._counts)
        totals = np.zeros((number, counts.shape[1]), np.int64)
        np.add.at(totals, group[1:], counts)
        return group, totals

    def _side_runs(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64], int]]:
        """For each side of the tile its runs: the whole patch that each belongs to, its length, the side's length."""
        group, _ = self._groups
        for side in self._sides:
            # A run along a side is 4-connected in itself, so all of it is one patch.
            starts, lengths = _runs(side > 0)
            yield group[side[starts]], lengths, len(side)

    def kept(self, min_pixels: int) -> NDArray[np.bool_]:
        """True for the ids (index 0 is no patch) of patches that are large enough or run along a side."""
        if not self._count:
            return np.zeros(1, np.bool_)
        group, totals = self._groups
        keep = totals[:, 0] >= min_pixels
        for patch, length, side in self._side_runs():
            keep[patch[length >= min(EDGE_RUN_PX, side)]] = True
        kept: NDArray[np.bool_] = keep[group]
        kept[0] = False
        return kept

    def collars(self) -> list[Collar]:
        """The patches that run along a side, with what was counted in their fringe."""
        if not self._count:
            return []
        _, totals = self._groups
        along, thin = np.zeros((2, len(totals)), np.bool_)
        for patch, length, side in self._side_runs():
            along[patch[length >= min(EDGE_RUN_PX, side)]] = True
            thin[patch[(length >= min(THIN_RUN_PX, side)) & (totals[patch, 0] <= THIN_PX * length)]] = True
        rows = zip(totals[along].tolist(), thin[along].tolist(), strict=True)
        return [Collar(pixels, exact, near, far, is_thin) for (pixels, exact, near, far), is_thin in rows]

    def ids(self, piece: Window, by_id: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The part of by_id that belongs to a piece, by its own labels: index 0 is no patch."""
        first, count = self._first.get(piece, (0, 0))
        return np.concatenate([by_id[:1], by_id[first + 1 : first + 1 + count]])


def _pieces(window: Window, piece_px: int) -> Iterator[Window]:
    """The window cut into pieces from its upper left corner, row by row."""
    for row in range(window.row_off, window.row_stop, piece_px):
        for col in range(window.col_off, window.col_stop, piece_px):
            yield Window(row, col, piece_px, piece_px).intersect(window)


def _no_sides(window: Window, dtype: type[np.generic]) -> list[NDArray[Any]]:
    """Zeros along the four sides of a window: top, bottom, left, right."""
    return [np.zeros(length, dtype) for length in window.shape_yx[::-1] for _ in range(2)]


def _along_sides(piece: Window, window: Window) -> Iterator[tuple[int, slice, tuple[int | slice, int | slice]]]:
    """Where a piece meets the sides of its window: the side's number, the part of the side, the line in the piece."""
    rows, cols = piece.within(window)
    if rows.start == 0:
        yield 0, cols, (0, slice(None))
    if rows.stop == window.height:
        yield 1, cols, (-1, slice(None))
    if cols.start == 0:
        yield 2, rows, (slice(None), 0)
    if cols.stop == window.width:
        yield 3, rows, (slice(None), -1)


def _runs(line: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the runs of True in a line start, and how long they are."""
    steps = np.diff(np.concatenate([[False], line, [False]]).astype(np.int8))
    starts = np.flatnonzero(steps == 1)
    return starts, np.flatnonzero(steps == -1) - starts


def _see(tile: Tile, piece: Window) -> _Seen:
    """Read a piece of a tile and as much around it as an opening sees."""
    around = piece.pad(_REACH_PX).intersect(tile.window)
    return _Seen(piece, around, read_samples(tile, around))


@dataclass(frozen=True)
class _Seen:
    """The samples over a piece and around it."""

    piece: Window
    around: Window
    samples_CHW: NDArray[Any]

    def inner(self) -> NDArray[Any]:
        """The samples over the piece alone."""
        rows, cols = self.piece.within(self.around)
        return self.samples_CHW[:, rows, cols]

    def nan(self) -> NDArray[np.bool_]:
        """Over the piece: True where any band is NaN."""
        return np.asarray(np.isnan(self.inner()).any(axis=0))


def _candidates(samples: NDArray[Any], value: float, tolerance: float) -> NDArray[np.bool_]:
    """True where all bands (the first axis) lie within tolerance of value, both in the samples' own units."""
    dtype = samples.dtype
    low, high = value - tolerance, value + tolerance
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not limits.min <= high or not low <= limits.max:
            return np.zeros(samples.shape[1:], np.bool_)
        low, high = math.ceil(max(low, limits.min)), math.floor(min(high, limits.max))
    elif dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite in it
            low, high = dtype.type(low), dtype.type(high)
    candidates = np.ones(samples.shape[1:], np.bool_)
    for band in samples:
        # Of integers all are at least the least that there is, and at most the largest.
        if dtype.kind not in "iu" or low > limits.min:
            candidates &= band >= low
        if dtype.kind not in "iu" or high < limits.max:
            candidates &= band <= high
    return candidates


def _opened(seen: _Seen, candidates_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Candidates over a piece, opened by 5 x 5; they are given around it too."""
    opened_HW = np.zeros(seen.piece.shape_yx, np.bool_)
    frame = _frame(candidates_HW)
    piece = Window(seen.piece.row_off - seen.around.row_off, seen.piece.col_off - seen.around.col_off, *opened_HW.shape)
    # Only candidates are opened, and what decides of one lies within reach of it.
    bounds = _bounds(candidates_HW).intersect(piece)
    if bounds.pixels:
        padded = bounds.pad(_REACH_PX)
        outside_HW = np.ones(padded.shape_yx, np.bool_)
        inner = padded.intersect(frame)
        outside_HW[inner.within(padded)] = candidates_HW[inner.within(frame)]
        opened_HW[bounds.within(piece)] = open_5x5(outside_HW)
    return opened_HW


def _frame(mask_HW: NDArray[np.bool_]) -> Window:
    """The whole of a mask, counted from its own corner."""
    return Window(0, 0, *mask_HW.shape)


def _bounds(mask_HW: NDArray[np.bool_]) -> Window:
    """The smallest window around what is True in a mask, counted from its corner; of no pixels where nothing is."""
    return Window.around(mask_HW) or Window(0, 0, 0, 0)


def _fringe(
    seen: _Seen, opened_HW: NDArray[np.bool_], exact_HW: NDArray[np.bool_], near_HW: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """What a collar counts besides its pixels (`Collar`), for each pixel of a piece: exact, near, far.

    opened_HW are the exact pixels after opening, over the piece; exact_HW and near_HW are given around it too.
    """
    padded = seen.piece.pad(1)
    within = padded.intersect(seen.around)
    near_beside_HW, far_beside_HW = np.zeros((2, *padded.shape_yx), np.bool_)
    near_beside_HW[within.within(padded)] = (near_HW & ~exact_HW)[within.within(seen.around)]
    far_beside_HW[within.within(padded)] = ~near_HW[within.within(seen.around)]
    exact = exact_HW[seen.piece.within(seen.around)].astype(np.uint8)
    return exact, _sides(opened_HW, near_beside_HW), _sides(opened_HW, far_beside_HW)


def _sides(of_HW: NDArray[np.bool_], beside_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """How many of its four neighbours in beside_HW, which is 1 px larger on each side, each pixel of of_HW has."""
    sides_HW = np.zeros(of_HW.shape, np.uint8)
    if of_HW.any():
        for shifted_HW in (beside_HW[:-2, 1:-1], beside_HW[2:, 1:-1], beside_HW[1:-1, :-2], beside_HW[1:-1, 2:]):
            sides_HW += of_HW & shifted_HW
    return sides_HW


def open_5x5(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Morphological opening by a square of 5 x 5, of what lies 4 px or more inside the mask: 8 px smaller each way."""
    for combine in (np.logical_and, np.logical_or):
        for _ in range(2):  # a square is a row of pixels after a column of them
            two_HW = combine(mask_HW[:-1], mask_HW[1:])
            four_HW = combine(two_HW[:-2], two_HW[2:])
            mask_HW = combine(four_HW[:-1], mask_HW[4:]).T
    return mask_HW


def _labels(opened_HW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """4-connected components, from 1 in the order in which rows meet them."""
    labels_HW = np.zeros(opened_HW.shape, np.int32)
    part = _bounds(opened_HW).within(_frame(opened_HW))
    label(opened_HW[part], output=labels_HW[part])
    return labels_HW


def _count(by_reason: dict[str, int], reason: str, invalid_HW: NDArray[np.bool_]) -> None:
    if invalid_HW.any():
        by_reason[reason] = by_reason.get(reason, 0) + int(invalid_HW.sum())
