"""Read: source tiles as they lie on disk, mosaicked on the lattice. The only module that opens source rasters.

Axes: B or C band, H row, W column.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # the base of what colorinterp raises; it has no public name
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.session import DummySession, Session
from rasterio.windows import Window as RasterWindow

from .errors import TileError, UserError
from .files import file_stamp, gdal_path, is_remote, open_options
from .grid import Window
from .mosaic import CELL_PX, Mosaic, Pixels, warp_cell
from .remote import look_up, pieces

if TYPE_CHECKING:
    from .scale import Scale  # it reads samples of tiles itself

MaskKind = Literal["none", "per_dataset", "alpha"]
Invalid = Callable[["Tile", Window], NDArray[np.bool_] | None]

OPEN_TILES = 32  # datasets that a thread keeps open: those under a block, so what was scanned is not decoded again
GDAL_OPTIONS: dict[str, Any] = {
    # rasterio takes bytes, as a number; GDAL's own default of 5 % of the machine's memory would be each process's.
    "GDAL_CACHEMAX": 256 * 2**20,
    # Side files (.msk, .aux.xml, .tfw) are looked up by name: no listing of the folder, and masks are still found.
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",
    "GDAL_NUM_THREADS": "1",
    # Damaged JPEG and PNG files are otherwise filled with grey or black and no error.
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
}
_LOSSY_CODECS = ("JPEG", "WEBP", "JXL", "JP2", "J2K", "JPEG2000")
_EXPECTED = "expected a raster that GDAL can read, such as GeoTIFF"


@dataclass(frozen=True)
class TileHeader:
    """What a tile says about itself; no pixel has been read.

    transform is Affine's first six numbers, from (column, row) to (x, y), the identity where the file has none.
    lossy is True where decoded samples may differ from what was encoded. missing_bytes is how many bytes the file
    falls short of the last strip or tile that its TIFF directories promise: 0 for a whole file and for other formats.
    """

    path: str
    width: int
    height: int
    bands: int
    dtype: str
    crs_wkt: str | None
    transform: tuple[float, float, float, float, float, float]
    nodata: float | None
    lossy: bool
    mask: MaskKind
    colours: tuple[str, ...]
    block_shape_yx: tuple[int, int]
    missing_bytes: int


@dataclass(frozen=True)
class Tile:
    """A source raster at its place, and the rule by which its pixels are invalid.

    window covers the whole raster, pixel for pixel: on the lattice, or, for a tile that is to be warped, on the grid of
    its mosaic. cover is the window of the lattice that holds all pixels to which the tile gives a value: window itself
    where there is no mosaic. bands are 1-based. nodata lists sample values; tolerance is the largest distance from
    them, in sample units, and speckle_tolerance the one that takes its place if the tile's collar is speckled (0: that
    is not looked for). scale is how samples become 8 bits; None: they are.
    """

    path: str
    window: Window
    bands: tuple[int, ...]
    nodata: tuple[float, ...] = ()
    tolerance: float = 0.0
    mask: MaskKind = "none"
    speckle_tolerance: float = 0.0
    scale: Scale | None = None
    mosaic: Mosaic | None = None
    warped_cover: Window | None = None

    def __post_init__(self) -> None:
        if not self.bands or min(self.bands) < 1:
            raise ValueError(f"{self.path}: bands {self.bands}: expected 1-based band numbers")
        if not self.window.pixels:
            raise ValueError(f"{self.path}: {self.window}: expected a window with pixels")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"{self.path}: tolerance {self.tolerance}: expected 0 or more")
        if (self.mosaic is None) != (self.warped_cover is None):
            raise ValueError(f"{self.path}: expected a cover for a tile of a mosaic, and for no other")

    @property
    def cover(self) -> Window:
        """The window of the lattice that holds all pixels to which the tile gives a value."""
        return self.window if self.warped_cover is None else self.warped_cover


def read_header(path: str) -> TileHeader:
    """Header of one tile. Raises UserError in one line where the file is missing, no raster or cut in its header."""
    if not is_remote(path) and not Path(path).exists():
        raise UserError(f"{path}: no such file; expected a raster")
    try:
        with _gdal(path), _open(path) as dataset:
            if not dataset.count:
                raise UserError(f"{path}: holds no raster band of its own; {_EXPECTED}")
            transform = tuple(float(value) for value in dataset.transform[:6])
            return TileHeader(
                path=path,
                width=dataset.width,
                height=dataset.height,
                bands=dataset.count,
                dtype=dataset.dtypes[0],
                crs_wkt=dataset.crs.to_wkt() if dataset.crs else None,
                transform=(transform[0], transform[1], transform[2], transform[3], transform[4], transform[5]),
                nodata=None if dataset.nodata is None else float(dataset.nodata),
                lossy=_is_lossy(dataset),
                mask=_mask_kind(dataset),
                colours=tuple(colour.name for colour in dataset.colorinterp),
                block_shape_yx=dataset.block_shapes[0],
                missing_bytes=_missing_bytes(path),
            )
    except (RasterioError, CPLE_BaseError, OSError) as error:
        raise UserError(f"{path}: {_what_it_is(path, error)}; {_EXPECTED}") from error


def resolve_bands(names: tuple[int | str, ...], header: TileHeader) -> tuple[int, ...]:
    """1-based numbers of a tile's bands, from numbers or from colour interpretations such as red or nir.

    Raises UserError where the tile has no such band, or several of that colour.
    """
    numbers = []
    found = f"{header.bands} bands ({', '.join(header.colours)})"
    for name in names:
        wanted = str(name).lower()
        if isinstance(name, int):
            matches = [name] if 1 <= name <= header.bands else []
        else:
            matches = [band for band, colour in enumerate(header.colours, start=1) if colour.lower() == wanted]
        if len(matches) != 1:
            which = "several bands" if matches else "no band"
            raise UserError(
                f"{header.path}: has {which} {name}: found {found}; expected `bands:` of numbers from 1 to"
                f" {header.bands}, or of colours that one band each has"
            )
        numbers += matches
    return tuple(numbers)


def read_window(tiles: Sequence[Tile], window: Window, invalid: Invalid) -> Pixels:
    """Mosaic of tiles over a window of the lattice: image_CHW uint8 and valid_HW, True where a tile has a valid pixel.

    Where tiles overlap, the later in the list wins where it is valid; tiles of one mosaic are put together on its grid
    first, and have the place of the last of them. Invalid pixels are 0 in the image. invalid(tile, window) gives the
    tile's invalid pixels (True) within a part of its own window, None where all are valid.

    Raises TileError where a tile cannot be decoded or is not the one that was planned.
    """
    bands = {len(tile.bands) for tile in tiles}
    if len(bands) != 1:
        raise ValueError(f"tiles with {sorted(bands)} bands: expected at least one tile, and one number of bands")
    pixels = np.zeros((bands.pop(), *window.shape_yx), np.uint8), np.zeros(window.shape_yx, np.bool_)
    warped: set[Mosaic] = set()
    # From the last to the first: what a later tile covers need not be read from an earlier one.
    for tile in reversed(tiles):
        if tile.mosaic is None:
            _put_below(pixels, window, tile.window, partial(_read_tile, tile, invalid))
        elif tile.mosaic not in warped:
            warped.add(tile.mosaic)
            members = [member for member in tiles if member.mosaic == tile.mosaic]
            cover = members[0].cover
            for member in members[1:]:
                cover = cover.union(member.cover)
            for index in cover.intersect(window).cells(CELL_PX):
                cell = Window.cell(*index, CELL_PX)
                _put_below(pixels, window, cell, partial(_read_cell, tile.mosaic, members, invalid, cell))
    return pixels


def _put_below(
    pixels: Pixels, window: Window, lies: Window, read: Callable[[Window, NDArray[np.bool_]], Pixels]
) -> None:
    """Fill the pixels of window that nothing is in yet with what read gives of the part that lies has of it."""
    image_CHW, valid_HW = pixels
    part = lies.intersect(window)
    rows, cols = part.within(window)
    wanted_HW = ~valid_HW[rows, cols]
    if not wanted_HW.any():
        return
    samples_CHW, part_valid_HW = read(part, wanted_HW)
    wanted_HW &= part_valid_HW
    if wanted_HW.all():
        image_CHW[:, rows, cols] = samples_CHW
    else:
        np.copyto(image_CHW[:, rows, cols], samples_CHW, where=wanted_HW)
    valid_HW[rows, cols] |= wanted_HW


def _read_tile(tile: Tile, invalid: Invalid, part: Window, wanted_HW: NDArray[np.bool_]) -> Pixels:
    """A part of one tile, on its own grid; the samples are not read where none of the wanted pixels is valid."""
    bad_HW = invalid(tile, part)
    valid_HW = np.ones(part.shape_yx, np.bool_) if bad_HW is None else ~bad_HW
    if not (valid_HW & wanted_HW).any():
        return np.zeros((len(tile.bands), *part.shape_yx), np.uint8), valid_HW
    return _as_u8(tile, read_samples(tile, part)), valid_HW


def _as_u8(tile: Tile, samples_CHW: NDArray[Any]) -> NDArray[np.uint8]:
    """Samples in the 8 bits that are stored, by the tile's scale where it has one."""
    if tile.scale is not None:
        return tile.scale.to_u8(samples_CHW)
    if samples_CHW.dtype != np.uint8:
        raise TileError(tile.path, f"{samples_CHW.dtype} samples: expected uint8, or a scale")
    return samples_CHW


