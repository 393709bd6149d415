"""Layers that double height and width, and give a pixel the same bits however large the window around it is.

In eval mode on a CPU they are computed without the library's own kernels wherever those add up in another order at
some widths of the input: then the last bit of a pixel would depend on the size of the window around it.
Axes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class Transposed2(nn.ConvTranspose2d):
    """A transposed 2x2 convolution of stride 2: each pixel becomes a square of four, none of which sees another pixel.

    In eval mode on a CPU: a 1x1 convolution to four times the channels, which are then laid side by side.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)

    def forward(self, x_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """H and W doubled."""
        if not by_hand(self, x_BCHW):
            return super().forward(x_BCHW, output_size)
        kernel = self.weight.permute(1, 2, 3, 0).reshape(-1, self.in_channels, 1, 1)
        return _shuffled(x_BCHW, kernel, self.bias)


class Transposed3(nn.ConvTranspose2d):
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
        if not by_hand(self, x_BCHW):
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


class Transposed4(nn.ConvTranspose2d):
    """A transposed 4x4 convolution of stride 2 and padding 1.

    In eval mode on a CPU: a 3x3 convolution to four times the channels, which are then laid side by side. Along one
    axis output 2i is w[3] x[i - 1] + w[1] x[i], and output 2i + 1 is w[2] x[i] + w[0] x[i + 1].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """H and W doubled."""
        if not by_hand(self, x_BCHW):
            return super().forward(x_BCHW, output_size)
        weight = self.weight.transpose(0, 1)
        kernel = weight.new_zeros(self.out_channels, 2, 2, self.in_channels, 3, 3)
        for odd_row, rows in enumerate(_TAPS):
            for odd_col, cols in enumerate(_TAPS):
                for row, in_row in rows:
                    for col, in_col in cols:
                        kernel[:, odd_row, odd_col, :, in_row, in_col] = weight[:, :, row, col]
        return _shuffled(x_BCHW, kernel.reshape(-1, self.in_channels, 3, 3), self.bias)


_TAPS = (((3, 0), (1, 1)), ((2, 1), (0, 2)))
"""Of even and odd outputs: which weight meets which of the three inputs around."""


class Bilinear(nn.Module):
    """Bilinear interpolation to twice the size, corners not aligned: weights 1/4 and 3/4 along each axis."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """H and W doubled."""
        return nnf.interpolate(x_BCHW, scale_factor=2.0, mode="bilinear", align_corners=False)


def by_hand(layer: nn.Module, x_BCHW: Tensor) -> bool:
    """Whether the library's own way is to be avoided: in eval mode on a CPU, unless in float64, which oneDNN lacks."""
    return not (layer.training or x_BCHW.is_cuda or x_BCHW.dtype == torch.float64)


def _shuffled(x_BCHW: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution to four times the channels, of which every four become a square of pixels."""
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    four = None if bias is None else bias.repeat_interleave(4)
    return nnf.pixel_shuffle(nnf.conv2d(x_BCHW, kernel, four, padding=kernel.shape[-1] // 2), 2)


def _convolve(x_BCHW: Tensor, kernel: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0)) -> Tensor:
    return nnf.conv2d(x_BCHW, kernel.contiguous(memory_format=torch.channels_last), bias, padding=padding)
