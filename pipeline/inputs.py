"""The files that a run is made from: found, put in order, and recognised again. Nothing heavy is imported here."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from hashlib import blake2b
from importlib import metadata
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from segpipe.tasks.bucket import list_bucket
from segpipe.tasks.errors import TileError, UnreachableError, UserError
from segpipe.tasks.files import file_stamp, is_remote, resolved, tile_name

from .config import CityConfig
from .stac import assets_of, is_item_list
from .vrt import sources_of

version = cache(metadata.version)
"""Of an installed package; each is looked up once, as that takes milliseconds."""
RASTERS = frozenset({".tif", ".tiff", ".jp2", ".vrt", ".png", ".jpg", ".jpeg", ".img", ".ecw", ".sid"})
"""Endings that count as imagery where a folder is named."""
CLOSED = {".ecw": "ECW", ".sid": "MrSID"}
"""Formats that GDAL reads with a vendor's library alone."""
PUBLISHED = frozenset({"mask.tif", "probability.tif", "preview.png", "tile_masks"})
KEPT = frozenset({"store.zarr", "fragments", "ledger", "validity"})
PARTIAL = ".partial"
"""In the names of what is being written, or was when a run was killed."""
ASKED_AT_ONCE = 16
"""Requests to servers under way."""


def find_images(
    patterns: tuple[str, ...], base: CityConfig | Path, key: str = "images", stac: bool = True
) -> tuple[str, ...]:
    """Tiles of a glob, a list, a folder, a VRT or STAC items, each pattern in natural order (tile2 before tile10).

    A tile is an absolute path or a URL. Behind https:// there are single tiles; in a bucket, s3://, globs and folders
    (ending with /) too. A VRT stands for the list of its sources; JSON, if stac, for the assets of the items in it.
    What a run writes into its output folder is no tile of the next, even where that is the folder of the tiles or a
    glob goes through it. UserError if a pattern matches nothing, a tile is named twice, in no UTF-8, or is of a format
    that cannot be read, a VRT is more than the list of its sources, or a server does not answer.
    """
    folder = base.file.parent.absolute() if isinstance(base, CityConfig) else base
    found: list[str] = []
    for pattern in patterns:
        try:
            matches = _matches(pattern, folder, base)
            if not matches:
                where = "object" if is_remote(pattern) else f"file in {folder}"
                raise UserError(f"{pattern} matches no {where}; expected a glob, a list, a folder or a VRT")
            for match in sorted(matches, key=natural):
                found += _tiles_of(match, base, stac)
        except (UserError, TileError, ValueError) as error:
            raise UserError(f"{key}: {error}") from None
    _check_names(found, key)
    _check_formats(found, key)
    twice = next((p for i, p in enumerate(found) if p in found[:i]), None) if len(set(found)) < len(found) else None
    if twice is not None:
        raise UserError(f"{key}: {twice} is named twice; expected each tile once")
    return tuple(found)


def _tiles_of(match: str, base: CityConfig | Path, stac: bool) -> list[str]:
    """The tiles that a file stands for: most for themselves."""
    if _ending(match) == ".vrt":
        # A nodata value in the YAML stands above those of the files.
        return sources_of(match, nodata_counts=isinstance(base, CityConfig) and base.nodata is None)
    if stac and is_item_list(match):
        return sorted(assets_of(match, base.asset if isinstance(base, CityConfig) else None), key=natural)
    return [match]


def _ending(path: str) -> str:
    return PurePosixPath(tile_name(path)).suffix.lower()


def _check_names(tiles: Sequence[str], key: str) -> None:
    """Refuse names whose bytes are no text: no file that is written could hold them."""
    for tile in tiles:
        try:
            tile.encode()
        except UnicodeEncodeError:
            name = os.fsencode(tile).decode(errors="backslashreplace")
            raise UserError(
                f"{key}: {name}: bytes that are no UTF-8 in its name; expected UTF-8; cure: rename it"
            ) from None


