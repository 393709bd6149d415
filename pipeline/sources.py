"""What a training is made from: areas, the Inria data set and pairs, found, placed, and read into chunks once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from segpipe.tasks.errors import UserError

from .areas import AreaPlan, is_read, pixels_of, plan_area, plan_inria, write_area
from .cluster_local import call_each
from .config import AreaConfig, TrainConfig
from .pairs import PairsPlan, parts_to_read, plan_pairs, prepare_pairs, write_part
from .workers import allowance

ALONE_PX = 30_000_000
"""Areas of fewer pixels in all are read in this process: workers take longer to start."""


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


def check_sources(config: TrainConfig) -> None:
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
    if pairs is not None and parts:
        prepare_pairs(pairs)
    for _ in call_each(write_part, [(pairs, part) for part in parts], workers):
        pass
