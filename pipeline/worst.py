"""The worst places of an evaluation as pictures on one page: the imagery, and on it what was hit, missed and made up.

Axes: B bands, H rows, W columns.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyogrio
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pyproj import CRS, Transformer

from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window, ground_pixel_m

from .beside import written_beside
from .geopackage import VERDICTS_LAYER
from .imagery import open_imagery
from .judge import APART, FALSE_ALARM, HIT, MISS
from .report import hatch, page_template
from .scores import City, Evaluation, Place

COLOURS = {HIT: (60, 200, 90), FALSE_ALARM: (255, 140, 20), MISS: (235, 50, 60), APART: (170, 170, 170)}
MARGIN_PX = 32
ZOOM = 2
"""Pictures are drawn so much larger than pixels are."""
WORST = 20

ReadImage = Callable[[Window], NDArray[np.uint8]]


@dataclass(frozen=True)
class Shown:
    """A place on the page. image, judged: pictures as data URLs. where: coordinates, latitude first."""

    run: str
    row: int
    col: int
    side_m: float
    where: str
    false_alarms_m2: float
    misses_m2: float
    image: str
    judged: str


def write_worst(path: Path, evaluation: Evaluation, layers: Sequence[Path]) -> tuple[str, ...]:
    """Write the page of the WORST places of all runs; gives notes. layers: the evaluation's layer of each run.

    The worst are the squares with the most wrong pixels. Where the imagery is not to be had, there are outlines alone.
    """
    notes: list[str] = []
    chosen = sorted(
        ((place, index) for index, city in enumerate(evaluation.cities) for place in city.worst),
        key=lambda it: -(it[0].false_alarms + it[0].misses),
    )[:WORST]
    shown: dict[int, list[Shown]] = {}
    for index in sorted({index for _, index in chosen}):
        city = evaluation.cities[index]
        read: ReadImage | None = None
        try:
            read = open_imagery(city.run.folder)
        except UserError as error:
            notes.append(f"{city.run.name}: {error}")
        shown[index] = [_show(city, place, layers[index], read) for place, own in chosen if own == index]
    html = page_template("worst.html").render(
        names=[city.run.name for city in evaluation.cities],
        places=[shown[index].pop(0) for _, index in chosen],
        notes=notes,
        colours={kind: "#{:02x}{:02x}{:02x}".format(*rgb) for kind, rgb in COLOURS.items()},
    )
    with written_beside(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return tuple(notes)


def _show(city: City, place: Place, layer: Path, read: ReadImage | None) -> Shown:
    with rasterio.open(city.run.folder / "mask.tif") as mask:
        extent, transform, wkt = Window(0, 0, mask.height, mask.width), mask.transform, mask.crs.to_wkt()
    window = place.window.pad(MARGIN_PX).intersect(extent)
    row, col = window.row_off + window.height / 2, window.col_off + window.width / 2
    pixel_m = float(ground_pixel_m(wkt, transform, np.array([row]), np.array([col]))[0])
    lon, lat = Transformer.from_crs(CRS.from_wkt(wkt), 4326, always_xy=True).transform(*(transform @ (col, row)))
    image_HW3 = hatch(0, 0, *window.shape_yx)
    if read is not None:
        row_off, col_off = city.run.offset
        image_HW3 = _rgb(read(Window(window.row_off + row_off, window.col_off + col_off, *window.shape_yx)))
    picture = Image.fromarray(image_HW3).resize((window.width * ZOOM, window.height * ZOOM), Image.Resampling.BILINEAR)
    return Shown(
        run=city.run.name,
        row=place.window.row_off,
        col=place.window.col_off,
        side_m=place.window.height * pixel_m,
        where=f"{lat:.5f}, {lon:.5f}",
        false_alarms_m2=place.false_alarms * pixel_m**2,
        misses_m2=place.misses * pixel_m**2,
        image=_data_url(picture),
        judged=_data_url(_draw(picture, layer, window, transform)),
    )


def _rgb(image_BHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first three bands, or the first one as grey, (H, W, 3)."""
    bands = [min(band, len(image_BHW) - 1) for band in range(3)]
    return np.ascontiguousarray(np.moveaxis(image_BHW[bands], 0, -1))


def _draw(picture: Image.Image, layer: Path, window: Window, transform: Affine) -> Image.Image:
    """The picture with the outlines of what was judged in it, what is wrong on top."""
    x0, y0 = transform @ (window.col_off, window.row_stop)
    x1, y1 = transform @ (window.col_stop, window.row_off)
    frame = pyogrio.read_dataframe(layer, layer=VERDICTS_LAYER, columns=["verdict"], bbox=(x0, y0, x1, y1))
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    back = ~(transform @ Affine.translation(window.col_off, window.row_off))
    for verdict in (HIT, APART, FALSE_ALARM, MISS):
        polygons = shapely.get_parts(frame.geometry[frame.verdict == verdict].to_numpy())
        for ring in shapely.get_rings(polygons):
            xy = shapely.get_coordinates(ring)
            points = [tuple(ZOOM * value for value in back @ (x, y)) for x, y in xy.tolist()]
            pen.line(points, fill=COLOURS[verdict], width=3, joint="curve")
    return drawn


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
