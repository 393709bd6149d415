"""The story of training, top to bottom: plan, read, split, fit, calibrate, measure. It ends with a bundle for `run`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from segpipe.models.augment import Normalisation, prepare
from segpipe.models.field import Field, probe_field
from segpipe.models.fit import FitError, FitSettings, Fitted, Record, first_process, fit
from segpipe.models.initialise import initialise
from segpipe.models.losses import Loss, LossError, resolve_loss
from segpipe.models.metrics import Scores
from segpipe.models.networks import Network, build_network
from segpipe.models.own_code import in_one_line, is_own
from segpipe.models.predictor import Precision, resolve_device
from segpipe.tasks.errors import RunError, UserError
from segpipe.tasks.sample import SCORED, cut

from .areas import is_read
from .config import TrainConfig, load_train
from .job import TrainJob, check_settings, plan_job, resolve_normalisation, some_of
from .lock import check_lock, locked
from .measure import Eye, View, look, measure
from .pairs import parts_to_read
from .plan import check_output, key_of
from .progress import terminal
from .sources import Sources, check_sources, plan_sources, read_sources
from .split import Split
from .storage import write_bytes
from .train_end import BUNDLE, REPORT, SAMPLES, finish
from .train_report import triptych

CONFIG, SPLIT = "train.yaml", "split.json"
BASIS = "basis.json"
"""What a training is made from besides its settings: a digest of its images and labels, and what `auto` was."""
WAIT_S = 1.0


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Train a network as the configuration says, going on from its last checkpoint; returns the bundle's path.

    Raises UserError before any work for what cannot be trained on, and where the folder holds another training;
    RunError where it fails in the middle: what is done is kept.
    """
    console = console or terminal()
    output = check_output(config.path(config.output))
    check_sources(config)
    check_settings(config)
    _let_import(config)
    loss = new_loss(config)
    sources = plan_sources(config, output / "areas")
    network = new_network(config)
    field = new_field(config, network)
    if first_process():
        data = data_digest(sources)
        output.mkdir(parents=True, exist_ok=True)
        with locked(output) as token:
            check_config(config, output)
            check_data(data, output)
            if (output / REPORT).exists():
                console.print(f"trained already: {output / BUNDLE}", highlight=False, soft_wrap=True)
                return output / BUNDLE
            read_sources(sources, config.readers, console)
            return _train_and_write(config, network, loss, sources, data, field, output, console, token)
    _wait_for(sources)
    job = plan_job(config, network, sources, field)
    _fit(config, job, network, loss, output, Console(quiet=True))
    return output / BUNDLE


def _train_and_write(
    config: TrainConfig,
    network: Network,
    loss: Loss,
    sources: Sources,
    data: str,
    field: Field,
    output: Path,
    console: Console,
    token: str,
) -> Path:
    job = plan_job(config, network, sources, field)
    # Only now: what was refused up to here is mended in the same folder.
    write_bytes(output / CONFIG, config.resolved_yaml().encode())
    keep_split(job.split, output)
    keep_basis(data, job.settings, output)
    for line in _described(job):
        console.print(line, highlight=False, soft_wrap=True)
    fitted = _fit(config, job, network, loss, output, console, token)
    check_lock(output, token)
    return finish(config, job, fitted, loss, output, console)


def new_network(config: TrainConfig) -> Network:
    """The network with its first weights, from the seed. UserError for a name, arguments or weights that do not fit."""
    arguments: dict[str, Any] = {"bands": len(config.bands), "classes": 1, **config.network.args}
    try:
        # What the constructor of a user's own network draws is kept.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.fit.seed)
            network = build_network(config.network.name, **arguments)
    except ValueError as error:
        raise UserError(f"network: {error}") from None
    if config.normalisation != "statistics":
        start(config, network, resolve_normalisation(config, ()))
    return network


def start(config: TrainConfig, network: Network, normalisation: Normalisation) -> None:
    """Give a network its first weights. UserError for weights that do not fit it, or another normalisation."""
    base = config.file.parent.absolute()
    try:
        initialise(network, config.network.initialisation, normalisation.mean, normalisation.std, base, config.fit.seed)
    except (ValueError, OSError) as error:  # BundleError among them
        raise UserError(f"network.initialisation: {error}") from None


def new_field(config: TrainConfig, network: Network) -> Field:
    """How far the network sees. UserError for a user's own that fails, or gives logits of another height or width."""
    try:
        return probe_field(network, network.stride, len(config.bands))
    except Exception as error:
        if not is_own(config.network.name):
            raise
        raise UserError(f"network: {config.network.name} cannot be run: {in_one_line(error)}") from error


def new_loss(config: TrainConfig) -> Loss:
    """The loss. UserError for a name or arguments that are not known."""
    try:
        return resolve_loss(config.fit.loss, config.fit.args)
    except LossError as error:
        raise UserError(f"fit.loss: {error}") from None


def _let_import(config: TrainConfig) -> None:
    """Let a network or loss of the user's own be imported from the YAML's folder, as from an installed package."""
    folder = str(config.file.parent.absolute())
    if (is_own(config.network.name) or is_own(config.fit.loss)) and folder not in sys.path:
        sys.path.insert(0, folder)


def _wait_for(sources: Sources) -> None:
    """Wait until the first process has read everything."""
    while not all(is_read(plan) for plan in sources.areas):
        time.sleep(WAIT_S)
    while sources.pairs is not None and parts_to_read(sources.pairs):
        time.sleep(WAIT_S)


