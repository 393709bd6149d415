"""Compare trainings by the folders that they left: tables, learning curves, and what each makes of the same crops."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from segpipe.models.own_code import is_own
from segpipe.models.weights import BundleError, Card, blank_network, check_module, read_card
from segpipe.tasks.errors import UserError

from .beside import written_beside
from .compare_figures import Curve, draw_crops, draw_curves, find_crops
from .config import TrainConfig, load_train
from .measure import View
from .plan import check_output
from .train_end import BUNDLE

POOLED, BATCHES, IMAGES = "pooled", "mean over batches", "mean over images"
SCORES = (
    ("iou", "iou_pooled", "IoU", POOLED),
    ("dice", "dice_pooled", "Dice", POOLED),
    ("accuracy", "accuracy_pooled", "accuracy", POOLED),
    ("soft_iou", "soft_iou_batches", "soft IoU", BATCHES),
    ("soft_dice", "soft_dice_batches", "soft Dice", BATCHES),
    ("soft_accuracy", "soft_accuracy_batches", "soft accuracy", BATCHES),
    ("mean_iou", "iou_at_half_batches", "IoU at 0.5", BATCHES),
    ("image_iou", "iou_images", "IoU", IMAGES),
    ("image_dice", "dice_images", "Dice", IMAGES),
    ("image_accuracy", "accuracy_images", "accuracy", IMAGES),
)
"""Of each score its name in a card, its column in the CSV, its title, and its protocol."""
COURSE = (
    ("best_epoch", "best epoch"),
    ("epochs", "of epochs"),
    ("training_loss", "training loss"),
    ("validation_loss", "validation loss"),
    ("gap", "gap"),
    ("epochs_to_95_percent", "epochs to 95 %"),
    ("seconds", "seconds"),
)
WHOLE = ("best_epoch", "epochs", "epochs_to_95_percent", "seconds")
"""What is told without decimals."""
PARTS = ("validation", "test")
NEARLY = 0.95
PROTOCOLS = (
    "pooled: the pixels of all images are counted into one table, at the threshold of the bundle, then divided.",
    "mean over batches: a score of each batch, then their mean; soft ones of probabilities, without a threshold:"
    " Dice 2Σyp/(Σy+Σp), IoU Σyp/(Σy+Σp-Σyp), accuracy the mean of p where there is a building and of 1-p elsewhere.",
    "mean over images: a score of each area or pair at the threshold of the bundle, then their mean.",
    "Scores are those of the bundle: best epoch, calibrated temperature. Losses are those of the best epoch, before"
    " calibration, each a mean over batches; the gap is validation less training.",
    "epochs to 95 %: the first epoch whose validation IoU (pooled) is 95 % of the highest of all epochs.",
    "±: standard deviation of a sample (n - 1) over trainings that differ only in `fit.seed`.",
)


@dataclass(frozen=True)
class Training:
    """A training that is done. rows: metrics.csv, a row an epoch; parts: the names in split.json.

    parameters, trained: of the network, and of these what was not frozen. encoder: torchvision's name, "" for others.
    """

    label: str
    folder: Path
    config: TrainConfig
    card: Card
    rows: tuple[Mapping[str, float], ...]
    parts: Mapping[str, Any]
    encoder: str
    parameters: int
    trained: int

    @property
    def description(self) -> dict[str, str | int]:
        """What it is, besides figures."""
        network = self.config.network
        start = network.initialisation
        return {
            "network": network.name + "".join(f", {key} {value}" for key, value in network.args.items()),
            "encoder": self.encoder or "its own",
            "initialisation": Path(start).name,
            "encoder_frozen": "yes" if network.freeze_encoder else "no",
            "parameters": self.parameters,
            "trained_parameters": self.trained,
        }

    @property
    def figures(self) -> dict[str, float]:
        """All figures by column; without those that were not measured."""
        found: dict[str, float] = {}
        for part in PARTS:
            scores: dict[str, Any] = _part(self.card, part)
            if scores:
                found[f"{part}_threshold"] = float(scores["threshold"])
            found |= {f"{part}_{column}": float(scores[name]) for name, column, _, _ in SCORES if name in scores}
        best = next(row for row in self.rows if row["epoch"] == self.card.metrics["epoch"])
        ious = [row["validation_iou"] for row in self.rows]
        near = next(row["epoch"] for row in self.rows if row["validation_iou"] >= NEARLY * max(ious))
        seconds = sum(row["train_seconds"] + row["validation_seconds"] for row in self.rows)
        return found | {
            "best_epoch": best["epoch"],
            "epochs": float(len(self.rows)),
            "training_loss": best["train_loss"],
            "validation_loss": best["validation_loss"],
            "gap": best["validation_loss"] - best["train_loss"],
            "epochs_to_95_percent": near,
            "seconds": seconds,
        }

    @property
    def but_seed(self) -> str:
        """Its settings without the seed, its names, and what changes nothing: alike where only the seed differs."""
        values = self.config.deciding()
        for key in ("name", "output"):
            del values[key]
        del values["fit"]["seed"]
        return json.dumps(values, sort_keys=True)


@dataclass(frozen=True)
class Group:
    """Trainings that differ only in their seed."""

    label: str
    trainings: tuple[Training, ...]

    @property
    def means(self) -> dict[str, tuple[float, float | None]]:
        """Mean and deviation of every figure that all have; one training has no deviation."""
        figures = [training.figures for training in self.trainings]
        found: dict[str, tuple[float, float | None]] = {}
        for name in figures[0]:
            values = [it[name] for it in figures if name in it]
            if len(values) == len(figures):
                found[name] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
        return found


def compare_runs(folders: Sequence[Path], output: Path) -> list[str]:
    """Write compare.md, runs.csv, means.csv, curves.png and crops.png to a folder; gives lines about them.

    UserError for a folder that is no training, or of one that is not done. The crops are of what the first training
    validates on, and are left out, which is told, where its imagery is not there any more.
    """
    check_output(output)
    trainings = read_trainings(folders)
    groups = group(trainings)
    curves = [Curve(_named(it), number, run.rows) for number, it in enumerate(groups) for run in it.trainings]
    told: list[str] = []
    output.mkdir(parents=True, exist_ok=True)
    with written_beside(output / "curves.png") as partial:
        draw_curves(partial, curves)
    crops: tuple[str, ...] = ()
    try:
        views = find_crops(trainings[0].config, trainings[0].folder, trainings[0].card)
        _check_crops(trainings)
        bundles = [(it.label, it.folder / BUNDLE, _own_module(it.config)) for it in trainings]
        with written_beside(output / "crops.png") as partial:
            draw_crops(partial, views, bundles)
        crops = tuple(_place(view) for view in views)
    except UserError as error:
        (output / "crops.png").unlink(missing_ok=True)
        told.append(f"no crops: {error}")
    text = report(trainings, groups, crops, told)
    for name, content in (("compare.md", text), ("runs.csv", _runs_csv(groups)), ("means.csv", _means_csv(groups))):
        with written_beside(output / name) as partial:
            partial.write_text(content, encoding="utf-8")
    for it in groups:
        many = f" ({len(it.trainings)} seeds)" if len(it.trainings) > 1 else ""
        told.append(f"{it.label}{many}: IoU {_number('iou', *it.means['validation_iou_pooled'])}, pooled, validation")
    return [*told, f"tables and figures: {output / 'compare.md'}"]


def _place(view: View) -> str:
    """Where a crop lies, in words."""
    window, core = view.area.window, view.core
    place = f", from row {core.row_off - window.row_off}, column {core.col_off - window.col_off} on"
    return view.area.name + ("" if view.whole else place)


def _check_crops(trainings: Sequence[Training]) -> None:
    first = trainings[0]
    other = next((it for it in trainings if it.config.bands != first.config.bands), None)
    if other is not None:
        raise UserError(
            f"{other.label} sees bands {list(other.config.bands)}, and {first.label} {list(first.config.bands)}"
        )


# Reading


def read_trainings(folders: Sequence[Path]) -> list[Training]:
    """Read what trainings have left, in the order given. UserError for a folder that holds none that is done."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        other = seen.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise UserError(f"{folder} is named twice; expected each training once")
    return _labelled([_read_training(folder) for folder in folders])


