"""Report: one page about a run, and the footprints drawn over the imagery.

Axes: B bands, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import jinja2
import numpy as np
import pyogrio.raw
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segpipe.tasks.grid import Lattice, Window

from .beside import written_beside
from .geopackage import LAYER
from .report_charts import Histogram, Timeline
from .report_map import CityMap
from .rows import BATCH_ROWS

OUTLINE_RGB = (255, 106, 0)
HATCH_RGB = (150, 150, 150)
PAPER_RGB = (214, 214, 214)
HATCH_PX = 8
READ_PX, READERS = 1024, 4
"""Side of the parts that imagery is read in, and how many are read at once."""
OVERSAMPLING = 2
"""Outlines are drawn this much larger and reduced, which smooths them."""

Rows = tuple[tuple[str, str], ...]
"""Labelled texts, in the order in which they are shown."""


@dataclass(frozen=True)
class StageTime:
    """One stage in the table of times. seconds: of all workers, added up; wall_s: by the clock; done: tasks."""

    name: str
    done: int
    reused: int
    seconds: float
    wall_s: float
    pixels: int

    @property
    def mpx_per_s(self) -> float | None:
        """Megapixels a second by the clock; None where nothing was done."""
        return self.pixels / 1e6 / self.wall_s if self.pixels and self.wall_s > 0 else None


@dataclass(frozen=True)
class Report:
    """All that the page says. Sizes are pixels of the lattice; pixel_m is the side of one on the ground, in metres."""

    name: str
    finished: str
    model: str
    plan: Rows
    """What was run, as the plan describes it."""
    recipe: Rows
    config_yaml: str
    tiles: int
    chunks: int
    blocks: int
    buildings: int
    buildings_m2: float
    valid_px: int
    pixel_m: float
    invalid: tuple[tuple[str, int, float], ...]
    """Reasons, how many pixels were found invalid for each, counted on their tiles' own grids, and their ground m2."""
    halo_px: int
    extra_pixels: float
    """Share of pixels that are read and predicted on top for the halos: 0.34 is 34 %."""
    stages: tuple[StageTime, ...]
    device: str
    """How busy the devices were, and what they waited for; empty where nothing was predicted."""
    skipped: Rows
    """Tiles that were left out, and why."""
    warnings: tuple[str, ...]
    versions: Rows
    outputs: Rows
    """Names of the files, and what is in them."""
    changes: tuple[tuple[str, int], ...] = ()
    """Buildings added, removed and modified since the last publishing."""
    city_map: CityMap | None = None
    charts: tuple[Histogram, ...] = ()
    timeline: Timeline | None = None

    @property
    def valid_km2(self) -> float:
        """Area with imagery."""
        return self.valid_px * self.pixel_m**2 / 1e6

    @property
    def built_share(self) -> float:
        """Share of the area with imagery that is under buildings."""
        return self.buildings_m2 / (self.valid_km2 * 1e6) if self.valid_px else 0.0


