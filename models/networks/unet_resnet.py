"""R-Unet: a U-Net on ResNet (He et al., arXiv 1512.03385, table 1), section 2.1 of the transfer-learning study.

The encoder's keys are torchvision's (`conv1`, `bn1`, `layer1` to `layer4`), and as there the 3x3 convolution of a
bottleneck has the stride, not the 1x1 convolution before it. Axes: B batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from .decoder import decoder, expand
from .network import Network

WIDTHS = (512, 256, 128, 64, 32)
"""Channels of the decoder's steps; the last, at full resolution, has no skip."""


class UNetResNet50(Network):
    """ResNet50 without average pooling and head, and a decoder of five steps: 40,916,993 parameters.

    Skips: after the first ReLU, and after layer1 to layer3.
    """

    stride = 32
    encoder_prefix = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
    published_encoder = "resnet50"
    first_layer = "conv1.weight"
    unused_prefixes = ("fc.",)
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks in each layer."""
    bottleneck = True

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(bands, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        expansion = 4 if self.bottleneck else 1
        channels = (64, *(width * expansion for width in (64, 128, 256, 512)))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._layer(channels[i], channels[i + 1], depth, stride=1 if i == 0 else 2)
            for i, depth in enumerate(self.depths)
        )
        self.decoder = decoder(channels[4], (*channels[3:0:-1], channels[0], 0), WIDTHS)
        self.head = nn.Conv2d(WIDTHS[-1], classes, kernel_size=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image; H and W multiples of 32."""
        x = self.relu(self.bn1(self.conv1(image_BCHW)))
        skips: list[Tensor | None] = [None, x]
        x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
            skips.append(x)
        logits_BKHW: Tensor = self.head(expand(self.decoder, self.layer4(x), skips))
        return logits_BKHW

    def _layer(self, in_channels: int, out_channels: int, depth: int, stride: int) -> nn.Sequential:
        block = Bottleneck if self.bottleneck else BasicBlock
        return nn.Sequential(
            block(in_channels, out_channels, stride), *(block(out_channels, out_channels, 1) for _ in range(depth - 1))
        )


class UNetResNet18(UNetResNet50):
    """The same with ResNet18."""

    published_encoder = "resnet18"
    depths = (2, 2, 2, 2)
    bottleneck = False


class UNetResNet34(UNetResNet50):
    """The same with ResNet34."""

    published_encoder = "resnet34"
    bottleneck = False


class UNetResNet101(UNetResNet50):
    """The same with ResNet101."""

    published_encoder = "resnet101"
    depths = (3, 4, 23, 3)


class UNetResNet152(UNetResNet50):
    """The same with ResNet152."""

    published_encoder = "resnet152"
    depths = (3, 8, 36, 3)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and the input added before the last ReLU (figure 5, left)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """H and W divided by the stride."""
        y_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        sum_BCHW: Tensor = self.relu(y_BCHW + (x_BCHW if self.downsample is None else self.downsample(x_BCHW)))
        return sum_BCHW


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3, 1x1 back, and the input added before the last ReLU (figure 5, right)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """H and W divided by the stride."""
        y_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.relu(self.bn2(self.conv2(y_BCHW)))
        y_BCHW = self.bn3(self.conv3(y_BCHW))
        sum_BCHW: Tensor = self.relu(y_BCHW + (x_BCHW if self.downsample is None else self.downsample(x_BCHW)))
        return sum_BCHW


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """What the input passes where the block changes its shape; None where it does not."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )
