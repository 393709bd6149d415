"""The networks by name, one file a family. A new network is one more entry here."""

from __future__ import annotations

from typing import Any

from .network import Network
from .unet11 import UNet11
from .unet_mobilenetv2 import UNetMobileNetV2

__all__ = ["NETWORKS", "Network", "build_network"]

NETWORKS: dict[str, type[Network]] = {
    "unet11": UNet11,
    "unet-mobilenetv2": UNetMobileNetV2,
}


def build_network(name: str, **arguments: Any) -> Network:
    """A freshly initialised network; arguments are its class's (`bands`, `classes`).

    Raises ValueError naming the known networks, or the arguments that the network does not take.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is not known: expected one of {', '.join(sorted(NETWORKS))}")
    try:
        return NETWORKS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"network {name!r} cannot be built from {arguments}: {error}") from error
