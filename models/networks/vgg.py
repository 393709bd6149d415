"""VGG's feature layers (Simonyan and Zisserman, arXiv 1409.1556, table 1, columns A and D), in torchvision's order."""

from __future__ import annotations

from typing import Final

from torch import nn

VGG11: Final = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16: Final = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 3x3 convolutions between one pooling and the next."""


def vgg_features(stages: tuple[tuple[int, ...], ...], bands: int) -> nn.Sequential:
    """Convolutions with ReLU, and a 2x2 pooling after every stage, numbered as torchvision numbers them."""
    layers: list[nn.Module] = []
    channels = bands
    for widths in stages:
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)
