"""A network in strips gives the same bits as in one piece, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segpipe.models import strips
from segpipe.models.field import peak_bytes_per_px
from segpipe.models.fold import fuse_convolutions
from segpipe.models.networks import NETWORKS, Network, OwnNetwork, build_network
from segpipe.models.predictor import made_ready
from segpipe.models.strips import in_strips

IN_STRIPS = [name for name in NETWORKS if name not in ("unet-valid", "unet16", "unet-resnet101", "unet-resnet152")]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of so few rows that small images have many."""
    monkeypatch.setattr(strips, "LEAST_ROWS", 9)
    monkeypatch.setattr(strips, "MOST_ROWS", 13)


def image_of(network: Network, dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    """A random one, of so many strides. Less than 16 columns are never predicted (predictor.LEAST_STRIDES)."""
    image_BCHW = torch.randn(1, 3, rows * network.stride, cols * network.stride).to(dtype)
    return image_BCHW.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in IN_STRIPS), ("unet11", torch.bfloat16), ("unet-mobilenetv2", torch.bfloat16)],
)
def test_every_network_gives_the_same_bits_in_strips(many: None, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = build_network(name).to(dtype).eval()
    run = made_ready(network, "cpu")
    whole = fuse_convolutions(network)
    assert type(run) is not type(whole)
    image_BCHW = image_of(network, dtype, 3, 16)
    with torch.inference_mode():
        assert torch.equal(run(image_BCHW), whole(image_BCHW))


def test_memory_that_is_kept_of_one_image_changes_nothing_in_the_next(many: None) -> None:
    torch.manual_seed(0)
    network = build_network("unet-mobilenetv2").eval()
    run = made_ready(network, "cpu")
    whole = fuse_convolutions(network)
    for rows, cols in ((4, 16), (4, 16), (3, 17), (5, 16)):
        image_BCHW = image_of(network, torch.float32, rows, cols)
        with torch.inference_mode():
            assert torch.equal(run(image_BCHW), whole(image_BCHW))


def test_memory_that_is_kept_is_as_much_as_the_largest_window_takes() -> None:
    like, kept = torch.empty(0), strips.Kept()
    for side in (64, 16, 96, 48, 96, 32, 64):
        first, second = kept.take(8, side, side, like), kept.take(16, side // 2, side // 2, like)
        kept.give_back(first)
        third = kept.take(4, side, side, like)
        assert third.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for it in (second, third, torch.empty(3)):
            kept.give_back(it)
    assert kept.held_bytes == 96 * 96 * 8 * 4 + 48 * 48 * 16 * 4


def test_memory_of_a_map_that_does_not_come_back_is_let_go_of() -> None:
    kept = strips.Kept()
    for _ in range(3):
        kept.forget()
        kept.take(3, 32, 32, torch.empty(0))
    assert kept.held_bytes == 3 * 32 * 32 * 4


@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
def test_both_ways_of_doubling_of_unet16_are_the_same_in_strips(many: None, upsampling: str) -> None:
    torch.manual_seed(0)
    network = build_network("unet16", upsampling=upsampling).eval()
    image_BCHW = image_of(network, torch.float32, 3, 16)
    with torch.inference_mode():
        assert torch.equal(made_ready(network, "cpu")(image_BCHW), fuse_convolutions(network)(image_BCHW))


def test_several_images_go_through_in_one_piece(many: None) -> None:
    torch.manual_seed(0)
    network = build_network("unet-mobilenetv2").eval()
    images_BCHW = torch.cat([image_of(network, torch.float32, 4, 4) for _ in range(2)])
    run = made_ready(network, "cpu")
    with torch.inference_mode():
        torch.testing.assert_close(run(images_BCHW)[1:], run(images_BCHW[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "share"), [("unet-mobilenetv2", 0.25), ("unet11", 0.5), ("unet-resnet50", 0.55)])
def test_maps_in_strips_take_less_memory(name: str, share: float) -> None:
    with torch.device("meta"):
        network = build_network(name).eval()
    before = peak_bytes_per_px(network, torch.bfloat16)
    assert peak_bytes_per_px(network, torch.bfloat16, run=made_ready(network, "cpu")) < share * before


class Strange(Network):
    """With one layer that is not known to strips."""

    stride = 2

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 4, 3, padding=1), layer

    def forward(self, image_BCHW: Tensor) -> Tensor:
        logits_BKHW: Tensor = self.layer(self.conv(image_BCHW))
        return logits_BKHW


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 1, 3),
        nn.Conv2d(4, 1, 3, padding="same"),
        nn.Conv2d(4, 1, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 1, 3, stride=1, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.MaxPool2d(3, stride=2),
        nn.MaxPool2d(2, stride=2, ceil_mode=True),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Upsample(scale_factor=2, mode="bicubic"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_network_with_another_layer_stays_whole(layer: nn.Module) -> None:
    fused = fuse_convolutions(Strange(layer).eval())
    assert in_strips(fused) is fused


def test_a_network_of_the_users_own_stays_as_it_is() -> None:
    network = OwnNetwork("tests:own", nn.Conv2d(3, 1, 3, padding=1)).eval()
    assert made_ready(network, "cpu") is network
