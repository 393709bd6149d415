"""Charts of the report page as numbers that its template draws: histograms, and tasks by stage and worker over time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .report_map import AREA_BINS, CONFIDENCE_BINS

STAGES = ("scan", "read", "predict", "vectorize", "join", "publish")
COLOURS = {
    "scan": "#8c8c8c", "read": "#4c78a8", "predict": "#f58518", "vectorize": "#54a24b", "join": "#b279a2",
    "publish": "#e45756",
}  # fmt: skip
STEPS = 600
"""A timeline is this many steps wide: what lies closer is one bar, however many tasks there were."""
MOST_WORKERS = 40


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram. share: of the highest, 0 to 1."""

    label: str
    count: int
    share: float


@dataclass(frozen=True)
class Histogram:
    """Bars under a title."""

    title: str
    bars: tuple[Bar, ...]


def areas_chart(counts: Sequence[int]) -> Histogram:
    """Buildings by area."""
    labels = [f"{low:g} to {high:g}" for low, high in pairwise(AREA_BINS)]
    return _histogram("Area, m²", [*labels, f"from {AREA_BINS[-1]:g}"], counts)


def confidences_chart(counts: Sequence[int]) -> Histogram:
    """Buildings by confidence."""
    labels = [f"{low:.2f} to {low + 0.05:.2f}" for low in CONFIDENCE_BINS]
    return _histogram("Confidence", labels, counts)


def _histogram(title: str, labels: Sequence[str], counts: Sequence[int]) -> Histogram:
    """Without the empty bars at either end."""
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return Histogram(title, ())
    part = slice(filled[0], filled[-1] + 1)
    most = max(counts)
    return Histogram(
        title,
        tuple(Bar(label, count, count / most) for label, count in zip(labels[part], counts[part], strict=True)),
    )


@dataclass(frozen=True)
class Span:
    """A task: when it began and ended, in seconds of the epoch."""

    worker: str
    stage: str
    begun: float
    ended: float


@dataclass(frozen=True)
class Segment:
    """A bar of the timeline, from left on, in thousandths of its width."""

    stage: str
    colour: str
    left: float
    width: float
    tasks: int
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """What each worker did when. lanes: workers and their bars; seconds: from the first task to the last."""

    seconds: float
    lanes: tuple[tuple[str, tuple[Segment, ...]], ...]
    stages: tuple[tuple[str, str], ...]
    left_out: int = 0


def read_spans(path: Path, since: float) -> Iterator[Span]:
    """The tasks of a run from its tasks.jsonl: those that ended after it began. Lines that are cut short are none."""
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                task = json.loads(line)
                span = Span(str(task["worker"]), str(task["stage"]), task["ended"] - task["seconds"], task["ended"])
            except (ValueError, KeyError, TypeError):
                continue
            if span.ended >= since:
                yield span


def timeline_chart(spans: Iterable[Span]) -> Timeline:
    """Lay tasks out by worker, those of one stage that lie closer than a step of the chart in one bar.

    Memory is set by the workers and the steps, not by the tasks: a second of a long run is a step, whatever was in it.
    """
    steps: dict[tuple[str, str], dict[int, list[float]]] = {}
    first, step_s = None, 1e-3
    for span in spans:
        first = span.begun if first is None else first
        while abs(span.ended - first) > STEPS * step_s:
            step_s *= 2
            steps = {lane: _coarser(own) for lane, own in steps.items()}
        own = steps.setdefault((span.worker, span.stage), {})
        for step in range(int((span.begun - first) // step_s), int((span.ended - first) // step_s) + 1):
            begun, ended = max(span.begun, first + step * step_s), min(span.ended, first + (step + 1) * step_s)
            entry = own.setdefault(step, [begun, ended, 0.0, 0.0])
            entry[0], entry[1] = min(entry[0], begun), max(entry[1], ended)
            entry[3] += max(0.0, ended - begun)
        own[int((span.ended - first) // step_s)][2] += 1
    if first is None:
        return Timeline(0.0, (), ())
    start = min(entry[0] for own in steps.values() for entry in own.values())
    stop = max(entry[1] for own in steps.values() for entry in own.values())
    return _timeline(steps, start, max(stop - start, 1e-3))


def _coarser(own: dict[int, list[float]]) -> dict[int, list[float]]:
    """Steps of twice the length."""
    wide: dict[int, list[float]] = {}
    for step, (begun, ended, tasks, seconds) in own.items():
        entry = wide.setdefault(step // 2, [begun, ended, 0.0, 0.0])
        entry[0], entry[1] = min(entry[0], begun), max(entry[1], ended)
        entry[2] += tasks
        entry[3] += seconds
    return wide


def _timeline(steps: dict[tuple[str, str], dict[int, list[float]]], start: float, seconds: float) -> Timeline:
    workers = sorted({worker for worker, _ in steps}, key=lambda name: (name == "driver", len(name), name))
    known = {stage: COLOURS.get(stage, "#72b7b2") for stage in sorted({s for _, s in steps}, key=_order)}
    lanes = []
    for worker in workers[:MOST_WORKERS]:
        segments: list[Segment] = []
        for stage, colour in known.items():
            for begun, ended, tasks, busy in _merged(steps.get((worker, stage), {}), seconds / STEPS):
                left, width = 1000 * (begun - start) / seconds, max(1.5, 1000 * (ended - begun) / seconds)
                segments.append(Segment(stage, colour, round(left, 1), round(width, 1), int(tasks), busy))
        lanes.append((worker, tuple(segments)))
    return Timeline(seconds, tuple(lanes), tuple(known.items()), max(0, len(workers) - MOST_WORKERS))


def _order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _merged(own: dict[int, list[float]], gap_s: float) -> Iterator[list[float]]:
    """Bars of a lane from left to right, those with less than a gap between them in one."""
    bar: list[float] | None = None
    for _, (begun, ended, tasks, seconds) in sorted(own.items()):
        if bar is not None and begun - bar[1] <= gap_s:
            bar = [bar[0], ended, bar[2] + tasks, bar[3] + seconds]
            continue
        if bar is not None:
            yield bar
        bar = [begun, ended, tasks, seconds]
    if bar is not None:
        yield bar
