"""A network on a device: uint8 pixels in, uint8 probabilities out, by a recipe.

Axes: B batch, C band, K class, H row, W column.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor, nn

from .fold import fold_batchnorm, fuse_convolutions
from .networks import Network
from .strips import Core, Kept, Strips, in_strips, whole_of
from .weights import Bundle, Card

Precision = Literal["float32", "bfloat16"]

FULL_U8 = 250
"""The stored value of probability 1."""
INVALID_U8 = 255
LEAST_STRIDES = 16
"""Smallest side of what the network is given, in strides: smaller windows are padded with fill.

On a map less than 16 columns wide oneDNN's convolutions add up in another order than on wider ones (tried on AVX512,
float32, 1 and 2 threads), so the last bit of a pixel would depend on the size of its window.
"""
ROWS = 256
"""Of a window at once that are in float32 on a CPU: the whole of it would take more memory than most maps of the
network, and memory that a thread has not had before costs more than what is done in it."""
CORE_PX = 1024
"""Images are predicted in cores of this size, rounded up to whole strides."""
D4 = tuple((turns, flipped) for flipped in (False, True) for turns in range(4))
"""The eight ways to lay a square onto itself: quarter turns, and whether it is flipped after them."""


def halo_of(card: Card) -> int:
    """The halo to predict with where no plan says so: the exact one, else what was measured in training.

    Raises ValueError for a network whose field has no bound and was not measured.
    """
    halo_px = card.effective_halo_px if card.halo_px is None else card.halo_px
    if halo_px is None:
        raise ValueError(f"the field of {card.architecture} has no bound, and no effective halo was measured")
    return -(-halo_px // card.stride) * card.stride


def resolve_device() -> torch.device:
    """The GPU that this process sees first, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_recipe(device: torch.device) -> dict[str, str]:
    """What numbers depend on besides precision and threads: the kind of device, and the version of torch."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        kind = f"cuda sm_{major}{minor}"
    else:
        extra = "+amx" if torch.cpu._is_amx_tile_supported() else "+bf16" if _has_avx512_bf16() else ""
        kind = f"cpu {torch.backends.cpu.get_cpu_capability()}{extra}"
    return {"device": kind, "torch": torch.__version__}


def fast_bfloat16(device: torch.device) -> bool:
    """True where a device multiplies in bfloat16: compute capability 8 and later; AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported()) or _has_avx512_bf16()


def is_fast_in_bfloat16(kind: str) -> bool:
    """The same of a device that another machine has, by its name in a recipe."""
    family, _, architecture = kind.partition(" ")
    return int(architecture.removeprefix("sm_")) >= 80 if family == "cuda" else architecture.endswith(("+amx", "+bf16"))


def _has_avx512_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def made_ready(network: Network, device: str, largest_px: int = 0) -> nn.Module:
    """What runs in place of a network in eval mode, on a `cpu` or on `cuda`: the same function, with the same weights.

    BatchNorm is folded, in place; on a CPU each ReLU is done with its convolution, and the finest maps in strips.
    largest_px: pixels of the largest image that is to come, if that is known.
    """
    fold_batchnorm(network)
    return in_strips(fuse_convolutions(network), largest_px) if device == "cpu" else network


@dataclass(frozen=True)
class Uploaded:
    """A window on its device: image_BCHW in uint8, invalid_HW, and its core."""

    image_BCHW: Tensor
    invalid_HW: Tensor
    core: Core