def _read_training(folder: Path) -> Training:
    for name in ("train.yaml", "split.json", "metrics.csv", BUNDLE, "report.html"):
        if not (folder / name).is_file():
            state = "a training that is not done" if (folder / "train.yaml").is_file() else "no training"
            raise UserError(f"{folder}: {state}: no {name}; expected a folder that `segpipe train` has finished")
    config = load_train(folder / "train.yaml")
    try:
        card = read_card(folder / BUNDLE)
        if card.architecture != config.network.name:
            raise UserError(f"{folder}: train.yaml is of {config.network.name}, and {BUNDLE} of {card.architecture}")
        check_module(folder / BUNDLE, card, _own_module(config))
        network = blank_network(card)
        parts = json.loads((folder / "split.json").read_text(encoding="utf-8"))
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = tuple({key: float(value) for key, value in row.items()} for row in csv.DictReader(file))
    except BundleError as error:
        raise UserError(str(error)) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: not as `segpipe train` leaves it: {error}") from None
    if not _part(card, "validation") or card.metrics.get("epoch") not in [row.get("epoch") for row in rows]:
        raise UserError(f"{folder / BUNDLE}: its metrics are not those of metrics.csv; expected what was trained here")
    sizes = [(name.startswith(network.encoder_prefix), it.numel()) for name, it in network.named_parameters()]
    return Training(
        config.name,
        folder,
        config,
        card,
        rows,
        parts,
        network.published_encoder,
        sum(size for _, size in sizes),
        sum(size for in_encoder, size in sizes if not (in_encoder and config.network.freeze_encoder)),
    )


