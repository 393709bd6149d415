"""Images without a place on the Earth and their masks, as of Carvana or Oxford-IIIT Pet: matched by name, and cached.

All lie in one store with the layout of a city's: a chunk a picture, one below the other.
Axes: C bands, H rows, W columns.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.files import file_stamp
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.sample import SCORED, Area, count

from .areas import LEAST_PX, PICTURE_WKT, MaskValues, stored_area
from .config import TrainConfig
from .inputs import natural
from .ledger import Ledger
from .plan import key_of
from .store import STORE, Layout, Store, prepare_store

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"})
STEM = "{stem}"
PART_PAIRS = 64
"""Pairs that one task reads."""
MASK_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
VERSION = 1
"""Raised when the same files give other pixels."""


@dataclass(frozen=True)
class Pair:
    """An image and its mask, of shape_yx pixels both."""

    image: Path
    mask: Path
    shape_yx: tuple[int, int]


@dataclass(frozen=True)
class PairsPlan:
    """All pairs, how they are to be read, and the folder of their store. resize_yx None: each at its own size."""

    folder: Path
    pairs: tuple[Pair, ...]
    bands: tuple[int, ...]
    values: MaskValues
    resize_yx: tuple[int, int] | None

    @property
    def chunk_px(self) -> int:
        """Side of a chunk, which holds one picture whole."""
        shapes = [self.resize_yx] if self.resize_yx is not None else [pair.shape_yx for pair in self.pairs]
        return max(LEAST_PX, *(side for shape_yx in shapes for side in shape_yx))

    @property
    def layout(self) -> Layout:
        """One column of chunks."""
        grid = Window(0, 0, len(self.pairs) * self.chunk_px, self.chunk_px)
        return Layout(Lattice(PICTURE_WKT, 1.0, 0.0, 0.0), grid, self.chunk_px, len(self.bands))

    @property
    def parts(self) -> list[range]:
        """The numbers of the pairs that one task reads."""
        return [
            range(start, min(start + PART_PAIRS, len(self.pairs))) for start in range(0, len(self.pairs), PART_PAIRS)
        ]

    def key(self, part: range) -> str:
        """A digest of all that a part's chunks are made from."""
        made_of = [
            (number, file_stamp(str(self.pairs[number].image)), file_stamp(str(self.pairs[number].mask)))
            for number in part
        ]
        return key_of(VERSION, self.chunk_px, self.bands, self.values, self.resize_yx, made_of)


def plan_pairs(config: TrainConfig, folder: Path) -> PairsPlan:
    """Find all images and the mask of each. UserError that names an image without a mask, or with several."""
    pairs = config.pairs
    assert pairs is not None
    images = _images(config, pairs.images)
    masks = [_mask_of(config, image, pairs.masks) for image in images]
    with ThreadPoolExecutor() as pool:
        shapes = list(pool.map(_shape, images))
        mask_shapes = list(pool.map(_shape, masks))
    for image, mask, shape, mask_shape in zip(images, masks, shapes, mask_shapes, strict=True):
        if shape != mask_shape:
            raise UserError(
                f"{mask}: {mask_shape[0]} x {mask_shape[1]} px; expected {shape[0]} x {shape[1]}, as {image} has"
            )
        if pairs.resize_px is None and min(shape) < LEAST_PX:
            raise UserError(f"{image}: {shape[0]} x {shape[1]} px; expected at least {LEAST_PX} on each side")
    found = tuple(Pair(*triple) for triple in zip(images, masks, shapes, strict=True))
    return PairsPlan(folder, found, config.bands, MaskValues.of(pairs), pairs.resize_px)


