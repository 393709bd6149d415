"""Predict single images of any kind and size: a black and white mask, probabilities, and a panel, each a PNG.

Axes: C bands, H rows, W columns.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from segpipe.models.predictor import FULL_U8, INVALID_U8, halo_of
from segpipe.models.weights import Bundle, BundleError, Card, load_bundle
from segpipe.tasks.errors import TileError, UserError

from .beside import written_beside
from .pairs import read_picture
from .plan import check_output, find_model

GAP_PX = 6
MOST_PX = 178_000_000
"""An image is held in memory as a whole; what PIL refuses as too large is a little more."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
COLOURS = ("red", "green", "blue")
CMYK = (ColorInterp.cyan, ColorInterp.magenta, ColorInterp.yellow, ColorInterp.black)
MADE_BY = "segpipe predict"
"""Stands in every PNG that is written here: only such ones are overwritten."""
SCALE = "probability: 0 to 250 for 0 to 1; 255 where the image has no pixel"


@dataclass(frozen=True)
class Picture:
    """An image. valid_HW: False where it is transparent or nodata. transform: of pixels to its CRS, None without."""

    image_CHW: NDArray[np.uint8]
    valid_HW: NDArray[np.bool_]
    transform: Affine | None = None


@dataclass(frozen=True)
class Target:
    """The files that are written for one image."""

    mask: Path
    probability: Path
    panel: Path

    @staticmethod
    def of(image: Path, folder: Path) -> Target:
        """Named after the image."""
        return Target(*(folder / f"{image.stem}_{kind}.png" for kind in ("mask", "probability", "panel")))

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.mask, self.probability, self.panel)


@dataclass(frozen=True)
class Job:
    """Images that were all looked at, and what is to become of them. bands: 1-based numbers of those of the model."""

    images: tuple[Path, ...]
    targets: tuple[Target, ...]
    bundle: Bundle
    bands: tuple[int, ...]
    threshold: float


@dataclass(frozen=True)
class Predicted:
    """What was found on one image. share: of its valid pixels, what is in the mask."""

    image: Path
    target: Target
    shape_yx: tuple[int, int]
    share: float
    georeferenced: bool


def plan_predictions(
    images: Sequence[Path], model: str, output: Path, threshold: float | None = None, module: str | None = None
) -> Job:
    """Load the model and read every image once, so that what cannot be predicted is refused before anything is written.

    threshold None: the bundle's. module: `package.module:name` of a network of the user's own that may be run.
    UserError for an image that cannot be read or has other bands, for names that clash, and for files that would be
    overwritten although they were not written by this command.
    """
    check_output(output)
    bundle = _load(model, module)
    bands = band_numbers(bundle.card)
    targets = tuple(Target.of(image, output) for image in images)
    _check_names(images, targets)
    for image in images:
        read_image(image, bands)
    return Job(tuple(images), targets, bundle, bands, bundle.card.threshold if threshold is None else threshold)


def _load(model: str, module: str | None) -> Bundle:
    path = find_model(model, Path.cwd())
    try:
        bundle = load_bundle(path, module)
        if bundle.card.resize_px is None:
            halo_of(bundle.card)
    except BundleError as error:
        raise UserError(str(error).replace("in the YAML: `module: ", "here: `--module ")) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return bundle


def band_numbers(card: Card) -> tuple[int, ...]:
    """The 1-based bands of an image that a bundle was trained on, as their names in its card tell; else the first."""
    numbers = [_band_number(name) for name in card.bands]
    known = tuple(number for number in numbers if number is not None)
    return known if len(known) == len(numbers) else tuple(range(1, len(numbers) + 1))


def _band_number(name: str) -> int | None:
    if name in COLOURS:
        return COLOURS.index(name) + 1
    found = re.fullmatch(r"band ([1-9]\d*)", name)
    return int(found[1]) if found else None


def _check_names(images: Sequence[Path], targets: Sequence[Target]) -> None:
    """UserError where two images would be written to one file, or a file of another kind would be overwritten."""
    taken: dict[Path, Path] = {}
    for image, target in zip(images, targets, strict=True):
        other = taken.setdefault(target.mask, image)
        if other is not image:
            raise UserError(f"{image} and {other} would both become {target.mask}; expected images of different names")
    sources = {image.resolve() for image in images}
    for path in (path for target in targets for path in target.paths):
        if path.resolve() in sources or (path.exists() and not _is_ours(path)):
            raise UserError(f"{path}: is there, and was not written by {MADE_BY}; expected another --output")


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == MADE_BY
    except (UnidentifiedImageError, OSError):
        return False


# Reading


