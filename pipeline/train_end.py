"""The end of a training: calibrated, measured on every part, and written as a bundle, a table and a page."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from segpipe.models.calibrate import LogitHistogram, calibration_error, fit_temperature, logit_histogram, reliability
from segpipe.models.field import peak_bytes_per_px
from segpipe.models.fit import Fitted, Record
from segpipe.models.losses import Loss
from segpipe.models.metrics import Histogram, Scores
from segpipe.models.predictor import resolve_device
from segpipe.models.weights import Card, save_bundle
from segpipe.tasks.sample import Area

from .config import TrainConfig
from .job import TrainJob
from .measure import CORE_PX, HALO_AREA_PX, UNBOUNDED_PX, Eye, Seen, View, count_logits, effective_halo, look, measure
from .storage import write_bytes
from .train_report import Example, TrainReport, triptych, write_train_report
from .workers import allowance

BUNDLE, REPORT, SAMPLES = "model.safetensors", "report.html", "samples"
MOST_NAMED = 50
"""Areas whose scores are named in the bundle one by one."""
MEMORY_SHARE = 0.6
"""Of the memory there is, for the effective halo."""
EXAMPLES = 3
"""Best and worst crops in the report, each."""


@dataclass(frozen=True)
class Ending:
    """What was found at the end. before, after: calibration errors; parts: the scores of each part by name."""

    eye: Eye
    threshold: float
    scores: Scores
    logits: LogitHistogram
    ranked: tuple[tuple[float, View], ...]
    parts: dict[str, dict[str, Any]]

    @property
    def errors(self) -> tuple[float, float]:
        """Expected calibration error without and with the temperature."""
        return calibration_error(self.logits), calibration_error(self.logits, self.eye.temperature)


def finish(config: TrainConfig, job: TrainJob, fitted: Fitted, loss: Loss, output: Path, console: Console) -> Path:
    """Calibrate, choose the threshold, measure the test part and the effective halo; write bundle, table and page."""
    device = resolve_device()
    eye = Eye(fitted.network.to(device).eval(), job.normalisation, job.halo_px, device, job.precision)
    ending = _measure_parts(config, job, fitted, eye, loss)
    halo_px, told = _effective_halo(config, job, ending.eye)
    before, after = ending.errors
    found = ending.parts["validation"]
    console.print(
        f"validation IoU {found['iou']:.4f} at threshold {ending.threshold:.2f}, temperature"
        f" {ending.eye.temperature:.2f}, calibration error {before:.4f} to {after:.4f}; {told}",
        highlight=False,
        soft_wrap=True,
    )
    metrics: dict[str, Any] = {
        "validation_iou": found["iou"],
        "epoch": fitted.best.epoch,
        "best_by": config.fit.best_by,
        **ending.parts,
        "calibration_error": {"before": round(before, 5), "after": round(after, 5)},
        "effective_halo": told,
    }
    settled = {
        "threshold": ending.threshold,
        "temperature": ending.eye.temperature,
        "effective_halo_px": halo_px,
        "metrics": metrics,
    }
    # Built anew, so that it is checked as a whole.
    card = Card.model_validate_json(job.card.model_copy(update=settled).model_dump_json())
    write_bytes(output / "metrics.csv", _table(fitted.records).encode())
    examples = _examples(ending)
    card = save_bundle(output / BUNDLE, fitted.network.cpu(), card)
    report = TrainReport(
        name=config.name,
        card=card,
        records=fitted.records,
        best=fitted.best,
        counts=ending.scores.histogram.at(ending.threshold),
        before=reliability(ending.logits),
        after=reliability(ending.logits, ending.eye.temperature),
        errors=ending.errors,
        examples=examples,
        samples=tuple(sorted((output / SAMPLES).glob("epoch*.jpg"))),
        measured=ending.parts,
        notes=(*ending.scores.measures(ending.threshold).notes, told),
        parts=job.split.names,
        config_yaml=config.resolved_yaml(),
        seconds=sum(record.train_seconds + record.validation_seconds for record in fitted.records),
    )
    # The last thing that is written: what has it is done.
    write_train_report(output / REPORT, report)
    console.print(f"wrote {output / BUNDLE}; report: {output / REPORT}", highlight=False, soft_wrap=True)
    return output / BUNDLE


def _measure_parts(config: TrainConfig, job: TrainJob, fitted: Fitted, eye: Eye, loss: Loss) -> Ending:
    """Temperature and threshold on the validating part; then, with these, its scores and those of the test part."""
    batch = config.fit.batch
    logits: LogitHistogram | None = None
    if config.calibrate == "temperature":
        logits = count_logits(eye, job.views, batch)
        eye = replace(eye, temperature=round(fit_temperature(logits), 4))
    watch = _Watch(eye.temperature, fitted.threshold, logits is None)
    scores = measure(eye, job.views, batch, loss, watch)
    threshold = config.threshold or scores.histogram.best_threshold()
    parts = {"validation": _scores(scores, threshold, watch.by_area)}
    if job.split.test:
        tested = _Watch(eye.temperature, threshold, False)
        found = measure(eye, job.measured(job.split.test), batch, loss, tested)
        parts["test"] = _scores(found, threshold, tested.by_area)
    return Ending(eye, threshold, scores, watch.logits if logits is None else logits, tuple(watch.ranked), parts)


class _Watch:
    """Takes note of each view as it is measured: scores by area, how good it is, and, if asked to, its logits."""

    def __init__(self, temperature: float, threshold: float, with_logits: bool) -> None:
        self.by_area: dict[str, Histogram] = {}
        self.logits = LogitHistogram.empty()
        self.ranked: list[tuple[float, View]] = []
        self._with_logits = with_logits
        odds = math.log(threshold / (1 - threshold)) / temperature
        self._threshold = 1 / (1 + math.exp(-odds))

    def __call__(self, seen: Seen, scores: Scores) -> None:
        name = seen.view.area.name
        own = scores.histogram
        self.by_area[name] = self.by_area[name] + own if name in self.by_area else own
        counts = scores.histogram.at(self._threshold)
        if counts.true_positive + counts.false_negative:
            self.ranked.append((counts.iou, seen.view))
        if self._with_logits:
            self.logits = self.logits + logit_histogram(
                seen.logits_HW.cpu(), torch.from_numpy(seen.label_HW), torch.from_numpy(seen.valid_HW)
            )


def _scores(scores: Scores, threshold: float, by_area: dict[str, Histogram]) -> dict[str, Any]:
    """The scores of a part, as they go into the card. image_iou and others: means over areas or pairs of their own."""
    found = {name: value for name, value in asdict(scores.measures(threshold)).items() if name != "notes"}
    inner = replace(
        scores.histogram,
        positive=scores.histogram.positive - scores.edge.positive,
        negative=scores.histogram.negative - scores.edge.negative,
    )
    rounded: dict[str, Any] = {name: round(value, 4) for name, value in found.items()}
    rounded["interior_iou"] = round(inner.at(threshold).iou, 4)
    counts = {name: own.at(threshold) for name, own in by_area.items()}
    for name in ("iou", "dice", "accuracy"):
        rounded[f"image_{name}"] = round(fmean(getattr(own, name) for own in counts.values()), 4)
    if 1 < len(counts) <= MOST_NAMED:
        rounded["iou_by_area"] = {name: round(own.iou, 4) for name, own in counts.items()}
    return rounded


def _effective_halo(config: TrainConfig, job: TrainJob, eye: Eye) -> tuple[int | None, str]:
    """The effective halo, and in words how it was found."""
    exact, large = job.card.halo_px, _largest((*job.split.train, *job.split.validate))
    short = _memory_short(eye, exact, len(config.bands))
    found = None
    if config.effective_halo == "exact":
        why = "the effective halo was not measured"
    elif large is None:
        why = "no area is large enough to measure the effective halo"
    elif short:
        why = f"the effective halo was not measured, {short}"
    else:
        found = effective_halo(eye, large, exact, config.fit.seed)
        why = "no effective halo was found"
    if found is None or large is None:
        return exact, f"{why}: {'none is' if exact is None else f'the exact one, {exact} px, is'} stored"
    return found.halo_px, (
        f"effective halo of {found.halo_px} px: beyond it probabilities changed by {found.largest:.4f} at most and"
        f" {found.percentile:.4f} in the 99.99th percentile, at {found.positions} places of {large.name}"
    )


def _largest(areas: Sequence[Area]) -> Area | None:
    """The area with the most labelled pixels of those that are large enough on both sides."""
    large = [area for area in areas if min(area.window.shape_yx) >= HALO_AREA_PX]
    return max(large, key=lambda area: area.valid_pixels, default=None)


def _memory_short(eye: Eye, exact_px: int | None, bands: int) -> str:
    """Why there is not enough memory to predict a core with the exact halo in float32; an empty text if there is."""
    side = CORE_PX + 2 * (UNBOUNDED_PX if exact_px is None else exact_px)
    # Of a copy: layers that a network has under two names would stay without their weights.
    needed = peak_bytes_per_px(copy.deepcopy(eye.network), torch.float32, bands) * side**2
    free = torch.cuda.mem_get_info(eye.device)[0] if eye.device.type == "cuda" else allowance()[1]
    if needed <= MEMORY_SHARE * free:
        return ""
    return f"which takes {needed / 2**30:.0f} GiB of memory of {free / 2**30:.0f}"


def _examples(ending: Ending) -> tuple[Example, ...]:
    """The best and the worst windows, as pictures."""
    ordered = sorted(ending.ranked, key=lambda entry: -entry[0])
    count = min(EXAMPLES, (len(ordered) + 1) // 2)
    chosen = [("best", entry) for entry in ordered[:count]] + [("worst", entry) for entry in ordered[count:][-count:]]
    found = []
    for title, (iou, view) in chosen:
        for seen in look(ending.eye, [view], 1):
            name = f"{title}: {view.area.name}, IoU {iou:.3f}"
            found.append(Example(name, triptych(seen[0], ending.threshold, truth=True)))
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
