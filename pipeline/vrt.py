"""A GDAL virtual raster as the list of its sources, if it is no more than that. Nothing heavy is imported here.

Tiles are read from the sources themselves, so whatever a VRT does to them would be lost: such a VRT is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn
from xml.etree import ElementTree

from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.files import is_remote, resolved, tile_name
from segpipe.tasks.remote import fetch

if TYPE_CHECKING:
    from affine import Affine

    from segpipe.tasks.read import TileHeader

SAME_PX = 1e-3
"""gdalbuildvrt calculates rectangles from coordinates: their numbers are whole but for rounding."""
SAME_PLACE_PX = 0.1
"""A VRT and its source may differ by this in where a pixel is: gdalbuildvrt takes the mean of their resolutions."""
PLAIN = ("SimpleSource", "ComplexSource")
CHANGES = ("ScaleOffset", "ScaleRatio", "Exponent", "LUT", "ColorTableComponent")
"""What a ComplexSource may hold that changes its values. Its NODATA does not: it says what is invalid."""

Rectangle = tuple[float, float, float, float]
"""x, y, width, height in pixels."""
Corner = tuple[float, float]
"""x, y in pixels of the VRT: the upper left corner of a source in it."""


def sources_of(vrt: str, nodata_counts: bool, within: tuple[str, ...] = ()) -> list[str]:
    """Paths or URLs of the sources in their order, those of nested VRTs in the place of these.

    nodata_counts: a nodata value of the VRT that a source does not have itself is refused too. within: the VRTs that
    this one is nested in. UserError for what is no VRT, or one that does more than to place its sources whole, in their
    own size, each in its own bands, where they themselves say that they lie.
    """
    if vrt in within:
        raise UserError(f"{vrt}: a VRT that is among its own sources; expected rasters in the end")
    try:
        root = ElementTree.fromstring(fetch(vrt) if is_remote(vrt) else Path(vrt).read_bytes())
    except TileError as error:
        raise UserError(str(error)) from None
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise UserError(f"{vrt}: not a VRT ({error}); expected an XML file that lists its sources") from None
    vrt_size = _size(vrt, root, "raster")
    sources: dict[str, set[Corner]] = {}
    nodata: set[float] = set()
    for position, band in enumerate(root.findall("VRTRasterBand"), 1):
        nodata |= _numbers(vrt, band, "NoDataValue")
        for source in (node for node in band if node.find("SourceFilename") is not None):
            file = _file(vrt, source)
            _check_band(vrt, file, band, source, position)
            _check_place(vrt, file, source, vrt_size)
            nodata |= _numbers(vrt, source, "NODATA")
            sources.setdefault(file, set()).add(_corner(vrt, source))
    if not sources:
        raise UserError(f"{vrt}: no SourceFilename in it; expected a VRT of at least one raster")
    _check_masks(vrt, root, sources)
    _check_georeference(vrt, root, sources)
    if nodata_counts and nodata:
        _check_nodata(vrt, sources, nodata)
    return [file for source in sources for file in _expanded(source, nodata_counts, (*within, vrt))]


def _expanded(source: str, nodata_counts: bool, within: tuple[str, ...]) -> list[str]:
    is_vrt = PurePosixPath(tile_name(source)).suffix.lower() == ".vrt"
    return sources_of(source, nodata_counts, within) if is_vrt else [source]


def _file(vrt: str, source: ElementTree.Element) -> str:
    node = source.find("SourceFilename")
    text = (node.text or "").strip() if node is not None else ""
    if node is None or not text:
        raise UserError(f"{vrt}: an empty SourceFilename; expected the name of a raster")
    # What is not relative to the VRT is relative to where one stands, as for GDAL.
    base = vrt if is_remote(vrt) or node.get("relativeToVRT") == "1" else str(Path.cwd() / "here")
    try:
        return resolved(text, base)
    except ValueError as error:
        raise UserError(f"{vrt}: {error}") from None


def _check_band(vrt: str, file: str, band: ElementTree.Element, source: ElementTree.Element, position: int) -> None:
    number = band.get("band", str(position))
    taken = (source.findtext("SourceBand") or number).strip()
    if taken != number:
        _refuse(vrt, f"band {number} is band {taken} of {tile_name(file)}")
    changes = [tag for tag in CHANGES if source.find(tag) is not None]
    if source.tag not in PLAIN or changes or band.get("subClass"):
        _refuse(
            vrt, f"it calculates with {tile_name(file)} ({', '.join(changes) or band.get('subClass') or source.tag})"
        )


def _check_place(vrt: str, file: str, source: ElementTree.Element, vrt_size: tuple[float, float] | None) -> None:
    """Refuse a source of which a part is taken, or which is resized or cut off by the VRT's edge."""
    part, place = _rectangle(vrt, source, "SrcRect"), _rectangle(vrt, source, "DstRect")
    if place is None and vrt_size is not None:
        place = (0.0, 0.0, *vrt_size)  # without one, GDAL stretches a source over the whole VRT
    if part is None and place is None:
        return
    properties = source.find("SourceProperties")
    size = None if properties is None else _size(vrt, properties, "Raster")
    width, height = size or _size_of_file(file)
    if part is not None and not _same(part, (0.0, 0.0, width, height)):
        _refuse(vrt, f"it takes {part[2]:g} x {part[3]:g} px of {tile_name(file)}, which has {width:g} x {height:g}")
    if place is not None and not _same(place[2:], (width, height)):
        _refuse(vrt, f"it makes {place[2]:g} x {place[3]:g} px of {tile_name(file)}, which has {width:g} x {height:g}")
    if place is not None and vrt_size is not None:
        beyond = max(-place[0], -place[1], place[0] + width - vrt_size[0], place[1] + height - vrt_size[1])
        if beyond > SAME_PX:
            _refuse(vrt, f"{tile_name(file)} reaches {beyond:g} px over its edge")


