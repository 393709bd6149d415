"""A predictor's bytes depend on the pixels that the network can see and are valid, and on nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from segpipe.models import predictor as predictor_module
from segpipe.models import strips
from segpipe.models.networks import Network, build_network, unet
from segpipe.models.predictor import INVALID_U8, Precision, Predictor, device_recipe, fast_bfloat16, resolve_device
from segpipe.models.strips import Core
from segpipe.models.weights import Bundle, Card, Reach, load_bundle, save_bundle
from segpipe.tasks.grid import Window
from segpipe.tasks.predict import predict_core, reach

HALO_PX = 320
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose probabilities spread over their whole range, so that equal bytes mean something."""
    torch.manual_seed(0)
    network = build_network("unet-mobilenetv2")
    with torch.no_grad():
        network.get_parameter("head.weight").mul_(200)
    card = Card(
        architecture="unet-mobilenetv2",
        arguments={"bands": 3, "classes": 1},
        bands=("red", "green", "blue"),
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.2, 0.125),
        stride=32,
        halo_px=HALO_PX,
        receptive_field_px=Reach(338, 307, 338, 307),
        resolution_m=0.3,
        resolution_range_m=(0.2, 0.5),
    )
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(2, 3, 128, 128))
    path = tmp_path_factory.mktemp("bundle") / "lively.safetensors"
    save_bundle(path, network, card)
    return path


def predictor_of(path: Path, precision: Precision) -> Predictor:
    return Predictor(load_bundle(path), torch.device("cpu"), precision, threads=1)


def scene(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, height, width), np.uint8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_what_the_processor_gives_also_while_other_windows_come_and_go(lively: Path) -> None:
    on_gpu = Predictor(load_bundle(lively), resolve_device(), "float32", threads=1)
    windows = [(scene(640, 512 + 64 * i), np.ones((640, 512 + 64 * i), np.bool_)) for i in range(8)]
    alone = [on_gpu.predict(*window) for window in windows]
    with ThreadPoolExecutor(4) as tasks, ThreadPoolExecutor(1) as network:

        def predict(window: tuple[NDArray[np.uint8], NDArray[np.bool_]]) -> NDArray[np.uint8]:
            return on_gpu.download(network.submit(on_gpu.run, on_gpu.upload(*window)).result())

        beside = list(tasks.map(predict, windows))
    on_cpu = predictor_of(lively, "float32")
    for window, one_HW, other_HW in zip(windows, alone, beside, strict=True):
        assert np.array_equal(one_HW, other_HW)
        assert np.abs(one_HW.astype(int) - on_cpu.predict(*window)).max() <= 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_core_does_not_depend_on_the_size_of_its_window(lively: Path, precision: Precision) -> None:
    predictor = predictor_of(lively, precision)
    image_CHW = scene(832, 800)
    valid_HW = np.ones(image_CHW.shape[1:], np.bool_)
    whole_HW = predictor.predict(image_CHW, valid_HW)
    rows, cols = slice(64, 64 + 2 * HALO_PX + 64), slice(96, 96 + 2 * HALO_PX + 32)
    window_HW = predictor.predict(image_CHW[:, rows, cols], valid_HW[rows, cols])
    inside = slice(HALO_PX, -HALO_PX)
    core_HW = window_HW[inside, inside]
    assert np.array_equal(core_HW, whole_HW[rows, cols][inside, inside])
    assert np.ptp(core_HW) > 20


def test_what_lies_under_invalid_pixels_never_matters(lively: Path) -> None:
    predictor = predictor_of(lively, "float32")
    image_CHW, valid_HW = scene(64, 96), np.ones((64, 96), np.bool_)
    valid_HW[10:40, 20:60] = False
    other_CHW = np.where(valid_HW, image_CHW, 255 - image_CHW)
    first_HW, second_HW = predictor.predict(image_CHW, valid_HW), predictor.predict(other_CHW, valid_HW)
    assert np.array_equal(first_HW, second_HW)
    assert np.array_equal(first_HW == INVALID_U8, ~valid_HW)
    assert first_HW[valid_HW].max() <= 250


