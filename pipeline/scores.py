"""What an evaluation has found: counts of runs, images and groups, their scores, and how far these may be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segpipe.tasks.evaluate import ROW, Tally, bootstrap, mean_over
from segpipe.tasks.grid import Window

SQUARE_PX = 512
"""Side of the squares that are resampled for the intervals."""
SEAM_PX = 32
CLASSES_M2 = (0, 50, 100, 200, 500, 2000)
"""Lower ends of the classes of area, on the ground."""


@dataclass(frozen=True)
class Picture:
    """One of the images that a run was made from: its place in the raster, and the group that it belongs to."""

    name: str
    window: Window
    group: str | None


@dataclass(frozen=True)
class Run:
    """A finished run.

    folder: with its files; place: what a person is told of where it lies, the URL of one in a bucket; offset: row and
    column of the raster's first pixel on the lattice; block_px: None if unknown.
    """

    folder: Path
    place: str
    name: str
    offset: tuple[int, int]
    block_px: int | None
    pictures: tuple[Picture, ...]
    geopackage: Path | None


@dataclass(frozen=True)
class Place:
    """A square of the raster, and how many of its pixels are false alarms and misses."""

    window: Window
    false_alarms: int
    misses: int


@dataclass(frozen=True)
class City:
    """A run against its truth. rows of arrays are those of tallies (`Tally.as_row`).

    pictures_rows: a row a picture; squares_rows: a row a square that has a valid pixel, square_groups: its group.
    true_classes: a row a class of CLASSES_M2: true buildings that are hit and missed; found_classes: found ones that
    are hits and false alarms. hidden_px: pixels invalid in the run, untold_px: valid there, but not in the truth.
    """

    run: Run
    truth: Path
    whole: Tally
    seam: Tally
    pictures_rows: NDArray[np.int64]
    squares_rows: NDArray[np.int64]
    square_groups: NDArray[np.object_]
    true_classes: NDArray[np.int64]
    found_classes: NDArray[np.int64]
    hidden_px: int
    untold_px: int
    apart_true: int
    apart_found: int
    outside: int
    worst: tuple[Place, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """What is told of a place: counts, scores, and of each score the interval that holds 95 % of resamplings."""

    scope: str
    name: str
    tally: Tally | None
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    of: int = 1
    """Images that it is of."""


@dataclass(frozen=True)
class Evaluation:
    """Runs against their truths."""

    cities: tuple[City, ...]

    @cached_property
    def rows(self) -> tuple[Scores, ...]:
        """All that there is a score of: pooled, mean over images, groups, cities, seams, single images."""
        return tuple(self._rows())

    def _rows(self) -> Iterator[Scores]:
        cities = self.cities
        squares = np.concatenate([city.squares_rows for city in cities])
        pictures = np.concatenate([_compared(city.pictures_rows) for city in cities])
        yield _pooled("pooled", "all", sum((city.whole for city in cities), Tally()), squares, len(pictures))
        yield _means("all", pictures)
        groups = {picture.group: None for city in cities for picture in city.run.pictures if picture.group is not None}
        for group in groups:
            own = np.concatenate(
                [city.pictures_rows[[picture.group == group for picture in city.run.pictures]] for city in cities]
            )
            own_squares = np.concatenate([city.squares_rows[city.square_groups == group] for city in cities])
            yield _pooled("group", group, Tally.of_row(own.sum(axis=0)), own_squares, len(_compared(own)))
            yield _means(group, _compared(own))
        if len(cities) > 1:
            for city in cities:
                own = _compared(city.pictures_rows)
                yield _pooled("city", city.run.name, city.whole, city.squares_rows, len(own))
                yield _means(city.run.name, own)
        if any(city.seam.pixels.pixels for city in cities):
            seam = sum((city.seam.as_row() for city in cities), np.zeros(ROW, np.int64))
            whole = sum((city.whole.as_row() for city in cities), np.zeros(ROW, np.int64))
            for name, row in ((f"{SEAM_PX} px about seams", seam), ("elsewhere", whole - seam)):
                tally = Tally.of_row(row)
                yield Scores("seams", name, tally, tally.scores, {})
        for city in cities:
            for picture, row in zip(city.run.pictures, city.pictures_rows, strict=True):
                tally = Tally.of_row(row)
                if tally.pixels.pixels:
                    yield Scores("image", picture.name, tally, tally.scores, {})


def _compared(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of which any pixel was compared."""
    return rows[rows[:, :4].any(axis=1)]


def _pooled(scope: str, name: str, tally: Tally, squares: NDArray[np.int64], images: int) -> Scores:
    return Scores(scope, name, tally, tally.scores, bootstrap(squares), images)


def _means(name: str, rows: NDArray[np.int64]) -> Scores:
    if not len(rows):
        rows = np.zeros((1, ROW), np.int64)
    return Scores("mean over images", name, None, *mean_over(rows), of=len(rows))
