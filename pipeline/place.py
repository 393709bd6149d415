"""Where tiles lie: which lattice a city gets, which tiles are copied onto it, and which are warped.

Nothing is read here but headers. What is decided for the first run in a folder is stored, and stays for all later ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Lattice, Window, ground_pixel_m
from segpipe.tasks.mosaic import Mosaic
from segpipe.tasks.read import TileHeader

TOLERANCE_PX = 1e-3
"""How far a tile may lie off the lattice and be copied, in pixels."""
MOSAIC_TOLERANCE_PX = 0.05
"""How far tiles that are warped may lie off their common grid, in pixels, before they get one of their own."""
SAME_RESOLUTION = 0.05
"""Resolutions that differ by less than this share are one: nothing is resampled for so little."""

LEAST_FILLED = 0.01
"""Share of the grid that tiles fill in a city that is one."""
GROUP_GAP_M = 5000
"""Tiles further apart than this are told of as different groups."""
MOST_GROUPS = 4


@dataclass(frozen=True)
class Placed:
    """Where a tile lies: on the lattice, or on the grid of a mosaic, and what it then covers of the lattice."""

    window: Window
    mosaic: Mosaic | None = None
    cover: Window | None = None


@dataclass(frozen=True)
class Placement:
    """A city's lattice, and each tile's place, in their order."""

    lattice: Lattice
    places: tuple[Placed, ...]

    @property
    def mosaics(self) -> tuple[Mosaic, ...]:
        """The grids of the tiles that are warped, in the order of their first tiles."""
        return tuple(dict.fromkeys(place.mosaic for place in self.places if place.mosaic is not None))

    @property
    def bounds(self) -> Window:
        """The window of the lattice in which all tiles lie, however the same imagery is cut into tiles."""
        found = [place.window for place in self.places if place.mosaic is None]
        for mosaic in self.mosaics:
            found.append(mosaic.bounds(_union([it.window for it in self.places if it.mosaic == mosaic])))
        return _union(found)


def _union(windows: Sequence[Window]) -> Window:
    union = windows[0]
    for window in windows[1:]:
        union = union.union(window)
    return union


def place_tiles(
    headers: Sequence[TileHeader],
    images_crs: str | None = None,
    crs: str | None = None,
    resolution_m: float | None = None,
    model_resolution_m: float = 0.0,
    stored: dict[str, Any] | None = None,
) -> Placement:
    """Decide the lattice and place all tiles on it.

    images_crs is given to tiles that have none. crs and resolution_m: what the configuration asks for. stored: lattice
    and mosaics of the first run in this folder (`settled`). Raises UserError.
    """
    stored = stored or {}
    systems = [tile_crs(header, images_crs) for header in headers]
    target = _target_crs(headers, systems, crs)
    lattice = _lattice(headers, systems, target, resolution_m, model_resolution_m)
    if (known := stored.get("lattice")) is not None:
        # Stored whole, its wording too: a tile that comes first and says the same in other digits re-keys nothing.
        known = Lattice(known["crs_wkt"], known["pixel_size"], known["phase_x"], known["phase_y"])
        lattice = known if _is_the_same(known, lattice, headers) else lattice
    mosaics = [
        Mosaic(it["crs_wkt"], tuple(it["transform"]), lattice, it["resampling"]) for it in stored.get("mosaics", ())
    ]
    places = []
    for header, system in zip(headers, systems, strict=True):
        window = on_lattice(header, lattice) if system == CRS.from_wkt(lattice.crs_wkt) else None
        places.append(Placed(window) if window is not None else _on_mosaic(header, system, lattice, mosaics))
    return Placement(lattice, tuple(places))


def settled_mosaics(mosaics: Sequence[Mosaic]) -> list[dict[str, Any]]:
    """What is to be stored of mosaics for later runs."""
    return [{"crs_wkt": it.crs_wkt, "transform": it.transform, "resampling": it.resampling} for it in mosaics]


def ground_m(header: TileHeader, system: CRS) -> float:
    """Ground metres of a pixel at a tile's centre."""
    centre = np.array([header.height / 2]), np.array([header.width / 2])
    try:
        metres = float(ground_pixel_m(_wkt(system), Affine(*header.transform), *centre)[0])
    except ProjError:
        metres = math.nan
    if not (math.isfinite(metres) and metres > 0):
        raise UserError(
            f"{header.path}: its place {header.transform[2]:g}, {header.transform[5]:g} is none of {crs_name(system)};"
            " expected coordinates of its CRS; cure: the right `images_crs`, or gdal_edit -a_srs"
        )
    return metres


