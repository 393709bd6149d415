"""The probed field is the true one: what lies within it matters, what lies outside never does."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from segpipe.models import field
from segpipe.models.field import Field, peak_bytes_per_px, probe_field
from segpipe.models.fold import fuse_convolutions
from segpipe.models.networks import NETWORKS, Network, OwnNetwork, build_network, unet
from segpipe.models.predictor import made_ready
from segpipe.models.weights import Reach

EXPECTED = {
    "unet11": (Reach(up=153, down=184, left=153, right=184), 160),
    "unet16": (Reach(up=215, down=215, left=215, right=215), 192),
    "unet": (Reach(up=107, down=107, left=107, right=107), 96),
    "unet-vgg16": (Reach(up=135, down=135, left=135, right=135), 128),
    "unet-resnet18": (Reach(up=310, down=279, left=310, right=279), 288),
    "unet-resnet34": (Reach(up=542, down=511, left=542, right=511), 544),
    "unet-resnet50": (Reach(up=306, down=275, left=306, right=275), 288),
    "unet-resnet101": (Reach(up=578, down=547, left=578, right=547), 576),
    "unet-resnet152": (Reach(up=818, down=787, left=818, right=787), 800),
    "unet-densenet121": (Reach(up=1114, down=1111, left=1114, right=1111), 1088),
    "unet-mobilenetv2": (Reach(up=338, down=307, left=338, right=307), 320),
    "unet-valid": (Reach(up=107, down=107, left=107, right=107), 96),
    "unet-small": (Reach(up=443, down=443, left=443, right=443), 384),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in NETWORKS},
    "unet16 transposed": ("unet16", {"upsampling": "transposed"}),
    "M-Unet": ("unet-mobilenetv2", {"decoder": "plain", "top": True}),
}


def positive(name: str) -> Network:
    """A network where no influence cancels, dies or overflows: equal weights, activations that let all pass."""
    network = build_network(name).double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.fill_(1 / module.weight[0].numel())
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.ReLU6):
                module.max_val = float("inf")
    return network


@pytest.mark.parametrize("variant", VARIANTS)
def test_fields_are_those_found_by_gradients(variant: str) -> None:
    name, arguments = VARIANTS[variant]
    with torch.device("meta"):  # its shapes are enough
        network = build_network(name, **arguments)
    field = probe_field(network, network.stride, bands=3)
    assert (field.receptive_field_px, field.halo_px) == EXPECTED[name]


@pytest.mark.parametrize("axis", [2, 3], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["unet11", "unet", "unet-resnet18", "unet-mobilenetv2", "unet-valid"])
def test_the_last_stride_of_the_halo_matters_and_nothing_beyond_it(name: str, axis: int) -> None:
    network = positive(name)
    stride, border, halo_px = network.stride, network.border_px, EXPECTED[name][1]
    first = halo_px + 3 * stride
    core = slice(first, first + stride)
    width = stride if not border else 188

    def seen_from(*parts: slice) -> bool:
        """Whether the core differs from 0 with ones in these rows of an image of zeros."""
        image_BCHW = torch.zeros(1, 3, core.stop + first + network.remainder_px, width, dtype=torch.float64)
        for part in parts:
            image_BCHW[:, :, part] = 1.0
        with torch.inference_mode():
            logits_BKHW = network(image_BCHW if axis == 2 else image_BCHW.transpose(2, 3).contiguous())
        inside = slice(core.start - border, core.stop - border)
        return bool((logits_BKHW if axis == 2 else logits_BKHW.transpose(2, 3))[:, :, inside].any())

    above, below = slice(None, core.start - halo_px), slice(core.stop + halo_px, None)
    assert not seen_from(above, below)
    last_above = slice(core.start - halo_px, core.start - halo_px + stride)
    last_below = slice(core.stop + halo_px - stride, core.stop + halo_px)
    assert seen_from(last_above, last_below)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("unet-resnet101", "unet-resnet152")])
def test_columns_with_their_halo_equal_those_of_one_pass_over_more_in_float32(name: str) -> None:
    torch.manual_seed(1)
    network = build_network(name).eval().to(memory_format=torch.channels_last)
    fused = fuse_convolutions(network)
    stride, border, halo_px = network.stride, network.border_px, EXPECTED[name][1]
    width = max(24 * stride if border else 16 * stride, 2 * halo_px + 2 * stride)
    height = 24 * stride if border else (4 if name in ("unet16", "unet-densenet121") else 8) * stride
    odd = stride - network.remainder_px if border else 0  # 12 more than a multiple of 16, and one stride less
    whole_BCHW = torch.randn(1, 3, height - odd, width + 3 * stride - odd).contiguous(memory_format=torch.channels_last)
    window_BCHW = whole_BCHW[..., 2 * stride : 2 * stride + width - odd].contiguous(memory_format=torch.channels_last)
    start, stop = halo_px - border, width - halo_px - border
    with torch.inference_mode():
        expected = fused(whole_BCHW)[..., 2 * stride + start : 2 * stride + stop]
        window = fused(window_BCHW)[..., start:stop]
    assert expected.shape[3] >= stride
    assert torch.equal(window, expected)


def test_a_core_with_its_halo_equals_one_pass_over_more_in_float32() -> None:
    torch.manual_seed(1)
    network = build_network("unet-mobilenetv2").eval().to(memory_format=torch.channels_last)
    halo_px = EXPECTED["unet-mobilenetv2"][1]
    side = 2 * halo_px + 64
    whole_BCHW = torch.randn(1, 3, side + 64, side + 96)
    with torch.inference_mode():
        expected = network(whole_BCHW)[:, :, 32:, 64:][:, :, halo_px : side - halo_px, halo_px : side - halo_px]
        window = network(whole_BCHW[:, :, 32 : 32 + side, 64 : 64 + side].contiguous())
    assert torch.equal(window[:, :, halo_px:-halo_px, halo_px:-halo_px], expected)


def own(name: str, **arguments: Any) -> Network:
    return build_network(f"own_networks:{name}", bands=3, **arguments)


def test_the_field_of_an_own_network_is_found_by_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_field(own("Blur", radius=3), 1, bands=3) == Field(Reach(3, 3, 3, 3), halo_px=3)
    assert probe_field(own("Steps"), 8, bands=3) == Field(Reach(7, 7, 7, 7), halo_px=0)
    monkeypatch.setattr(unet, "WIDTHS", (4, 4, 4, 4, 4))
    light = OwnNetwork("the same", build_network("unet"))
    light.stride = 16
    assert probe_field(light, 16, bands=3) == Field(Reach(109, 109, 109, 109), halo_px=96)


def test_a_field_without_a_bound_is_told() -> None:
    assert probe_field(own("Gated"), 8, bands=3) == Field(None, None)


def test_an_own_network_that_does_not_repeat_itself_every_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="attribute `stride`"):
        probe_field(own("Steps", stride=4), 4, bands=3)


def test_logits_of_another_size_are_refused() -> None:
    network = OwnNetwork("smaller", nn.Conv2d(3, 1, 3))
    with pytest.raises(ValueError, match="expected"):
        probe_field(network, 8, bands=3)


@pytest.mark.parametrize("name", ["unet-mobilenetv2", "unet11", "own_networks:Gated"])
def test_probing_leaves_the_network_as_it_was(name: str) -> None:
    network = build_network(name)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    probe_field(network, network.stride, bands=3)
    peak_bytes_per_px(network, torch.bfloat16)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["unet-mobilenetv2", "unet11"])
def test_what_was_measured_runs_as_before(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name).eval()
    run = made_ready(network, "cpu")
    image_BCHW = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = made_ready(copy.deepcopy(network), "cpu")(image_BCHW)
        peak_bytes_per_px(network, torch.float32, run=run)
        assert torch.equal(run(image_BCHW), expected)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_peak_memory_counts_what_lives_at_once(dtype: torch.dtype, size: int) -> None:
    # The image is held by the caller; the second convolution has its input of 8 and its output of 16 channels.
    layers = (
        nn.Conv2d(3, 8, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 1, 1),
    )
    assert peak_bytes_per_px(nn.Sequential(*layers), dtype, window_px=16) == (3 + 8 + 16) * size


@pytest.mark.parametrize("name", NETWORKS)
def test_peak_memory_of_every_network_is_that_of_a_few_full_maps(name: str) -> None:
    with torch.device("meta"):
        network = build_network(name)
    channels = peak_bytes_per_px(network, torch.float32) / 4
    assert 40 < channels < 500


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_answered_in_place_of_torch_is_what_torch_would_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        network = build_network(name).eval()
    told = [peak_bytes_per_px(network, torch.float32, run=run) for run in (None, made_ready(network, "cpu"))]
    monkeypatch.setattr(field, "_answer", lambda func, args: None)
    assert told == [peak_bytes_per_px(network, torch.float32, run=run) for run in (None, made_ready(network, "cpu"))]


def test_memory_is_told_without_torchs_compiler_which_takes_longer_to_import_than_all_else_of_a_plan() -> None:
    code = """
import sys, torch
from segpipe.models.field import peak_bytes_per_px
from segpipe.models.networks import build_network
from segpipe.models.predictor import made_ready
for name in ("unet-mobilenetv2", "unet11", "unet-resnet18", "unet-densenet121"):
    with torch.device("meta"):
        network = build_network(name).eval()
    for device in ("cpu", "cuda"):
        assert peak_bytes_per_px(network, torch.bfloat16, run=made_ready(network, device)) > 0
        assert "torch._dynamo" not in sys.modules, (name, device)
        assert name != "unet-mobilenetv2" or "sympy" not in sys.modules, device
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
