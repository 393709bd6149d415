"""UNet16: TernausNet's sibling with VGG16 as its encoder (Iglovikov and Shvets, arXiv 1801.05746, code of the authors).

The paper describes UNet11 only; layers and keys are those of the authors' published model, in which the fourth decoder
block gives 256 channels. Axes: B batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from .network import Network
from .unet11 import FILTERS, ConvReLU
from .upsample import Bilinear, Transposed4
from .vgg import VGG16, vgg_features

Upsampling = Literal["bilinear", "transposed"]


class UNet16(Network):
    """VGG16's thirteen convolutions, five poolings, five decoder steps with skips, a 1x1 head.

    29,306,465 parameters with bilinear upsampling, 32,202,337 with transposed convolutions. As published, each encoder
    convolution is registered twice (`encoder.0` is `conv1.0`): the state dict has both keys for the same tensor.
    """

    stride = 32
    published_encoder = "vgg16"
    first_layer = "encoder.0.weight"
    unused_prefixes = ("classifier.",)

    def __init__(self, bands: int = 3, classes: int = 1, upsampling: Upsampling = "bilinear") -> None:
        super().__init__()
        if upsampling not in ("bilinear", "transposed"):
            raise ValueError(f"upsampling {upsampling!r}: expected bilinear or transposed")
        self.pool = nn.MaxPool2d(2, 2)
        self.encoder = vgg_features(VGG16, bands)
        encoder = list(self.encoder)
        self.conv1 = nn.Sequential(*encoder[0:4])
        self.conv2 = nn.Sequential(*encoder[5:9])
        self.conv3 = nn.Sequential(*encoder[10:16])
        self.conv4 = nn.Sequential(*encoder[17:23])
        self.conv5 = nn.Sequential(*encoder[24:30])
        self.center = _decoder_block(upsampling, 512, 16 * FILTERS, 8 * FILTERS)
        self.dec5 = _decoder_block(upsampling, 512 + 8 * FILTERS, 16 * FILTERS, 8 * FILTERS)
        self.dec4 = _decoder_block(upsampling, 512 + 8 * FILTERS, 16 * FILTERS, 8 * FILTERS)
        self.dec3 = _decoder_block(upsampling, 256 + 8 * FILTERS, 8 * FILTERS, 2 * FILTERS)
        self.dec2 = _decoder_block(upsampling, 128 + 2 * FILTERS, 4 * FILTERS, FILTERS)
        self.dec1 = ConvReLU(64 + FILTERS, FILTERS)
        self.final = nn.Conv2d(FILTERS, classes, kernel_size=1)

    @classmethod
    def arguments_of(cls, state: Mapping[str, Tensor]) -> dict[str, JsonValue]:
        """Which of the two published kinds a checkpoint is."""
        return {"upsampling": "transposed" if "center.block.1.weight" in state else "bilinear"}

    def own_key(self, published: str) -> str:
        """Torchvision's `features.` is `encoder.` here."""
        return published.replace("features.", "encoder.", 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image; H and W multiples of 32."""
        skips = [self.conv1(image_BCHW)]
        for conv in (self.conv2, self.conv3, self.conv4, self.conv5):
            skips.append(conv(self.pool(skips[-1])))
        up = self.center(self.pool(skips[-1]))
        for step in (self.dec5, self.dec4, self.dec3, self.dec2, self.dec1):
            # A skip is let go of once it is used: less memory at the peak.
            up = step(torch.cat([up, skips.pop()], 1))
        logits_BKHW: Tensor = self.final(up)
        return logits_BKHW


class DecoderBlock(nn.Module):
    """Doubles H and W; two layers with ReLU."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """H and W doubled."""
        y_BCHW: Tensor = self.block(x_BCHW)
        return y_BCHW


def _decoder_block(upsampling: Upsampling, channels: int, middle_channels: int, out_channels: int) -> DecoderBlock:
    """Bilinear upsampling and two convolutions, or one convolution and a transposed 4x4 one of stride 2."""
    if upsampling == "bilinear":
        return DecoderBlock(Bilinear(), ConvReLU(channels, middle_channels), ConvReLU(middle_channels, out_channels))
    return DecoderBlock(
        ConvReLU(channels, middle_channels), Transposed4(middle_channels, out_channels), nn.ReLU(inplace=True)
    )
