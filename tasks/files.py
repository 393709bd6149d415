"""Files: which files make up one tile, and how they are recognised again. Nothing heavy is imported here.

A tile is named by the path of a file, or by a URL: https://, http:// or s3://. A tile behind a URL stands alone: what
lies beside it is not looked for, which would be ten requests a tile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from posixpath import dirname, join, normpath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urljoin, urlsplit
from xml.etree import ElementTree

from .errors import TileError
from .remote import look_up, pieces

SCHEMES = ("https://", "http://", "s3://")
REMOTE_OPTIONS: dict[str, Any] = {
    "GDAL_HTTP_CONNECTTIMEOUT": "5",
    # A server that is silent is given up; one that is slow is not.
    "GDAL_HTTP_LOW_SPEED_TIME": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
    "GDAL_HTTP_MAX_RETRY": "2",
    "GDAL_HTTP_RETRY_DELAY": "0.3",
    # No side files are looked for. So these options are for tiles behind URLs alone.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # Else what GDAL once read of a file, or did not find, stands in this process whatever becomes of the file.
    "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/",
}
"""How GDAL opens a tile behind a URL."""


def is_remote(path: str) -> bool:
    """Whether a tile is named by a URL."""
    return path.startswith(SCHEMES)


def gdal_path(path: str) -> str:
    """What GDAL calls a tile: /vsicurl/ and /vsis3/ stand for URLs, a file has its own path."""
    if path.startswith("s3://"):
        return f"/vsis3/{path.removeprefix('s3://')}"
    return f"/vsicurl/{path}" if is_remote(path) else path


def resolved(name: str, base: str) -> str:
    """The absolute path or the URL that a file or URL base means by a name: GDAL's, a file's, relative to base or not.

    ValueError for what is neither file nor URL of a known kind, such as /vsizip/ or gs://, and for logins in a URL.
    """
    name = _without_vsi(name)
    scheme, colon, rest = name.partition("://")
    if is_remote(base) and not colon:
        name = _joined(name, base)
    elif colon and scheme.lower() == "file":
        name = unquote(urlsplit(name).path)
    elif colon and f"{scheme.lower()}://" not in SCHEMES and re.fullmatch(r"[a-zA-Z][\w.+-]*", scheme):
        raise ValueError(f"{name}: {scheme}:// cannot be read; expected a file, https:// or s3://")
    elif colon:
        name = f"{scheme.lower()}://{rest}"
    if not is_remote(name):
        path = Path(base).parent / name
        # The folder is resolved and the name is not: side files lie beside the name.
        return str(path.parent.resolve() / path.name)
    return name if name.startswith("s3://") else _checked(name)


def _without_vsi(name: str) -> str:
    """A name without GDAL's words for where to look."""
    if name.startswith("/vsis3/"):
        return f"s3://{name.removeprefix('/vsis3/')}"
    if name.startswith("/vsicurl/"):
        return name.removeprefix("/vsicurl/")
    if name.startswith("/vsicurl?"):
        return parse_qs(name.removeprefix("/vsicurl?")).get("url", [""])[0]
    if name.startswith("/vsi"):
        raise ValueError(f"{name}: /{name.split('/')[1]}/ cannot be read; expected a file, https:// or s3://")
    return name


def _joined(name: str, base: str) -> str:
    if not base.startswith("s3://"):
        return urljoin(base, name)
    # Keys of objects are no references: a question mark in one is no query.
    bucket, _, key = base.removeprefix("s3://").partition("/")
    return f"s3://{bucket}{normpath(join('/', dirname(key), name))}"


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
        raise ValueError(f"{parts.scheme}://{host}{parts.path}: a login in the URL, which every output would show")
    if not parts.netloc:
        raise ValueError(f"{url}: names no server; expected for example https://example.org/tile.tif")
    return quote(url, safe="!#$%&'()*+,/:;=?@[]~")


def tile_name(path: str) -> str:
    """The last part of a path or URL, without the query of a URL."""
    if not is_remote(path):
        return Path(path).name
    return PurePosixPath(path if path.startswith("s3://") else unquote(urlsplit(path).path)).name


def open_options(path: str) -> dict[str, Any]:
    """What GDAL needs to be told, besides what it is told of all tiles, to open this one."""
    return REMOTE_OPTIONS if is_remote(path) else {}


