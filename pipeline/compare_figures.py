"""The figures of a comparison: learning curves of all trainings in one plot, and what each makes of the same crops.

Axes: C bands, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from segpipe.models.augment import Normalisation
from segpipe.models.predictor import FULL_U8, halo_of, resolve_device
from segpipe.models.weights import Bundle, Card, load_bundle
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.sample import SCORED, Area, cut

from .areas import is_read, open_area
from .config import TrainConfig
from .measure import PICTURE_PX, Eye, View, look
from .pairs import open_pairs, parts_to_read
from .sources import plan_sources
from .split import split_areas

PANELS = (
    ("loss", "Loss, mean over batches"),
    ("iou", "IoU, pooled"),
    ("soft_dice", "Soft Dice, mean over batches"),
    ("accuracy", "Accuracy, pooled"),
)
CROPS, CROP_PX = 4, 320
"""How many crops are shown, and their side; of pictures all is shown, reduced to it."""
TITLE_PX, GAP_PX, FONT_PX = 20, 4, 13
LEAST_WIDE_PX = 160
"""Of a column, for its title."""
TELLING = (0.05, 0.95)
"""A crop is shown whose share of buildings lies between these, if there is one."""
GREEN = (0, 255, 0)
NOWHERE = (128, 128, 160)
"""Where there is no imagery, in probabilities."""


@dataclass(frozen=True)
class Curve:
    """A training's epochs, the rows of its metrics.csv. Those of a group share a colour and an entry in the key."""

    group: str
    number: int
    rows: Sequence[Mapping[str, float]]