@cache
def page_template(name: str) -> jinja2.Template:
    """One of the pages that stand beside this module as templates; what is missing in what it is given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: files(__package__).joinpath(file).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = lambda value, digits=0: f"{value:,.{digits}f}"
    environment.filters["duration"] = _duration
    return environment.get_template(name)


def write_report(path: Path, report: Report) -> None:
    """Write the page with everything in it, so that it can be sent or kept as one file, and rename it into place.

    Raises RunError if it cannot be written.
    """
    html = page_template("report.html").render(report=report)
    with written_beside(path) as partial:
        partial.write_text(html, encoding="utf-8")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Plain:
    """The imagery of a preview before anything was drawn on it: a pixel is the mean of factor x factor."""

    picture: Image.Image
    factor: int


def write_preview(
    path: Path,
    read_image: Callable[[Window], NDArray[np.uint8]],
    read_valid: Callable[[Window], NDArray[np.generic]],
    window: Window,
    lattice: Lattice,
    geopackage: Path,
    max_px: int = 1600,
) -> Plain:
    """Draw the outlines of all footprints over the imagery, at most max_px a side, and rename the PNG into place.

    Gives the picture without them.

    read_image gives uint8 (bands, height, width) of a part of window, of which the first three are shown as red, green
    and blue; read_valid gives what is not zero where there is imagery: the rest is hatched. A pixel of the picture is
    the mean of the valid pixels under it. Both are read part by part by several threads, the footprints in batches.
    Raises RunError if the picture cannot be written.
    """
    factor = max(1, -(-max(window.shape_yx) // max_px))
    picture_HW3 = _reduce(read_image, read_valid, window, factor)
    plain = Image.fromarray(picture_HW3)
    picture = plain.copy()
    outlines = _draw_outlines(geopackage, picture.size, window, lattice, factor)
    picture.paste(OUTLINE_RGB, mask=outlines)
    with written_beside(path) as partial:
        picture.save(partial, "PNG")
    return Plain(plain, factor)


def _reduce(
    read_image: Callable[[Window], NDArray[np.uint8]],
    read_valid: Callable[[Window], NDArray[np.generic]],
    window: Window,
    factor: int,
) -> NDArray[np.uint8]:
    """Means of factor x factor pixels, (H, W, 3), hatched where less than half of them are valid."""
    heights, widths = (np.minimum(factor, side - np.arange(0, side, factor)) for side in window.shape_yx)
    count_HW = np.zeros((len(heights), len(widths)), np.uint32)
    sums_3HW = np.zeros((3, *count_HW.shape), np.uint32)

    def sums_of(part: Window) -> tuple[tuple[slice, slice], NDArray[np.uint32], NDArray[np.uint32]] | None:
        valid_HW = np.asarray(read_valid(part)) != 0
        if not valid_HW.any():
            return None
        image_BHW = read_image(part)
        row, top = divmod(part.row_off - window.row_off, factor)
        col, left = divmod(part.col_off - window.col_off, factor)
        bands = (image_BHW[min(band, len(image_BHW) - 1)] * valid_HW for band in range(3))
        counts_HW, *sums = (_sums(it, factor, top, left) for it in (valid_HW, *bands))
        at = slice(row, row + counts_HW.shape[0]), slice(col, col + counts_HW.shape[1])
        return at, counts_HW, np.stack(sums)

    with ThreadPoolExecutor(READERS, "preview") as readers:
        for parts in _rows_of_parts(window):
            for at, counts_HW, of_bands_3HW in filter(None, readers.map(sums_of, parts)):
                count_HW[at] += counts_HW
                sums_3HW[:, *at] += of_bands_3HW
    is_seen_HW = 2 * count_HW >= heights[:, None] * widths
    means_HW3 = np.moveaxis(sums_3HW // np.maximum(count_HW, 1), 0, -1).astype(np.uint8)
    return np.where(is_seen_HW[..., None], means_HW3, hatch(0, 0, *count_HW.shape))


def _rows_of_parts(window: Window) -> Iterator[list[Window]]:
    """Parts on the lattice's own grid, as chunks are, row by row: no chunk is read for several parts."""
    for _, cells in groupby(window.cells(READ_PX), itemgetter(0)):
        yield [Window.cell(*cell, READ_PX).intersect(window) for cell in cells]


def _sums(pixels_HW: NDArray[np.generic], factor: int, top: int, left: int) -> NDArray[np.uint32]:
    """Sums over cells of factor x factor, the first of which begins so many pixels above and left of the array."""
    height, width = pixels_HW.shape
    rows, cols = -(-(top + height) // factor), -(-(left + width) // factor)
    whole_HW = np.zeros((rows * factor, cols * factor), pixels_HW.dtype)
    whole_HW[top : top + height, left : left + width] = pixels_HW
    of_rows = whole_HW.reshape(rows, factor, cols * factor).sum(axis=1, dtype=np.uint32)
    sums: NDArray[np.uint32] = of_rows.reshape(rows, cols, factor).sum(axis=2, dtype=np.uint32)
    return sums


def hatch(row: int, col: int, height: int, width: int) -> NDArray[np.uint8]:
    """Diagonal lines that go on from one part to the next, (H, W, 3)."""
    diagonal_HW = np.arange(row, row + height)[:, None] + np.arange(col, col + width)
    on_line_HW1 = (diagonal_HW % HATCH_PX < 2)[..., None]
    return np.where(on_line_HW1, np.array(HATCH_RGB, np.uint8), np.array(PAPER_RGB, np.uint8))


def _draw_outlines(
    geopackage: Path, size: tuple[int, int], window: Window, lattice: Lattice, factor: int
) -> Image.Image:
    """How much of each pixel of the picture is under an outline, 0 to 255."""
    scale = OVERSAMPLING / factor
    large = Image.new("L", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    draw = ImageDraw.Draw(large)
    width = 3 if factor < 3 else 2  # thinner where houses are small, so that a dense town is no orange blot
    to_pixels = ~lattice.transform(window.row_off, window.col_off)
    with pyogrio.raw.open_arrow(geopackage, layer=LAYER, columns=[], batch_size=BATCH_ROWS, use_pyarrow=True) as (
        meta,
        reader,
    ):
        for batch in reader:
            wkb = batch.column(meta["geometry_name"] or "wkb_geometry").to_numpy(zero_copy_only=False)
            xy, ring = shapely.get_coordinates(shapely.get_rings(shapely.from_wkb(wkb)), return_index=True)
            col, row = to_pixels.a * xy[:, 0] + to_pixels.c, to_pixels.e * xy[:, 1] + to_pixels.f
            corners = np.column_stack([col, row]) * scale
            for points in np.split(corners, np.flatnonzero(np.diff(ring)) + 1):
                draw.line(points.ravel().tolist(), fill=255, width=width, joint="curve")
    return large.resize(size, Image.Resampling.BOX)
