"""Tiny cities with known houses, a network that costs nothing, and where the real data is."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

# Read when torch is loaded: test processes share the processors, and threads that wait leave them to the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import numpy as np
import pyogrio
import pytest
import rasterio
import yaml
from affine import Affine
from numpy.typing import NDArray
from rich.console import Console
from scipy.ndimage import uniform_filter

from segpipe.models.networks import build_network
from segpipe.models.weights import Card, Reach, save_bundle
from segpipe.pipeline import run
from segpipe.pipeline.cluster import InProcess, Outcome
from segpipe.pipeline.config import load_city
from segpipe.pipeline.plan import Plan

# No test asserts a time, and a busy machine is none of a law's business.
hypothesis.settings.register_profile("laws", deadline=None)
hypothesis.settings.load_profile("laws")

collect_ignore = [] if find_spec("torchvision") else ["test_torchvision.py"]

RESOLUTION = 0.3
STRIDE, HALO = 32, 32


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that want it are skipped where it is absent."""
    folder = Path(os.environ.get("SEGPIPE_SHARED", "../shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: SEGPIPE_SHARED is {folder}, which has no data/")
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an untrained network, with the halo of FakePredictor in its card."""
    path = tmp_path_factory.mktemp("bundle") / "fake.safetensors"
    network = build_network("unet-mobilenetv2")
    card = Card(
        architecture="unet-mobilenetv2",
        arguments={"bands": 3, "classes": 1},
        bands=("red", "green", "blue"),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        stride=STRIDE,
        halo_px=HALO,
        receptive_field_px=Reach(20, 20, 20, 20),
        resolution_m=RESOLUTION,
        resolution_range_m=(0.15, 0.6),
    )
    save_bundle(path, network, card, half=True)
    return path


class FakePredictor:
    """Probability from the mean brightness of 21 x 21 px: looks 10 px far, and costs nothing. Counts its calls."""

    calls = 0

    def predict(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_], core: Any = ...) -> NDArray[np.uint8]:
        """Of the core alone."""
        type(self).calls += 1
        assert all(side % STRIDE == 0 for side in valid_HW.shape), "a window off the stride"
        grey_HW = np.where(valid_HW, image_CHW.astype(np.int64).sum(axis=0), 300)
        mean_HW = uniform_filter(grey_HW * 441, 21, mode="constant", cval=300 * 441) // 441
        prob_HW = np.clip(mean_HW * 250 // 765 + (grey_HW > 600) * 60, 0, 250).astype(np.uint8)
        return np.where(valid_HW, prob_HW, np.uint8(255))[core]

    def upload(self, *window: Any) -> Any:
        """There is no device."""
        return window

    def run(self, window: Any) -> NDArray[np.uint8]:
        """The whole of predict."""
        return self.predict(*window)

    def download(self, stored_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """There is no device."""
        return stored_HW


@pytest.fixture
def fake_network(monkeypatch: pytest.MonkeyPatch) -> type[FakePredictor]:
    """Let tasks in this process predict with FakePredictor."""
    from segpipe.pipeline import network

    monkeypatch.setattr(network, "load_predictor", lambda plan: FakePredictor())
    monkeypatch.setattr(FakePredictor, "calls", 0)
    return FakePredictor


def write_tile(path: Path, image_CHW: NDArray[np.uint8], row: int, col: int, **options: Any) -> Path:
    """A GeoTIFF with its upper left pixel at (row, col) of the lattice of EPSG:32633 and 0.3 m, phase 0.1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff",
        "count": image_CHW.shape[0],
        "height": image_CHW.shape[1],
        "width": image_CHW.shape[2],
        "dtype": image_CHW.dtype,
        "crs": "EPSG:32633",
        "transform": Affine(RESOLUTION, 0, 0.1 + col * RESOLUTION, 0, -RESOLUTION, 0.1 - row * RESOLUTION),
        "compress": "deflate",
    }
    with rasterio.open(path, "w", **(profile | options)) as dataset:
        dataset.write(image_CHW)
    return path


ORIGIN = (-17_666_700, 1_666_500)
"""Row and column of a city's upper left pixel: not on a multiple of any chunk."""


