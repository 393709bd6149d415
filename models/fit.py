"""Fit a network to batches: schedule, averaged weights, validation, checkpoints. Knows no files but its checkpoints.

The weights that count are the exponential moving average (EMA) of those that the optimiser moves. They are validated at
intervals and the best are kept. A checkpoint holds all that is needed to go on after a stop as if there had been none:
batches are asked for by their step, so they need no state.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .augment import Batch
from .losses import bce_jaccard
from .metrics import Histogram
from .networks import Network

LAST, BEST = "last.pt", "best.pt"


@dataclass(frozen=True)
class FitSettings:
    """The optimisation, in steps of one batch.

    The learning rate rises linearly over warmup_steps, stays, and falls to 0 as a half cosine over the last
    decay_steps. ema_steps: about how many of the latest steps the averaged weights span. clip_norm: longest gradient,
    all parameters together. frozen_statistics: the encoder's BatchNorm keeps its running statistics (eval mode) and
    learns only its scales; the right choice for statistics that were measured elsewhere. freeze_encoder: the encoder
    learns nothing.
    """

    steps: int
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 3e-4
    optimiser: Literal["adam", "adamw"] = "adam"
    weight_decay: float = 0.0
    warmup_steps: int = 20
    decay_steps: int = 0
    ema_steps: int = 100
    clip_norm: float = 5.0
    validate_every: int = 100
    checkpoint_every: int = 50
    precision: Literal["float32", "bfloat16"] = "float32"
    frozen_statistics: bool = True
    freeze_encoder: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.validate_every, self.checkpoint_every, self.ema_steps) < 1:
            raise ValueError("steps, validate_every, checkpoint_every and ema_steps: expected at least 1")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(f"{self.warmup_steps} warm-up and {self.decay_steps} decay steps of {self.steps} in all")

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = self.steps - step
        fall = 1.0 if left > self.decay_steps else 0.5 * (1 - math.cos(math.pi * left / self.decay_steps))
        return rise * fall


@dataclass(frozen=True)
class Record:
    """What one validation found. loss: mean of the steps since the one before. iou: at threshold, the best one."""

    step: int
    loss: float
    iou: float
    threshold: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """The best averaged weights of a fit, in eval mode, the threshold chosen for them, and all records in order."""

    network: Network
    threshold: float
    records: tuple[Record, ...]


def fit(
    network: Network,
    batches: Callable[[int], Batch],
    validate: Callable[[Network], Histogram],
    settings: FitSettings,
    folder: Path,
    report: Callable[[Record], None] = lambda record: None,
) -> Fitted:
    """Train network (changed in place) and give the best of its averaged weights by pooled validation IoU.

    batches(step) is the batch of a step: the same for the same step. folder holds last.pt and best.pt; a fit that
    finds last.pt there goes on from it. report is called after every validation.
    Raises FloatingPointError if the loss is no longer finite.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
    network.requires_grad_(requires_grad=True)
    for parameter in _encoder_parameters(network):
        parameter.requires_grad_(not settings.freeze_encoder)
    averaged = copy.deepcopy(network).eval().requires_grad_(requires_grad=False)
    optimiser = _optimiser(network, settings)
    start, records = _resume(folder / LAST, network, averaged, optimiser)
    losses: list[float] = []
    began = time.monotonic()
    for step in range(start, settings.steps):
        losses.append(_step(network, batches(step), optimiser, settings, settings.rate(step)))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step} is {losses[-1]}; a lower learning rate may help")
        _average(averaged, network, _decay(step, settings.ema_steps))
        done = step + 1
        if done % settings.validate_every == 0 or done == settings.steps:
            record = _validated(averaged, validate, done, sum(losses) / len(losses), settings, time.monotonic() - began)
            records, losses, began = (*records, record), [], time.monotonic()
            if record.iou >= max(r.iou for r in records):
                _save(folder / BEST, {"averaged": averaged.state_dict(), "threshold": record.threshold})
            report(record)
        if done % settings.checkpoint_every == 0 or done % settings.validate_every == 0 or done == settings.steps:
            _checkpoint(folder / LAST, done, records, network, averaged, optimiser)
    best = torch.load(folder / BEST, weights_only=True)
    averaged.load_state_dict(best["averaged"])
    return Fitted(averaged, float(best["threshold"]), records)


