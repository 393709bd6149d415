"""Model bundles: one .safetensors file that holds a network's weights and, as JSON in its header, its card.

Reading a card needs no torch: a run that finds everything done never imports it. Pickles are never loaded here:
`checkpoints` reads published ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator
from pydantic import Field as Bounded

from .own_code import is_own

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from .networks import Network
    from .predictor import Predictor

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
        if self.module != (self.architecture if is_own(self.architecture) else None):
            raise ValueError(f"module {self.module!r} for the architecture {self.architecture!r}")
        if (self.halo_px is None) != (self.receptive_field_px is None):
            raise ValueError("halo_px and receptive_field_px: expected both or neither")
        return self

    def is_exact(self, halo_px: int) -> bool:
        """Whether with this halo what is predicted does not depend on how it was cut into blocks."""
        return self.halo_px is not None and halo_px >= self.halo_px


@dataclass(frozen=True)
class Bundle:
    """A network in eval mode with float32 weights on the CPU, and its card."""

    network: Network
    card: Card

    def predict(self, image_HWC: NDArray[np.uint8], valid_HW: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Probabilities of an image of any size, prob_HW from 0 to 1; NaN where it is said to be invalid.

        In float32, on the GPU if there is one; the same as `run` gives. Bands as in the card. Raises ValueError for
        another number of bands or another dtype.
        """
        return self._predictor.predict_image(image_HWC, valid_HW)

    @cached_property
    def _predictor(self) -> Predictor:
        import copy

        import torch

        from .predictor import Predictor, resolve_device

        # A copy: a predictor moves its network to its device.
        own = Bundle(copy.deepcopy(self.network), self.card)
        return Predictor(own, resolve_device(), "float32", torch.get_num_threads())


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def cache_folder() -> Path:
    """Where what was downloaded is kept: SEGPIPE_CACHE, else ~/.cache/segpipe."""
    return Path(os.environ.get("SEGPIPE_CACHE") or Path.home() / ".cache" / "segpipe")


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

    from .checkpoints import keys_by_tensor
    from .networks import network_name

    if network_name(network) != card.architecture:
        raise ValueError(f"card of {card.architecture!r} for a network of class {type(network).__name__}")
    if is_own(card.architecture) != (card.module is not None):
        raise ValueError(f"card of {card.architecture!r} with module {card.module!r}")
    card = card.model_copy(update={"weights_dtype": "float16" if half else "float32"})
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    tensors: dict[str, torch.Tensor] = {}
    for names, tensor in keys_by_tensor(network):
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


def load_bundle(path: Path | str, allowed_module: str | None = None) -> Bundle:
    """The network of a bundle, in eval mode and float32, with its card.

    allowed_module: `package.module:name` of the user's own network that may be imported and run; a bundle never says
    so itself. Raises BundleError if the file is no bundle, its architecture is unknown or not allowed, or its weights
    do not fit.
    """
    import safetensors.torch
    import torch

    from .checkpoints import fitted_state

    path = Path(path)
    card = read_card(path)
    check_module(path, card, allowed_module)
    try:
        network = blank_network(card)
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error
    try:
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not a whole safetensors file: {error}") from error
    # Channels-last weights make every pass channels-last, however the image lies in memory: the same sums everywhere.
    fitted = {
        name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in fitted_state(network, state, path).items()
    }
    network.load_state_dict(fitted, assign=True)
    network.eval().requires_grad_(requires_grad=False)
    return Bundle(network, card)


def check_module(path: Path, card: Card, allowed_module: str | None) -> None:
    """BundleError if a bundle's network is a user's own and not the allowed one: no file decides what code runs."""
    if card.module is not None and card.module != allowed_module:
        instead = "" if allowed_module is None else f", not of {allowed_module}"
        raise BundleError(
            f"{path}: weights of the network {card.module}{instead}, whose code the bundle does not hold; if you have"
            f" and trust that code, say so in the YAML: `module: {card.module}`"
        )


def blank_network(card: Card) -> Network:
    """The network of a card without its weights, the random state of the process left as it was.

    A user's own network is imported and built: `check_module` comes first. Raises ValueError if it cannot be built.
    """
    import torch

    from .networks import build_network

    # On the meta device nothing is initialised. A user's own network may compute when it is built.
    device = torch.device("meta" if card.module is None else "cpu")
    with torch.random.fork_rng(devices=[]), device:
        return build_network(card.architecture, **card.arguments)


def probed_card(network: Network, architecture: str, arguments: dict[str, JsonValue], **told: Any) -> Card:
    """The card of a network of red, green and blue with ImageNet's normalisation, its field probed.

    told: what else the card says; it must say resolution_m and resolution_range_m.
    """
    from .field import probe_field

    field = probe_field(network, network.stride, bands=3)
    return Card(
        architecture=architecture,
        arguments=arguments,
        bands=("red", "green", "blue"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        stride=network.stride,
        halo_px=field.halo_px,
        receptive_field_px=field.receptive_field_px,
        **told,
    )


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

    from .checkpoints import adopt_checkpoint, read_checkpoint
    from .networks import NETWORKS, build_network

    if architecture not in NETWORKS:
        raise BundleError(f"network {architecture!r} is not known: expected one of {', '.join(sorted(NETWORKS))}")
    state = read_checkpoint(source)
    arguments: dict[str, JsonValue] = {"bands": 3, "classes": 1, **NETWORKS[architecture].arguments_of(state)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(architecture, **arguments)
    origin = f"the whole network from {source.name}"
    if adopt_checkpoint(network, state, source):
        origin = f"encoder from {source.name}; decoder untrained, initialised with seed {seed}"
    card = probed_card(
        network,
        architecture,
        arguments,
        threshold=threshold,
        resolution_m=resolution_m,
        resolution_range_m=resolution_range_m,
        training_data=(origin,),
        licence=licence,
    )
    return save_bundle(destination, network, card)