def input_side(network: Network, stride: int, length: int, least_px: int | None = None) -> int:
    """How long a side of a network's input is for a window's.

    Up to the next multiple of the stride, and so many strides at least that the coarsest map is wide enough. A network
    with a remainder is given one stride less, and its remainder.
    """
    least = LEAST_STRIDES * stride + 2 * network.border_px if least_px is None else least_px
    whole = -(-max(length, least) // stride) * stride
    return whole - (stride - network.remainder_px if network.remainder_px else 0)


class Predictor:
    """Holds a bundle's network on a device, in one precision, with a number of threads on a CPU.

    The network is made ready in place: its BatchNorm folded, its weights moved. forward: the same function as its
    device does it fastest, image_BCHW to logits_BKHW.
    tta: d4 gives the mean probability over the eight ways to turn and flip the window. largest_px: pixels of the
    largest window that is to come, if that is known: windows that grow up to it then take no new memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        precision: Precision,
        threads: int,
        tta: Literal["none", "d4"] = "none",
        largest_px: int = 0,
    ) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self.card = bundle.card
        self.device = device
        self.dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.ways = D4 if tta == "d4" else D4[:1]
        self.network = bundle.network.eval()
        # A GPU gives all that is asked for, and not what is written to.
        largest_px = largest_px if device.type == "cpu" else 0
        self.forward = made_ready(self.network, device.type, largest_px)
        self.network.to(device, self.dtype)
        self._kept = Kept([len(self.card.bands)], largest_px)
        self._one_at_a_time = threading.Lock()
        # Copies to and from a GPU have a stream each, so that they go on beside a pass. Torch gives Stream no types.
        count = 2 if device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]
        for parameter in self.network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def predict(
        self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_], core: Core | None = None
    ) -> NDArray[np.uint8]:
        """Probabilities of a window's core (None: of all), prob_HW: 0 to 250 for 0 to 1, 255 where it is invalid.

        The window starts on the stride's lattice. A network whose logits are smaller than the image gives no answer
        in the window's outer stride-aligned border, and 255 there too.
        """
        return self.download(self.run(self.upload(image_CHW, valid_HW, core)))

    # The three steps of predict. While one window is in `run`, others may be in the other two, in other threads.

    def upload(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_], core: Core | None = None) -> Uploaded:
        """The pixels of a window on the device, from pinned memory to a GPU; on a CPU the very same pixels."""
        image_BCHW, invalid_HW = torch.from_numpy(image_CHW)[None], torch.from_numpy(~valid_HW)
        core = core or whole_of(image_BCHW)
        if not self._streams:
            return Uploaded(image_BCHW, invalid_HW, core)
        with torch.cuda.stream(self._streams[0]):
            there = [it.pin_memory().to(self.device, non_blocking=True) for it in (image_BCHW, invalid_HW)]
        self._streams[0].synchronize()
        return Uploaded(there[0], there[1], core)

    def run(self, window: Uploaded) -> Tensor:
        """Probabilities of a window's core as `predict` gives them, stored_HW on the device: the pass is over."""
        with self._one_at_a_time, torch.inference_mode():
            parts = self._probabilities(self._normalised(window, self._kept), window.core)
            invalid_HW = window.invalid_HW[window.core]
            stored_HW = torch.empty_like(invalid_HW, dtype=torch.uint8, memory_format=torch.contiguous_format)
            for rows, prob_HW in zip(self._some_rows(len(stored_HW)), parts, strict=True):
                stored_HW[rows] = prob_HW.mul_(FULL_U8).round_().nan_to_num_(INVALID_U8)
                stored_HW[rows].masked_fill_(invalid_HW[rows], INVALID_U8)
        if self._streams:
            torch.cuda.current_stream(self.device).synchronize()
        return stored_HW

    def download(self, stored_HW: Tensor) -> NDArray[np.uint8]:
        """What `run` gave as an array of this process."""
        if self._streams:
            with torch.cuda.stream(self._streams[1]):
                pinned_HW = torch.empty_like(stored_HW, device="cpu", pin_memory=True)
                stored_HW = pinned_HW.copy_(stored_HW, non_blocking=True)
            self._streams[1].synchronize()
        found_HW: NDArray[np.uint8] = stored_HW.numpy()
        return found_HW

    def predict_image(
        self, image_HWC: NDArray[np.uint8], valid_HW: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        """Probabilities of an image of any size, prob_HW from 0 to 1, NaN where invalid: as if surrounded by fill.

        Large images go through in cores with their halo. Where the bundle was trained on resized images, the image is
        resized and the probabilities are resized back. Raises ValueError for other bands or another dtype.
        """
        image_CHW, valid_HW = self._checked(image_HWC, valid_HW)
        with self._one_at_a_time, torch.inference_mode():
            prob_HW = self._resized(image_CHW, valid_HW) if self.card.resize_px else self._in_cores(image_CHW, valid_HW)
        return np.where(valid_HW, prob_HW, np.float32(np.nan))

    def normalise(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_]) -> Tensor:
        """What the network sees, image_BCHW: (x * scale - mean) / std in float32, the card's fill where invalid."""
        return self._normalised(self.upload(image_CHW, valid_HW), Kept([len(self.card.bands)]))

    def _normalised(self, window: Uploaded, kept: Kept) -> Tensor:
        card = self.card
        mean_C11 = torch.tensor(card.mean, device=self.device)[:, None, None]
        std_C11 = torch.tensor(card.std, device=self.device)[:, None, None]
        _, bands, height, width = window.image_BCHW.shape
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        seen_BCHW = kept.take(0, height * width, (bands, height, width), like)
        for rows in self._some_rows(height):
            part_BCHW = window.image_BCHW[:, :, rows].float().mul_(card.scale).sub_(mean_C11).div_(std_C11)
            seen_BCHW[:, :, rows] = part_BCHW.masked_fill_(window.invalid_HW[rows], card.fill)
        return seen_BCHW

    def _probabilities(self, image_BCHW: Tensor, core: Core, least_px: int | None = None) -> list[Tensor]:
        """The core's mean of all ways in float32, so many rows at a time; NaN where the network gives no answer."""
        totals: list[Tensor] = []
        rows, cols = core
        height, width = image_BCHW.shape[2:]
        for turns, flipped in self.ways:
            turned = torch.rot90(image_BCHW, turns, (2, 3)) if turns else image_BCHW
            # What lies above, left, below and right of the core: a quarter turn brings the right side up.
            around = np.roll((rows.start, cols.start, height - rows.stop, width - cols.stop), turns).tolist()
            if flipped:
                around[1], around[3] = around[3], around[1]
            logits_HW = self._logits(turned.flip(3) if flipped else turned, around, least_px)
            logits_HW = logits_HW.flip(1) if flipped else logits_HW
            logits_HW = torch.rot90(logits_HW, -turns, (0, 1)) if turns else logits_HW
            some = (logits_HW[part].float() for part in self._some_rows(len(logits_HW)))
            parts = [(part_HW / self.card.temperature).sigmoid_() for part_HW in some]
            totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
        return [total.div_(len(self.ways)) for total in totals]

    def _logits(self, image_BCHW: Tensor, around: Sequence[int], least_px: int | None) -> Tensor:
        """Logits of the first class, logits_HW, of what is left without so many pixels above, left, below and right.

        NaN within the network's border.
        """
        height, width = image_BCHW.shape[2:]
        rows, cols = slice(around[0], height - around[2]), slice(around[1], width - around[3])
        border = self.network.border_px
        tall, wide = (input_side(self.network, self.card.stride, length, least_px) for length in (height, width))
        margin = (0, wide - width, 0, tall - height)
        if any(margin):
            # A negative margin cuts off what no answer depends on.
            image_BCHW = torch.nn.functional.pad(image_BCHW, margin, value=self.card.fill)
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        if isinstance(self.forward, Strips):
            core_HW: Tensor = self.forward(image_BCHW, (rows, cols))[0, 0]
            return core_HW
        logits_HW: Tensor = self.forward(image_BCHW)[0, 0, : height - border, : width - border]
        if border:
            rest = (border, width - border - logits_HW.shape[1], border, height - border - logits_HW.shape[0])
            logits_HW = torch.nn.functional.pad(logits_HW, rest, value=float("nan"))
        return logits_HW[rows, cols]

    def _some_rows(self, height: int) -> list[slice]:
        """A window's rows, so many at once as are in float32: all of them on a GPU."""
        step = height if self._streams else ROWS
        return [slice(first, min(first + step, height)) for first in range(0, height, step)]

    def _checked(
        self, image_HWC: NDArray[np.uint8], valid_HW: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        bands = len(self.card.bands)
        if image_HWC.ndim != 3 or image_HWC.shape[2] != bands or image_HWC.dtype != np.uint8:
            raise ValueError(
                f"image of shape {image_HWC.shape} and {image_HWC.dtype}; expected (height, width, {bands}) and uint8:"
                f" {', '.join(self.card.bands)}"
            )
        if valid_HW is None:
            valid_HW = np.ones(image_HWC.shape[:2], np.bool_)
        if valid_HW.shape != image_HWC.shape[:2]:
            raise ValueError(f"valid of shape {valid_HW.shape}; expected {image_HWC.shape[:2]}, the image's")
        return np.ascontiguousarray(np.moveaxis(image_HWC, 2, 0)), valid_HW.astype(np.bool_)

    def _in_cores(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Core by core, each with its halo, which is fill outside the image."""
        halo_px = halo_of(self.card)
        height, width = valid_HW.shape
        core_px = -(-CORE_PX // self.card.stride) * self.card.stride
        prob_HW = np.empty((height, width), np.float32)
        for row in range(0, height, core_px):
            for col in range(0, width, core_px):
                stop_row, stop_col = min(row + core_px, height), min(col + core_px, width)
                sides = ((row - halo_px, stop_row + halo_px, height), (col - halo_px, stop_col + halo_px, width))
                rows, cols = (slice(max(start, 0), min(stop, end)) for start, stop, end in sides)
                around = [(rows.start - row + halo_px, stop_row + halo_px - rows.stop)]
                around += [(cols.start - col + halo_px, stop_col + halo_px - cols.stop)]
                window_CHW = np.pad(image_CHW[:, rows, cols], [(0, 0), *around])
                inside_HW = np.pad(valid_HW[rows, cols], around)
                core = slice(halo_px, halo_px + stop_row - row), slice(halo_px, halo_px + stop_col - col)
                parts = self._probabilities(self.normalise(window_CHW, inside_HW), core)
                prob_HW[row:stop_row, col:stop_col] = torch.cat(parts).cpu().numpy()
        return prob_HW

    def _resized(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_]) -> NDArray[np.float32]:
        """One pass over the whole image at the size of training, as the network saw it there; and back."""
        height, width = self.card.resize_px or valid_HW.shape
        small_CHW = np.stack([_resize(band_HW, (width, height), Resampling.BILINEAR) for band_HW in image_CHW])
        small_HW = _resize(valid_HW.astype(np.uint8), (width, height), Resampling.NEAREST) != 0
        border = -(-self.network.border_px // self.card.stride) * self.card.stride
        around = [(border, border), (border, border)]
        image_BCHW = self.normalise(np.pad(small_CHW, [(0, 0), *around]), np.pad(small_HW, around))
        core = slice(border, border + height), slice(border, border + width)
        prob_HW = torch.cat(self._probabilities(image_BCHW, core, least_px=0)).cpu().numpy()
        return _resize(prob_HW, valid_HW.shape[::-1], Resampling.BILINEAR)


def _resize(band_HW: NDArray[Any], size_xy: tuple[int, int], how: Resampling) -> NDArray[Any]:
    """One band at another size, as PIL does it in training."""
    return np.asarray(Image.fromarray(band_HW).resize(size_xy, how))
