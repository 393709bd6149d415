"""The imagery of a run as pictures want it: from the store, or, where that was not kept, from the tiles.

Axes: B bands, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segpipe.tasks.errors import SegpipeError, TileError, UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.read import read_window

from .stages import Site, cell_unit, read_image


def imagery_of(site: Site, window: Window, skipped: Collection[str] = ()) -> NDArray[np.uint8]:
    """image_BHW of a window of the lattice, 0 where there is none. skipped: paths of tiles that cannot be read."""
    plan = site.plan
    chunks = plan.chunks_in(window)
    if all(site.ledger.entry("read", cell_unit(*chunk)) is not None for chunk in chunks):
        return read_image(site, window)
    tiles = [plan.tiles[tile] for tile in plan.tiles_in(window) if plan.tiles[tile].path not in skipped]
    blank = np.zeros((plan.layout.bands, *window.shape_yx), np.uint8)
    try:
        return read_window(tiles, window, lambda tile, part: None)[0] if tiles else blank
    except TileError:
        return blank  # a picture is no reason to fail: what is published was made before


def open_imagery(folder: Path) -> Callable[[Window], NDArray[np.uint8]]:
    """Read image_BHW of windows of a finished run's lattice. UserError where its imagery is not there any more."""
    from .config import load_city
    from .plan import make_plan, read_settled

    try:
        config = load_city(folder / "city.yaml")
        config.find_buckets()
        plan = make_plan(config, stored=read_settled(config.folder))
    except (SegpipeError, OSError) as error:
        raise UserError(f"its imagery cannot be read: {error}") from error
    site = Site(plan)
    return lambda window: imagery_of(site, window)
