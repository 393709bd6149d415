"""Init: a folder of tiles to a commented city.yaml that runs as it is, and a small picture of what it covers.

What is found is told in the comments, with the line that would change it. Nothing is decided here that the plan
decides: the YAML is planned before it is kept.

Axes: B bands, H rows, W columns.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segpipe.models.weights import BundleError, read_card, resolve_bundle
from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.read import Tile, TileHeader, read_thumbnail, resolve_bands
from segpipe.tasks.validity import resolve_speckle_tolerance, resolve_tolerance, scan_tile

from .beside import written_beside
from .config import CityConfig, as_yaml, load_city, override
from .inputs import RASTERS, find_images
from .manifest import TRACES
from .place import crs_name, ground_m, groups_of, place_tiles, tile_crs
from .plan import Plan, make_plan, read_headers
from .report import PAPER_RGB, hatch

MODEL = "buildings-mobilenetv2"
LOOKED_AT_MPX = 400
"""Megapixels that are read for nodata and shown in the picture, of tiles evenly spread over the list."""
LEAST_SHARE = 0.0005
"""A guessed value is proposed if it takes at least this share of the pixels looked at."""
PICTURE_PX = 1200
LISTED = 5
OUTLINE_RGB = (255, 106, 0)
WRITTEN_AS_TEXT = ("name", "model", "output", "images_crs")
"""What may be given for these is text, whatever else it could be in YAML."""


@dataclass(frozen=True)
class Found:
    """What lies in a folder. used: the tiles that make one city; the others, by path, with the reason."""

    folder: Path
    used: tuple[TileHeader, ...]
    others: dict[str, str]
    images_crs: str | None


@dataclass(frozen=True)
class Nodata:
    """What a sample value would take away from the tiles looked at: in how many of them, pixels, share and area."""

    value: float
    looked_at: int
    tiles: int
    pixels: int
    share: float
    area_m2: float


def write_city_yaml(folder: Path, target: Path, overrides: Sequence[str] = ()) -> Plan:
    """Write target (city.yaml) for the tiles in a folder, and a picture beside it; returns the plan that it makes.

    overrides: `key.path=value` texts that go into the YAML. Raises UserError where there is no city in the folder, or
    target exists; nothing is written then.
    """
    if target.exists():
        raise UserError(f"{target}: exists; expected a new file; cure: --to another one, or move this one away")
    given = _given(overrides)
    config = _checked(overrides)
    found = look_into(folder, given)
    try:
        card = read_card(resolve_bundle(str(given.get("model", MODEL)), target.parent))
    except BundleError as error:
        raise UserError(f"model: {error}") from None
    bands = config.bands if "bands" in given else _bands(found.used[0], len(card.bands))
    looked = some_of(found.used)
    nodata, damaged = guess_nodata(looked, found.images_crs, bands)
    found = _without(found, damaged)
    text = _yaml(found, bands, [] if "nodata" in given else nodata, given, target)
    draft = target.with_name(f".{target.name}.draft")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_text(text, encoding="utf-8")
        plan = make_plan(load_city(draft))
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    write_picture(target.with_suffix(".png"), plan, {header.path for header in looked})
    return plan


def some_of(headers: Sequence[TileHeader]) -> tuple[TileHeader, ...]:
    """All tiles, or as many, evenly spread over the list, as can be looked at in seconds."""
    pixels = sum(header.width * header.height for header in headers)
    step = max(1, round(pixels / (LOOKED_AT_MPX * 1e6)))
    return tuple(headers[::step])


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for text in overrides:
        override(given, text)
    return given


def _checked(overrides: Sequence[str]) -> CityConfig:
    """What is given, as a run would take it, in a city that has nothing else. UserError for what it would not take."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "city.yaml"
        file.write_text(as_yaml({"name": "city", "images": "tiles", "model": MODEL, "output": "run"}), encoding="utf-8")
        return load_city(file, [text for text in overrides if text.partition("=")[0] not in WRITTEN_AS_TEXT])


