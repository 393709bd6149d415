"""What every network offers besides its layers: its stride, its border, and how published files name its encoder."""

from __future__ import annotations

from torch import nn


class Network(nn.Module):
    """A segmentation network: normalised float image_BCHW in, logits_BKHW out.

    H and W of the image are remainder_px more than a multiple of `stride`, the coarsest scale at which the network
    works. H and W of the logits are smaller by border_px on each of the four sides.
    """

    stride: int
    border_px: int = 0
    remainder_px: int = 0
    encoder_prefix: str
    """Prefix of the encoder's keys in our state dict; torchvision's files have `features.` there."""
    unused_prefixes: tuple[str, ...]
    """Layers of torchvision's ImageNet file that the network has no use for."""
