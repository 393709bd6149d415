"""What cannot be run is refused before any work, with both numbers and the cure; the rest is decided well."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shapely
from affine import Affine
from conftest import ORIGIN, RESOLUTION, City, draw_blobs, write_tile
from hypothesis import example, given
from hypothesis import strategies as st
from pyproj import CRS
from shapely import Polygon, box

from segpipe.models.weights import load_bundle, save_bundle
from segpipe.pipeline import plan as module
from segpipe.pipeline import workers as workers_module
from segpipe.pipeline.config import LocalConfig, load_city
from segpipe.pipeline.describe import describe
from segpipe.pipeline.district import District
from segpipe.pipeline.place import place_tiles
from segpipe.pipeline.plan import Plan, disk_bytes, make_plan
from segpipe.pipeline.recipe import LARGEST_AUTO_BLOCK_PX, choose_block
from segpipe.pipeline.workers import Crew, resolve_workers
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.read import TileHeader, read_header

MakeCity = Callable[..., City]

pytestmark = pytest.mark.usefixtures("in_process")


def plan_of(city: City, *overrides: str, **stored: Any) -> Plan:
    return make_plan(load_city(city.config, overrides), stored or None)


def refusal(city: City, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(city, *overrides)
    assert "\n" not in str(caught.value)
    assert not (city.folder / "run").exists()
    return str(caught.value)


def tile(city: City, **options: Any) -> Path:
    """Another tile to the east of a city of one tile."""
    return write_tile(city.folder / "tiles" / "tile2.tif", draw_blobs(64, 64), ORIGIN[0], ORIGIN[1] + 64, **options)


@pytest.fixture
def city(make_city: MakeCity) -> City:
    return make_city(1, 1, tile_px=64, grid={"chunk_px": 64, "block_px": 64})


def shifted(**changes: float) -> Affine:
    """The transform of the second tile with other numbers in it."""
    numbers = {"a": RESOLUTION, "b": 0.0, "c": 0.1 + (ORIGIN[1] + 64) * RESOLUTION}
    numbers |= {"d": 0.0, "e": -RESOLUTION, "f": 0.1 - ORIGIN[0] * RESOLUTION}
    return Affine(*(numbers | {k: numbers[k] + v for k, v in changes.items()}).values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crs": None}, ["no CRS", "images_crs:"]),
    ],
)
def test_a_tile_that_does_not_fit_is_named_with_both_values_and_the_cure(
    city: City, options: dict[str, Any], words: list[str]
) -> None:
    tile(city, **options)
    message = refusal(city)
    assert all(word in message for word in ["tile2.tif", "cure", *words]), message


def test_a_tile_a_thousandth_off_the_lattice_is_taken(city: City) -> None:
    tile(city, transform=shifted(c=0.0002, f=-0.0002))
    plan = plan_of(city)
    assert plan.tiles[1].window == Window(ORIGIN[0], ORIGIN[1] + 64, 64, 64)


def test_tiles_of_different_band_counts_are_both_named(city: City) -> None:
    write_tile(city.folder / "tiles" / "tile2.tif", draw_blobs(64, 64)[:1], ORIGIN[0], ORIGIN[1] + 64)
    message = refusal(city)
    assert all(word in message for word in ("tile2.tif: 1 bands", "tile1.tif has 3"))


def test_bands_that_no_tile_has_are_refused(city: City) -> None:
    assert "has no band 5: found 3 bands" in refusal(city, "bands=[1, 2, 5]")
    assert "has no band nir" in refusal(city, "bands=[red, green, nir]")


def test_another_number_of_bands_than_the_model_takes_is_refused(city: City) -> None:
    message = refusal(city, "bands=[1]")
    assert "takes 3 (red, green, blue)" in message


def test_samples_of_another_type_are_refused(city: City) -> None:
    image = draw_blobs(64, 64).astype(np.uint16)
    write_tile(city.folder / "tiles" / "tile1.tif", image, *ORIGIN)
    message = refusal(city)
    assert all(word in message for word in ("uint16", "expected uint8", "scale: auto"))


def test_imagery_outside_the_models_range_is_refused(city: City) -> None:
    place = Affine(0.1, 0, 500000, 0, -0.1, 5300000)
    write_tile(city.folder / "tiles" / "tile1.tif", draw_blobs(64, 64), 0, 0, transform=place)
    message = refusal(city)
    assert all(word in message for word in ("0.1 m a pixel", "0.15 to 0.6 m", "`grid: {resolution_m: 0.3}`")), message


def test_what_is_finer_than_the_models_range_is_averaged_if_it_is_asked_for_and_what_is_coarser_is_refused(
    city: City,
) -> None:
    for name in ("tile1.tif", "tile2.tif"):
        (city.folder / "tiles" / name).unlink(missing_ok=True)
    place = Affine(0.1, 0, 500000, 0, -0.1, 5300000)
    write_tile(city.folder / "tiles" / "fine.tif", draw_blobs(600, 600), 0, 0, transform=place)
    plan = plan_of(city, "grid.resolution_m=0.3")
    assert (plan.lattice.pixel_size, plan.tiles[0].mosaic.resampling) == (0.3, "average")
    assert max(plan.bounds.shape_yx) in (200, 201)  # of a lattice whose phase is 0
    write_tile(city.folder / "tiles" / "fine.tif", draw_blobs(600, 600), 0, 0, transform=place * Affine.scale(7))
    assert "0.7 m a pixel" in refusal(city, "grid.resolution_m=0.3")


def test_coarser_pixels_than_the_models_are_kept_and_the_plan_says_what_would_find_more(city: City) -> None:
    assert not plan_of(city).notes
    for name in ("tile1.tif", "tile2.tif"):
        (city.folder / "tiles" / name).unlink(missing_ok=True)
    place = Affine(0.6, 0, 500000, 0, -0.6, 5300000)
    write_tile(city.folder / "tiles" / "coarse.tif", draw_blobs(600, 600), 0, 0, transform=place)
    plan = plan_of(city)
    assert plan.lattice.pixel_size == 0.6
    assert "`grid: {resolution_m: 0.3}` makes it 4.0 times the pixels" in plan.notes[0]
    assert not plan_of(city, "grid.resolution_m=0.3", "output=other").notes


def test_the_plan_says_that_a_model_of_resized_images_is_given_none(city: City, bundle: Path) -> None:
    it = load_bundle(bundle)
    save_bundle(city.folder / "resized.safetensors", it.network, it.card.model_copy(update={"resize_px": (256, 128)}))
    assert "resized to 128 x 256 px" in plan_of(city, "model=resized.safetensors").notes[0]


def test_a_crs_can_be_given_to_tiles_that_have_none(city: City) -> None:
    write_tile(city.folder / "tiles" / "tile1.tif", draw_blobs(64, 64), *ORIGIN, crs=None)
    assert plan_of(city, "images_crs=EPSG:32633").lattice.crs_wkt.startswith('PROJCRS["WGS 84 / UTM zone 33N"')
    assert "EPSG:999999 is not a CRS" in refusal(city, "images_crs=EPSG:999999")


@pytest.mark.parametrize("content", ["just a text\n", ""])
def test_a_file_that_is_no_raster_is_named(city: City, content: str) -> None:
    (city.folder / "tiles" / "tile2.tif").write_text(content)
    assert "tile2.tif" in refusal(city)
    assert list(plan_of(city, "on_tile_error=skip").left_out) == [str(city.folder / "tiles" / "tile2.tif")]


def test_a_city_of_which_no_tile_can_be_read_is_refused_even_if_they_may_be_skipped(city: City) -> None:
    (city.folder / "tiles" / "tile1.tif").write_text("text")
    assert "tile1.tif" in refusal(city, "on_tile_error=skip")


def test_a_model_that_is_none_is_refused(city: City, bundle: Path) -> None:
    folder = city.folder
    assert "no file" in refusal(city, "model=absent.safetensors")
    (folder / "text.safetensors").write_text("not a bundle")
    assert "text.safetensors: not a model bundle" in refusal(city, "model=text.safetensors")
    (folder / "cut.safetensors").write_bytes(bundle.read_bytes()[:-100])
    assert "the file is not whole" in refusal(city, "model=cut.safetensors")
    import torch

    torch.save({"a": torch.zeros(2)}, folder / "checkpoint.pth")
    assert "segpipe models import" in refusal(city, "model=checkpoint.pth")


@pytest.mark.parametrize("block_px", [65, 96, 100])
def test_a_block_that_is_no_whole_number_of_chunks_is_refused(city: City, block_px: int) -> None:
    message = refusal(city, f"grid.block_px={block_px}")
    assert f"grid.block_px: {block_px}; expected a multiple of 64" in message


def test_a_block_is_a_multiple_of_chunk_and_stride(city: City) -> None:
    assert "expected a multiple of 160" in refusal(city, "grid.chunk_px=80", "grid.block_px=80")
    assert plan_of(city, "grid.chunk_px=80", "grid.block_px=160").block_px == 160


def test_a_block_that_is_too_large_for_the_memory_is_refused_with_both_numbers(city: City) -> None:
    message = refusal(city, "grid.block_px=8192", "cluster.memory=4 GiB", "cluster.workers=2")
    assert all(word in message for word in ("2.0 GiB a worker", "8192 px", "block_px", "workers", "cure")), message


def test_block_px_auto_follows_the_configured_memory(make_city: MakeCity) -> None:
    city = make_city(1, 1, tile_px=64, grid={"chunk_px": 512, "block_px": "auto"})
    sides = [plan_of(city, f"cluster.memory={memory} GiB").block_px for memory in (3, 8, 16, 1000)]
    assert sides == sorted(sides)
    assert sides[0] < sides[2]
    assert sides[-1] == LARGEST_AUTO_BLOCK_PX
    for memory, side in zip((3, 8, 16), sides, strict=False):
        assert plan_of(city, f"cluster.memory={memory} GiB").task_bytes <= memory * 2**30 / 2 or side == 512
    assert plan_of(city, "cluster.memory=1000 GiB", block_px=1024).block_px == 1024, "what was settled stays"


def test_on_a_gpu_the_block_follows_its_memory_and_the_workers_is_for_the_rest(make_city: MakeCity) -> None:
    city = make_city(1, 1, tile_px=64, grid={"chunk_px": 512, "block_px": "auto"})

    def on_gpu(gpu_gib: int, memory_gib: int = 64, *overrides: str) -> Plan:
        crew = Crew("cuda sm_90", "2.13.0", 1, 8, memory_gib * 2**30, gpu_gib * 2**30)
        return make_plan(load_city(city.config, overrides), crew=crew)

    sides = [on_gpu(gib).block_px for gib in (2, 8, 24, 80)]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1] == LARGEST_AUTO_BLOCK_PX
    assert on_gpu(80, memory_gib=4).block_px == LARGEST_AUTO_BLOCK_PX
    assert on_gpu(0).block_px == LARGEST_AUTO_BLOCK_PX, "where nobody has looked, a trial tells"
    with pytest.raises(UserError, match=r"block of 4096 px .* GiB of a GPU; expected 90% of its 2\.0 GiB"):
        on_gpu(2, 64, "grid.block_px=4096")


@pytest.mark.parametrize(
    ("sides", "corner", "workers", "chosen"),
    [
        ((40_000, 40_000), (0, 0), 1, 4096),
        ((64, 64), (0, 0), 1, 4096),
        # Each of four has a block, and each of five, of which four lie across the same corner.
        ((8192, 8192), (0, 0), 4, 4096),
        ((64, 64), (4096 * 7 - 32, 4096 * 3 - 32), 4, 4096),
        ((8192, 8192), (0, 0), 5, 3072),
        ((64, 64), (0, 0), 2, 1024),
    ],
)
def test_blocks_are_as_large_as_leaves_one_for_every_worker(
    sides: tuple[int, int], corner: tuple[int, int], workers: int, chosen: int
) -> None:
    assert choose_block(range(1024, 4097, 1024), Window(*corner, *sides), workers) == chosen


def test_what_the_machine_has_free_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for available in (1, 2**40):
        memory = SimpleNamespace(total=2**35, available=available)
        monkeypatch.setattr(workers_module.psutil, "virtual_memory", lambda memory=memory: memory)
        found.append(resolve_workers(LocalConfig()))
    assert found[0] == found[1]


def test_limits_of_a_container_and_of_the_processes_affinity_count(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"cpu.max": "300000 100000", "memory.max": str(2**31)}
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(workers_module, "_cgroup", limits.__getitem__)
    assert workers_module.allowance() == (3, 2**31)
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda pid: {5})
    assert workers_module.allowance()[0] == 1
    limits.update({"cpu.max": "max 100000", "memory.max": "max"})
    assert workers_module.allowance() == (1, workers_module.psutil.virtual_memory().total)


def test_on_a_machine_with_gpus_there_is_one_worker_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "gpus_bytes", lambda: [2**34, 2**33, 2**34, 2**34])
    workers = resolve_workers(LocalConfig())
    assert (workers.count, workers.gpu_bytes) == (4, 2**33)
    assert resolve_workers(LocalConfig(workers=2)).count == 2


@pytest.mark.parametrize(("text", "expected"), [("4 GiB", 2**32), ("4GB", 4 * 10**9), ("512 MiB", 2**29)])
def test_memory_is_shared_by_the_workers(text: str, expected: int) -> None:
    assert resolve_workers(LocalConfig(workers=2, threads=1, memory=text)).memory_bytes == expected // 2


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(city.folder)._replace(free=3 * 2**20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    message = refusal(city)
    plan = plan_without_disk(city, monkeypatch)
    needed = disk_bytes(plan.tiles, 3, plan.layout.grid) / 2**30
    assert all(word in message for word in ("0.00 GiB free", f"expected {needed:.2f} GiB", "another `output:`"))


def plan_without_disk(city: City, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(module, "_check_disk", lambda *_: None)
    return plan_of(city)


def test_an_output_that_is_a_file_or_below_one_is_refused(city: City) -> None:
    (city.folder / "taken").write_text("")
    assert "taken is a file" in refusal(city, "output=taken")
    assert "taken is a file" in refusal(city, "output=taken/deeper/run")


def test_a_halo_less_than_exact_is_told(city: City, bundle: Path) -> None:
    assert plan_of(city).recipe.halo_px == 32
    assert not plan_of(city).notes
    plan = plan_of(city, "predict.halo=16")
    assert plan.recipe.halo_px == 16
    assert "results depend on the block size" in plan.notes[0]
    it = load_bundle(bundle)
    wide = it.card.model_copy(update={"halo_px": 1088, "effective_halo_px": 256})
    save_bundle(city.folder / "wide.safetensors", it.network, wide)
    plan = plan_of(city, "model=wide.safetensors")
    assert plan.recipe.halo_px == 256
    assert "results depend on the block size" in plan.notes[0]
    assert plan_of(city, "model=wide.safetensors", "predict.halo=exact").recipe.halo_px == 1088


def test_an_effective_halo_that_is_the_exact_one_is_not_told_of(city: City, bundle: Path) -> None:
    it = load_bundle(bundle)
    wide = it.card.model_copy(update={"halo_px": 1088, "effective_halo_px": 1088})
    save_bundle(city.folder / "wide.safetensors", it.network, wide)
    plan = plan_of(city, "model=wide.safetensors")
    assert plan.recipe.halo_px == 1088
    assert not plan.notes


@pytest.mark.parametrize(("threshold", "steps"), [(0.4, 100), (0.5, 125), (0.001, 1), (1.0, 250), (0.3999, 100)])
def test_the_threshold_is_the_next_stored_step(city: City, threshold: float, steps: int) -> None:
    found = plan_of(city, f"vectorize.threshold={threshold}").vector.threshold_u8
    assert found == steps >= 250 * threshold - 1e-6


def test_the_plan_tells_all_that_was_decided(city: City) -> None:
    labels = dict(describe(plan_of(city)))
    assert {"tiles", "lattice", "grid", "model", "halo", "recipe", "workers", "disk", "nodata"} <= set(labels)
    assert "EPSG:32633" in labels["lattice"]
    assert "32 px: " in labels["halo"]


# The lattice


def header(col: float, row: float, size: float, phase: tuple[float, float] = (0.0, 0.0)) -> TileHeader:
    x, y = phase[0] + col * size, phase[1] - row * size
    return TileHeader(
        path=f"{col} {row}", width=5000, height=5000, bands=3, dtype="uint8", crs_wkt="EPSG:32633",
        transform=(size, 0.0, x, 0.0, -size, y), nodata=None, lossy=False, mask="none", colours=(),
        block_shape_yx=(256, 256), missing_bytes=0,
    )  # fmt: skip


COLS, ROWS = st.integers(300_000, 30_000_000), st.integers(-30_000_000, -10_000)


@given(
    st.lists(st.tuples(COLS, ROWS), min_size=2, max_size=6),
    st.sampled_from([0.3, 0.25, 0.1, 1 / 3, 0.2988, 0.5]),
    st.sampled_from([0.0, 0.1, 1e-12, 0.5, 1 / 3]),
)
def test_the_lattice_does_not_depend_on_which_tile_comes_first(
    places: list[tuple[int, int]], size: float, phase: float
) -> None:
    headers = [header(col, row, size, (phase * size, phase * size)) for col, row in places]
    lattices = {place_tiles([first, *headers]).lattice for first in headers}
    (lattice,) = lattices
    assert 0 <= lattice.phase_x < size
    windows = [place.window for place in place_tiles(headers).places]
    for (col, row), window in zip(places, windows, strict=True):
        assert (window.col_off - windows[0].col_off, window.row_off - windows[0].row_off) == (
            col - places[0][0],
            row - places[0][1],
        )
        assert lattice.transform(window.row_off, window.col_off).c == pytest.approx(phase * size + col * size, abs=1e-5)


def test_a_stored_lattice_wins_over_the_first_tile() -> None:
    stored = {"crs_wkt": CRS.from_epsg(32633).to_wkt(), "pixel_size": 0.3, "phase_x": 0.1, "phase_y": 0.2}
    off = (0.1 + 0.0002, 0.2 - 0.0002)
    assert place_tiles([header(10**6, -(10**7), 0.3, off)], stored={"lattice": stored}).lattice.phase_x == 0.1
    other = place_tiles([header(10**6, -(10**7), 0.25, (0.1, 0.2))], stored={"lattice": stored}).lattice
    assert (other.pixel_size, other.phase_x) == (0.25, 0.1)


def test_blocks_and_chunks_cover_all_tiles_exactly_once(make_city: MakeCity) -> None:
    city = make_city(2, 2, tile_px=100, grid={"chunk_px": 64, "block_px": 192})
    write_tile(city.folder / "tiles" / "far.tif", draw_blobs(30, 700), ORIGIN[0] - 500, ORIGIN[1] + 400)
    plan = plan_of(city)
    grid = plan.layout.grid
    frame = grid.snap(192)
    count = np.zeros(frame.shape_yx, np.int64)
    for block in plan.blocks():
        count[plan.core(*block).within(frame)] += 1
    under = np.zeros(frame.shape_yx, np.bool_)
    for it in plan.tiles:
        under[it.window.within(frame)] = True
    assert count.max() == 1
    assert count[under].all()
    chunks = np.zeros(frame.shape_yx, np.int64)
    for cell in plan.chunks():
        window = Window.cell(*cell, 64)
        assert grid.contains(window)
        assert under[window.within(frame)].any()
        chunks[window.within(frame)] += 1
    assert chunks.max() == 1
    assert chunks[under].all()
    assert {c for b in plan.blocks() for c in plan.chunks_in(plan.core(*b))} == set(plan.chunks())


OFFSETS, SIDES = st.integers(-600, 600), st.integers(1, 300)
WINDOWS = st.builds(Window, OFFSETS, OFFSETS, SIDES, SIDES)
PLACES = st.integers(-9600, 9600).map(lambda n: n / 16)
BOXES = st.builds(lambda x, y, width, height: box(x, y, x + width, y + height), PLACES, PLACES, SIDES, SIDES)
# What is thin is not in the bounds of the area.
HAIRS = st.builds(lambda x, y, height: box(x, y, x + 0.001, y + height), PLACES, PLACES, SIDES)
SPIKES = st.builds(lambda x, y, width: Polygon([(x, y), (x, y + 1), (x + width, y)]), PLACES, PLACES, SIDES)


def test_what_is_listed_as_to_be_predicted_and_read_is_what_is_asked_for_one_by_one(city: City) -> None:
    plan = plan_of(city)

    @given(
        st.lists(WINDOWS, min_size=1, max_size=4),
        st.lists(BOXES | HAIRS | SPIKES, max_size=2),
        st.sampled_from([1, 2, 3, 5]),
        st.sampled_from([0, 16, 32, 100]),
        st.integers(0, 1),
    )
    @example([Window(0, 0, 64, 54), Window(0, 108, 64, 20)], [box(0, 0, 54, 64)], 1, 32, 0)
    @example([Window(0, 0, 64, 128), Window(0, 180, 64, 12)], [box(0, 0, 48, 64)], 1, 16, 0)
    @example([Window(0, 0, 64, 600)], [box(0, 0, 30, 30), box(500, 0, 500.001, 30)], 1, 32, 0)
    def holds(
        covers: list[Window], parts: list[shapely.Geometry], chunks_a_block: int, halo_px: int, beyond: int
    ) -> None:
        grid = Window.between(
            min(it.row_off for it in covers),
            min(it.col_off for it in covers),
            max(it.row_stop for it in covers),
            max(it.col_stop for it in covers),
        ).snap(64)
        found = replace(
            plan,
            # A warped tile's cover may reach beyond the grid.
            tiles=tuple(replace(plan.tiles[0], window=it.pad(beyond)) for it in covers),
            layout=replace(plan.layout, grid=grid),
            recipe=replace(plan.recipe, block_px=64 * chunks_a_block, halo_px=halo_px),
            area=District("drawn", shapely.union_all(parts)) if parts else None,
        )
        every = grid.pad(found.block_px).cells(found.block_px)
        assert list(found.blocks()) == [block for block in every if found.is_predicted(block)]
        assert list(found.chunks()) == found.chunks_in(grid)

    holds()


def test_the_grid_is_the_bounds_of_the_tiles_snapped_to_chunks(city: City) -> None:
    tile(city)
    plan = plan_of(city)
    assert plan.bounds == Window(*ORIGIN, 64, 128)
    assert plan.layout.grid == plan.bounds.snap(64)
    assert math.prod(read_header(plan.tiles[0].path).block_shape_yx) > 0


def test_the_real_town_fits_one_lattice(shared: Path, city: City) -> None:
    plan = plan_of(city, f"images={shared.resolve()}/data/banepa/tiles", "nodata=[0, 255]")
    assert len(plan.tiles) == 20
    assert sum(it.window.pixels for it in plan.tiles) == plan.bounds.pixels
