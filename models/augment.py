"""What a network is trained on: raw crops, varied at random or not at all, and normalised, on the device.

Variants are turned, scaled, recoloured, degraded, and have filled borders and holes. All choices come from the seed of
a raw batch, so that the same batch gives the same variant. Kornia does the pixels, on whatever device they are.
Axes: B batch, C channels (RGB), H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from kornia.enhance import adjust_contrast_with_mean_subtraction, adjust_saturation_with_gray_subtraction
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import get_rotation_matrix2d, warp_affine
from numpy.typing import NDArray
from torch import Tensor


class RawBatch(TypedDict):
    """Crops as they were read: uint8, label and valid 0 or 1. seed: what the choices of augmentation are made from."""

    image_BCHW: Tensor
    label_BHW: Tensor
    valid_BHW: Tensor
    seed: int


@dataclass(frozen=True)
class Augmentation:
    """How far the variants go. A range is drawn from uniformly (scale and gains: on a logarithmic scale).

    scale: magnification. tilt: share of crops that are turned by any angle, besides quarter turns. brightness: added,
    of 1. gain: of each channel apart (white balance). blur_sigma_px and noise: of the share `degraded` of crops.
    borders, holes: share of crops that lose one or two sides (up to a third of the crop each), or rectangles, to fill.
    """

    scale: tuple[float, float] = (0.7, 1.4)
    tilt: float = 0.5
    brightness: float = 0.12
    contrast: tuple[float, float] = (0.7, 1.35)
    saturation: tuple[float, float] = (0.5, 1.5)
    gain: tuple[float, float] = (0.87, 1.15)
    degraded: float = 0.25
    blur_sigma_px: tuple[float, float] = (0.4, 1.1)
    noise: float = 0.03
    borders: float = 0.2
    holes: float = 0.2

    def __post_init__(self) -> None:
        if not 0.5 <= self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale {self.scale}: expected 0.5 or more, smallest first")
        for name, ends in (("gain", self.gain), ("blur_sigma_px", self.blur_sigma_px)):
            if not 0 < ends[0] <= ends[1] < math.inf:
                raise ValueError(f"{name} {ends}: expected more than 0, smallest first")
        for name, ends in (("contrast", self.contrast), ("saturation", self.saturation)):
            if not 0 <= ends[0] <= ends[1] < math.inf:
                raise ValueError(f"{name} {ends}: expected 0 or more, smallest first")
        for name in ("tilt", "brightness", "degraded", "noise", "borders", "holes"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 1")

    def margin_px(self, crop_px: int) -> int:
        """Surroundings that a turned crop of crop_px reaches into, on each side; 0 where it is much magnified."""
        return max(0, int(np.ceil(crop_px / 2 * (np.sqrt(2) / self.scale[0] - 1))) + 1)


@dataclass(frozen=True)
class Normalisation:
    """Image / scale, minus mean, over standard deviation of each channel; fill is 0 after it."""

    scale: float = 255.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """What a network is trained on: normalised float32 image, 0 where invalid; float32 target; bool valid."""

    image_BCHW: Tensor
    target_BKHW: Tensor
    valid_BHW: Tensor


@dataclass(frozen=True)
class Framing:
    """Which pixels of a network's input and output are trained on. Sizes are (rows, columns).

    crop_yx: what is scored. border_px: real context that the network is given beyond that on every side, and does not
    answer for (`unet-valid`: 92). Where the sides of both together are not remainder_px more than a multiple of the
    network's stride, fill is added below and to the right, and the crop is scored on its own pixels.
    """

    crop_yx: tuple[int, int]
    border_px: int = 0
    stride: int = 1
    remainder_px: int = 0

    @property
    def seen_yx(self) -> tuple[int, int]:
        """What is cut out of the raw crops: the crop and its border."""
        return self.crop_yx[0] + 2 * self.border_px, self.crop_yx[1] + 2 * self.border_px

    @property
    def padding_yx(self) -> tuple[int, int]:
        """Rows and columns of fill."""
        height, width = self.seen_yx
        return (self.remainder_px - height) % self.stride, (self.remainder_px - width) % self.stride


def prepare(
    raw: RawBatch,
    device: torch.device,
    framing: Framing,
    normalisation: Normalisation,
    augmentation: Augmentation | None,
) -> Batch:
    """The batch that a network on device is trained on, from raw crops; without an augmentation from their centres.

    The raw crops should be as large as framing.seen_yx, and augmentation.margin_px beyond that on every side; what is
    not there is invalid.
    """
    image, label, valid = (raw[key].to(device, non_blocking=True) for key in ("image_BCHW", "label_BHW", "valid_BHW"))
    if augmentation is None:
        batch = plain(image, label, valid, framing.seen_yx, normalisation)
    else:
        rng = np.random.default_rng(raw["seed"])
        batch = augment(image, label, valid, framing.seen_yx, augmentation, normalisation, rng)
    edge, (below, right) = framing.border_px, framing.padding_yx
    height, width = framing.crop_yx
    target = batch.target_BKHW[..., edge : edge + height, edge : edge + width]
    scored = batch.valid_BHW[..., edge : edge + height, edge : edge + width]
    pad = torch.nn.functional.pad
    return Batch(
        pad(batch.image_BCHW, (0, right, 0, below)).contiguous(memory_format=torch.channels_last),
        pad(target, (0, right, 0, below)),
        pad(scored, (0, right, 0, below)),
    )


def plain(
    image_BCHW: Tensor, label_BHW: Tensor, valid_BHW: Tensor, crop_yx: tuple[int, int], normalisation: Normalisation
) -> Batch:
    """The centre of every crop as it is, normalised; padded with fill where the crop is smaller than crop_yx."""
    missing = [want - have for want, have in zip(crop_yx, image_BCHW.shape[2:], strict=True)]
    top, left = missing[0] // 2, missing[1] // 2
    # Padding by a negative number crops.
    sides = (left, missing[1] - left, top, missing[0] - top)
    pad = torch.nn.functional.pad
    valid_BHW = pad(valid_BHW, sides).bool()
    image = normalise(pad(image_BCHW, sides) / normalisation.scale, valid_BHW, normalisation)
    target_BKHW = (pad(label_BHW, sides) * valid_BHW)[:, None].float()
    return Batch(image.contiguous(memory_format=torch.channels_last), target_BKHW, valid_BHW)


def augment(
    image_BCHW: Tensor,
    label_BHW: Tensor,
    valid_BHW: Tensor,
    crop_yx: tuple[int, int],
    settings: Augmentation,
    normalisation: Normalisation,
    rng: np.random.Generator,
) -> Batch:
    """A random variant of every crop, of crop_yx pixels around its centre.

    The inputs are those of a RawBatch and should reach settings.margin_px beyond the crop on all sides; what is not
    there is invalid. A pixel of the result is valid only if all pixels that it is made of are; what lies under invalid
    pixels has no effect.
    """
    device = image_BCHW.device
    matrix_B23 = _placements(image_BCHW.shape[0], image_BCHW.shape[2:], crop_yx, settings, rng)
    raw = zip(image_BCHW, label_BHW, valid_BHW, matrix_B23, strict=True)
    warped = torch.cat([_warp(image, label, valid, matrix, crop_yx) for image, label, valid, matrix in raw])
    # Here and below in place what can be: fresh memory costs a CPU more than the arithmetic.
    image, target, valid = warped[:, :-2].div(255).clamp_(0, 1), (warped[:, -2:-1] > 0.5).float(), warped[:, -1] > 0.999
    image = _recolour(image, settings, rng)
    image = _degrade(image, settings, rng)
    valid = valid & _kept(valid.shape[0], crop_yx, settings, rng, device)
    image = normalise(image.mul_(255 / normalisation.scale), valid, normalisation)
    return Batch(image.contiguous(memory_format=torch.channels_last), target * valid[:, None], valid)


def normalise(scaled_BCHW: Tensor, valid_BHW: Tensor, normalisation: Normalisation) -> Tensor:
    """The network's input from an image that is already divided by its scale; 0 where invalid, whatever lies there."""
    mean = torch.tensor(normalisation.mean, device=scaled_BCHW.device).view(1, -1, 1, 1)
    std = torch.tensor(normalisation.std, device=scaled_BCHW.device).view(1, -1, 1, 1)
    return (scaled_BCHW - mean).div_(std).masked_fill_(~valid_BHW[:, None].bool(), 0.0)