def _images(config: TrainConfig, patterns: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        path = config.path(pattern)
        inside = [it for it in path.iterdir() if it.suffix.lower() in ENDINGS] if path.is_dir() else None
        matches = _glob(path) if inside is None else inside
        if not matches:
            raise UserError(f"pairs.images: {pattern} matches no file in {config.file.parent.absolute()}")
        found += sorted(matches, key=lambda it: natural(str(it)))
    twice = next((path for path in found if found.count(path) > 1), None) if len(set(found)) < len(found) else None
    if twice is not None:
        raise UserError(f"pairs.images: {twice} is named twice; expected each image once")
    return found


def _glob(path: Path) -> list[Path]:
    return [it for it in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if it.is_file()]


def _mask_of(config: TrainConfig, image: Path, pattern: str) -> Path:
    """The one mask of an image. The pattern may be a glob besides; a name that only begins alike does not match."""
    if STEM not in pattern:
        raise UserError(f"pairs.masks: {pattern}; expected {STEM} in it, which stands for the image's name")
    where = str(config.path(pattern)).replace(STEM, glob.escape(image.stem))
    plain = Path(str(config.path(pattern)).replace(STEM, image.stem))
    matches = [plain] if plain.is_file() else sorted(path for path in _glob(Path(where)) if path != image)
    if len(matches) != 1:
        found = f"{len(matches)} masks ({', '.join(path.name for path in matches[:3])})" if matches else "no mask"
        raise UserError(f"pairs.masks: {image} has {found}; expected one, {where}")
    return matches[0]


def _shape(path: Path) -> tuple[int, int]:
    with _opened(path) as picture:
        return picture.height, picture.width


@contextmanager
def _decoding(path: Path) -> Iterator[Image.Image]:
    """An open picture; what PIL raises about its pixels becomes a TileError."""
    with _opened(path) as picture:
        try:
            yield picture
        except (OSError, SyntaxError, ValueError) as error:
            raise TileError(str(path), f"cannot be decoded to its end ({error})") from None


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        reason = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{path}: {reason}; expected PNG, JPEG, GIF, BMP, WebP or TIFF") from None


# Reading


def read_picture(path: Path, bands: tuple[int, ...] = (1, 2, 3)) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """An image of 8 bits as image_CHW, and valid_HW, False where it is wholly transparent.

    Grey is repeated, palettes are expanded, CMYK becomes RGB. bands: 1-based, of red, green and blue.
    """
    with _decoding(path) as picture:
        if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
            raise UserError(f"{path}: samples of mode {picture.mode}; expected 8 bits; cure: gdal_translate -ot Byte")
        if max(bands) > 3:
            raise UserError(f"{path}: bands {list(bands)}; expected numbers from 1 to 3, which pictures have")
        transparent = "A" in picture.getbands() or "transparency" in picture.info
        pixels_HWC = np.asarray(picture.convert("RGBA" if transparent else "RGB"), np.uint8)
    valid_HW = pixels_HWC[..., 3] != 0 if transparent else np.ones(pixels_HWC.shape[:2], np.bool_)
    image_CHW = np.moveaxis(pixels_HWC[..., [band - 1 for band in bands]], 2, 0)
    return image_CHW * valid_HW, valid_HW


def read_mask(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The values of a mask, mask_HW, and where it has any. Those of a palette are its numbers, not its colours."""
    with _decoding(path) as picture:
        if picture.mode not in MASK_MODES:
            raise UserError(f"{path}: a mask of mode {picture.mode}; expected 8 bits")
        # Black and white of one bit is that of all others, 0 and 255.
        values = np.asarray(picture.convert("L") if picture.mode == "1" else picture, np.uint8)
        has_alpha = picture.mode.endswith("A")
    if values.ndim == 2:
        return values, np.ones(values.shape, np.bool_)
    there_HW = values[..., -1] != 0 if has_alpha else np.ones(values.shape[:2], np.bool_)
    colours = values[..., : values.shape[2] - has_alpha]
    if (colours != colours[..., :1])[there_HW].any():
        raise UserError(f"{path}: a mask in colours; expected grey, or a palette")
    return np.ascontiguousarray(colours[..., 0]), there_HW


def resize_image(image_CHW: NDArray[np.uint8], shape_yx: tuple[int, int]) -> NDArray[np.uint8]:
    """An image of another size: bilinear, as PIL does it, over all pixels that a new one covers."""
    size = shape_yx[1], shape_yx[0]
    bands = [np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BILINEAR)) for band in image_CHW]
    return np.stack(bands)


def resize_mask(mask_HW: NDArray[np.uint8], shape_yx: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask of another size, by its nearest pixels."""
    size = shape_yx[1], shape_yx[0]
    return np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST))


