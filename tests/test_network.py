"""The network in a worker: what its memory cannot hold goes through in parts, and its device's time is told apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
from conftest import City, FakePredictor, map_it, outputs
from numpy.typing import NDArray

from segpipe.pipeline import network
from segpipe.pipeline.config import load_city
from segpipe.pipeline.network import WAITS, LoadedNetwork
from segpipe.pipeline.plan import Plan, make_plan
from segpipe.tasks.errors import RunError, TooLargeError
from segpipe.tasks.predict import reach


class OutOfMemoryError(RuntimeError):
    """Torch's kind, by its name."""


class Activations:
    """What lies in memory as long as something refers to it."""


class SmallGpu(FakePredictor):
    """Has memory for windows of so many pixels, and remembers what it was asked for and what a pass had in memory."""

    def __init__(self, most_px: int) -> None:
        self.most_px = most_px
        self.asked: list[int] = []
        self.activations: WeakSet[Activations] = WeakSet()

    def predict(self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_], core: Any = ...) -> NDArray[np.uint8]:
        assert not self.activations, "a pass that did not fit has still what it had in memory"
        self.asked.append(valid_HW.size)
        activations = Activations()
        self.activations.add(activations)
        if valid_HW.size > self.most_px:
            raise OutOfMemoryError("CUDA out of memory")
        return super().predict(image_CHW, valid_HW, core)


@pytest.fixture
def big_blocks(make_city: Callable[..., City], in_process: type[FakePredictor]) -> City:
    """A city with blocks that are more than the least that the network is given."""
    return make_city(rows=1, cols=2, tile_px=900, grid={"chunk_px": 256, "block_px": 1024})


def planned(city: City, **changes: Any) -> Plan:
    return make_plan(load_city(city.config, tuple(f"{key}={value}" for key, value in changes.items())))


def fullest(plan: Plan) -> tuple[Any, NDArray[np.uint8], NDArray[np.bool_]]:
    """A core, and pixels for its reach."""
    core = plan.core(*next(plan.blocks()))
    shape_yx = reach(core, plan.recipe.halo_px, plan.card.stride).shape_yx
    image_CHW = np.random.default_rng(0).integers(0, 256, (3, *shape_yx), np.uint8)
    return core, image_CHW, np.ones(shape_yx, np.bool_)


def test_a_window_without_room_on_the_gpu_is_predicted_in_halves_with_the_same_bytes(
    big_blocks: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(big_blocks)
    core, image_CHW, valid_HW = fullest(plan)
    small = SmallGpu(valid_HW.size // 2)
    monkeypatch.setattr(network, "load_predictor", lambda plan: small)
    held = LoadedNetwork(plan)
    found = held.predict_core(image_CHW, valid_HW, core, time.perf_counter())
    monkeypatch.setattr(network, "load_predictor", lambda plan: FakePredictor())
    whole = LoadedNetwork(plan).predict_core(image_CHW, valid_HW, core, time.perf_counter())
    assert np.array_equal(found.prob_HW, whole.prob_HW)
    assert np.ptp(whole.prob_HW) > 20
    assert found.seen_px > whole.seen_px
    tried = len(small.asked)
    again = held.predict_core(image_CHW, valid_HW, core, time.perf_counter())
    assert np.array_equal(again.prob_HW, whole.prob_HW)
    assert max(small.asked[tried:]) <= small.most_px, "a window that did not fit is not tried again"


def test_a_halo_that_is_not_exact_is_not_predicted_in_halves(big_blocks: City, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(big_blocks, **{"predict.halo": 0})
    core, image_CHW, valid_HW = fullest(plan)
    assert plan.card.halo_px is not None and plan.recipe.halo_px < plan.card.halo_px
    monkeypatch.setattr(network, "load_predictor", lambda plan: SmallGpu(valid_HW.size // 2))
    with pytest.raises(RunError, match="the GPU has too little memory") as caught:
        LoadedNetwork(plan).predict_core(image_CHW, valid_HW, core, time.perf_counter())
    assert not isinstance(caught.value, TooLargeError)


def test_a_city_mapped_by_a_small_gpu_is_the_same_city(big_blocks: City, monkeypatch: pytest.MonkeyPatch) -> None:
    map_it(big_blocks.config)
    plan = planned(big_blocks)
    expected = outputs(plan.output)
    _, _, valid_HW = fullest(plan)
    monkeypatch.setattr(network, "load_predictor", lambda plan: SmallGpu(valid_HW.size // 2))
    map_it(big_blocks.config, f"output={big_blocks.folder / 'small'}")
    assert outputs(big_blocks.folder / "small") == expected


def test_the_time_of_a_device_is_its_passes_and_what_it_waits_for(
    big_blocks: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clock, moved by hand: 5 s of a pass; then 1 s of writing, 2 s of nothing, 3 s of reading, and a pass."""
    now = 100.0
    monkeypatch.setattr(network.time, "perf_counter", lambda: now)

    class Slow(FakePredictor):
        def predict(self, *window: Any) -> NDArray[np.uint8]:
            nonlocal now
            now += 5
            return super().predict(*window)

    monkeypatch.setattr(network, "load_predictor", lambda plan: Slow())
    plan = planned(big_blocks)
    core, image_CHW, valid_HW = fullest(plan)
    held = LoadedNetwork(plan)
    first = held.predict_core(image_CHW, valid_HW, core, begun=90.0)
    assert first.seconds == {"network": 5, **dict.fromkeys(WAITS, 0)}
    now += 1
    held.written()
    now += 2
    begun = now
    now += 3
    second = held.predict_core(image_CHW, valid_HW, core, begun)
    assert second.seconds == {"network": 5, "read": 3, "write": 1, "block": 2}
    assert sum(second.seconds.values()) == now - 105
    # A task that had begun, and was read, while the device was at work: no wait at all.
    third = held.predict_core(image_CHW, valid_HW, core, begun)
    assert third.seconds == {"network": 5, **dict.fromkeys(WAITS, 0)}