def draw_curves(path: Path, curves: Sequence[Curve]) -> None:
    """A panel a score, in each a line a training; what was trained on is dotted."""
    # Imported late, and without pyplot: no window system, and no state of its own.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained", dpi=120)
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]  # of ListedColormap
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for curve in curves:
            epochs = [row["epoch"] for row in curve.rows]
            colour = colours[curve.number % len(colours)]
            mark = "o" if len(epochs) < 30 else ""
            axes.plot(epochs, [row[f"train_{name}"] for row in curve.rows], ":", color=colour, linewidth=1)
            axes.plot(
                epochs,
                [row[f"validation_{name}"] for row in curve.rows],
                marker=mark,
                ms=3,
                color=colour,
                linewidth=1.3,
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    lines = {curve.group: line for curve, line in zip(curves, figure.axes[0].lines[1::2], strict=True)}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png")


# Crops


def find_crops(config: TrainConfig, folder: Path, card: Card) -> list[View]:
    """Some windows of what a training validates on, the same ones every time, with buildings in them.

    Read from the chunks in its folder. UserError where they, or the files they were made from, are not there.
    """
    if not (folder / "areas").is_dir():
        raise UserError(f"{folder / 'areas'}: not there; expected the chunks that {config.name} was trained on")
    sources = plan_sources(config, folder / "areas")
    unread = [plan.name for plan in sources.areas if not is_read(plan)]
    if unread or (sources.pairs is not None and parts_to_read(sources.pairs)):
        raise UserError(f"{folder / 'areas'}: not made from the files that {config.name} names now")
    areas = [open_area(plan) for plan in sources.train]
    areas += [] if sources.pairs is None else open_pairs(sources.pairs)
    split = split_areas(config, areas, card.halo_px or 0)
    return choose_crops([*split.validate, *(open_area(plan) for plan in sources.validate)])


def choose_crops(areas: Sequence[Area]) -> list[View]:
    """CROPS windows, spread evenly over all; from each place on the next with some buildings and some ground."""
    views = [view for area in areas for view in _candidates(area)]
    count = min(CROPS, len(views))
    chosen: list[int] = []
    for place in range(count):
        start = (2 * place + 1) * len(views) // (2 * count)
        order = [
            number % len(views) for number in range(start, start + len(views)) if number % len(views) not in chosen
        ]
        chosen.append(next((number for number in order if _tells(views[number])), order[0]))
    return [views[number] for number in sorted(chosen)]


def _candidates(area: Area) -> list[View]:
    if area.frame is not None and area.frame.pixels <= PICTURE_PX:
        return [View(area, area.frame, True)]
    window = area.window
    rows, cols = (
        _starts(offset, side) for offset, side in ((window.row_off, window.height), (window.col_off, window.width))
    )
    height, width = (min(CROP_PX, side) for side in window.shape_yx)
    return [View(area, Window(row, col, height, width), False) for row in rows for col in cols]


def _starts(offset: int, side: int) -> list[int]:
    """Where as many windows begin as fit into a side without overlap, spread evenly over it."""
    count = max(1, side // CROP_PX)
    free = max(0, side - count * CROP_PX)
    return [offset + number * CROP_PX + free * (number + 1) // (count + 1) for number in range(count)]


def _tells(view: View) -> bool:
    _, label_HW, valid_HW = cut(view.area, view.core)
    scored_HW = valid_HW == SCORED
    return bool(scored_HW.any()) and TELLING[0] < float(label_HW[scored_HW].mean()) < TELLING[1]


def draw_crops(path: Path, views: Sequence[View], bundles: Sequence[tuple[str, Path, str | None]]) -> None:
    """Two rows a crop: the image with the truth in green, and with each mask; the image, and each probability.

    bundles: label, file and own module of each training, a column each.
    """
    seen = [cut(view.area, view.core) for view in views]
    images = [_rgb(image_CHW) for image_CHW, _, _ in seen]
    truths = [(label_HW != 0) & (valid_HW == SCORED) for _, label_HW, valid_HW in seen]
    columns = [("truth", [(green(*pair), pair[0]) for pair in zip(images, truths, strict=True)])]
    for label, file, module in bundles:
        bundle = load_bundle(file, module)
        level = math.ceil(FULL_U8 * bundle.card.threshold)
        cells = []
        for view, image_HWC in zip(views, images, strict=True):
            prob_HW = predict_view(bundle, view)
            mask_HW = np.round(np.nan_to_num(prob_HW, nan=0.0) * np.float32(FULL_U8)) >= level
            cells.append((green(image_HWC, mask_HW & ~np.isnan(prob_HW)), _grey(prob_HW)))
        columns.append((label, cells))
    _sheet(columns).save(path, "PNG")


def predict_view(bundle: Bundle, view: View) -> NDArray[np.float32]:
    """Probabilities of a window, prob_HW in float32 with the bundle's temperature; NaN where there is no imagery."""
    card = bundle.card
    image_CHW, _, valid_HW = cut(view.area, view.core)
    if card.resize_px is not None:
        return bundle.predict(np.moveaxis(image_CHW, 0, 2), valid_HW != 0)
    device = resolve_device()
    normalisation = Normalisation(1 / card.scale, card.mean, card.std)
    eye = Eye(bundle.network.to(device), normalisation, halo_of(card), device, "float32", card.temperature)
    prob_HW = np.full(valid_HW.shape, np.nan, np.float32)
    for seen in look(eye, [view], 1):
        prob_HW = torch.sigmoid(seen[0].logits_HW).cpu().numpy()
    return np.where(valid_HW != 0, prob_HW, np.float32(np.nan))


def green(image_HWC: NDArray[np.uint8], mask_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """An image, half of it green where the mask is."""
    painted = image_HWC // 2 + np.array(GREEN, np.uint8) // 2
    return np.where(mask_HW[..., None], painted, image_HWC)


def _rgb(image_CHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first three bands, or the first one as grey."""
    bands = image_CHW[:3] if len(image_CHW) >= 3 else np.repeat(image_CHW[:1], 3, axis=0)
    return np.moveaxis(bands, 0, 2)


def _grey(prob_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    level_HW = np.round(np.nan_to_num(prob_HW) * 255).astype(np.uint8)
    return np.where(np.isnan(prob_HW)[..., None], np.array(NOWHERE, np.uint8), level_HW[..., None])


Cells = Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
"""Of each crop the upper and the lower picture_HWC."""


def _sheet(columns: Sequence[tuple[str, Cells]]) -> Image.Image:
    """All columns side by side under their titles, on white."""
    font = ImageFont.load_default(FONT_PX)
    pictures = [[_reduced(picture) for pair in cells for picture in pair] for _, cells in columns]
    tops = list(accumulate((picture.height + GAP_PX for picture in pictures[0]), initial=TITLE_PX))
    wide = max(LEAST_WIDE_PX, *(picture.width for picture in pictures[0]))
    sheet = Image.new("RGB", (len(columns) * (wide + GAP_PX) - GAP_PX, tops[-1] - GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, _) in enumerate(columns):
        left = column * (wide + GAP_PX)
        shown = max(n for n in range(len(title) + 1) if font.getlength(title[:n]) <= wide)
        draw.text((left, 2), title[:shown], fill="black", font=font)
        for top, picture in zip(tops, pictures[column], strict=False):
            sheet.paste(picture, (left, top))
    return sheet


def _reduced(picture_HWC: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(picture_HWC))
    picture.thumbnail((CROP_PX, CROP_PX))
    return picture
