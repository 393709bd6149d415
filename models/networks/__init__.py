"""The networks by name, one file a family. A new network is one more entry here."""

from __future__ import annotations

from typing import Any

from segpipe.models.own_code import is_own

from .network import Network
from .own import OwnNetwork, build_own
from .unet import UNet, UNetSmall, UNetValid, UNetVGG16
from .unet11 import UNet11
from .unet16 import UNet16
from .unet_densenet121 import UNetDenseNet121
from .unet_mobilenetv2 import UNetMobileNetV2
from .unet_resnet import UNetResNet18, UNetResNet34, UNetResNet50, UNetResNet101, UNetResNet152

__all__ = ["NETWORKS", "Network", "OwnNetwork", "build_network", "network_name"]

NETWORKS: dict[str, type[Network]] = {
    "unet11": UNet11,
    "unet16": UNet16,
    "unet": UNet,
    "unet-vgg16": UNetVGG16,
    "unet-resnet18": UNetResNet18,
    "unet-resnet34": UNetResNet34,
    "unet-resnet50": UNetResNet50,
    "unet-resnet101": UNetResNet101,
    "unet-resnet152": UNetResNet152,
    "unet-densenet121": UNetDenseNet121,
    "unet-mobilenetv2": UNetMobileNetV2,
    "unet-valid": UNetValid,
    "unet-small": UNetSmall,
}


def build_network(name: str, **arguments: Any) -> Network:
    """A freshly initialised network; arguments are its class's (`bands`, `classes`, and some have more).

    name: one of NETWORKS, or `package.module:name`, which imports and runs that module. Raises ValueError naming the
    known networks, or the arguments that the network does not take.
    """
    if is_own(name):
        return build_own(name, arguments)
    if name not in NETWORKS:
        raise ValueError(
            f"network {name!r} is not known: expected package.module:name, or one of {', '.join(sorted(NETWORKS))}"
        )
    try:
        return NETWORKS[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"network {name!r} cannot be built from {arguments}: {error}") from error


def network_name(network: Network) -> str:
    """The name that build_network knows a network by."""
    if isinstance(network, OwnNetwork):
        return network.name
    return next(name for name, kind in NETWORKS.items() if type(network) is kind)
