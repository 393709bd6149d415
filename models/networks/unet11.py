"""UNet11: TernausNet, a U-Net whose encoder is VGG11 (Iglovikov and Shvets, arXiv 1801.05746, figure 1).

Axes: B batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .network import Network

FILTERS = 32


class UNet11(Network):
    """VGG11's eight convolutions, five poolings, five decoder steps with skips, a 1x1 head: 22,927,393 parameters.

    Layers and state-dict keys are those of the published model, where each encoder convolution is registered twice
    (`encoder.0` is `conv1`, `encoder.3` is `conv2` and so on): the state dict has both keys for the same tensor.
    """

    stride = 32
    encoder_prefix = "encoder."
    unused_prefixes = ("classifier.",)

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)
        self.encoder = _vgg11_features(bands)
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
            Upsample(middle_channels, out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """H and W doubled."""
        y_BCHW: Tensor = self.block(x_BCHW)
        return y_BCHW


class Upsample(nn.ConvTranspose2d):
    """A transposed 3x3 convolution of stride 2 that doubles H and W.

    In eval mode on a CPU it is computed as plain convolutions, one or two for each parity of output row and column.
    oneDNN's transposed convolutions, and its plain ones two columns wide, add up in another order at some widths of
    the input (3 to 5 of 49 tried), and then the last bit of a pixel depends on the size of the window around it.
    Kernels of one or three columns were the same at every width from 16 columns on.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """H and W doubled."""
        if self.training or x_BCHW.is_cuda or x_BCHW.dtype == torch.float64:  # oneDNN has no float64
            return super().forward(x_BCHW, output_size)
        batch, _, height, width = x_BCHW.shape
        shape = batch, self.out_channels, 2 * height, 2 * width
        y_BCHW = torch.empty(shape, dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=torch.channels_last)
        # Along one axis output 2i is w[1] x[i], and output 2i + 1 is w[2] x[i] + w[0] x[i + 1].
        kernel = self.weight.transpose(0, 1)
        odd_cols = torch.cat([torch.zeros_like(kernel[..., :1]), kernel[..., 2:], kernel[..., :1]], dim=3)
        y_BCHW[:, :, 0::2, 0::2] = _convolve(x_BCHW, kernel[:, :, 1:2, 1:2], self.bias)
        y_BCHW[:, :, 1::2, 0::2] = _convolve(x_BCHW, kernel[:, :, [2, 0], 1:2], self.bias, padding=(1, 0))[:, :, 1:]
        y_BCHW[:, :, 0::2, 1::2] = _convolve(x_BCHW, odd_cols[:, :, 1:2], self.bias, padding=(0, 1))
        odd_odd = _convolve(x_BCHW, odd_cols[:, :, 2:3], self.bias, padding=(0, 1))
        odd_odd[:, :, :-1] += _convolve(x_BCHW, odd_cols[:, :, 0:1], None, padding=(0, 1))[:, :, 1:]
        y_BCHW[:, :, 1::2, 1::2] = odd_odd
        return y_BCHW


def _convolve(x_BCHW: Tensor, kernel: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0)) -> Tensor:
    return nnf.conv2d(x_BCHW, kernel.contiguous(memory_format=torch.channels_last), bias, padding=padding)


def _vgg11_features(bands: int) -> nn.Sequential:
    """VGG11's feature layers in torchvision's order (0 to 20); the poolings stand in so that the numbers agree."""
    layers: list[nn.Module] = []
    channels = bands
    for width in (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None):
        if width is None:
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)
