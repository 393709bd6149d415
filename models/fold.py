"""Networks made ready to predict: BatchNorm and ReLU done together with convolutions, in fewer passes over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .networks import Network, OwnNetwork
from .networks.upsample import Bilinear, ByParts, Part

ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}
"""What oneDNN calls them, and their numbers."""
PLAIN: tuple[str, list[float]] = ("none", [])
"""No activation."""

PACKED_FOR_PX = 256
"""Side of the maps that weights are laid out for; larger and smaller ones are convolved with the same layout."""


def fold_batchnorm(network: Network) -> None:
    """Multiply each BatchNorm that alone reads a convolution into its weights, in place, and leave nothing there.

    The same function as before, up to rounding. For a network in eval mode, with its weights in float32. One of a
    user's own stays as it is: its code need not be such that it can be traced.
    """
    if isinstance(network, OwnNetwork):
        return
    for source, target in [*_pairs(network)]:
        conv, norm = network.get_submodule(source), network.get_submodule(target)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        network.set_submodule(source, fuse_conv_bn_eval(conv, norm))
        network.set_submodule(target, nn.Identity().eval())


def _pairs(network: Network) -> Iterator[tuple[str, str]]:
    """Names of convolutions, each with that of the BatchNorm that is all that its output goes to."""
    nodes = [node for node in _traced(network).graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    for node in nodes:
        source = node.args[0]
        if (
            isinstance(network.get_submodule(node.target), nn.BatchNorm2d)
            and source.op == "call_module"
            and isinstance(network.get_submodule(source.target), nn.Conv2d)
            and len(source.users) == 1
            and calls[node.target] == calls[source.target] == 1
        ):
            yield source.target, node.target


def fuse_activations(network: Network) -> nn.Module:
    """The same function of an image, each ReLU that alone reads a convolution done in that one's pass, weights packed.

    For a network in eval mode on a CPU, in float32 or bfloat16; its weights are shared. Where torch has no oneDNN, and
    for a network of a user's own, it is the network itself.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch gives it no types
    if isinstance(network, OwnNetwork) or not has_onednn:
        return network
    traced = _traced(network)
    for node in [*traced.graph.nodes]:
        source = _convolution_before(node, traced)
        if source is None:
            continue
        activation = ACTIVATIONS[type(traced.get_submodule(str(node.target)))]
        source.target = _replaced(source, traced.get_submodule(str(source.target)), activation, traced)
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    for node in traced.graph.nodes:
        layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, ByParts):
            node.target = _replaced(node, layer, PLAIN, traced)
    traced.recompile()
    return traced.eval()


def _replaced(
    node: torch.fx.Node, layer: Any, activation: tuple[str, list[float]], traced: torch.fx.GraphModule
) -> str:
    """The name of what is to run at a node in place of its layer."""
    name = f"fused_{node.name}"
    traced.add_submodule(name, (FusedParts if isinstance(layer, ByParts) else Fused)(layer, *activation))
    return name


def _convolution_before(node: torch.fx.Node, traced: torch.fx.GraphModule) -> torch.fx.Node | None:
    """Where the convolution is done that an activation alone reads; None if the node is no such activation."""
    if node.op != "call_module" or type(traced.get_submodule(str(node.target))) not in ACTIVATIONS:
        return None
    while True:
        source = node.args[0]
        if not isinstance(source, torch.fx.Node) or source.op != "call_module" or len(source.users) != 1:
            return None
        layer = traced.get_submodule(str(source.target))
        if isinstance(layer, nn.Conv2d):
            return source if pads_with_zeros(layer) else None
        if isinstance(layer, ByParts):
            return source
        # What folding has left of BatchNorm.
        if not isinstance(layer, nn.Identity):
            return None
        node = source


def pads_with_zeros(conv: nn.Conv2d) -> bool:
    """Whether a convolution's padding is so many rows and columns of zeros, which is what oneDNN knows."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class Fused(nn.Module):
    """A convolution and an activation in one pass of oneDNN."""

    def __init__(self, conv: nn.Conv2d, activation: str, numbers: list[float]) -> None:
        super().__init__()
        self.conv, self.activation, self.numbers = conv, activation, numbers
        self._packed: Tensor | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The activation of the convolution."""
        it: Any = self.conv
        place = (it.padding, it.stride, it.dilation, it.groups)
        if self._packed is None:
            self._packed = _packed(it.weight, *place)
        return _pointwise(x_BCHW, self._packed, it.bias, *place, self.activation, self.numbers)


class FusedParts(nn.Module):
    """A layer that doubles height and width, each of its convolutions with its activation in one pass of oneDNN."""

    def __init__(self, layer: ByParts, activation: str, numbers: list[float]) -> None:
        super().__init__()
        self.layer, self.activation, self.numbers = layer, activation, numbers
        self._parts: list[Part] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The activation of what the layer gives."""
        if not self._parts:
            parts = self.layer.parts()
            self._parts = [Part(_packed(kernel, pad, *ONCE), bias, pad) for kernel, bias, pad in parts]
        single = len(self._parts) - self.layer.summed
        maps = [
            _pointwise(x_BCHW, kernel, bias, pad, *ONCE, *((self.activation, self.numbers) if at < single else PLAIN))
            for at, (kernel, bias, pad) in enumerate(self._parts)
        ]
        return self.layer.put_together(maps, self._activated)

    def _activated(self, x_BCHW: Tensor) -> Tensor:
        if self.activation == "relu":
            return nn.functional.relu_(x_BCHW)
        return x_BCHW if self.activation == "none" else nn.functional.hardtanh_(x_BCHW, *self.numbers)


Place = tuple[int, ...]
ONCE: tuple[Place, Place, int] = ((1, 1), (1, 1), 1)
"""Stride, dilation and groups of the parts of a layer."""


def _packed(weight: Tensor, padding: Place, stride: Place, dilation: Place, groups: int) -> Tensor:
    """Weights as oneDNN likes them: always for maps of one size, as no answer may depend on which window came first."""
    if weight.is_meta:
        return weight
    size = [1, weight.shape[1] * groups, PACKED_FOR_PX, PACKED_FOR_PX]
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)
    return packed


def _pointwise(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Place,
    stride: Place,
    dilation: Place,
    groups: int,
    activation: str,
    numbers: list[float],
) -> Tensor:
    y_BCHW: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x_BCHW, weight, bias, padding, stride, dilation, groups, activation, numbers, ""
    )
    return y_BCHW


class _Tracer(torch.fx.Tracer):
    """Looks into all layers but those that double: ours are computed otherwise in eval mode, or are several calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.ConvTranspose2d | Bilinear) or super().is_leaf_module(m, module_qualified_name)


def _traced(network: Network) -> torch.fx.GraphModule:
    """The network as a graph of its layers."""
    # In training mode no layer asks what kind of tensor it is given, which a traced one could not tell.
    traced = torch.fx.GraphModule(network, _Tracer().trace(network.train()))
    network.eval()
    return traced
