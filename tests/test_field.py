"""The probed field is the true one: what lies within it matters, what lies outside never does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segpipe.models.field import peak_bytes_per_px, probe_field
from segpipe.models.networks import NETWORKS, Network, build_network
from segpipe.models.weights import Reach

EXPECTED = {
    "unet11": (Reach(up=153, down=184, left=153, right=184), 160),
    "unet-mobilenetv2": (Reach(up=338, down=307, left=338, right=307), 320),
}


class WithGlobalPooling(nn.Module):
    def forward(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW + image_BCHW.mean(dim=(2, 3), keepdim=True)


def positive(name: str) -> Network:
    """A network where no influence cancels or dies: positive weights, no biases, ReLU6 and BatchNorm out of the way."""
    torch.manual_seed(0)
    network = build_network(name).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.abs_()
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.ReLU6):
                module.max_val = float("inf")
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_fields_are_those_found_by_gradients(name: str) -> None:
    network = build_network(name)
    field = probe_field(network, network.stride, bands=3)
    assert (field.receptive_field_px, field.halo_px) == EXPECTED[name]


@pytest.mark.parametrize("axis", [2, 3], ids=["rows", "columns"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_stride_of_the_halo_matters_and_nothing_beyond_it(name: str, axis: int) -> None:
    network = positive(name)
    stride, halo_px = network.stride, EXPECTED[name][1]
    first = halo_px + 3 * stride
    core = slice(first, first + stride)

    def seen_from(*parts: slice) -> bool:
        """Whether the core differs from 0 with ones in these rows of an image of zeros."""
        image_BCHW = torch.zeros(1, 3, core.stop + first, stride)
        for part in parts:
            image_BCHW[:, :, part] = 1.0
        with torch.inference_mode():
            logits_BKHW = network(image_BCHW if axis == 2 else image_BCHW.transpose(2, 3).contiguous())
        return bool((logits_BKHW if axis == 2 else logits_BKHW.transpose(2, 3))[:, :, core].any())

    above, below = slice(None, core.start - halo_px), slice(core.stop + halo_px, None)
    assert not seen_from(above, below)
    last_above = slice(core.start - halo_px, core.start - halo_px + stride)
    last_below = slice(core.stop + halo_px - stride, core.stop + halo_px)
    assert seen_from(last_above, last_below)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_core_with_its_halo_equals_one_pass_over_more_in_float32(name: str) -> None:
    torch.manual_seed(1)
    network = build_network(name).eval().to(memory_format=torch.channels_last)
    halo_px = EXPECTED[name][1]
    side = max(512, 2 * halo_px + 64)
    whole_BCHW = torch.randn(1, 3, side + 64, side + 96)
    with torch.inference_mode():
        expected = network(whole_BCHW)[:, :, 32:, 64:][:, :, halo_px : side - halo_px, halo_px : side - halo_px]
        window = network(whole_BCHW[:, :, 32 : 32 + side, 64 : 64 + side].contiguous())
    assert torch.equal(window[:, :, halo_px:-halo_px, halo_px:-halo_px], expected)


def test_a_field_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="no bound"):
        probe_field(WithGlobalPooling(), stride=8, bands=1)


def test_probing_leaves_the_network_as_it_was() -> None:
    network = build_network("unet-mobilenetv2")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    probe_field(network, network.stride, bands=3)
    peak_bytes_per_px(network, torch.bfloat16)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


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