def _placements(
    count: int, src_yx: tuple[int, ...], crop_yx: tuple[int, int], settings: Augmentation, rng: np.random.Generator
) -> Tensor:
    """Matrices (B, 2, 3) from (x, y) of the input to (x, y) of the crop: turn, flip and scale around the centres."""
    scale = _log_uniform(settings.scale, (count,), rng)
    angle = 90.0 * rng.integers(0, 4, count) + rng.uniform(-45, 45, count) * (rng.random(count) < settings.tilt)
    mirror = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    src = torch.tensor([(src_yx[1] - 1) / 2, (src_yx[0] - 1) / 2]).expand(count, 2)
    turn = get_rotation_matrix2d(src, _tensor(angle), _tensor(np.stack([scale, scale], 1)))
    turn[:, :, 2] += torch.tensor([(crop_yx[1] - 1) / 2, (crop_yx[0] - 1) / 2]) - src
    flip = torch.eye(3).repeat(count, 1, 1)
    flip[:, 0, 0] = _tensor(mirror)
    flip[:, 0, 2] = _tensor((1 - mirror) / 2 * (crop_yx[1] - 1))
    placed: Tensor = flip[:, :2, :2] @ turn + torch.nn.functional.pad(flip[:, :2, 2:], (2, 0))
    return placed


