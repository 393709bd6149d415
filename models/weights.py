"""Model bundles: one .safetensors file that holds a network's weights and, as JSON in its header, its card.

Reading a card needs no torch: a run that finds everything done never imports it. Pickles are never loaded, except by
`import_checkpoint` and `load_encoder` for published files, and then by torch.load(weights_only=True).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator
from pydantic import Field as Bounded

if TYPE_CHECKING:
    import torch

    from .networks import Network

METADATA_KEY = "segpipe"
SUFFIX = ".safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""

Positive = Annotated[float, Bounded(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Bounded(allow_inf_nan=False)]
Pixels = Annotated[int, Bounded(ge=0)]
Side = Annotated[int, Bounded(ge=1)]


class BundleError(ValueError):
    """A file is not the bundle or checkpoint that was expected, or no bundle has that name. One line, with the path."""


@dataclass(frozen=True)
class Reach:
    """How many pixels beyond itself one output pixel sees on each side."""

    up: Pixels
    down: Pixels
    left: Pixels
    right: Pixels


class Card(BaseModel):
    """What must be known to use a bundle's weights, and where they come from.

    A pixel x of the given dtype reaches the network as (x * scale - mean) / std, and as `fill` where it is invalid.
    Lengths in pixels, resolutions in metres a pixel on the ground. module: `package.module:name` of a user's own
    network, which is then its architecture too. temperature: logits are divided by it before the sigmoid. resize_px:
    height and width that whole images were resized to in training. halo_px and receptive_field_px are None where the
    network's field has no bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    architecture: str
    arguments: dict[str, JsonValue]
    module: str | None = None
    bands: Annotated[tuple[str, ...], Bounded(min_length=1)]
    dtype: Literal["uint8"] = "uint8"
    scale: Positive = 1 / 255
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    fill: Finite = 0.0
    classes: Annotated[tuple[str, ...], Bounded(min_length=1)] = ("building",)
    threshold: Annotated[float, Bounded(gt=0, lt=1)] = 0.5
    temperature: Positive = 1.0
    resize_px: tuple[Side, Side] | None = None
    stride: Annotated[int, Bounded(ge=1)]
    halo_px: Pixels | None
    receptive_field_px: Reach | None
    effective_halo_px: Pixels | None = None
    resolution_m: Positive
    resolution_range_m: tuple[Positive, Positive]
    training_data: tuple[str, ...] = ()
    metrics: dict[str, JsonValue] = {}
    licence: str = "not stated"
    weights_dtype: Literal["float16", "float32"] = "float32"

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if not len(self.mean) == len(self.std) == len(self.bands):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations for {len(self.bands)} bands")
        low, high = self.resolution_range_m
        if not low <= self.resolution_m <= high:
            raise ValueError(f"resolution_m {self.resolution_m} outside resolution_range_m {low} to {high}")
        if self.module is not None and self.module != self.architecture:
            raise ValueError(f"module {self.module!r} of an architecture {self.architecture!r}")
        if (self.halo_px is None) != (self.receptive_field_px is None):
            raise ValueError("halo_px and receptive_field_px: expected both or neither")
        return self


@dataclass(frozen=True)
class Bundle:
    """A network in eval mode with float32 weights on the CPU, and its card."""

    network: Network
    card: Card


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def packaged_bundles() -> list[Path]:
    """The bundles that are installed with the package, by name."""
    return sorted(Path(__file__).parent.glob(f"*{SUFFIX}"))


def resolve_bundle(name_or_path: str, base_dir: Path) -> Path:
    """The bundle at a path relative to base_dir or, if no file is there, the packaged one of that name.

    Raises BundleError that names the path tried and the names known.
    """
    try:
        path = base_dir / Path(name_or_path).expanduser()
    except RuntimeError:
        raise BundleError(f"model {name_or_path!r}: names a home folder that is not there") from None
    if path.is_file():
        return path
    named = {bundle.stem: bundle for bundle in packaged_bundles()}
    if name_or_path in named:
        return named[name_or_path]
    known = ", ".join(named) or "none is installed"
    raise BundleError(f"model {name_or_path!r}: no file {path}, and no bundle of that name (known: {known})")


def read_card(path: Path) -> Card:
    """The card of a bundle, without loading weights or importing torch.

    Raises BundleError if the file is not a whole safetensors file with a valid card.
    """
    metadata = _read_header(path).get("__metadata__", {})
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if text is None:
        raise BundleError(f"{path}: a safetensors file, but no model bundle: no {METADATA_KEY!r} in its metadata")
    try:
        return Card.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "card"
        raise BundleError(f"{path}: its card is wrong: {key}: {first['msg']}") from error


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of length, little-endian, and the JSON; then the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if len(start) == 8 and length <= min(LONGEST_HEADER, size - 8) else b""
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise BundleError(
            f"{path}: a PyTorch checkpoint or other pickle, which is never loaded as a bundle: "
            "make one of it with `segpipe models import`"
        )
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise BundleError(f"{path}: not a model bundle (a .safetensors file), or cut short in its header") from error
    if size != expected:
        raise BundleError(f"{path}: {size} bytes, but its header speaks of {expected}: the file is not whole")
    return dict(header)


