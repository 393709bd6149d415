"""The losses of training, by name or of the user's own. Axes: B batch, K classes, H rows, W columns.

A loss takes (logits_BKHW, target_BKHW, valid_BHW) and gives one number. target is 0 or 1; valid is 0 or 1 (or bool),
shape BHW or B1HW. What lies under invalid pixels has no effect, not even if it is not finite; a batch without any valid
pixel has the loss of full agreement and gradient 0. All is computed in float32 (float64 stays), whatever the precision
of the logits.

Where several processes train together, the sums that a loss is made of are those over the batches of all of them, so
that n processes with a batch each do what one process would do with all n batches in one. A loss of which no gradient
is asked (of validation, which one process does) is that of its own batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .own_code import import_own, is_own

EPSILON = 1e-15

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits_BKHW, target_BKHW, valid_BHW) to a scalar."""


class LossError(ValueError):
    """No loss has that name, or it does not take these arguments. One line."""


def bce_jaccard(
    logits_BKHW: Tensor, target_BKHW: Tensor, valid_BHW: Tensor, jaccard: Literal["batch", "pixel"] = "batch"
) -> Tensor:
    """H - log J of TernausNet (Iglovikov and Shvets 2018, arXiv 1801.05746, equation 4), over valid pixels only.

    H is the mean binary cross entropy (equation 3). jaccard says what J is. `batch`: (I + e) / (U - I + e), where I is
    the sum of target * probability, U the sum of both, and e = 1e-15 (below float32's resolution next to any real sum:
    it only decides that a batch without buildings and without predictions has J = 1). `pixel`: equation 2 as it is
    printed, the mean of t p / (t + p - t p), plus e; it is 0 where the target is 0, so it cannot exceed the share of
    building pixels.
    """
    sums = _sums(logits_BKHW, target_BKHW, valid_BHW, pixel_jaccard=jaccard == "pixel")
    if jaccard == "pixel":
        index = torch.where(sums.count > 0, sums.pixel_jaccard / sums.count.clamp(min=1), 1.0) + EPSILON
    else:
        index = (sums.intersection + EPSILON) / (sums.total - sums.intersection + EPSILON)
    return sums.mean_entropy - torch.log(index)


def bce(logits_BKHW: Tensor, target_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """H, the mean binary cross entropy of the valid pixels."""
    return _sums(logits_BKHW, target_BKHW, valid_BHW).mean_entropy


def dice(logits_BKHW: Tensor, target_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """The negative soft Dice index of the batch, -(2 I + e) / (U + e), with I, U and e as in `bce_jaccard`: -1 to 0."""
    return -_sums(logits_BKHW, target_BKHW, valid_BHW).dice


def dice_bce(logits_BKHW: Tensor, target_BKHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """H + 1 - the soft Dice index of the batch."""
    sums = _sums(logits_BKHW, target_BKHW, valid_BHW)
    return sums.mean_entropy + 1 - sums.dice


LOSSES: dict[str, Callable[..., Tensor]] = {
    "bce-jaccard": bce_jaccard,
    "bce": bce,
    "dice": dice,
    "dice-bce": dice_bce,
}


def resolve_loss(name: str, args: Mapping[str, Any]) -> Loss:
    """The loss of a name, or the user's own as `package.module:name`; args are given to it by keyword.

    The user's own is a function of (logits, target, valid, **args); where several processes train together, it sees its
    own process's batch, and gradients are averaged. Raises LossError in one line.
    """
    function = _import_loss(name) if is_own(name) else LOSSES.get(name)
    if function is None:
        raise LossError(f"no loss {name!r}; expected {', '.join(LOSSES)}, or package.module:name of your own")
    try:
        inspect.signature(function).bind(None, None, None, **args)
    except TypeError as error:
        raise LossError(f"loss {name} with {dict(args)}: {error}") from None
    if function is bce_jaccard and args.get("jaccard", "batch") not in ("batch", "pixel"):
        raise LossError(f"loss {name}: jaccard is {args['jaccard']!r}; expected batch or pixel")
    return partial(function, **args) if args else function


def _import_loss(name: str) -> Callable[..., Tensor]:
    try:
        found = import_own(name)
    except ImportError as error:
        raise LossError(f"loss {name}: {error}") from error
    if not callable(found):
        raise LossError(f"loss {name} is a {type(found).__name__}; expected a function")
    loss: Callable[..., Tensor] = found
    return loss


@dataclass(frozen=True)
class _Sums:
    """What all losses are made of: sums over the valid pixels of the batches of all processes."""

    entropy: Tensor
    count: Tensor
    intersection: Tensor
    total: Tensor
    pixel_jaccard: Tensor

    @property
    def mean_entropy(self) -> Tensor:
        return self.entropy / self.count.clamp(min=1)

    @property
    def dice(self) -> Tensor:
        return (2 * self.intersection + EPSILON) / (self.total + EPSILON)


def _sums(logits_BKHW: Tensor, target_BKHW: Tensor, valid_BHW: Tensor, pixel_jaccard: bool = False) -> _Sums:
    valid_B1HW = valid_BHW.unsqueeze(1) if valid_BHW.dim() == 3 else valid_BHW
    keep_BKHW = valid_B1HW.bool().expand_as(logits_BKHW)
    dtype = torch.promote_types(logits_BKHW.dtype, torch.float32)
    logits = logits_BKHW.to(dtype).masked_fill(~keep_BKHW, 0.0)
    target = target_BKHW.to(dtype).masked_fill(~keep_BKHW, 0.0)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = torch.sigmoid(logits) * keep_BKHW
    both = target * probability
    # Not always: it costs as much as all else.
    each = both / (target + probability - both).clamp(min=EPSILON) if pixel_jaccard else both.new_zeros(())
    sums = torch.stack(
        [
            (cross_entropy * keep_BKHW).sum(),
            # In float32 a count is exact up to 16.8 million pixels, and then right to seven digits.
            keep_BKHW.sum().to(dtype),
            both.sum(),
            target.sum() + probability.sum(),
            each.sum(),
        ]
    )
    return _Sums(*_over_processes(sums).unbind())


def _over_processes(sums: Tensor) -> Tensor:
    """The sums over all processes that train together, through which gradients flow back to each."""
    if not (sums.requires_grad and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    total: Tensor = _AllReduce.apply(sums)  # type: ignore[no-untyped-call]  # torch's Function.apply has no annotations
    return total


class _AllReduce(torch.autograd.Function):
    """Sum over processes. Every process adds the gradient of its own copy of the loss, so n copies of it come back.

    DDP divides the gradients of the parameters by n afterwards, and so what remains is the gradient of the one loss.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
