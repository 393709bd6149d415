"""A U-Net on MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2), with a light decoder with BatchNorm.

With the plain decoder and the top layer it is M-Unet of the transfer-learning study, section 2.1. The encoder's keys
are torchvision's `features.0` to `features.17` or 18, so its ImageNet file loads as it is.
Axes: B batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .decoder import decoder as plain_decoder
from .decoder import expand
from .network import Network
from .upsample import Transposed2

STAGES = (
    # expansion, channels, repeats, stride: the rows of table 2
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
SKIPS = (1, 3, 6, 13)
"""Layers of `features` whose output is kept for the decoder: scale 1/2, 1/4, 1/8, 1/16."""
SKIP_CHANNELS = (96, 32, 24, 16, 0)
"""Channels of the skips, from the coarsest to none at full resolution."""
TOP_CHANNELS = 1280
LIGHT_WIDTHS = (256, 128, 64, 48, 32)
PLAIN_WIDTHS = (512, 256, 128, 64, 32)


class UNetMobileNetV2(Network):
    """MobileNetV2's features.0 to 17 (1,811,712 parameters) and a decoder of five steps (2,399,601).

    decoder: light, or plain, the wider one of the other U-Nets without BatchNorm. top: read after features.18, which
    gives 1280 channels. Plain and with the top: 12,382,913 parameters.
    """

    stride = 32
    encoder_prefix = "features."
    published_encoder = "mobilenet_v2"
    first_layer = "features.0.0.weight"

    def __init__(
        self, bands: int = 3, classes: int = 1, decoder: Literal["light", "plain"] = "light", top: bool = False
    ) -> None:
        super().__init__()
        if decoder not in ("light", "plain"):
            raise ValueError(f"decoder {decoder!r}: expected light or plain")
        self.unused_prefixes = ("classifier.",) if top else ("features.18.", "classifier.")
        self.features = _mobilenetv2_features(bands, top)
        channels = TOP_CHANNELS if top else STAGES[-1][1]
        if decoder == "plain":
            self.decoder = plain_decoder(channels, SKIP_CHANNELS, PLAIN_WIDTHS)
        else:
            before = (channels, *LIGHT_WIDTHS)
            steps = zip(before, SKIP_CHANNELS, LIGHT_WIDTHS, strict=False)
            self.decoder = nn.ModuleList(LightStep(*step) for step in steps)
        self.head = nn.Conv2d(PLAIN_WIDTHS[-1], classes, kernel_size=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image; H and W multiples of 32."""
        x = image_BCHW
        skips: list[Tensor | None] = [None]
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in SKIPS:
                skips.append(x)
        logits_BKHW: Tensor = self.head(expand(self.decoder, x, skips))
        return logits_BKHW


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by 3x3, project by 1x1 without activation (section 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [_conv_norm_relu6(in_channels, hidden, kernel=1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_norm_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """H and W divided by the stride; the input is added where the shapes agree."""
        y_BCHW: Tensor = self.conv(x_BCHW)
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class LightStep(nn.Module):
    """Transposed 2x2 convolution, concatenation with the skip, two 3x3 convolutions with BatchNorm and ReLU."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = Transposed2(in_channels, out_channels)
        self.conv = nn.Sequential(
            nn.Conv2d(out_channels + skip_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x_BCHW: Tensor, skip_BCHW: Tensor | None) -> Tensor:
        """H and W doubled; the skip, if there is one, has the doubled H and W."""
        x_BCHW = self.up(x_BCHW)
        if skip_BCHW is not None:
            x_BCHW = torch.cat([x_BCHW, skip_BCHW], 1)
        y_BCHW: Tensor = self.conv(x_BCHW)
        return y_BCHW


def _conv_norm_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


def _mobilenetv2_features(bands: int, top: bool) -> nn.Sequential:
    """Torchvision's features.0 to features.17: the stem and 17 inverted residuals; and features.18, a 1x1, on top."""
    layers: list[nn.Module] = [_conv_norm_relu6(bands, 32, kernel=3, stride=2)]
    channels = 32
    for expansion, width, repeats, stride in STAGES:
        for repeat in range(repeats):
            layers.append(InvertedResidual(channels, width, stride if repeat == 0 else 1, expansion))
            channels = width
    if top:
        layers.append(_conv_norm_relu6(channels, TOP_CHANNELS, kernel=1))
    return nn.Sequential(*layers)
