"""Draw the tables of docs/benchmarks.md into docs/benchmarks.png, one panel for each script.

    python bench/plots.py

Nothing is measured here: after a table has changed, the picture is drawn anew.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Panel:
    """A table's heading, the columns that name a row, those that are drawn, and what they are measured in.

    only: text that a row's name holds, for tables of which a part is drawn.
    """

    heading: str
    names: tuple[str, ...]
    values: tuple[str, ...]
    unit: str
    only: str = ""


PANELS = (
    Panel("The network alone", ("network",), ("predict, Mpx/s", "bare", "ready", "compiled", "OpenVINO"), "Mpx/s"),
    Panel("Speed and memory", ("city", "block"), ("whole run, Mpx/s", "predict task, Mpx/s of window"), "Mpx/s"),
    Panel("Vectorizing", ("side, px", "way"), ("times as fast as shapes",), "times as fast as shapes", "40,000"),
    Panel("Reading", ("tiles",), ("bare, s", "plain, s", "ours, s"), "s"),
    Panel("Against a plain script", ("",), ("seconds, Banepa",), "s"),
    Panel("Training", ("network",), ("bare step, s", "of a fit, s"), "s a step"),
    Panel("Driver and scheduler", ("blocks",), ("wall, ms", "driver, ms"), "ms a block"),
)


def table_of(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table under a heading, by the names of its columns. ValueError if there is none."""
    _, found, rest = text.partition(f"\n## {heading}\n")
    lines = [line.strip("|") for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    if not found or len(lines) < 3:
        raise ValueError(f"{PAGE.name}: no table under {heading!r}; expected one")
    cells = [[cell.strip().replace("`", "") for cell in line.split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:] if len(row) == len(cells[0])]


def number(text: str) -> float:
    """The first number in a cell; NaN where there is none."""
    found = re.search(r"\d[\d,]*\.?\d*", text)
    return float(found[0].replace(",", "")) if found else float("nan")


def rows_of(panel: Panel, text: str) -> dict[str, dict[str, str]]:
    """The rows of a panel's table that it shows, by their names."""
    rows = {", ".join(row[name] for name in panel.names): row for row in table_of(text, panel.heading)}
    return {name: row for name, row in rows.items() if panel.only in name}


def draw(axes: Axes, panel: Panel, text: str) -> None:
    """Horizontal bars: a group for each row, a bar for each value, with its number."""
    rows = rows_of(panel, text)
    thick = 0.8 / len(panel.values)
    for index, column in enumerate(panel.values):
        values = [number(row[column]) for row in rows.values()]
        bars = axes.barh(np.arange(len(rows)) + index * thick, values, thick, label=column)
        axes.bar_label(bars, fmt=lambda it: f"{it:.0f}" if it >= 100 else f"{it:.3g}", fontsize=6, padding=2)
    axes.set_yticks(
        np.arange(len(rows)) + 0.4 - thick / 2, ["\n".join(textwrap.wrap(name, 32)) for name in rows], fontsize=6
    )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(panel.heading, fontsize=9, loc="left")
    axes.set_xlabel(panel.unit, fontsize=7)
    axes.tick_params(axis="x", labelsize=6)
    if len(panel.values) > 1:
        axes.legend(fontsize=6, frameon=False)


def main() -> None:
    mpl.use("Agg")
    text = PAGE.read_text(encoding="utf-8")
    # Side by side, as high as the one with more bars, each of them as high as its number.
    bars = [max(20, len(rows_of(panel, text)) * len(panel.values)) for panel in PANELS]
    heights = [max(bars[first : first + 2]) for first in range(0, len(bars), 2)]
    size = (12, sum(0.12 * it + 0.8 for it in heights))
    figure, grid = plt.subplots(len(heights), 2, figsize=size, height_ratios=heights, layout="constrained")
    for axes, panel in zip(grid.flat, PANELS, strict=False):
        draw(axes, panel, text)
    for axes in grid.flat[len(PANELS) :]:
        axes.set_axis_off()
    figure.savefig(PAGE.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
