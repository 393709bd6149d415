"""How far a network sees and how much it holds in memory: measured on its layers, never written down by hand.

Axes: B batch, C channels, H rows, W columns. Lengths in pixels of the input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .weights import Reach

LONGEST_STRIPE = 64
"""The longest stripe probed, in strides: a field that reaches further counts as having no bound."""


@dataclass(frozen=True)
class Field:
    """receptive_field_px: how far one output pixel sees, at worst over the phases of the stride.

    halo_px: the smallest multiple of the stride that makes a stride-aligned core exact: pixels further from the core
    do not reach it.
    """

    receptive_field_px: Reach
    halo_px: int


def probe_field(network: nn.Module, stride: int, bands: int) -> Field:
    """The field of a network whose output has the height and width of its input.

    One row of ones at a time, at every phase of the stride, is sent down a stripe one stride wide, in float64 through
    the network's own layers with every weight positive and every activation the identity, so that no influence can
    cancel or die; then the same for columns. Raises ValueError if the field has no bound (global pooling, attention).
    """
    with _in_eval_mode(network):
        rows = _reach_by_phase(network, stride, bands, axis=2)
        cols = _reach_by_phase(network, stride, bands, axis=3)
    phase = np.arange(stride)
    # The outermost pixels of an aligned core lie at phase 0 on one side and stride - 1 on the other; those further in
    # have that much of their reach inside the core.
    need = max(int(max((before - phase).max(), (after - phase[::-1]).max())) for before, after in (rows, cols))
    (up, down), (left, right) = ((int(before.max()), int(after.max())) for before, after in (rows, cols))
    return Field(Reach(up=up, down=down, left=left, right=right), halo_px=-(-max(need, 0) // stride) * stride)


def _reach_by_phase(
    network: nn.Module, stride: int, bands: int, axis: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many pixels before and after itself an output pixel sees along an axis, by its phase in the stride."""
    length = 16 * stride
    while length <= LONGEST_STRIPE * stride:
        first = length // 2 // stride * stride
        stripe_BCHW = torch.zeros(stride, bands, length, stride, dtype=torch.float64)
        stripe_BCHW[torch.arange(stride), :, first + torch.arange(stride)] = 1.0
        image_BCHW = stripe_BCHW if axis == 2 else stripe_BCHW.transpose(2, 3).contiguous()
        with torch.inference_mode(), _PositiveLayers():
            output_BKHW = network(image_BCHW)
        if output_BKHW.shape[2:] != image_BCHW.shape[2:]:
            raise ValueError(f"output of {tuple(output_BKHW.shape[2:])} px from {tuple(image_BCHW.shape[2:])} px")
        seen = output_BKHW.sum(dim=(1, 5 - axis)).numpy() > 0
        if not seen[:, : 2 * stride].any() and not seen[:, -2 * stride :].any():
            source, target = np.nonzero(seen)
            distance, phase = target - (first + source), target % stride
            before, after = np.zeros(stride, np.int64), np.zeros(stride, np.int64)
            np.maximum.at(before, phase, distance)
            np.maximum.at(after, phase, -distance)
            return before, after
        length *= 2
    raise ValueError(f"the network sees further than {LONGEST_STRIPE // 2 * stride} px: its field has no bound")


class _PositiveLayers(TorchFunctionMode):
    """Runs a network's layers as what matters for influence: one channel, all weights 1, activations the identity.

    One channel is enough. Influence is a union over paths, and summing the channels before each convolution takes
    that union earlier, which changes nothing because the output unites all channels in the end.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Stands in for every torch function that the network calls."""
        kwargs = dict(kwargs or {})
        if func in _IDENTITIES:
            return args[0]
        if func is torch.conv2d:
            return _ones_convolution(nnf.conv2d, *args, **kwargs)
        if func is torch.conv_transpose2d:
            return _ones_convolution(nnf.conv_transpose2d, *args, **kwargs)
        if func in _MAX_POOLS:
            options = {name: kwargs[name] for name in ("kernel_size", "stride", "padding") if name in kwargs}
            return nnf.avg_pool2d(*args[:4], **options)
        return func(*args, **kwargs)


_IDENTITIES = {
    nnf.relu,
    nnf.relu6,
    nnf.hardtanh,
    nnf.batch_norm,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    Tensor.contiguous,
}
_MAX_POOLS = {nnf.max_pool2d, torch.max_pool2d}


def _ones_convolution(
    convolution: Callable[..., Tensor],
    input_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    *options: Any,
) -> Tensor:
    """The same convolution from one channel to one, with a kernel of ones.

    options: conv2d gives dilation and groups; conv_transpose2d gives output_padding, groups and dilation.
    """
    if convolution is nnf.conv2d:
        dilation, named = (*options, 1)[0], {}
    else:
        given = dict(enumerate(options))
        dilation, named = given.get(2, 1), {"output_padding": given.get(0, 0)}
    kernel = torch.ones(1, 1, *weight.shape[2:], dtype=input_BCHW.dtype)
    total = input_BCHW.sum(dim=1, keepdim=True)
    return convolution(total, kernel, None, stride=stride, padding=padding, dilation=dilation, **named)


def peak_bytes_per_px(network: nn.Module, dtype: torch.dtype, bands: int = 3, window_px: int = 256) -> float:
    """Most bytes of activations alive at once in one forward pass, for each pixel of the window.

    Input and output included; weights and the scratch space of the convolution library not. Nothing is computed: the
    pass runs on the meta device, and every storage is counted from its first use until Python lets go of it.
    """
    state = {name: _meta(tensor, dtype) for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    with _in_eval_mode(network), torch.inference_mode(), _LiveStorages() as live:
        image_BCHW = torch.empty(1, bands, window_px, window_px, dtype=dtype, device="meta")
        torch.func.functional_call(network, state, (image_BCHW,))
    peak_bytes: int = live.peak_bytes
    return peak_bytes / window_px**2


@contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Puts every module into eval mode, and each back into its own: a frozen encoder may differ from the rest."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype if tensor.is_floating_point() else None, device="meta")


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and remembers the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operator and takes note of what it made."""
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self._note(item.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, nbytes: int) -> None:
        self.live_bytes -= nbytes