def _own_module(config: TrainConfig) -> str | None:
    """The user's own network that train.yaml names, the only one whose code may run; None: it names one of ours."""
    return config.network.name if is_own(config.network.name) else None


def _part(card: Card, part: str) -> dict[str, Any]:
    """The scores of a part in a card; empty if it was not measured."""
    scores = card.metrics.get(part)
    return dict(scores) if isinstance(scores, dict) else {}


def _labelled(trainings: Sequence[Training]) -> list[Training]:
    """With labels that are all different: the names, else the names of the folders, else their paths."""
    folders = [it.folder.resolve() for it in trainings]
    for labels in ([it.config.name for it in trainings], [it.name for it in folders], [str(it) for it in folders]):
        if len(set(labels)) == len(labels):
            break
    return [_with_label(it, label) for it, label in zip(trainings, labels, strict=True)]


def _with_label(training: Training, label: str) -> Training:
    values = {name: getattr(training, name) for name in Training.__dataclass_fields__}
    return Training(**values | {"label": label})


def group(trainings: Sequence[Training]) -> list[Group]:
    """Put together what differs only in its seed, in the order of the first of each."""
    found: dict[str, list[Training]] = {}
    for training in trainings:
        found.setdefault(training.but_seed, []).append(training)
    labels = [_common([it.label for it in members]) for members in found.values()]
    return [
        Group(label if labels.count(label) == 1 else members[0].label, tuple(members))
        for label, members in zip(labels, found.values(), strict=True)
    ]


def _common(labels: Sequence[str]) -> str:
    """The name without a seed at its end: `unet` of unet-seed0 and unet-seed1; the first name if they differ else."""
    bare = {re.sub(r"[-_. ]+(seed|s)?[-_. ]?\d+$", "", label) for label in labels}
    return bare.pop() if len(bare) == 1 and len(labels) > 1 else labels[0]


# Writing


def report(trainings: Sequence[Training], groups: Sequence[Group], crops: Sequence[str], told: Sequence[str]) -> str:
    """The page, in Markdown."""
    several = any(len(it.trainings) > 1 for it in groups)
    tables = [
        ("Means over seeds" if several else "Scores", [(_named(it), it.means) for it in groups]),
        ("Scores of each training", [(it.label, _alone(it)) for it in trainings]),
    ]
    lines = [f"# Comparison of {len(trainings)} trainings", "", *_descriptions(groups)]
    for title, rows in tables[: 2 if several else 1]:
        for part in PARTS:
            if any(f"{part}_threshold" in figures for _, figures in rows):
                lines += ["", f"## {title}: {part}", "", *_scores(rows, part)]
        lines += ["", f"## {title}: course", "", *_table([label for _, label in COURSE], _cells(rows, COURSE))]
    lines += ["", "## Protocols", "", *(f"- {line}" for line in (*PROTOCOLS, *differences(trainings), *told))]
    lines += ["", "## Learning curves", "", "Dotted: training. ![Learning curves](curves.png)"]
    if crops:
        lines += [
            "",
            "## Crops",
            "",
            "Upper rows: the truth and each training's mask in green. Lower rows: the image, and probabilities before"
            " any threshold, black 0 and white 1, as `run` predicts them. ![Crops](crops.png)",
            "",
            *(f"{number}. {name}" for number, name in enumerate(crops, start=1)),
        ]
    return "\n".join(lines) + "\n"


