"""The regions of a mask as exact polygons, cell by cell, whole also where they cross cells.

What is vectorized here is a published mask, not probabilities: to be compared with footprints, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segpipe.tasks.fragments import border_from_bytes, fragment_to_bytes, sides_from_bytes
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.seams import collect, join, plan_joins
from segpipe.tasks.vectorize import FULL_U8, Components, VectorSettings, vectorize_block


def regions(
    windows: Iterable[Window], read: Callable[[Window], NDArray[np.bool_]], lattice: Lattice, folder: Path
) -> Iterator[Components]:
    """All 4-connected regions of a mask, some at a time: first those inside of a window, then those across.

    windows: cover the mask, row by row, and do not overlap. read gives the mask_HW of one. folder: an empty one, for
    what is kept of each window, so that only one is in memory at a time.
    """
    settings = VectorSettings(threshold_u8=FULL_U8, min_area_m2=0, fill_holes_m2=0, simplify_m=0)
    seen: list[Window] = []
    for window in windows:
        prob_HW = read(window).astype(np.uint8) * np.uint8(FULL_U8)
        fragment = vectorize_block(prob_HW, window, lattice, settings)
        yield fragment.finished
        (folder / str(len(seen))).write_bytes(fragment_to_bytes(fragment))
        seen.append(window)

    def kept(index: int) -> bytes:
        return (folder / str(index)).read_bytes()

    joins = plan_joins(seen, lambda index: sides_from_bytes(kept(index)))
    for home in np.unique(joins.home).tolist():
        yield join(*collect(joins.at(home), lambda index: border_from_bytes(kept(index))))
