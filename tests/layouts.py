"""The networks written a second time, as plain functions of a state dict: from the papers and torchvision's layout.

A state is asked for its tensors by key and remembers which it was asked for, so that a test can tell whether a network
has exactly these. Everything is float64 in eval mode. x is BCHW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Layers:
    """A state dict whose layers are applied by name."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.asked: set[str] = set()

    def get(self, key: str) -> Tensor | None:
        """A tensor, or None where there is none."""
        self.asked.add(key)
        return self.state.get(key)

    def conv(
        self, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1, bias: bool = True
    ) -> Tensor:
        """A convolution by its key."""
        weight = self.get(f"{name}.weight")
        assert weight is not None
        return F.conv2d(x, weight, self.get(f"{name}.bias") if bias else None, stride, padding, groups=groups)

    def up(self, name: str, x: Tensor, padding: int = 0, output_padding: int = 0) -> Tensor:
        """A transposed convolution of stride 2."""
        weight = self.get(f"{name}.weight")
        assert weight is not None
        return F.conv_transpose2d(x, weight, self.get(f"{name}.bias"), 2, padding, output_padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """BatchNorm with its running statistics."""
        mean, var, weight, bias = (
            self.get(f"{name}.{kind}") for kind in ("running_mean", "running_var", "weight", "bias")
        )
        self.get(f"{name}.num_batches_tracked")
        assert mean is not None
        assert var is not None
        return F.batch_norm(x, mean, var, weight, bias)

    def double(self, name: str, x: Tensor, padding: int = 1) -> Tensor:
        """Two 3x3 convolutions with ReLU."""
        x = torch.relu(self.conv(f"{name}.0", x, padding=padding))
        return torch.relu(self.conv(f"{name}.2", x, padding=padding))

    def expand(self, x: Tensor, skips: Sequence[Tensor | None], padding: int = 1) -> Tensor:
        """Up, crop and concatenate, two convolutions; then the head. Skips from the coarsest."""
        for number, skip in enumerate(skips):
            x = self.up(f"decoder.{number}.up", x)
            if skip is not None:
                cut = (skip.shape[2] - x.shape[2]) // 2
                inner = skip[:, :, cut : skip.shape[2] - cut, cut : skip.shape[3] - cut]
                x = torch.cat((x, inner), dim=1)
            x = self.double(f"decoder.{number}.conv", x, padding)
        return self.conv("head", x)


def unet(layers: Layers, x: Tensor, scales: int = 5, padding: int = 1) -> Tensor:
    """The plain U-Net: `scales` double convolutions with poolings between them, and back."""
    maps = [layers.double("encoder.0", x, padding)]
    for scale in range(1, scales):
        maps.append(layers.double(f"encoder.{scale}", F.max_pool2d(maps[-1], 2), padding))
    return layers.expand(maps[-1], maps[-2::-1], padding)


def vgg_maps(layers: Layers, x: Tensor, widths: Sequence[int], prefix: str) -> list[Tensor]:
    """What VGG's features are before each pooling; torchvision counts convolution, ReLU and pooling as a layer each."""
    maps: list[Tensor] = []
    number = 0
    for convolutions in widths:
        x = F.max_pool2d(maps[-1], 2) if maps else x
        for _ in range(convolutions):
            x = torch.relu(layers.conv(f"{prefix}.{number}", x, padding=1))
            number += 2
        maps.append(x)
        number += 1
    return maps


def unet_vgg16(layers: Layers, x: Tensor) -> Tensor:
    """V-Unet."""
    *skips, x = vgg_maps(layers, x, (2, 2, 3, 3, 3), "features")
    return layers.expand(x, skips[::-1])


def ternausnet(layers: Layers, x: Tensor, widths: Sequence[int], kind: str) -> Tensor:
    """TernausNet on VGG11 (transposed 3x3) or VGG16 (bilinear, or transposed 4x4)."""
    maps = vgg_maps(layers, x, widths, "encoder")
    x = F.max_pool2d(maps[-1], 2)
    for name in ("center", "dec5", "dec4", "dec3", "dec2"):
        if name != "center":
            x = torch.cat((x, maps.pop()), dim=1)
        block = f"{name}.block"
        if kind == "bilinear":
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = torch.relu(layers.conv(f"{block}.1.conv", x, padding=1))
            x = torch.relu(layers.conv(f"{block}.2.conv", x, padding=1))
        else:
            x = torch.relu(layers.conv(f"{block}.0.conv", x, padding=1))
            x = torch.relu(layers.up(f"{block}.1", x, padding=1, output_padding=1 if kind == "transposed 3x3" else 0))
    x = torch.relu(layers.conv("dec1.conv", torch.cat((x, maps.pop()), dim=1), padding=1))
    return layers.conv("final", x)


def unet_resnet(layers: Layers, x: Tensor, depths: Sequence[int], bottleneck: bool) -> Tensor:
    """R-Unet."""
    x = torch.relu(layers.norm("bn1", layers.conv("conv1", x, 2, 3, bias=False)))
    maps = [x]
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, depth in enumerate(depths, start=1):
        for number in range(depth):
            stride = 2 if number == 0 and stage > 1 else 1
            x = _residual(layers, f"layer{stage}.{number}", x, stride, bottleneck)
        maps.append(x)
    return layers.expand(x, [*maps[-2::-1], None])


def _residual(layers: Layers, name: str, x: Tensor, stride: int, bottleneck: bool) -> Tensor:
    # kernel, stride, padding of each convolution
    shapes = ((1, 1, 0), (3, stride, 1), (1, 1, 0)) if bottleneck else ((3, stride, 1), (3, 1, 1))
    y = x
    for number, (_, step, padding) in enumerate(shapes, start=1):
        y = layers.norm(f"{name}.bn{number}", layers.conv(f"{name}.conv{number}", y, step, padding, bias=False))
        y = torch.relu(y) if number < len(shapes) else y
    if f"{name}.downsample.0.weight" in layers.state:
        x = layers.norm(f"{name}.downsample.1", layers.conv(f"{name}.downsample.0", x, stride, bias=False))
    return torch.relu(x + y)


def unet_densenet121(layers: Layers, x: Tensor) -> Tensor:
    """D-Unet."""
    x = torch.relu(layers.norm("features.norm0", layers.conv("features.conv0", x, 2, 3, bias=False)))
    maps = [x]
    x = F.max_pool2d(x, 3, 2, 1)
    for block, depth in enumerate((6, 12, 24, 16), start=1):
        for number in range(1, depth + 1):
            name = f"features.denseblock{block}.denselayer{number}"
            y = layers.conv(f"{name}.conv1", torch.relu(layers.norm(f"{name}.norm1", x)), bias=False)
            y = layers.conv(f"{name}.conv2", torch.relu(layers.norm(f"{name}.norm2", y)), padding=1, bias=False)
            x = torch.cat((x, y), dim=1)
        if block < 4:
            maps.append(x)
            name = f"features.transition{block}"
            x = F.avg_pool2d(layers.conv(f"{name}.conv", torch.relu(layers.norm(f"{name}.norm", x)), bias=False), 2)
    return layers.expand(torch.relu(layers.norm("features.norm5", x)), [*maps[::-1], None])


def unet_mobilenetv2(layers: Layers, x: Tensor, top: bool, plain: bool) -> Tensor:
    """MobileNetV2's inverted residuals; M-Unet's decoder, or the light one with BatchNorm."""
    x = F.relu6(layers.norm("features.0.1", layers.conv("features.0.0", x, 2, 1, bias=False)))
    maps: dict[int, Tensor] = {}
    strides = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
    for number, stride in enumerate(strides, start=1):
        name, y, place = f"features.{number}.conv", x, 0
        if number > 1:
            y = F.relu6(layers.norm(f"{name}.0.1", layers.conv(f"{name}.0.0", y, bias=False)))
            place = 1
        y = layers.conv(f"{name}.{place}.0", y, stride, 1, groups=y.shape[1], bias=False)
        y = F.relu6(layers.norm(f"{name}.{place}.1", y))
        y = layers.norm(f"{name}.{place + 2}", layers.conv(f"{name}.{place + 1}", y, bias=False))
        x = x + y if x.shape == y.shape else y
        maps[number] = x
    if top:
        x = F.relu6(layers.norm("features.18.1", layers.conv("features.18.0", x, bias=False)))
    skips = [maps[13], maps[6], maps[3], maps[1], None]
    if plain:
        return layers.expand(x, skips)
    for number, skip in enumerate(skips):
        x = layers.up(f"decoder.{number}.up", x)
        x = x if skip is None else torch.cat((x, skip), dim=1)
        for conv in (0, 3):
            name = f"decoder.{number}.conv"
            x = torch.relu(layers.norm(f"{name}.{conv + 1}", layers.conv(f"{name}.{conv}", x, padding=1, bias=False)))
    return layers.conv("head", x)
