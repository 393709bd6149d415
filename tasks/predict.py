"""One block's prediction: the window that its core needs, and the core's probabilities.

Axes: C band, H row, W column. Probabilities are uint8: 0 to 250 for 0 to 1, 255 where the pixel is invalid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .errors import TooLargeError
from .grid import Window

INVALID = 255
"""An invalid pixel, in probabilities and in the mask."""

LEAST_CORE_PX = 512
"""A core of this side is not cut in halves: halos, and the least that a network is given, would be most of them."""

Predict = Callable[[NDArray[np.uint8], NDArray[np.bool_], tuple[slice, slice]], NDArray[np.uint8]]
"""image_CHW and valid_HW of a window, and which rows and columns of it are asked for, to prob_HW of these."""


def reach(core: Window, halo_px: int, stride: int) -> Window:
    """The most that the prediction of a core can look at."""
    return core.pad(halo_px).snap(stride)


def predict_core(
    image_CHW: NDArray[np.uint8],
    valid_HW: NDArray[np.bool_],
    core: Window,
    halo_px: int,
    stride: int,
    predict: Predict,
) -> tuple[NDArray[np.uint8], int]:
    """Probabilities of a core, prob_HW uint8, and the pixels of the window that the network has seen.

    The network is asked for the bounding box of the core's valid pixels, grown outward to the stride's lattice, and
    sees what that can look at; it is not asked at all where the core has no valid pixel.

    image_CHW and valid_HW cover reach(core, halo_px, stride); what lies outside the city is invalid there. A window
    for which `predict` raises TooLargeError is predicted in halves, each with its halo: with the exact halo the same
    bytes. Whether that holds is the caller's to know.
    """
    outer = reach(core, halo_px, stride)
    if image_CHW.shape[1:] != outer.shape_yx or valid_HW.shape != outer.shape_yx:
        raise ValueError(f"image {image_CHW.shape} and valid {valid_HW.shape}: expected {outer.shape_yx}, the reach")
    prob_HW = np.full(core.shape_yx, INVALID, np.uint8)
    box = Window.around(valid_HW[core.within(outer)], core.row_off, core.col_off)
    if box is None:
        return prob_HW, 0
    window = reach(box, halo_px, stride)
    rows, cols = window.within(outer)
    asked = box.snap(stride).intersect(core)
    try:
        prob_HW[asked.within(core)] = predict(image_CHW[:, rows, cols], valid_HW[rows, cols], asked.within(window))
    except TooLargeError:
        halves, seen_px = core.halves(stride), 0
        if halves is None or max(core.shape_yx) <= LEAST_CORE_PX:
            raise
        for half in halves:
            around = (slice(None), *reach(half, halo_px, stride).within(outer))
            part_HW, part_px = predict_core(image_CHW[around], valid_HW[around[1:]], half, halo_px, stride, predict)
            prob_HW[half.within(core)] = part_HW
            seen_px += part_px
        return prob_HW, seen_px
    return prob_HW, window.pixels
