"""A city of whole Inria tiles through the pipeline, against bare forward passes of its pixels: how well a GPU is fed.

    python bench/gpu.py --tiles 6 --side 5000                            # 36 tiles, as they are in the Inria data set
    python bench/gpu.py --tiles 2 --side 1500 --network unet-mobilenetv2  # a minute or two on a CPU

Draws a city, repeats it over uncompressed tiles, each shifted so that no two are equal, and carries them through scan,
read, predict and vectorize on the workers that `segpipe run` would take here; then joins, and, where pyogrio is
installed, publishes. Weights are drawn at random: they cost what others do. The bare passes are of windows of the
block's size, or the city's if that is less, cut from the city, without a halo, on a tensor that is on the device
already, in the run's precision. One process does them, with the threads of one worker, once the workers are gone; of
several workers each is taken to be as fast, so where they share a CPU's caches and memory the bare seconds are less
than can be had. Prints Markdown.

It runs on a machine that has torch for its GPU and little else: pyogrio, geopandas, lightning, matplotlib and kornia
are not needed. Where wheels must be carried there and may be 50 MiB together, carry rasterio 1.4.3 (21 MiB; 1.4.4 has
34, later ones more): with pyproj, shapely, pydantic, dask, distributed, zarr and numcodecs that is 40 MiB for Python
3.12 on Linux.

`--keep FOLDER` leaves the run folder. `segpipe run FOLDER/city.yaml` goes on from it and predicts no block again, where
device, precision and torch are those of this run and pyogrio is installed. Elsewhere it predicts all of them anew: what
another device has predicted is not published as its own.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import rasterio
import torch
import yaml
from affine import Affine
from city import write_city
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from segpipe.models.networks import build_network
from segpipe.models.weights import IMAGENET_MEAN, IMAGENET_STD, probed_card, save_bundle
from segpipe.pipeline.allocator import keep_memory
from segpipe.pipeline.cluster_kinds import open_pool
from segpipe.pipeline.config import CityConfig, load_city
from segpipe.pipeline.draw import PX_M, draw_city
from segpipe.pipeline.flow import Flow, run_joins
from segpipe.pipeline.ledger import as_json
from segpipe.pipeline.network import load_predictor
from segpipe.pipeline.plan import SETTLED, Plan, make_plan
from segpipe.pipeline.progress import Listener, busy_share, told_of_device, watching
from segpipe.pipeline.store import prepare_store

DRAWN_PX, SEEN_PX = 1500, 512
BARE_PASSES = 5


def view_of(drawn_HW3: NDArray[np.uint8], side: int, shift: int = 0) -> NDArray[np.uint8]:
    """image_CHW of side px of a drawn city that goes on for ever, from so many pixels down and right."""
    px = np.arange(shift, shift + side) % DRAWN_PX
    return np.ascontiguousarray(np.moveaxis(drawn_HW3[px[:, None], px], 2, 0))


def make_city(folder: Path, tiles: int, side: int) -> None:
    """Write tiles x tiles uncompressed tiles of side px, each another view of one drawn city."""
    drawn_HW3 = draw_city(7, DRAWN_PX, DRAWN_PX).image_HW3
    (folder / "tiles").mkdir(parents=True)
    for row in range(tiles):
        for col in range(tiles):
            shift = (97 * (row * tiles + col)) % DRAWN_PX
            origin = Affine(PX_M, 0, 600_000 + col * side * PX_M, 0, -PX_M, 3_350_000 - row * side * PX_M)
            profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": side, "height": side}
            path = folder / "tiles" / f"town{row * tiles + col + 1}.tif"
            with rasterio.open(path, "w", **profile, crs="EPSG:32614", transform=origin) as dataset:
                dataset.write(view_of(drawn_HW3, side, shift))


def make_bundle(path: Path, name: str) -> None:
    """A bundle of a network with random weights, its head such that a fifth of a drawn city comes out as buildings."""
    torch.manual_seed(0)
    network = build_network(name).eval()
    image_HW3 = draw_city(7, SEEN_PX, SEEN_PX).image_HW3
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    image_BCHW = ((torch.from_numpy(image_HW3) / 255 - mean) / std).permute(2, 0, 1)[None]
    *_, head = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    assert head.bias is not None
    with torch.no_grad():
        head.weight *= 2 / network(image_BCHW).std()
        head.bias -= network(image_BCHW).quantile(0.8)
    card = probed_card(network, name, {}, resolution_m=PX_M, resolution_range_m=(0.15, 0.6))
    save_bundle(path, network, card)


@dataclass(frozen=True)
class Measured:
    """Seconds of a run: from its plan until workers are there, until the last block is stored, until all is joined.

    published: from there on, None where it was not done. device: what it did with its time.
    """

    start: float
    blocks: float
    vectors: float
    published: float | None
    device: dict[str, float]


def map_blocks(config: CityConfig, plan: Plan, listener: Listener) -> Measured:
    """All stages of a run up to its fragments, and publishing where it can be done."""
    begun = time.monotonic()
    plan.folder.write(SETTLED, as_json(plan.settled()))
    prepare_store(plan.folder, plan.layout)
    for stage in ("scan", "read", "predict", "vectorize"):
        listener.expect(stage, 0)
    with open_pool(plan, None) as pool:
        started = time.monotonic()
        flow = Flow(plan, pool, listener, {})
        flow.run()
        if flow.failures:
            raise SystemExit(f"{flow.failures[0][0]} {flow.failures[0][1]}: {flow.failures[0][2]}")
        # Each block is vectorized while the next is predicted: what the last stored one leaves to do is seconds later.
        stored = listener.stages["predict"].last
        homes = run_joins(plan, pool, listener)
        vectors = time.monotonic()
    published = None
    if importlib.util.find_spec("pyogrio"):
        from segpipe.pipeline.publish import publish_all
        from segpipe.pipeline.run_rasters import Rasters
        from segpipe.pipeline.stages import Site

        with closing(Rasters(Site(plan))) as rasters:
            publish_all(config, plan, listener, homes, {}, rasters)
        published = time.monotonic() - vectors
    return Measured(started - begun, stored - started, vectors - stored, published, dict(listener.device))


def bare_side(plan: Plan) -> int:
    """Side of the bare passes' windows in px: the block's, or whole strides that hold the city if that is less."""
    stride = plan.card.stride
    return min(plan.block_px, -(-max(plan.bounds.shape_yx) // stride) * stride)


def bare_seconds(plan: Plan) -> float:
    """Seconds of bare forward passes of as many pixels as the city has, by as many workers as the run had.

    On pixels of the city: a GPU multiplies zeros faster. With the allocator as it is set in workers.
    """
    keep_memory()
    predictor = load_predictor(plan)
    side = bare_side(plan)
    image_CHW = view_of(draw_city(7, DRAWN_PX, DRAWN_PX).image_HW3, side)
    image_BCHW = predictor.normalise(image_CHW, np.ones((side, side), np.bool_))
    seconds = []
    with torch.inference_mode():
        for _ in range(BARE_PASSES + 1):
            start = time.perf_counter()
            predictor.forward(image_BCHW)
            if image_BCHW.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    pixels = sum(tile.cover.pixels for tile in plan.tiles)
    return statistics.median(seconds[1:]) * pixels / side**2 / plan.workers.count


@click.command()
@click.option("--tiles", default=2, show_default=True, help="Along each side of the city.")
@click.option("--side", default=1500, show_default=True, help="Of a tile, px.")
@click.option("--network", default="unet11", show_default=True)
@click.option("--settings", default="{}", help="More of city.yaml, as YAML: '{grid: {block_px: 2048}}'.")
@click.option("--keep", type=click.Path(path_type=Path), help="A new folder for the city and its run, which stays.")
def main(tiles: int, side: int, network: str, settings: str, keep: Path | None) -> None:
    if keep is not None and keep.exists():
        raise click.BadParameter(f"{keep} is there already; expected a new folder", param_hint="--keep")
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="segpipe-bench-")))
        make_city(folder, tiles, side)
        make_bundle(folder / "random.safetensors", network)
        config = load_city(write_city(folder, str(folder / "random.safetensors"), **yaml.safe_load(settings)))
        plan = make_plan(config)
        plan.output.mkdir(parents=True)
        listener = stack.enter_context(watching(plan.output, Console(quiet=True)))
        found = map_blocks(config, plan, listener)
        bare = bare_seconds(plan)
        recipe = plan.recipe
        print(
            f"{recipe.device}, {recipe.precision}, torch {recipe.torch}; {len(plan.tiles)} tiles of {side} px;"
            f" `{network}`, blocks of {plan.block_px} px, halo {recipe.halo_px} px,"
            f" bare windows of {bare_side(plan)} px; {told_of_device(found.device)}\n"
        )
        count = plan.workers.count
        bare_of = "bare passes, s" if count == 1 else f"bare passes, of one process / {count}, s"
        columns = ["Mpx", "workers there after, s", "read, predict, store, s", bare_of, "bare / run", "device busy"]
        columns += ["joined after, s", "published after, s"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        mpx = sum(tile.cover.pixels for tile in plan.tiles) / 1e6
        published = "–" if found.published is None else f"{found.published:.1f}"
        print(
            f"| {mpx:.0f} | {found.start:.1f} | {found.blocks:.1f} | {bare:.1f} | {bare / found.blocks:.2f} |"
            f" {busy_share(found.device):.2f} | {found.vectors:.1f} | {published} |"
        )


if __name__ == "__main__":
    main()
