"""The training loop, on Lightning: this module alone imports it, and is imported only to train.

To Lightning all training is one epoch over an endless stream of batches; where our epochs end is told from the step.
So the stream never stops at the end of an epoch, and starts at any step. Axes: B batch, K classes, H rows, W columns.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from .augment import Batch, RawBatch
from .fit import (
    Crops,
    FitError,
    FitSettings,
    Job,
    Memory,
    Record,
    load_checkpoint,
    memory_of,
    save_checkpoint,
    started_from_outside,
)
from .metrics import Measures, Scores, score
from .networks import Network

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float64": "64-true"}
LONGEST_VALIDATION = timedelta(hours=12)
"""So long the other processes wait for the one that validates."""

Item = tuple[int, Batch]


def run_loop(job: Job, report: Callable[[Record], None]) -> None:
    """Train from the last checkpoint to the end, in this process. FitError as `fit` says."""
    settings = job.settings
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    compute_repeatably()
    loop = Loop(job, report)
    on_gpu = torch.cuda.is_available()
    several = DDPStrategy(process_group_backend="nccl" if on_gpu else "gloo", timeout=LONGEST_VALIDATION)
    interrupted = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        # What an interrupted fit has logged since its checkpoint is to go.
        warnings.filterwarnings("ignore", "Experiment logs directory")
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # of Lightning's own doing
        trainer = Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=settings.devices,
            num_nodes=settings.nodes,
            strategy=several if settings.processes > 1 else "auto",
            precision=PRECISIONS[settings.precision],  # type: ignore[arg-type]  # a dictionary's values are no literals
            max_epochs=-1,
            max_steps=settings.steps,
            accumulate_grad_batches=settings.accumulate,
            logger=[
                CSVLogger(job.folder, name="logs", version="", flush_logs_every_n_steps=1),
                TensorBoardLogger(job.folder, name="logs", version="", purge_step=loop.memory.step + 1),
            ],
            # Lightning would take the variables of a batch job for its own, where one process of it trains alone.
            plugins=[WholeFiles(), *([] if _environment_is_others(settings) else [LightningEnvironment()])],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(loop, ckpt_path=job.last if loop.memory.step else None, weights_only=True)
        except SystemExit:
            raise KeyboardInterrupt from None  # which Lightning makes this of
        except Exception as error:
            died = _told_of_loader(error, settings.loaders)
            if died is None:
                raise
            raise FitError(
                f"a process that reads crops has died: loader {died}; cure: more memory or fewer loaders, or, in"
                f" another `output:`, a smaller batch; {loop.kept()}"
            ) from None
        finally:
            signal.signal(signal.SIGINT, interrupted)  # Lightning leaves it ignored


def _told_of_loader(error: BaseException, loaders: int) -> str | None:
    """What became of a process that reads crops; None for an error that tells of none."""
    if loaders and isinstance(error, ConnectionError | EOFError):
        # It died while it handed over a crop, and that was noticed before the signal came.
        return f"hung up: {str(error) or type(error).__name__}"
    # Torch raises it wherever this process happens to be when the signal of a child's death comes, also in what makes
    # another error of any.
    behind: BaseException | None = error
    while behind is not None:
        _, told, died = str(behind).partition("DataLoader worker")
        if told:
            return died.splitlines()[0].strip(" .")
        behind = behind.__cause__ or behind.__context__
    return None


def _environment_is_others(settings: FitSettings) -> bool:
    return settings.processes > 1 and started_from_outside()


class WholeFiles(CheckpointIO):
    """Checkpoints that are whole or not there, and are read without running what is in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside, and rename it into place."""
        save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint, on the CPU."""
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class Loop(LightningModule):
    """What Lightning is to do at each step: the network being trained, its averaged weights, and what was measured."""

    def __init__(self, job: Job, report: Callable[[Record], None]) -> None:
        super().__init__()
        self.job, self.settings, self.report = job, job.settings, report
        self.memory = memory_of(load_checkpoint(job.last)) if job.last.exists() else Memory()
        self.network = job.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
        freeze(self.network, self.settings)
        self.averaged: Network | None = None
        if self.settings.average != "none":
            self.averaged = copy.deepcopy(self.network).requires_grad_(requires_grad=False)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.scores = Scores.empty()
        self.seconds = 0.0
        # Of the batches since the loss was last looked at: their numbers, losses and gradients' lengths, on the device.
        self.batches: list[int] = []
        self.losses: list[Tensor] = []
        self.lengths: list[Tensor] = []

    def train(self, mode: bool = True) -> Loop:
        """Training mode, but for what has statistics that are not to change."""
        super().train(mode)
        if self.averaged is not None:
            self.averaged.eval()
        keep_statistics(self.network, self.settings)
        return self

    def train_dataloader(self) -> Feed:
        """Batches from the first that was not trained on."""
        world = self.trainer.world_size
        start = self.trainer.global_step * self.settings.accumulate
        return Feed(self.job.crops, start * world + self.trainer.global_rank, world, self.settings.loaders, self.kept)

    def on_after_batch_transfer(self, batch: tuple[int, RawBatch], dataloader_idx: int) -> Item:
        """Raw crops that are on the device to what the network is trained on."""
        index, raw = batch
        with torch.no_grad():
            return index, self.job.prepare(raw, self.device)

    def on_train_start(self) -> None:
        """Note the time, and write again into the log what a fit that was stopped had logged up to its checkpoint."""
        self.train()
        self.pairs = (
            list(zip(tensors_of(self.averaged), tensors_of(self.network), strict=True)) if self.averaged else []
        )
        self.scores = self.scores.to(self.device)
        self.began = self.saved = time.monotonic()
        ends = {record.step: record for record in self.memory.records}
        for step, loss in self.memory.losses:
            self.loggers[0].log_metrics(self._numbers_of_step(step, loss), step)
            if step in ends:
                self.loggers[0].log_metrics(_numbers_of_epoch(ends[step]), step)

    def training_step(self, item: Item, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        index, batch = item
        # Networks that draw (dropout) draw the same when a step is done again.
        torch.manual_seed(hash((self.settings.seed, index)))
        logits_BKHW = self.network(batch.image_BCHW.to(self.dtype))
        loss = self.job.loss(logits_BKHW, batch.target_BKHW, batch.valid_BHW)
        self.batches.append(index)
        self.losses.append(loss.detach())
        prob_BKHW = torch.sigmoid(logits_BKHW.detach().float())
        self.scores = self.scores + score(prob_BKHW, batch.target_BKHW, batch.valid_BHW, loss)
        return loss

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Shorten the gradient, all parameters together; how long it was is looked at later."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        length = nn.utils.get_total_norm(gradients)
        self.lengths.append(length)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), self.settings.clip_norm, length)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, and the schedule step by step."""
        optimiser = make_optimiser(self.network, self.settings)
        schedule = LambdaLR(optimiser, self.settings.rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step: average the weights; now and then look at the losses, validate, and write a checkpoint."""
        if (batch_idx + 1) % self.settings.accumulate:
            return
        step = self.trainer.global_step
        if self.averaged is not None:
            average_weights(self.pairs, self.settings.weight_of_new(step - 1))
        ends = step % self.settings.steps_per_epoch == 0
        if ends or step % self.settings.log_every == 0:
            self._look(step)
            if ends:
                self._end_epoch(step)
            if ends or self._agreed(time.monotonic() - self.saved >= self.settings.checkpoint_s):
                self._gather()
                self.trainer.save_checkpoint(self.job.last)
                self.saved = time.monotonic()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of."""
        checkpoint["segpipe"] = {
            "records": [asdict(record) for record in self.memory.records],
            "losses": list(self.memory.losses),
            "scores": [tensor.cpu() for tensor in self.scores.tensors],
            "seconds": self.seconds + time.monotonic() - self.began,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again: what was measured in an epoch that had not ended is with the first process."""
        if self.trainer.is_global_zero:
            self.scores = Scores.of_tensors(tuple(checkpoint["segpipe"]["scores"]))
        self.seconds = float(checkpoint["segpipe"]["seconds"])

    def kept(self) -> str:
        """How to go on, for the ends of messages."""
        step = int(load_checkpoint(self.job.last)["global_step"]) if self.job.last.exists() else 0
        return f"run again to go on from step {step}" if step else "no checkpoint was written yet"

    def _look(self, step: int) -> None:
        """Stop at a loss or gradient that is not finite; else log the mean loss. Here a GPU is waited for."""
        losses, lengths = torch.stack(self.losses).tolist(), torch.stack(self.lengths).tolist()
        for number, (index, loss) in enumerate(zip(self.batches, losses, strict=True)):
            length = lengths[number // self.settings.accumulate]
            if not (math.isfinite(loss) and math.isfinite(length)):
                at = step - len(lengths) + number // self.settings.accumulate + 1
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {length}"
                # Processes share their losses, so that all of them meet what is wrong with the batch of one.
                first, more = index - self.trainer.global_rank, self.trainer.world_size - 1
                named = f"batches {first} to {first + more}" if more else f"batch {first}"
                raise FitError(
                    f"{what} at step {at}, {named}; a lower learning rate or clip_norm, in another `output:`, may help;"
                    f" {self.kept()}",
                    first,
                )
        self.batches, self.losses, self.lengths = [], [], []
        mean = sum(losses) / len(losses)
        self.memory = Memory(step, self.memory.records, (*self.memory.losses, (step, mean)))
        for logger in self.loggers:
            logger.log_metrics(self._numbers_of_step(step, mean), step)

    def _numbers_of_step(self, step: int, loss: float) -> dict[str, float]:
        return {"train/loss": loss, "learning_rate": self.settings.learning_rate * self.settings.rate(step - 1)}

    def _end_epoch(self, step: int) -> None:
        self._gather()
        seconds = self.seconds + time.monotonic() - self.began
        self.began, self.seconds = time.monotonic(), 0.0
        shown = self.network if self.averaged is None else self.averaged
        mine = self._validated(shown) if self.trainer.is_global_zero else Scores.empty().measures()
        validation = self.trainer.strategy.broadcast(mine)
        record = Record(
            epoch=step // self.settings.steps_per_epoch,
            step=step,
            learning_rate=self.settings.learning_rate * self.settings.rate(step - 1),
            train=self.trainer.strategy.broadcast(self.scores.measures(validation.threshold)),
            validation=validation,
            train_seconds=seconds,
            validation_seconds=time.monotonic() - self.began,
        )
        self.scores = Scores.empty().to(self.device)
        self.memory = Memory(step, (*self.memory.records, record), self.memory.losses)
        if self.memory.best(self.settings.best_by) is record and self.trainer.is_global_zero:
            save_checkpoint(self.job.best, {"network": shown.state_dict(), "record": asdict(record)})
        for logger in self.loggers:
            logger.log_metrics(_numbers_of_epoch(record), step)
        if self.memory.done(self.settings):
            self.trainer.should_stop = True
        if self.trainer.is_global_zero:
            self.report(record)
        self.train()
        self.began = time.monotonic()

    @torch.no_grad()
    def _validated(self, shown: Network) -> Measures:
        threads = torch.get_num_threads()
        measures = self.job.validate(shown.eval()).measures(self.settings.threshold)
        torch.set_num_threads(threads)  # on which the last bits of what is trained depend
        return measures

    def _gather(self) -> None:
        """Bring what was measured by all processes together, to the first of them."""
        if self.trainer.world_size > 1:
            for tensor in self.scores.tensors:
                dist.all_reduce(tensor)
            if not self.trainer.is_global_zero:
                self.scores = Scores.empty().to(self.device)

    def _agreed(self, here: bool) -> bool:
        """What the first process says, in all of them."""
        return bool(self.trainer.strategy.broadcast(here)) if self.trainer.world_size > 1 else here


def make_optimiser(network: Network, settings: FitSettings) -> torch.optim.Optimizer:
    """The optimiser of all that learns; the encoder has a rate of its own, biases and norms no weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    encoder_rate = settings.encoder_learning_rate or settings.learning_rate
    for name, parameter in network.named_parameters():
        rate = encoder_rate if name.startswith(network.encoder_prefix) else settings.learning_rate
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        if parameter.requires_grad:
            groups.setdefault((rate, decay), []).append(parameter)
    parameters = [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
    eps: dict[str, Any] = {} if settings.eps is None else {"eps": settings.eps}
    if settings.optimiser == "adam":
        return torch.optim.Adam(parameters, **eps)
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(parameters, **eps)
    if settings.optimiser == "rmsprop":
        return torch.optim.RMSprop(parameters, alpha=settings.alpha, momentum=settings.momentum, **eps)
    return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum)


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


@torch.no_grad()
def average_weights(pairs: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
    """Move the first of each pair towards the second by a share; whole numbers, which count something, are copied."""
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([old for old, _ in floats], [new for _, new in floats], share)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


def compute_repeatably() -> None:
    """What is computed with TF32, or by whichever kernel was fastest, would not be computed so again."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def keep_statistics(network: Network, settings: FitSettings) -> None:
    """Of a network in training mode put into eval mode what has statistics that are not to change."""
    if settings.frozen_statistics or settings.freeze_encoder:
        for name, layer in network.named_modules():
            if name.startswith(network.encoder_prefix) and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()


def freeze(network: Network, settings: FitSettings) -> None:
    """Let all weights learn but those that `freeze_encoder` keeps. FitError where it has no encoder."""
    network.requires_grad_(requires_grad=True)
    encoder = [p for name, p in network.named_parameters() if name.startswith(network.encoder_prefix)]
    if settings.freeze_encoder and not encoder:
        raise FitError(f"freeze_encoder: {type(network).__name__} has no encoder; expected a network with one")
    for parameter in encoder:
        parameter.requires_grad_(not settings.freeze_encoder)


def _numbers_of_epoch(record: Record) -> dict[str, float]:
    """An epoch's numbers by name, as they go into the logs."""
    rows = {"epoch": float(record.epoch)}
    for part, measures in (("train_epoch", record.train), ("validation", record.validation)):
        rows |= {f"{part}/{name}": value for name, value in asdict(measures).items() if name != "notes"}
    return rows


@dataclass(frozen=True)
class Unread:
    """A batch that could not be read, in place of one: what happened in the process that tried."""

    index: int
    reason: str


class Numbered(Dataset[tuple[int, RawBatch] | Unread]):
    """Crops with the numbers of their batches."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __getitem__(self, index: int) -> tuple[int, RawBatch] | Unread:
        try:
            return index, self.crops[index]
        except Exception as error:  # of whatever kind: torch would pass it on as pages of a traceback
            return Unread(index, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Feed:
    """Raw batches start, start + every, start + 2 every and so on, without end, read ahead by other processes."""

    crops: Crops
    start: int
    every: int
    loaders: int
    kept: Callable[[], str]

    def __iter__(self) -> Iterator[tuple[int, RawBatch]]:
        loader = DataLoader(
            Numbered(self.crops),
            batch_size=None,
            sampler=itertools.count(self.start, self.every),
            num_workers=self.loaders,
            # A forked process would have the locks, but not the threads, of those that read chunks and objects here.
            multiprocessing_context="spawn" if self.loaders else None,
            pin_memory=torch.cuda.is_available(),
        )
        items = iter(loader)
        try:
            for item in items:
                if isinstance(item, Unread):
                    reason = f"batch {item.index} of crops cannot be read: {item.reason}"
                    raise FitError(f"{reason}; {self.kept()}", item.index)
                yield item
        finally:
            # Torch ends the processes when nothing refers to them any more, which an error's traceback does.
            if self.loaders:
                items._shutdown_workers()  # type: ignore[attr-defined]  # it has no public name