def _read_cell(
    mosaic: Mosaic, tiles: Sequence[Tile], invalid: Invalid, cell: Window, part: Window, wanted_HW: NDArray[np.bool_]
) -> Pixels:
    """A part of one cell of the lattice, warped from the tiles of a mosaic."""

    def read_source(source: Window) -> Pixels:
        pixels = np.zeros((len(tiles[0].bands), *source.shape_yx), np.uint8), np.zeros(source.shape_yx, np.bool_)
        for tile in reversed(tiles):
            _put_below(pixels, source, tile.window, partial(_read_tile, tile, invalid))
        return pixels

    image_CHW, valid_HW = warp_cell(mosaic, cell, read_source)
    rows, cols = part.within(cell)
    return image_CHW[:, rows, cols], valid_HW[rows, cols]


def read_samples(tile: Tile, window: Window) -> NDArray[Any]:
    """The tile's selected bands over a window of the lattice within it: (band, row, column), in its own dtype."""
    with _decoding(tile) as dataset:
        samples: NDArray[Any] = dataset.read(list(tile.bands), window=_local(tile, window))
        return samples


def read_thumbnail(tile: Tile, shape_yx: tuple[int, int]) -> NDArray[np.uint8]:
    """The whole tile in a few pixels, (band, row, column): pixels at regular steps, or an overview's."""
    with _decoding(tile) as dataset:
        return _as_u8(tile, dataset.read(list(tile.bands), out_shape=(len(tile.bands), *shape_yx)))


