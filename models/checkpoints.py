"""Published checkpoints (.pth): torchvision's ImageNet encoders and whole networks, fitted to the networks here.

The only place where a pickle is read, by torch.load(weights_only=True).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .networks import Network, network_name
from .weights import BundleError

NEVER_COUNTED = "num_batches_tracked"


def read_checkpoint(source: Path) -> dict[str, Tensor]:
    """A state dict out of a foreign pickle: a wrapping {'model': ...} and DataParallel's `module.` are taken off."""
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BundleError(f"{source}: cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BundleError(
            f"{source}: not a PyTorch state dict that can be loaded with weights only ({_first_line(error)})"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise BundleError(f"{source}: expected a state dict (names to tensors), found {type(loaded).__name__}")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def adopt_checkpoint(network: Network, state: Mapping[str, Tensor], source: Path) -> bool:
    """Give a network the values of a checkpoint; True if it held the encoder alone, so that the rest stays as it was.

    Of torchvision's files, heads and layers that the network has no use for are dropped by name, old keys renamed, and
    the first convolution adapted where the network has other than three bands. An absent `num_batches_tracked` is 0.
    Raises BundleError with the first differences if the keys or shapes do not fit.
    """
    groups = keys_by_tensor(network)
    encoder = {
        name for names, _ in groups if any(n.startswith(network.encoder_prefix) for n in names) for name in names
    }
    rest = {name: tensor for name, tensor in network.state_dict().items() if name not in encoder}
    if rest.keys() & state.keys():
        network.load_state_dict(fitted_state(network, _with_bands_of(network, state), source))
        return False
    if not network.published_encoder:
        raise BundleError(
            f"{source}: not the weights of {network_name(network)}, which has no ImageNet encoder; expected a"
            " checkpoint of the whole network, or `initialisation: lecun`"
        )
    used = {
        network.own_key(name): tensor for name, tensor in state.items() if not name.startswith(network.unused_prefixes)
    }
    # The network's own values stand in for what an encoder's file does not hold, so that everything else is strict.
    network.load_state_dict(fitted_state(network, rest | _with_bands_of(network, used), source))
    return True


def _with_bands_of(network: Network, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with its first convolution adapted to the network's bands."""
    adapted = dict(state)
    for names, own in keys_by_tensor(network):
        if network.first_layer in names:
            adapted |= {name: adapted_bands(state[name], own.shape[1]) for name in names if name in state}
    return adapted


def adapted_bands(weight: Tensor, bands: int) -> Tensor:
    """A first convolution's weight for another number of bands.

    For one band the sum over the old ones, which sees grey as the old convolution saw it in all of them; else the old
    ones repeated in order and rescaled by old / new, so that the sums stay of the same size.
    """
    old = weight.shape[1] if weight.ndim == 4 else bands
    if old == bands:
        return weight
    if bands == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(bands) % old] * (old / bands)


def keys_by_tensor(network: Network) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of the state dict once, with all the keys that it goes by."""
    groups: dict[int, tuple[tuple[str, ...], Tensor]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        names, _ = groups.get(id(tensor), ((), tensor))
        groups[id(tensor)] = (*names, name), tensor
    return list(groups.values())


def fitted_state(network: Network, state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The state with all keys that the network has, in its dtypes.

    Keys of one tensor stand in for each other and must be equal where several are given; an absent
    `num_batches_tracked` is 0. Anything else missing, unexpected or of another shape is a BundleError.
    """
    fitted: dict[str, Tensor] = {}
    missing: list[str] = []
    misfits: list[str] = []
    for names, own in keys_by_tensor(network):
        given = [name for name in names if name in state]
        if not given and names[0].endswith(NEVER_COUNTED):
            value = torch.zeros((), dtype=own.dtype)
        elif not given:
            missing.append(names[0])
            continue
        else:
            value = state[given[0]]
        if value.shape != own.shape:
            misfits.append(f"{given[0]} is {tuple(value.shape)}, expected {tuple(own.shape)}")
            continue
        for other in given[1:]:
            if not torch.equal(state[other], value):
                raise BundleError(f"{source}: {given[0]} and {other} are one tensor in the network, but differ")
        if not bool(value.isfinite().all()):
            raise BundleError(f"{source}: {names[0]} holds values that are not finite")
        fitted |= dict.fromkeys(names, value.to(own.dtype))
    unexpected = sorted(set(state) - set(network.state_dict()))
    counted = (("missing", missing), ("unexpected", unexpected), ("of another shape", misfits))
    faults = [f"{len(keys)} keys {what} ({_some(keys)})" for what, keys in counted if keys]
    if faults:
        raise BundleError(f"{source}: not the weights of {type(network).__name__}: {'; '.join(faults)}")
    return fitted


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:160]