def tile_crs(header: TileHeader, images_crs: str | None) -> CRS:
    """The CRS of a tile, in one wording for all that are the same. UserError where there is none."""
    text = header.crs_wkt or images_crs
    if text is None:
        raise UserError(
            f"{header.path}: no CRS; expected one in the file; cure: `images_crs: EPSG:…` in the YAML,"
            " if you know which one it is"
        )
    try:
        return one_wording(text)
    except CRSError:
        key = "images_crs" if not header.crs_wkt else header.path
        raise UserError(f"{key}: {text[:60]} is not a CRS; expected for example EPSG:32633") from None


@lru_cache(maxsize=256)
def one_wording(text: str) -> CRS:
    """A CRS without what does not place a pixel: vertical axes, shifts to WGS 84, other words for one of EPSG's.

    Raises CRSError where text is no CRS.
    """
    crs = CRS.from_user_input(text)
    if crs.is_compound:
        crs = crs.sub_crs_list[0]
    if crs.is_bound and crs.source_crs is not None:
        crs = crs.source_crs
    number = crs.to_epsg()
    return CRS.from_epsg(number) if number is not None else _by_its_id(crs)


def _by_its_id(crs: CRS) -> CRS:
    """EPSG's CRS of the number that a CRS gives itself, if it places pixels alike; else the CRS as it is.

    GDAL's list of EPSG's CRSs and pyproj's are of different years: datums have other names, numbers and members.
    """
    named = crs.to_json_dict().get("id", {})
    if named.get("authority") != "EPSG":
        return crs
    try:
        known = CRS.from_epsg(named["code"])
    except CRSError:
        return crs
    return known if _placing(known) == _placing(crs) else crs


def _placing(crs: CRS) -> tuple[object, ...]:
    """What of a CRS places a pixel, besides its datum; the order of its axes does not."""
    units = {axis.unit_conversion_factor for axis in crs.axis_info}
    return crs.ellipsoid, crs.prime_meridian, crs.coordinate_operation, units


def crs_name(crs: CRS) -> str:
    """EPSG:32633, or the name of a CRS that has no number."""
    authority = crs.to_authority()
    return ":".join(authority) if authority else str(crs.name)


@lru_cache(maxsize=256)
def _wkt(crs: CRS) -> str:
    return str(crs.to_wkt())


