"""Report: one page about a run, and the footprints drawn over the imagery.

Axes: B bands, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
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
READ_PX = 1024
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
    invalid_px: tuple[tuple[str, int], ...]
    """Pixels found invalid, by reason."""
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
    the mean of the valid pixels under it. Both are read part by part, and the footprints in batches.
    Raises RunError if the picture cannot be written.
    """
    factor = max(1, -(-max(window.shape_yx) // max_px))
    picture_HW3 = np.empty((-(-window.height // factor), -(-window.width // factor), 3), np.uint8)
    for part in _parts(window, factor * max(1, READ_PX // factor)):
        row, col = (part.row_off - window.row_off) // factor, (part.col_off - window.col_off) // factor
        rgb_HW3, seen_HW = _reduce_part(read_image, read_valid, part, factor)
        height, width = seen_HW.shape
        picture_HW3[row : row + height, col : col + width] = np.where(
            seen_HW[..., None], rgb_HW3, hatch(row, col, height, width)
        )
    plain = Image.fromarray(picture_HW3)
    picture = plain.copy()
    outlines = _draw_outlines(geopackage, picture.size, window, lattice, factor)
    picture.paste(OUTLINE_RGB, mask=outlines)
    with written_beside(path) as partial:
        picture.save(partial, "PNG")
    return Plain(plain, factor)


def _parts(window: Window, step: int) -> Iterator[Window]:
    for row_off in range(window.row_off, window.row_stop, step):
        for col_off in range(window.col_off, window.col_stop, step):
            yield Window(row_off, col_off, step, step).intersect(window)


def _reduce_part(
    read_image: Callable[[Window], NDArray[np.uint8]],
    read_valid: Callable[[Window], NDArray[np.generic]],
    part: Window,
    factor: int,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Means of factor x factor pixels of a part, (H, W, 3), and where at least half of them are valid, (H, W)."""
    valid_HW = np.asarray(read_valid(part)) != 0
    count_HW = _sums(valid_HW, factor)
    seen_HW = 2 * count_HW >= _sums(np.ones_like(valid_HW), factor)
    if not seen_HW.any():
        return np.zeros((*seen_HW.shape, 3), np.uint8), seen_HW
    image_BHW = read_image(part)
    bands = [min(band, len(image_BHW) - 1) for band in range(3)]
    sums = [_sums(image_BHW[band] * valid_HW, factor) for band in bands]
    return (np.stack(sums, axis=-1) // np.maximum(count_HW, 1)[..., None]).astype(np.uint8), seen_HW


def _sums(pixels_HW: NDArray[np.generic], factor: int) -> NDArray[np.int64]:
    """Sums over cells of factor x factor; those at the lower and right edge may be smaller."""
    rows = np.add.reduceat(pixels_HW, np.arange(0, pixels_HW.shape[0], factor), axis=0, dtype=np.int64)
    sums: NDArray[np.int64] = np.add.reduceat(rows, np.arange(0, pixels_HW.shape[1], factor), axis=1)
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
