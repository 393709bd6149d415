"""The recipe: device, precision, block and halo, chosen from the network, the imagery and the memory at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from segpipe.models.weights import Card
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window

from .config import CityConfig
from .store import Layout
from .workers import Crew, Workers

LARGEST_AUTO_BLOCK_PX = 4096
LARGEST_AUTO_HALO_PX = 320
FILLED = 0.9
"""How much of a worker's memory a predict task may fill: at 95 % the worker is ended."""
SCRATCH, GPU_SCRATCH = 1.2, 1.6
"""Memory of a pass against its activations: the convolutions' own, and what the allocator keeps (measured on CPUs)."""
LEFT_VALUES = 16
"""Values a pixel of window that lie between its maps in a process: most for light networks (measured)."""
WORKER_BASE_BYTES = 900 * 2**20
"""A worker before its first window: libraries, network, GDAL's cache."""
GPU_BASE_BYTES = 700 * 2**20
"""A GPU before its first window: CUDA's own, and the network."""


@dataclass(frozen=True)
class Recipe:
    """What a number depends on besides pixels and weights. Part of what "done" means."""

    device: str
    precision: Literal["float32", "bfloat16"]
    mode: str
    threads: int
    torch: str
    block_px: int
    halo_px: int
    tta: Literal["none", "d4"] = "none"


def resolve_halo(config: CityConfig, card: Card) -> tuple[int, list[str]]:
    """The halo in px, and what is to be told of it."""
    asked, exact_px = config.predict.halo, card.halo_px
    if exact_px is None:
        return _resolve_unbounded_halo(asked, card)
    if isinstance(asked, int):
        note = f"halo of {asked} px is less than the exact {exact_px} px: results depend on the block size"
        return asked, [note] if asked < exact_px else []
    if asked == "exact" or exact_px <= LARGEST_AUTO_HALO_PX:
        return exact_px, []
    if card.effective_halo_px is None:
        return exact_px, [f"the exact halo of {exact_px} px is used: no effective one was measured in training"]
    note = f"effective halo of {card.effective_halo_px} px (exact: {exact_px}): results depend on the block size"
    return card.effective_halo_px, [] if card.is_exact(card.effective_halo_px) else [note]


def _resolve_unbounded_halo(asked: int | str, card: Card) -> tuple[int, list[str]]:
    """The halo for a network that sees the whole of its window, however large: no halo is exact."""
    note = f"every pixel of a window matters to {card.architecture}: results depend on the block size"
    if isinstance(asked, int):
        return asked, [f"halo of {asked} px; {note}"]
    if asked == "exact":
        raise UserError(
            f"predict.halo: exact, but the field of {card.architecture} has no bound; expected auto or pixels"
        )
    if card.effective_halo_px is None:
        raise UserError(
            f"predict.halo: the field of {card.architecture} has no bound, and no effective halo was measured in"
            " training; expected pixels, for example `predict: {halo: 256}`"
        )
    return card.effective_halo_px, [f"effective halo of {card.effective_halo_px} px; {note}"]


def resolve_recipe(
    config: CityConfig,
    card: Card,
    halo_px: int,
    layout: Layout,
    extent: Window,
    workers: Workers,
    stored_block_px: int | None,
    crew: Crew | None,
) -> tuple[Recipe, int]:
    """The recipe, and the bytes of a worker's memory that one predict task takes with it. extent: what is predicted."""
    import torch

    from segpipe.models.field import peak_bytes_per_px
    from segpipe.models.predictor import device_recipe, is_fast_in_bfloat16, made_ready, resolve_device
    from segpipe.models.weights import blank_network

    own = device_recipe(resolve_device())
    device, version = (own["device"], own["torch"]) if crew is None else (crew.device, crew.torch)
    precision = config.predict.precision
    if precision == "auto":
        precision = "bfloat16" if is_fast_in_bfloat16(device) else "float32"
    try:
        network = blank_network(card).eval()
        run = made_ready(network, device.partition(" ")[0])
        dtype: torch.dtype = getattr(torch, precision)
        per_px = peak_bytes_per_px(network, dtype, len(card.bands), run)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    step = math.lcm(layout.chunk_px, card.stride)

    on_gpu = device.startswith("cuda")

    def task_bytes(block_px: int) -> tuple[int, int]:
        """What a task takes of the worker's memory and of the GPU's."""
        # Image and valid as uint8, the normalised image in float32, the probabilities; the next block's image and
        # valid, which are read meanwhile; the activations.
        window_px = (block_px + 2 * halo_px) ** 2
        around = window_px * (6 * layout.bands + 10)
        if on_gpu:
            return WORKER_BASE_BYTES + around, GPU_BASE_BYTES + around + int(window_px * GPU_SCRATCH * per_px)
        left = window_px * LEFT_VALUES * dtype.itemsize
        return WORKER_BASE_BYTES + around + left + int(window_px * SCRATCH * per_px), 0

    def fits(block_px: int) -> bool:
        of_worker, of_gpu = task_bytes(block_px)
        return of_worker <= workers.memory_bytes // 2 and of_gpu <= (FILLED * workers.gpu_bytes or math.inf)

    if isinstance(config.grid.block_px, int):
        block_px = config.grid.block_px
        if block_px % step:
            raise UserError(
                f"grid.block_px: {block_px}; expected a multiple of {step} (whole chunks of {layout.chunk_px} px and"
                f" the network's stride of {card.stride} px)"
            )
    elif stored_block_px is not None and stored_block_px % step == 0:
        block_px = stored_block_px
    else:
        sizes = [size for size in range(step, LARGEST_AUTO_BLOCK_PX + 1, step) if size == step or fits(size)]
        block_px = choose_block(sizes or [step], extent, workers.count)
    of_worker, of_gpu = task_bytes(block_px)
    window = f"a block of {block_px} px with a halo of {halo_px} px"
    if of_worker > FILLED * workers.memory_bytes:
        raise UserError(
            f"cluster.memory: {workers.memory_bytes / 2**30:.1f} GiB a worker, but {window} takes"
            f" {of_worker / 2**30:.1f} GiB, which may fill {FILLED:.0%} of it; cure: a smaller `grid: {{block_px: …}}`,"
            f" fewer `cluster: {{workers: …}}`, or more memory"
        )
    if workers.gpu_bytes and of_gpu > FILLED * workers.gpu_bytes:
        raise UserError(
            f"grid.block_px: {window} takes about {of_gpu / 2**30:.1f} GiB of a GPU; expected {FILLED:.0%} of its"
            f" {workers.gpu_bytes / 2**30:.1f} GiB at most; cure: a smaller `grid: {{block_px: …}}`"
        )
    recipe = Recipe(device, precision, "eager", workers.threads, version, block_px, halo_px, config.predict.tta)
    return recipe, of_worker


def choose_block(sizes: Sequence[int], extent: Window, workers: int) -> int:
    """Side of the blocks: the largest of sizes (px, ascending) that gives every worker a block, else the smallest."""
    return max((size for size in sizes if extent.cell_count(size) >= workers), default=sizes[0])
