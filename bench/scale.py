"""What the driver and Dask's scheduler cost a block, of cities from a thousand blocks to a hundred thousand.

    python bench/scale.py --blocks 1000 --blocks 10000 --blocks 100000
    python bench/scale.py --short

The plan, the flow, the local cluster, the ledger, the joins and publishing are those of `segpipe run`; the tasks do
nothing real: a block is one chunk of 64 px with one house in it and one across its right seam, and workers write its
chunks, its fragment and its joined building as they were made once (this file is a preload of Dask's workers). So a
block is four tasks, read, predict, vectorize and join, and 16 blocks are one tile, which is one more task.

The scheduler runs in the driver's process: its seconds and its memory are the driver's. Seconds are of processors, all
threads of that process together, in ms a block; "run again" is a second run that finds all of it done but must publish,
"nothing changed" the command on a city that is published, in s. Memory is the peak of the resident set (RSS). Prints
Markdown. A hundred thousand blocks are 900,000 files and 5 GB of disk; on a busy machine a thousand took 40 s.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import click
import numpy as np

BLOCK_PX, TILE_BLOCKS = 64, 4
"""A block is one chunk; a tile has 4 x 4 blocks."""
ORIGIN = (-17_666_688, 1_666_496)
"""Row and column of a city's upper left pixel: a multiple of the block."""
RESOLUTION = 0.3
STAGES = ("plan", "flow", "joins", "publish", "report", "manifest")


# What workers do instead of their tasks


def dask_setup(worker: object) -> None:
    """Called by Dask when a worker starts that has this file as its preload."""
    from segpipe.pipeline import stages

    for stage in (scan, read, predict, vectorize, join):
        setattr(stages, stage.__name__, stage)


def scan(site: Any, tile: int) -> Any:
    """Enter a tile as one that has no invalid pixel, without opening it."""
    from segpipe.pipeline import stages
    from segpipe.tasks.files import file_stamp

    plan, unit = site.plan, stages.tile_unit(site.plan, tile)
    path, digest = plan.tiles[tile].path, f"{tile:032x}"
    values = {"stamp": list(file_stamp(path)), "digest": digest, "invalid_px": 0, "by_reason": {}}
    site.ledger.record("scan", unit, stages.scan_settings(plan, tile), path=path, **values)
    return stages.Receipt("scan", unit, 0, 0, 0.0, {"digest": digest})


def read(site: Any, row: int, col: int, key: str, tiles: object) -> Any:
    """Write one chunk of imagery that was encoded before."""
    sums = {name: _put_chunk(site, name, row, col) for name in ("image", "valid")}
    return _enter(site, "read", row, col, key, checksum=sums, valid_px=BLOCK_PX**2)


def predict(site: Any, row: int, col: int, key: str) -> Any:
    """Write one chunk of probabilities that was encoded before."""
    sums = {f"{row}_{col}": _put_chunk(site, "probability", row, col)}
    return _enter(site, "predict", row, col, key, checksum=sums, valid_px=BLOCK_PX**2, times=1)


def vectorize(site: Any, row: int, col: int, key: str) -> Any:
    """Write the fragment of the one block there is, moved to this place."""
    from segpipe.pipeline.stages import fragment_name
    from segpipe.tasks.fragments import fragment_to_bytes

    data = fragment_to_bytes(_moved(_fragment(site.plan.lattice, site.plan.vector), row, col))
    site.folder.write(fragment_name(row, col), data)
    return _enter(site, "vectorize", row, col, key, checksum=crc32(data))


def join(site: Any, row: int, col: int, key: str, joins: Any, blocks: object) -> Any:
    """Write the one building that has its first pixel in a block and crosses a seam, moved to this place.

    In the first column that is one more: the half of it that would lie beyond the city.
    """
    from segpipe.pipeline.stages import _to_ipc, joined_name

    first = col == site.plan.layout.grid.col_off // BLOCK_PX
    last = (col + 1) * BLOCK_PX == site.plan.layout.grid.col_stop
    data = _to_ipc(_moved(_joined(site.plan.lattice, site.plan.vector, first, last), row, col).to_arrow())
    site.folder.write(joined_name(row, col), data)
    left, top = col * BLOCK_PX, row * BLOCK_PX
    reach = [left, top, left + 2 * BLOCK_PX, top + BLOCK_PX]
    return _enter(site, "join", row, col, key, checksum=crc32(data), oversized=0, reach=reach)


