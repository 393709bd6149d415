"""A user's own network, named as `package.module:name`.

What is named is called with the arguments and gives a torch module: image_BCHW in, logits_BKHW of the same H and W out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from segpipe.models.own_code import import_own, in_one_line

from .network import Network

USUAL_STRIDE = 32


class OwnNetwork(Network):
    """Holds a user's module, and asks it for what a Network says of itself.

    Of its attributes, `stride` counts (32 if it has none) and `encoder_prefix` (`encoder.` if none).
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.own = module
        stride = getattr(module, "stride", None)
        self.stride = stride if isinstance(stride, int) else USUAL_STRIDE
        prefix = getattr(module, "encoder_prefix", Network.encoder_prefix)
        prefixes = (prefix,) if isinstance(prefix, str) else prefix
        self.encoder_prefix = tuple(f"own.{prefix}" for prefix in prefixes)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """What the user's module makes of a normalised image; H and W multiples of its stride."""
        logits_BKHW: Tensor = self.own(image_BCHW)
        return logits_BKHW


def build_own(name: str, arguments: dict[str, Any]) -> OwnNetwork:
    """Import and call what is named; `bands` and `classes` are given only if its signature has them.

    Raises ValueError, in one line, if it cannot be imported, called, or gives no torch module.
    """
    build = _imported(name)
    try:
        known = set(inspect.signature(build).parameters)
    except (TypeError, ValueError):  # a class written in C says nothing of its arguments
        known = set()
    given = {key: value for key, value in arguments.items() if key not in ("bands", "classes") or key in known}
    try:
        module = build(**given)
    except Exception as error:
        raise ValueError(f"network {name!r} cannot be built from {given}: {in_one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"network {name!r} gave {type(module).__name__}; expected a torch.nn.Module")
    return OwnNetwork(name, module)


def _imported(name: str) -> Callable[..., object]:
    try:
        found = import_own(name)
    except ImportError as error:
        raise ValueError(
            f"network {name!r}: {error}; expected package.module:name of a class or function that is installed, or on"
            " PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"network {name!r} is a {type(found).__name__}; expected a class or function")
    return found
