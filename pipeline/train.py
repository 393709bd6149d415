"""The story of training, top to bottom: plan, read, split, fit, calibrate, measure. It ends with a bundle for `run`."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from segpipe.models.augment import Augmentation, Framing, Normalisation, RawBatch, prepare
from segpipe.models.calibrate import LogitHistogram, calibration_error, fit_temperature, logit_histogram, reliability
from segpipe.models.field import Field, probe_field
from segpipe.models.fit import FitError, FitSettings, Fitted, Record, first_process, fit
from segpipe.models.initialise import initialise
from segpipe.models.losses import Loss, LossError, resolve_loss
from segpipe.models.metrics import Scores
from segpipe.models.networks import Network, build_network, is_own
from segpipe.models.predictor import Precision, fast_bfloat16, resolve_device
from segpipe.models.weights import IMAGENET_MEAN, IMAGENET_STD, Card, save_bundle
from segpipe.tasks.errors import RunError, UserError
from segpipe.tasks.sample import SCORED, Area, CropSampler, cores, cut, permutation

from .areas import AreaPlan, common_resolution, is_read, open_area, pixels_of, plan_area, plan_inria, write_area
from .cluster import call_each
from .config import AreaConfig, StatisticsConfig, TrainConfig
from .measure import Eye, Seen, View, count_logits, effective_halo, look, measure, plan_views
from .pairs import PairsPlan, open_pairs, parts_to_read, plan_pairs, write_part
from .plan import allowance, check_output
from .progress import terminal
from .split import Split, split_areas
from .store import locked, write_bytes
from .train_report import Example, TrainReport, triptych, write_train_report

BUNDLE, REPORT, SPLIT, SAMPLES = "model.safetensors", "report.html", "split.json", "samples"
ALONE_PX = 30_000_000
"""Areas of fewer pixels in all are read in this process: workers take longer to start."""
MOST_LOADERS = 8
MOST_NAMED = 50
"""Areas whose scores are named in the bundle one by one."""
EXAMPLES = 3
"""Best and worst crops in the report, each."""
ANY_RESOLUTION_M = (0.001, 1.0, 1000.0)
"""Of what has no scale: the least, the one stated, and the most metres of a pixel."""
WAIT_S = 1.0
UNBOUNDED_HALO_PX = 256
"""Context of the cores that are measured where the network's field has no bound."""


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Train a network as the configuration says, going on from its last checkpoint; returns the bundle's path.

    Raises UserError before any work for what cannot be trained on, and where the folder holds another training;
    RunError where it fails in the middle: what is done is kept.
    """
    console = console or terminal()
    output = check_output(config.path(config.output))
    _check_sources(config)
    _let_import(config)
    network, loss = new_network(config), new_loss(config)
    sources = plan_sources(config, output / "areas")
    field = probe_field(network, network.stride, len(config.bands))
    if first_process():
        output.mkdir(parents=True, exist_ok=True)
        with locked(output):
            keep_config(config, output)
            if (output / REPORT).exists():
                console.print(f"trained already: {output / BUNDLE}", highlight=False, soft_wrap=True)
                return output / BUNDLE
            read_sources(sources, config.readers, console)
            return _train_and_write(config, network, loss, sources, field, output, console)
    _wait_for(sources)
    job = plan_job(config, network, sources, field)
    _fit(config, job, network, loss, output, Console(quiet=True))
    return output / BUNDLE


def _train_and_write(
    config: TrainConfig,
    network: Network,
    loss: Loss,
    sources: Sources,
    field: Field,
    output: Path,
    console: Console,
) -> Path:
    began = time.monotonic()
    job = plan_job(config, network, sources, field)
    keep_split(job.split, output)
    for line in _described(job):
        console.print(line, highlight=False, soft_wrap=True)
    fitted = _fit(config, job, network, loss, output, console)
    return finish(config, job, fitted, loss, sources, output, console, time.monotonic() - began)


# What is trained


def new_network(config: TrainConfig) -> Network:
    """The network with its first weights. UserError for a name, arguments or weights that do not fit."""
    normalisation = config.normalisation
    settled = Normalisation() if normalisation == "statistics" else resolve_normalisation(config, ())
    arguments: dict[str, Any] = {"bands": len(config.bands), "classes": 1, **config.network.args}
    try:
        network = build_network(config.network.name, **arguments)
        base = config.file.parent.absolute()
        initialise(network, config.network.initialisation, settled.mean, settled.std, base, config.fit.seed)
    except (ValueError, OSError) as error:  # BundleError among them
        raise UserError(f"network: {error}") from None
    return network


def new_loss(config: TrainConfig) -> Loss:
    """The loss. UserError for a name or arguments that are not known."""
    try:
        return resolve_loss(config.fit.loss, config.fit.args)
    except LossError as error:
        raise UserError(f"fit.loss: {error}") from None


def _let_import(config: TrainConfig) -> None:
    """Let a network or loss of the user's own be imported from the YAML's folder, as from an installed package."""
    folder = str(config.file.parent.absolute())
    if (is_own(config.network.name) or ":" in config.fit.loss) and folder not in sys.path:
        sys.path.insert(0, folder)


# What it is trained on


@dataclass(frozen=True)
class Sources:
    """All that is to be read: areas by part (those to be split are in train), and pairs, which always are."""

    train: tuple[AreaPlan, ...]
    validate: tuple[AreaPlan, ...]
    test: tuple[AreaPlan, ...]
    pairs: PairsPlan | None

    @property
    def areas(self) -> tuple[AreaPlan, ...]:
        """Of all parts."""
        return (*self.train, *self.validate, *self.test)


def _check_sources(config: TrainConfig) -> None:
    """UserError for keys that do not go together."""
    file, rule = config.file, config.split
    if not config.areas and config.inria is None and config.pairs is None:
        raise UserError(f"{file}: areas: missing; expected `areas:`, `inria:` or `pairs:`")
    held_out = bool(config.validate_on) or config.inria is not None or rule.validate_part is not None
    if not held_out:
        raise UserError(f"{file}: validate: missing; expected a list of areas, or `split: {{validate: 0.2}}`")
    if rule.validate_part is not None and config.validate_on:
        raise UserError(f"{file}: validate and split.validate: both are given; expected one of them")
    if rule.test is not None and config.test_on:
        raise UserError(f"{file}: test and split.test: both are given; expected one of them")
    resized = config.pairs is not None and config.pairs.resize_px is not None
    if resized and (config.areas or config.inria is not None or config.validate_on or config.test_on):
        raise UserError(f"{file}: pairs.resize_px: also areas are named, which are not resized; expected pairs alone")
    if resized and rule.by != "area":
        raise UserError(f"{file}: split.by: {rule.by}; expected area (a pair is one) where pairs are resized")


def plan_sources(config: TrainConfig, folder: Path) -> Sources:
    """Find all files and place them. UserError for what does not fit."""

    def planned(part: str, areas: Sequence[AreaConfig]) -> list[AreaPlan]:
        return [plan_area(config, area, folder / f"{part}{number}") for number, area in enumerate(areas)]

    trained, validating = planned("train", config.areas), planned("validate", config.validate_on)
    if config.inria is not None:
        more, held_out = plan_inria(config, folder / "inria")
        if config.split.validate_part is not None:
            more, held_out = more + held_out, []
        trained, validating = trained + more, validating + held_out
    pairs = None if config.pairs is None else plan_pairs(config, folder / "pairs")
    if not trained and pairs is None:
        raise UserError("inria: every tile validates; expected some to train on, with numbers above 5")
    tested = planned("test", config.test_on)
    return Sources(_named_apart(trained), _named_apart(validating), _named_apart(tested), pairs)


def _named_apart(plans: Sequence[AreaPlan]) -> tuple[AreaPlan, ...]:
    """Names of their own for areas whose first tiles are named alike."""
    seen: dict[str, int] = {}
    named = []
    for plan in plans:
        seen[plan.name] = seen.get(plan.name, 0) + 1
        named.append(plan if seen[plan.name] == 1 else replace(plan, name=f"{plan.name}-{seen[plan.name]}"))
    return tuple(named)


def read_sources(sources: Sources, readers: int | str, console: Console) -> None:
    """Read into chunks what is not there yet, on worker processes if it is much."""
    plans = [plan for plan in sources.areas if not is_read(plan)]
    pairs = sources.pairs
    parts = [] if pairs is None else parts_to_read(pairs)
    pixels = pixels_of(plans) + (0 if pairs is None else sum(len(part) for part in parts) * pairs.chunk_px**2)
    workers = (allowance()[0] if pixels > ALONE_PX else 1) if isinstance(readers, str) else readers
    if plans or parts:
        console.print(f"reading {pixels / 1e6:,.1f} Mpx into chunks, {workers} at once", highlight=False)
    for _ in call_each(write_area, [(plan,) for plan in plans], workers):
        pass
    for _ in call_each(write_part, [(pairs, part) for part in parts], workers):
        pass


def _wait_for(sources: Sources) -> None:
    """Wait until the first process has read everything."""
    while not all(is_read(plan) for plan in sources.areas):
        time.sleep(WAIT_S)
    while sources.pairs is not None and parts_to_read(sources.pairs):
        time.sleep(WAIT_S)


def keep_config(config: TrainConfig, output: Path) -> None:
    """Write the resolved configuration, or compare with the one of the training that is to go on."""
    text, path = config.resolved_yaml(), output / "train.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: of another training; expected the same settings to go on; cure: another `output:`")
    write_bytes(path, text.encode())


def keep_split(split: Split, output: Path) -> None:
    """Write which part each name is in, or compare with that of the training that is to go on."""
    path, text = output / SPLIT, json.dumps({"gap_px": split.gap_px, **split.names}, ensure_ascii=False, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: of other areas than there are now; expected the same; cure: another `output:`")
    write_bytes(path, text.encode())


# The job


@dataclass(frozen=True)
class TrainJob:
    """All that is decided before the first step."""

    split: Split
    normalisation: Normalisation
    framing: Framing
    augmentation: Augmentation | None
    settings: FitSettings
    crops: Batches
    views: tuple[View, ...]
    halo_px: int
    card: Card


def plan_job(config: TrainConfig, network: Network, sources: Sources, field: Field) -> TrainJob:
    """Open what is read, split it, and decide. UserError for data that nothing can be learned from."""
    split = _split(config, sources, field.halo_px)
    normalisation = resolve_normalisation(config, split.train)
    resize = None if config.pairs is None else config.pairs.resize_px
    framing = Framing(
        resize or (config.fit.crop_px, config.fit.crop_px),
        network.border_px,
        network.stride,
        network.remainder_px,
    )
    augmentation = resolve_augmentation(config)
    if augmentation is not None and len(set(framing.crop_yx)) > 1:
        raise UserError("augment: crops are turned, so they have to be square; expected `augment: none`")
    margin = 0 if augmentation is None else augmentation.margin_px(max(framing.seen_yx))
    sampler = CropSampler(split.train, framing.crop_yx, framing.border_px + margin)
    only_pairs = sources.pairs is not None and not sources.areas
    order = config.pairs.draw if only_pairs and config.pairs is not None else "weighted"
    job = config.fit
    pixels = sum(area.valid_pixels for area in split.train)
    units = len(split.train) if only_pairs else math.ceil(pixels / math.prod(framing.crop_yx))
    batches = math.ceil(units / job.batch)
    settings = resolve_settings(config, batches)
    per_epoch = settings.steps_per_epoch * settings.accumulate * settings.processes
    views = tuple(plan_views(split.validate, None if job.validate_px == "all" else job.validate_px))
    return TrainJob(
        split,
        normalisation,
        framing,
        augmentation,
        settings,
        Batches(sampler, job.batch, job.seed, order, per_epoch),
        views,
        UNBOUNDED_HALO_PX if field.halo_px is None else field.halo_px,
        draft_card(config, network, sources, normalisation, field),
    )


def _split(config: TrainConfig, sources: Sources, halo_px: int | None) -> Split:
    areas = [open_area(plan) for plan in sources.train]
    areas += [] if sources.pairs is None else open_pairs(sources.pairs)
    split = split_areas(config, areas, halo_px or 0)
    validating = (*split.validate, *(open_area(plan) for plan in sources.validate))
    tested = (*split.test, *(open_area(plan) for plan in sources.test))
    names = split.names | {
        "validate": [*split.names["validate"], *(plan.name for plan in sources.validate)],
        "test": [*split.names["test"], *(plan.name for plan in sources.test)],
    }
    for part, held in (("areas", split.train), ("validate", validating)):
        if not any(area.positive_pixels for area in held):
            raise UserError(
                f"{part}: none of {len(held)} has a building pixel; expected some; cure: `foreground:`, if the masks"
                " have other values"
            )
    return replace(split, validate=validating, test=tested, names=names)


def resolve_normalisation(config: TrainConfig, areas: Sequence[Area]) -> Normalisation:
    """ImageNet's normalisation, x / 255, the one given, or mean and deviation of the areas' labelled pixels."""
    wanted, bands = config.normalisation, len(config.bands)
    if isinstance(wanted, StatisticsConfig):
        if not len(wanted.mean) == len(wanted.std) == bands:
            raise UserError(
                f"normalisation: {len(wanted.mean)} means and {len(wanted.std)} deviations; expected {bands}"
            )
        return Normalisation(255.0, wanted.mean, wanted.std)
    if wanted == "imagenet":
        if bands != len(IMAGENET_MEAN):
            raise UserError(f"normalisation: imagenet has 3 bands, not {bands}; expected unit, statistics, or numbers")
        return Normalisation(255.0, IMAGENET_MEAN, IMAGENET_STD)
    if wanted == "unit":
        return Normalisation(255.0, (0.0,) * bands, (1.0,) * bands)
    return _statistics(areas)


def _statistics(areas: Sequence[Area]) -> Normalisation:
    """Mean and deviation of each band, of values over 255, from whole sums: in any order the same."""
    sums: Any = 0
    for area in areas:
        for core in cores(area, 2048):
            image_CHW, _, valid_HW = cut(area, core)
            values = image_CHW[:, valid_HW == SCORED].astype(np.int64)
            sums = sums + np.stack([np.full(len(values), values.shape[1]), values.sum(1), (values**2).sum(1)])
    count, total, squares = (row.astype(np.float64) for row in sums)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
    return Normalisation(255.0, tuple((mean / 255).round(6).tolist()), tuple((std / 255).round(6).tolist()))


def resolve_augmentation(config: TrainConfig) -> Augmentation | None:
    """The augmentation; None: crops as they are. UserError for a key that it does not have."""
    wanted = config.augment
    if wanted == "none":
        return None
    given = {} if isinstance(wanted, str) else wanted
    known = {field.name: getattr(Augmentation(), field.name) for field in fields(Augmentation)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"augment.{key}: unknown key; known here: {', '.join(sorted(known))}")
        pair = isinstance(known[key], tuple)
        numbers = value if isinstance(value, list) else [value]
        fits = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        if not fits or pair != isinstance(value, list) or (pair and len(numbers) != 2):
            raise UserError(f"augment.{key}: found {value}; expected {'two numbers' if pair else 'a number'}")
        values[key] = tuple(numbers) if pair else value
    try:
        return Augmentation(**values)
    except ValueError as error:
        raise UserError(f"augment: {error}") from None


def resolve_settings(config: TrainConfig, batches: int) -> FitSettings:
    """The optimisation. batches: as many as go through the data once."""
    job = config.fit
    device = resolve_device()
    each = job.accumulate * job.devices * job.nodes
    steps = math.ceil(batches / each) if job.steps_per_epoch == "auto" else job.steps_per_epoch
    precision = ("bfloat16" if fast_bfloat16(device) else "float32") if job.precision == "auto" else job.precision
    trained = config.network.initialisation not in ("lecun", "default")
    frozen = trained if config.network.frozen_statistics == "auto" else config.network.frozen_statistics
    processors = os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0))
    loaders = min(MOST_LOADERS, max(1, (processors or 1) // 2)) if job.loaders == "auto" else job.loaders
    try:
        return FitSettings(
            epochs=job.epochs,
            steps_per_epoch=steps,
            optimiser=job.optimiser,
            learning_rate=job.learning_rate,
            encoder_learning_rate=job.encoder_learning_rate,
            momentum=job.momentum,
            alpha=job.alpha,
            eps=job.eps,
            weight_decay=job.weight_decay,
            schedule=job.schedule,
            warmup_steps=job.warmup_steps,
            accumulate=job.accumulate,
            clip_norm=job.clip_norm,
            average=job.average,
            ema_steps=max(2, min(100, job.epochs * steps // 10)),
            best_by=job.best_by,
            threshold=config.threshold,
            patience=job.patience,
            precision=precision,
            frozen_statistics=frozen,
            freeze_encoder=config.network.freeze_encoder,
            loaders=loaders,
            devices=job.devices,
            nodes=job.nodes,
            seed=job.seed,
        )
    except ValueError as error:
        raise UserError(f"fit: {error}") from None


@dataclass(frozen=True)
class Batches:
    """The batches of a training: the same one for the same number.

    order: `weighted` draws areas as CropSampler does; `once` takes each once in an epoch of per_epoch batches, and
    again from the first where that is not enough; `replacement` draws each time from all alike.
    """

    sampler: CropSampler
    batch: int
    seed: int
    order: str
    per_epoch: int

    def __getitem__(self, index: int) -> RawBatch:
        """The batch of that number."""
        rng = np.random.default_rng((self.seed, 0, index))
        count = len(self.sampler.areas)
        if self.order == "weighted":
            crops = self.sampler.draw(self.batch, rng)
        elif self.order == "once":
            epoch, place = divmod(index, self.per_epoch)
            first = place % math.ceil(count / self.batch) * self.batch
            crops = self.sampler.cut(permutation(count, self.seed, epoch)[first : first + self.batch].tolist(), rng)
        else:
            crops = self.sampler.cut(rng.integers(count, size=self.batch).tolist(), rng)
        return {
            "image_BCHW": torch.from_numpy(crops.image_BCHW),
            "label_BHW": torch.from_numpy(crops.label_BHW),
            "valid_BHW": torch.from_numpy(crops.valid_BHW),
            "seed": int(rng.integers(2**63)),
        }


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


def draft_card(
    config: TrainConfig, network: Network, sources: Sources, normalisation: Normalisation, field: Field
) -> Card:
    """The card as far as it is known before the fit."""
    bands = len(config.bands)
    low, metres, high = _resolution(config, sources)
    data = [pattern for area in config.areas for pattern in area.images]
    data += [f"Inria Aerial Image Labeling, {config.inria}"] if config.inria is not None else []
    data += config.pairs.images if config.pairs is not None else ()
    name = config.network.name
    return Card(
        architecture=name,
        arguments={"bands": bands, "classes": 1, **config.network.args},
        module=name if is_own(name) else None,
        bands=("red", "green", "blue") if config.bands == (1, 2, 3) else tuple(f"band {band}" for band in config.bands),
        mean=normalisation.mean,
        std=normalisation.std,
        resize_px=None if config.pairs is None else config.pairs.resize_px,
        stride=network.stride,
        halo_px=field.halo_px,
        receptive_field_px=field.receptive_field_px,
        resolution_m=metres,
        resolution_range_m=(low, high),
        training_data=tuple(data),
    )


def _resolution(config: TrainConfig, sources: Sources) -> tuple[float, float, float]:
    """The least, the usual and the most metres of a pixel that the network is for."""
    stated = config.pairs.resolution_m if config.pairs is not None else None
    if sources.areas:
        stated = round(common_resolution(sources.areas), 4)
    return ANY_RESOLUTION_M if stated is None else (round(stated / 2, 4), stated, round(stated * 2, 4))


# Fit


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
        parts.append(f"no building in {', '.join(empty[:3])}" + (f" and {len(empty) - 3} more" if empty[3:] else ""))
    settings = job.settings
    return [*parts, f"{settings.epochs} epochs of {settings.steps_per_epoch} steps, {settings.precision}"]


def _fit(config: TrainConfig, job: TrainJob, network: Network, loss: Loss, output: Path, console: Console) -> Fitted:
    samples = output / SAMPLES
    precision: Precision = "bfloat16" if job.settings.precision == "bfloat16" else "float32"
    validate = Validate(
        job.views,
        job.normalisation,
        job.halo_px,
        precision,
        config.fit.batch,
        loss,
        _with_buildings(job.views),
        config.threshold or 0.5,
        samples,
    )

    def told(record: Record) -> None:
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


# The end


def finish(
    config: TrainConfig,
    job: TrainJob,
    fitted: Fitted,
    loss: Loss,
    sources: Sources,
    output: Path,
    console: Console,
    seconds: float,
) -> Path:
    """Calibrate, choose the threshold, measure the effective halo and the test part; write bundle, table and report."""
    device = resolve_device()
    precision: Precision = "bfloat16" if job.settings.precision == "bfloat16" else "float32"
    network = fitted.network.to(device).eval()
    eye = Eye(network, job.normalisation, job.halo_px, device, precision)
    logits: LogitHistogram | None = None
    if config.calibrate == "temperature":
        logits = count_logits(eye, job.views, config.fit.batch)
        eye = replace(eye, temperature=round(fit_temperature(logits), 4))
    watch = _Watch(eye.temperature, fitted.threshold, logits is None)
    scores = measure(eye, job.views, config.fit.batch, loss, watch)
    logits = watch.logits if logits is None else logits
    threshold = config.threshold or scores.histogram.best_threshold()
    measured = {"validation": _scores(scores, threshold, watch.by_area)}
    if job.split.test:
        views = plan_views(job.split.test, None if config.fit.validate_px == "all" else config.fit.validate_px)
        test_watch = _Watch(eye.temperature, threshold, False)
        measured["test"] = _scores(
            measure(eye, views, config.fit.batch, loss, test_watch), threshold, test_watch.by_area
        )
    errors = [calibration_error(logits, temperature) for temperature in (1.0, eye.temperature)]
    halo, told = _effective_halo(config, job, eye)
    console.print(
        f"validation IoU {measured['validation']['iou']:.4f} at threshold {threshold:.2f}, temperature"
        f" {eye.temperature:.2f}, calibration error {errors[0]:.4f} to {errors[1]:.4f}; {told}",
        highlight=False,
        soft_wrap=True,
    )
    metrics: dict[str, Any] = {
        "validation_iou": measured["validation"]["iou"],
        "epoch": fitted.best.epoch,
        "best_by": config.fit.best_by,
        **measured,
        "calibration_error": {"before": round(errors[0], 5), "after": round(errors[1], 5)},
        "effective_halo": told,
    }
    card = job.card.model_copy(
        update={
            "threshold": threshold,
            "temperature": eye.temperature,
            "effective_halo_px": halo,
            "metrics": metrics,
        }
    )
    # Built anew, so that it is checked as a whole.
    card = Card.model_validate_json(card.model_dump_json())
    write_bytes(output / "metrics.csv", _table(fitted.records).encode())
    examples = _examples(eye, watch.ranked, threshold)
    card = save_bundle(output / BUNDLE, network.cpu(), card)
    report = TrainReport(
        name=config.name,
        card=card,
        records=fitted.records,
        losses=fitted.losses,
        best=fitted.best,
        counts=scores.histogram.at(threshold),
        before=reliability(logits),
        after=reliability(logits, eye.temperature),
        errors=(errors[0], errors[1]),
        examples=examples,
        samples=tuple(sorted((output / SAMPLES).glob("epoch*.jpg"))),
        measured=measured,
        notes=(*scores.measures(threshold).notes, told),
        parts=job.split.names,
        config_yaml=config.resolved_yaml(),
        seconds=seconds,
    )
    # The last thing that is written: what has it is done.
    write_train_report(output / REPORT, report)
    return output / BUNDLE


class _Watch:
    """Takes note of each view as it is measured: scores by area, how good it is, and, if asked to, its logits."""

    def __init__(self, temperature: float, threshold: float, with_logits: bool) -> None:
        self.by_area: dict[str, Scores] = {}
        self.logits = LogitHistogram.empty()
        self.ranked: list[tuple[float, View]] = []
        self._with_logits = with_logits
        odds = math.log(threshold / (1 - threshold)) / temperature
        self._threshold = 1 / (1 + math.exp(-odds))

    def __call__(self, seen: Seen, scores: Scores) -> None:
        scores = scores.to(torch.device("cpu"))
        name = seen.view.area.name
        if name in self.by_area or len(self.by_area) <= MOST_NAMED:
            self.by_area[name] = self.by_area.get(name, Scores.empty()) + scores
        counts = scores.histogram.at(self._threshold)
        if counts.true_positive + counts.false_negative:
            self.ranked.append((counts.iou, seen.view))
        if self._with_logits:
            self.logits = self.logits + logit_histogram(
                seen.logits_HW.cpu(), torch.from_numpy(seen.label_HW), torch.from_numpy(seen.valid_HW)
            )


def _scores(scores: Scores, threshold: float, by_area: dict[str, Scores]) -> dict[str, Any]:
    """The scores of a part, as they go into the card."""
    found = {name: value for name, value in asdict(scores.measures(threshold)).items() if name != "notes"}
    inner = replace(
        scores.histogram,
        positive=scores.histogram.positive - scores.edge.positive,
        negative=scores.histogram.negative - scores.edge.negative,
    )
    rounded: dict[str, Any] = {name: round(value, 4) for name, value in found.items()}
    rounded["interior_iou"] = round(inner.at(threshold).iou, 4)
    if 1 < len(by_area) <= MOST_NAMED:
        rounded["iou_by_area"] = {name: round(it.histogram.at(threshold).iou, 4) for name, it in by_area.items()}
    return rounded


def _effective_halo(config: TrainConfig, job: TrainJob, eye: Eye) -> tuple[int | None, str]:
    """The effective halo, and in words how it was found."""
    exact = job.card.halo_px
    if config.effective_halo == "measure":
        largest = max((*job.split.train, *job.split.validate), key=lambda area: area.valid_pixels)
        found = effective_halo(eye, largest, exact, config.fit.seed)
        if found is not None:
            return found.halo_px, (
                f"effective halo of {found.halo_px} px: beyond it probabilities changed by {found.largest:.4f} at most"
                f" and {found.percentile:.4f} in the 99.99th percentile, at {found.positions} places of {largest.name}"
            )
        why = "no area is large enough to measure the effective halo"
    else:
        why = "the effective halo was not measured"
    return exact, f"{why}: {'none is' if exact is None else f'the exact one, {exact} px, is'} stored"


def _examples(eye: Eye, ranked: Sequence[tuple[float, View]], threshold: float) -> tuple[Example, ...]:
    """The best and the worst windows, as pictures."""
    ordered = sorted(ranked, key=lambda entry: -entry[0])
    count = min(EXAMPLES, (len(ordered) + 1) // 2)
    chosen = [("best", entry) for entry in ordered[:count]] + [("worst", entry) for entry in ordered[count:][-count:]]
    found = []
    for title, (iou, view) in chosen:
        for seen in look(eye, [view], 1):
            name = f"{title}: {view.area.name}, IoU {iou:.3f}"
            found.append(Example(name, triptych(seen[0], threshold, truth=True)))
    return tuple(found)


def _table(records: Sequence[Record]) -> str:
    """metrics.csv: a row an epoch."""
    text = StringIO()
    rows = [_row(record) for record in records]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(record: Record) -> dict[str, float]:
    row: dict[str, float] = {"epoch": record.epoch, "step": record.step, "learning_rate": record.learning_rate}
    for part, measures in (("train", record.train), ("validation", record.validation)):
        row |= {f"{part}_{name}": value for name, value in asdict(measures).items() if name != "notes"}
    return row | {"train_seconds": record.train_seconds, "validation_seconds": record.validation_seconds}
