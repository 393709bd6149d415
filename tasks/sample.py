"""Random crops of labelled areas, straight from the chunks of a store or from arrays in memory.

Axes: B batch, C bands, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .grid import Window

SCORED, CONTEXT = 1, 2
"""In `valid`: imagery with a label, and imagery without one, which is only looked at. 0: no imagery."""
TRIES = 8
"""Places that are tried for a crop until one holds a pixel to learn from."""
PIECE_PX = 2048


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

    image: uint8 (C, H, W). label: 1 (or any other value but 0) is a building, (H, W). valid: 0 where there is no image,
    2 where there is no label, else 1 (H, W). window: the bounding box of the labelled pixels, in rows and columns of
    these arrays; frame: that of all that may be looked at around them, None: the whole arrays. tiles: what the area was
    put together from. valid_pixels and positive_pixels: how many are labelled, and of those are buildings.
    weight: how often the area is drawn, relative to others of equal valid_pixels.
    """

    name: str
    image: Pixels
    label: Pixels
    valid: Pixels
    window: Window
    valid_pixels: int
    positive_pixels: int = 0
    weight: float = 1.0
    frame: Window | None = None
    tiles: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if self.image.shape[1:] != self.label.shape or self.label.shape != self.valid.shape:
            shapes = f"image {self.image.shape[1:]}, label {self.label.shape}, valid {self.valid.shape}"
            raise ValueError(f"area {self.name}: expected image, label and valid of one size, got {shapes}")
        if self.valid_pixels < 1 or self.window.pixels < self.valid_pixels:
            raise ValueError(f"area {self.name}: {self.valid_pixels} valid pixels in {self.window}")

    @property
    def whole(self) -> Window:
        """All that may be looked at."""
        return self.frame or Window(0, 0, *self.label.shape)

    @staticmethod
    def of_arrays(
        name: str,
        image_CHW: NDArray[np.uint8],
        label_HW: NDArray[np.uint8],
        valid_HW: NDArray[np.uint8],
        weight: float = 1.0,
    ) -> Area:
        """An area of arrays in memory; its window and its pixels are counted here."""
        found = count(label_HW, valid_HW)
        if found is None:
            raise ValueError(f"area {name}: no valid pixel")
        window, valid_px, positive_px = found
        return Area(name, image_CHW, label_HW, valid_HW, window, valid_px, positive_px, weight)

    def part(self, name: str, keep: Sequence[Window] = (), drop: Sequence[Window] = ()) -> Area | None:
        """The area with labels only in the windows of keep (none: everywhere) and outside those of drop.

        What is left out stays there to be looked at. None where no labelled pixel is left. Reads all of its masks.
        """
        masked = replace(self, name=name, valid=Masked(self.valid, tuple(keep), tuple(drop)))
        sums: list[tuple[Window, int, int]] = []
        for row, col in self.window.cells(PIECE_PX):
            piece = Window.cell(row, col, PIECE_PX).intersect(self.window)
            if keep and not any(piece.intersect(window).pixels for window in keep):
                continue
            key = piece.within(Window(0, 0, *self.label.shape))
            found = count(np.asarray(masked.label[key]), np.asarray(masked.valid[key]))
            if found is not None:
                box = found[0]
                at = Window(piece.row_off + box.row_off, piece.col_off + box.col_off, *box.shape_yx)
                sums.append((at, found[1], found[2]))
        if not sums:
            return None
        window = sums[0][0]
        for other, _, _ in sums[1:]:
            window = window.union(other)
        tiles = [t.intersect(k) for t in self.tiles for k in keep] if keep else self.tiles
        return replace(
            masked,
            window=window,
            valid_pixels=sum(n for _, n, _ in sums),
            positive_pixels=sum(n for _, _, n in sums),
            tiles=tuple(tile for tile in tiles if tile.pixels),
        )


