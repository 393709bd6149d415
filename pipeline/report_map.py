"""The map of the report page: footprints by confidence over a reduced picture of the city, as one drawing that zooms.

Everything is in pixels of the picture (x to the right, y downwards); outlines in tenths of these, as whole numbers.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyogrio
import pyogrio.raw
import shapely
from numpy.typing import NDArray
from PIL import Image
from pyproj import CRS, Transformer

from segpipe.tasks.grid import Lattice, Window

from .geopackage import LAYER
from .rows import BATCH_ROWS

CONFIDENCES = (0.0, 0.7, 0.8, 0.9, 0.95)
"""Lower ends of the classes that have a colour."""
COLOURS = ("#ff2d2d", "#ff9d2e", "#ffe93b", "#7fe3ff", "#2f9bff")
MOST_OUTLINES = 20_000
"""More would make a page that is slow to open."""
TENTHS = 10

AREA_BINS = (0, 25, 50, 75, 100, 150, 200, 300, 500, 1000, 2000)
CONFIDENCE_BINS = tuple(round(0.4 + 0.05 * step, 2) for step in range(12))


TileKind = Literal["copied", "warped", "skipped"]


@dataclass(frozen=True)
class TileMark:
    """A tile on the map: its window of the lattice, and what was done with it."""

    name: str
    kind: TileKind
    window: Window


@dataclass(frozen=True)
class Ring:
    """What a frame of the map says when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    name: str


@dataclass(frozen=True)
class CityMap:
    """A map, ready for the page. paths: SVG path data of each class of confidence; facts: JSON of single buildings.

    areas, confidences: buildings in each of AREA_BINS and CONFIDENCE_BINS. shown, of: buildings drawn, and all.
    """

    width: int
    height: int
    picture: str
    paths: tuple[tuple[str, str, str], ...]
    facts: str
    tiles: tuple[Ring, ...]
    metres_per_px: float
    areas: tuple[int, ...]
    confidences: tuple[int, ...]
    shown: int
    of: int


def draw_map(
    picture: Image.Image,
    factor: int,
    window: Window,
    lattice: Lattice,
    geopackage: Path,
    tiles: Sequence[TileMark] = (),
) -> CityMap:
    """Draw the footprints of a GeoPackage, read in batches, over a picture whose pixels are factor x factor of window.

    Of more than MOST_OUTLINES buildings every n-th is drawn, so that the page opens; all are counted.
    """
    info = pyogrio.read_info(geopackage, layer=LAYER, force_feature_count=True)
    every = -(-int(info["features"]) // MOST_OUTLINES) or 1
    to_picture = _ToPicture(lattice, window, factor, info["crs"])
    areas, confidences = np.zeros(len(AREA_BINS), np.int64), np.zeros(len(CONFIDENCE_BINS), np.int64)
    paths: list[list[str]] = [[] for _ in CONFIDENCES]
    facts: list[tuple[object, ...]] = []
    seen = 0
    how = {"columns": ["building_id", "area_m2", "confidence"], "batch_size": BATCH_ROWS, "use_pyarrow": True}
    with pyogrio.raw.open_arrow(geopackage, layer=LAYER, **how) as (meta, reader):
        for batch in reader:
            area_m2, confidence = (np.asarray(batch.column(name)) for name in ("area_m2", "confidence"))
            areas += _counted(area_m2, AREA_BINS)
            confidences += _counted(confidence, CONFIDENCE_BINS)
            chosen = np.flatnonzero((seen + np.arange(len(area_m2))) % every == 0)
            seen += len(area_m2)
            wkb = batch.column(meta["geometry_name"] or "wkb_geometry").to_numpy(zero_copy_only=False)[chosen]
            shapes = to_picture(shapely.from_wkb(wkb))
            names = np.asarray(batch.column("building_id").to_pylist(), np.object_)[chosen].tolist()
            classes = np.searchsorted(CONFIDENCES, confidence[chosen], "right") - 1
            boxes = np.round(shapely.bounds(shapes)).astype(np.int64).tolist() if len(shapes) else []
            values = zip(names, area_m2[chosen].tolist(), confidence[chosen].tolist(), boxes, strict=True)
            facts += [(name, round(area), round(100 * sure), *box) for name, area, sure, box in values]
            for number, shape in zip(classes.tolist(), shapes, strict=True):
                paths[number].append(path_of(shape))
    labels = [f"under {CONFIDENCES[1]:g}", *(f"from {low:g}" for low in CONFIDENCES[1:])]
    return CityMap(
        width=picture.width,
        height=picture.height,
        picture=inline_jpeg(picture),
        paths=tuple((label, colour, "".join(own)) for label, colour, own in zip(labels, COLOURS, paths, strict=True)),
        facts=json.dumps(facts, separators=(",", ":")),
        tiles=tuple(_ring(tile, window, factor) for tile in tiles),
        metres_per_px=to_picture.metres,
        areas=tuple(areas.tolist()),
        confidences=tuple(confidences.tolist()),
        shown=len(facts),
        of=seen,
    )


class _ToPicture:
    """From coordinates of the footprints' CRS to tenths of pixels of the picture."""

    def __init__(self, lattice: Lattice, window: Window, factor: int, crs: str | None) -> None:
        own, asked = CRS.from_wkt(lattice.crs_wkt), CRS.from_user_input(crs or lattice.crs_wkt)
        self._back = None if own == asked else Transformer.from_crs(asked, own, always_xy=True)
        self._to_px = ~lattice.transform(window.row_off, window.col_off)
        self._scale = TENTHS / factor
        middle = np.array([window.row_off + window.height / 2]), np.array([window.col_off + window.width / 2])
        self.metres = float(lattice.ground_pixel_m(*middle)[0]) * factor

    def __call__(self, shapes: NDArray[np.object_]) -> NDArray[np.object_]:
        moved: NDArray[np.object_] = shapely.transform(shapes, self._moved)
        return moved

    def _moved(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = xy.T if self._back is None else self._back.transform(xy[:, 0], xy[:, 1])
        col, row = self._to_px.a * x + self._to_px.c, self._to_px.e * y + self._to_px.f
        return np.column_stack([col, row]) * self._scale


def path_of(shape: shapely.Polygon) -> str:
    """SVG path data of a polygon in whole numbers, from each corner to the next one."""
    parts = []
    for ring in shapely.get_rings(shape):
        corners = np.round(shapely.get_coordinates(ring)[:-1]).astype(np.int64)
        steps = np.diff(corners, axis=0)
        steps = steps[steps.any(axis=1)]
        (x, y), line = corners[0].tolist(), " ".join(f"{dx} {dy}" for dx, dy in steps.tolist())
        parts.append(f"M{x} {y}l{line}z" if line else f"M{x} {y}z")
    return "".join(parts)


def _counted(values: NDArray[np.float64], bins: Sequence[float]) -> NDArray[np.int64]:
    """Values in each bin, the first and the last one open."""
    place = np.clip(np.searchsorted(bins, values, "right") - 1, 0, len(bins) - 1)
    return np.bincount(place, minlength=len(bins)).astype(np.int64)


def _ring(tile: TileMark, window: Window, factor: int) -> Ring:
    it = tile.window
    x, y = (it.col_off - window.col_off) / factor, (it.row_off - window.row_off) / factor
    return Ring(
        round(x, 1), round(y, 1), round(it.width / factor, 1), round(it.height / factor, 1), tile.kind, tile.name
    )


def inline_jpeg(picture: Image.Image) -> str:
    """A picture as a data URL; as JPEG, since a page with a PNG of imagery would be several times larger."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
