"""Buildings of a large mask in blocks on several processes, against one polygonize of the whole of it.

    python bench/vectorize.py            # 10,000 x 10,000 and 40,000 x 40,000 px: minutes, 12 GiB of memory
    python bench/vectorize.py --short    # 10,000 x 10,000 px

The town is drawn here, the same at every run: houses of 5 to 180 m² at 0.3 m, turned, some with wings or a courtyard,
some touching, with ragged edges, specks and holes in the imagery; a fifth of it is built. Ours goes through the stages'
own functions: every block to a fragment file, the joins planned from the fragments' sides, the joined buildings to
files; with the outlines as they are, and with the defaults of `vectorize:` (simplified, small holes filled, small
buildings dropped). Either way with what is counted along each building's edge. Against it stand one
rasterio.features.shapes of the whole mask in memory, with a plain loop over what it gives and with shapely polygons
made of that, and gdal_polygonize.py of the mask as a GeoTIFF to a GeoPackage, where it is installed.

Prints Markdown: seconds on the clock and of processors (all processes together; on a machine that does other work
besides, trust their ratio more), and the largest resident set (RSS) that one process has had, as the kernel keeps it.
The processes have imported all they need before the clock starts. Polygons are compared exactly, as sets.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyogrio
import pyproj
import rasterio
import shapely
import shapely.geometry
from city import peak_mib
from numpy.typing import NDArray
from rasterio.features import shapes
from scipy.ndimage import gaussian_filter

from segpipe.tasks.fragments import border_from_bytes, finished_from_bytes, fragment_to_bytes, sides_from_bytes
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.predict import INVALID
from segpipe.tasks.seams import Joins, collect, join, plan_joins
from segpipe.tasks.vectorize import Buildings, VectorSettings, finish, mask_of, vectorize_block

THRESHOLD_U8 = 125
AS_THEY_ARE = VectorSettings(THRESHOLD_U8, 0, 0, 0)
DEFAULTS = VectorSettings(THRESHOLD_U8, 10, 2, 0.3)
LATTICE = Lattice(pyproj.CRS.from_epsg(32645).to_wkt(), 0.3, 0.0, 0.0)

QUARTER_PX = 420
PLOT_PX = 42
"""A quarter of the town is 10 x 10 plots, most of which have a house."""
LARGEST_PX = 96
"""Side of the square that a house is drawn in."""
HOUSES = 256
NO_IMAGERY = 0.02
"""Share of quarters without valid imagery."""


@cache
def houses() -> list[NDArray[np.uint8]]:
    """Probabilities of houses and, one in eight, of specks."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:LARGEST_PX, :LARGEST_PX] - (LARGEST_PX - 1) / 2
    drawn = []
    for number in range(HOUSES):
        area = rng.uniform(1, 20) if number % 8 == 0 else math.exp(rng.uniform(math.log(60), math.log(2000)))
        long = math.sqrt(area * rng.uniform(1, 2.2))
        wide, turn = area / long, rng.uniform(0, math.pi)
        u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        house = (abs(u) < long / 2) & (abs(v) < wide / 2)
        if number % 8 in (1, 2):  # an L or a U
            house &= ~((u > long / 6) & (v > wide / 6))
            house &= ~((u < -long / 6) & (v > wide / 6)) | (number % 8 == 1)
        if number % 16 == 3:  # a courtyard
            house &= ~((abs(u) < long / 5) & (abs(v) < wide / 5))
        soft = gaussian_filter(house.astype(np.float64), 0.8) + gaussian_filter(rng.normal(0, 0.6, x.shape), 1)
        prob_HW = np.clip(np.where(gaussian_filter(house.astype(np.float64), 2) > 0.05, soft, 0), 0, 1)
        drawn.append(np.round(250 * prob_HW).astype(np.uint8))
    return drawn


