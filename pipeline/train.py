"""The story of training, top to bottom: plan, read, sample, fit, evaluate. The result is a bundle that `run` takes."""

from __future__ import annotations

import copy
import csv
import html
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from segpipe.models.augment import Augmentation, Batch, Normalisation, augment
from segpipe.models.field import probe_field
from segpipe.models.fit import FitSettings, Fitted, Record, fit, lecun_uniform
from segpipe.models.metrics import Histogram, histogram
from segpipe.models.networks import Network, build_network
from segpipe.models.predictor import Precision, Predictor, fast_bfloat16, resolve_device
from segpipe.models.weights import Bundle, Card, load_bundle, load_encoder, save_bundle
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.predict import predict_core, reach
from segpipe.tasks.sample import Area, CropSampler

from .areas import common_resolution, plan_area, read_area
from .config import AreaConfig, TrainConfig
from .plan import check_output
from .progress import terminal
from .store import locked, write_bytes

CORE_PX = 1024
"""Validation areas are predicted in cores of this size, with the exact halo: as `run` would."""


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Train a network as the configuration says, going on from its last checkpoint; returns the bundle's path.

    Raises UserError before any work for what cannot be trained on, and where the folder holds another training.
    """
    console = console or terminal()
    output = check_output(config.path(config.output))
    network = initial_network(config)
    plans = [plan_area(config, area, output / "areas" / f"train{i}") for i, area in enumerate(config.areas)]
    tests = [plan_area(config, area, output / "areas" / f"val{i}") for i, area in enumerate(config.validate_on)]
    resolution_m = common_resolution([*plans, *tests])
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        keep_config(config, output)
        areas, held_out = [read_area(plan) for plan in plans], [read_area(plan) for plan in tests]
        card = draft_card(config, network, resolution_m, [*config.areas])
        settings = resolve_settings(config, areas)
        for area in (*areas, *held_out):
            console.print(f"area {area.name}: {area.valid_pixels:,} valid pixels", highlight=False, soft_wrap=True)
        console.print(f"{settings.steps} steps, {settings.precision}", highlight=False)

        def validate(averaged: Network) -> Histogram:
            return evaluate_areas(Bundle(averaged, card), held_out, settings.precision)

        batches = Batches(areas, config.fit.crop_px, config.fit.batch, config.fit.seed, Augmentation(), Normalisation())
        fitted = fit(
            network.to(resolve_device()),
            batches.at,
            validate,
            settings,
            output / "checkpoints",
            lambda record: console.print(told(record), highlight=False),
        )
        return write_results(output, fitted, card, [a.name for a in held_out])


def initial_network(config: TrainConfig) -> Network:
    """The network with its first weights: LeCun's initialisation, an encoder's file, or a bundle."""
    start = config.network.initialisation
    torch.manual_seed(config.fit.seed)
    try:
        if start.endswith(".safetensors"):
            bundle = load_bundle(config.path(start))
            if bundle.card.architecture != config.network.name:
                raise UserError(
                    f"network.initialisation: {start} is a {bundle.card.architecture}; expected a {config.network.name}"
                )
            return bundle.network
        network = build_network(config.network.name, bands=len(config.bands))
        if start == "lecun":
            lecun_uniform(network)
        else:
            load_encoder(network, config.path(start))
    except (ValueError, OSError) as error:  # BundleError among them
        raise UserError(f"network: {error}") from None
    return network


def keep_config(config: TrainConfig, output: Path) -> None:
    """Write the resolved configuration, or compare with the one of the training that is to go on."""
    text, path = config.resolved_yaml(), output / "train.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: of another training; expected the same settings to go on; cure: another `output:`")
    write_bytes(path, text.encode())


@dataclass(frozen=True)
class Batches:
    """The batches of a training: the same one for the same step."""

    areas: Sequence[Area]
    crop_px: int
    batch: int
    seed: int
    augmentation: Augmentation
    normalisation: Normalisation

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        rng = np.random.default_rng((self.seed, step))
        sampler = CropSampler(self.areas, self.crop_px, self.augmentation.margin_px(self.crop_px))
        crops = sampler.draw(self.batch, rng)
        return augment(
            torch.from_numpy(crops.image_BCHW),
            torch.from_numpy(crops.label_BHW),
            torch.from_numpy(crops.valid_BHW),
            self.crop_px,
            self.augmentation,
            self.normalisation,
            rng,
        )


def resolve_settings(config: TrainConfig, areas: Sequence[Area]) -> FitSettings:
    """Epochs to steps, and the schedule: full rate for the first half, falling to 0 in the second."""
    job = config.fit
    pixels = sum(area.valid_pixels for area in areas)
    epoch = job.steps_per_epoch if job.steps_per_epoch != "auto" else math.ceil(pixels / job.crop_px**2 / job.batch)
    steps = job.epochs * epoch
    return FitSettings(
        steps=steps,
        learning_rate=job.learning_rate,
        encoder_learning_rate=job.encoder_learning_rate or 0.3 * job.learning_rate,
        optimiser=job.optimiser,
        weight_decay=job.weight_decay,
        warmup_steps=min(20, steps // 4),
        decay_steps=steps // 2,
        ema_steps=max(2, min(100, steps // 10)),
        validate_every=epoch,
        checkpoint_every=min(50, epoch),
        precision="bfloat16" if fast_bfloat16(resolve_device()) else "float32",
        # What LeCun's initialisation knows of the statistics is nothing: they are to be learned.
        frozen_statistics=config.network.initialisation != "lecun",
        freeze_encoder=config.network.freeze_encoder,
    )


def draft_card(config: TrainConfig, network: Network, resolution_m: float, areas: Sequence[AreaConfig]) -> Card:
    """The card as far as it is known before the fit."""
    bands, normalisation = len(config.bands), Normalisation()
    field = probe_field(network.cpu(), network.stride, bands)
    return Card(
        architecture=config.network.name,
        arguments={"bands": bands, "classes": 1},
        bands=("red", "green", "blue") if bands == 3 else tuple(f"band {band}" for band in config.bands),
        mean=normalisation.mean,
        std=normalisation.std,
        stride=network.stride,
        halo_px=field.halo_px,
        receptive_field_px=field.receptive_field_px,
        resolution_m=round(resolution_m, 4),
        resolution_range_m=(round(resolution_m / 2, 4), round(resolution_m * 2, 4)),
        training_data=tuple(pattern for area in areas for pattern in area.images),
    )


def evaluate_areas(bundle: Bundle, areas: Sequence[Area], precision: Precision) -> Histogram:
    """Counts of whole areas, predicted as `run` would predict them, at every threshold."""
    # A copy: the predictor moves the network to its device and precision.
    own = Bundle(copy.deepcopy(bundle.network), bundle.card)
    predictor = Predictor(own, resolve_device(), precision, torch.get_num_threads())
    pooled = Histogram.empty()
    for area in areas:
        rows, cols = range(0, area.window.height, CORE_PX), range(0, area.window.width, CORE_PX)
        for core in (Window.cell(row // CORE_PX, col // CORE_PX, CORE_PX) for row in rows for col in cols):
            pooled = pooled + _evaluate_core(bundle.card, predictor, area, core)
    return pooled


def _evaluate_core(card: Card, predictor: Predictor, area: Area, core: Window) -> Histogram:
    outer = reach(core, card.halo_px, card.stride)
    everything = Window(0, 0, *area.label.shape)
    inside = outer.intersect(everything)
    image_CHW = np.zeros((area.image.shape[0], *outer.shape_yx), np.uint8)
    label_HW, valid_HW = np.zeros(outer.shape_yx, np.uint8), np.zeros(outer.shape_yx, np.bool_)
    src, dst = inside.within(everything), inside.within(outer)
    image_CHW[:, *dst] = area.image[slice(0, image_CHW.shape[0]), *src]
    label_HW[dst], valid_HW[dst] = area.label[src], area.valid[src] != 0
    prob_HW, _ = predict_core(image_CHW, valid_HW, core, card.halo_px, card.stride, predictor.predict)
    parts = (prob_HW, label_HW[core.within(outer)], valid_HW[core.within(outer)])
    return histogram(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def told(record: Record) -> str:
    """A record as one line."""
    return (
        f"step {record.step}: loss {record.loss:.4f}, validation IoU {record.iou:.4f} at threshold"
        f" {record.threshold:.2f}, {record.seconds:.0f} s"
    )


def write_results(output: Path, fitted: Fitted, card: Card, held_out: Sequence[str]) -> Path:
    """Write model.safetensors, metrics.csv and report.html; returns the bundle's path."""
    best = max(fitted.records, key=lambda record: (record.iou, record.step))
    metrics = {"validation_areas": list(held_out), "validation_iou": round(best.iou, 4), "step": best.step}
    card = card.model_copy(update={"threshold": fitted.threshold, "metrics": metrics})
    table = StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = ("step", "loss", "iou", "threshold", "learning_rate", "seconds")
    writer.writerows([names, *(astuple(record) for record in fitted.records)])
    write_bytes(output / "metrics.csv", table.getvalue().encode())
    card = save_bundle(output / "model.safetensors", fitted.network.cpu(), card)
    write_bytes(output / "report.html", _report(fitted, card).encode())
    return output / "model.safetensors"


def _report(fitted: Fitted, card: Card) -> str:
    """One page that needs no network: the validation curve as a table, and the card."""
    rows = "".join(
        f"<tr><td>{r.step}</td><td>{r.loss:.4f}</td><td>{r.iou:.4f}</td><td>{r.threshold:.2f}</td></tr>"
        for r in fitted.records
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Training</title>'
        "<style>body{font-family:sans-serif;max-width:50em;margin:2em auto}"
        "td,th{padding:0 1em;text-align:right}</style>"
        "<h1>Training</h1><table><tr><th>step</th><th>loss</th><th>validation IoU</th><th>threshold</th></tr>"
        f"{rows}</table><h2>Card of the bundle</h2><pre>{html.escape(card.model_dump_json(indent=2))}</pre></html>\n"
    )
