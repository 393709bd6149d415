"""First weights: by the rule asked for, or every value of a published encoder or another bundle; never in between."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from segpipe.models import initialise as module
from segpipe.models.checkpoints import adapted_bands
from segpipe.models.initialise import PUBLISHED, Published, initialise
from segpipe.models.networks import NETWORKS, Network, build_network
from segpipe.models.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BundleError,
    Card,
    Reach,
    packaged_bundles,
    save_bundle,
)

HEADS = {
    "classifier": {"classifier.6.weight": (1000, 4096), "classifier.6.bias": (1000,)},
    "fc": {"fc.weight": (1000, 2048), "fc.bias": (1000,)},
}


def begin(network: Network, start: str, base: Path, seed: int = 0) -> Network:
    initialise(network, start, IMAGENET_MEAN, IMAGENET_STD, base, seed)
    return network


def published_encoder(network: Network, old: bool) -> dict[str, Tensor]:
    """What torchvision's file of a network's encoder would hold, by its own keys, with recognisable values.

    old: as files from before num_batches_tracked, and with DenseNet's dotted names.
    """
    inner = "encoder." if network.published_encoder == "vgg11" else ""
    state: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if not name.startswith(network.encoder_prefix) or (old and name.endswith("num_batches_tracked")):
            continue
        key = name.replace(inner, "features.", 1) if inner else name
        if old:
            key = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key)
        state[key] = torch.full_like(tensor, number % 100) if tensor.ndim else tensor
    head = HEADS["fc" if network.published_encoder.startswith("resnet") else "classifier"]
    return state | {key: torch.zeros(shape) for key, shape in head.items()}


ENCODERS = ("unet11", "unet-vgg16", "unet-resnet18", "unet-densenet121", "unet-mobilenetv2")


@pytest.mark.parametrize(("name", "old"), [*((name, False) for name in ENCODERS), ("unet-densenet121", True)])
def test_every_value_of_a_published_encoder_arrives_and_the_rest_is_fresh(name: str, old: bool, tmp_path: Path) -> None:
    network = build_network(name)
    state = published_encoder(network, old)
    torch.save(state, tmp_path / "encoder.pth")
    begin(network, "encoder.pth", tmp_path, seed=4)
    fresh = begin(build_network(name), "default", tmp_path, seed=4).state_dict()
    again = {f"features.{key.removeprefix('encoder.')}" if name == "unet11" else key: key for key in fresh}
    plain = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): value for key, value in state.items()}
    for published, key in again.items():
        value = network.state_dict()[key]
        if published in plain:
            assert torch.equal(value, plain[published]), key
        elif not (key.endswith("num_batches_tracked") or key.startswith("conv")):
            assert torch.equal(value, fresh[key]), key


def test_unused_layers_of_the_published_file_are_dropped_by_name(shared: Path, tmp_path: Path) -> None:
    file = str(shared / "weights" / "mobilenet_v2-imagenet.pth")
    published = torch.load(file, weights_only=True)
    light = begin(build_network("unet-mobilenetv2"), file, tmp_path).state_dict()
    top = begin(build_network("unet-mobilenetv2", decoder="plain", top=True), file, tmp_path).state_dict()
    assert torch.equal(light["features.17.conv.2.weight"], published["features.17.conv.2.weight"])
    assert "features.18.0.weight" not in light
    assert torch.equal(top["features.18.0.weight"], published["features.18.0.weight"])


@pytest.mark.parametrize("name", ["unet11", "unet-resnet18", "unet-densenet121"])
@pytest.mark.parametrize("bands", [1, 4])
def test_other_bands_get_the_first_convolution_repeated_and_rescaled(name: str, bands: int, tmp_path: Path) -> None:
    three, other = build_network(name), build_network(name, bands=bands)
    torch.manual_seed(1)
    state = published_encoder(three, old=False)
    key = next(k for k in state if three.own_key(k) == three.first_layer)
    state[key] = torch.randn_like(state[key])
    torch.save(state, tmp_path / "encoder.pth")
    begin(other, "encoder.pth", tmp_path)
    weight = other.state_dict()[other.first_layer]
    old = state[key]
    red, green, blue = (old[:, band] for band in range(3))
    expected = [red + green + blue] if bands == 1 else [0.75 * each for each in (red, green, blue, red)]
    torch.testing.assert_close(weight, torch.stack(expected, dim=1))


def test_adapted_bands_see_grey_as_the_old_ones_did() -> None:
    torch.manual_seed(0)
    weight, grey = torch.randn(5, 3, 3, 3), torch.randn(1, 1, 9, 9)
    expected = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    for bands in (1, 3, 6):
        found = nn.functional.conv2d(grey.expand(-1, bands, -1, -1), adapted_bands(weight, bands))
        torch.testing.assert_close(found, expected)
    assert adapted_bands(weight, 3) is weight


def inputs_of_an_output(layer: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """Counted: how many inputs, on average, one output far from the edges is the sum of."""
    kernel = torch.ones_like(layer.weight[:, :1] if isinstance(layer, nn.ConvTranspose2d) else layer.weight[:1])
    image = torch.ones(1, kernel.shape[0] if isinstance(layer, nn.ConvTranspose2d) else kernel.shape[1], 32, 32)
    convolve = nn.functional.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else nn.functional.conv2d
    sums = convolve(image, kernel, stride=layer.stride)
    middle = sums.shape[2] // 2
    return float(sums[..., middle - 2 : middle + 2, middle - 2 : middle + 2].mean())


@pytest.mark.parametrize("name", ["unet11", "unet-mobilenetv2", "unet-small"])
def test_lecun_draws_weights_and_biases_of_every_convolution_uniformly_by_its_inputs(name: str, tmp_path: Path) -> None:
    network = begin(build_network(name), "lecun", tmp_path)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    drawn = []
    for layer in layers:
        bound = math.sqrt(1 / inputs_of_an_output(layer))
        parts = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        for part in parts:
            assert part.abs().max() <= bound * (1 + 1e-6)
            drawn.append((part.detach() / bound).flatten())
    scaled = torch.cat(drawn)
    assert abs(float(scaled.mean())) < 0.01
    assert abs(float(scaled.var()) - 1 / 3) < 0.01
    assert scaled.abs().max() > 0.999


@pytest.mark.parametrize("start", ["lecun", "default"])
def test_first_weights_depend_on_the_seed_alone(start: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, other = (build_network("unet-mobilenetv2") for _ in range(2))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    begin(first, start, tmp_path, seed=3)
    begin(other, start, tmp_path, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())
    begin(other, start, tmp_path, seed=4)
    assert not torch.equal(first.get_parameter("head.weight"), other.get_parameter("head.weight"))


def test_default_leaves_an_own_network_as_its_constructor_made_it(tmp_path: Path) -> None:
    network = build_network("own_networks:Gated")
    before = network.get_parameter("own.conv.weight").clone()
    begin(network, "default", tmp_path, seed=9)
    assert torch.equal(network.get_parameter("own.conv.weight"), before)


def test_a_whole_checkpoint_gives_all_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = build_network("unet16", upsampling="transposed")
    torch.save({"model": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "whole.pt")
    network = begin(build_network("unet16", upsampling="transposed"), "whole.pt", tmp_path)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in network.state_dict().items())


def bundle(path: Path, name: str = "unet-mobilenetv2", **changes: Any) -> Network:
    torch.manual_seed(5)
    network = build_network(name)
    values: dict[str, Any] = {
        "architecture": name,
        "arguments": {"bands": 3, "classes": 1},
        "bands": ("red", "green", "blue"),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "stride": 32,
        "halo_px": 320,
        "receptive_field_px": Reach(338, 307, 338, 307),
        "resolution_m": 0.3,
        "resolution_range_m": (0.2, 0.5),
    }
    save_bundle(path, network, Card(**(values | changes)))
    return network


def test_a_bundle_gives_all_weights(tmp_path: Path) -> None:
    theirs = bundle(tmp_path / "a.safetensors")
    network = begin(build_network("unet-mobilenetv2"), "a.safetensors", tmp_path)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_bundle_with_the_same_normalisation_in_other_units_is_taken(tmp_path: Path) -> None:
    scaled = {"scale": 1.0, "mean": tuple(255 * m for m in IMAGENET_MEAN), "std": tuple(255 * s for s in IMAGENET_STD)}
    bundle(tmp_path / "a.safetensors", **scaled)
    begin(build_network("unet-mobilenetv2"), "a.safetensors", tmp_path)


def test_a_packaged_bundle_is_taken_by_its_name(tmp_path: Path) -> None:
    name = packaged_bundles()[0].stem
    begin(build_network("unet-mobilenetv2"), name, tmp_path)


BAD_BUNDLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "another normalisation": ("unet-mobilenetv2", {"std": (0.5, 0.5, 0.5)}, "trained with the normalisation mean"),
    "other bands": (
        "unet-mobilenetv2",
        {"bands": ("red",), "mean": (0.485,), "std": (0.229,)},
        "trained with the normalisation",
    ),
    "another architecture": ("unet-small", {"stride": 64}, "a bundle of unet-small; expected one of unet-mobilenetv2"),
}


@pytest.mark.parametrize("kind", BAD_BUNDLES)
def test_a_bundle_that_does_not_fit_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    name, changes, told = BAD_BUNDLES[kind]
    bundle(tmp_path / "a.safetensors", name, **changes)
    with pytest.raises(BundleError, match=told) as caught:
        begin(build_network("unet-mobilenetv2"), "a.safetensors", tmp_path)
    assert "\n" not in str(caught.value)


def test_an_encoder_of_another_network_is_refused_with_the_first_differences(tmp_path: Path) -> None:
    torch.save(published_encoder(build_network("unet-resnet18"), old=False), tmp_path / "r.pth")
    with pytest.raises(BundleError, match=r"keys missing \(features\.0\.0\.weight, .*keys unexpected \(bn1\.bias"):
        begin(build_network("unet-mobilenetv2"), "r.pth", tmp_path)
    with pytest.raises(BundleError, match="unet-small, which has no ImageNet encoder"):
        begin(build_network("unet-small"), "r.pth", tmp_path)


def test_what_is_not_known_is_told_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'vgg12-imagenet': no file .*known: lecun, default, .*vgg11-imagenet"):
        begin(build_network("unet-small"), "vgg12-imagenet", tmp_path)


def test_every_published_encoder_has_a_name() -> None:
    encoders = {kind.published_encoder for kind in NETWORKS.values()} - {""}
    assert {f"{encoder}-imagenet" for encoder in encoders} == set(PUBLISHED)
    for published in PUBLISHED.values():
        assert published.sha256.startswith(published.file_name.removesuffix(".pth").rpartition("-")[2])


class Counting(SimpleHTTPRequestHandler):
    """Serves a folder and remembers what it was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder that is served, and its address; the cache is a folder of its own."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("SEGPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Counting, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, folder: Path, address: str, state: Mapping[str, Tensor]) -> Published:
    torch.save(dict(state), folder / "encoder.pth")
    published = Published(address + "encoder.pth", hashlib.sha256((folder / "encoder.pth").read_bytes()).hexdigest())
    monkeypatch.setattr(module, "PUBLISHED", {"mobilenet_v2-imagenet": published})
    return published


