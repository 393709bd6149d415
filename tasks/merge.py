"""Chunks to one array: every pixel exactly once. A doubled or a missing chunk is refused, never averaged or skipped."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .errors import RunError
from .grid import Window


def merge(
    window: Window,
    parts: Iterable[tuple[Window, NDArray[np.uint8]]],
    expected: Iterable[Window],
    fill: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Put parts, each with its window, into an array that covers window: (..., H, W). Where no part lies, it is fill.

    expected: the windows of all parts that must come, each once. out: the array, if it is there already. Raises
    RunError for a missing, doubled or unexpected part, and for one that has another shape than its window.
    """
    missing, merged = set(expected), out
    if out is not None:
        out.fill(fill)
    for part_window, part in parts:
        if part_window not in missing:
            raise RunError(f"chunk at {part_window}: came twice or was not asked for; expected every pixel once")
        missing.remove(part_window)
        if part.shape[-2:] != part_window.shape_yx:
            raise RunError(f"chunk at {part_window}: has {part.shape[-2:]} px; expected {part_window.shape_yx}")
        if merged is None:
            merged = np.full((*part.shape[:-2], *window.shape_yx), fill, np.uint8)
        inside = part_window.intersect(window)
        merged[(..., *inside.within(window))] = part[(..., *inside.within(part_window))]
    if missing:
        raise RunError(f"chunk at {min(missing, key=lambda w: (w.row_off, w.col_off))}: missing; expected it merged")
    return np.full(window.shape_yx, fill, np.uint8) if merged is None else merged
