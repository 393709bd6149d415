"""A network's first weights: random by a rule, a published encoder, or another network's."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .checkpoints import adopt_checkpoint, fitted_state, read_checkpoint
from .networks import Network, OwnNetwork, network_name
from .weights import SUFFIX, BundleError, cache_folder, load_bundle, packaged_bundles

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Published:
    """A published file. sha256: all 64 digits, or as many first ones as its publisher gives in its name."""

    url: str
    sha256: str

    @property
    def file_name(self) -> str:
        """What it is called where it comes from."""
        return self.url.rpartition("/")[2]


_TORCH = "https://download.pytorch.org/models/"
PUBLISHED = {
    "vgg11-imagenet": Published(_TORCH + "vgg11-8a719046.pth", "8a719046"),
    "vgg16-imagenet": Published(
        _TORCH + "vgg16-397923af.pth", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
    ),
    "resnet18-imagenet": Published(
        _TORCH + "resnet18-f37072fd.pth", "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"
    ),
    "resnet34-imagenet": Published(
        _TORCH + "resnet34-b627a593.pth", "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f"
    ),
    "resnet50-imagenet": Published(
        _TORCH + "resnet50-0676ba61.pth", "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"
    ),
    "resnet101-imagenet": Published(
        _TORCH + "resnet101-63fe2227.pth", "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a"
    ),
    "resnet152-imagenet": Published(
        _TORCH + "resnet152-394f9c45.pth", "394f9c45966e3651a89bbb78a48410a6755854ce4a5ab64927cf1c7247f85e58"
    ),
    "densenet121-imagenet": Published(
        _TORCH + "densenet121-a639ec97.pth", "a639ec97d7c33b07ae66f0b5fb7d0192f95a3b11b7576c66c0126c2a727c4395"
    ),
    "mobilenet_v2-imagenet": Published(
        _TORCH + "mobilenet_v2-b0353104.pth", "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
    ),
}
"""Torchvision's ImageNet files (its first ones, IMAGENET1K_V1, which the papers used), by name."""


def initialise(
    network: Network,
    start: str,
    normalisation_mean: Sequence[float],
    normalisation_std: Sequence[float],
    base: Path,
    seed: int,
) -> None:
    """Give a network its first weights; the same for the same seed, whatever it held before.

    start: `lecun`; `default`, PyTorch's own rule, or what the constructor of a user's own network has made; a file
    relative to base, of an encoder or of a whole network (.pth), or a bundle (.safetensors); the name of a bundle in
    the package, or one of PUBLISHED. What an encoder's file does not hold is as `default`. The normalisation, of
    pixels from 0 to 1, is what the network is going to be trained with: a bundle trained with another one is refused.
    Raises BundleError in one line, with the names known or the keys that differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not isinstance(network, OwnNetwork):
            reset(network)
        if start == "lecun":
            lecun_uniform(network)
            return
    if start == "default":
        return
    path = _find(start, base)
    if path.suffix == SUFFIX:
        _adopt_bundle(network, path, normalisation_mean, normalisation_std)
    else:
        adopt_checkpoint(network, read_checkpoint(path), path)


def reset(network: nn.Module) -> None:
    """PyTorch's own initialisation of every layer, by the global random state."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            layer.reset_parameters()


def lecun_uniform(network: nn.Module) -> None:
    """U(-sqrt(1 / f), sqrt(1 / f)) for weights and biases of every convolution, f being the inputs of an output.

    The random arm of TernausNet's figure 3 (Iglovikov and Shvets, arXiv 1801.05746). A third of the variance of LeCun's
    own rule (Efficient BackProp, 1998, equation 16). An output of a transposed convolution is made of 1 / stride of the
    kernel along each axis.
    """
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            inputs = layer.weight[:, 0].numel() / math.prod(layer.stride)
        elif isinstance(layer, nn.Conv2d):
            inputs = layer.weight[0].numel()
        else:
            continue
        bound = math.sqrt(1 / inputs)
        nn.init.uniform_(layer.weight, -bound, bound)
        if layer.bias is not None:
            nn.init.uniform_(layer.bias, -bound, bound)


def fetch(name: str) -> Path:
    """The file of a published name, downloaded if the cache does not have it.

    Raises BundleError that says which file to put where if it cannot be downloaded or is another.
    """
    published = PUBLISHED[name]
    path = cache_folder() / published.file_name
    if path.is_file():
        _check_digest(path, published, name)
        return path
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(published.url, timeout=TIMEOUT_S) as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file)
        _check_digest(partial, published, name)
        partial.replace(path)
    except OSError as error:
        raise BundleError(
            f"{name}: cannot be downloaded from {published.url} ({getattr(error, 'reason', None) or error}); put that"
            f" file at {path}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _check_digest(path: Path, published: Published, name: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(published.sha256):
        raise BundleError(
            f"{name}: {path} has SHA-256 {found}; expected {published.sha256}; it is not the file of {published.url}"
        )


def _find(start: str, base: Path) -> Path:
    try:
        path = base / Path(start).expanduser()
    except RuntimeError:
        raise BundleError(f"initialisation {start!r}: names a home folder that is not there") from None
    if path.is_file():
        return path
    packaged = {bundle.stem: bundle for bundle in packaged_bundles()}
    if start in packaged:
        return packaged[start]
    if start in PUBLISHED:
        return fetch(start)
    known = ", ".join(("lecun", "default", *packaged, *PUBLISHED))
    raise BundleError(f"initialisation {start!r}: no file {path}, and no such name (known: {known})")


def _adopt_bundle(network: Network, path: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    own = network_name(network)
    bundle = load_bundle(path, allowed_module=own)
    card = bundle.card
    if card.architecture != own:
        raise BundleError(f"{path}: a bundle of {card.architecture}; expected one of {own}")
    # (x * scale - mean) / std of 8-bit x, as (x / 255 - mean') / std'.
    in_units = 1 / (255 * card.scale)
    theirs = [value * in_units for value in (*card.mean, *card.std)]
    ours = [*mean, *std]
    if len(theirs) != len(ours) or not all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7) for a, b in zip(theirs, ours, strict=True)
    ):
        raise BundleError(
            f"{path}: trained with the normalisation mean {list(card.mean)}, std {list(card.std)}; expected mean"
            f" {list(mean)}, std {list(std)}, with which it is to be trained; cure: the same `normalisation`"
        )
    network.load_state_dict(fitted_state(network, bundle.network.state_dict(), path))
