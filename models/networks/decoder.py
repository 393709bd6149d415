"""The two paths that the U-Nets share: double convolutions down, and up, concatenate with the skip, convolve.

Axes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .upsample import Transposed2


class DecoderStep(nn.Module):
    """Transposed 2x2 convolution, concatenation (up, skip), two 3x3 convolutions with ReLU; no BatchNorm."""

    def __init__(self, in_channels: int, up_channels: int, skip_channels: int, out_channels: int, padding: int) -> None:
        super().__init__()
        self.up = Transposed2(in_channels, up_channels)
        self.conv = double_convolution(up_channels + skip_channels, out_channels, padding)
        self.padding = padding

    def forward(self, x_BCHW: Tensor, skip_BCHW: Tensor | None) -> Tensor:
        """H and W doubled, less twice the border that convolutions without padding lose; of a skip, the middle."""
        x_BCHW = self.up(x_BCHW)
        if skip_BCHW is not None:
            skip_BCHW = skip_BCHW if self.padding else _cropped(skip_BCHW, x_BCHW)
            x_BCHW = torch.cat([x_BCHW, skip_BCHW], 1)
        y_BCHW: Tensor = self.conv(x_BCHW)
        return y_BCHW


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
