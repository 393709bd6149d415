"""Scores as they are read: on a terminal, in Markdown, as CSV and as JSON. All four say the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.tasks.evaluate import BOUNDARY_PX, RESAMPLINGS, Counts
from segpipe.tasks.match import LEAST_IOU

from .beside import written_beside
from .judge import APART_SHARE
from .scores import CLASSES_M2, SQUARE_PX, Evaluation, Scores

TITLES = {
    "iou": "IoU",
    "dice": "Dice",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "boundary_iou": "boundary IoU",
    "building_precision": "building precision",
    "building_recall": "building recall",
    "building_f1": "building F1",
}
PROTOCOL = (
    "IoU, Dice, accuracy, precision, recall: of pixels that are valid in run and truth. Pooled: all pixels are counted"
    " into one table, then divided. Mean over images: a score of each image, then their mean.",
    f"Boundary IoU: of the pixels of each mask within {BOUNDARY_PX} px of its outline (Cheng et al. 2021); there is no"
    " outline along invalid pixels.",
    f"Buildings: a footprint found is a hit if its IoU with a true one is {LEAST_IOU:g} or more, each counting once;"
    " the most confident choose first (the SpaceNet rule). Precision is of those found, recall of the true ones.",
    f"Not judged: footprints more than {100 * APART_SHARE:g} % of which lie under invalid pixels, or, of those found,"
    " in true ones that do; they count nowhere else.",
    f"Intervals: 95 % of {RESAMPLINGS:,} resamplings, of squares of {SQUARE_PX} px for what is pooled, of images for"
    " means over images. A building counts where the middle of its bounding box lies.",
    "Where there is nothing to find and nothing was found, a score is 1.",
)
CLASS_TITLES = ("true", "hit", "missed", "recall", "found", "right", "false alarms", "precision")


def terminal_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Labels and texts: what is pooled over all, the means over images, groups, classes, and what must be known."""
    rows = list(evaluation.rows)
    pooled, means = rows[:2]
    lines = [(TITLES[name], _with_interval(pooled, name)) for name in TITLES]
    lines += (
        [("mean over images", f"IoU {_with_interval(means, 'iou')}, of {_images(means.of)}")] if means.of > 1 else []
    )
    lines += [
        (it.name, f"IoU {it.scores['iou']:.4f}, accuracy {it.scores['accuracy']:.4f}, building F1"
                  f" {it.scores['building_f1']:.4f}; {it.scope}{f', {_images(it.of)}' if it.scope == 'group' else ''}")
        for it in rows if it.scope in ("group", "city", "seams")
    ]  # fmt: skip
    lines += [("buildings", _counted(pooled.tally.buildings if pooled.tally else Counts()))]
    lines += [(f"{label} m2", text) for label, text in _class_texts(evaluation)]
    lines += list(told(evaluation))
    return lines