@dataclass(frozen=True)
class Masked:
    """Validity of which a part counts: pixels outside keep (none: everywhere), or in drop, lose their label."""

    valid: Pixels
    keep: tuple[Window, ...]
    drop: tuple[Window, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W)."""
        return self.valid.shape

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[np.uint8]:
        """The values in the slices, which have a start and a stop."""
        valid_HW = np.array(self.valid[key], np.uint8)
        rows, cols = key
        window = Window.between(rows.start, cols.start, rows.stop, cols.stop)
        kept_HW = np.full(valid_HW.shape, not self.keep)
        for windows, value in ((self.keep, True), (self.drop, False)):
            for one in windows:
                kept_HW[one.intersect(window).within(window)] = value
        valid_HW[(valid_HW == SCORED) & ~kept_HW] = CONTEXT
        return valid_HW


def count(label_HW: NDArray[np.uint8], valid_HW: NDArray[np.uint8]) -> tuple[Window, int, int] | None:
    """Bounding box of the labelled pixels, their number, and that of buildings; None where there are none."""
    scored_HW = valid_HW == SCORED
    window = Window.around(scored_HW)
    if window is None:
        return None
    return window, int(np.count_nonzero(scored_HW)), int(np.count_nonzero(scored_HW & (label_HW != 0)))


@dataclass(frozen=True)
class Crops:
    """A batch of crops. image uint8 BCHW, label and valid uint8 BHW, 0 or 1; invalid pixels are 0 in all three."""

    image_BCHW: NDArray[np.uint8]
    label_BHW: NDArray[np.uint8]
    valid_BHW: NDArray[np.uint8]


@dataclass(frozen=True)
class CropSampler:
    """Draws crops of crop_px (a side, or height and width), each with margin_px of its surroundings on all sides.

    An area is drawn with probability proportional to its weight times the square root of its valid pixels, so that a
    small town is not drowned by a large one. The crop lies at a random position inside the area's window, where it
    holds a labelled pixel; where the area is smaller than the crop, it lies at a random position inside the crop and
    the rest is invalid. Pixels without a label are invalid.
    """

    areas: Sequence[Area]
    crop_px: int | tuple[int, int]
    margin_px: int = 0

    def __post_init__(self) -> None:
        if not self.areas:
            raise ValueError("no area to draw crops from")
        if min(self.shape_yx) < 1 or self.margin_px < 0:
            raise ValueError(f"crop_px {self.crop_px}, margin_px {self.margin_px}: expected at least 1 and 0")

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Height and width of a crop, without its margin."""
        return (self.crop_px, self.crop_px) if isinstance(self.crop_px, int) else self.crop_px

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """How likely each area is to be drawn; the sum is 1."""
        weights = np.array([area.weight * np.sqrt(area.valid_pixels) for area in self.areas], np.float64)
        share: NDArray[np.float64] = weights / weights.sum()
        return share

    def draw(self, batch: int, rng: np.random.Generator) -> Crops:
        """The next crops: the same ones for the same state of rng."""
        return self.cut(rng.choice(len(self.areas), size=batch, p=self.probabilities).tolist(), rng)

    def cut(self, picks: Sequence[int], rng: np.random.Generator) -> Crops:
        """A crop of each of the areas with these numbers."""
        crops = [self._crop(self.areas[pick], rng) for pick in picks]
        return Crops(*(np.stack(arrays) for arrays in zip(*crops, strict=True)))

    def _crop(
        self, area: Area, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        for _ in range(TRIES):
            window = self._place(area, rng)
            bare = window.intersect(area.window)
            if (np.asarray(area.valid[bare.within(Window(0, 0, *area.label.shape))]) == SCORED).any():
                break
        image_CHW, label_HW, valid_HW = cut(area, window.pad(self.margin_px))
        scored_HW = (valid_HW == SCORED).astype(np.uint8)
        return image_CHW * scored_HW, label_HW * scored_HW, scored_HW

    def _place(self, area: Area, rng: np.random.Generator) -> Window:
        height, width = self.shape_yx
        row = _offset(area.window.row_off, area.window.height - height, rng)
        col = _offset(area.window.col_off, area.window.width - width, rng)
        return Window(row, col, height, width)


def _offset(start: int, room: int, rng: np.random.Generator) -> int:
    low, high = min(room, 0), max(room, 0)
    return start + int(rng.integers(low, high + 1))


def cut(area: Area, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Image (C, H, W), label (0 or 1) and valid (0, 1 or 2) of any window of an area; all 0 where there is nothing."""
    bands = area.image.shape[0]
    inside = window.intersect(area.whole)
    src = inside.within(Window(0, 0, *area.label.shape))
    dst = inside.within(window)
    image = np.zeros((bands, *window.shape_yx), np.uint8)
    label, valid = np.zeros(window.shape_yx, np.uint8), np.zeros(window.shape_yx, np.uint8)
    if inside.pixels:
        valid[dst] = np.asarray(area.valid[src])
        label[dst] = np.asarray(area.label[src]) != 0
        image[:, *dst] = np.asarray(area.image[slice(0, bands), *src])
    present = valid != 0
    return image * present, label * present, valid


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch goes through what it takes once each: another one every epoch."""
    return np.random.default_rng((seed, 1, epoch)).permutation(count)


def cores(area: Area, core_px: int) -> Iterator[Window]:
    """Windows that cover an area's labelled pixels once each, cut at multiples of core_px from its frame's corner."""
    whole = area.whole
    own = Window(area.window.row_off - whole.row_off, area.window.col_off - whole.col_off, *area.window.shape_yx)
    for row, col in own.cells(core_px):
        core = Window(whole.row_off + row * core_px, whole.col_off + col * core_px, core_px, core_px)
        yield core.intersect(area.window)