def _check_formats(tiles: Sequence[str], key: str) -> None:
    closed = [tile for tile in tiles if _ending(tile) in CLOSED]
    if closed:
        name = tile_name(closed[0])
        more = f" (and {len(closed) - 1} more)" if len(closed) > 1 else ""
        raise UserError(
            f"{key}: {closed[0]}{more}: {CLOSED[_ending(closed[0])]}, which only GDAL builds with its vendor's library"
            " can read; expected GeoTIFF or JPEG 2000; cure, with such a build:"
            f" gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER {name} {Path(name).stem}.tif"
        )


def _matches(pattern: str, folder: Path, base: CityConfig | Path) -> list[str]:
    """Files or URLs that a pattern means. ValueError or TileError for a URL that means nothing."""
    if is_remote(pattern) or pattern.startswith("/vsi"):
        return _remote_matches(resolved(pattern, str(folder / "city.yaml")))
    return _local_matches(pattern, folder, base)


# Files


def _local_matches(pattern: str, folder: Path, base: CityConfig | Path) -> list[str]:
    output = base.path(base.output).resolve() if isinstance(base, CityConfig) else None
    try:
        return [str(path) for path in _file_matches(folder / Path(pattern).expanduser(), output)]
    except (ValueError, RuntimeError) as error:  # of glob and of expanduser
        raise UserError(f"{pattern}: {error}; expected a glob such as tiles/*.tif") from None


def _file_matches(path: Path, output: Path | None) -> list[Path]:
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


def natural(path: str) -> list[tuple[int, int | str]]:
    """What to sort paths by: numbers in them count as numbers."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path) if part]


# Servers


def _remote_matches(pattern: str) -> list[str]:
    """URLs that a URL, or in a bucket a glob or a folder, means. TileError where a bucket cannot be listed."""
    if pattern.startswith("s3://"):
        return _bucket_matches(pattern)
    if {"*", "["} & {*urlsplit(pattern).path}:
        raise UserError(
            f"{pattern}: expected the URL of one tile, of a VRT or of STAC items: a server of files lists no folders"
        )
    return [pattern]


def _bucket_matches(pattern: str) -> list[str]:
    bucket, _, key = pattern.removeprefix("s3://").partition("/")
    *folders, name = key.split("/")
    if not bucket:
        raise UserError(f"{pattern}: names no bucket; expected s3://bucket/folder/*.tif")
    plain = [*_until_wildcard(folders)]
    if not name and len(plain) == len(folders):
        found = list_bucket("/".join((f"s3://{bucket}", *plain)), deep=False)
        return [url for url in found if _ending(url) in RASTERS]
    if len(plain) == len(folders) and not _is_wild(name):
        return [pattern]
    found = list_bucket("/".join((f"s3://{bucket}", *plain)), deep=len(plain) < len(folders))
    parts = key.split("/")
    return [url for url in found if _means(parts, url.removeprefix(f"s3://{bucket}/").split("/"))]


def _is_wild(part: str) -> bool:
    return bool({"*", "?", "["} & {*part})


def _until_wildcard(folders: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        if _is_wild(folder):
            return
        yield folder


def _means(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a glob means a key, both cut at their slashes; as in pathlib, ** is any number of folders."""
    if not pattern or not parts:
        return not pattern and not parts
    first, *rest = pattern
    if first == "**" and rest:
        return any(_means(rest, parts[skip:]) for skip in range(len(parts)))
    return fnmatchcase(parts[0], first) and _means(rest, parts[1:])


def stamp(path: str) -> list[str | int]:
    """What `file_stamp` says of a tile and its side files; nothing where there is no such file."""
    try:
        return list(file_stamp(path))
    except UnreachableError:
        raise
    except TileError:
        return []


def stamps(paths: Sequence[str]) -> dict[str, list[str | int]]:
    """The stamp of each tile, servers being asked for many at once. UserError as soon as one does not answer."""
    found = {path: stamp(path) for path in paths if not is_remote(path)}
    remote = [path for path in paths if is_remote(path)]
    if remote:
        from concurrent.futures import ThreadPoolExecutor

        silent: list[UnreachableError] = []

        def ask(path: str) -> list[str | int]:
            try:
                return [] if silent else stamp(path)
            except UnreachableError as error:
                silent.append(error)
                return []

        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            found |= zip(remote, pool.map(ask, remote), strict=True)
        if silent:
            raise UserError(f"images: {silent[0]}")
    return {path: found[path] for path in paths}


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
