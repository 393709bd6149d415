"""The two paths that the U-Nets share: double convolutions down, and up, concatenate with the skip, convolve.

Axes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .upsample import Transposed2, by_hand

WIDE = 3
"""A concatenation of so many times the channels that its convolution gives is convolved in parts."""


class DecoderStep(nn.Module):
    """Transposed 2x2 convolution, concatenation (up, skip), two 3x3 convolutions with ReLU; no BatchNorm.

    In eval mode on a CPU a wide concatenation is not made: what comes up and the skip are convolved apart and added. At
    such convolutions oneDNN adds up in another order on some widths (384 channels to 128 in float32 on maps up to 256
    columns wide, 768 to 256 in bfloat16 up to 160), and then the last bit of a pixel depends on the size of the window
    around it.
    """

    def __init__(self, in_channels: int, up_channels: int, skip_channels: int, out_channels: int, padding: int) -> None:
        super().__init__()
        self.up = Transposed2(in_channels, up_channels)
        self.conv = double_convolution(up_channels + skip_channels, out_channels, padding)
        self.padding = padding
        self.wide = skip_channels > 0 and up_channels + skip_channels >= WIDE * out_channels

    def forward(self, x_BCHW: Tensor, skip_BCHW: Tensor | None) -> Tensor:
        """H and W doubled, less twice the border that convolutions without padding lose; of a skip, the middle."""
        x_BCHW = self.up(x_BCHW)
        if skip_BCHW is None:
            y_BCHW: Tensor = self.conv(x_BCHW)
            return y_BCHW
        if not self.padding:
            skip_BCHW = _cropped(skip_BCHW, x_BCHW)
        first, *rest = self.conv
        if self.wide and isinstance(first, nn.Conv2d) and by_hand(self, x_BCHW):
            y_BCHW = _convolved_apart(first, x_BCHW, skip_BCHW)
        else:
            y_BCHW = first(torch.cat([x_BCHW, skip_BCHW], 1))
        for layer in rest:
            y_BCHW = layer(y_BCHW)
        return y_BCHW


def _convolved_apart(conv: nn.Conv2d, x_BCHW: Tensor, skip_BCHW: Tensor) -> Tensor:
    """The convolution of both, concatenated."""
    channels = x_BCHW.shape[1]
    parts = (conv.weight[:, :channels], conv.weight[:, channels:])
    own, other = (part.contiguous(memory_format=torch.channels_last) for part in parts)
    y_BCHW = nnf.conv2d(x_BCHW, own, conv.bias, padding=conv.padding)
    return y_BCHW.add_(nnf.conv2d(skip_BCHW, other, padding=conv.padding))


def decoder(
    channels: int, skips: Sequence[int], widths: Sequence[int], up_widths: Sequence[int] = (), padding: int = 1
) -> nn.ModuleList:
    """Steps from `channels` at the bottom to the last of widths. A skip of 0 channels is none.

    up_widths: channels that the transposed convolutions give; the same as widths if there are none.
    """
    steps = nn.ModuleList()
    for up, skip, width in zip(up_widths or widths, skips, widths, strict=True):
        steps.append(DecoderStep(channels, up, skip, width, padding))
        channels = width
    return steps


def expand(steps: nn.ModuleList, x_BCHW: Tensor, skips: list[Tensor | None]) -> Tensor:
    """Send x up the steps, each with the last of the skips, which is let go of once it is used: less memory."""
    for step in steps:
        x_BCHW = step(x_BCHW, skips.pop())
    return x_BCHW


def contracting_path(bands: int, widths: Sequence[int], padding: int = 1) -> nn.ModuleList:
    """Double convolutions, one a scale, from full resolution down."""
    blocks = nn.ModuleList()
    for width in widths:
        blocks.append(double_convolution(bands, width, padding))
        bands = width
    return blocks


def contract(blocks: nn.ModuleList, pool: nn.Module, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output of the last block, and those of the blocks before it, which are the skips."""
    skips: list[Tensor | None] = []
    for block in blocks[:-1]:
        skips.append(block(x_BCHW))
        x_BCHW = pool(skips[-1])
    return blocks[-1](x_BCHW), skips


def double_convolution(in_channels: int, out_channels: int, padding: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions, each with ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=padding),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=padding),
        nn.ReLU(inplace=True),
    )


def _cropped(skip_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """The middle of a skip, of another tensor's height and width."""
    height, width = like_BCHW.shape[2:]
    row, col = (skip_BCHW.shape[2] - height) // 2, (skip_BCHW.shape[3] - width) // 2
    return skip_BCHW[:, :, row : row + height, col : col + width]
