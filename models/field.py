"""How far a network sees and how much it holds in memory: measured on its layers, never written down by hand.

Axes: B batch, C channels, H rows, W columns. Lengths in pixels of the input.
"""

from __future__ import annotations

import copy
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

from .networks import OwnNetwork
from .weights import Reach

SHORTEST_STRIPE = 16
LONGEST_STRIPE = 128
LONGEST_OWN_STRIPE = 64
"""The stripes probed, in strides: a field that reaches further than half of the longest counts as having no bound."""
ROWS_AT_ONCE = 8
"""Rows of ones that are sent through a network together."""
OWN_WINDOW = 8
"""Side of the window whose memory is measured, in strides, for an own network that has to be run for it."""

_CAT = torch.ops.aten.cat.default
_MAPS = {
    torch.ops.aten.add.Tensor: 2,
    torch.ops.aten.maximum.default: 2,
    torch.ops.aten.relu.default: 1,
    torch.ops.aten.hardtanh_.default: 1,
    torch.ops.aten.batch_norm.default: 1,
}
"""Operators that give a map of the shape of those they are given, and how many these are."""
_CONVOLUTION = torch.ops.aten.conv2d.default
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_FUSED_CONVOLUTION = torch.ops.mkldnn._convolution_pointwise.default if _HAS_ONEDNN else None


@dataclass(frozen=True)
class Field:
    """receptive_field_px: how far one output pixel sees, at worst over the phases of the stride.

    halo_px: the smallest multiple of the stride that makes a stride-aligned core exact: pixels further from the core
    do not reach it. Both None: the field has no bound (attention, global pooling).
    """

    receptive_field_px: Reach | None
    halo_px: int | None


@dataclass(frozen=True)
class _Reach1D:
    """Along one axis: how far one output pixel sees before and after itself, and an aligned core beyond its edges."""

    before_px: int
    after_px: int
    need_px: int