def _enter(site: Any, stage: str, row: int, col: int, key: str, **values: object) -> Any:
    from segpipe.pipeline.stages import Receipt

    site.ledger.record(stage, f"{row}_{col}", key, **values)
    return Receipt(stage, f"{row}_{col}", BLOCK_PX**2, 0, 0.0, {"seen_px": BLOCK_PX**2})


def _put_chunk(site: Any, array: str, row: int, col: int) -> int:
    """Write one chunk; returns its checksum. The first that this process writes is encoded by the store."""
    grid = site.plan.layout.grid
    at = [str(row - grid.row_off // BLOCK_PX), str(col - grid.col_off // BLOCK_PX)]
    bands = ["0"] if array == "image" else []
    name = "/".join(("store.zarr", array, "c", *bands, *at))
    known = _encoded.get(array)
    if known is None:
        pixels = {"image": np.full((3, BLOCK_PX, BLOCK_PX), 90, np.uint8), "probability": _probability()}
        pixels["valid"] = np.ones((BLOCK_PX, BLOCK_PX), np.uint8)
        checksum = site.store.write_chunk(array, row, col, pixels[array])
        _encoded[array] = (site.folder.read(name), checksum)
        return int(checksum)
    data, checksum = known
    site.folder.write(name, data)
    return checksum


_encoded: dict[str, tuple[bytes, int]] = {}


def _probability() -> np.ndarray:
    """prob_HW of a block: a house, and two halves of one that crosses its left and its right seam."""
    prob_HW = np.zeros((BLOCK_PX, BLOCK_PX), np.uint8)
    prob_HW[44:60, 20:40] = 240
    prob_HW[10:30, 50:] = prob_HW[10:30, :14] = 220
    return prob_HW


@cache
def _fragment(lattice: Any, vector: Any) -> Any:
    """The fragment of block (0, 0), by the code that makes real ones."""
    from segpipe.tasks.grid import Window
    from segpipe.tasks.vectorize import vectorize_block

    return vectorize_block(_probability(), Window.cell(0, 0, BLOCK_PX), lattice, vector)


@cache
def _joined(lattice: Any, vector: Any, first: bool, last: bool) -> Any:
    """The joined buildings with their first pixel in block (0, 0), by the code that makes real ones."""
    from segpipe.tasks.grid import Window
    from segpipe.tasks.vectorize import finish, polygonize

    prob_HW = np.hstack([np.zeros_like(_probability()), _probability(), _probability()])
    prob_HW[44:60] = 0
    prob_HW[:, : BLOCK_PX if first else BLOCK_PX + 14] = 0
    prob_HW[:, 2 * BLOCK_PX + (0 if last else 14) :] = 0
    place = Window(0, -BLOCK_PX, *prob_HW.shape)
    whole = polygonize(prob_HW > 0, prob_HW, place.row_off, place.col_off)[1]
    return finish(whole, vector, lattice, lambda part: prob_HW[part.within(place)])


def _moved(it: Any, row: int, col: int) -> Any:
    """Components, or a fragment with its sides and all of its components, of block (0, 0) moved to another one."""
    from dataclasses import replace

    import shapely

    from segpipe.tasks.grid import Window
    from segpipe.tasks.vectorize import Components, Fragment

    down, right = row * BLOCK_PX, col * BLOCK_PX
    keys = {"key_row": down, "key_col": right}
    if isinstance(it, Components):
        changed = {name: getattr(it, name) + by for name, by in keys.items()}
        for name in ("geometry", "raw"):
            if hasattr(it, name):
                changed[name] = shapely.transform(getattr(it, name), lambda xy: xy + np.array([right, down]))
        return replace(it, **changed)
    assert isinstance(it, Fragment)
    window = Window.cell(row, col, BLOCK_PX)
    sides = replace(it.sides, window=window, **{name: getattr(it.sides, name) + by for name, by in keys.items()})
    return replace(it, sides=sides, finished=_moved(it.finished, row, col), border=_moved(it.border, row, col))


# The driver, in a process of its own


class Clock:
    """Processor seconds and seconds of this process by stage, and its peak memory so far."""

    def __init__(self, profiled: str | None) -> None:
        self.cpu_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.wall_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.peak_mib: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._profiled = profiled
        self.profile = cProfile.Profile()

    @contextmanager
    def taking(self, stage: str) -> Iterator[None]:
        """Take the time of a block, of one stage."""
        from city import peak_mib

        cpu, wall = time.process_time(), time.perf_counter()
        if stage == self._profiled:
            self.profile.enable()
        yield
        if stage == self._profiled:
            self.profile.disable()
        self.cpu_s[stage] += time.process_time() - cpu
        self.wall_s[stage] += time.perf_counter() - wall
        self.peak_mib[stage] = peak_mib(os.getpid())

    def watch(self, module: Any, name: str, stage: str) -> None:
        """Take the time of a function of a module whenever it is called."""
        function: Callable[..., Any] = getattr(module, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.taking(stage):
                return function(*arguments, **named)

        setattr(module, name, timed)


def drive(config: Path, profiled: str | None) -> None:
    """`segpipe run` with a clock on its stages; prints what it took as JSON."""
    from segpipe.pipeline.allocator import spare_memory

    spare_memory()
    from rich.console import Console

    from segpipe.pipeline import manifest, publish, run
    from segpipe.pipeline.config import load_city

    clock = Clock(profiled)
    clock.watch(run, "make_plan", "plan")
    clock.watch(run, "describe", "plan")
    clock.watch(run, "remove_leftovers", "plan")
    clock.watch(run, "prepare_store", "plan")
    clock.watch(run, "carry_all", "flow")
    clock.watch(run, "run_joins", "joins")
    clock.watch(publish, "publish_all", "publish")
    clock.watch(run, "write_preview_and_report", "report")
    clock.watch(run, "verify_quickly", "report")
    clock.watch(manifest, "make_manifest", "manifest")
    published = run.map_city(load_city(config), Console(quiet=True))
    tasks = sum(it.units for stage, it in published.stages.items() if stage != "publish")
    if profiled:
        pstats.Stats(clock.profile, stream=sys.stderr).sort_stats("tottime").print_stats(45)
        pstats.Stats(clock.profile, stream=sys.stderr).sort_stats("cumtime").print_stats(70)
    print(
        json.dumps(
            {
                "tasks": tasks,
                "buildings": published.buildings,
                "cpu_s": clock.cpu_s,
                "wall_s": clock.wall_s,
                "peak_mib": clock.peak_mib,
            }
        )
    )


# Cities


def write_city(folder: Path, blocks: int, workers: int) -> Path:
    """Tiles of a city of about so many blocks, all of one grey, in as square an area as goes; returns its city.yaml."""
    import rasterio
    from affine import Affine

    across = max(1, round((blocks / TILE_BLOCKS**2) ** 0.5))
    down = max(1, round(blocks / TILE_BLOCKS**2 / across))
    side = BLOCK_PX * TILE_BLOCKS
    profile = {"driver": "GTiff", "count": 3, "height": side, "width": side, "dtype": "uint8", "crs": "EPSG:32633"}
    profile |= {"compress": "deflate", "tiled": True, "blockxsize": side, "blockysize": side}
    pixels = np.full((3, side, side), 90, np.uint8)
    (folder / "tiles").mkdir(parents=True)
    for row in range(down):
        for col in range(across):
            x, y = (ORIGIN[1] + col * side) * RESOLUTION, -(ORIGIN[0] + row * side) * RESOLUTION
            place = Affine(RESOLUTION, 0, x, 0, -RESOLUTION, y)
            with rasterio.open(folder / "tiles" / f"{row}_{col}.tif", "w", transform=place, **profile) as tile:
                tile.write(pixels)
    config = folder / "city.yaml"
    # JSON is YAML. The halo is that of a network which sees half a block further.
    job = {
        "name": "scale",
        "images": "tiles/*.tif",
        "model": "buildings-mobilenetv2",
        "output": "run",
        "grid": {"chunk_px": BLOCK_PX, "block_px": BLOCK_PX},
        "predict": {"halo": 32},
        "cluster": {"kind": "local", "workers": workers, "threads": 1},
    }
    config.write_text(json.dumps(job))
    return config


def measure(config: Path, profiled: str | None) -> dict[str, Any]:
    """One run in a process of its own, with workers that do nothing real."""
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__PRELOAD": str(Path(__file__).resolve())}
    command = [sys.executable, __file__, "--drive", str(config), *(["--profile", profiled] if profiled else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def nothing_changed_s(config: Path) -> float:
    """Seconds of the command on a city that is published."""
    from city import SEGPIPE

    start = time.perf_counter()
    told = subprocess.run([*SEGPIPE, "run", str(config)], capture_output=True, text=True, check=True).stdout
    assert "nothing to do" in told, told
    return time.perf_counter() - start


@click.command()
@click.option("--blocks", "sizes", multiple=True, type=int, help="1,000 and 10,000 if not given.")
@click.option("--short", is_flag=True, help="200 and 1,000 blocks.")
@click.option("--workers", default=8, show_default=True, help="Worker processes.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="For a folder a city, which stay; else none does.",
)
@click.option("--drive", "city", type=click.Path(path_type=Path), hidden=True)
@click.option("--profile", "profiled", type=click.Choice(STAGES), help="Print a profile of one stage of the driver.")
def main(
    sizes: tuple[int, ...], short: bool, workers: int, folder: Path | None, city: Path | None, profiled: str | None
) -> None:
    if city is not None:
        drive(city, profiled)
        return
    if short and sizes:
        raise click.UsageError("--short is 200 and 1,000 blocks: expected no --blocks beside it")
    sizes = sizes or ((200, 1000) if short else (1000, 10_000))
    if folder is not None and (there := [str(folder / str(size)) for size in sizes if (folder / str(size)).exists()]):
        raise click.BadParameter(
            f"{', '.join(there)}: is there already; expected another folder", param_hint="--folder"
        )
    print(
        "| blocks | tasks | wall, ms | driver, ms | of a task, ms | plan | flow | joins | publish | report, manifest |"
        " run again, ms | nothing changed, s | driver after flow, MiB | after joins | at the end |"
    )
    print("|" + "---|" * 15)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as scratch:
            place = Path(scratch) if folder is None else folder / str(size)
            config = write_city(place, size, workers)
            blocks = len(list((place / "tiles").iterdir())) * TILE_BLOCKS**2
            first = measure(config, profiled)
            unchanged_s = nothing_changed_s(config)
            (place / "run" / "mask.tif").unlink()
            again = measure(config, None)
            print(row_of(blocks, first, again, unchanged_s), flush=True)


def row_of(blocks: int, first: dict[str, Any], again: dict[str, Any], unchanged_s: float) -> str:
    """One line of the table."""
    cpu_s, peak = first["cpu_s"], first["peak_mib"]
    driver_s = sum(cpu_s.values())
    each = [1000 * cpu_s[stage] / blocks for stage in ("plan", "flow", "joins", "publish")]
    each.append(1000 * (cpu_s["report"] + cpu_s["manifest"]) / blocks)
    numbers = " | ".join(f"{value:.2f}" for value in each)
    tasks_ms = 1000 * (cpu_s["flow"] + cpu_s["joins"]) / first["tasks"]
    return (
        f"| {blocks:,} | {first['tasks']:,} | {1000 * sum(first['wall_s'].values()) / blocks:.2f} |"
        f" {1000 * driver_s / blocks:.2f} | {tasks_ms:.2f} | {numbers} |"
        f" {1000 * sum(again['cpu_s'].values()) / blocks:.2f} | {unchanged_s:.1f} |"
        f" {peak['flow']:.0f} | {peak['joins']:.0f} | {max(peak.values()):.0f} |"
    )


if __name__ == "__main__":
    main()