def told(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """What was compared and what was not."""
    for city in evaluation.cities:
        head = f"{city.run.name}: " if len(evaluation.cities) > 1 else ""
        counts = (city.whole.pixels.pixels, city.hidden_px, city.untold_px)
        yield "pixels", head + "{:,} compared, {:,} invalid, {:,} without truth".format(*counts)
        if city.apart_true or city.apart_found:
            yield "not judged", f"{head}{city.apart_true:,} true buildings and {city.apart_found:,} found ones"
        if city.outside:
            yield "left out", f"{head}{city.outside:,} footprints of the truth lie outside the run"
        yield from (("note", head + note) for note in city.notes)


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _counted(buildings: Counts) -> str:
    return f"{buildings.tp:,} hits, {buildings.fp:,} false alarms, {buildings.fn:,} misses"


def _with_interval(scores: Scores, name: str) -> str:
    text = f"{scores.scores[name]:.4f}"
    if name in scores.intervals:
        low, high = scores.intervals[name]
        text += f" ({low:.4f} to {high:.4f})"
    return text


def class_names() -> list[str]:
    """The classes of area in words, such as `50 to 100`."""
    ends = [*CLASSES_M2[1:], None]
    return [
        f"under {stop}" if not start else f"{start} to {stop}" if stop else f"from {start}"
        for start, stop in zip(CLASSES_M2, ends, strict=True)
    ]


def class_rows(evaluation: Evaluation) -> Iterator[tuple[str, tuple[int | float, ...]]]:
    """Of each class its name and the figures of CLASS_TITLES. The true ones are sorted by their own area, and so on."""
    true = np.sum([city.true_classes for city in evaluation.cities], axis=0).tolist()
    found = np.sum([city.found_classes for city in evaluation.cities], axis=0).tolist()
    for name, (hit, missed), (right, wrong) in zip(class_names(), true, found, strict=True):
        counts = Counts(tp=hit, fn=missed), Counts(tp=right, fp=wrong)
        yield name, (hit + missed, hit, missed, counts[0].recall, right + wrong, right, wrong, counts[1].precision)


def _class_texts(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    for name, (true, hit, _, recall, found, right, _, precision) in class_rows(evaluation):
        if true or found:
            yield (
                name,
                f"{hit:,} of {true:,} hit ({recall:.1%}), {right:,} of {found:,} found are right ({precision:.1%})",
            )


# Files


def write_tables(folder: Path, evaluation: Evaluation) -> list[Path]:
    """Write evaluation.md, evaluation.csv and evaluation.json; RunError where one cannot be written."""
    texts = {"md": markdown(evaluation), "csv": as_csv(evaluation), "json": as_json(evaluation)}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"evaluation.{suffix}")
        with written_beside(paths[-1]) as partial:
            partial.write_text(text, encoding="utf-8")
    return paths


def markdown(evaluation: Evaluation) -> str:
    """All tables on a page."""
    rows = list(evaluation.rows)
    names = ", ".join(city.run.name for city in evaluation.cities)
    lines = [f"# Evaluation of {names}", ""]
    lines += _table(("run", "truth"), [(city.run.place, str(city.truth)) for city in evaluation.cities])
    titles = {
        ("pooled", "mean over images"): "Scores",
        ("group",): "By group",
        ("city",): "By city",
        ("seams",): "At block seams and elsewhere",
        ("image",): "By image",
    }
    overall = {(it.scope, it.name) for it in rows if it.name == "all"}
    for scopes, title in titles.items():
        own = [it for it in rows if it.scope in scopes and (it.name == "all") == (title == "Scores")]
        if title in ("By group", "By city"):
            named = {it.name for it in own}
            own += [it for it in rows if it.scope == "mean over images" and it.name in named]
        if own:
            head = ("" if (own[0].scope, own[0].name) in overall else "name", "images", *TITLES.values())
            lines += ["", f"## {title}", "", *_table(head, [_score_cells(it) for it in own])]
    classes = [(name, *(_figure(value) for value in values)) for name, values in class_rows(evaluation)]
    lines += ["", "## Buildings by area", "", *_table(("m² on the ground", *CLASS_TITLES), classes)]
    lines += ["", "## What was compared", "", *(f"- {label}: {text}" for label, text in told(evaluation))]
    return "\n".join([*lines, "", "## Protocol", "", *(f"- {line}" for line in PROTOCOL)]) + "\n"


def _score_cells(it: Scores) -> tuple[str, ...]:
    label = it.scope if it.name == "all" else f"{it.name}, mean over images" if it.tally is None else it.name
    return (label, f"{it.of:,}", *(_with_interval(it, name) for name in TITLES))


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]


def _counts_of(it: Scores) -> dict[str, int]:
    if it.tally is None:
        return {}
    parts = {"pixels": it.tally.pixels, "boundary": it.tally.boundary, "buildings": it.tally.buildings}
    return {
        f"{name}_{field}": getattr(counts, field)
        for name, counts in parts.items()
        for field in (("tp", "fp", "fn", "tn") if name == "pixels" else ("tp", "fp", "fn"))
    }


def as_csv(evaluation: Evaluation) -> str:
    """A row a place and a class: scope, name, counts, scores, ends of intervals."""
    rows: list[dict[str, Any]] = []
    for it in evaluation.rows:
        ends = {
            f"{name}_{end}": value
            for name, pair in it.intervals.items()
            for end, value in zip(("low", "high"), pair, strict=True)
        }
        rows.append({"scope": it.scope, "name": it.name, "images": it.of, **_counts_of(it), **it.scores, **ends})
    for name, (_, hit, missed, recall, _, right, wrong, precision) in class_rows(evaluation):
        counts = {"true_hit": hit, "true_missed": missed, "found_right": right, "found_wrong": wrong}
        scores = {"building_recall": recall, "building_precision": precision}
        rows.append({"scope": "area class", "name": f"{name} m2", **counts, **scores})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(evaluation: Evaluation) -> str:
    """Everything, with the counts that the scores are of."""
    values = {
        "runs": [
            {
                "run": city.run.place,
                "name": city.run.name,
                "truth": str(city.truth),
                "pixels_invalid": city.hidden_px,
                "pixels_without_truth": city.untold_px,
                "true_not_judged": city.apart_true,
                "found_not_judged": city.apart_found,
                "true_outside": city.outside,
                "notes": list(city.notes),
            }
            for city in evaluation.cities
        ],
        "scores": [
            {
                "scope": it.scope,
                "name": it.name,
                "images": it.of,
                "counts": _counts_of(it),
                "scores": it.scores,
                "intervals": {name: list(pair) for name, pair in it.intervals.items()},
            }
            for it in evaluation.rows
        ],
        "area_classes": [
            {"m2": name, **dict(zip((it.replace(" ", "_") for it in CLASS_TITLES), values, strict=True))}
            for name, values in class_rows(evaluation)
        ],
        "protocol": list(PROTOCOL),
    }
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"
