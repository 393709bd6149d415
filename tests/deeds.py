"""A network that does harm where it is told to, and a tiny city with one block in which it does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ORIGIN, City, map_it, write_city, write_tile
from torch import Tensor, nn

from segpipe.models.field import probe_field
from segpipe.models.networks import build_network
from segpipe.models.weights import Card, save_bundle
from segpipe.pipeline import run
from segpipe.pipeline.cluster import InProcess
from segpipe.pipeline.plan import Plan

DEED, DIARY = "SEGPIPE_TEST_DEED", "SEGPIPE_TEST_DIARY"
"""Environment of worker processes: what the network does (slow, or, at the mark, exit, memory, oom), and the file that
such a deed is written to before it is done.
"""
MARK = 3
"""A pixel of this value in all bands is where it does it."""
MEAN, STD = 0.5, 0.25
TILE_PX, PLACE = 80, (100, 90)
"""Row and column of the mark in the city: well within a block."""


class Fragile(nn.Module):
    """A blur that sees 3 px to every side."""

    stride = 1

    def __init__(self, bands: int = 3, classes: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bands, classes, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Same H and W."""
        deed = os.environ.get(DEED)
        if deed == "slow":
            time.sleep(1)
        elif deed and bool(((x - (MARK / 255 - MEAN) / STD).abs().amax(dim=1) < 1e-4).any()):
            with Path(os.environ[DIARY]).open("a") as diary:
                diary.write(f"{deed}\n")
            do(deed)
        y: Tensor = self.conv(x)
        return y


def do(deed: str) -> None:
    """End this process, fill its memory until it is ended, or run out of a GPU's."""
    if deed == "exit":
        os._exit(7)
    if deed == "oom":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    held = []
    while True:
        held.append(bytearray(b"x") * (100 * 2**20))
        time.sleep(0.05)


def fragile_city(folder: Path, **settings: Any) -> City:
    """A city with a mark in one block, mapped in this process into the folder `twin`."""
    torch.manual_seed(0)
    network = build_network("deeds:Fragile")
    field = probe_field(network, network.stride, bands=3)
    with torch.no_grad():
        network.own.conv.weight.fill_(1 / 49)
        network.own.conv.bias.fill_(0.5)
    card = Card(
        architecture="deeds:Fragile",
        module="deeds:Fragile",
        arguments={"bands": 3, "classes": 1},
        bands=("red", "green", "blue"),
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        stride=network.stride,
        halo_px=field.halo_px,
        receptive_field_px=field.receptive_field_px,
        resolution_m=0.3,
        resolution_range_m=(0.15, 0.6),
    )
    save_bundle(folder / "fragile.safetensors", network, card)
    small: dict[str, Any] = {
        "tile_px": TILE_PX,
        "module": "deeds:Fragile",
        "nodata_min_m2": 50,
        "vectorize": {"min_area_m2": 0},
        "grid": {"chunk_px": 64, "block_px": 64},
        "predict": {"precision": "float32"},
        "cluster": {"workers": 1, "threads": 1, "memory": "3 GiB"},
    }
    city = write_city(folder, folder / "fragile.safetensors", **small | settings)
    city.image_CHW[:, PLACE[0], PLACE[1]] = MARK
    part = city.image_CHW[:, TILE_PX:, TILE_PX:]
    write_tile(folder / "tiles" / "tile4.tif", part, ORIGIN[0] + TILE_PX, ORIGIN[1] + TILE_PX)

    @contextmanager
    def twin(plan: Plan, cluster: object) -> Iterator[InProcess]:
        yield InProcess(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_pool", twin)
        assert map_it(city.config, "output=twin").buildings > 3
    return city
