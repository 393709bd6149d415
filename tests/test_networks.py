"""The networks are the published ones: layers, keys, numbers of parameters, shapes, outputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from segpipe.models.networks import NETWORKS, Network, OwnNetwork, build_network, network_name
from segpipe.models.networks.upsample import Bilinear, Transposed2, Transposed3, Transposed4

PARAMETERS: dict[tuple[str, tuple[tuple[str, Any], ...]], int] = {
    ("unet11", ()): 22_927_393,
    ("unet16", ()): 29_306_465,
    ("unet16", (("upsampling", "transposed"),)): 32_202_337,
    ("unet", ()): 31_031_745,
    ("unet-vgg16", ()): 25_854_657,
    ("unet-resnet18", ()): 20_794_881,
    ("unet-resnet34", ()): 30_903_041,
    ("unet-resnet50", ()): 40_916_993,
    ("unet-resnet101", ()): 59_909_121,
    ("unet-resnet152", ()): 75_552_769,
    ("unet-densenet121", ()): 22_265_665,
    ("unet-mobilenetv2", ()): 4_211_313,
    ("unet-mobilenetv2", (("decoder", "plain"), ("top", True))): 12_382_913,
    ("unet-valid", ()): 31_031_745,
    ("unet-small", ()): 6_667_639,
}
ENCODERS = {
    # what torchvision states for the whole classifier, less its last layers
    "unet11": 132_863_336 - 123_642_856,
    "unet16": 138_357_544 - 123_642_856,
    "unet-vgg16": 138_357_544 - 123_642_856,
    "unet-resnet18": 11_689_512 - 513_000,
    "unet-resnet34": 21_797_672 - 513_000,
    "unet-resnet50": 25_557_032 - 2_049_000,
    "unet-resnet101": 44_549_160 - 2_049_000,
    "unet-resnet152": 60_192_808 - 2_049_000,
    "unet-densenet121": 7_978_856 - 1_025_000,
    "unet-mobilenetv2": 3_504_872 - 1_281_000 - 412_160,
}
VGG11, VGG16 = (1, 1, 2, 2, 2), (2, 2, 3, 3, 3)
SECOND: dict[str, tuple[str, dict[str, Any], Callable[[layouts.Layers, Tensor], Tensor]]] = {
    "unet11": ("unet11", {}, partial(layouts.ternausnet, widths=VGG11, kind="transposed 3x3")),
    "unet16": ("unet16", {}, partial(layouts.ternausnet, widths=VGG16, kind="bilinear")),
    "unet16 transposed": (
        "unet16",
        {"upsampling": "transposed"},
        partial(layouts.ternausnet, widths=VGG16, kind="transposed 4x4"),
    ),
    "unet": ("unet", {}, layouts.unet),
    "unet-valid": ("unet-valid", {}, partial(layouts.unet, padding=0)),
    "unet-small": ("unet-small", {}, partial(layouts.unet, scales=7)),
    "unet-vgg16": ("unet-vgg16", {}, layouts.unet_vgg16),
    "unet-resnet18": ("unet-resnet18", {}, partial(layouts.unet_resnet, depths=(2, 2, 2, 2), bottleneck=False)),
    "unet-resnet34": ("unet-resnet34", {}, partial(layouts.unet_resnet, depths=(3, 4, 6, 3), bottleneck=False)),
    "unet-resnet50": ("unet-resnet50", {}, partial(layouts.unet_resnet, depths=(3, 4, 6, 3), bottleneck=True)),
    "unet-resnet101": ("unet-resnet101", {}, partial(layouts.unet_resnet, depths=(3, 4, 23, 3), bottleneck=True)),
    "unet-resnet152": ("unet-resnet152", {}, partial(layouts.unet_resnet, depths=(3, 8, 36, 3), bottleneck=True)),
    "unet-densenet121": ("unet-densenet121", {}, layouts.unet_densenet121),
    "unet-mobilenetv2": ("unet-mobilenetv2", {}, partial(layouts.unet_mobilenetv2, top=False, plain=False)),
    "M-Unet": (
        "unet-mobilenetv2",
        {"decoder": "plain", "top": True},
        partial(layouts.unet_mobilenetv2, top=True, plain=True),
    ),
}


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def on_meta(name: str, **arguments: Any) -> Network:
    with torch.device("meta"):
        return build_network(name, **arguments)


@pytest.mark.parametrize(("name", "arguments"), PARAMETERS)
def test_parameters_are_as_many_as_published(name: str, arguments: tuple[tuple[str, Any], ...]) -> None:
    network = on_meta(name, **dict(arguments))
    assert count(network.parameters()) == PARAMETERS[name, arguments]
    assert network_name(network) == name


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_as_many_parameters_as_torchvisions(name: str) -> None:
    network = on_meta(name)
    encoder = (p for key, p in network.named_parameters() if key.startswith(network.encoder_prefix))
    assert count(encoder) == ENCODERS[name]
    assert network.state_dict()[network.first_layer].shape[1] == 3


def test_all_networks_are_counted_and_written_twice() -> None:
    assert {name for name, _ in PARAMETERS} == {name for name, _, _ in SECOND.values()} == set(NETWORKS)


def test_the_unpadded_network_has_the_23_convolutional_layers_of_the_paper() -> None:
    layers = [m for m in on_meta("unet-valid").modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 23


def with_statistics(network: Network) -> Network:
    """In eval mode and float64, with statistics as if it had been trained."""
    network = network.double().eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize("which", SECOND)
def test_outputs_and_keys_are_those_of_the_network_written_a_second_time(which: str) -> None:
    name, arguments, written_again = SECOND[which]
    torch.manual_seed(0)
    network = with_statistics(build_network(name, **arguments))
    sides = (188, 204) if network.border_px else (network.stride, 2 * network.stride)
    image_BCHW = torch.randn(1, 3, *sides, dtype=torch.float64)
    layers = layouts.Layers(network.state_dict())
    with torch.inference_mode():
        expected = written_again(layers, image_BCHW)
        torch.testing.assert_close(network(image_BCHW), expected, rtol=1e-9, atol=1e-12)
    assert expected.std() > 0
    aliases = {key for key in layers.state if key.startswith("conv") and name in ("unet11", "unet16")}
    assert layers.asked == layers.state.keys() - aliases


TERNAUSNET_LAYERS = (
    *(f"encoder.{number}" for number in (0, 3, 6, 8, 11, 13, 16, 18)),
    *("conv1", "conv2", "conv3s", "conv3", "conv4s", "conv4", "conv5s", "conv5"),
    *(f"{step}.block.{layer}" for step in ("center", "dec5", "dec4", "dec3", "dec2") for layer in ("0.conv", "1")),
    "dec1.conv",
    "final",
)
TERNAUSNET16_LAYERS = (
    *(f"encoder.{number}" for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    *(f"conv{stage}.{layer}" for stage in (1, 2) for layer in (0, 2)),
    *(f"conv{stage}.{layer}" for stage in (3, 4, 5) for layer in (0, 2, 4)),
    "dec1.conv",
    "final",
)
STEPS = ("center", "dec5", "dec4", "dec3", "dec2")


@pytest.mark.parametrize(
    ("name", "arguments", "layers"),
    [
        ("unet11", {}, TERNAUSNET_LAYERS),
        ("unet16", {}, (*TERNAUSNET16_LAYERS, *(f"{s}.block.{n}.conv" for s in STEPS for n in (1, 2)))),
        (
            "unet16",
            {"upsampling": "transposed"},
            (*TERNAUSNET16_LAYERS, *(f"{s}.block.{n}" for s in STEPS for n in ("0.conv", "1"))),
        ),
    ],
    ids=["unet11", "unet16", "unet16 transposed"],
)
def test_ternausnets_have_the_keys_of_the_published_models(
    name: str, arguments: dict[str, str], layers: tuple[str, ...]
) -> None:
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(on_meta(name, **arguments).state_dict()) == expected


def test_mobilenetv2_has_the_keys_and_shapes_of_the_imagenet_file(shared: Path) -> None:
    published = torch.load(shared / "weights" / "mobilenet_v2-imagenet.pth", weights_only=True)
    assert len(published) == 314
    for arguments in ({}, {"decoder": "plain", "top": True}):
        network = on_meta("unet-mobilenetv2", **arguments)
        used = {name: value.shape for name, value in published.items() if not name.startswith(network.unused_prefixes)}
        own = {name: value.shape for name, value in network.state_dict().items() if name.startswith("features.")}
        assert used == own


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_height_and_width_of_the_image_less_the_border(name: str) -> None:
    network = on_meta(name, bands=4, classes=2).eval()
    stride, border = network.stride, 2 * network.border_px
    height, width = 12 * stride + network.remainder_px, 14 * stride + network.remainder_px
    image_BCHW = torch.zeros(2, 4, height, width, device="meta")
    assert network(image_BCHW).shape == (2, 2, height - border, width - border)


def test_the_unpadded_network_gives_4_px_from_188_and_1028_from_1212() -> None:
    network = on_meta("unet-valid").eval()
    for side, left in ((188, 4), (1212, 1028)):
        assert network(torch.zeros(1, 3, side, side, device="meta")).shape == (1, 1, left, left)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("unet-resnet101", "unet-resnet152")])
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name).train()
    sides = (188, 188) if network.border_px else (network.stride, 2 * network.stride)
    network(torch.randn(2, 3, *sides)).square().sum().backward()
    still = [key for key, p in network.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not still
    assert all(bool(p.grad.any()) for key, p in network.named_parameters() if key.endswith("weight") and p.ndim == 4)


UPSAMPLING: dict[str, tuple[type[nn.ConvTranspose2d], dict[str, int]]] = {
    "2x2": (Transposed2, {}),
    "3x3": (Transposed3, {"padding": 1, "output_padding": 1}),
    "4x4": (Transposed4, {"padding": 1}),
}


@pytest.mark.parametrize("kind", UPSAMPLING)
def test_upsampling_is_the_transposed_convolution_of_the_published_models(kind: str) -> None:
    layer_class, options = UPSAMPLING[kind]
    torch.manual_seed(0)
    layer = layer_class(6, 5).eval()
    x_BCHW = torch.randn(2, 6, 7, 9)
    expected = nnf.conv_transpose2d(x_BCHW, layer.weight, layer.bias, stride=2, **options)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x_BCHW), expected)
    assert torch.equal(layer.train()(x_BCHW), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*UPSAMPLING, "bilinear"])
def test_upsampling_gives_the_same_bits_at_any_width(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = (Bilinear() if kind == "bilinear" else UPSAMPLING[kind][0](256, 64)).eval().to(dtype)
    layer = layer.to(memory_format=torch.channels_last)
    wide = torch.randn(1, 256, 8, 72).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = layer(wide)
        for width in range(16, 64, 3):
            narrow = layer(wide[..., 5 : 5 + width].contiguous(memory_format=torch.channels_last))
            assert torch.equal(narrow[..., 2:-2], expected[..., 12 : 8 + 2 * width]), width


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("unet12", {}, "unet11"),
        ("unet11", {"depth": 3}, "depth"),
        ("unet16", {"upsampling": "nearest"}, "expected bilinear or transposed"),
        ("unet-mobilenetv2", {"decoder": "heavy"}, "expected light or plain"),
        ("nowhere.at_all:Net", {}, "cannot be imported.*PYTHONPATH"),
        ("math:pi", {}, "is a float; expected a class or function"),
        ("builtins:dict", {}, "gave dict; expected a torch.nn.Module"),
        ("own_networks:Blur", {"radius": 1, "depth": 3}, "depth"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        build_network(name, **arguments)
    assert "\n" not in str(caught.value)


def test_an_own_network_is_built_with_what_it_takes_and_asked_for_stride_and_encoder() -> None:
    network = build_network("own_networks:Blur", bands=4, classes=1, radius=2)
    assert isinstance(network, OwnNetwork)
    assert (network.stride, network.border_px, network.encoder_prefix) == (1, 0, ("own.body.",))
    assert network(torch.zeros(1, 4, 8, 8)).shape == (1, 1, 8, 8)
    assert network_name(network) == "own_networks:Blur"
    assert importlib.import_module("own_networks").Blur is type(network.own)
    plain = build_network("own_networks:everywhere", bands=3, classes=1)
    assert (plain.stride, plain.encoder_prefix) == (32, ("own.encoder.",))