def _corner(vrt: str, source: ElementTree.Element) -> Corner:
    x, y, *_ = _rectangle(vrt, source, "DstRect") or (0.0, 0.0)
    return x, y


def _check_masks(vrt: str, root: ElementTree.Element, sources: Mapping[str, object]) -> None:
    """Refuse a mask that is not made of the sources' own masks, which are read with them."""
    for mask in root.iter("MaskBand"):
        for source in (node for node in mask.iter() if node.find("SourceFilename") is not None):
            file = _file(vrt, source)
            taken = (source.findtext("SourceBand") or "1").strip()
            if file not in sources or not taken.startswith("mask") or source.tag not in PLAIN:
                _refuse(vrt, f"its mask is band {taken} of {tile_name(file)}")
            _check_place(vrt, file, source, _size(vrt, root, "raster"))


def _check_georeference(vrt: str, root: ElementTree.Element, sources: Mapping[str, set[Corner]]) -> None:
    """Refuse a VRT that says otherwise than its sources where they lie. What it does not say is not compared."""
    from affine import Affine

    if root.find("GCPList") is not None:
        _refuse_georeference(vrt, "it has ground control points")
    srs, numbers = (root.findtext("SRS") or "").strip(), (root.findtext("GeoTransform") or "").strip()
    transform = _transform(vrt, numbers) if numbers else None
    if not srs and transform is None:
        return
    for header in _headers(sources):
        if srs:
            _check_crs(vrt, srs, header)
        for corner in sources[header.path] if transform is not None else ():
            _check_corners(vrt, transform @ Affine.translation(*corner), header)


def _check_crs(vrt: str, srs: str, header: TileHeader) -> None:
    from .place import crs_name, tile_crs

    if header.crs_wkt is None:
        return  # the plan asks for `images_crs`
    told, own = tile_crs(replace(header, path=vrt, crs_wkt=srs), None), tile_crs(header, None)
    if not told.equals(own, ignore_axis_order=True):
        _refuse_georeference(vrt, f"its CRS is {crs_name(told)}, that of {tile_name(header.path)} is {crs_name(own)}")