def town(window: Window) -> NDArray[np.uint8]:
    """prob_HW of any window of the town: what is there does not depend on the window."""
    around = window.pad(LARGEST_PX).snap(QUARTER_PX)
    prob_HW = np.zeros(around.shape_yx, np.uint8)
    bare = []
    for row, col in around.cells(QUARTER_PX):
        quarter = Window.cell(row, col, QUARTER_PX)
        rng = np.random.default_rng((row + 1000, col + 1000))
        if rng.random() < NO_IMAGERY:
            bare.append(quarter)
        plots = range(0, QUARTER_PX, PLOT_PX)
        offs = np.array([(top, left) for top in plots for left in plots]) + rng.integers(-10, 11, (len(plots) ** 2, 2))
        kinds = np.where(rng.random(len(offs)) < 0.9, rng.integers(0, HOUSES, len(offs)), 0)
        for (top, left), kind in zip((offs - (LARGEST_PX - PLOT_PX) // 2).tolist(), kinds.tolist(), strict=True):
            lies = Window(quarter.row_off + top, quarter.col_off + left, LARGEST_PX, LARGEST_PX)
            part = lies.intersect(around)
            there_HW = prob_HW[part.within(around)]
            np.maximum(there_HW, houses()[kind][part.within(lies)], out=there_HW)
    for quarter in bare:
        prob_HW[quarter.within(around)] = INVALID
    return prob_HW[window.within(around)]


@dataclass(frozen=True)
class Job:
    """A town of side x side px in a folder: a file of probabilities and one of vectors for each block."""

    folder: Path
    side: int
    block_px: int
    settings: VectorSettings

    @property
    def blocks(self) -> list[Window]:
        """Of the town, row by row."""
        whole = Window(0, 0, self.side, self.side)
        return [Window.cell(*cell, self.block_px).intersect(whole) for cell in whole.cells(self.block_px)]

    def probabilities(self, number: int) -> Path:
        """The file of a block's prob_HW."""
        return self.folder / f"{number}.npy"

    def fragment(self, number: int) -> Path:
        """The file of a block's fragment."""
        return self.folder / f"{number}.arrow"

    @property
    def mask(self) -> Path:
        """The GeoTIFF of the whole mask."""
        return self.folder / "mask.tif"

    def joined(self, number: int) -> Path:
        """The file of the joined buildings that begin in a block."""
        return self.folder / f"{number}.joined.arrow"

    def read(self, window: Window) -> NDArray[np.uint8]:
        """prob_HW of any window, 255 outside the town."""
        prob_HW = np.full(window.shape_yx, INVALID, np.uint8)
        whole, across = Window(0, 0, self.side, self.side), -(-self.side // self.block_px)
        for row, col in window.intersect(whole).cells(self.block_px):
            block = Window.cell(row, col, self.block_px).intersect(whole)
            common = block.intersect(window)
            stored = np.load(self.probabilities(row * across + col), mmap_mode="r")
            prob_HW[common.within(window)] = stored[common.within(block)]
        return prob_HW


# What the processes do


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock and of processors, and the most memory (RSS, MiB) that one process has had by the end."""

    seconds: float
    processor: float
    peak: float

    @staticmethod
    def since(start: float, processor: float) -> Spent:
        """By this process, since its clocks stood at start and at processor."""
        return Spent(time.perf_counter() - start, time.process_time() - processor, peak_mib(os.getpid()))


@dataclass(frozen=True)
class Found:
    """Number of polygons, the sum of their areas in px, and a digest of their set: the sum of the digests of each."""

    count: int
    area_px: int = 0
    digest: int = 0

    @staticmethod
    def of(polygons: NDArray[np.object_]) -> Found:
        """Of polygons, wherever their rings begin."""
        wkb = shapely.to_wkb(shapely.normalize(polygons))
        digest = sum(int.from_bytes(hashlib.blake2b(one, digest_size=8).digest(), "little") for one in wkb)
        return Found(len(polygons), round(shapely.area(polygons).sum()), digest)

    def __add__(self, other: Found) -> Found:
        return Found(self.count + other.count, self.area_px + other.area_px, self.digest + other.digest)


def spending(work: Callable[..., None], *arguments: object) -> Spent:
    """What one call takes."""
    start, processor = time.perf_counter(), time.process_time()
    work(*arguments)
    return Spent.since(start, processor)


def draw_one(job: Job, number: int) -> None:
    np.save(job.probabilities(number), town(job.blocks[number]))


def vectorize_one(job: Job, number: int) -> None:
    fragment = vectorize_block(np.load(job.probabilities(number)), job.blocks[number], LATTICE, job.settings)
    job.fragment(number).write_bytes(fragment_to_bytes(fragment))


def join_one(job: Job, home: int, joins: Joins) -> None:
    pieces, building = collect(joins, lambda number: border_from_bytes(job.fragment(number).read_bytes()))
    batch = finish(join(pieces, building), job.settings, LATTICE, job.read).to_arrow()
    with pa.OSFile(str(job.joined(home)), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def whole_mask(job: Job) -> NDArray[np.bool_]:
    """The mask in one array, put together block by block."""
    mask_HW = np.zeros((job.side, job.side), np.bool_)
    for number, block in enumerate(job.blocks):
        rows, cols = block.within(Window(0, 0, job.side, job.side))
        mask_HW[rows, cols] = mask_of(np.load(job.probabilities(number)), THRESHOLD_U8)
    return mask_HW


def write_mask(job: Job) -> None:
    """The mask as a GeoTIFF."""
    mask_HW = whole_mask(job)
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "width": job.side, "height": job.side, "nodata": 0}
    with rasterio.open(job.mask, "w", **profile, crs=LATTICE.crs_wkt, transform=LATTICE.transform()) as dataset:
        dataset.write(mask_HW.view(np.uint8), 1)


def shapes_of_whole(job: Job, as_polygons: bool) -> tuple[Spent, Found]:
    """One polygonize of the whole by rasterio. What is found is summed up after the clock has stopped."""
    mask_HW = whole_mask(job)
    start, processor = time.perf_counter(), time.process_time()
    found = shapes(mask_HW.view(np.uint8), mask=mask_HW, connectivity=4)
    if not as_polygons:
        count = sum(1 for _ in found)
        return Spent.since(start, processor), Found(count)
    polygons = np.array([shapely.geometry.shape(geometry) for geometry, _ in found], np.object_)
    return Spent.since(start, processor), Found.of(polygons)


def found_in(job: Job, number: int) -> Found:
    """Of one block's files: the buildings that lie within it, and the joined ones that begin in it."""
    found = Found.of(finished_from_bytes(job.fragment(number).read_bytes()).raw)
    if job.joined(number).exists():
        joined = Buildings.from_arrow(pa.ipc.open_file(job.joined(number).read_bytes()).get_batch(0))
        found += Found.of(joined.raw)
    return found


# What starts them


def vectorize_all(job: Job, pool: Executor) -> tuple[Spent, list[float]]:
    """All blocks and joins of a town, and the seconds of its three steps: blocks, planning of the joins, joins."""
    start, processor = [time.perf_counter()], time.process_time()
    spent = [*pool.map(partial(spending, vectorize_one, job), range(len(job.blocks)))]
    start.append(time.perf_counter())
    joins = plan_joins(job.blocks, lambda number: sides_from_bytes(job.fragment(number).read_bytes()))
    homes = np.unique(joins.home).tolist()
    start.append(time.perf_counter())
    spent += pool.map(partial(spending, join_one, job), homes, [joins.at(home) for home in homes])
    driver = Spent.since(start[0], processor)
    steps = np.diff([*start, time.perf_counter()]).tolist()
    own = sum(one.processor for one in spent)
    return Spent(driver.seconds, driver.processor + own, max(one.peak for one in (driver, *spent))), steps


def in_new_processes(processes: int) -> ProcessPoolExecutor:
    """Processes that are no copies of this one, and have imported what this one has."""
    pool = ProcessPoolExecutor(processes, get_context("spawn"))
    for waiting in [pool.submit(time.sleep, 1) for _ in range(processes)]:
        waiting.result()
    return pool


def gdal_polygonize(job: Job) -> tuple[Spent, Found] | None:
    """gdal_polygonize.py of the mask; None where it is not installed."""
    command = shutil.which("gdal_polygonize.py") or shutil.which("gdal_polygonize")
    if command is None:
        return None
    with in_new_processes(1) as pool:
        pool.submit(write_mask, job).result()
    vectors = job.folder / "polygonized.gpkg"
    start = time.perf_counter()
    # Its own Python and libraries: nothing of this environment may leak in.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GDAL", "PROJ"))}
    process = subprocess.Popen([command, "-q", str(job.mask), str(vectors)], env=own)
    peak = 0.0
    while True:
        peak = max(peak, peak_mib(process.pid))
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with exit code {process.returncode}")
    seconds = time.perf_counter() - start
    count = pyogrio.read_info(vectors)["features"]
    vectors.unlink()
    return Spent(seconds, used.ru_utime + used.ru_stime, peak), Found(count)


def measure(side: int, block_px: int, processes: int) -> Iterator[tuple[str, int, Spent, Found, str]]:
    """The rows of the table for a town of side x side px, and what is said of each."""
    with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as name:
        job = Job(Path(name), side, block_px, AS_THEY_ARE)
        numbers = range(len(job.blocks))
        with in_new_processes(processes) as pool:
            [*pool.map(partial(draw_one, job), numbers)]
        with in_new_processes(1) as pool:
            yield "rasterio.features.shapes", 1, *pool.submit(shapes_of_whole, job, False).result(), ""
        ours: dict[str, Found] = {}
        for what, settings in (("blocks, outlines as they are", AS_THEY_ARE), ("blocks, defaults", DEFAULTS)):
            job = replace(job, settings=settings)
            with in_new_processes(processes) as pool:
                spent, steps = vectorize_all(job, pool)
                ours[what] = sum(pool.map(partial(found_in, job), numbers), Found(0))
            told = "blocks {:.1f} s, planning of joins {:.1f} s, joins {:.1f} s".format(*steps)
            yield what, processes, spent, ours[what], told
        with in_new_processes(1) as pool:
            spent, oracle = pool.submit(shapes_of_whole, job, True).result()
        same = "the very polygons of" if oracle == ours["blocks, outlines as they are"] else "OTHER POLYGONS THAN"
        yield "shapes, as shapely polygons", 1, spent, oracle, f"{same} the blocks"
        if (by_gdal := gdal_polygonize(job)) is not None:
            yield "gdal_polygonize.py to a GeoPackage", 1, *by_gdal, ""


@click.command()
@click.option("--short", is_flag=True, help="The small town alone: seconds.")
@click.option(
    "--side", "sides", multiple=True, type=int, help="Sides of the towns, px; 10,000 and 40,000 if not given."
)
@click.option("--block-px", default=4096, show_default=True)
@click.option("--processes", default=2, show_default=True)
def main(short: bool, sides: tuple[int, ...], block_px: int, processes: int) -> None:
    sides = sides or ((10_000,) if short else (10_000, 40_000))
    print(
        "| side, px | way | processes | seconds | processor s | Mpx/s | clock, times as fast as shapes | processor |"
        " largest process, MiB | polygons | |"
    )
    print("|" + "---|" * 11)
    for side in sides:
        against: Spent | None = None
        for what, number, spent, found, told in measure(side, block_px, processes):
            against = against or spent
            print(
                f"| {side:,} | {what} | {number} | {spent.seconds:.1f} | {spent.processor:.1f} |"
                f" {side**2 / 1e6 / spent.seconds:.0f} | {against.seconds / spent.seconds:.2f} |"
                f" {against.processor / spent.processor:.2f} | {spent.peak:.0f} | {found.count:,} | {told} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