def check_readable(tile: Tile) -> None:
    """Decode a whole tile, row of blocks by row of blocks. TileError if any part of it cannot be decoded."""
    with _decoding(tile) as dataset:
        rows = max(1, min(dataset.block_shapes[0][0], tile.window.height))
        for row in range(0, tile.window.height, rows):
            height = min(rows, tile.window.height - row)
            dataset.read(list(tile.bands), window=RasterWindow(0, row, tile.window.width, height))


def read_mask(tile: Tile, window: Window) -> NDArray[Any] | None:
    """Samples (row, column) of the tile's mask or alpha band over a window of the lattice that lies within it.

    None where the tile has neither, or where its alpha band is one of the selected bands and so is imagery.
    """
    if tile.mask == "none":
        return None
    with _decoding(tile) as dataset:
        mask: NDArray[Any]
        if tile.mask == "per_dataset":
            mask = dataset.read_masks(1, window=_local(tile, window))
            return mask
        if ColorInterp.alpha not in dataset.colorinterp:
            raise TileError(tile.path, "has no alpha band any more: it changed after it was planned")
        band = dataset.colorinterp.index(ColorInterp.alpha) + 1
        if band in tile.bands:
            return None
        mask = dataset.read(band, window=_local(tile, window))
        return mask


def _local(tile: Tile, window: Window) -> RasterWindow:
    if not tile.window.contains(window):
        raise ValueError(f"{window}: expected a window within the tile's {tile.window}")
    rows, cols = window.within(tile.window)
    return RasterWindow.from_slices(rows, cols)


