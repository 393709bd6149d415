"""The page about a training: curves, confusion, reliability, best and worst crops, one sample over the epochs.

Everything is in the one file; it needs no network. Axes: C bands, H rows, W columns.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from segpipe.models.calibrate import ReliabilityBin
from segpipe.models.fit import Record
from segpipe.models.metrics import Counts
from segpipe.models.weights import Card

from .beside import written_beside
from .measure import Seen
from .report import page_template

SIDE_PX = 256
GAP_PX = 6
QUALITY = 88
MOST_SAMPLES = 24
"""Epochs whose sample is shown; of more, evenly spread."""
PANELS = (("loss", "Loss"), ("dice", "Dice"), ("iou", "IoU"), ("accuracy", "Accuracy"))
INK, TRAIN, VALIDATION = "#333333", "#9a9a9a", "#d1610a"


@dataclass(frozen=True)
class Example:
    """A picture in JPEG, and what it shows."""

    title: str
    jpeg: bytes


@dataclass(frozen=True)
class TrainReport:
    """All that the page says. before and after: reliability without and with the temperature; errors: likewise."""

    name: str
    card: Card
    records: tuple[Record, ...]
    best: Record
    counts: Counts
    before: tuple[ReliabilityBin, ...]
    after: tuple[ReliabilityBin, ...]
    errors: tuple[float, float]
    examples: tuple[Example, ...]
    samples: tuple[Path, ...]
    measured: dict[str, Any]
    notes: tuple[str, ...]
    parts: dict[str, list[str]]
    config_yaml: str
    seconds: float


def write_train_report(path: Path, report: TrainReport) -> None:
    """Write the page with everything in it, and rename it into place. RunError if it cannot be written."""
    html = page_template("train_report.html").render(
        report=report,
        curves=_curves(report),
        diagram=_reliability(report),
        examples=[(example.title, _inline(example.jpeg)) for example in report.examples],
        samples=[
            (path.stem.removeprefix("epoch").lstrip("0"), _inline(path.read_bytes()))
            for path in _spread(report.samples)
        ],
        scores=_scores(report.measured),
        card_json=report.card.model_dump_json(indent=2),
        parts=[
            (part, len(names), ", ".join(names[:40]) + (", …" if names[40:] else ""))
            for part, names in report.parts.items()
        ],
    )
    with written_beside(path) as partial:
        partial.write_text(html, encoding="utf-8")


def _spread(samples: Sequence[Path]) -> list[Path]:
    """As many as are shown, the first and the last among them."""
    count = min(MOST_SAMPLES, len(samples))
    return [samples[round(index)] for index in np.linspace(0, len(samples) - 1, count)] if count else []


def _inline(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _scores(measured: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of the table of scores: a name, and its value in each part that was measured."""
    names = [name for name, value in next(iter(measured.values())).items() if isinstance(value, float)]
    return [(name.replace("_", " "), [f"{part[name]:.4f}" for part in measured.values()]) for name in names]


# Curves


def _curves(report: TrainReport) -> list[str]:
    """A panel each for loss, Dice, IoU and accuracy, of training and validation by epoch, as SVG."""
    epochs = [record.epoch for record in report.records]
    panels = []
    for name, title in PANELS:
        lines = [
            (label, colour, [getattr(getattr(record, part), name) for record in report.records])
            for label, colour, part in (("train", TRAIN, "train"), ("validation", VALIDATION, "validation"))
        ]
        panels.append(_chart(title, "epoch", epochs, lines, report.best.epoch))
    return panels


def _reliability(report: TrainReport) -> str:
    """How often a pixel of each probability is a building, before and after calibration, as SVG."""
    figure, axes = _figure("Reliability", "probability", (3.4, 3.2))
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.6, linestyle=":")
    for label, colour, bins in (("before", TRAIN, report.before), ("after", VALIDATION, report.after)):
        axes.plot([it.probability for it in bins], [it.share for it in bins], "o-", color=colour, label=label, ms=3)
    axes.set_ylabel("share of buildings", fontsize=8)
    return _svg(figure, axes)


def _chart(
    title: str, along: str, x: Sequence[float], lines: Sequence[tuple[str, str, Sequence[float]]], best: float
) -> str:
    figure, axes = _figure(title, along, (4.2, 2.6))
    axes.axvline(best, color=INK, linewidth=0.6, linestyle=":")
    for label, colour, y in lines:
        axes.plot(x, y, "o-" if len(x) < 30 else "-", color=colour, label=label, ms=3, linewidth=1.2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure, axes)


def _figure(title: str, along: str, size_inches: tuple[float, float]) -> tuple[Any, Any]:
    # Imported late, and without pyplot: no window system, and no state of its own.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(along, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, axes: Any) -> str:
    """A figure as the text of an SVG element. The same figure gives the same text."""
    import matplotlib as mpl

    axes.legend(fontsize=8, frameon=False)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "segpipe", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


# Pictures


def triptych(seen: Seen, threshold: float, truth: bool = False) -> bytes:
    """Image | mask | image x mask of one window, as JPEG; truth: image | truth | prediction. Invalid pixels: grey."""
    image_HWC = _rgb(seen.image_CHW)
    mask_HW = torch.sigmoid(seen.logits_HW).cpu().numpy() >= threshold
    if truth:
        parts = [image_HWC, _painted(seen.label_HW != 0, seen.valid_HW), _painted(mask_HW, seen.valid_HW)]
    else:
        parts = [image_HWC, _painted(mask_HW, seen.valid_HW), image_HWC * mask_HW[..., None]]
    small = [_reduced(part) for part in parts]
    gap = np.full((small[0].shape[0], GAP_PX, 3), 255, np.uint8)
    joined = np.concatenate([small[0], gap, small[1], gap, small[2]], axis=1)
    data = io.BytesIO()
    Image.fromarray(joined).save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


def _rgb(image_CHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first three bands, or the first one as grey."""
    bands = image_CHW[:3] if len(image_CHW) >= 3 else np.repeat(image_CHW[:1], 3, axis=0)
    return np.moveaxis(bands, 0, 2)


def _painted(mask_HW: NDArray[np.bool_], valid_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    grey_HW = np.where(valid_HW, np.where(mask_HW, 255, 0), 128).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2)


def _reduced(picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of SIDE_PX along its longer side at most."""
    picture = Image.fromarray(np.ascontiguousarray(picture_HWC))
    picture.thumbnail((SIDE_PX, SIDE_PX))
    return np.asarray(picture)
