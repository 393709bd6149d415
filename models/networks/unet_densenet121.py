"""D-Unet: a U-Net on DenseNet121 (Huang et al., arXiv 1608.06993, table 1), section 2.1 of the transfer-learning study.

The encoder's keys are torchvision's `features.conv0` to `features.norm5`. Axes: B batch, C channels, H rows, W columns,
K classes.
"""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .decoder import decoder, expand
from .network import Network

DEPTHS = (6, 12, 24, 16)
"""Layers in each dense block."""
GROWTH = 32
"""Channels that each layer adds."""
BOTTLENECK = 4 * GROWTH
WIDTHS = (512, 256, 128, 64, 32)
"""Channels of the decoder's steps; the last, at full resolution, has no skip."""
_OLD_KEY = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12])\.(\w+)")


class UNetDenseNet121(Network):
    """DenseNet121 read after norm5 and ReLU, and a decoder of five steps: 22,265,665 parameters.

    Skips: after the first ReLU, and after dense blocks 1 to 3, before their transitions.
    """

    stride = 32
    encoder_prefix = "features."
    published_encoder = "densenet121"
    first_layer = "features.conv0.weight"
    unused_prefixes = ("classifier.",)

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(bands, 2 * GROWTH, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(2 * GROWTH),
            relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels = 2 * GROWTH
        skips = [0, channels]
        for number, depth in enumerate(DEPTHS, start=1):
            layers[f"denseblock{number}"] = DenseBlock(channels, depth)
            channels += depth * GROWTH
            if number < len(DEPTHS):
                skips.append(channels)
                layers[f"transition{number}"] = _transition(channels)
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(layers)
        self.decoder = decoder(channels, skips[::-1], WIDTHS)
        self.head = nn.Conv2d(WIDTHS[-1], classes, kernel_size=1)

    def own_key(self, published: str) -> str:
        """The published file has `norm.1` for what has been `norm1` since, because names may hold no dots."""
        return _OLD_KEY.sub(r"\1\2.\3", published)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image; H and W multiples of 32."""
        x = image_BCHW
        skips: list[Tensor | None] = [None]
        for name, layer in self.features.named_children():
            x = layer(x)
            if name in ("relu0", "denseblock1", "denseblock2", "denseblock3"):
                skips.append(x)
        logits_BKHW: Tensor = self.head(expand(self.decoder, nnf.relu(x, inplace=True), skips))
        return logits_BKHW


class DenseBlock(nn.ModuleDict):
    """Layers that each see the channels of all before them, and add GROWTH of their own."""

    def __init__(self, in_channels: int, depth: int) -> None:
        super().__init__(
            {f"denselayer{number + 1}": DenseLayer(in_channels + number * GROWTH) for number in range(depth)}
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same H and W; depth x GROWTH more channels."""
        for layer in self.values():
            x_BCHW = torch.cat([x_BCHW, layer(x_BCHW)], 1)
        return x_BCHW


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and 1x1 convolution to BOTTLENECK channels; BatchNorm, ReLU and 3x3 convolution to GROWTH."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, BOTTLENECK, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(BOTTLENECK, GROWTH, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same H and W."""
        y_BCHW = self.conv1(self.relu1(self.norm1(x_BCHW)))
        added_BCHW: Tensor = self.conv2(self.relu2(self.norm2(y_BCHW)))
        return added_BCHW


def _transition(channels: int) -> nn.Sequential:
    """Half of the channels, half of H and W."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
            pool=nn.AvgPool2d(2, 2),
        )
    )
