"""The files that a run is made from: found, put in order, and recognised again. Nothing heavy is imported here."""

from __future__ import annotations

import os
import platform
import re
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.files import file_stamp

from .config import CityConfig
from .vrt import sources_of

RASTERS = frozenset({".tif", ".tiff", ".jp2", ".vrt", ".png", ".jpg", ".jpeg", ".img"})
"""Endings that count as imagery where a folder is named."""
PUBLISHED = frozenset({"mask.tif", "probability.tif", "preview.png"})
KEPT = frozenset({"store.zarr", "fragments", "ledger", "validity"})
PARTIAL = ".partial"
"""In the names of what is being written, or was when a run was killed."""


def find_images(patterns: tuple[str, ...], base: CityConfig | Path, key: str = "images") -> tuple[Path, ...]:
    """Files of a glob, a list, a folder or a VRT, each pattern in natural order (tile2 before tile10).

    What a run writes into its output folder is no tile of the next, even where that is the folder of the tiles or a
    glob goes through it. A VRT stands for the list of its sources. UserError if a pattern matches nothing, a file is
    named twice, or a VRT is more than the list of its sources.
    """
    folder = base.file.parent.absolute() if isinstance(base, CityConfig) else base
    output = base.path(base.output).resolve() if isinstance(base, CityConfig) else None
    # A nodata value in the YAML stands above those of the files.
    nodata_counts = isinstance(base, CityConfig) and base.nodata is None
    found: list[Path] = []
    for pattern in patterns:
        try:
            matches = _matches(folder / Path(pattern).expanduser(), output)
        except (ValueError, RuntimeError) as error:  # of glob and of expanduser
            raise UserError(f"{key}: {pattern}: {error}; expected a glob such as tiles/*.tif") from None
        if not matches:
            raise UserError(f"{key}: {pattern} matches no file in {folder}; expected a glob, a list, a folder or a VRT")
        for match in sorted(matches, key=_natural):
            found += sources_of(match, nodata_counts) if match.suffix.lower() == ".vrt" else [match]
    twice = next((p for i, p in enumerate(found) if p in found[:i]), None) if len(set(found)) < len(found) else None
    if twice is not None:
        raise UserError(f"{key}: {twice} is named twice; expected each tile once")
    return tuple(found)


def _matches(path: Path, output: Path | None) -> list[Path]:
    """Files that a path or a glob means. As far as the folders of a glob exist as they are written, they are meant."""
    if path.is_dir():
        found = [p for p in path.resolve().iterdir() if p.suffix.lower() in RASTERS and p.is_file()]
    elif path.exists():
        # The folder is resolved and the name is not: side files lie beside the name.
        return [path.parent.resolve() / path.name]
    else:
        folder, rest = Path(path.anchor), list(path.parts[1:])
        while len(rest) > 1 and (folder / rest[0]).is_dir():
            folder /= rest.pop(0)
        found = [p for p in folder.resolve().glob("/".join(rest)) if p.is_file()]
    return [p for p in found if output is None or not _is_product(p, output)]


def _is_product(path: Path, output: Path) -> bool:
    """Whether a file is one that a run writes into its output folder."""
    if PARTIAL not in path.name and not {*path.parts} & (PUBLISHED | KEPT):
        return False
    place = path.parent.resolve() / path.name
    if not place.is_relative_to(output):
        return False
    return PARTIAL in path.name or place.relative_to(output).parts[0] in PUBLISHED | KEPT


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]


def stamp(path: Path) -> list[str | int]:
    """What `file_stamp` says of a tile and its side files; nothing where there is no such file."""
    try:
        return list(file_stamp(str(path)))
    except TileError:
        return []


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
