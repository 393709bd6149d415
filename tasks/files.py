"""Files: which files make up one tile, and how they are recognised again. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from xml.etree import ElementTree

from .errors import TileError


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

    The same stamp, an unchanged tile. Raises TileError.
    """
    try:
        stats = [(_ending(file, path), file.stat()) for file in side_files(path)]
    except OSError as error:
        raise TileError(path, error.strerror or str(error)) from error
    return tuple(value for ending, stat in stats for value in (ending, stat.st_size, stat.st_mtime_ns))


def file_digest(path: str) -> str:
    """Blake2b of the bytes of a tile and its side files, in 32 hexadecimal digits. Raises TileError.

    Of .aux.xml only what is no statistics counts: programs write them there when they merely show a tile.
    """
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
