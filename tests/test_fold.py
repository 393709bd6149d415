"""Folding BatchNorm and doing ReLU with convolutions change how a network computes, never what."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from segpipe.models.fold import Fused, FusedParts, fold_batchnorm, fuse_convolutions
from segpipe.models.networks import NETWORKS, Network, OwnNetwork, build_network
from segpipe.models.networks.upsample import ByParts, Transposed2, Transposed3, Transposed4

LEFT = {"unet-densenet121": 62}
"""Dense layers normalise before they convolve: what many layers read cannot be folded into the one that made it."""


def with_statistics(network: Network) -> Network:
    """In eval mode and float64, every BatchNorm with numbers of its own."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.1, 0.1),
                (layer.running_var, 0.5, 2),
                (layer.weight.data, 0.5, 1.5),
                (layer.bias.data, -0.1, 0.1),
            ):
                assert tensor is not None
                tensor.uniform_(low, high)
    return network.double().eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


@pytest.mark.parametrize("name", ["unet-mobilenetv2", "unet-resnet18", "unet-resnet50", "unet-densenet121"])
def test_a_folded_network_gives_the_same_logits(name: str) -> None:
    network = with_statistics(build_network(name))
    folded = copy.deepcopy(network)
    fold_batchnorm(folded)
    image_BCHW = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(image_BCHW), network(image_BCHW), rtol=1e-9, atol=1e-12)
    assert norms(network) > norms(folded) == LEFT.get(name, 0)
    assert not any(layer.training for layer in folded.modules())


@pytest.mark.parametrize("name", ["unet11", "unet16", "unet", "unet-vgg16", "unet-valid", "unet-small"])
def test_a_network_without_batchnorm_is_left_alone(name: str) -> None:
    network = build_network(name).eval()
    before = copy.deepcopy(network.state_dict())
    fold_batchnorm(network)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Shared(Network):
    """One convolution whose output is normalised, and also passed on as it is."""

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        found = self.conv(image_BCHW)
        normed: Tensor = self.norm(found)
        return normed + found


class Twice(Network):
    """One BatchNorm for two convolutions."""

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Conv2d(3, 1, 3), nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.left(image_BCHW)) + self.norm(self.right(image_BCHW))
        return normed


@pytest.mark.parametrize("kind", [Shared, Twice])
def test_what_more_than_one_layer_reads_or_gives_is_not_folded(kind: type[Network]) -> None:
    network = with_statistics(kind())
    folded = copy.deepcopy(network)
    fold_batchnorm(folded)
    image_BCHW = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(folded(image_BCHW), network(image_BCHW))
    assert norms(folded) == 1


