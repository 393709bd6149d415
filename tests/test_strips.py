"""A network in strips gives the same bits as in one piece, in less memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segpipe.models import strips
from segpipe.models.field import peak_bytes_per_px
from segpipe.models.fold import fuse_convolutions
from segpipe.models.networks import NETWORKS, Network, OwnNetwork, build_network
from segpipe.models.predictor import made_ready
from segpipe.models.strips import in_strips

IN_STRIPS = [name for name in NETWORKS if name not in ("unet-valid", "unet16", "unet-resnet101", "unet-resnet152")]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of so few rows, and pieces of so few columns, that small images have many."""
    monkeypatch.setattr(strips, "LEAST_ROWS", 9)
    monkeypatch.setattr(strips, "MOST_ROWS", 13)
    monkeypatch.setattr(strips, "PIECE_COLS", 50)
    monkeypatch.setattr(strips, "ODD_PIECE_COLS", 70)
    monkeypatch.setattr(strips, "has_fast_pieces", lambda dtype: True)


def image_of(network: Network, dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    """A random one, of so many strides. Less than 16 columns are never predicted (predictor.LEAST_STRIDES)."""
    image_BCHW = torch.randn(1, 3, rows * network.stride, cols * network.stride).to(dtype)
    return image_BCHW.contiguous(memory_format=torch.channels_last)


CORES = [((1.5, 2.75), (1, 16.5)), ((0, 1), (16.25, 18)), ((0.5, 1.25), (9.03, 9.5))]
"""Of an image of 3 x 18 strides: inside, in a corner, and a few pixels."""


SAME_BITS = [*((name, "float32") for name in IN_STRIPS), ("unet11", "bfloat16"), ("unet-mobilenetv2", "bfloat16")]


@pytest.mark.parametrize(("name", "precision"), SAME_BITS)
def test_every_network_gives_the_same_bits_in_strips_and_where_a_core_is_asked_for(
    many: None, name: str, precision: str
) -> None:
    dtype: torch.dtype = getattr(torch, precision)
    torch.manual_seed(0)
    network = build_network(name).to(dtype).eval()
    run = made_ready(network, "cpu")
    whole = fuse_convolutions(network)
    assert type(run) is not type(whole)
    image_BCHW = image_of(network, dtype, 3, 18)
    with torch.inference_mode():
        whole_BKHW = whole(image_BCHW)
        assert torch.equal(run(image_BCHW), whole_BKHW)
        for core in CORES:
            rows, cols = (slice(*(int(end * network.stride) for end in side)) for side in core)
            assert torch.equal(run(image_BCHW, (rows, cols)), whole_BKHW[:, :, rows, cols]), core


# On a processor with AVX2 alone nothing is left out: there the test above is already this one.
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="no AVX512 to be left out")
@pytest.mark.parametrize("name", ["unet11", "unet-mobilenetv2"])
def test_they_are_the_same_on_a_processor_with_avx2_alone(name: str) -> None:
    test = test_every_network_gives_the_same_bits_in_strips_and_where_a_core_is_asked_for.__name__
    lesser = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "pytest", "--quiet", f"{__file__}::{test}[{name}-float32]"]
    ended = subprocess.run(command, env=os.environ | lesser, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(("name", "share"), [("unet11", 0.8), ("unet-mobilenetv2", 0.75)])
def test_little_of_a_halo_is_computed_beyond_what_the_core_sees(name: str, share: float) -> None:
    with torch.device("meta"):
        network = build_network(name).eval()
    run = made_ready(network, "cpu")
    image_BCHW = torch.empty(1, 3, 2560, 2560, device="meta").contiguous(memory_format=torch.channels_last)
    core = slice(320, 2240)

    def flops(x: Any, kernel: torch.Size, *settings: Any, out_shape: torch.Size, **named: Any) -> int:
        return 2 * out_shape.numel() * kernel[1:].numel()

    found = []
    for asked in (None, (core, core)):
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._convolution_pointwise: flops})
        with torch.inference_mode(), counter:
            run(image_BCHW, asked)
        found.append(counter.get_total_flops())
    assert 0 < found[1] < share * found[0]


def test_memory_that_is_kept_of_one_image_changes_nothing_in_the_next(many: None) -> None:
    torch.manual_seed(0)
    network = build_network("unet-mobilenetv2").eval()
    run = made_ready(network, "cpu")
    whole = fuse_convolutions(network)
    for rows, cols in ((4, 16), (4, 16), (3, 17), (5, 16)):
        image_BCHW = image_of(network, torch.float32, rows, cols)
        with torch.inference_mode():
            assert torch.equal(run(image_BCHW), whole(image_BCHW))


def places_of(run: nn.Module) -> dict[int, tuple[int, int]]:
    """Address and bytes of what a network in strips has kept."""
    kept: Any = run.kept
    return {place: (flat.data_ptr(), flat.nbytes) for place, flat in kept._places.items()}


@pytest.mark.parametrize("name", ["unet11", "unet-mobilenetv2", "unet-densenet121"])
def test_maps_of_images_that_grow_to_the_largest_lie_in_the_same_memory(name: str) -> None:
    network = build_network(name).eval()
    largest = image_of(network, torch.float32, 5, 17)
    run = made_ready(copy.deepcopy(network), "cpu", largest[0, 0].numel())
    untold = made_ready(network, "cpu")
    found: list[dict[int, tuple[int, int]]] = []
    with torch.inference_mode():
        for rows, cols in ((3, 16), (4, 17), (5, 17), (3, 17), (5, 17)):
            for it in (run, untold):
                it(image_of(network, torch.float32, rows, cols))
            found.append(places_of(run))
    for before, after in pairwise(found):
        assert before.items() <= after.items()
    held = {place: size for place, (_, size) in found[-1].items()}
    assert held == {place: size for place, (_, size) in places_of(untold).items()}


def test_an_image_larger_than_was_foretold_has_room() -> None:
    kept = strips.Kept([8, 16 / 4], 64 * 64)
    for side in (96, 32, 64):
        first = kept.take(0, side**2, (8, side, side), torch.empty(0))
        second = kept.take(1, side**2, (16, side // 2, side // 2), torch.empty(0))
        assert first.shape == (1, 8, side, side)
        assert second.shape == (1, 16, side // 2, side // 2)
        assert all(it.is_contiguous(memory_format=torch.channels_last) for it in (first, second))
        assert (first.untyped_storage().nbytes(), second.untyped_storage().nbytes()) == (96**2 * 32, 96**2 * 16)


def test_maps_that_are_needed_at_once_have_each_a_place(many: None) -> None:
    for name in IN_STRIPS:
        run: Any = made_ready(build_network(name).eval(), "cpu")
        alive: dict[int, int] = {}
        for number in run.chains:
            if number in run.place_of:
                assert run.place_of[number] not in alive.values(), name
                alive[number] = run.place_of[number]
            alive = {it: place for it, place in alive.items() if run.last_use[it] != number}


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
    before = peak_bytes_per_px(network, torch.float32)
    assert peak_bytes_per_px(network, torch.float32, run=made_ready(network, "cpu")) < share * before


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
        nn.Conv2d(4, 1, (3, 5), padding=(1, 2)),
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
