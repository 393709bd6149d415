"""The plain U-Net, padded and as first published, its expanding path on VGG16, and a small one.

Sources: Ronneberger, Fischer and Brox, arXiv 1505.04597, figure 1 (`unet-valid`); the transfer-learning study's
baseline and V-Unet, section 2.1 (`unet`, `unet-vgg16`); the study of faces and structures, section V (`unet-small`).
Axes: B batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from .decoder import contract, contracting_path, decoder, expand
from .network import Network
from .vgg import VGG16, vgg_features

WIDTHS = (64, 128, 256, 512, 1024)
"""Channels of the five blocks of the contracting path, from full resolution down."""
SMALL_WIDTHS = (8, 16, 32, 64, 128, 256, 512)
SMALL_UP_WIDTHS = (64, 32, 16, 8, 4, 2)
SMALL_OUT_WIDTHS = (256, 128, 64, 32, 16, 16)


class UNet(Network):
    """Five blocks of two 3x3 convolutions with ReLU, transposed 2x2 that halve the channels: 31,031,745 parameters.

    Padded, so that the logits are as large as the image; no BatchNorm.
    """

    stride = 16
    padding = 1

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)
        self.encoder = contracting_path(bands, WIDTHS, self.padding)
        self.decoder = decoder(WIDTHS[-1], WIDTHS[-2::-1], WIDTHS[-2::-1], padding=self.padding)
        self.head = nn.Conv2d(WIDTHS[0], classes, kernel_size=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image."""
        logits_BKHW: Tensor = self.head(expand(self.decoder, *contract(self.encoder, self.pool, image_BCHW)))
        return logits_BKHW


class UNetValid(UNet):
    """The U-Net of 2015: convolutions without padding, skips cropped; 23 convolutional layers, 31,031,745 parameters.

    A pixel is only answered for where all that it can see is there: the logits are 92 px smaller on each side. H and W
    of the image are 12 more than a multiple of 16, and at least 188.
    """

    border_px = 92
    remainder_px = 12
    padding = 0


class UNetSmall(Network):
    """Six poolings and channels from 8 to 512: 6,667,639 parameters.

    The transposed convolutions give few channels (64 to 2), to which the double convolutions add (256 to 16). Padded,
    no BatchNorm.
    """

    stride = 64

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)
        self.encoder = contracting_path(bands, SMALL_WIDTHS)
        self.decoder = decoder(SMALL_WIDTHS[-1], SMALL_WIDTHS[-2::-1], SMALL_OUT_WIDTHS, SMALL_UP_WIDTHS)
        self.head = nn.Conv2d(SMALL_OUT_WIDTHS[-1], classes, kernel_size=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image; H and W multiples of 64."""
        logits_BKHW: Tensor = self.head(expand(self.decoder, *contract(self.encoder, self.pool, image_BCHW)))
        return logits_BKHW


class UNetVGG16(Network):
    """The U-Net's expanding path on VGG16's features without the last pooling: 25,854,657 parameters.

    With the encoder frozen it is the study's V-Unet, else its FT V-Unet.
    """

    stride = 16
    encoder_prefix = "features."
    published_encoder = "vgg16"
    first_layer = "features.0.weight"
    unused_prefixes = ("classifier.",)

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(*list(vgg_features(VGG16, bands))[:-1])
        skips = tuple(widths[-1] for widths in VGG16[-2::-1])
        self.decoder = decoder(VGG16[-1][-1], skips, skips)
        self.head = nn.Conv2d(skips[-1], classes, kernel_size=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits_BKHW of a normalised image; H and W multiples of 16."""
        x = image_BCHW
        skips: list[Tensor | None] = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                skips.append(x)
            x = layer(x)
        logits_BKHW: Tensor = self.head(expand(self.decoder, x, skips))
        return logits_BKHW