class Untraceable(nn.Module):
    """Of a user's own: what it does depends on the numbers that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        found: Tensor = self.norm(self.conv(image_BCHW))
        return found if image_BCHW.sum() > 0 else -found


def test_a_network_of_the_users_own_is_left_alone() -> None:
    network = OwnNetwork("tests:untraceable", Untraceable()).eval()
    fold_batchnorm(network)
    assert norms(network) == 1


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("unet-resnet101", "unet-resnet152")])
def test_a_fused_network_gives_the_same_logits(name: str) -> None:
    network = with_statistics(build_network(name)).float()
    fold_batchnorm(network)
    fused = fuse_convolutions(network)
    side = 188 if name == "unet-valid" else 128
    image_BCHW = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(fused(image_BCHW), network(image_BCHW), rtol=1e-4, atol=1e-4)
    assert not any(layer.training for layer in fused.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "relu", "hardtanh"])
@pytest.mark.parametrize("kind", [Transposed2, Transposed3, Transposed4])
def test_a_layer_that_doubles_gives_the_same_bits_with_its_activation_at_any_width(
    kind: type[ByParts], activation: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = kind(128, 64).eval().to(dtype)
    numbers = [0.0, 6.0] if activation == "hardtanh" else []
    fused = FusedParts(layer, activation, numbers)
    after = {"none": nn.Identity(), "relu": nn.ReLU(), "hardtanh": nn.ReLU6()}[activation]
    wide = 9 * torch.randn(1, 128, 40, 130).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = fused(wide)
        near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(expected, after(layer(wide)), **near)
        for width in range(16, 64, 5):
            narrow = fused(wide[..., 5 : 5 + width].contiguous(memory_format=torch.channels_last))
            assert torch.equal(narrow[..., 2:-2], expected[..., 12 : 8 + 2 * width]), width


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        (torch.float32, (128, 256, 128)),
        (torch.float32, (32, 64, 32)),
        (torch.bfloat16, (256, 512, 256)),
        (torch.bfloat16, (64, 24, 64)),
        (torch.bfloat16, (32, 16, 16, 32)),
    ],
)
@pytest.mark.parametrize("activation", ["none", "relu", "hardtanh"])
def test_maps_are_convolved_as_if_concatenated_to_the_same_bits_at_any_width(
    dtype: torch.dtype, channels: tuple[int, ...], activation: str
) -> None:
    torch.manual_seed(0)
    *given, made = channels
    conv = nn.Conv2d(sum(given), made, 3, padding=1).to(dtype)
    fused = Fused(conv, activation, [0.0, 6.0] if activation == "hardtanh" else [])
    after = {"none": nn.Identity(), "relu": nn.ReLU(), "hardtanh": nn.ReLU6()}[activation]
    maps = [9 * torch.randn(1, several, 8, 300).to(dtype) for several in given]

    def of(cols: slice) -> Tensor:
        with torch.inference_mode():
            y_BCHW: Tensor = fused(*(x[..., cols].contiguous(memory_format=torch.channels_last) for x in maps))
        return y_BCHW

    whole = of(slice(0, 300))
    for width in (16, 23, 32, 48, 64, 100, 128, 160, 200, 256, 280):
        assert torch.equal(of(slice(5, 5 + width))[..., 1:-1], whole[..., 6 : 4 + width]), width
    with torch.inference_mode():
        exact = after(conv.double()(torch.cat(maps, 1).double()))
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(whole.double(), exact, **near)


@pytest.mark.parametrize(("name", "left"), [("unet11", 0), ("unet-mobilenetv2", 0), ("unet-densenet121", 58)])
def test_what_a_convolution_alone_reads_is_not_concatenated(name: str, left: int) -> None:
    fused = fuse_convolutions(build_network(name).eval())
    assert isinstance(fused, torch.fx.GraphModule)
    assert sum(node.target is torch.cat for node in fused.graph.nodes) == left


class Activated(Network):
    """One ReLU that alone reads a convolution, one whose convolution is read again, and one that reads no convolution.

    A ReLU6 reads a convolution whose padding oneDNN does not know.
    """

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.mirrored = nn.Conv2d(4, 1, 3, padding=1, padding_mode="reflect")
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        first = self.relu(self.alone(image_BCHW))
        second = self.again(first)
        logits_BKHW: Tensor = self.relu6(self.mirrored(self.relu(second) + self.relu(second + first)))
        return logits_BKHW


def test_only_what_alone_reads_a_plain_convolution_is_fused() -> None:
    torch.manual_seed(0)
    network = Activated().eval()
    fused = fuse_convolutions(network)
    image_BCHW = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fused(image_BCHW), network(image_BCHW), rtol=1e-5, atol=1e-6)
    assert isinstance(fused, torch.fx.GraphModule)
    called = [str(node.target) for node in fused.graph.nodes if node.op == "call_module"]
    assert called.count("relu") == 2 and called.count("relu6") == 1 and called.count("mirrored") == 1
    fused_with = [layer.activation for layer in fused.modules() if isinstance(layer, Fused)]
    assert sorted(fused_with) == ["none", "relu"]


def test_a_network_of_the_users_own_is_not_fused() -> None:
    network = OwnNetwork("tests:untraceable", Untraceable()).eval()
    assert fuse_convolutions(network) is network
