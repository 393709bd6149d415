"""Networks made ready to predict: BatchNorm and ReLU done together with convolutions, in fewer passes over memory."""

from __future__ import annotations

import copy
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

PACKED_FOR_PX = {torch.float32: 128, torch.bfloat16: 256}
"""Side of the maps that weights are laid out for; larger and smaller ones are convolved with the same layout.
In float32, with AVX2, those for 256 px are laid out anew each time that a map is not wide (512 channels: 0.1 s)."""


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
        network.set_submodule(source, _folded(conv, norm))
        network.set_submodule(target, nn.Identity().eval())


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    if not conv.weight.is_meta:
        return fuse_conv_bn_eval(conv, norm)
    # There is nothing to compute, and torch would import its compiler for it (1.5 s).
    folded = copy.deepcopy(conv)
    folded.bias = nn.Parameter(torch.empty(conv.out_channels, dtype=conv.weight.dtype, device="meta"))
    return folded


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


def fuse_convolutions(network: Network) -> nn.Module:
    """The same function of an image, in fewer passes: convolutions with their ReLU, of maps that are not concatenated.

    Weights are laid out for oneDNN once. For a network in eval mode on a CPU, in float32 or bfloat16; its weights are
    shared. Where torch has no oneDNN, and for a network of a user's own, it is the network itself.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch gives it no types
    if isinstance(network, OwnNetwork) or not has_onednn:
        return network
    traced = _traced(network)
    for node in [*traced.graph.nodes]:
        source = _convolution_before(node, traced)
        if source is not None:
            _fuse(source, ACTIVATIONS[type(traced.get_submodule(str(node.target)))], traced)
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    for node in [*traced.graph.nodes]:
        layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, ByParts) or (isinstance(layer, nn.Conv2d) and pads_with_zeros(layer)):
            _fuse(node, PLAIN, traced)
    traced.recompile()
    return traced.eval()


def _fuse(node: torch.fx.Node, activation: tuple[str, list[float]], traced: torch.fx.GraphModule) -> None:
    """Do a convolution, or what doubles, with an activation. A concatenation that it alone reads is not made."""
    layer: Any = traced.get_submodule(str(node.target))
    doubles = isinstance(layer, ByParts)
    (source,) = node.all_input_nodes
    if not doubles and layer.groups == 1 and _concatenates(source) and len(source.users) == 1:
        node.args = tuple(source.all_input_nodes)
        traced.graph.erase_node(source)
    node.target = f"fused_{node.name}"
    traced.add_submodule(node.target, (FusedParts if doubles else Fused)(layer, *activation))


def _concatenates(node: torch.fx.Node) -> bool:
    """Whether it concatenates maps, each one once, along their channels."""
    several = len(node.all_input_nodes) > 1
    return several and node.target is torch.cat and node.args == (node.all_input_nodes, 1) and not node.kwargs


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
    """A convolution and an activation in oneDNN's passes. Of several maps, as if they were concatenated.

    Each of these is convolved apart, and added to those before in the same pass, so the concatenation is never made.
    """

    def __init__(self, conv: nn.Conv2d, activation: str, numbers: list[float]) -> None:
        super().__init__()
        self.conv, self.activation, self.numbers = conv, activation, numbers
        self._packed: list[Tensor] = []

    def forward(self, *maps: Tensor) -> Tensor:
        """The activation of the convolution. maps: (B, C, H, W), each with its own C."""
        it: Any = self.conv
        place = (it.padding, it.stride, it.dilation, it.groups)
        if not self._packed:
            kernels = it.weight.split([x_BCHW.shape[1] for x_BCHW in maps], dim=1) if len(maps) > 1 else [it.weight]
            self._packed = [_packed(kernel, *place) for kernel in kernels]
        activation = (self.activation, self.numbers)
        (first_BCHW, first), *rest = zip(maps, self._packed, strict=True)
        y_BCHW = _pointwise(first_BCHW, first, it.bias, *place, *(PLAIN if rest else activation))
        for number, (x_BCHW, kernel) in enumerate(rest, 1):
            _add_pointwise(y_BCHW, x_BCHW, kernel, *place, *(PLAIN if number < len(rest) else activation))
        return y_BCHW


class FusedParts(nn.Module):
    """A layer that doubles height and width, each of its convolutions with its activation in one pass of oneDNN."""

    def __init__(self, layer: ByParts, activation: str, numbers: list[float]) -> None:
        super().__init__()
        self.layer, self.activation, self.numbers = layer, activation, numbers
        self._parts: list[Part] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The activation of what the layer gives."""
        if not self._parts:
            for kernel, bias, padding, below in self.layer.parts():
                packed = None if below is None else _packed(below, padding, *ONCE)
                self._parts.append(Part(_packed(kernel, padding, *ONCE), bias, padding, packed))
        return self.layer.put_together([self._map(x_BCHW, part) for part in self._parts])

    def _map(self, x_BCHW: Tensor, part: Part) -> Tensor:
        activation = (self.activation, self.numbers)
        place = (part.padding, *ONCE)
        if part.below is None:
            return _pointwise(x_BCHW, part.kernel, part.bias, *place, *activation)
        y_BCHW = _pointwise(x_BCHW, part.kernel, part.bias, *place, *PLAIN)
        _add_pointwise(y_BCHW[:, :, :-1], x_BCHW[:, :, 1:], part.below, *place, *activation)
        _activate(y_BCHW[:, :, -1:], *activation)
        return y_BCHW


Place = tuple[int, ...]
ONCE: tuple[Place, Place, int] = ((1, 1), (1, 1), 1)
"""Stride, dilation and groups of the parts of a layer."""


def _packed(weight: Tensor, padding: Place, stride: Place, dilation: Place, groups: int) -> Tensor:
    """Weights as oneDNN likes them: always for maps of one size, as no answer may depend on which window came first.

    In the type that it computes in, which is float32 for bfloat16 on a CPU that it has no bfloat16 for (AVX2).
    """
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        weight = weight.float()
    if weight.is_meta:
        return weight
    side = PACKED_FOR_PX[weight.dtype]
    size = [1, weight.shape[1] * groups, side, side]
    weight = weight.contiguous(memory_format=torch.channels_last)
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
    """The activation of a convolution with packed weights, rounded to the type of x_BCHW."""
    bias = bias if bias is None else bias.to(weight.dtype)
    y_BCHW: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x_BCHW.to(weight.dtype), weight, bias, padding, stride, dilation, groups, activation, numbers, ""
    )
    return y_BCHW.to(x_BCHW.dtype)


def _add_pointwise(
    y_BCHW: Tensor,
    x_BCHW: Tensor,
    weight: Tensor,
    padding: Place,
    stride: Place,
    dilation: Place,
    groups: int,
    activation: str,
    numbers: list[float],
) -> None:
    """The same, added to y_BCHW before the activation."""
    if y_BCHW.is_meta or not y_BCHW.numel():
        return
    # After a sum it knows ReLU alone.
    fused = "relu" if activation == "relu" else None
    sum_BCHW = y_BCHW.to(weight.dtype)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        sum_BCHW, x_BCHW.to(weight.dtype), weight, None, padding, stride, dilation, groups, "add", 1.0, fused, [], ""
    )
    if sum_BCHW is not y_BCHW:
        y_BCHW.copy_(sum_BCHW)
    if fused is None:
        _activate(y_BCHW, activation, numbers)


def _activate(y_BCHW: Tensor, activation: str, numbers: list[float]) -> None:
    if activation == "relu":
        nn.functional.relu_(y_BCHW)
    elif activation == "hardtanh":
        nn.functional.hardtanh_(y_BCHW, *numbers)


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