def read_image(path: Path, bands: tuple[int, ...]) -> Picture:
    """An image of 8 bits, its alpha or nodata as validity. Grey is repeated, palettes are expanded.

    UserError for one that cannot be read to its end, or has not the bands.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        hint = f"; expected images, such as {path}/*.jpg" if path.is_dir() else ""
        raise UserError(f"{path}: cannot be read: {error.strerror or error}{hint}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            found = _read_tiff(path, bands) if start in TIFF_STARTS else None
            return found or Picture(*read_picture(path, bands))
        except Image.DecompressionBombError:
            raise UserError(f"{path}: {_too_large()}") from None
        except (TileError, RasterioError) as error:
            raise UserError(str(error) if isinstance(error, TileError) else f"{path}: {error}") from None


def _too_large() -> str:
    return f"more than {MOST_PX:,} px; expected less; cure: `segpipe run`, which is for large imagery"


def _read_tiff(path: Path, bands: tuple[int, ...]) -> Picture | None:
    """A TIFF with any number of bands of 8 bits; None for kinds that PIL knows better: of few bits, or in CMYK."""
    with rasterio.open(path) as dataset:
        structure = dataset.tags(ns="IMAGE_STRUCTURE")
        few_bits = "NBITS" in dataset.tags(1, ns="IMAGE_STRUCTURE") or structure.get("MINISWHITE") == "YES"
        if few_bits or dataset.colorinterp[:4] == CMYK:
            return None
        if set(dataset.dtypes) != {"uint8"}:
            raise UserError(
                f"{path}: samples of type {dataset.dtypes[0]}; expected 8 bits; cure: gdal_translate -ot Byte -scale"
            )
        if dataset.width * dataset.height > MOST_PX:
            raise UserError(f"{path}: {_too_large()}")
        valid_HW = dataset.dataset_mask() != 0
        image_CHW = _colours(path, dataset, bands)
        placed = dataset.crs is not None or not dataset.transform.is_identity
        return Picture(image_CHW * valid_HW, valid_HW, dataset.transform if placed else None)


def _colours(path: Path, dataset: rasterio.DatasetReader, bands: tuple[int, ...]) -> NDArray[np.uint8]:
    """The bands of a dataset, image_CHW."""
    kinds = dataset.colorinterp
    seen = [number for number, kind in zip(dataset.indexes, kinds, strict=True) if kind != ColorInterp.alpha]
    if kinds[0] == ColorInterp.palette:
        # Of a TIFF without transparency, but for its nodata.
        palette = np.zeros((256, 3), np.uint8)
        for value, colour in dataset.colormap(1).items():
            palette[value] = colour[:3]
        source_CHW = np.moveaxis(palette[dataset.read(1)], 2, 0)
    elif len(seen) == 1:
        source_CHW = np.repeat(dataset.read([1]), max(bands), axis=0)
    else:
        source_CHW = dataset.read(seen)
    if max(bands) > len(source_CHW):
        raise UserError(f"{path}: {len(source_CHW)} bands; expected {max(bands)}, as the model takes {list(bands)}")
    chosen: NDArray[np.uint8] = source_CHW[[band - 1 for band in bands]]
    return chosen


# Predicting


def predict_images(job: Job) -> Iterator[Predicted]:
    """Predict one image after another; each has its files when it is given. RunError where they cannot be written."""
    job.targets[0].mask.parent.mkdir(parents=True, exist_ok=True)
    for image, target in zip(job.images, job.targets, strict=True):
        picture = read_image(image, job.bands)
        prob_HW = job.bundle.predict(np.moveaxis(picture.image_CHW, 0, 2), picture.valid_HW)
        stored_HW = np.round(prob_HW * np.float32(FULL_U8))
        stored_HW = np.where(picture.valid_HW, stored_HW, INVALID_U8).astype(np.uint8)
        # The rule by which a run makes its mask. What has no pixel is never a building.
        mask_HW = (stored_HW >= math.ceil(FULL_U8 * job.threshold)) & picture.valid_HW
        _save(target.probability, stored_HW, SCALE)
        _save(target.panel, panel(picture.image_CHW, mask_HW), "image | mask | image x mask")
        _save(target.mask, np.where(mask_HW, 255, 0).astype(np.uint8), "255 building, 0 not")
        for path in (target.mask, target.probability):
            _write_world(path.with_suffix(".pgw"), picture.transform)
        share = float(mask_HW.sum() / max(int(picture.valid_HW.sum()), 1))
        yield Predicted(image, target, mask_HW.shape, share, picture.transform is not None)


def panel(image_CHW: NDArray[np.uint8], mask_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Image | mask | image x mask, as one picture_HWC: the first three bands, or the first as grey."""
    bands = image_CHW[:3] if len(image_CHW) >= 3 else np.repeat(image_CHW[:1], 3, axis=0)
    image_HWC = np.moveaxis(bands, 0, 2)
    mask_HWC = np.repeat(mask_HW[..., None], 3, axis=2)
    gap = np.full((len(mask_HW), GAP_PX, 3), 255, np.uint8)
    painted = np.where(mask_HWC, 255, 0).astype(np.uint8)
    return np.concatenate([image_HWC, gap, painted, gap, image_HWC * mask_HWC], axis=1)


def _save(path: Path, pixels: NDArray[np.uint8], meaning: str) -> None:
    told = PngInfo()
    told.add_text("Software", MADE_BY)
    told.add_text("Description", meaning)
    with written_beside(path) as partial:
        Image.fromarray(pixels).save(partial, "PNG", pnginfo=told)


def _write_world(path: Path, transform: Affine | None) -> None:
    """A world file, which places a PNG where its image lies: the CRS is not in it. None: there is none."""
    if transform is None:
        path.unlink(missing_ok=True)
        return
    # Its origin is the centre of the first pixel.
    it = transform * Affine.translation(0.5, 0.5)
    with written_beside(path) as partial:
        partial.write_text("".join(f"{value!r}\n" for value in (it.a, it.d, it.b, it.e, it.c, it.f)))
