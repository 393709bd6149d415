"""The rasters of a run: probability.tif and mask.tif, written in a thread beside the joins and the footprints."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
from .lock import check_lock
from .rasters import PROBABILITY_SCALE, Look, reading_cog, write_cog
from .stages import Site, read_probability
from .storage import LocalFolder, write_bytes
from .styles import PROBABILITY_QML, ramp_rgb

MOST_PART_PX = 2048
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


class Rasters:
    """The rasters of a run on their way, in a thread: nothing is in place until they may go on.

    Before that all probabilities are read into a file beside, while workers may still be at work. GDAL's own steps
    come after: some hold the interpreter, on which the scheduler of the workers would wait.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._counted: Future[Counts] = Future()
        self._may_go_on, self._given_up = threading.Event(), threading.Event()
        self._thread = ThreadPoolExecutor(1, "rasters")
        self._written = self._thread.submit(self._write)

    def go_on(self) -> Counts:
        """Let them be finished; gives what was counted, when all is read. RunError if that fails."""
        self._may_go_on.set()
        either: tuple[Future[Any], ...] = (self._counted, self._written)
        wait(either, return_when=FIRST_COMPLETED)
        if not self._counted.done():
            self._written.result()
        return self._counted.result()

    def finish(self) -> None:
        """Wait until both are in place. RunError if one cannot be written."""
        self._written.result()

    def close(self) -> None:
        """Give up what is not finished, at the end of the step that GDAL is at."""
        self._given_up.set()
        self._may_go_on.set()
        self._thread.shutdown()

    def _write(self) -> None:
        plan = self._site.plan
        folder, block_px = plan.output, min(plan.block_px, MOST_PART_PX)
        colours = {value: ramp_rgb(value * PROBABILITY_SCALE) for value in range(FULL_U8 + 1)}
        write_cog(
            folder / "probability.tif",
            self._counting(plan.bounds.pixels, plan.vector.threshold_u8),
            plan.bounds,
            plan.lattice,
            resampling="average",
            block_px=block_px,
            look=Look(PROBABILITY_SCALE, colours),
            stop_if_given_up=self._stop_if_given_up,
        )
        write_bytes(folder / "probability.qml", PROBABILITY_QML.encode())
        give_freed_memory_back()
        # From the raster, which has been compared with what was read: the store is read once, chunk by chunk.
        with reading_cog(folder / "probability.tif", plan.bounds) as read:
            write_cog(
                folder / "mask.tif",
                lambda window: _mask_or_invalid(read(window), plan.vector.threshold_u8),
                plan.bounds,
                plan.lattice,
                resampling="mode",
                block_px=block_px,
                stop_if_given_up=self._stop_if_given_up,
            )
        give_freed_memory_back()

    def _counting(self, missing_px: int, threshold_u8: int) -> Callable[[Window], NDArray[np.uint8]]:
        """Reads probabilities, which are counted; the last ones come when the rasters may go on."""
        counts = Counts()

        def read(window: Window) -> NDArray[np.uint8]:
            nonlocal counts, missing_px
            prob_HW = read_in_area(self._site, window)
            counts, missing_px = counts.with_part(prob_HW, window, threshold_u8), missing_px - window.pixels
            if not missing_px:
                self._counted.set_result(counts)
                self._may_go_on.wait()
            return prob_HW

        return read

    def _stop_if_given_up(self) -> None:
        if self._given_up.is_set():
            raise RunError("given up")
        # Of a run in a bucket the rasters are still here, where they are in nobody's way.
        if isinstance(self._site.folder, LocalFolder):
            check_lock(self._site.folder, self._site.plan.lock)


def _mask_or_invalid(prob_HW: NDArray[np.uint8], threshold_u8: int) -> NDArray[np.uint8]:
    """1 where there is a building, 0 where there is none, 255 where nothing is known."""
    return np.where(prob_HW == INVALID, np.uint8(INVALID), mask_of(prob_HW, threshold_u8).astype(np.uint8))


def read_in_area(site: Site, window: Window) -> NDArray[np.uint8]:
    """prob_HW of a window as it is published: what lies outside the area is invalid too."""
    prob_HW, area = read_probability(site, window), site.plan.area
    return prob_HW if area is None else np.where(area.inside(window), prob_HW, np.uint8(INVALID))
