"""The rasters of a run: probability.tif and mask.tif, written in a thread of their own beside the footprints."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.tasks.errors import RunError
from segpipe.tasks.grid import Window
from segpipe.tasks.predict import INVALID
from segpipe.tasks.vectorize import FULL_U8, mask_of

from .allocator import give_freed_memory_back
from .rasters import PROBABILITY_SCALE, Look, reading_cog, write_cog
from .stages import Site, read_probability
from .storage import write_bytes
from .styles import PROBABILITY_QML, ramp_rgb

MOST_PART_PX = 4096
"""Side of the parts that rasters are read and written in, at most."""


@dataclass(frozen=True)
class Counts:
    """Of all probabilities of a city: pixels of the mask and valid ones, and the bounds of these, if there are any."""

    mask_px: int = 0
    valid_px: int = 0
    valid: Window | None = None

    def with_part(self, prob_HW: NDArray[np.uint8], window: Window, threshold_u8: int) -> Counts:
        """These and what is in one more window."""
        known = prob_HW != INVALID
        found = (self.valid, Window.around(known, window.row_off, window.col_off))
        valid = [it for it in found if it is not None]
        return Counts(
            self.mask_px + int(np.count_nonzero(mask_of(prob_HW, threshold_u8))),
            self.valid_px + int(np.count_nonzero(known)),
            reduce(Window.union, valid) if valid else None,
        )


@contextmanager
def writing_rasters(site: Site) -> Iterator[Counts]:
    """Write probability.tif and mask.tif beside what is done in the block; both are in place when it ends.

    The block begins when all probabilities have been read, and counted. RunError if a raster cannot be written. Where
    the block fails, what is being written is given up, at the end of the step that GDAL is at.
    """
    counted: Future[Counts] = Future()
    given_up = threading.Event()
    with ThreadPoolExecutor(1, "rasters") as thread:
        writing = thread.submit(_write_rasters, site, counted, given_up)
        either: tuple[Future[Any], ...] = (counted, writing)
        try:
            wait(either, return_when=FIRST_COMPLETED)
            if not counted.done():
                writing.result()
            yield counted.result()
            writing.result()
        finally:
            given_up.set()


def _write_rasters(site: Site, counted: Future[Counts], given_up: threading.Event) -> None:
    plan = site.plan
    folder, threshold_u8, missing_px = plan.output, plan.vector.threshold_u8, plan.bounds.pixels
    block_px, counts = min(plan.block_px, MOST_PART_PX), Counts()

    def go_on() -> None:
        if given_up.is_set():
            raise RunError("given up")

    def read_counted(window: Window) -> NDArray[np.uint8]:
        nonlocal counts, missing_px
        go_on()
        prob_HW = read_in_area(site, window)
        counts, missing_px = counts.with_part(prob_HW, window, threshold_u8), missing_px - window.pixels
        if not missing_px:
            counted.set_result(counts)
        return prob_HW

    write_cog(
        folder / "probability.tif",
        read_counted,
        plan.bounds,
        plan.lattice,
        resampling="average",
        block_px=block_px,
        look=Look(PROBABILITY_SCALE, {value: ramp_rgb(value * PROBABILITY_SCALE) for value in range(FULL_U8 + 1)}),
    )
    write_bytes(folder / "probability.qml", PROBABILITY_QML.encode())
    give_freed_memory_back()
    # From the raster, which has been compared with what was read: the store is read once, chunk by chunk.
    with reading_cog(folder / "probability.tif", plan.bounds) as read:

        def read_mask(window: Window) -> NDArray[np.uint8]:
            go_on()
            return _mask_or_invalid(read(window), threshold_u8)

        write_cog(folder / "mask.tif", read_mask, plan.bounds, plan.lattice, resampling="mode", block_px=block_px)
    give_freed_memory_back()


def _mask_or_invalid(prob_HW: NDArray[np.uint8], threshold_u8: int) -> NDArray[np.uint8]:
    """1 where there is a building, 0 where there is none, 255 where nothing is known."""
    return np.where(prob_HW == INVALID, np.uint8(INVALID), mask_of(prob_HW, threshold_u8).astype(np.uint8))


def read_in_area(site: Site, window: Window) -> NDArray[np.uint8]:
    """prob_HW of a window as it is published: what lies outside the area is invalid too."""
    prob_HW, area = read_probability(site, window), site.plan.area
    return prob_HW if area is None else np.where(area.inside(window), prob_HW, np.uint8(INVALID))
