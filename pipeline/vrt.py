"""A GDAL virtual raster as the list of its sources, if it is no more than that. Nothing heavy is imported here.

Tiles are read from the sources themselves, so whatever a VRT does to them would be lost: such a VRT is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NoReturn
from xml.etree import ElementTree

from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.files import is_remote, resolved, tile_name
from segpipe.tasks.remote import fetch

SAME_PX = 1e-3
"""gdalbuildvrt calculates rectangles from coordinates: their numbers are whole but for rounding."""
PLAIN = ("SimpleSource", "ComplexSource")
CHANGES = ("ScaleOffset", "ScaleRatio", "Exponent", "LUT", "ColorTableComponent")
"""What a ComplexSource may hold that changes its values. Its NODATA does not: it says what is invalid."""

Rectangle = tuple[float, float, float, float]
"""x, y, width, height in pixels."""


def sources_of(vrt: str, nodata_counts: bool, within: tuple[str, ...] = ()) -> list[str]:
    """Paths or URLs of the sources in their order, those of nested VRTs in the place of these.

    nodata_counts: a nodata value of the VRT that a source does not have itself is refused too. within: the VRTs that
    this one is nested in. UserError for what is no VRT, or one that does more than to place its sources whole, in their
    own size, each in its own bands.
    """
    if vrt in within:
        raise UserError(f"{vrt}: a VRT that is among its own sources; expected rasters in the end")
    try:
        root = ElementTree.fromstring(fetch(vrt) if is_remote(vrt) else Path(vrt).read_bytes())
    except TileError as error:
        raise UserError(str(error)) from None
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise UserError(f"{vrt}: not a VRT ({error}); expected an XML file that lists its sources") from None
    sources: dict[str, None] = {}
    nodata: set[float] = set()
    for position, band in enumerate(root.findall("VRTRasterBand"), 1):
        nodata |= _numbers(vrt, band, "NoDataValue")
        for source in (node for node in band if node.find("SourceFilename") is not None):
            file = _file(vrt, source)
            _check_band(vrt, file, band, source, position)
            _check_place(vrt, file, source, _size(vrt, root, "raster"))
            nodata |= _numbers(vrt, source, "NODATA")
            sources[file] = None
    if not sources:
        raise UserError(f"{vrt}: no SourceFilename in it; expected a VRT of at least one raster")
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


def _check_nodata(vrt: str, sources: Iterable[str], nodata: set[float]) -> None:
    from segpipe.tasks.read import read_header

    for file in sources:
        try:
            own = read_header(file).nodata
        except UserError:
            continue  # the plan says so, or leaves the tile out
        if {own} != nodata:
            values = ", ".join(f"{value:g}" for value in sorted(nodata))
            has = "none" if own is None else f"{own:g}"
            raise UserError(
                f"{vrt}: its nodata is {values}, that of {tile_name(file)} is {has}, and tiles are read from the"
                " sources; expected the same;"
                f" cure: `nodata: {values if len(nodata) == 1 else f'[{values}]'}` in the YAML"
            )


def _size_of_file(file: str) -> tuple[float, float]:
    from segpipe.tasks.read import read_header

    header = read_header(file)
    return header.width, header.height


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= SAME_PX for a, b in zip(one, other, strict=True))


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
