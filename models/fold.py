"""BatchNorm folded into convolutions: fewer passes over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .networks import Network, OwnNetwork


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
    # In training mode no layer asks what kind of tensor it is given, which a traced one could not tell.
    graph = torch.fx.symbolic_trace(network.train()).graph
    network.eval()
    nodes = [node for node in graph.nodes if node.op == "call_module"]
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