def _gdal(path: str) -> rasterio.Env:
    of_buckets = tuple(sorted(it for it in os.environ.items() if it[0].startswith("AWS_")))
    return rasterio.Env(session=_session(of_buckets), **{**GDAL_OPTIONS, **open_options(path)})


@lru_cache(maxsize=1)
def _session(of_buckets: tuple[tuple[str, str], ...]) -> Session:
    """The keys to buckets in the environment, as rasterio finds them: anew for every Env, which takes it 15 ms."""
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    return Session.from_environ() if keys <= dict(of_buckets).keys() else DummySession()


def _open(path: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # told by the plan, in its own words
        return rasterio.open(gdal_path(path))


class _OpenTiles(threading.local):
    """The datasets that one thread has open, the last used at the end: GDAL wants one handle per thread."""

    def __init__(self) -> None:
        self._datasets: OrderedDict[str, tuple[tuple[str | int, ...], Any]] = OrderedDict()

    def get(self, path: str) -> Any:
        """The dataset of path; opened again if the file was replaced since."""
        stamp = file_stamp(path)
        known = self._datasets.get(path)
        if known is None or known[0] != stamp:
            self.drop(path)
            self._datasets[path] = stamp, _open(path)
            while len(self._datasets) > OPEN_TILES:
                self.drop(next(iter(self._datasets)))
        self._datasets.move_to_end(path)
        return self._datasets[path][1]

    def drop(self, path: str) -> None:
        """Close the dataset of path if it is open."""
        known = self._datasets.pop(path, None)
        if known is not None:
            known[1].close()


_open_tiles = _OpenTiles()


@contextmanager
def _decoding(tile: Tile) -> Iterator[Any]:
    """The tile's open dataset, checked against the plan; whatever GDAL raises within becomes a TileError."""
    try:
        with _gdal(tile.path):
            dataset = _open_tiles.get(tile.path)
            if (dataset.height, dataset.width) != tile.window.shape_yx or dataset.count < max(tile.bands):
                found = f"{dataset.width} x {dataset.height} px with {dataset.count} bands"
                planned = f"{tile.window.width} x {tile.window.height} px with band {max(tile.bands)}"
                raise TileError(tile.path, f"is {found}, was planned as {planned}: it changed after it was planned")
            yield dataset
    except (RasterioError, CPLE_BaseError, OSError) as error:
        # A handle that failed once may hold damaged blocks: a repaired file is opened afresh.
        _open_tiles.drop(tile.path)
        missing = _missing_bytes(tile.path)
        cut = f" (the file ends {missing:,} bytes too early)" if missing else ""
        raise TileError(tile.path, f"cannot be read: {_reason(error)}{cut}") from error


def _reason(error: BaseException) -> str:
    """The root of an error in one line: rasterio wraps what GDAL said, GDAL wraps what libtiff said."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(getattr(error, "errmsg", error)).split())
    return words[:197] + "..." if len(words) > 200 else words


def _is_lossy(dataset: Any) -> bool:
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    reversibility = structure.get("COMPRESSION_REVERSIBILITY", "").upper()
    if reversibility:
        # "LOSSLESS (possibly)" is what JPEG 2000 says of reversible wavelets that may have been cut short.
        return bool(reversibility != "LOSSLESS")
    codec = structure.get("COMPRESSION", "").upper().split()
    return any(word in _LOSSY_CODECS for word in codec) or dataset.driver.upper().startswith(_LOSSY_CODECS)


def _mask_kind(dataset: Any) -> MaskKind:
    flags = dataset.mask_flag_enums[0]
    if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags and MaskFlags.nodata not in flags:
        return "per_dataset"
    return "alpha" if ColorInterp.alpha in dataset.colorinterp else "none"


def _what_it_is(path: str, error: BaseException) -> str:
    """What a file that GDAL cannot open holds, from its first bytes."""
    if not is_remote(path) and Path(path).is_dir():
        return "is a folder"
    try:
        size, head = _size_and_head(path)
    except TileError as unreadable:
        return unreadable.reason
    if not head:
        return "is empty"
    if head[:4] in _TIFF_KINDS:
        missing = _missing_bytes(path)
        damage = f"is a TIFF whose header is damaged or cut off ({size:,} bytes; {_reason(error)})"
        return f"truncated, {missing:,} bytes are missing at its end" if missing else damage
    text = head.decode("utf-8", "ignore")
    if len(text) > len(head) // 2 and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"is text that begins with {' '.join(text.split())[:40]!r}"
    return f"is no raster: begins with the bytes {head[:8].hex(' ')}"


def _size_and_head(path: str) -> tuple[int, bytes]:
    """Size of a tile and its first 64 bytes. TileError where they cannot be had."""
    if is_remote(path):
        return look_up(path).size, next(pieces(path), b"")[:64]
    try:
        with Path(path).open("rb") as stream:
            return Path(path).stat().st_size, stream.read(64)
    except OSError as error:
        raise TileError(path, f"cannot be opened: {_reason(error)}") from error


# TIFF 6.0, section 2, and BigTIFF: byte order, type of a directory's number of entries, type of offsets and lengths.
_TIFF_KINDS = {
    b"II*\0": ("<", "u2", "u4"),
    b"MM\0*": (">", "u2", "u4"),
    b"II+\0": ("<", "u8", "u8"),
    b"MM\0+": (">", "u8", "u8"),
}
_TIFF_INTEGERS = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_SUBFILE_TYPE = 254  # bit 0: an overview, which is never read
_OFFSETS_COUNTS = ((273, 279), (324, 325))  # tags of offsets and byte counts: of strips, of tiles


def _missing_bytes(path: str) -> int:
    """By how much a TIFF is shorter than the end of the last strip or tile that it lists; 0 for what is no TIFF.

    Strips with offset 0 are sparse, not missing. Behind a URL it is not looked for: 0.
    """
    missing = 0
    if is_remote(path):
        return missing
    # A directory that cannot be parsed is left to GDAL's own words. It may be cut off: those before it count.
    with suppress(OSError, ValueError), Path(path).open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        kind = _TIFF_KINDS.get(stream.read(4))
        for end in _data_ends(stream, *kind) if kind else ():
            missing = max(missing, end - size)
    return missing


def _data_ends(stream: BinaryIO, order: str, count_code: str, word: str) -> Iterator[int]:
    """Where the image data of each directory of a TIFF ends, in bytes from the start of the file.

    ValueError at a directory that cannot be parsed.
    """

    def numbers(code: str, count: int, offset: int) -> NDArray[np.int64]:
        stream.seek(offset)
        return np.frombuffer(stream.read(count * np.dtype(code).itemsize), order + code, count).astype(np.int64)

    word_bytes = np.dtype(word).itemsize
    entry = np.dtype(
        [("tag", order + "u2"), ("type", order + "u2"), ("count", order + word), ("value", f"V{word_bytes}")]
    )
    seen: set[int] = set()
    directory = int(numbers(word, 1, word_bytes)[0])
    while directory and directory not in seen:
        seen.add(directory)
        first = directory + np.dtype(count_code).itemsize
        length = int(numbers(count_code, 1, directory)[0])
        stream.seek(first)
        tags: dict[int, NDArray[np.int64]] = {}
        for index, item in enumerate(np.frombuffer(stream.read(length * entry.itemsize), entry, length)):
            code = _TIFF_INTEGERS.get(int(item["type"]))
            if code and int(item["tag"]) in (_SUBFILE_TYPE, *sum(_OFFSETS_COUNTS, ())):
                # A value that does not fit into its entry lies elsewhere, and the entry holds its offset.
                place = first + index * entry.itemsize + entry.itemsize - word_bytes
                if int(item["count"]) * np.dtype(code).itemsize > word_bytes:
                    place = int(numbers(word, 1, place)[0])
                tags[int(item["tag"])] = numbers(code, int(item["count"]), place)
        for offsets, counts in _OFFSETS_COUNTS:
            if offsets in tags and counts in tags and not (tags.get(_SUBFILE_TYPE, np.zeros(1, np.int64))[0] & 1):
                yield int((tags[offsets] + tags[counts])[tags[offsets] > 0].max(initial=0))
        directory = int(numbers(word, 1, first + length * entry.itemsize)[0])