def save_bundle(path: Path, network: Network, card: Card, half: bool = False) -> Card:
    """Write a network and its card to one file, beside and renamed into place, and return the card as written.

    half: parameters are stored in float16, except those that would overflow; BatchNorm's statistics stay float32,
    since variances span more than float16 holds. A tensor that has several keys is stored under the first.
    """
    import safetensors.torch
    import torch

    from .networks import NETWORKS

    if type(network) is not NETWORKS.get(card.architecture):
        raise ValueError(f"card of {card.architecture!r} for a network of class {type(network).__name__}")
    card = card.model_copy(update={"weights_dtype": "float16" if half else "float32"})
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    tensors: dict[str, torch.Tensor] = {}
    for names, tensor in _keys_by_tensor(network):
        stored = tensor.detach().cpu().contiguous()
        if stored.is_floating_point():
            halved = stored.to(torch.float16)
            stored = halved if half and names[0] in parameters and bool(halved.isfinite().all()) else stored.float()
        tensors[names[0]] = stored
    # One metadata key only: with more, their order in the file and so its digest would vary.
    data = safetensors.torch.save(tensors, {METADATA_KEY: card.model_dump_json()})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return card


def load_bundle(path: Path | str) -> Bundle:
    """The network of a bundle, in eval mode and float32, with its card.

    Raises BundleError if the file is no bundle, its architecture is unknown, or its weights do not fit.
    """
    import safetensors.torch
    import torch

    from .networks import build_network

    path = Path(path)
    card = read_card(path)
    try:
        # On the meta device nothing is initialised, so the random state of the process is left as it was.
        with torch.device("meta"):
            network = build_network(card.architecture, **card.arguments)
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error
    try:
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not a whole safetensors file: {error}") from error
    # Channels-last weights make every pass channels-last, however the image lies in memory: the same sums everywhere.
    fitted = {
        name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in _fitted_state(network, state, path).items()
    }
    network.load_state_dict(fitted, assign=True)
    network.eval().requires_grad_(requires_grad=False)
    return Bundle(network, card)


def import_checkpoint(
    source: Path,
    destination: Path,
    architecture: str,
    resolution_m: float = 0.3,
    resolution_range_m: tuple[float, float] = (0.2, 0.5),
    threshold: float = 0.5,
    licence: str = "not stated",
    seed: int = 0,
) -> Card:
    """Make a bundle of a published checkpoint, and return its card.

    source: torchvision's ImageNet file of the network's encoder, which leaves the decoder freshly initialised from
    the seed and in need of training; or a checkpoint of the whole network (TernausNet's). Both were trained with
    torchvision's ImageNet normalisation, which goes into the card. Raises BundleError if the keys do not fit.
    """
    import torch

    from .field import probe_field
    from .networks import build_network

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = build_network(architecture)
        except ValueError as error:
            raise BundleError(str(error)) from error
    state = _load_checkpoint(source)
    if _is_encoder(state):
        _adopt_encoder(network, state, source)
        origin = f"encoder from {source.name}; decoder untrained, initialised with seed {seed}"
    else:
        network.load_state_dict(_fitted_state(network, state, source))
        origin = f"the whole network from {source.name}"
    field = probe_field(network, network.stride, bands=3)
    card = Card(
        architecture=architecture,
        arguments={"bands": 3, "classes": 1},
        bands=("red", "green", "blue"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        threshold=threshold,
        stride=network.stride,
        halo_px=field.halo_px,
        receptive_field_px=field.receptive_field_px,
        resolution_m=resolution_m,
        resolution_range_m=resolution_range_m,
        training_data=(origin,),
        licence=licence,
    )
    return save_bundle(destination, network, card)


def load_encoder(network: Network, source: Path) -> None:
    """Give a network's encoder the weights of torchvision's ImageNet file; the rest of the network stays as it is.

    Raises BundleError if the file is not the one of this encoder.
    """
    state = _load_checkpoint(source)
    if not _is_encoder(state):
        raise BundleError(f"{source}: not an ImageNet encoder in torchvision's layout: no keys `features.*`, or others")
    _adopt_encoder(network, state, source)


def _load_checkpoint(source: Path) -> dict[str, torch.Tensor]:
    """A state dict out of a foreign pickle: a wrapping {'model': ...} and DataParallel's `module.` are taken off."""
    import torch

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
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise BundleError(f"{source}: expected a state dict (names to tensors), found {type(loaded).__name__}")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:160]


def _is_encoder(state: Mapping[str, torch.Tensor]) -> bool:
    return all(name.startswith(("features.", "classifier.")) for name in state)


def _adopt_encoder(network: Network, state: Mapping[str, torch.Tensor], source: Path) -> None:
    used = {
        network.encoder_prefix + name.removeprefix("features."): tensor
        for name, tensor in state.items()
        if not name.startswith(network.unused_prefixes)
    }
    # The decoder's own values stand in for what the file does not hold, so that everything else is strict.
    encoder = {name for names, _ in _keys_by_tensor(network) if _in_encoder(network, names) for name in names}
    own = {name: tensor for name, tensor in network.state_dict().items() if name not in encoder}
    network.load_state_dict(_fitted_state(network, own | used, source))


def _in_encoder(network: Network, names: tuple[str, ...]) -> bool:
    return any(name.startswith(network.encoder_prefix) for name in names)


def _keys_by_tensor(network: Network) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """Every tensor of the state dict once, with all the keys that it goes by."""
    groups: dict[int, tuple[tuple[str, ...], torch.Tensor]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        names, _ = groups.get(id(tensor), ((), tensor))
        groups[id(tensor)] = (*names, name), tensor
    return list(groups.values())


def _fitted_state(network: Network, state: Mapping[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """The state with all keys that the network has, in its dtypes.

    Keys of one tensor stand in for each other and must be equal where several are given; an absent
    `num_batches_tracked` is 0. Anything else missing, unexpected or of another shape is a BundleError.
    """
    import torch

    fitted: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    misfits: list[str] = []
    for names, own in _keys_by_tensor(network):
        given = [name for name in names if name in state]
        if not given and names[0].endswith("num_batches_tracked"):
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