def write_part(plan: PairsPlan, part: range) -> None:
    """Read some of the pairs into their chunks. UserError for one that is not as expected."""
    store, labels = Store(plan.folder), Store(plan.folder / "labels")
    entries: list[tuple[list[int], list[int]]] = []
    for number in part:
        pair = plan.pairs[number]
        image_CHW, valid_HW = read_picture(pair.image, plan.bands)
        mask_HW, there_HW = read_mask(pair.mask)
        if plan.resize_yx is not None:
            image_CHW, mask_HW = resize_image(image_CHW, plan.resize_yx), resize_mask(mask_HW, plan.resize_yx)
            valid_HW, there_HW = (
                resize_mask(plane.astype(np.uint8), plan.resize_yx) != 0 for plane in (valid_HW, there_HW)
            )
        label_HW, labelled_HW = np.zeros_like(mask_HW), np.zeros_like(there_HW)
        label_HW[there_HW], labelled_HW[there_HW] = plan.values.read(mask_HW[there_HW], str(pair.mask))
        scored_HW = (valid_HW & labelled_HW).astype(np.uint8) * np.uint8(SCORED)
        box, valid_px, positive_px = count(label_HW, scored_HW) or (Window(0, 0, 0, 0), 0, 0)
        if not valid_px:
            raise UserError(f"{pair.mask}: no pixel is both valid and labelled; expected some to learn from")
        margin = [(0, plan.chunk_px - side) for side in scored_HW.shape]
        store.write_chunk("image", number, 0, np.pad(image_CHW, [(0, 0), *margin]))
        store.write_chunk("valid", number, 0, np.pad(scored_HW, margin))
        labels.write_chunk("image", number, 0, np.pad(label_HW, margin)[None])
        row = number * plan.chunk_px
        entries.append(([row + box.row_off, box.col_off, *box.shape_yx], [valid_px, positive_px]))
    Ledger(plan.folder).record("read", _unit(part), plan.key(part), entries=entries)


def _unit(part: range) -> str:
    return f"pairs{part.start}"


def prepare_pairs(plan: PairsPlan) -> None:
    """Make the stores of images and labels, or let them grow; those of another layout are replaced."""
    prepare_store(plan.folder, plan.layout)
    prepare_store(plan.folder / "labels", Layout(plan.layout.lattice, plan.layout.grid, plan.chunk_px, 1))


def parts_to_read(plan: PairsPlan) -> list[range]:
    """Which parts are not in the stores yet, as the ledger has it; all where a store is not there. Writes nothing."""
    if not all((folder / STORE).is_dir() for folder in (plan.folder, plan.folder / "labels")):
        return plan.parts
    ledger = Ledger(plan.folder)
    return [part for part in plan.parts if ledger.done("read", _unit(part), plan.key(part)) is None]


def open_pairs(plan: PairsPlan) -> list[Area]:
    """Every pair that is read as an area of its own."""
    ledger = Ledger(plan.folder)
    areas: list[Area] = []
    for part in plan.parts:
        known = ledger.done("read", _unit(part), plan.key(part))
        if known is None:
            raise UserError(f"{plan.pairs[part.start].image}: changed while it was read; run again")
        for number, (window, pixels) in zip(part, known["entries"], strict=True):
            pair = plan.pairs[number]
            height, width = plan.resize_yx or pair.shape_yx
            frame = Window(number * plan.chunk_px, 0, height, width)
            entry = {"window": window, "pixels": pixels}
            areas.append(stored_area(pair.image.stem, plan.folder, plan.layout, entry, frame=frame, tiles=(frame,)))
    return areas
