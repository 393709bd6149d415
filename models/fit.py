"""Fit a network to crops: its settings, what is recorded of every epoch, and one or several processes that do it.

The loop itself, on Lightning, is in `loop`, which is imported only here and only to train. Crops are asked for by the
number of their batch, so they need no state: a fit that was stopped anywhere goes on from its last checkpoint, and on
a CPU in float32 ends with the weights, bit for bit, of one that was not.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, Literal, Protocol, get_args

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from .augment import Batch, RawBatch
from .losses import Loss
from .metrics import Measures, Scores
from .networks import Network

CHECKPOINTS, LAST, BEST = "checkpoints", "last.ckpt", "best.ckpt"

Optimiser = Literal["adam", "adamw", "rmsprop", "sgd"]
Schedule = Literal["constant", "cosine", "one-cycle"]
Average = Literal["none", "ema", "swa"]
BestBy = Literal["iou", "dice", "soft_dice", "loss"]
FitPrecision = Literal["float32", "bfloat16", "float64"]


class FitError(RuntimeError):
    """A fit cannot begin or go on: one line that says why, and what is kept. batch: the first that may be at fault."""

    def __init__(self, message: str, batch: int | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class Crops(Protocol):
    """Batches of crops by number: the same one for the same number. Loaders and processes of devices get it pickled."""

    def __getitem__(self, index: int, /) -> RawBatch:
        """The batch of that number, from 0 on without end."""


@dataclass(frozen=True)
class FitSettings:
    """The optimisation. A step moves the weights once, with `accumulate` batches on every one of the devices.

    learning_rate: the full one; encoder_learning_rate: the encoder's own, None: the same. momentum: of SGD and RMSprop.
    alpha: how much RMSprop remembers of squared gradients (Keras calls it rho). eps: None is PyTorch's for the
    optimiser. weight_decay: of everything but biases and the scales of norms. schedule: `cosine` falls to 0 as half a
    wave; `one-cycle` rises from a 25th and falls to a 250,000th (Smith and Topin, arXiv 1708.07120; momentum stays).
    warmup_steps: a linear rise before; with one-cycle, the length of its own, 0: three tenths of all steps.
    accumulate: gradients of so many batches are averaged. That is not a larger batch: a loss that is no mean over
    pixels (Jaccard, Dice) and batch statistics are of each batch apart. clip_norm: longest gradient, all parameters
    together; None: any length.
    average: what is validated and kept. `ema` spans about ema_steps of the latest steps; `swa` averages all steps from
    the share swa_start on, and until then is the weights themselves; both average running statistics likewise.
    best_by: the validation score whose best epoch is kept (of equal ones the last); its threshold is the best of each
    epoch, or the one given. patience: stop after so many epochs without a better one.
    frozen_statistics: the encoder's BatchNorm keeps its running statistics (eval mode) and learns only its scales; the
    right choice for statistics that were measured elsewhere. freeze_encoder: the encoder learns nothing at all.
    loaders: processes that read crops; 0: this one does. log_every, in steps: how often the loss is logged and looked
    at. checkpoint_s: seconds from one checkpoint to the next within an epoch; they are made where losses are logged.
    """

    epochs: int
    steps_per_epoch: int
    optimiser: Optimiser = "adam"
    learning_rate: float = 1e-3
    encoder_learning_rate: float | None = None
    momentum: float = 0.0
    alpha: float = 0.99
    eps: float | None = None
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    accumulate: int = 1
    clip_norm: float | None = None
    average: Average = "none"
    ema_steps: int = 100
    swa_start: float = 0.75
    best_by: BestBy = "iou"
    threshold: float | None = None
    patience: int | None = None
    precision: FitPrecision = "float32"
    frozen_statistics: bool = False
    freeze_encoder: bool = False
    loaders: int = 0
    devices: int = 1
    nodes: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint_s: float = 60.0

    def __post_init__(self) -> None:
        counts = ("epochs", "steps_per_epoch", "accumulate", "ema_steps", "devices", "nodes", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience {self.patience}: expected at least 1, or None")
        if not 0 <= self.swa_start < 1:
            raise ValueError(f"swa_start {self.swa_start}: expected a share from 0 and below 1")
        if not 0 <= self.warmup_steps < self.steps or self.loaders < 0:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} of {self.steps} steps in all, loaders {self.loaders}: expected 0 or"
                " more, and fewer warm-up steps than steps"
            )
        choices = {
            "optimiser": Optimiser,
            "schedule": Schedule,
            "average": Average,
            "best_by": BestBy,
            "precision": FitPrecision,
        }
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} {getattr(self, name)!r}: expected {', '.join(get_args(choice))}")

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def processes(self) -> int:
        """One for every device."""
        return self.devices * self.nodes

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step, counted from 0."""
        if self.schedule == "one-cycle":
            rise = (self.warmup_steps or 0.3 * self.steps) - 1
            if step < rise:
                return _half_wave(1 / 25, 1.0, step / rise)
            return _half_wave(1.0, 1 / 250_000, (step - rise) / max(self.steps - 1 - rise, 1))
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            return _half_wave(1.0, 0.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps))
        return 1.0

    def weight_of_new(self, step: int) -> float:
        """Share of the weights after a step, counted from 0, in the averaged weights; the rest are as they were."""
        if self.average == "ema":
            # Short memory at first, so that the initial weights are soon forgotten.
            return 1 - min(1 - 1 / self.ema_steps, (1 + step) / (10 + step))
        return 1 / (1 + max(0, step - math.floor(self.swa_start * self.steps)))