def lecun_uniform(network: nn.Module) -> None:
    """LeCun's initialisation (Efficient BackProp, 1998, equation 16): weights uniform, of variance 1 / fan-in.

    An output of a transposed convolution is made of 1 / stride of the kernel along each axis. Biases become 0.
    """
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            fan_in = layer.weight[:, 0].numel() / math.prod(layer.stride)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
        else:
            continue
        bound = math.sqrt(3 / fan_in)
        nn.init.uniform_(layer.weight, -bound, bound)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _step(
    network: Network, batch: Batch, optimiser: torch.optim.Optimizer, settings: FitSettings, rate: float
) -> float:
    network.train()
    if settings.frozen_statistics or settings.freeze_encoder:
        for layer in _encoder_norms(network):
            layer.eval()
    for group in optimiser.param_groups:
        group["lr"] = rate * group["full_lr"]
    device = next(network.parameters()).device
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        logits_BKHW = network(batch.image_BCHW)
    loss = bce_jaccard(logits_BKHW, batch.target_BKHW, batch.valid_BHW)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's Tensor.backward has no annotations
    nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
    optimiser.step()
    return float(loss.detach())


def _optimiser(network: Network, settings: FitSettings) -> torch.optim.Optimizer:
    """Adam or AdamW; the encoder has a rate of its own, and what has one dimension (biases, norms) no weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        rate = settings.encoder_learning_rate if name.startswith(network.encoder_prefix) else settings.learning_rate
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        if parameter.requires_grad:
            groups.setdefault((rate, decay), []).append(parameter)
    options = [
        {"params": parameters, "lr": rate, "full_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(options) if settings.optimiser == "adamw" else torch.optim.Adam(options)


def _encoder_parameters(network: Network) -> Iterator[nn.Parameter]:
    return (p for name, p in network.named_parameters() if name.startswith(network.encoder_prefix))


def _encoder_norms(network: Network) -> Iterator[nn.Module]:
    for name, layer in network.named_modules():
        if name.startswith(network.encoder_prefix) and isinstance(layer, nn.BatchNorm2d):
            yield layer


def _decay(step: int, ema_steps: int) -> float:
    """Weight of the old average: short memory at first, so that the initial weights are soon forgotten."""
    return min(1 - 1 / ema_steps, (1 + step) / (10 + step))


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    old, new = averaged.state_dict(), network.state_dict()
    for name, tensor in old.items():
        if tensor.is_floating_point():
            tensor.lerp_(new[name], 1 - decay)
        else:
            tensor.copy_(new[name])


def _validated(
    averaged: Network,
    validate: Callable[[Network], Histogram],
    step: int,
    loss: float,
    settings: FitSettings,
    seconds: float,
) -> Record:
    with torch.no_grad():
        histogram = validate(averaged)
    threshold = histogram.best_threshold()
    rate = settings.learning_rate * settings.rate(step - 1)
    return Record(step, loss, histogram.at(threshold).iou, threshold, rate, seconds)


def _resume(
    file: Path, network: Network, averaged: Network, optimiser: torch.optim.Optimizer
) -> tuple[int, tuple[Record, ...]]:
    if not file.exists():
        return 0, ()
    state = torch.load(file, weights_only=True)
    network.load_state_dict(state["network"])
    averaged.load_state_dict(state["averaged"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"]), tuple(Record(*values) for values in state["records"])


def _checkpoint(
    file: Path,
    step: int,
    records: tuple[Record, ...],
    network: Network,
    averaged: Network,
    optimiser: torch.optim.Optimizer,
) -> None:
    rows = [(r.step, r.loss, r.iou, r.threshold, r.learning_rate, r.seconds) for r in records]
    state: dict[str, Tensor | Any] = {
        "step": step,
        "records": rows,
        "network": network.state_dict(),
        "averaged": averaged.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    _save(file, state)


def _save(file: Path, state: dict[str, Any]) -> None:
    """Written beside and renamed into place: a stop never leaves half a checkpoint."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    torch.save(state, partial)
    partial.replace(file)