def test_the_network_sees_the_cards_normalisation_and_fill(lively: Path) -> None:
    bundle = load_bundle(lively)
    card = bundle.card.model_copy(update={"fill": 0.5})
    predictor = Predictor(Bundle(bundle.network, card), torch.device("cpu"), "float32", threads=1)
    image_CHW, valid_HW = scene(32, 64), np.random.default_rng(1).random((32, 64)) < 0.8
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (card.mean, card.std))
    expected = np.where(valid_HW, (image_CHW / 255 - mean) / std, 0.5)
    np.testing.assert_allclose(predictor.normalise(image_CHW, valid_HW)[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape_yx", [(32, 64), (512, 32)])
def test_a_window_smaller_than_the_least_is_as_if_surrounded_by_invalid_pixels(
    lively: Path, shape_yx: tuple[int, int]
) -> None:
    predictor = predictor_of(lively, "float32")
    height, width = shape_yx
    image_CHW, valid_HW = scene(512, 512), np.zeros((512, 512), np.bool_)
    valid_HW[:height, :width] = True
    expected_HW = predictor.predict(image_CHW, valid_HW)[:height, :width]
    small_HW = predictor.predict(image_CHW[:, :height, :width], valid_HW[:height, :width])
    assert np.array_equal(small_HW, expected_HW)


def test_threads_that_share_a_predictor_do_not_share_the_memory_of_a_pass(
    lively: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Strips of so few rows that maps of a small image are kept.
    monkeypatch.setattr(strips, "LEAST_ROWS", 9)
    monkeypatch.setattr(strips, "MOST_ROWS", 13)
    predictor = predictor_of(lively, "float32")
    images = [np.roll(scene(300, 300), 40 * number, axis=2).transpose(1, 2, 0) for number in range(8)]
    expected = [predictor.predict_image(image_HWC) for image_HWC in images]
    with ThreadPoolExecutor(4) as threads:
        for found, one in zip(threads.map(predictor.predict_image, images), expected, strict=True):
            assert np.array_equal(found, one)


def lively_valid() -> Bundle:
    """The unpadded network, with probabilities that spread."""
    torch.manual_seed(0)
    network = build_network("unet-valid").eval().requires_grad_(requires_grad=False)
    network.get_parameter("head.weight").mul_(60)
    card = Card(
        architecture="unet-valid",
        arguments={"bands": 3, "classes": 1},
        bands=("red", "green", "blue"),
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.2, 0.125),
        fill=0.25,
        stride=16,
        halo_px=96,
        receptive_field_px=Reach(107, 107, 107, 107),
        resolution_m=0.3,
        resolution_range_m=(0.2, 0.5),
    )
    return Bundle(network, card)


def test_cores_of_the_unpadded_network_equal_one_pass_over_the_whole_with_fill_around() -> None:
    bundle = lively_valid()
    predictor = Predictor(bundle, torch.device("cpu"), "float32", threads=1)
    height, width = 140, 150
    image_CHW, valid_HW = scene(height, width), np.ones((height, width), np.bool_)
    valid_HW[60:90, 100:140] = False
    # The whole, starting on the lattice: 96 px of fill before it, 92 at least behind it, 12 modulo 16 in all.
    after = [92 + (12 - 96 - side - 92) % 16 for side in (height, width)]
    wide_CHW = np.pad(image_CHW, [(0, 0), (96, after[0]), (96, after[1])])
    inside_HW = np.pad(valid_HW, [(96, after[0]), (96, after[1])])
    with torch.inference_mode():
        logits_HW = bundle.network(predictor.normalise(wide_CHW, inside_HW))[0, 0, 4 : 4 + height, 4 : 4 + width]
        expected_HW = torch.round(torch.sigmoid(logits_HW) * 250).to(torch.uint8).numpy()
    expected_HW = np.where(valid_HW, expected_HW, INVALID_U8)
    assert np.ptp(expected_HW[valid_HW]) > 20
    for core in (Window(0, 64, 64, 64), Window(128, 128, 64, 64)):
        outer = reach(core, 96, 16)
        everything = Window(0, 0, height, width)
        inner = outer.intersect(everything)
        window_CHW, window_HW = np.zeros((3, *outer.shape_yx), np.uint8), np.zeros(outer.shape_yx, np.bool_)
        window_CHW[:, *inner.within(outer)] = image_CHW[:, *inner.within(everything)]
        window_HW[inner.within(outer)] = valid_HW[inner.within(everything)]
        prob_HW, _ = predict_core(window_CHW, window_HW, core, 96, 16, predictor.predict)
        there = core.intersect(everything)
        assert np.array_equal(prob_HW[there.within(core)], expected_HW[there.within(everything)])


@given(
    top=st.integers(0, 63),
    left=st.integers(0, 79),
    height=st.integers(0, 64),
    width=st.integers(0, 80),
    row=st.integers(-3, 3),
)
def test_of_a_core_the_network_is_asked_for_what_is_valid_and_sees_a_halo_around_it(
    top: int, left: int, height: int, width: int, row: int
) -> None:
    core, halo_px, stride = Window(row * 64, 80, 64, 80), 20, 16
    outer = reach(core, halo_px, stride)
    box = Window(core.row_off + top, core.col_off + left, height, width).intersect(core)
    image_CHW = scene(*outer.shape_yx) // 2
    valid_HW = np.zeros(outer.shape_yx, np.bool_)
    valid_HW[box.within(outer)] = True
    if box.pixels:
        # What lies in the halo is seen, and not asked for.
        valid_HW[0] = True
    asked_px: list[int] = []

    def first_band(seen_CHW: NDArray[np.uint8], seen_HW: NDArray[np.bool_], asked: Core) -> NDArray[np.uint8]:
        tall, wide = seen_HW[asked].shape
        asked_px.append(tall * wide)
        assert tall < height + 2 * stride and wide < width + 2 * stride
        for places, side, part in zip(np.nonzero(seen_HW[asked]), seen_HW.shape, asked, strict=True):
            assert min(part.start + places.min(), side - 1 - part.start - places.max()) >= halo_px
        return np.where(seen_HW[asked], seen_CHW[0][asked], np.uint8(INVALID_U8))

    prob_HW, _ = predict_core(image_CHW, valid_HW, core, halo_px, stride, first_band)
    assert len(asked_px) == (box.pixels > 0)
    inner = core.within(outer)
    assert np.array_equal(prob_HW, np.where(valid_HW[inner], image_CHW[0][inner], INVALID_U8))


def test_the_unpadded_network_gives_no_answer_within_its_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "WIDTHS", (8, 8, 8, 8, 8))
    predictor = Predictor(lively_valid(), torch.device("cpu"), "float32", threads=1)
    prob_HW = predictor.predict(scene(448, 464), np.ones((448, 464), np.bool_))
    assert (prob_HW[96:-96, 96:-96] <= 250).all()
    assert (prob_HW[:92] == INVALID_U8).all()
    assert (prob_HW[:, -92:] == INVALID_U8).all()


@pytest.mark.parametrize("tta", ["none", "d4"])
def test_a_core_that_is_asked_for_is_that_part_of_the_window(lively: Path, tta: Literal["none", "d4"]) -> None:
    bundle = load_bundle(lively)
    predictor = Predictor(bundle, torch.device("cpu"), "float32", threads=1, tta=tta)
    image_CHW = scene(560, 600)
    valid_HW = np.random.default_rng(1).random((560, 600)) < 0.9
    whole_HW = predictor.predict(image_CHW, valid_HW)
    assert np.ptp(whole_HW[valid_HW]) > 2
    for core in ((slice(32, 540), slice(80, 600)), (slice(0, 9), slice(590, 593))):
        assert np.array_equal(predictor.predict(image_CHW, valid_HW, core), whole_HW[core]), core


class Corner(Network):
    """Logits that differ in every direction: the pixel, and its neighbours below and to the right. Stride 1."""

    stride = 1

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(image_BCHW[:, :1], (0, 1, 0, 1))
        return x[..., :-1, :-1] + 2 * x[..., 1:, :-1] - 3 * x[..., :-1, 1:]


def test_temperature_divides_the_logits(lively: Path) -> None:
    bundle = Bundle(Corner(), load_bundle(lively).card.model_copy(update={"stride": 1, "halo_px": 1}))
    image_HWC = np.moveaxis(scene(48, 80), 0, 2)
    warm = Bundle(bundle.network, bundle.card.model_copy(update={"temperature": 2.5}))
    cold_HW, warm_HW = bundle.predict(image_HWC).astype(float), warm.predict(image_HWC).astype(float)
    inner = (cold_HW > 1e-4) & (cold_HW < 1 - 1e-4)
    assert inner.mean() > 0.5
    logits = np.log(cold_HW[inner] / (1 - cold_HW[inner]))
    np.testing.assert_allclose(warm_HW[inner], 1 / (1 + np.exp(-logits / 2.5)), atol=1e-4)


def test_d4_is_the_mean_of_all_eight_ways_to_look_at_the_window(lively: Path) -> None:
    card = load_bundle(lively).card.model_copy(update={"stride": 1})
    predictor = Predictor(Bundle(Corner(), card), torch.device("cpu"), "float32", threads=1, tta="d4")
    plain = Predictor(Bundle(Corner(), card), torch.device("cpu"), "float32", threads=1)
    image_HWC = np.moveaxis(scene(20, 30), 0, 2)
    views = []
    for turns in range(4):
        turned = np.rot90(image_HWC, turns)
        views.append(np.rot90(plain.predict_image(turned), -turns))
        views.append(np.rot90(plain.predict_image(turned[:, ::-1])[:, ::-1], -turns))
    found_HW = predictor.predict_image(image_HWC)
    np.testing.assert_allclose(found_HW, np.mean(views, axis=0), atol=1e-6)
    assert np.abs(found_HW - views[0]).max() > 0.1
    turned_HW = predictor.predict_image(np.rot90(image_HWC))
    np.testing.assert_allclose(np.rot90(turned_HW, -1), found_HW, atol=1e-6)


def test_with_d4_too_a_core_does_not_depend_on_its_window_nor_is_anything_lost_at_a_border(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unet, "WIDTHS", (8, 16, 16, 16, 32))
    predictor = Predictor(lively_valid(), torch.device("cpu"), "float32", threads=1, tta="d4")
    image_CHW, valid_HW = scene(464, 480), np.ones((464, 480), np.bool_)
    whole_HW = predictor.predict(image_CHW, valid_HW)
    rows, cols = slice(16, 464), slice(16, 464)
    part_HW = predictor.predict(image_CHW[:, rows, cols], valid_HW[rows, cols])
    inside = slice(96, -96)
    core_HW, expected_HW = part_HW[inside, inside].astype(int), whole_HW[rows, cols][inside, inside].astype(int)
    # So few channels are not added up in the same order at all widths; a stride off the lattice would show.
    assert np.abs(core_HW - expected_HW).max() <= 1
    assert (np.ptp(core_HW) > 5, core_HW.max() <= 250) == (True, True)


def test_a_bundle_predicts_an_image_of_any_size_as_a_run_would(lively: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(lively)
    image_CHW, valid_HW = scene(40, 101), np.ones((40, 101), np.bool_)
    valid_HW[:20, :30] = False
    found_HW = bundle.predict(np.moveaxis(image_CHW, 0, 2), valid_HW)
    assert (found_HW.dtype, found_HW.shape) == (np.float32, (40, 101))
    assert np.array_equal(np.isnan(found_HW), ~valid_HW)
    core = Window(0, 0, 64, 128)
    sides = zip(core.shape_yx, valid_HW.shape, strict=True)
    around = [(HALO_PX, whole - side + HALO_PX) for whole, side in sides]
    window_CHW, window_HW = np.pad(image_CHW, [(0, 0), *around]), np.pad(valid_HW, around)
    predictor = predictor_of(lively, "float32")
    expected_HW, _ = predict_core(window_CHW, window_HW, core, HALO_PX, 32, predictor.predict)
    stored_HW = np.where(valid_HW, np.round(np.nan_to_num(found_HW) * 250), INVALID_U8)
    assert np.array_equal(stored_HW, expected_HW[:40, :101])
    monkeypatch.setattr(predictor_module, "CORE_PX", 64)
    assert np.array_equal(bundle.predict(np.moveaxis(image_CHW, 0, 2), valid_HW), found_HW, equal_nan=True)


def test_a_bundle_trained_on_resized_images_answers_at_the_size_of_the_image(lively: Path) -> None:
    bundle = load_bundle(lively)
    resized = Bundle(bundle.network, bundle.card.model_copy(update={"resize_px": (64, 96)}))
    small_HWC = np.moveaxis(scene(64, 96), 0, 2)
    with torch.inference_mode():
        image_BCHW = predictor_of(lively, "float32").normalise(scene(64, 96), np.ones((64, 96), np.bool_))
        expected_HW = torch.sigmoid(bundle.network(image_BCHW))[0, 0].numpy()
    np.testing.assert_allclose(resized.predict(small_HWC), expected_HW, atol=1e-6)
    blocks_HWC = small_HWC.repeat(3, axis=0).repeat(3, axis=1)
    found_HW = resized.predict(blocks_HWC)
    assert found_HW.shape == (192, 288)
    assert (
        np.abs(found_HW[1::3, 1::3] - expected_HW).mean()
        < np.abs(found_HW[1::3, 1::3] - np.rot90(expected_HW, 2)).mean() / 2
    )


@pytest.mark.parametrize(
    ("image_HWC", "told"),
    [
        (np.zeros((8, 8, 4), np.uint8), r"expected \(height, width, 3\) and uint8: red, green, blue"),
        (np.zeros((8, 8), np.uint8), "expected"),
        (np.zeros((8, 8, 3), np.float32), "float32; expected"),
    ],
)
def test_images_of_another_kind_are_refused(lively: Path, image_HWC: NDArray[np.uint8], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_bundle(lively).predict(image_HWC)


def test_a_network_without_a_bound_is_predicted_with_its_effective_halo_and_refused_without(lively: Path) -> None:
    bundle = Bundle(Corner(), load_bundle(lively).card.model_copy(update={"stride": 1, "halo_px": 1}))
    unbounded = bundle.card.model_copy(update={"halo_px": None, "receptive_field_px": None})
    image_HWC = np.moveaxis(scene(40, 40), 0, 2)
    with pytest.raises(ValueError, match="no effective halo"):
        Bundle(bundle.network, unbounded).predict(image_HWC)
    measured = unbounded.model_copy(update={"effective_halo_px": 2})
    assert np.array_equal(Bundle(bundle.network, measured).predict(image_HWC), bundle.predict(image_HWC))


def test_bfloat16_stays_near_float32(lively: Path) -> None:
    image_CHW, valid_HW = scene(512, 512), np.ones((512, 512), np.bool_)
    exact, rough = (predictor_of(lively, each).predict(image_CHW, valid_HW).astype(int) for each in PRECISIONS)
    assert 0 < np.abs(exact - rough).mean() < 5


def test_the_recipe_names_the_device_and_torch() -> None:
    device = resolve_device()
    recipe = device_recipe(device)
    assert recipe["torch"] == torch.__version__
    assert recipe["device"].startswith(device.type)
    assert recipe == device_recipe(device)
    assert fast_bfloat16(device) in (True, False)
