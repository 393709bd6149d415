"""Speed of scan and read, which bring tiles into chunks of the store, against bare decoding of the same tiles.

    python bench/read.py            # 2 x 2 tiles of 5000 x 5000 px, RGB, of every kind
    python bench/read.py --short    # 2 x 2 tiles of 2000 x 2000 px

The tiles are made here, the same at every run: smooth ground and houses with the noise of a sensor, 1 % of it black
for nodata. Every kind is measured in one process and one thread: "bare" decodes each tile once with rasterio, 512 rows
at a time; "plain" decodes it chunk by chunk and writes these with zarr, with the codec of the store and nothing else;
"ours" is the two stages in the order of a run: a tile is scanned (digest, invalid pixels) when the first chunk that it
lies under is wanted, then the chunk is read, mosaicked, written and entered in the ledger. The lattice's chunks do not
meet those of the tiles.

Prints Markdown: medians over the rounds, also of the ratios of each round, of processor seconds, for that is what a
machine that does other work besides leaves as it is. "Asked for": pixels that the stages ask rasterio for, in pixels of
the tiles. "Bytes": what is read from files, in sizes of the tiles; one of it is the digest's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import rasterio
import rasterio.shutil
import zarr
from affine import Affine
from city import write_city
from numpy.typing import NDArray
from rasterio.windows import Window as RasterWindow
from scipy.ndimage import gaussian_filter, zoom
from zarr.codecs import ZstdCodec

from segpipe.pipeline import stages
from segpipe.pipeline.config import load_city
from segpipe.pipeline.plan import Plan, make_plan
from segpipe.pipeline.storage import OWN_FOLDERS
from segpipe.pipeline.store import prepare_store
from segpipe.tasks import read as tile_reading
from segpipe.tasks import validity
from segpipe.tasks.grid import Window

ACROSS = 2
ROWS_PX = 512
CHUNK_PX = 1024
KINDS: dict[str, dict[str, Any]] = {
    "tiles of 256, deflate": {"driver": "GTiff", "tiled": True, "compress": "deflate", "predictor": 2},
    "strips, LZW": {"driver": "GTiff", "compress": "lzw", "predictor": 2},
    "tiles of 256, JPEG": {"driver": "GTiff", "tiled": True, "compress": "jpeg", "photometric": "YCBCR"},
    "COG, deflate": {"driver": "COG", "compress": "deflate", "predictor": "YES"},
}


def draw(side: int, seed: int) -> NDArray[np.uint8]:
    """An image_CHW of side x side px."""
    rng = np.random.default_rng(seed)
    ground = zoom(rng.uniform(60, 160, (side // 100 + 2, side // 100 + 2)), 100, order=1)[:side, :side]
    for _ in range(side * side // 4000):
        row, col = (int(it) for it in rng.integers(0, side, 2))
        height, width = (int(it) for it in rng.integers(10, 50, 2))
        ground[row : row + height, col : col + width] = rng.uniform(90, 240)
    ground = gaussian_filter(ground, 0.7)
    image_CHW = np.stack([ground + rng.normal(shift, 4, ground.shape) for shift in (0, 5, -10)])
    image_CHW[:, side // 2 : side // 2 + side // 10, side // 4 : side // 4 + side // 10] = 0
    return np.clip(np.round(image_CHW), 0, 255).astype(np.uint8)


def write_tiles(folder: Path, side: int) -> dict[str, list[Path]]:
    """Tiles of every kind, with the same pixels but for what JPEG makes of them."""
    images = [draw(side, seed) for seed in range(ACROSS**2)]
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": side, "width": side, "crs": "EPSG:32633"}
    paths: dict[str, list[Path]] = {}
    for number, (kind, options) in enumerate(KINDS.items()):
        paths[kind] = []
        for tile, image_CHW in enumerate(images):
            row, col = divmod(tile, ACROSS)
            path = folder / str(number) / "tiles" / f"{tile}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            place = Affine(0.3, 0, 500_000.1 + 0.3 * side * col, 0, -0.3, 5_000_000.1 - 0.3 * side * row)
            with rasterio.open(path, "w", **(profile | options), transform=place) as dataset:
                dataset.write(image_CHW)
            paths[kind].append(path)
    return paths


def decode(paths: list[Path]) -> None:
    """Every tile once, from its first row to its last."""
    for path in paths:
        with rasterio.open(path) as dataset:
            for row in range(0, dataset.height, ROWS_PX):
                dataset.read(window=RasterWindow(0, row, dataset.width, min(ROWS_PX, dataset.height - row)))


def decode_and_write(paths: list[Path], folder: Path) -> None:
    """Every tile into a Zarr array of its own, chunk by chunk."""
    for path in paths:
        with rasterio.open(path) as dataset:
            array = zarr.create_array(
                folder / path.stem,
                shape=(3, *dataset.shape),
                dtype="uint8",
                chunks=(3, CHUNK_PX, CHUNK_PX),
                compressors=[ZstdCodec(level=1, checksum=True)],
            )
            for row in range(0, dataset.height, CHUNK_PX):
                for col in range(0, dataset.width, CHUNK_PX):
                    part = np.s_[row : min(row + CHUNK_PX, dataset.height), col : min(col + CHUNK_PX, dataset.width)]
                    array[:, *part] = dataset.read(window=RasterWindow.from_slices(*part))


def plan_city(folder: Path, model: str) -> Plan:
    """A plan for the tiles in a folder, with an empty store."""
    config = write_city(folder, model, nodata=0, grid={"chunk_px": CHUNK_PX, "block_px": 4096})
    return make_plan(load_city(config), None)


def scan_and_read(plan: Plan) -> dict[str, float]:
    """Both stages over a whole city whose run folder is empty; processor seconds of each."""
    prepare_store(plan.folder, plan.layout)
    site = stages.Site(plan)
    seconds: Counter[str] = Counter()
    digests: dict[int, str] = {}
    for chunk in plan.chunks():
        tiles = plan.tiles_in(Window.cell(*chunk, plan.chunk_px))
        start = time.process_time()
        for tile in tiles:
            if tile not in digests:
                digests[tile] = stages.scan(site, tile).values["digest"]
        seconds["scan"] += time.process_time() - start
        start = time.process_time()
        under = tuple((tile, digests[tile]) for tile in tiles)
        stages.read(site, *chunk, stages.chunk_key(plan, chunk, list(under)), under)
        seconds["read"] += time.process_time() - start
    return dict(seconds)


class Asked:
    """Counts the pixels that `read_samples` is asked for while it is entered, and the bytes read from files."""

    pixels = 0
    bytes = 0

    def __enter__(self) -> Asked:
        self._read = tile_reading.read_samples
        self._bytes = psutil.Process().io_counters().read_chars

        def counting(tile: tile_reading.Tile, window: Window) -> NDArray[Any]:
            self.pixels += window.pixels
            return self._read(tile, window)

        tile_reading.read_samples = validity.read_samples = counting
        return self

    def __exit__(self, *_: object) -> None:
        tile_reading.read_samples = validity.read_samples = self._read
        self.bytes = psutil.Process().io_counters().read_chars - self._bytes


def processor_seconds(work: Callable[..., None], *arguments: object) -> float:
    """Of one call."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