def _check_corners(vrt: str, told: Affine, header: TileHeader) -> None:
    """Refuse a source whose corners the VRT puts elsewhere than the source does. told: the VRT's transform for it."""
    from affine import Affine

    own = Affine(*header.transform)
    corners = [(col, row) for col in (0, header.width) for row in (0, header.height)]
    apart_px = inf
    if not own.is_degenerate:
        moved = ~own @ told
        apart_px = max(abs(a - b) for corner in corners for a, b in zip(moved @ corner, corner, strict=True))
    if apart_px > SAME_PLACE_PX:
        name, (x, y), (own_x, own_y) = tile_name(header.path), told @ corners[0], own @ corners[0]
        _refuse_georeference(
            vrt,
            f"it puts {name} at ({x:.10g}, {y:.10g}), its own header at ({own_x:.10g}, {own_y:.10g}), and corners"
            f" of it up to {apart_px:,.2f} px apart",
        )


def _check_nodata(vrt: str, sources: Iterable[str], nodata: set[float]) -> None:
    for header in _headers(sources):
        file, own = header.path, header.nodata
        if {own} != nodata:
            values = ", ".join(f"{value:g}" for value in sorted(nodata))
            has = "none" if own is None else f"{own:g}"
            raise UserError(
                f"{vrt}: its nodata is {values}, that of {tile_name(file)} is {has}, and tiles are read from the"
                " sources; expected the same;"
                f" cure: `nodata: {values if len(nodata) == 1 else f'[{values}]'}` in the YAML"
            )


def _headers(sources: Iterable[str]) -> list[TileHeader]:
    """Headers of those sources that can be read; of the others the plan tells, or leaves them out."""
    from segpipe.tasks.read import read_header

    from .inputs import ASKED_AT_ONCE

    def header(file: str) -> TileHeader | None:
        try:
            return read_header(file)
        except UserError:
            return None

    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return [found for found in pool.map(header, sources) if found is not None]


def _size_of_file(file: str) -> tuple[float, float]:
    from segpipe.tasks.read import read_header

    header = read_header(file)
    return header.width, header.height


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= SAME_PX for a, b in zip(one, other, strict=True))


def _transform(vrt: str, text: str) -> Affine:
    from affine import Affine

    numbers = [_number(vrt, number, "a number of GeoTransform") for number in text.split(",")]
    if len(numbers) != 6 or not all(map(isfinite, numbers)):
        raise UserError(f"{vrt}: GeoTransform is {' '.join(text.split())[:60]!r}; expected 6 numbers")
    return Affine.from_gdal(*numbers)


def _rectangle(vrt: str, source: ElementTree.Element, tag: str) -> Rectangle | None:
    node = source.find(tag)
    if node is None:
        return None
    x, y, width, height = (
        _number(vrt, node.get(name), f"{name} of {tag}") for name in ("xOff", "yOff", "xSize", "ySize")
    )
    return x, y, width, height


def _size(vrt: str, node: ElementTree.Element, prefix: str) -> tuple[float, float] | None:
    names = [f"{prefix}{axis}Size" for axis in "XY"]
    if any(node.get(name) is None for name in names):
        return None
    width, height = (_number(vrt, node.get(name), name) for name in names)
    return width, height


def _numbers(vrt: str, node: ElementTree.Element, tag: str) -> set[float]:
    return {_number(vrt, found.text, tag) for found in node.findall(tag)}


def _number(vrt: str, text: str | None, name: str) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise UserError(f"{vrt}: {name} is {text!r}; expected a number") from None


def _refuse(vrt: str, what: str) -> NoReturn:
    name = PurePosixPath(tile_name(vrt))
    raise UserError(
        f"{vrt}: {what}, and tiles are read from the sources; expected a VRT that only places whole sources side by"
        f" side; cure: gdal_translate {name} {name.stem}.tif, or name the sources in `images:`"
    )


def _refuse_georeference(vrt: str, what: str) -> NoReturn:
    name = PurePosixPath(tile_name(vrt))
    raise UserError(
        f"{vrt}: {what}, and tiles are read from the sources; expected the place that the sources have themselves;"
        f" cure: gdal_translate {name} {name.stem}.tif, and name {name.stem}.tif in `images:`"
    )
