"""A predictor's bytes depend on the pixels that the network can see and are valid, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from segpipe.models.networks import build_network
from segpipe.models.predictor import INVALID_U8, Precision, Predictor, device_recipe, fast_bfloat16, resolve_device
from segpipe.models.weights import Bundle, Card, Reach, load_bundle, save_bundle

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
