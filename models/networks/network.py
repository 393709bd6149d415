"""What every network offers besides its layers: its stride, and how published files name its encoder."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Network(nn.Module):
    """A segmentation network: normalised float image_BCHW in, logits_BKHW of the same H and W out.

    H and W must be multiples of `stride`, the coarsest scale at which the network works.
    """

    stride: ClassVar[int]
    encoder_prefix: ClassVar[str]
    """Prefix of the encoder's keys in our state dict; torchvision's files have `features.` there."""
    unused_prefixes: ClassVar[tuple[str, ...]]
    """Layers of torchvision's ImageNet file that the network has no use for."""