def differences(trainings: Sequence[Training]) -> list[str]:
    """What makes figures of different trainings not quite comparable, in words."""
    first = trainings[0]
    told: list[str] = []
    asked: dict[str, Callable[[Training], object]] = {
        "validation is of other data": lambda it: (tuple(it.parts["validate"]), it.config.fit.validate_px),
        "means over batches are of other batch sizes": lambda it: it.config.fit.batch,
        "losses are other functions": lambda it: (it.config.fit.loss, tuple(it.config.fit.args.items())),
        "images are resized otherwise": lambda it: it.card.resize_px,
    }
    for what, key in asked.items():
        others = [it.label for it in trainings if key(it) != key(first)]
        if others:
            told.append(f"Not comparable: {what} in {', '.join(others)} than in {first.label}.")
    return told


Rows = Sequence[tuple[str, Mapping[str, tuple[float, float | None]]]]
"""Labels, and the mean and deviation of figures."""


def _named(it: Group) -> str:
    return f"{it.label} ({len(it.trainings)} seeds)" if len(it.trainings) > 1 else it.label


def _alone(training: Training) -> dict[str, tuple[float, float | None]]:
    return {name: (value, None) for name, value in training.figures.items()}


def _descriptions(groups: Sequence[Group]) -> list[str]:
    titles = ["network", "encoder", "initialisation", "encoder frozen", "parameters", "of these trained"]
    rows = [
        [_named(it), *(f"{v:,}" if isinstance(v, int) else v for v in it.trainings[0].description.values())]
        for it in groups
    ]
    return _table(titles, rows)


def _scores(rows: Rows, part: str) -> list[str]:
    columns = [(f"{part}_threshold", "threshold")]
    columns += [(f"{part}_{column}", f"{title} ({protocol})") for _, column, title, protocol in SCORES]
    there = [it for it in columns if any(it[0] in figures for _, figures in rows)]
    measured = [it for it in rows if f"{part}_threshold" in it[1]]
    return _table([title for _, title in there], _cells(measured, there))


def _cells(rows: Rows, columns: Sequence[tuple[str, str]]) -> list[list[str]]:
    return [
        [label, *(_number(name, *figures[name]) if name in figures else "" for name, _ in columns)]
        for label, figures in rows
    ]


def _number(name: str, mean: float, deviation: float | None) -> str:
    if name in WHOLE:
        text = f"{mean:,.0f}" if deviation is None else f"{mean:,.1f} ± {deviation:,.1f}"
    elif name.endswith("threshold"):
        text = f"{mean:.3g}" if not deviation else f"{mean:.3f} ± {deviation:.3f}"
    else:
        text = f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"
    return text


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; the first column, of labels, has no title."""
    cells = [["", *titles], ["---"] * (len(titles) + 1), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]


def _columns() -> list[str]:
    scores = [f"{part}_{name}" for part in PARTS for name in ("threshold", *(column for _, column, _, _ in SCORES))]
    return [*scores, *(name for name, _ in COURSE)]


def _runs_csv(groups: Sequence[Group]) -> str:
    """A row a training."""
    rows = [
        {"run": it.label, "group": group.label, "folder": str(it.folder), "seed": it.config.fit.seed}
        | it.description
        | it.figures
        for group in groups
        for it in group.trainings
    ]
    return _csv([key for key in rows[0] if key not in _columns()] + _columns(), rows)


def _means_csv(groups: Sequence[Group]) -> str:
    """A row a group: means, and deviations where there are several trainings."""
    rows: list[dict[str, Any]] = []
    for it in groups:
        row: dict[str, Any] = {"group": it.label, "runs": len(it.trainings)} | it.trainings[0].description
        for name, (mean, deviation) in it.means.items():
            row |= {name: mean, f"{name}_deviation": deviation}
        rows.append(row)
    described = [key for key in rows[0] if key.removesuffix("_deviation") not in _columns()]
    return _csv(described + [f"{name}{end}" for name in _columns() for end in ("", "_deviation")], rows)


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Only columns that have a value."""
    there = [name for name in columns if any(row.get(name) is not None for row in rows)]
    text = StringIO()
    writer = csv.DictWriter(text, there, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
