"""UNet11: TernausNet, a U-Net whose encoder is VGG11 (Iglovikov and Shvets, arXiv 1801.05746, figure 1).

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .network import Network
from .upsample import Transposed3
from .vgg import VGG11, vgg_features

FILTERS = 32


class UNet11(Network):
    """VGG11's eight convolutions, five poolings, five decoder steps with skips, a 1x1 head: 22,927,393 parameters.

    Layers and state-dict keys are those of the published model, where each encoder convolution is registered twice
    (`encoder.0` is `conv1`, `encoder.3` is `conv2` and so on): the state dict has both keys for the same tensor.
    """

    stride = 32
    published_encoder = "vgg11"
    first_layer = "encoder.0.weight"
    unused_prefixes = ("classifier.",)

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)
        self.encoder = vgg_features(VGG11, bands)
        self.relu = self.encoder[1]
        self.conv1 = self.encoder[0]
        self.conv2 = self.encoder[3]
        self.conv3s = self.encoder[6]
        self.conv3 = self.encoder[8]
        self.conv4s = self.encoder[11]
        self.conv4 = self.encoder[13]
        self.conv5s = self.encoder[16]
        self.conv5 = self.encoder[18]
        self.center = DecoderBlock(512, 16 * FILTERS, 8 * FILTERS)
        self.dec5 = DecoderBlock(512 + 8 * FILTERS, 16 * FILTERS, 8 * FILTERS)
        self.dec4 = DecoderBlock(512 + 8 * FILTERS, 16 * FILTERS, 4 * FILTERS)
        self.dec3 = DecoderBlock(256 + 4 * FILTERS, 8 * FILTERS, 2 * FILTERS)
        self.dec2 = DecoderBlock(128 + 2 * FILTERS, 4 * FILTERS, FILTERS)
        self.dec1 = ConvReLU(64 + FILTERS, FILTERS)
        self.final = nn.Conv2d(FILTERS, classes, kernel_size=1)

    def own_key(self, published: str) -> str:
        """Torchvision's `features.` is `encoder.` here."""
        return published.replace("features.", "encoder.", 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image; H and W multiples of 32."""
        conv1 = self.relu(self.conv1(image_BCHW))
        conv2 = self.relu(self.conv2(self.pool(conv1)))
        conv3 = self.relu(self.conv3(self.relu(self.conv3s(self.pool(conv2)))))
        conv4 = self.relu(self.conv4(self.relu(self.conv4s(self.pool(conv3)))))
        conv5 = self.relu(self.conv5(self.relu(self.conv5s(self.pool(conv4)))))
        up = self.center(self.pool(conv5))
        # A skip is let go of once it is used: a third less memory at the peak.
        skips = [conv1, conv2, conv3, conv4, conv5]
        del conv1, conv2, conv3, conv4, conv5
        for step in (self.dec5, self.dec4, self.dec3, self.dec2, self.dec1):
            up = torch.cat([up, skips.pop()], 1)
            up = step(up)
        logits_BKHW: Tensor = self.final(up)
        return logits_BKHW


class ConvReLU(nn.Module):
    """A 3x3 convolution and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same H and W."""
        y_BCHW: Tensor = self.activation(self.conv(x_BCHW))
        return y_BCHW


class DecoderBlock(nn.Module):
    """A 3x3 convolution, then a transposed 3x3 convolution that doubles H and W, each followed by ReLU."""

    def __init__(self, in_channels: int, middle_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            ConvReLU(in_channels, middle_channels),
            Transposed3(middle_channels, out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """H and W doubled."""
        y_BCHW: Tensor = self.block(x_BCHW)
        return y_BCHW