@click.command()
@click.option("--short", is_flag=True, help="Small tiles, one round: seconds.")
@click.option("--model", default="buildings-mobilenetv2", show_default=True, help="Is planned with, and not run.")
@click.option("--rounds", default=3, show_default=True)
def main(short: bool, model: str, rounds: int) -> None:
    side, rounds = (2000, 1) if short else (5000, rounds)
    print(
        "| tiles | bare, s | plain, s | ours, s | of it scan | read | Mpx/s | ours / bare | ours / plain | asked for |"
        " bytes |"
    )
    print("|" + "---|" * 11)
    with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as name:
        for number, (kind, paths) in enumerate(write_tiles(Path(name), side).items()):
            folder = Path(name) / str(number)
            plan = plan_city(folder, model)
            mpx = ACROSS**2 * side**2 / 1e6
            size = sum(path.stat().st_size for path in paths)
            columns: list[list[float]] = []
            for _ in range(rounds):
                bare = processor_seconds(decode, paths)
                with tempfile.TemporaryDirectory(dir=folder) as plain:
                    simple = processor_seconds(decode_and_write, paths, Path(plain))
                with Asked() as asked:
                    steps = scan_and_read(plan)
                for part in OWN_FOLDERS:
                    plan.folder.remove_all(part)
                ours = sum(steps.values())
                columns.append(
                    [bare, simple, ours, steps["scan"], steps["read"], mpx / ours, ours / bare, ours / simple]
                )
                columns[-1] += [asked.pixels / mpx / 1e6, asked.bytes / size]
            print(
                f"| {kind} | " + " | ".join(f"{statistics.median(it):.2f}" for it in zip(*columns, strict=True)) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
