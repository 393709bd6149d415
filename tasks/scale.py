"""Scale: samples of any type to the 8 bits that a network takes, by one pair of values for a whole city.

Axes: C band, H row, W column. One pair holds for all bands, so that colours keep their balance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .grid import Window
from .read import Tile, read_mask, read_samples

PERCENTILES = (2.0, 98.0)
SAMPLE_SIDE_PX = 64
SAMPLES_PER_SIDE = 3
WAITING_KEYS = 2_000_000  # counts of single tiles that are held before they are added up


@dataclass(frozen=True)
class Scale:
    """The sample values that become 0 and 255."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"scale [{self.low:g}, {self.high:g}]: expected two finite numbers, the lower one first")

    def to_u8(self, samples_CHW: NDArray[Any]) -> NDArray[np.uint8]:
        """round((sample - low) / (high - low) * 255), halves to even, clipped to 0 and 255; NaN becomes 0."""
        if samples_CHW.dtype == np.uint8 and (self.low, self.high) == (0, 255):
            return samples_CHW
        if samples_CHW.dtype in (np.uint8, np.uint16):
            # Each value that there is, once: it is looked up, and equals what the formula gives.
            table = self._by_formula(np.arange(np.iinfo(samples_CHW.dtype).max + 1))
            scaled_CHW: NDArray[np.uint8] = table[samples_CHW]
            return scaled_CHW
        # Band by band: the samples in double precision take eight times the memory of the result.
        return np.stack([self._by_formula(band_HW) for band_HW in samples_CHW])

    def _by_formula(self, samples: NDArray[Any]) -> NDArray[np.uint8]:
        with np.errstate(over="ignore"):
            parts = (samples.astype(np.float64) - self.low) / (self.high - self.low)
        # Clipped before it is rounded: infinite and far values too; what is NaN is 0.
        steps = np.rint(np.clip(parts, 0, 1) * 255)
        scaled: NDArray[np.uint8] = np.where(np.isnan(steps), 0, steps).astype(np.uint8)
        return scaled


def sample_values(tile: Tile) -> NDArray[Any]:
    """Values of a tile's selected bands at a few fixed places, in its own dtype: one dimension, all bands together.

    3 x 3 windows of 64 px, spread over the tile from edge to edge by its size alone, are read; of a smaller tile all of
    it. Left out are pixels where a band is not finite, where all bands lie within the tile's tolerance of a nodata
    value, and where a mask or an alpha band is 0. Raises TileError where the tile cannot be read.
    """
    found = []
    for window in sample_windows(tile.window):
        samples_CHW = read_samples(tile, window)
        good_HW = np.isfinite(samples_CHW).all(axis=0)
        for value in tile.nodata:
            # In double precision: the difference of unsigned samples would wrap around.
            good_HW &= ~(np.abs(samples_CHW.astype(np.float64) - value) <= tile.tolerance).all(axis=0)
        mask_HW = read_mask(tile, window)
        if mask_HW is not None:
            good_HW &= mask_HW != 0
        found.append(samples_CHW[:, good_HW].ravel())
    return np.concatenate(found)


def sample_windows(tile_window: Window) -> list[Window]:
    """Where a tile is sampled, on the lattice: windows that do not overlap, row by row."""

    def starts(off: int, length: int) -> list[tuple[int, int]]:
        if length <= SAMPLE_SIDE_PX * SAMPLES_PER_SIDE:
            return [(off, length)]
        step = (length - SAMPLE_SIDE_PX) // (SAMPLES_PER_SIDE - 1)
        return [(off + index * step, SAMPLE_SIDE_PX) for index in range(SAMPLES_PER_SIDE)]

    return [
        Window(row, col, height, width)
        for row, height in starts(tile_window.row_off, tile_window.height)
        for col, width in starts(tile_window.col_off, tile_window.width)
    ]


def percentile_scale(samples: Iterable[NDArray[Any]], percentiles: tuple[float, float] = PERCENTILES) -> Scale:
    """The scale from the lower to the upper percentile of all samples together: the same for any order and grouping.

    samples: finite values, an array a tile (`sample_values`). They are counted by value: integers up to 17 bits
    exactly, others rounded down to 1 part in 65,536. A percentile is the smallest value that this share of all values
    does not exceed (nearest rank).

    Raises UserError where there is no value, or where both percentiles are the same.
    """
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for values in samples:
        waiting.append(np.unique(_keys(values), return_counts=True))
        if sum(len(some) for some, _ in waiting) > WAITING_KEYS:
            keys, counts = _added([(keys, counts), *waiting])
            waiting = []
    keys, counts = _added([(keys, counts), *waiting])
    if not len(keys):
        raise UserError("scale: auto, but no valid pixel was found in any tile; cure: `scale: [low, high]`")
    below = np.cumsum(counts)
    # In whole numbers: a share of a count must not depend on how it rounds.
    ranks = [max(1, -(-round(percentile * 1000) * int(below[-1]) // 100_000)) for percentile in percentiles]
    low, high = (float(value) for value in _values(keys[np.searchsorted(below, ranks)]))
    if low >= high:
        raise UserError(
            f"scale: auto, but the percentiles {percentiles[0]:g} and {percentiles[1]:g} of the samples are both"
            f" {low:g}; expected two values; cure: `scale: [low, high]`"
        )
    return Scale(low, high)


def _added(parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts by key, added up: keys in ascending order."""
    keys, place = np.unique(np.concatenate([some for some, _ in parts]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, place, np.concatenate([some for _, some in parts]))
    return keys, counts


def _keys(values: NDArray[Any]) -> NDArray[np.int64]:
    """Integers in the order of the values: the bits of float32 in sign and magnitude, less the last 7 of 23 places."""
    limits = np.finfo(np.float32)
    singles = np.clip(values.astype(np.float64), limits.min, limits.max).astype(np.float32)
    bits = singles.view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) >> 7


def _values(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    """The smallest value that has each key."""
    bits = keys << 7
    signed = np.where(bits >= 0, bits, -bits | 0x80000000).astype(np.uint32)
    return signed.view(np.float32)