def _without(found: Found, damaged: dict[str, str]) -> Found:
    """Leave out damaged tiles."""
    used = tuple(header for header in found.used if header.path not in damaged)
    return replace(found, used=used, others=found.others | damaged)


def look_into(folder: Path, given: dict[str, Any]) -> Found:
    """Find the tiles in a folder or below it, and those of them that make one city.

    Tiles that cannot be read, or have other bands or samples than most, or lie far from most, are named and left out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with tiles")
    patterns = _patterns(folder)
    if not patterns:
        raise UserError(f"{folder}: holds no imagery; expected files such as {', '.join(sorted(RASTERS)[:4])}")
    paths = find_images(tuple(patterns), folder.parent.absolute())
    headers, others = read_headers(paths, skip=True)
    kinds = Counter((header.bands, header.dtype) for header in headers)
    (bands, dtype), _ = kinds.most_common(1)[0]
    used = []
    for header in headers:
        if (header.bands, header.dtype) == (bands, dtype):
            used.append(header)
        else:
            others[header.path] = f"{header.bands} bands of {header.dtype}; most tiles have {bands} of {dtype}"
    images_crs = given.get("images_crs") or _crs_for_those_without(used)
    group = groups_of(place_tiles(used, images_crs))
    most = int(np.bincount(group).argmax())
    for header, number in zip(used, group, strict=True):
        if number != most:
            others[header.path] = "lies far from most tiles"
    used = [header for header, number in zip(used, group, strict=True) if number == most]
    return Found(folder, tuple(used), others, images_crs)


def _patterns(folder: Path) -> list[str]:
    """A glob for each folder and ending that tiles have; VRTs only where there is nothing else, for they name tiles."""
    files = [path for path in folder.resolve().rglob("*") if path.suffix.lower() in RASTERS and path.is_file()]
    # What a run has published is no tile.
    files = [path for path in files if not any((above / trace).exists() for above in path.parents for trace in TRACES)]
    if any(path.suffix.lower() != ".vrt" for path in files):
        files = [path for path in files if path.suffix.lower() != ".vrt"]
    return sorted({str(Path(escape(str(path.parent))) / f"*{path.suffix}") for path in files})


def _crs_for_those_without(headers: Sequence[TileHeader]) -> str | None:
    """The CRS of most tiles, for those that have none. UserError where no tile has one."""
    without = [header for header in headers if header.crs_wkt is None]
    if not without:
        return None
    known = Counter(crs_name(tile_crs(header, None)) for header in headers if header.crs_wkt is not None)
    if not known:
        raise UserError(
            f"{without[0].path}: no CRS, as all {len(without)} tiles; expected to know which one it is;"
            " cure: segpipe init FOLDER --set images_crs=EPSG:…"
        )
    return known.most_common(1)[0][0]


def _bands(header: TileHeader, count: int) -> tuple[int, ...]:
    """Red, green and blue where the tile says which they are; else the first bands, a single one repeated."""
    if all(name in header.colours for name in ("red", "green", "blue")) and count == 3:
        return tuple(header.colours.index(name) + 1 for name in ("red", "green", "blue"))
    return tuple(min(band, header.bands) for band in range(1, count + 1))


def guess_nodata(
    headers: Sequence[TileHeader], images_crs: str | None, bands: tuple[int | str, ...]
) -> tuple[list[Nodata], dict[str, str]]:
    """What each value that may stand for nodata would take away, by the rule that the run goes by.

    The values are those that tiles declare, and black and white, which collars and holes are made of. Also paths of
    damaged tiles, which count for nothing, with the reason.
    """
    declared = {header.nodata for header in headers if header.nodata is not None}
    guesses = {0.0} | {float(np.iinfo(header.dtype).max) for header in headers if header.dtype.startswith("uint")}
    values = sorted(value for value in declared | guesses if not math.isnan(value))  # NaN is invalid in any case
    scanned: list[tuple[TileHeader, float, list[int]]] = []
    damaged = {}
    for header in headers:
        metres = ground_m(header, tile_crs(header, images_crs))
        numbers = resolve_bands(bands, header)
        try:
            scanned.append((header, metres, [_invalid_px(header, numbers, value, metres) for value in values]))
        except TileError as error:
            damaged[header.path] = error.reason
    if not scanned:
        path, reason = next(iter(damaged.items()))
        raise UserError(f"{path}: {reason}, as all {len(damaged)} tiles looked at; expected tiles that can be read")
    total = sum(header.width * header.height for header, _, _ in scanned)
    found = []
    for index, value in enumerate(values):
        counts = [(pixels[index], metres) for _, metres, pixels in scanned]
        pixels_in_all = sum(pixels for pixels, _ in counts)
        area = sum(pixels * metres**2 for pixels, metres in counts)
        tiles = sum(pixels > 0 for pixels, _ in counts)
        found.append(Nodata(value, len(scanned), tiles, pixels_in_all, pixels_in_all / total, area))
    return found, damaged


def _invalid_px(header: TileHeader, bands: tuple[int, ...], value: float, metres: float) -> int:
    """How many pixels of a tile a value would take away. TileError where the tile cannot be read."""
    tile = Tile(
        header.path,
        Window(0, 0, header.height, header.width),
        bands,
        (value,),
        resolve_tolerance("auto", header),
        speckle_tolerance=resolve_speckle_tolerance("auto", header),
    )
    return scan_tile(tile, max(1, round(1000 / metres**2)), lambda window, mask: None).invalid_px


def _yaml(
    found: Found, bands: tuple[int | str, ...], nodata: Sequence[Nodata], given: dict[str, Any], target: Path
) -> str:
    headers = found.used
    first = headers[0]
    systems = Counter(crs_name(tile_crs(header, found.images_crs)) for header in headers)
    sizes = sorted(ground_m(header, tile_crs(header, found.images_crs)) for header in headers)
    metres = f"{sizes[0]:.3g}" if sizes[-1] - sizes[0] < 0.005 else f"{sizes[0]:.3g} to {sizes[-1]:.3g}"
    pixels = sum(header.width * header.height for header in headers) / 1e6
    folder = found.folder.resolve()
    name = str(given.get("name", folder.parent.name if folder.name.lower() in ("tiles", "images") else folder.name))
    colours = ", ".join(first.colours)
    lines = [
        f"# Written by segpipe init on {datetime.now(UTC).date()}. Run it with: segpipe run {target.name}",
        f"# {target.with_suffix('.png').name} shows the tiles, and hatched what counts as nodata.",
        "",
        f"name: {_quoted(name)}",
        f"# {len(headers)} tiles, {pixels:,.1f} Mpx, {first.bands} bands ({colours}) of {first.dtype}",
    ]
    for path, reason in list(found.others.items())[:LISTED]:
        lines.append(f"# left out: {_relative(Path(path), target)}: {' '.join(reason.split())}")
    if len(found.others) > LISTED:
        lines.append(f"# left out: {len(found.others) - LISTED} more")
    lines += ["images:", *(f"  - {_quoted(text)}" for text in _images(found, target))]
    lines += [
        f"model: {_quoted(str(given.get('model', MODEL)))}",
        f"output: {_quoted(str(given.get('output', f'runs/{name}')))}",
        "",
        f"bands: {list(bands)}    # which bands are red, green and blue",
    ]
    told = ", ".join(f"{count} tiles in {system}" for system, count in systems.most_common())
    lines.append(f"# {told}; {metres} m a pixel on the ground. Other ones: `grid: {{crs: EPSG:…, resolution_m: …}}`")
    if found.images_crs is not None:
        lines.append(f"images_crs: {_quoted(str(found.images_crs))}    # given to tiles that have none")
    if first.dtype != "uint8" and "scale" not in given:
        lines.append("scale: auto    # which samples become black and white: 2 and 98 % of the whole city's")
    lines += _nodata_lines(nodata)
    if len(set(found.others.values()) - {"lies far from most tiles"}):
        lines.append("on_tile_error: fail    # skip: tiles that cannot be read become nodata, and are counted")
    rest = {key: value for key, value in given.items() if key not in (*WRITTEN_AS_TEXT, "bands")}
    if rest:
        lines += ["", as_yaml(rest).rstrip()]
    return "\n".join(lines) + "\n"


def _nodata_lines(nodata: Sequence[Nodata]) -> list[str]:
    """The proposed values, and what each value that was tried would take away."""
    if not nodata:
        return []
    lines = [
        f"# Patches of 1000 m2 or more, or along 64 px of a tile's edge, in {nodata[0].looked_at} tiles that were read:"
    ]
    for it in nodata:
        told = f"{it.area_m2:,.0f} m2, {it.share:.2%}, in {it.tiles} of them" if it.pixels else "nothing"
        lines.append(f"#   {it.value:g} in all bands would take away {told}")
    proposed = [int(it.value) if it.value == int(it.value) else it.value for it in nodata if it.share >= LEAST_SHARE]
    lines.append(f"nodata: {proposed}" if proposed else "nodata: []")
    return lines


def _images(found: Found, target: Path) -> list[str]:
    """Globs where all that they match is used, else the tiles one by one."""
    if found.others:
        return [_relative(Path(header.path), target) for header in found.used]
    return [_relative(Path(pattern), target) for pattern in _patterns(found.folder)]


def _relative(path: Path, target: Path) -> str:
    base = target.parent.resolve()
    path = path.resolve()
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def write_picture(path: Path, plan: Plan, looked: set[str]) -> None:
    """Outlines of all tiles over small pictures of those looked at, their invalid pixels hatched."""
    bounds = plan.bounds
    factor = max(1, -(-max(bounds.shape_yx) // PICTURE_PX))
    height, width = -(-bounds.height // factor), -(-bounds.width // factor)
    picture_HW3 = np.full((height, width, 3), PAPER_RGB, np.uint8)
    boxes = []
    for index, tile in enumerate(plan.tiles):
        box = _reduced(tile.cover.intersect(bounds), bounds, factor)
        boxes.append(box)
        if tile.path in looked:
            part = picture_HW3[box.row_off : box.row_stop, box.col_off : box.col_stop]
            _paint(part, tile, plan.min_nodata_pixels(index), box)
    picture = Image.fromarray(picture_HW3)
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        draw.rectangle((box.col_off, box.row_off, box.col_stop - 1, box.row_stop - 1), outline=OUTLINE_RGB)
    with written_beside(path) as partial:
        picture.save(partial, "PNG")


def _reduced(window: Window, bounds: Window, factor: int) -> Window:
    """A window of the lattice in pixels of the picture, at least one wide."""
    row, col = (window.row_off - bounds.row_off) // factor, (window.col_off - bounds.col_off) // factor
    return Window(row, col, max(1, window.height // factor), max(1, window.width // factor))


def _paint(picture_HW3: NDArray[np.uint8], tile: Tile, min_pixels: int, box: Window) -> None:
    """Paint a tile's thumbnail, and hatch its invalid pixels."""
    height, width = picture_HW3.shape[:2]
    thumbnail_BHW = read_thumbnail(tile, (height, width))
    bands = [min(band, len(thumbnail_BHW) - 1) for band in range(3)]
    invalid_HW = np.zeros((height, width), np.bool_)

    def mark(window: Window, mask_HW: NDArray[np.bool_]) -> None:
        rows, cols = np.nonzero(mask_HW)
        rows, cols = rows + window.row_off - tile.window.row_off, cols + window.col_off - tile.window.col_off
        invalid_HW[rows * height // tile.window.height, cols * width // tile.window.width] = True

    scan_tile(tile, min_pixels, mark)
    shown_HW3 = np.moveaxis(thumbnail_BHW[bands], 0, -1)
    picture_HW3[:] = np.where(invalid_HW[..., None], hatch(box.row_off, box.col_off, height, width), shown_HW3)