def draw_blobs(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Dark ground with bright crooked houses, some across any line that one may cut along."""
    rng = np.random.default_rng(seed)
    image = rng.integers(20, 120, (3, height, width)).astype(np.uint8)
    for _ in range(height * width // 4000):
        row, col = int(rng.integers(0, height)), int(rng.integers(0, width))
        for _ in range(3):
            h, w = int(rng.integers(6, 40)), int(rng.integers(6, 40))
            dr, dc = int(rng.integers(-10, 10)), int(rng.integers(-10, 10))
            top, left = max(0, row + dr), max(0, col + dc)
            image[:, top : top + h, left : left + w] = rng.integers(200, 250)
    return image


@dataclass(frozen=True)
class City:
    """A city on disk. image_CHW covers all its tiles, from ORIGIN."""

    config: Path
    image_CHW: NDArray[np.uint8]

    @property
    def folder(self) -> Path:
        """Where its YAML, its tiles and its runs lie."""
        return self.config.parent

    def set(self, **changes: Any) -> Path:
        """A copy of the city's YAML with other values."""
        data = yaml.safe_load(self.config.read_text()) | changes
        path = self.config.with_name(f"city-{len(list(self.config.parent.glob('*.yaml')))}.yaml")
        path.write_text(yaml.safe_dump(data))
        return path


def write_city(
    folder: Path, bundle: Path, rows: int = 2, cols: int = 2, tile_px: int = 300, seed: int = 0, **settings: Any
) -> City:
    """Write a city of (rows, columns) tiles with a black hole in it, and its city.yaml."""
    image = draw_blobs(rows * tile_px, cols * tile_px, seed)
    image[:, 40:160, 50:200] = 0
    for number in range(rows * cols):
        r, c = divmod(number, cols)
        part = image[:, r * tile_px : (r + 1) * tile_px, c * tile_px : (c + 1) * tile_px]
        place = (ORIGIN[0] + r * tile_px, ORIGIN[1] + c * tile_px)
        write_tile(folder / "tiles" / f"tile{number + 1}.tif", part, *place)
    config = folder / "city.yaml"
    data: dict[str, Any] = {
        "name": "tiny",
        "images": "tiles/*.tif",
        "model": str(bundle),
        "output": "run",
        "nodata": 0,
        "grid": {"chunk_px": 128, "block_px": 256},
        "vectorize": {"min_area_m2": 2},
    }
    config.write_text(yaml.safe_dump(data | settings))
    return City(config, image)


@pytest.fixture
def make_city(tmp_path: Path, bundle: Path) -> Callable[..., City]:
    """write_city in a folder of the test's own."""
    return partial(write_city, tmp_path, bundle)


@pytest.fixture
def signals() -> Iterator[None]:
    """Commands take signals: put back what pytest had."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sign, handler in before.items():
        signal.signal(sign, handler)


class Interrupted(InProcess):
    """A pool that is killed when so many tasks have ended."""

    left = 0

    def next(self) -> Outcome:
        if type(self).left <= 0:
            raise KeyboardInterrupt
        type(self).left -= 1
        return super().next()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, fake_network: type[FakePredictor]) -> type[FakePredictor]:
    """Runs of this test work in this process, with FakePredictor and without Dask."""
    from segpipe.models import field, predictor

    @contextmanager
    def open_pool(plan: Plan, scheduler: str | None) -> Iterator[InProcess]:
        yield InProcess(plan)

    monkeypatch.setattr(run, "open_pool", open_pool)
    # What a plan asks of a network that nothing is predicted with here.
    monkeypatch.setattr(predictor, "made_ready", lambda network, device: network)
    monkeypatch.setattr(field, "peak_bytes_per_px", lambda network, dtype, bands, run: 500.0)
    return fake_network


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch, in_process: type[FakePredictor]) -> Callable[[Path, int], bool]:
    """Run a city and kill it when so many tasks have ended. Returns False if the run was done before."""

    def kill(config: Path, tasks: int) -> bool:
        @contextmanager
        def open_pool(plan: Plan, scheduler: str | None) -> Iterator[InProcess]:
            yield Interrupted(plan)

        with monkeypatch.context() as patch:
            patch.setattr(run, "open_pool", open_pool)
            patch.setattr(Interrupted, "left", tasks)
            try:
                map_it(config)
            except KeyboardInterrupt:
                return True
        return False

    return kill


def map_it(config: Path, *overrides: str, fresh: bool = False) -> run.Published:
    """`segpipe run`, without the command line."""
    return run.map_city(load_city(config, overrides), Console(file=StringIO()), fresh=fresh)


def outputs(folder: Path, tiles: bool = True) -> dict[str, Any]:
    """What must not depend on how the work was cut: rows of buildings.gpkg in order, pixels of the rasters, place.

    tiles: with the names of the tiles that each building lies on.
    """
    rows = pyogrio.read_dataframe(folder / "buildings.gpkg", layer="buildings", use_arrow=True)
    rows = rows.to_wkb()
    found: dict[str, Any] = {"rows": rows.drop(columns=[] if tiles else "tiles").to_dict("list")}
    for name in ("mask", "probability"):
        with rasterio.open(folder / f"{name}.tif") as raster:
            found[name] = raster.read(1).tobytes()
            found[f"{name} place"] = (raster.shape, raster.transform, raster.crs.to_wkt(), raster.nodata)
    return found


def raster(path: Path) -> NDArray[np.uint8]:
    """Band 1 of a raster."""
    with rasterio.open(path) as dataset:
        pixels: NDArray[np.uint8] = dataset.read(1)
        return pixels


def tasks_done(folder: Path) -> Counter[tuple[str, str]]:
    """How often each unit of each stage was done, over all runs in a folder."""
    lines = (folder / "tasks.jsonl").read_text().splitlines()
    # A line that a full disk has cut short ends without its brace.
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return Counter((it["stage"], it["unit"]) for it in records if "error" not in it)


def stages_since(folder: Path, before: Counter[tuple[str, str]]) -> Counter[str]:
    """Units done since, by stage."""
    return Counter(stage for stage, _ in (tasks_done(folder) - before).elements())
