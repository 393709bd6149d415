"""All that a training decides before its first step: split, normalisation, crops, optimisation, and what is measured.

Axes: B batch, C bands, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from segpipe.models.augment import Augmentation, Framing, Normalisation, RawBatch
from segpipe.models.field import Field
from segpipe.models.fit import FitSettings
from segpipe.models.networks import Network
from segpipe.models.own_code import is_own
from segpipe.models.predictor import Precision, fast_bfloat16, resolve_device
from segpipe.models.weights import IMAGENET_MEAN, IMAGENET_STD, Card
from segpipe.tasks.errors import UserError
from segpipe.tasks.sample import SCORED, Area, CropSampler, cores, cut, permutation

from .areas import common_resolution, open_area
from .config import StatisticsConfig, TrainConfig
from .measure import View, plan_views
from .pairs import open_pairs
from .recipe import LARGEST_AUTO_HALO_PX
from .sources import Sources
from .split import Split, split_areas
from .workers import allowance

MOST_LOADERS = 8
LARGE = 1_000_000
"""More batches than an epoch has."""
ANY_RESOLUTION_M = (0.001, 1.0, 1000.0)
"""Of what has no scale: the least, the one stated, and the most metres of a pixel."""
UNBOUNDED_HALO_PX = 256
"""Context of the cores that are measured where the network's field has no bound."""


@dataclass(frozen=True)
class TrainJob:
    """All that is decided before the first step."""

    split: Split
    normalisation: Normalisation
    framing: Framing
    augmentation: Augmentation | None
    settings: FitSettings
    crops: Batches
    validate_px: int | None
    views: tuple[View, ...]
    halo_px: int
    card: Card

    @property
    def precision(self) -> Precision:
        """What networks are measured in."""
        return "bfloat16" if self.settings.precision == "bfloat16" else "float32"

    def measured(self, areas: Sequence[Area]) -> tuple[View, ...]:
        """The windows of areas that are measured, as those of the validating part are."""
        return tuple(plan_views(areas, self.validate_px))


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
    validate_px = None if job.validate_px == "all" else job.validate_px
    views = tuple(plan_views(split.validate, validate_px))
    if validate_px is not None:
        _check_crops("validate", views, validate_px)
        _check_crops("test", plan_views(split.test, validate_px), validate_px)
    return TrainJob(
        split,
        normalisation,
        framing,
        augmentation,
        settings,
        Batches(sampler, job.batch, job.seed, order, per_epoch),
        validate_px,
        views,
        UNBOUNDED_HALO_PX if field.halo_px is None else min(field.halo_px, LARGEST_AUTO_HALO_PX),
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


def _check_crops(part: str, views: Sequence[View], validate_px: int) -> None:
    """UserError for a part whose central crops hold no label: it would be measured on nothing. No views, no part."""
    if not views or any((cut(view.area, view.core)[2] == SCORED).any() for view in views):
        return
    names = list(dict.fromkeys(view.area.name for view in views))
    raise UserError(
        f"fit.validate_px: {validate_px} px in the middle of each tile of `{part}` ({some_of(names)}) have no labelled"
        " pixel; expected some to measure on; cure: a larger one, or all"
    )


def some_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


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


def check_settings(config: TrainConfig) -> None:
    """What can be refused before anything is read, is: as if the data were large."""
    for key, why in (("bands", "as many as `bands:` names"), ("classes", "always 1")):
        if key in config.network.args:
            raise UserError(f"network.args: {key} {config.network.args[key]}; expected none: they are {why}")
    resolve_augmentation(config)
    resolve_settings(config, LARGE)


def resolve_settings(config: TrainConfig, batches: int) -> FitSettings:
    """The optimisation. batches: as many as go through the data once."""
    job = config.fit
    device = resolve_device()
    each = job.accumulate * job.devices * job.nodes
    steps = math.ceil(batches / each) if job.steps_per_epoch == "auto" else job.steps_per_epoch
    precision = ("bfloat16" if fast_bfloat16(device) else "float32") if job.precision == "auto" else job.precision
    trained = config.network.initialisation not in ("lecun", "default")
    frozen = trained if config.network.frozen_statistics == "auto" else config.network.frozen_statistics
    loaders = _loaders(device) if job.loaders == "auto" else job.loaders
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


def _loaders(device: torch.device) -> int:
    """Half the processors; none where a network on a CPU has but two or three: there a loader takes one from it."""
    processors, _ = allowance()
    if device.type == "cpu" and processors < 4:
        return 0
    return min(MOST_LOADERS, max(1, processors // 2))


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
