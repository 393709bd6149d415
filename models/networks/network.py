"""What every network offers besides its layers: stride, border, and how published files of its encoder fit in."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue
from torch import Tensor, nn


class Network(nn.Module):
    """A segmentation network: normalised float image_BCHW in, logits_BKHW out.

    H and W of the image are remainder_px more than a multiple of `stride`, the coarsest scale at which the network
    works. H and W of the logits are smaller by border_px on each of the four sides.
    """

    stride: int
    border_px: int = 0
    remainder_px: int = 0
    encoder_prefix: str | tuple[str, ...] = "encoder."
    """How the encoder's keys begin."""
    published_encoder: str = ""
    """Torchvision's name of the encoder, for which there is an ImageNet file; an empty text where there is none."""
    first_layer: str = ""
    """Key of the convolution that sees the bands, where there is a published encoder."""
    unused_prefixes: tuple[str, ...] = ()
    """Layers of torchvision's ImageNet file that the network has no use for."""

    @classmethod
    def arguments_of(cls, state: Mapping[str, Tensor]) -> dict[str, JsonValue]:
        """Arguments, besides bands and classes, of the network that a published checkpoint is of."""
        return {}

    def own_key(self, published: str) -> str:
        """The key here of a tensor in torchvision's ImageNet file."""
        return published
