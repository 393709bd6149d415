"""Random variants of crops: turned, scaled, recoloured, with filled borders and holes; then normalised.

Axes: B batch, C channels (RGB), H rows, W columns. All choices come from one numpy Generator, so that the same seed
gives the same batch; kornia does the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from kornia.enhance import adjust_contrast_with_mean_subtraction, adjust_saturation_with_gray_subtraction
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import get_rotation_matrix2d, warp_affine
from numpy.typing import NDArray
from torch import Tensor


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
        if not 0.5 <= self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale}: expected 0.5 or more, smallest first")

    def margin_px(self, crop_px: int) -> int:
        """Surroundings that a turned and shrunken crop of crop_px reaches into, on each side."""
        return int(np.ceil(crop_px / 2 * (np.sqrt(2) / self.scale[0] - 1))) + 1


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

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.image_BCHW.to(device), self.target_BKHW.to(device), self.valid_BHW.to(device))


def augment(
    image_BCHW: Tensor,
    label_BHW: Tensor,
    valid_BHW: Tensor,
    crop_px: int,
    settings: Augmentation,
    normalisation: Normalisation,
    rng: np.random.Generator,
) -> Batch:
    """A random variant of every crop, of crop_px x crop_px pixels around its centre.

    All three inputs are uint8; label and valid 0 or 1. The inputs should reach settings.margin_px(crop_px) beyond the
    crop on all sides; what is not there is invalid. A pixel of the result is valid only if all pixels that it is made
    of are; what lies under invalid pixels has no effect.
    """
    matrix_B23 = _placements(image_BCHW.shape[0], image_BCHW.shape[2:], crop_px, settings, rng)
    valid_B1HW = valid_BHW[:, None].float()
    stack = torch.cat([image_BCHW / 255 * valid_B1HW, label_BHW[:, None] * valid_B1HW, valid_B1HW], 1)
    warped = warp_affine(stack, matrix_B23, (crop_px, crop_px), align_corners=True)
    image, target, valid = warped[:, :-2], (warped[:, -2:-1] > 0.5).float(), warped[:, -1] > 0.999
    image = _recolour(image.clamp(0, 1), settings, rng)
    image = _degrade(image, settings, rng)
    valid = valid & _kept(valid.shape[0], crop_px, settings, rng)
    image = normalise(image * (255 / normalisation.scale), valid, normalisation)
    return Batch(image.contiguous(memory_format=torch.channels_last), target * valid[:, None], valid)


def normalise(scaled_BCHW: Tensor, valid_BHW: Tensor, normalisation: Normalisation) -> Tensor:
    """The network's input from an image that is already divided by its scale; 0 where invalid, whatever lies there."""
    mean = torch.tensor(normalisation.mean).view(1, -1, 1, 1)
    std = torch.tensor(normalisation.std).view(1, -1, 1, 1)
    return ((scaled_BCHW - mean) / std).masked_fill(~valid_BHW[:, None].bool(), 0.0)


def _placements(
    count: int, src_yx: tuple[int, ...], crop_px: int, settings: Augmentation, rng: np.random.Generator
) -> Tensor:
    """Matrices (B, 2, 3) from (x, y) of the input to (x, y) of the crop: turn, flip and scale around the centres."""
    scale = _log_uniform(settings.scale, (count,), rng)
    angle = 90.0 * rng.integers(0, 4, count) + rng.uniform(-45, 45, count) * (rng.random(count) < settings.tilt)
    mirror = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    src = torch.tensor([(src_yx[1] - 1) / 2, (src_yx[0] - 1) / 2]).expand(count, 2)
    turn = get_rotation_matrix2d(src, _tensor(angle), _tensor(np.stack([scale, scale], 1)))
    turn[:, :, 2] += (crop_px - 1) / 2 - src
    flip = torch.eye(3).repeat(count, 1, 1)
    flip[:, 0, 0] = _tensor(mirror)
    flip[:, 0, 2] = _tensor((1 - mirror) / 2 * (crop_px - 1))
    placed: Tensor = flip[:, :2, :2] @ turn + torch.nn.functional.pad(flip[:, :2, 2:], (2, 0))
    return placed


def _recolour(image_BCHW: Tensor, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    count, channels = image_BCHW.shape[:2]
    image = adjust_contrast_with_mean_subtraction(image_BCHW, _tensor(rng.uniform(*settings.contrast, count)))
    if channels == 3:  # other bands have no colour to saturate
        image = adjust_saturation_with_gray_subtraction(image, _tensor(rng.uniform(*settings.saturation, count)))
    gain = _tensor(_log_uniform(settings.gain, (count, channels, 1, 1), rng))
    added = _tensor(rng.uniform(-settings.brightness, settings.brightness, (count, 1, 1, 1)))
    return (image * gain + added).clamp(0, 1)


def _degrade(image_BCHW: Tensor, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    """Blur and noise for some of the crops: other cameras, haze, hard compression."""
    picks = np.flatnonzero(rng.random(image_BCHW.shape[0]) < settings.degraded)
    if not len(picks):
        return image_BCHW
    sigma = _tensor(rng.uniform(*settings.blur_sigma_px, (len(picks), 1))).expand(-1, 2)
    blurred = gaussian_blur2d(image_BCHW[picks], (5, 5), sigma)
    strength = _tensor(rng.uniform(0, settings.noise, (len(picks), 1, 1, 1)))
    image = image_BCHW.clone()
    image[picks] = (blurred + strength * _tensor(rng.standard_normal(blurred.shape, np.float32))).clamp(0, 1)
    return image


def _kept(count: int, crop_px: int, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    """False in the borders and holes that are filled, (B, crop_px, crop_px)."""
    keep = np.ones((count, crop_px, crop_px), np.bool_)
    for crop in keep:
        if rng.random() < settings.borders:
            for side in rng.choice(4, size=rng.integers(1, 3), replace=False):
                wide = int(rng.integers(1, crop_px // 3 + 1))
                np.rot90(crop, int(side))[:wide] = False
        if rng.random() < settings.holes:
            for _ in range(int(rng.integers(1, 4))):
                height, width = rng.integers(4, crop_px // 4 + 5, 2)
                row, col = rng.integers(0, crop_px, 2)
                crop[row : row + height, col : col + width] = False
    return torch.from_numpy(keep)


def _log_uniform(ends: tuple[float, float], shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    return np.exp(rng.uniform(math.log(ends[0]), math.log(ends[1]), shape))


def _tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