def _half_wave(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Record:
    """What one epoch came to. train: of the batches trained on, as they were met; validation: of the averaged weights.

    Pooled scores of both are at one threshold. epoch counts from 1, step the steps done. seconds: of training and of
    validation; learning_rate: of the last step, that of all but the encoder.
    """

    epoch: int
    step: int
    learning_rate: float
    train: Measures
    validation: Measures
    train_seconds: float
    validation_seconds: float

    def goodness(self, best_by: BestBy) -> float:
        """The validation score that epochs are compared by; higher is better."""
        score: float = getattr(self.validation, best_by)
        return -score if best_by == "loss" else score


@dataclass(frozen=True)
class Fitted:
    """The averaged weights of the best epoch, in eval mode and float32 on the CPU, and what is known of all epochs.

    losses: (step, mean loss of the batches since the entry before), of the whole fit.
    """

    network: Network
    best: Record
    records: tuple[Record, ...]
    losses: tuple[tuple[int, float], ...]

    @property
    def threshold(self) -> float:
        """That of the best epoch."""
        return self.best.validation.threshold


@dataclass(frozen=True)
class Memory:
    """What a checkpoint remembers besides weights: the steps done, all records, and the curve of the loss."""

    step: int = 0
    records: tuple[Record, ...] = ()
    losses: tuple[tuple[int, float], ...] = ()

    def best(self, best_by: BestBy) -> Record:
        """The best record, of equal ones the last."""
        return max(self.records, key=lambda record: (record.goodness(best_by), record.epoch))

    def done(self, settings: FitSettings) -> bool:
        """True if all epochs are done, or there were too many without a better one."""
        if not self.records:
            return False
        stale = self.records[-1].epoch - self.best(settings.best_by).epoch
        return len(self.records) >= settings.epochs or (settings.patience is not None and stale >= settings.patience)


@dataclass(frozen=True)
class Job:
    """All that a process needs to fit."""

    network: Network
    loss: Loss
    crops: Crops
    prepare: Callable[[RawBatch, torch.device], Batch]
    validate: Callable[[Network], Scores]
    settings: FitSettings
    folder: Path

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.folder / CHECKPOINTS / LAST

    @property
    def best(self) -> Path:
        """The averaged weights of the best epoch so far."""
        return self.folder / CHECKPOINTS / BEST


def fit(
    network: Network,
    loss: Loss,
    crops: Crops,
    prepare: Callable[[RawBatch, torch.device], Batch],
    validate: Callable[[Network], Scores],
    settings: FitSettings,
    folder: Path,
    report: Callable[[Record], None] = lambda record: None,
) -> Fitted:
    """Train network (changed in place) and give the averaged weights of its best epoch.

    Step s trains on batch (s * accumulate + a) * n + r of crops, for every a below accumulate, on process r of n.
    prepare makes of a raw batch, on a device, what the network is trained on. validate is called once an epoch, by one
    process, with a network in eval mode on its device, which it must leave as it is; report after it.
    folder gets checkpoints/ and logs/ (metrics.csv and TensorBoard's events). A fit that finds checkpoints there goes
    on from the last.

    Several devices of one machine: this process starts one for each, to which all arguments but report are pickled.
    Several nodes: start a process for every device with torchrun or srun, each of which calls this.
    Raises FitError if a loss or gradient is not finite, a loader dies, or a checkpoint is of another network.
    """
    job = Job(network, loss, crops, prepare, validate, settings, folder)
    if not read_memory(job).done(settings):
        if settings.processes > 1 and not started_from_outside():
            _fit_in_processes(job, report)
        else:
            from .loop import run_loop

            run_loop(job, report)
    memory = read_memory(job)
    best = load_checkpoint(job.best)
    network.cpu().float().load_state_dict(best["network"])
    network.eval().requires_grad_(requires_grad=False)
    return Fitted(network, memory.best(settings.best_by), memory.records, memory.losses)


def read_memory(job: Job) -> Memory:
    """What the last checkpoint remembers; FitError if it is of another network than the job's, or cannot be read."""
    if not job.last.exists():
        return Memory()
    state = load_checkpoint(job.last)
    saved = {name.removeprefix("network."): t for name, t in state["state_dict"].items() if name.startswith("network.")}
    own = job.network.state_dict()
    differences = [
        *(f"{name} is missing" for name in own.keys() - saved.keys()),
        *(f"{name} is not expected" for name in saved.keys() - own.keys()),
        *(
            f"{name} is {tuple(saved[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own.keys() & saved.keys()
            if own[name].shape != saved[name].shape
        ),
    ]
    if differences:
        some = "; ".join(sorted(differences)[:3])
        raise FitError(
            f"{job.last}: of another network than {type(job.network).__name__}: {len(differences)} tensors differ"
            f" ({some}); cure: another folder, or delete {job.last.parent}"
        )
    return memory_of(state)


def memory_of(state: dict[str, Any]) -> Memory:
    """The memory in a checkpoint."""
    kept = state["segpipe"]
    records = tuple(
        Record(**row | {"train": Measures(**row["train"]), "validation": Measures(**row["validation"])})
        for row in kept["records"]
    )
    return Memory(int(state["global_step"]), records, tuple((int(step), float(loss)) for step, loss in kept["losses"]))


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of a fit, on the CPU. FitError if it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise FitError(f"{file}: no checkpoint that can be read ({line}); cure: delete {file.parent}") from None
    return state


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Written beside and renamed into place: a stop never leaves half a checkpoint."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def started_from_outside() -> bool:
    """True in a process that torchrun or srun has started as one of several."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def first_process() -> bool:
    """True in the one process of several that torchrun or srun have started that writes results; else always."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0 or not started_from_outside()


def _fit_in_processes(job: Job, report: Callable[[Record], None]) -> None:
    """Start a process for every device of this machine, and pass their reports on until all have ended."""
    if job.settings.nodes > 1:
        raise FitError(
            f"nodes: {job.settings.nodes}: this is one process; expected one for every device of every node: start"
            f" them with srun, or torchrun --nnodes {job.settings.nodes} --nproc-per-node {job.settings.devices}"
        )
    job.network.cpu()  # to be pickled
    told: multiprocessing.Queue[Record | FitError] = multiprocessing.get_context("spawn").Queue()
    arguments = (job, _free_port(), told)
    processes = start_processes(  # type: ignore[no-untyped-call]  # torch annotates only a part of it
        _fit_as_one_of_several, arguments, job.settings.devices, join=False, start_method="spawn"
    )
    fault: FitError | None = None
    try:
        ended = False
        while not ended:
            ended = processes.join(timeout=0.2)
            fault = _pass_on(told, report) or fault
    except (ProcessRaisedException, ProcessExitedException) as error:
        fault = _pass_on(told, report) or fault
        line = str(error).strip().splitlines()[-1]
        raise fault or FitError(f"a process of a device has ended: {line}; run again to go on") from None
    finally:
        for process in processes.processes:
            process.kill()


def _pass_on(told: multiprocessing.Queue[Record | FitError], report: Callable[[Record], None]) -> FitError | None:
    fault = None
    while True:
        try:
            message = told.get(timeout=0.05)
        except Empty:
            return fault
        if isinstance(message, FitError):
            fault = fault or message
        else:
            report(message)


def _fit_as_one_of_several(rank: int, job: Job, port: int, told: multiprocessing.Queue[Record | FitError]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    from .loop import run_loop

    try:
        run_loop(job, told.put)
    except FitError as error:
        told.put(error)
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