def _target_crs(headers: Sequence[TileHeader], systems: Sequence[CRS], asked: str | None) -> CRS:
    """The CRS of the lattice: the one asked for, else that of most tiles; for degrees the UTM zone of the centre."""
    if asked is not None:
        try:
            crs = one_wording(asked)
        except CRSError:
            raise UserError(f"grid.crs: {asked} is not a CRS; expected for example EPSG:32633") from None
        if not crs.is_projected:
            raise UserError(f"grid.crs: {crs_name(crs)} counts in degrees; expected a projected CRS")
        return crs
    most = max(dict.fromkeys(systems), key=systems.count)
    if most.is_projected:
        return most
    if not most.is_geographic:
        raise UserError(
            f"{headers[systems.index(most)].path}: CRS {crs_name(most)} is neither projected nor geographic;"
            " cure: `grid: {crs: EPSG:…}`, or gdal_edit -a_srs"
        )
    members = [header for header, system in zip(headers, systems, strict=True) if system == most]
    corners = np.array([corner for header in members for corner in _corners(header)])
    lon, lat = (corners.min(axis=0) + corners.max(axis=0)) / 2
    if not (-180 <= lon <= 180 and -80 <= lat <= 84):
        raise UserError(
            f"{members[0].path}: the tiles' centre {lon:g}, {lat:g} lies in no UTM zone; expected degrees from 80 south"
            " to 84 north; cure: `grid: {crs: EPSG:…}`, or the right `images_crs`"
        )
    return CRS.from_epsg((32600 if lat >= 0 else 32700) + int((lon + 180) // 6) % 60 + 1)


def resolve_output_crs(text: str | None) -> str | None:
    """`outputs.crs` as WKT; None where the grid's is kept. UserError for what is no CRS of two dimensions."""
    if text is None:
        return None
    try:
        crs = CRS.from_user_input(text)
    except CRSError:
        raise UserError(f"outputs.crs: {text} is no known coordinate system; expected one such as EPSG:4326") from None
    if len(crs.axis_info) != 2:
        raise UserError(f"outputs.crs: {text} has {len(crs.axis_info)} axes; expected a system of two, as EPSG:4326")
    return str(crs.to_wkt())


def check_scattered(headers: Sequence[TileHeader], placement: Placement) -> None:
    """UserError, which lists the groups, where the tiles fill under 1 % of the rectangle around them all."""
    bounds = placement.bounds
    share = sum((place.cover or place.window).pixels for place in placement.places) / bounds.pixels
    if share >= LEAST_FILLED:
        return
    group = groups_of(placement)
    count = int(group.max()) + 1
    sizes = np.bincount(group)
    told = [
        f"{sizes[g]} around {headers[int(np.flatnonzero(group == g)[0])].path}"
        for g in np.argsort(-sizes)[:MOST_GROUPS]
    ]
    more = f" and {count - MOST_GROUPS} more groups" if count > MOST_GROUPS else ""
    raise UserError(
        f"images: {len(headers)} tiles fill {share:.2%} of the {bounds.width} x {bounds.height} px around them;"
        f" expected 1 % or more; they lie in {count} groups: {', '.join(told)}{more}; cure: name one group in"
        " `images:`, or `grid: {sparse: true}`"
    )


def groups_of(placement: Placement) -> NDArray[np.int64]:
    """Group of each tile: those with less than 5 km from one to the next are one group."""
    covers = [place.cover or place.window for place in placement.places]
    centre = placement.bounds
    row, col = centre.row_off + centre.height / 2, centre.col_off + centre.width / 2
    far_px = int(GROUP_GAP_M / placement.lattice.ground_pixel_m(np.array([row]), np.array([col]))[0])
    boxes = [shapely.box(*_edges(cover.pad(far_px // 2))) for cover in covers]
    pairs = shapely.STRtree(boxes).query(boxes, predicate="intersects")
    graph = csr_array((np.ones(pairs.shape[1], np.int8), tuple(pairs)), shape=(len(boxes), len(boxes)))
    group: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return group


def _edges(window: Window) -> tuple[int, int, int, int]:
    return window.col_off, window.row_off, window.col_stop, window.row_stop


def _corners(header: TileHeader) -> list[tuple[float, float]]:
    place = Affine(*header.transform)
    return [place * (col, row) for row in (0, header.height) for col in (0, header.width)]


def _lattice(
    headers: Sequence[TileHeader],
    systems: Sequence[CRS],
    target: CRS,
    resolution_m: float | None,
    model_resolution_m: float,
) -> Lattice:
    """The lattice as the tiles and the configuration have it, without regard to earlier runs.

    Its resolution is the one asked for, else that of most tiles, or the model's where that is coarser. Tiles that have
    it already, in the CRS of the lattice and north up, give pixel size and phase; else the pixel is round and the
    phase 0.
    """
    sizes = [ground_m(header, system) for header, system in zip(headers, systems, strict=True)]
    if resolution_m is None:
        counts = Counter(float(f"{size:.3g}") for size in sizes)
        common = max(counts, key=lambda size: sum(n for other, n in counts.items() if _same(size, other)))
        most = next(size for size in sizes if _same(size, common))
        resolution_m = model_resolution_m if most < model_resolution_m * (1 - SAME_RESOLUTION) else most
    fitting = [
        header
        for header, system, size in zip(headers, systems, sizes, strict=True)
        if system == target and _same(size, resolution_m) and _is_north_up(header)
    ]
    if fitting:
        sides = Counter(float(f"{header.transform[0]:.9g}") for header in fitting)
        first = next(it for it in fitting if float(f"{it.transform[0]:.9g}") == max(sides, key=sides.__getitem__))
        size = first.transform[0]
        return Lattice(_wkt(target), size, _phase(first.transform[2], size), _phase(first.transform[5], size))
    corners = np.array(
        [c for header, system in zip(headers, systems, strict=True) for c in _carried(header, system, target)]
    )
    x, y = (corners.min(axis=0) + corners.max(axis=0)) / 2
    unit_m = float(ground_pixel_m(_wkt(target), Affine(1, 0, x, 0, -1, y), np.zeros(1), np.zeros(1))[0])
    size = float(f"{resolution_m / unit_m:.3g}")
    return Lattice(_wkt(target), size, 0.0, 0.0)


def _carried(header: TileHeader, system: CRS, target: CRS) -> list[tuple[float, float]]:
    """Corners of a tile in another CRS."""
    to_target = _transformer(system, target)
    return [to_target.transform(*corner) for corner in _corners(header)]


@lru_cache(maxsize=64)
def _transformer(source: CRS, target: CRS) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def _same(one_m: float, other_m: float) -> bool:
    return abs(one_m / other_m - 1) < SAME_RESOLUTION


def _is_north_up(header: TileHeader) -> bool:
    a, b, _, d, e, _ = header.transform
    return not b and not d and a > 0 and e < 0 and abs(a + e) * max(header.width, header.height) <= TOLERANCE_PX * a


def _phase(origin: float, size: float) -> float:
    """Where in a pixel of the absolute lattice an origin lies, rounded to about a millionth of the pixel.

    What is left of a division of large coordinates differs from tile to tile in its last digits, and around zero by a
    whole pixel: the lattice must not depend on which tile comes first.
    """
    digits = 6 - math.floor(math.log10(size))
    phase = round(origin % size, digits)
    return 0.0 if size - phase < 2 * 10.0**-digits else phase


def _is_the_same(known: Lattice, found: Lattice, headers: Sequence[TileHeader]) -> bool:
    """True if a stored lattice does for what the tiles would have by themselves.

    A pixel that was rounded, because no tile had it, may be another one where the city has grown.
    """
    if CRS.from_wkt(known.crs_wkt) != CRS.from_wkt(found.crs_wkt):
        return False
    longest = max(max(header.width, header.height) for header in headers)
    off = abs(known.pixel_size - found.pixel_size)
    native = any(
        _is_north_up(it) and abs(it.transform[0] / found.pixel_size - 1) * longest <= TOLERANCE_PX for it in headers
    )
    return off * longest <= TOLERANCE_PX * found.pixel_size or (not native and off <= 0.02 * found.pixel_size)


def on_lattice(header: TileHeader, lattice: Lattice) -> Window | None:
    """A tile's window on the lattice, None if it does not lie on it within 1/1000 px."""
    size = lattice.pixel_size
    if not _is_north_up(header):
        return None
    if abs(header.transform[0] - size) * max(header.width, header.height) > TOLERANCE_PX * size:
        return None
    col, row = (header.transform[2] - lattice.phase_x) / size, (lattice.phase_y - header.transform[5]) / size
    if max(abs(col - round(col)), abs(row - round(row))) > TOLERANCE_PX:
        return None
    return Window(round(row), round(col), header.height, header.width)


def misfit(header: TileHeader, system: CRS, lattice: Lattice) -> str:
    """Why a tile does not lie on a lattice."""
    target = CRS.from_wkt(lattice.crs_wkt)
    if system != target:
        return f"has CRS {crs_name(system)}, not {crs_name(target)}"
    if not _is_north_up(header):
        return "is turned, flipped or has oblong pixels"
    size = lattice.pixel_size
    if abs(header.transform[0] - size) * max(header.width, header.height) > TOLERANCE_PX * size:
        return f"has {header.transform[0]:g} per pixel, not {size:g}"
    off = [(header.transform[2] - lattice.phase_x) / size, (lattice.phase_y - header.transform[5]) / size]
    return f"lies {max(abs(px - round(px)) for px in off):.3f} px off the lattice"


def _on_mosaic(header: TileHeader, system: CRS, lattice: Lattice, mosaics: list[Mosaic]) -> Placed:
    """A tile's place on the grid of the first mosaic that it fits, or of one that begins with it and is added."""
    for mosaic in mosaics:
        if mosaic.crs_wkt == _wkt(system) and (window := _on_grid(header, mosaic.transform)) is not None:
            break
    else:
        finer = ground_m(header, system) < _lattice_m(header, system, lattice) * (1 - SAME_RESOLUTION)
        mosaic = Mosaic(_wkt(system), header.transform, lattice, "average" if finer else "bilinear")
        mosaics.append(mosaic)
        window = Window(0, 0, header.height, header.width)
    try:
        return Placed(window, mosaic, mosaic.cover(window))
    except ValueError:
        raise UserError(
            f"{header.path}: cannot be shown in {crs_name(CRS.from_wkt(lattice.crs_wkt))}; expected a place near the"
            " other tiles; cure: leave it out of `images:`, or another `grid: {crs: EPSG:…}`"
        ) from None


def _on_grid(header: TileHeader, transform: Sequence[float]) -> Window | None:
    """A tile's window on the grid of a mosaic, None if it does not lie on it within 1/20 px."""
    place, own = Affine(*transform), Affine(*header.transform)
    to_grid = ~place * own
    longest = max(header.width, header.height)
    turned = max(abs(to_grid.a - 1), abs(to_grid.e - 1), abs(to_grid.b), abs(to_grid.d)) * longest
    col, row = to_grid.c, to_grid.f
    if max(turned, abs(col - round(col)), abs(row - round(row))) > MOSAIC_TOLERANCE_PX:
        return None
    return Window(round(row), round(col), header.height, header.width)


def _lattice_m(header: TileHeader, system: CRS, lattice: Lattice) -> float:
    """Ground metres of a pixel of the lattice where a tile lies."""
    x, y = _carried(header, system, CRS.from_wkt(lattice.crs_wkt))[0]
    col, row = ~lattice.transform() * (x, y)
    return float(lattice.ground_pixel_m(np.array([row]), np.array([col]))[0])