def _warp(image_CHW: Tensor, label_HW: Tensor, valid_HW: Tensor, matrix_23: Tensor, crop_yx: tuple[int, int]) -> Tensor:
    """Image, label and validity of one crop in place, float32 (1, C + 2, H, W); made of valid pixels alone.

    matrix_23 is on the CPU. Only what the crop is made of is touched: that is a third of its surroundings.
    """
    ends_xy = torch.tensor([[0.0, 0.0], [crop_yx[1] - 1, 0.0], [0.0, crop_yx[0] - 1], [crop_yx[1] - 1, crop_yx[0] - 1]])
    seen_xy = torch.linalg.solve(matrix_23[:, :2], (ends_xy - matrix_23[:, 2]).T)
    (left, top), (right, bottom) = seen_xy.amin(1).floor().int().tolist(), seen_xy.amax(1).ceil().int().tolist()
    left, top = max(left - 1, 0), max(top - 1, 0)
    window = slice(top, bottom + 2), slice(left, right + 2)
    shift = matrix_23[:, :2] @ torch.tensor([[left], [top]], dtype=matrix_23.dtype)
    valid_1HW = valid_HW[None, *window]
    # Masked while still bytes.
    stack = torch.cat([image_CHW[:, *window], label_HW[None, *window], valid_1HW]) * valid_1HW
    matrix_123 = torch.cat([matrix_23[:, :2], matrix_23[:, 2:] + shift], 1)[None].to(stack.device)
    warped: Tensor = warp_affine(stack[None].float(), matrix_123, crop_yx, align_corners=True)
    return warped


def _recolour(image_BCHW: Tensor, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    count, channels = image_BCHW.shape[:2]
    device = image_BCHW.device
    image = adjust_contrast_with_mean_subtraction(
        image_BCHW, _tensor(rng.uniform(*settings.contrast, count)).to(device)
    )
    if channels == 3:  # other bands have no colour to saturate
        factor = _tensor(rng.uniform(*settings.saturation, count)).to(device)
        image = adjust_saturation_with_gray_subtraction(image, factor)
    gain = _tensor(_log_uniform(settings.gain, (count, channels, 1, 1), rng)).to(device)
    added = _tensor(rng.uniform(-settings.brightness, settings.brightness, (count, 1, 1, 1))).to(device)
    return (image * gain).add_(added).clamp_(0, 1)


def _degrade(image_BCHW: Tensor, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    """Blur and noise for some of the crops, in place: other cameras, haze, hard compression."""
    picks = np.flatnonzero(rng.random(image_BCHW.shape[0]) < settings.degraded)
    if not len(picks):
        return image_BCHW
    device = image_BCHW.device
    index = torch.from_numpy(picks).to(device)
    sigma = _tensor(rng.uniform(*settings.blur_sigma_px, (len(picks), 1))).expand(-1, 2).to(device)
    variant = gaussian_blur2d(image_BCHW[index], (5, 5), sigma)
    strength = _tensor(rng.uniform(0, settings.noise, (len(picks), 1, 1, 1))).to(device)
    # Drawn where it is needed: a GPU draws in no time what numpy takes longer for than for all else.
    noise = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
    variant += strength * torch.randn(variant.shape, generator=noise, device=device)
    return image_BCHW.index_copy_(0, index, variant.clamp_(0, 1))


def _kept(
    count: int, crop_yx: tuple[int, int], settings: Augmentation, rng: np.random.Generator, device: torch.device
) -> Tensor:
    """False in the borders and holes that are filled, (B, H, W)."""
    height, width = crop_yx
    keep = torch.ones((count, height, width), dtype=torch.bool, device=device)
    for crop in keep:
        if rng.random() < settings.borders:
            for side in rng.choice(4, size=rng.integers(1, 3), replace=False):
                wide = int(rng.integers(1, (height, width)[side % 2] // 3 + 1))
                (crop[:wide], crop[:, :wide], crop[height - wide :], crop[:, width - wide :])[side].fill_(value=False)
        if rng.random() < settings.holes:
            for _ in range(int(rng.integers(1, 4))):
                rows, row = int(rng.integers(4, height // 4 + 5)), int(rng.integers(0, height))
                cols, col = int(rng.integers(4, width // 4 + 5)), int(rng.integers(0, width))
                crop[row : row + rows, col : col + cols] = False
    return keep


def _log_uniform(ends: tuple[float, float], shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    return np.exp(rng.uniform(math.log(ends[0]), math.log(ends[1]), shape))


def _tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
