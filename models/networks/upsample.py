"""Layers that double height and width, and give a pixel the same bits however large the window around it is.

In eval mode on a CPU they are computed without the library's own kernels wherever those add up in another order at
some widths of the input: then the last bit of a pixel would depend on the size of the window around it.
Axes: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class Part(NamedTuple):
    """One of the convolutions, of stride 1, that a layer is made of. padding: rows and columns of zeros.

    below: another kernel, without a bias; what it makes of each row is added to what `kernel` makes of the row above.
    """

    kernel: Tensor
    bias: Tensor | None
    padding: tuple[int, int]
    below: Tensor | None = None


class ByParts(nn.ConvTranspose2d, ABC):
    """A transposed convolution of stride 2 that on a CPU in eval mode is done as plain convolutions."""

    def forward(self, x_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        """H and W doubled."""
        if not by_hand(self, x_BCHW):
            return super().forward(x_BCHW, output_size)
        maps = []
        for kernel, bias, padding, below in self.parts():
            maps.append(nnf.conv2d(x_BCHW, kernel, bias, padding=padding))
            if below is not None:
                maps[-1][:, :, :-1] += nnf.conv2d(x_BCHW, below, padding=padding)[:, :, 1:]
        return self.put_together(maps)

    @abstractmethod
    def parts(self) -> list[Part]:
        """The convolutions."""

    @abstractmethod
    def put_together(self, maps: list[Tensor]) -> Tensor:
        """What they gave, laid side by side."""


class Transposed2(ByParts):
    """A transposed 2x2 convolution of stride 2: each pixel becomes a square of four, none of which sees another pixel.

    By parts: a 1x1 convolution to four times the channels, which are then laid side by side. With AVX2 alone oneDNN's
    own adds up in another order at some widths.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)

    def parts(self) -> list[Part]:
        """One."""
        return [_to_squares(self.weight.permute(2, 3, 1, 0)[..., None, None], self.bias)]

    def put_together(self, maps: list[Tensor]) -> Tensor:
        """Squares of four pixels."""
        return _squares(*maps)


class Transposed3(ByParts):
    """A transposed 3x3 convolution of stride 2 that doubles H and W.

    By parts: one or two convolutions for each parity of output row and column. At some widths of the input oneDNN adds
    up in another order in transposed convolutions and in plain ones two columns wide (3 to 5 of 49 tried), and with AMX
    also in those of one column and several rows; then the last bit of a pixel depends on the size of the window around
    it. Kernels of one row and of one or three columns were the same at every width from 16 columns on.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)

    def parts(self) -> list[Part]:
        """Of even rows, then of odd ones: even and odd columns."""
        # Along one axis output 2i is w[1] x[i], and output 2i + 1 is w[2] x[i] + w[0] x[i + 1].
        kernel = self.weight.transpose(0, 1)
        even = kernel[..., 1:2]
        odd = torch.cat([torch.zeros_like(even), kernel[..., 2:], kernel[..., :1]], dim=3)

        def row_of(cols: Tensor, row: int) -> Tensor:
            return cols[:, :, row : row + 1].contiguous(memory_format=torch.channels_last)

        columns = ((even, (0, 0)), (odd, (0, 1)))
        return [
            *(Part(row_of(cols, 1), self.bias, padding) for cols, padding in columns),
            *(Part(row_of(cols, 2), self.bias, padding, below=row_of(cols, 0)) for cols, padding in columns),
        ]

    def put_together(self, maps: list[Tensor]) -> Tensor:
        """Pixels by parity."""
        batch, channels, height, width = maps[0].shape
        y_BCHW = maps[0].new_empty(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
        for number, part_BCHW in enumerate(maps):
            y_BCHW[:, :, number // 2 :: 2, number % 2 :: 2] = part_BCHW
        return y_BCHW


class Transposed4(ByParts):
    """A transposed 4x4 convolution of stride 2 and padding 1.

    By parts: a 3x3 convolution to four times the channels, which are then laid side by side. Along one axis
    output 2i is w[3] x[i - 1] + w[1] x[i], and output 2i + 1 is w[2] x[i] + w[0] x[i + 1].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)

    def parts(self) -> list[Part]:
        """One."""
        weight = self.weight.transpose(0, 1)
        kernel = weight.new_zeros(2, 2, self.out_channels, self.in_channels, 3, 3)
        for odd_row, rows in enumerate(_TAPS):
            for odd_col, cols in enumerate(_TAPS):
                for row, in_row in rows:
                    for col, in_col in cols:
                        kernel[odd_row, odd_col, :, :, in_row, in_col] = weight[:, :, row, col]
        return [_to_squares(kernel, self.bias)]

    def put_together(self, maps: list[Tensor]) -> Tensor:
        """Squares of four pixels."""
        return _squares(*maps)


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


def _to_squares(kernel: Tensor, bias: Tensor | None) -> Part:
    """A convolution to the four pixels of squares, of a kernel (2, 2, out, in, height, width)."""
    reach = kernel.shape[-1] // 2
    flat = kernel.flatten(0, 2).contiguous(memory_format=torch.channels_last)
    return Part(flat, None if bias is None else torch.cat([bias] * 4), (reach, reach))


def _squares(four_BCHW: Tensor) -> Tensor:
    """Every four maps as squares of pixels."""
    batch, channels, height, width = four_BCHW.shape
    four = four_BCHW.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, channels // 4)
    return four.transpose(2, 3).reshape(batch, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)
