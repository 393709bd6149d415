"""Which part of the labelled data is trained on, which validates, and which is only measured at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.sample import Area

from .config import Part, SplitConfig, TrainConfig

PARTS = ("train", "validate", "test")


@dataclass(frozen=True)
class Split:
    """The three parts. names: of their units (areas, tiles, blocks or pairs), in the order of the data."""

    train: tuple[Area, ...]
    validate: tuple[Area, ...]
    test: tuple[Area, ...]
    names: dict[str, list[str]]
    gap_px: int = 0


@dataclass(frozen=True)
class _Unit:
    """What a split deals out: an area (window None), or a window of one."""

    name: str
    area: int
    window: Window | None = None


def split_areas(config: TrainConfig, areas: Sequence[Area], halo_px: int) -> Split:
    """Deal areas, their tiles or their blocks out to the parts. UserError if a part would be empty or is not known.

    Where windows are dealt out, a pixel of the training part lies in no window of the others; between blocks there is
    a gap besides, by default of the network's halo, so that nothing that validates was looked at in training.
    """
    rule = config.split
    gap_px = halo_px if rule.gap_px == "auto" else rule.gap_px
    units = _units(rule, areas)
    held = deal(units_names(units), rule, config)
    if rule.by == "area":
        chosen = {part: tuple(areas[unit.area] for unit in units if held[unit.name] == part) for part in PARTS}
    else:
        gap_px = gap_px if rule.by == "block" else 0
        chosen = {part: _cut(areas, units, held, part, gap_px) for part in PARTS}
    names = {part: [unit.name for unit in units if held[unit.name] == part] for part in PARTS}
    if not chosen["train"]:
        raise UserError(f"split: all {len(units)} {rule.by}s validate or test; expected some to train on")
    if rule.validate_part is not None and not chosen["validate"]:
        raise UserError(f"split.validate: no {rule.by} of {len(units)} with a labelled pixel; expected some")
    return Split(chosen["train"], chosen["validate"], chosen["test"], names, gap_px if rule.by == "block" else 0)


def units_names(units: Sequence[_Unit]) -> list[str]:
    """Their names. UserError for one that is there twice: a split could not tell them apart."""
    names = [unit.name for unit in units]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"split: two are named {twice}; expected names of their own")
    return names


def _units(rule: SplitConfig, areas: Sequence[Area]) -> list[_Unit]:
    if rule.by == "area":
        return [_Unit(area.name, number) for number, area in enumerate(areas)]
    units: list[_Unit] = []
    for number, area in enumerate(areas):
        windows = area.tiles if rule.by == "tile" else _blocks(area, rule.block_px)
        units += [
            _Unit(f"{area.name}/{rule.by}{index}", number, window)
            for index, window in enumerate(windows, start=1)
            if window.intersect(area.window).pixels
        ]
    return units


def _blocks(area: Area, block_px: int) -> list[Window]:
    """Squares that cover an area's labelled pixels, counted from their corner, row by row."""
    window = area.window
    own = Window(0, 0, *window.shape_yx)
    return [
        Window(window.row_off + row * block_px, window.col_off + col * block_px, block_px, block_px).intersect(window)
        for row, col in own.cells(block_px)
    ]


def _cut(
    areas: Sequence[Area], units: Sequence[_Unit], held: dict[str, str], part: str, gap_px: int
) -> tuple[Area, ...]:
    """The areas with labels only in a part's windows, and none within gap_px of those of the parts after it."""
    later = PARTS[PARTS.index(part) + 1 :]
    found: list[Area] = []
    for number, area in enumerate(areas):
        own = [unit for unit in units if unit.area == number]
        keep = [unit.window for unit in own if held[unit.name] == part and unit.window is not None]
        drop = [unit.window.pad(gap_px) for unit in own if held[unit.name] in later and unit.window is not None]
        cut = area.part(area.name, keep, drop) if keep else None
        if cut is not None:
            found.append(cut)
    return tuple(found)


def deal(names: Sequence[str], rule: SplitConfig, config: TrainConfig) -> dict[str, str]:
    """The part of each name. Lists are taken first; the others are shuffled by the seed, and counted off.

    Does not depend on the order of the names.
    """
    held = dict.fromkeys(names, "train")
    for part, wanted in (("validate", rule.validate_part), ("test", rule.test)):
        for name in _listed(config, wanted, part, names):
            if held[name] != "train":
                raise UserError(f"split.{part}: {name} is in {held[name]} too; expected each in one part")
            held[name] = part
    free = sorted(name for name in names if held[name] == "train")
    shuffled = [free[index] for index in np.random.default_rng(rule.seed).permutation(len(free))]
    for part, wanted in (("validate", rule.validate_part), ("test", rule.test)):
        count = _count(wanted, len(names))
        if count > len(shuffled):
            raise UserError(f"split.{part}: {count} of {len(names)}, but only {len(shuffled)} are left; expected fewer")
        held |= dict.fromkeys(shuffled[:count], part)
        shuffled = shuffled[count:]
    return held


def _count(wanted: Part | None, total: int) -> int:
    """How many a share or a number asks for; a share is of all, and at least one."""
    if isinstance(wanted, float):
        return max(1, round(wanted * total))
    return wanted if isinstance(wanted, int) else 0


def _listed(config: TrainConfig, wanted: Part | None, part: str, names: Sequence[str]) -> list[str]:
    """The names of a list, or of a file: the first word of each line; lines that begin with # say nothing."""
    if isinstance(wanted, str):
        path = config.path(wanted)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"split.{part}: {path}: {error}; expected a text file with a name a line") from None
        listed = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    else:
        listed = list(wanted) if isinstance(wanted, tuple) else []
    known = set(names)
    listed = [name if name in known else Path(name).stem for name in listed]
    unknown = [name for name in listed if name not in known]
    if unknown:
        raise UserError(
            f"split.{part}: {', '.join(unknown[:3])} {'is' if len(unknown) == 1 else 'are'} not known; expected names"
            f" such as {', '.join(list(names)[:3])}"
        )
    return list(dict.fromkeys(listed))