def check_config(config: TrainConfig, output: Path) -> None:
    """UserError where the training that is to go on, or is done, has other settings, but for what changes nothing."""
    path = output / CONFIG
    if path.exists() and _deciding(path) != config.deciding():
        raise UserError(f"{path}: of another training; expected the same settings to go on; cure: another `output:`")


def _deciding(path: Path) -> dict[str, Any] | None:
    """What decides a training, of the configuration in its folder; None for one that is not understood."""
    try:
        return load_train(path).deciding()
    except UserError:
        return None


def keep_split(split: Split, output: Path) -> None:
    """Write which part each name is in, or compare with that of the training that is to go on."""
    path, text = output / SPLIT, json.dumps({"gap_px": split.gap_px, **split.names}, ensure_ascii=False, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: of other areas than there are now; expected the same; cure: another `output:`")
    write_bytes(path, text.encode())


def data_digest(sources: Sources) -> str:
    """Of the files that all areas and pairs are read from, and how: another one where an image or label has changed."""
    pairs = sources.pairs
    parts = [] if pairs is None else [pairs.key(part) for part in pairs.parts]
    return key_of([plan.key for plan in sources.areas], parts)


def check_data(data: str, output: Path) -> None:
    """UserError where the training that is to go on, or is done, has another digest of its images and labels."""
    if _basis(output).get("data", data) != data:
        raise UserError(
            f"{output / BASIS}: of other images or labels than there are now, or of a version that reads them"
            " otherwise; expected the same; cure: another `output:`"
        )


def keep_basis(data: str, settings: FitSettings, output: Path) -> None:
    """Write what the training is made from. UserError where `auto` was something else when it began."""
    found = {"precision": settings.precision, "steps_per_epoch": settings.steps_per_epoch}
    known = _basis(output)
    for name, value in found.items():
        if known.get(name, value) != value:
            raise UserError(
                f"{output / BASIS}: {name} was {known[name]}, and is {value} on this machine; expected the same to go"
                " on; cure: a machine such as the first, or another `output:`"
            )
    write_bytes(output / BASIS, json.dumps({"data": data, **found}, indent=1).encode())


def _basis(output: Path) -> Mapping[str, Any]:
    """What is written of the training that is to go on; nothing of one that has not begun, or of an older version."""
    path = output / BASIS
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known


@dataclass(frozen=True)
class Validate:
    """Measures a network on the validating part, and leaves a picture of what it makes of one window of it."""

    views: tuple[View, ...]
    normalisation: Normalisation
    halo_px: int
    precision: Precision
    batch: int
    loss: Loss
    sample: View
    threshold: float
    folder: Path

    def __call__(self, network: Network) -> Scores:
        """Scores of all windows."""
        device = next(network.parameters()).device
        eye = Eye(network, self.normalisation, self.halo_px, device, self.precision)
        scores = measure(eye, self.views, self.batch, self.loss)
        for seen in look(eye, [self.sample], 1):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / "next.jpg", triptych(seen[0], self.threshold))
        return scores


def _described(job: TrainJob) -> list[str]:
    parts = []
    for part, areas in (("train", job.split.train), ("validate", job.split.validate), ("test", job.split.test)):
        if areas:
            valid, positive = (
                sum(getattr(area, name) for area in areas) for name in ("valid_pixels", "positive_pixels")
            )
            parts.append(f"{part}: {len(areas)} with {valid:,} labelled pixels, {positive / valid:.1%} buildings")
    empty = [area.name for area in (*job.split.train, *job.split.validate) if not area.positive_pixels]
    if empty:
        parts.append(f"no building in {some_of(empty)}")
    settings = job.settings
    return [*parts, f"{settings.epochs} epochs of {settings.steps_per_epoch} steps, {settings.precision}"]


def _fit(
    config: TrainConfig,
    job: TrainJob,
    network: Network,
    loss: Loss,
    output: Path,
    console: Console,
    token: str = "",
) -> Fitted:
    """token: of the lock on the output, which is looked at after each epoch; an empty text: nobody asks."""
    if config.normalisation == "statistics":
        start(config, network, job.normalisation)
    samples = output / SAMPLES
    validate = Validate(
        job.views,
        job.normalisation,
        job.halo_px,
        job.precision,
        config.fit.batch,
        loss,
        _with_buildings(job.views),
        config.threshold or 0.5,
        samples,
    )

    def told(record: Record) -> None:
        check_lock(output, token)
        found = record.validation
        console.print(
            f"epoch {record.epoch}: loss {record.train.loss:.4f}, validation {found.loss:.4f}, IoU {found.iou:.4f} at"
            f" {found.threshold:.2f}, {record.train_seconds + record.validation_seconds:.0f} s",
            highlight=False,
        )
        if (samples / "next.jpg").exists():
            (samples / "next.jpg").replace(samples / f"epoch{record.epoch:04}.jpg")

    prepared = partial(prepare, framing=job.framing, normalisation=job.normalisation, augmentation=job.augmentation)
    try:
        return fit(network.to(resolve_device()), loss, job.crops, prepared, validate, job.settings, output, told)
    except FitError as error:
        raise RunError(str(error)) from None


def _with_buildings(views: Sequence[View]) -> View:
    """The first view from the middle on whose labels are neither all ground nor all building."""
    middle = len(views) // 2
    for view in (*views[middle:], *views[:middle]):
        _, label_HW, valid_HW = cut(view.area, view.core)
        share = label_HW[valid_HW == SCORED].mean() if (valid_HW == SCORED).any() else 0.0
        if 0.05 < share < 0.95:
            return view
    return views[middle]
