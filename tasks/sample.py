"""Random crops of labelled areas, straight from the chunks of a store or from arrays in memory.

Axes: B batch, C bands, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .grid import Window


class Pixels(Protocol):
    """An array that can be read in pieces: numpy's and Zarr's arrays both are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of every axis."""

    def __getitem__(self, key: tuple[slice, ...], /) -> Any:
        """The values in the slices, as something that numpy takes for an array."""


@dataclass(frozen=True)
class Area:
    """Imagery with labels: a part of one image array and of two masks.

    image: uint8 (C, H, W). label: 1 (or any other value but 0) is a building, (H, W). valid: 0 where there is no image
    or no label, (H, W). window: the bounding box of the valid pixels, in rows and columns of these arrays.
    weight: how often the area is drawn, relative to others of equal valid_pixels.
    """

    name: str
    image: Pixels
    label: Pixels
    valid: Pixels
    window: Window
    valid_pixels: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.image.shape[1:] != self.label.shape or self.label.shape != self.valid.shape:
            shapes = f"image {self.image.shape[1:]}, label {self.label.shape}, valid {self.valid.shape}"
            raise ValueError(f"area {self.name}: expected image, label and valid of one size, got {shapes}")
        if self.valid_pixels < 1 or self.window.pixels < self.valid_pixels:
            raise ValueError(f"area {self.name}: {self.valid_pixels} valid pixels in {self.window}")

    @staticmethod
    def of_arrays(
        name: str,
        image_CHW: NDArray[np.uint8],
        label_HW: NDArray[np.uint8],
        valid_HW: NDArray[np.uint8],
        weight: float = 1.0,
    ) -> Area:
        """An area of arrays in memory; its window and its valid pixels are counted here."""
        rows, cols = np.flatnonzero(valid_HW.any(axis=1)), np.flatnonzero(valid_HW.any(axis=0))
        if not len(rows):
            raise ValueError(f"area {name}: no valid pixel")
        window = Window.between(int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1)
        return Area(name, image_CHW, label_HW, valid_HW, window, int(np.count_nonzero(valid_HW)), weight)


@dataclass(frozen=True)
class Crops:
    """A batch of crops. image uint8 BCHW, label and valid uint8 BHW, 0 or 1; invalid pixels are 0 in all three."""

    image_BCHW: NDArray[np.uint8]
    label_BHW: NDArray[np.uint8]
    valid_BHW: NDArray[np.uint8]


@dataclass(frozen=True)
class CropSampler:
    """Draws crops of crop_px, each with margin_px of its surroundings on all sides (for rotation and scale).

    An area is drawn with probability proportional to its weight times the square root of its valid pixels, so that a
    small town is not drowned by a large one. The crop lies at a random position inside the area's window; where the
    area is smaller than the crop, it lies at a random position inside the crop and the rest is invalid.
    """

    areas: Sequence[Area]
    crop_px: int
    margin_px: int = 0

    def __post_init__(self) -> None:
        if not self.areas:
            raise ValueError("no area to draw crops from")
        if self.crop_px < 1 or self.margin_px < 0:
            raise ValueError(f"crop_px {self.crop_px}, margin_px {self.margin_px}: expected at least 1 and 0")

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """How likely each area is to be drawn; the sum is 1."""
        weights = np.array([area.weight * np.sqrt(area.valid_pixels) for area in self.areas], np.float64)
        share: NDArray[np.float64] = weights / weights.sum()
        return share

    def draw(self, batch: int, rng: np.random.Generator) -> Crops:
        """The next crops: the same ones for the same state of rng."""
        picks = rng.choice(len(self.areas), size=batch, p=self.probabilities)
        crops = [_crop(self.areas[pick], self._place(self.areas[pick], rng)) for pick in picks]
        return Crops(*(np.stack(arrays) for arrays in zip(*crops, strict=True)))

    def _place(self, area: Area, rng: np.random.Generator) -> Window:
        row = _offset(area.window.row_off, area.window.height - self.crop_px, rng)
        col = _offset(area.window.col_off, area.window.width - self.crop_px, rng)
        return Window(row, col, self.crop_px, self.crop_px).pad(self.margin_px)


def _offset(start: int, room: int, rng: np.random.Generator) -> int:
    low, high = min(room, 0), max(room, 0)
    return start + int(rng.integers(low, high + 1))


def _crop(area: Area, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    bands = area.image.shape[0]
    inside = window.intersect(area.window)
    src = inside.within(Window(0, 0, *area.label.shape))
    dst = inside.within(window)
    image = np.zeros((bands, *window.shape_yx), np.uint8)
    label, valid = np.zeros(window.shape_yx, np.uint8), np.zeros(window.shape_yx, np.uint8)
    valid[dst] = np.asarray(area.valid[src]) != 0
    label[dst] = np.asarray(area.label[src]) != 0
    image[:, *dst] = np.asarray(area.image[slice(0, bands), *src])
    return image * valid, label * valid, valid