def side_files(path: str) -> list[Path]:
    """The tile itself, then the files beside it that GDAL reads with it and that change its pixels or its place.

    Masks (.msk), .aux.xml, .prj, .tab, spilled pixels of an .img (.ige), and world files: the first and the last letter
    of the ending and a w (.tfw), the whole ending and a w (.tifw), and .wld, in small and in capital letters.
    Overviews (.ovr) are none: they are not read. (GDAL, GDALReadWorldFile; tried with GTiff, JPEG, PNG and JP2.)
    """
    tile = Path(path)
    ending = tile.suffix[1:]
    world = [f"{ending[0]}{ending[-1]}w", f"{ending}w", "wld"] if ending else ["wld"]
    endings = [case for it in (*world, "prj", "tab", "ige") for case in dict.fromkeys((it.lower(), it.upper()))]
    named = [Path(f"{path}.msk"), Path(f"{path}.aux.xml"), *(tile.with_suffix(f".{it}") for it in endings)]
    return [tile, *(file for file in named if file != tile and file.is_file())]


def file_stamp(path: str) -> tuple[str | int, ...]:
    """Ending, size in bytes and mtime in ns of a tile and of each of its side files, one after the other.

    Of a tile behind a URL: ending, size, and ETag or else time of change, as the server says in one request.

    The same stamp, an unchanged tile. Raises TileError.
    """
    if is_remote(path):
        return _remote_stamp(path)
    try:
        stats = [(_ending(file, path), file.stat()) for file in side_files(path)]
    except OSError as error:
        raise TileError(path, error.strerror or str(error)) from error
    return tuple(value for ending, stat in stats for value in (ending, stat.st_size, stat.st_mtime_ns))


def file_digest(path: str) -> str:
    """Blake2b of the bytes of a tile and its side files, in 32 hexadecimal digits. Raises TileError.

    Of .aux.xml only what is no statistics counts: programs write them there when they merely show a tile.
    Behind a URL, a strong ETag stands for the bytes, with the URL: of many servers it is but time and size.
    """
    if is_remote(path):
        return _remote_digest(path)
    digest = blake2b(digest_size=16)
    try:
        tile, *others = side_files(path)
        for piece in _pieces(tile):
            digest.update(piece)
        for file in others:
            inner = blake2b(digest_size=16)
            size = 0
            for piece in _without_statistics(file) if file.name.endswith(".aux.xml") else _pieces(file):
                inner.update(piece)
                size += len(piece)
            if size:
                digest.update(_ending(file, path).encode() + inner.digest())
    except OSError as error:
        raise TileError(path, error.strerror or str(error)) from error
    return digest.hexdigest()


def _remote_stamp(url: str) -> tuple[str | int, ...]:
    found = look_up(url)
    version = found.etag or found.modified
    if version is None:
        raise TileError(
            url, "the server gives neither ETag nor Last-Modified, so changes cannot be noticed; cure: copy the tile"
        )
    return PurePosixPath(tile_name(url)).suffix, found.size, version


def _remote_digest(url: str) -> str:
    found = look_up(url)
    digest = blake2b(digest_size=16)
    if found.strong_etag is not None:
        digest.update(f"{url}\n{found.size}\n{found.strong_etag}".encode())
    else:
        for piece in pieces(url):
            digest.update(piece)
    return digest.hexdigest()


def _ending(file: Path, path: str) -> str:
    """What a file's name adds to the tile's own without its ending: a renamed tile is the same tile."""
    return file.name[len(Path(path).stem) :]


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(2**20):
            yield piece


def _without_statistics(file: Path) -> Iterator[bytes]:
    """An .aux.xml without histograms and statistics, and nothing at all where it holds nothing else."""
    data = file.read_bytes()
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        yield data
        return
    for parent in [*root.iter()][::-1]:  # the innermost first: what is left empty goes too
        for child in [*parent]:
            statistics = child.tag == "Histograms" or child.get("key", "").startswith("STATISTICS_")
            if statistics or (child.tag in ("Metadata", "PAMRasterBand") and not len(child)):
                parent.remove(child)
    if len(root):
        yield ElementTree.tostring(root)