def test_a_published_name_is_downloaded_once(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = published_encoder(build_network("unet-mobilenetv2"), old=False)
    publish(monkeypatch, *server, state)
    for _ in range(2):
        network = begin(build_network("unet-mobilenetv2"), "mobilenet_v2-imagenet", tmp_path)
        assert torch.equal(network.state_dict()["features.1.conv.1.weight"], state["features.1.conv.1.weight"])
    assert Counting.asked == ["/encoder.pth"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["encoder.pth"]


def test_another_file_than_the_published_one_is_refused_and_not_kept(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, *server, {"a": torch.zeros(1)})
    (server[0] / "encoder.pth").write_bytes(b"something else")
    with pytest.raises(BundleError, match=r"SHA-256 [0-9a-f]{64}; expected [0-9a-f]{64}"):
        begin(build_network("unet-mobilenetv2"), "mobilenet_v2-imagenet", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_offline_the_error_says_which_file_to_put_where(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = published_encoder(build_network("unet-mobilenetv2"), old=False)
    publish(monkeypatch, *server, state)
    there = (server[0] / "encoder.pth").rename(tmp_path / "by hand.pth")
    put = tmp_path / "cache" / "encoder.pth"
    with pytest.raises(BundleError, match=f"cannot be downloaded from http.*put that file at {put}") as caught:
        begin(build_network("unet-mobilenetv2"), "mobilenet_v2-imagenet", tmp_path)
    assert "\n" not in str(caught.value)
    there.rename(put)
    begin(build_network("unet-mobilenetv2"), "mobilenet_v2-imagenet", tmp_path)
    assert Counting.asked == ["/encoder.pth"]
