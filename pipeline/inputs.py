"""The files that a run is made from: found, put in order, and recognised again. Nothing heavy is imported here."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from segpipe.tasks.errors import UserError

from .config import CityConfig

RASTERS = frozenset({".tif", ".tiff", ".jp2", ".vrt", ".png", ".jpg", ".jpeg", ".img"})
"""Endings that count as imagery where a folder is named."""
PUBLISHED = ("mask.tif", "probability.tif", "preview.png")


def find_images(patterns: tuple[str, ...], base: CityConfig | Path, key: str = "images") -> tuple[Path, ...]:
    """Files of a glob, a list, a folder or a VRT, each pattern in natural order (tile2 before tile10).

    A VRT stands for the list of its sources. UserError if a pattern matches nothing, or a file is named twice.
    """
    folder = base.file.parent.absolute() if isinstance(base, CityConfig) else base
    # What a run has published is no tile of the next, even where a glob goes through all folders.
    output = base.path(base.output).resolve() if isinstance(base, CityConfig) else folder
    published = {output / name for name in PUBLISHED} if isinstance(base, CityConfig) else set()
    found: list[Path] = []
    for pattern in patterns:
        start = (folder / Path(pattern).expanduser()).resolve()
        if start.is_dir():
            matches = [p for p in start.iterdir() if p.suffix.lower() in RASTERS]
        elif start.exists():
            matches = [start]
        else:
            anchor = Path(start.anchor)
            matches = [p for p in anchor.glob(str(start.relative_to(anchor))) if p.is_file()]
            matches = [p for p in matches if p not in published]
        if not matches:
            raise UserError(f"{key}: {pattern} matches no file in {folder}; expected a glob, a list, a folder or a VRT")
        for match in sorted(matches, key=_natural):
            found += _vrt_sources(match) if match.suffix.lower() == ".vrt" else [match]
    twice = next((p for i, p in enumerate(found) if p in found[:i]), None) if len(set(found)) < len(found) else None
    if twice is not None:
        raise UserError(f"{key}: {twice} is named twice; expected each tile once")
    return tuple(found)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]


def _vrt_sources(path: Path) -> Iterator[Path]:
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"{path}: not a VRT ({error}); expected an XML file that lists its sources") from None
    names = dict.fromkeys(
        (path.parent if node.get("relativeToVRT") == "1" else Path("/")) / (node.text or "")
        for node in root.iter("SourceFilename")
    )
    if not names:
        raise UserError(f"{path}: no SourceFilename in it; expected a VRT of at least one raster")
    yield from (name.resolve() for name in names)


def stamp(path: Path) -> list[int]:
    """[size in bytes, time of change in ns], of a tile with its external mask: the same stamp, an unchanged file."""
    mask = Path(f"{path}.msk")
    stats = [file.stat() for file in ([path, mask] if mask.exists() else [path])]
    return [sum(status.st_size for status in stats), max(status.st_mtime_ns for status in stats)]


def machine() -> dict[str, str]:
    """What the recipe would be resolved from, found without importing torch: equal machines resolve alike."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    gpus = Path("/proc/driver/nvidia/gpus")
    return {
        "cpu": blake2b(flags.encode(), digest_size=8).hexdigest(),
        "cores": str(os.cpu_count()),
        "gpus": ",".join(sorted(p.name for p in gpus.iterdir())) if gpus.is_dir() else "",
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
        "torch": version("torch"),
        "segpipe": version("segpipe"),
    }


def versions() -> dict[str, str]:
    """Versions of what the outputs were made with."""
    names = ("segpipe", "torch", "dask", "zarr", "numpy", "rasterio", "shapely", "pyogrio", "pyproj")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