def probe_field(network: nn.Module, stride: int, bands: int) -> Field:
    """The field of a network, along its rows and along its columns.

    The networks of this package run in float64 through their own layers with every weight positive and every activation
    the identity, so that no influence can cancel or die. Of a user's own network nothing is known: there the gradients
    are looked at. Raises ValueError for logits of another height and width than the image's less the network's border,
    and for an own network that does not repeat itself every stride.
    """
    probe = _reach_by_gradients if isinstance(network, OwnNetwork) else _reach_of_ones
    with _in_eval_mode(network):
        rows = probe(network, stride, bands, axis=2)
        cols = probe(network, stride, bands, axis=3) if rows else None
    if rows is None or cols is None:
        return Field(None, None)
    need = max(0, rows.need_px, cols.need_px)
    reach = Reach(up=rows.before_px, down=rows.after_px, left=cols.before_px, right=cols.after_px)
    return Field(reach, halo_px=-(-need // stride) * stride)


def _reach_of_ones(network: nn.Module, stride: int, bands: int, axis: int) -> _Reach1D | None:
    """One row (or column) of ones at a time, at every phase of the stride, sent down a stripe as narrow as it may be.

    None if the reach is more than half of the longest stripe.
    """
    border, remainder = (getattr(network, name, 0) for name in ("border_px", "remainder_px"))
    width = remainder + -(-(2 * border + 1 - remainder) // stride) * stride
    length = SHORTEST_STRIPE * stride
    while length <= LONGEST_STRIPE * stride:
        first = length // 2 // stride * stride
        shape = (bands, length + remainder, width) if axis == 2 else (bands, width, length + remainder)
        seen = np.concatenate(
            [
                _rows_reached(network, shape, first + phases, axis, border)
                for phases in torch.arange(stride).split(ROWS_AT_ONCE)
            ]
        )
        if not seen[:, : 2 * stride].any() and not seen[:, -2 * stride :].any():
            source, target = np.nonzero(seen)
            distance, phase = target + border - (first + source), (target + border) % stride
            # The outermost pixels of an aligned core lie at phase 0 on one side and stride - 1 on the other; those
            # further in have that much of their reach inside the core.
            need = max(int((distance - phase).max()), int((-distance - (stride - 1 - phase)).max()))
            return _Reach1D(int(distance.max()), int(-distance.min()), need)
        length *= 2
    return None


def _rows_reached(
    network: nn.Module, shape: tuple[int, ...], rows: Tensor, axis: int, border: int
) -> NDArray[np.bool_]:
    """For each row (or column) of an image which rows of the output it reaches, (len(rows), length of the output)."""
    image_BCHW = torch.zeros(len(rows), *shape, dtype=torch.float64)
    ones_BCHW = image_BCHW if axis == 2 else image_BCHW.transpose(2, 3)
    ones_BCHW[torch.arange(len(rows)), :, rows] = 1.0
    with torch.inference_mode(), _PositiveLayers():
        output_BKHW = network(image_BCHW)
    _check_size(image_BCHW, output_BKHW, border)
    reached: NDArray[np.bool_] = output_BKHW.sum(dim=(1, 5 - axis)).numpy() > 0
    return reached


def _reach_by_gradients(network: nn.Module, stride: int, bands: int, axis: int) -> _Reach1D | None:
    """What a core of one stride sees, which bounds what one of its pixels does: for any network.

    In float64 with random positive weights and pixels, so that no influence cancels; activations are the identity and
    the largest of a pool its mean, so that none dies. Gates, normalisations and attention stay what they are. None if
    the reach is more than half of the longest stripe. Raises ValueError if the core after it does not see the same.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = (*network.named_parameters(), *network.named_buffers())
    state = {name: _positive(tensor, generator) for name, tensor in tensors}
    length = SHORTEST_STRIPE * stride
    while length <= LONGEST_OWN_STRIPE * stride:
        core = length // 2 // stride * stride
        stripe_BCHW = torch.rand(1, bands, length, 2 * stride, dtype=torch.float64, generator=generator)
        image_BCHW = (stripe_BCHW if axis == 2 else stripe_BCHW.transpose(2, 3).contiguous()).requires_grad_()
        with _SmoothLayers():
            output_BKHW = torch.func.functional_call(network, state, (image_BCHW,))
        _check_size(image_BCHW, output_BKHW, 0)
        rows = output_BKHW.sum(dim=(0, 1, 5 - axis))
        whole = _rows_seen(rows[core : core + stride].sum(), image_BCHW, axis)
        beyond = _rows_seen(rows[core + stride : core + 2 * stride].sum(), image_BCHW, axis)
        if whole.start >= 2 * stride and beyond.stop <= length - 2 * stride:
            if (beyond.start - stride, beyond.stop - stride) != (whole.start, whole.stop):
                raise ValueError(
                    f"cores {stride} px apart do not see the same around them: the network needs an attribute `stride`,"
                    " the number of pixels of which height and width must be multiples"
                )
            # One pixel of the core sees no more than the whole core: so far from its other end at most.
            before_px, after_px = core + stride - 1 - whole.start, whole.stop - 1 - core
            return _Reach1D(before_px, after_px, need_px=max(before_px, after_px) - (stride - 1))
        length *= 2
    return None


def _rows_seen(output: Tensor, image_BCHW: Tensor, axis: int) -> slice:
    """From the first to behind the last row of the image that an output depends on."""
    (gradient_BCHW,) = torch.autograd.grad(output, image_BCHW, retain_graph=True)
    seen = gradient_BCHW.ne(0).any(dim=5 - axis).any(dim=1)[0].nonzero()
    if not len(seen):
        raise ValueError("the logits do not depend on the image")
    return slice(int(seen[0]), int(seen[-1]) + 1)


def _check_size(image_BCHW: Tensor, output_BKHW: Tensor, border: int) -> None:
    expected = tuple(side - 2 * border for side in image_BCHW.shape[2:])
    if tuple(output_BKHW.shape[2:]) != expected:
        raise ValueError(
            f"logits of {tuple(output_BKHW.shape[2:])} px from an image of {tuple(image_BCHW.shape[2:])} px;"
            f" expected {expected}"
        )


def _positive(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights between 0.5 and 1.5, over the number of them that make one output: sums stay of one size."""
    if not tensor.is_floating_point():
        return tensor
    fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
    return (0.5 + torch.rand(tensor.shape, dtype=torch.float64, generator=generator)) / fan_in


class _SmoothLayers(TorchFunctionMode):
    """Runs a network with activations as the identity and max pools as mean pools; all else as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Stands in for every torch function that the network calls."""
        if func in _ACTIVATIONS:
            return args[0]
        if func in _MAX_POOLS:
            return _mean_pool(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


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
            return _mean_pool(*args, **kwargs)
        return func(*args, **kwargs)


_ACTIVATIONS = {
    nnf.relu,
    nnf.relu6,
    nnf.hardtanh,
    nnf.leaky_relu,
    nnf.elu,
    nnf.gelu,
    nnf.silu,
    nnf.hardswish,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
}
_IDENTITIES = {*_ACTIVATIONS, nnf.batch_norm, Tensor.contiguous}
_MAX_POOLS = {nnf.max_pool2d, torch.max_pool2d}


def _mean_pool(
    x_BCHW: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *options: Any, **named: Any
) -> Tensor:
    """A mean pool in place of a max pool; dilation and what else is said of it are left out."""
    return nnf.avg_pool2d(x_BCHW, kernel_size, stride, padding)


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


def peak_bytes_per_px(
    network: nn.Module, dtype: torch.dtype, bands: int = 3, run: nn.Module | None = None, window_px: int = 2048
) -> float:
    """Most bytes of activations alive at once in one forward pass, for each pixel of the window.

    run: what runs in place of the network, if anything does. Input and output included; weights and the scratch space
    of the convolution library not. Nothing is computed: the pass runs on the meta device, and every storage is counted
    from its first use until Python lets go of it. A user's own network that does not run there is run on a small window
    instead.
    """
    window = window_px, window_px + getattr(network, "remainder_px", 0)
    if isinstance(network, OwnNetwork):
        try:
            return _peak_bytes_on_meta(network, dtype, bands, *window)
        except (RuntimeError, NotImplementedError, TypeError):
            return _peak_bytes_on_cpu(network, dtype, bands, OWN_WINDOW * network.stride)
    return _peak_bytes_on_meta(run or network, dtype, bands, *window)


def _peak_bytes_on_cpu(network: nn.Module, dtype: torch.dtype, bands: int, window_px: int) -> float:
    with _in_eval_mode(network), torch.inference_mode(), _LiveStorages() as live:
        network(torch.zeros(1, bands, window_px, window_px))
    return float(live.peak_bytes) / window_px**2 * dtype.itemsize / torch.float32.itemsize


def _peak_bytes_on_meta(network: nn.Module, dtype: torch.dtype, bands: int, window_px: int, side: int) -> float:
    # A copy of its own: layers keep what they make of their weights, and several names may share a weight.
    instead: dict[int, Any] = {id(it): _meta(it, dtype) for it in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, instead)
    with _in_eval_mode(copied), torch.inference_mode(), _LiveStorages() as live:
        copied(torch.empty(1, bands, side, side, dtype=dtype, device="meta"))
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
    return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta")


def _answer(func: Any, args: Sequence[Any]) -> Tensor | None:
    """What some operators make of maps on the meta device, None for others and for what is not plain.

    Torch has these in Python there, and imports its compiler at the first of them, which takes 1.5 s, or what that one
    reckons symbols with, which takes half a second.
    """
    if func is _CONVOLUTION:
        return _convolved(args[0], args[1], *args[3:])
    if func is _FUSED_CONVOLUTION:
        image_BCHW, weight, _, padding, stride, dilation, groups, *_ = args
        map_BCHW = _convolved(image_BCHW, weight, stride, padding, dilation, groups)
        return None if map_BCHW is None else map_BCHW.contiguous(memory_format=torch.channels_last)
    return _brought_together(func, args) if func is _CAT or func in _MAPS else None


def _brought_together(func: Any, args: Sequence[Any]) -> Tensor | None:
    """What joins maps behind each other, or works pixel by pixel on maps of one shape, gives on the meta device."""
    first: Tensor
    others: list[Any]
    first, *others = args[0] if func is _CAT else args[: _MAPS[func]]
    if not first.is_meta or not all(isinstance(it, Tensor) and it.is_meta and it.dtype == first.dtype for it in others):
        return None
    if func is _CAT:
        axis = args[1] if len(args) > 1 else 0
        if axis < 0 or len({(it.shape[:axis], it.shape[axis + 1 :]) for it in (first, *others)}) > 1:
            return None
        together = sum(it.shape[axis] for it in (first, *others))
        return first.new_empty((*first.shape[:axis], together, *first.shape[axis + 1 :]))
    if any(it.shape != first.shape for it in others):
        return None
    return first if func is torch.ops.aten.hardtanh_.default else first.new_empty(first.shape)


def _convolved(
    image_BCHW: Tensor,
    weight: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor | None:
    """The empty result of a convolution on the meta device; None for what does not fit together.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """
    if not (image_BCHW.is_meta and weight.is_meta and image_BCHW.dtype == weight.dtype):
        return None
    if image_BCHW.ndim != 4 or image_BCHW.shape[1] != groups * weight.shape[1] or len(weight) % groups:
        return None
    if any(len(it) != 2 for it in (stride, padding, dilation)):
        return None
    axes = zip(image_BCHW.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sides = [(side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, gap in axes]
    return image_BCHW.new_empty((len(image_BCHW), len(weight), *sides)) if min(sides) > 0 else None


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and remembers the most that lived at once."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's question to a mode: it would import its compiler to leave this one out of what is compiled."""
        return False

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
        result = None if kwargs else _answer(func, args)
        if result is None:
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
