"""The networks are the published ones: layers, keys, numbers of parameters, shapes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

from segpipe.models.networks import NETWORKS, build_network
from segpipe.models.networks.unet11 import Upsample

TERNAUSNET_LAYERS = (
    *(f"encoder.{number}" for number in (0, 3, 6, 8, 11, 13, 16, 18)),
    *("conv1", "conv2", "conv3s", "conv3", "conv4s", "conv4", "conv5s", "conv5"),
    *(f"{step}.block.{layer}" for step in ("center", "dec5", "dec4", "dec3", "dec2") for layer in ("0.conv", "1")),
    "dec1.conv",
    "final",
)


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_unet11_has_the_parameters_and_keys_of_the_published_model() -> None:
    network = build_network("unet11")
    assert count(network.parameters()) == 22_927_393
    expected = {f"{layer}.{kind}" for layer in TERNAUSNET_LAYERS for kind in ("weight", "bias")}
    assert set(network.state_dict()) == expected


def test_mobilenetv2_has_as_many_parameters_as_torchvisions_layers_and_the_decoder_of_the_paper() -> None:
    network = build_network("unet-mobilenetv2")
    encoder = count(network.get_submodule("features").parameters())
    assert encoder == 1_811_712
    assert count(network.parameters()) - encoder == 2_399_601


def test_mobilenetv2_has_the_keys_and_shapes_of_the_imagenet_file(shared: Path) -> None:
    published = torch.load(shared / "weights" / "mobilenet_v2-imagenet.pth", weights_only=True)
    network = build_network("unet-mobilenetv2")
    used = {name: value.shape for name, value in published.items() if not name.startswith(network.unused_prefixes)}
    own = {name: value.shape for name, value in network.state_dict().items() if name.startswith("features.")}
    assert len(published) == 314
    assert used == own


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_height_and_width_of_the_image(name: str) -> None:
    network = build_network(name, bands=4, classes=2).eval()
    stride = network.stride
    with torch.inference_mode():
        assert network(torch.zeros(2, 4, stride, 3 * stride)).shape == (2, 2, stride, 3 * stride)


def test_upsampling_is_the_transposed_convolution_of_the_published_model() -> None:
    torch.manual_seed(0)
    layer = Upsample(6, 5).eval()
    x_BCHW = torch.randn(2, 6, 7, 9)
    expected = nnf.conv_transpose2d(x_BCHW, layer.weight, layer.bias, stride=2, padding=1, output_padding=1)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x_BCHW), expected)
    assert torch.equal(layer.train()(x_BCHW), expected)


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [("unet12", {}, "unet11"), ("unet11", {"depth": 3}, "depth")],
    ids=["unknown network", "unknown argument"],
)
def test_what_cannot_be_built_is_named(name: str, arguments: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_network(name, **arguments)
