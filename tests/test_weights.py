"""Bundles hold a network and its card, come back as they were, and what is no bundle is told so in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from segpipe.models import weights
from segpipe.models.networks import NETWORKS, Network, build_network
from segpipe.models.weights import (
    BundleError,
    Card,
    Reach,
    file_digest,
    import_checkpoint,
    load_bundle,
    packaged_bundles,
    read_card,
    resolve_bundle,
    save_bundle,
)


def card_of(architecture: str, **changes: Any) -> Card:
    values: dict[str, Any] = {
        "architecture": architecture,
        "arguments": {"bands": 3, "classes": 1},
        "bands": ("red", "green", "blue"),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "stride": 32,
        "halo_px": 320,
        "receptive_field_px": Reach(1, 2, 3, 4),
        "resolution_m": 0.3,
        "resolution_range_m": (0.2, 0.5),
    }
    return Card(**(values | changes))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return build_network("unet-mobilenetv2")


@pytest.fixture(scope="module")
def saved(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "a model.safetensors"
    save_bundle(path, network, card_of("unet-mobilenetv2"))
    return path


def test_a_bundle_comes_back_as_it_was(network: Network, saved: Path) -> None:
    bundle = load_bundle(saved)
    assert bundle.card == read_card(saved) == card_of("unet-mobilenetv2")
    assert not bundle.network.training
    state = bundle.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert not list(saved.parent.glob(".*"))


def test_the_same_network_gives_the_same_bytes(network: Network, saved: Path, tmp_path: Path) -> None:
    save_bundle(tmp_path / "again.safetensors", network, card_of("unet-mobilenetv2"))
    assert file_digest(tmp_path / "again.safetensors") == file_digest(saved)
    assert len(file_digest(saved)) == 32


def test_keys_of_one_tensor_are_stored_once_and_all_come_back(tmp_path: Path) -> None:
    network = build_network("unet11")
    save_bundle(tmp_path / "unet11.safetensors", network, card_of("unet11"))
    assert (tmp_path / "unet11.safetensors").stat().st_size < 4 * 22_927_393 + 20_000
    own = load_bundle(tmp_path / "unet11.safetensors").network
    assert all(torch.equal(own.state_dict()[name], value) for name, value in network.state_dict().items())
    assert own.get_parameter("encoder.0.weight") is own.get_parameter("conv1.weight")


def test_half_precision_keeps_statistics_and_values_that_would_overflow(tmp_path: Path) -> None:
    network = build_network("unet-mobilenetv2")
    state = network.state_dict()
    state["features.0.1.running_var"].fill_(1e-9)
    state["features.0.1.running_mean"].fill_(1e9)
    state["head.bias"].fill_(1e6)
    state["head.weight"].fill_(0.1)
    card = save_bundle(tmp_path / "half.safetensors", network, card_of("unet-mobilenetv2"), half=True)
    assert card.weights_dtype == read_card(tmp_path / "half.safetensors").weights_dtype == "float16"
    own = load_bundle(tmp_path / "half.safetensors").network.state_dict()
    assert {value.dtype for value in own.values()} == {torch.float32, torch.int64}
    for name in ("features.0.1.running_var", "features.0.1.running_mean", "head.bias"):
        assert torch.equal(own[name], state[name])
    assert torch.equal(own["head.weight"], state["head.weight"].half().float())


def test_a_loaded_network_gives_the_same_bits_however_the_image_lies_in_memory(saved: Path) -> None:
    network = load_bundle(saved).network
    image_BCHW = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network(image_BCHW), network(image_BCHW.contiguous(memory_format=torch.channels_last)))


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_bundle(saved)
    assert torch.equal(torch.rand(1), expected)


def test_what_a_worker_needs_before_its_first_window_is_imported_without_torch() -> None:
    code = "import sys, segpipe.pipeline.cluster_worker, segpipe.pipeline.run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_card_is_read_without_torch(saved: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from segpipe.models.weights import file_digest, read_card, resolve_bundle\n"
        f"read_card(resolve_bundle({saved.name!r}, Path({str(saved.parent)!r}))); file_digest(Path({str(saved)!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_path_wins_over_a_name_and_both_are_told(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "packaged_bundles", lambda: [saved.with_name("shipped.safetensors")])
    assert resolve_bundle(saved.name, saved.parent) == saved
    assert resolve_bundle(str(saved), tmp_path) == saved
    assert resolve_bundle("shipped", tmp_path) == saved.with_name("shipped.safetensors")
    with pytest.raises(BundleError, match=r"nowhere.safetensors.*known: shipped"):
        resolve_bundle("nowhere.safetensors", tmp_path)


def test_packaged_bundles_load_and_are_exact(tmp_path: Path) -> None:
    from segpipe.models.field import probe_field

    for path in packaged_bundles():
        bundle = load_bundle(path)
        field = probe_field(bundle.network, bundle.network.stride, len(bundle.card.bands))
        assert (bundle.card.halo_px, bundle.card.receptive_field_px) == (field.halo_px, field.receptive_field_px)
        assert bundle.card.training_data
        assert path.stat().st_size < 15_000_000
        assert resolve_bundle(path.stem, tmp_path) == path


def without_card(path: Path, network: Network) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)


def with_card(**changes: Any) -> Callable[[Path, Network], None]:
    def write(path: Path, network: Network) -> None:
        card = json.loads(card_of("unet-mobilenetv2").model_dump_json()) | changes
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"segpipe": json.dumps(card)})

    return write


def cut_short(path: Path, network: Network) -> None:
    save_bundle(path, network, card_of("unet-mobilenetv2"))
    path.write_bytes(path.read_bytes()[:-1000])


NO_BUNDLES: dict[str, tuple[Callable[[Path, Network], object], str]] = {
    "a text": (lambda path, network: path.write_text("this is no bundle, only a text"), "not a model bundle"),
    "an empty file": (lambda path, network: path.write_bytes(b""), "not a model bundle"),
    "JSON that is no header": (
        lambda path, network: path.write_bytes(b"\x02" + bytes(7) + b"[]"),
        "not a model bundle",
    ),
    "a folder": (lambda path, network: path.mkdir(), "cannot be read"),
    "nothing": (lambda path, network: None, "cannot be read"),
    "a checkpoint": (lambda path, network: torch.save({}, path), "segpipe models import"),
    "safetensors without a card": (without_card, "no 'segpipe' in its metadata"),
    "cut short": (cut_short, "not whole"),
    "a mistyped card": (with_card(halo_px="many"), "halo_px"),
    "an unknown key": (with_card(halo=3), "halo"),
    "a card that contradicts itself": (with_card(mean=[0.5]), "1 means and 3 deviations for 3 bands"),
    "an unknown network": (with_card(architecture="unet12"), "unet12"),
    "a network's unknown argument": (with_card(arguments={"depth": 3}), "depth"),
    "other weights": (with_card(), "not the weights of UNetMobileNetV2.*missing.*1 keys unexpected"),
}


@pytest.mark.parametrize("kind", NO_BUNDLES)
def test_what_is_no_bundle_is_told_in_one_line(kind: str, network: Network, tmp_path: Path) -> None:
    write, told = NO_BUNDLES[kind]
    path = tmp_path / "model.safetensors"
    write(path, network)
    with pytest.raises(BundleError, match=told) as caught:
        load_bundle(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unet-small", {"bands": 4, "classes": 2}),
        ("unet-mobilenetv2", {"bands": 1, "classes": 1, "decoder": "plain", "top": True}),
        ("unet-resnet18", {"bands": 3, "classes": 1}),
        ("unet-densenet121", {"bands": 3, "classes": 1}),
    ],
)
def test_every_argument_of_a_network_comes_back(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(name, **arguments).eval()
    bands = tuple(f"band {number}" for number in range(arguments["bands"]))
    middle = (0.5,) * len(bands)
    card = card_of(name, arguments=arguments, bands=bands, mean=middle, std=middle, temperature=1.5, resize_px=(64, 96))
    save_bundle(tmp_path / "x.safetensors", network, card)
    bundle = load_bundle(tmp_path / "x.safetensors")
    assert bundle.card == card
    state = bundle.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    image_BCHW = torch.randn(1, len(bands), network.stride, network.stride)
    with torch.inference_mode():
        torch.testing.assert_close(bundle.network(image_BCHW), network(image_BCHW))


@pytest.fixture(scope="module")
def saved_own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "own_networks:Gated"
    path = tmp_path_factory.mktemp("own") / "gated.safetensors"
    card = card_of(name, module=name, stride=8, halo_px=None, receptive_field_px=None, effective_halo_px=64)
    torch.manual_seed(2)
    save_bundle(path, build_network(name, bands=3, classes=1), card)
    return path


def test_an_own_network_comes_back_where_its_module_is_allowed(saved_own: Path) -> None:
    bundle = load_bundle(saved_own, allowed_module="own_networks:Gated")
    torch.manual_seed(2)
    expected = build_network("own_networks:Gated", bands=3, classes=1).eval()
    image_BCHW = torch.randn(1, 3, 16, 24)
    with torch.inference_mode():
        torch.testing.assert_close(bundle.network(image_BCHW), expected(image_BCHW))
    assert (bundle.card.halo_px, bundle.network.stride) == (None, 8)


@pytest.mark.parametrize("allowed", [None, "own_networks:Blur"])
def test_an_own_networks_code_is_not_touched_unless_the_same_module_is_allowed(
    saved_own: Path, allowed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(BundleError, match=r"`module: own_networks:Gated`") as caught:
        load_bundle(saved_own, allowed_module=allowed)
    assert "\n" not in str(caught.value)


def test_a_card_cannot_name_code_that_it_does_not_declare() -> None:
    with pytest.raises(ValueError, match="module None for the architecture 'os:system'"):
        card_of("os:system")
    with pytest.raises(ValueError, match="module 'os:system'"):
        card_of("unet11", module="os:system")
    with pytest.raises(ValueError, match="both or neither"):
        card_of("unet11", halo_px=None)


def published_unet11() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return build_network("unet11").state_dict()


def test_a_ternausnet_checkpoint_imports_and_loads(tmp_path: Path) -> None:
    state = published_unet11()
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "t.pt")
    card = import_checkpoint(tmp_path / "t.pt", tmp_path / "unet11.safetensors", "unet11")
    assert (card.halo_px, card.stride, card.arguments) == (160, 32, {"bands": 3, "classes": 1})
    own = load_bundle(tmp_path / "unet11.safetensors").network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
def test_both_kinds_of_unet16_are_told_apart_by_what_they_hold(upsampling: str) -> None:
    with torch.device("meta"):
        state = build_network("unet16", upsampling=upsampling).state_dict()
    assert NETWORKS["unet16"].arguments_of(state) == {"upsampling": upsampling}


def test_a_published_unet16_imports_as_the_kind_that_it_is(tmp_path: Path) -> None:
    upsampling = "transposed"
    torch.manual_seed(3)
    state = build_network("unet16", upsampling=upsampling).state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "t.pt")
    card = import_checkpoint(tmp_path / "t.pt", tmp_path / "unet16.safetensors", "unet16")
    assert card.arguments == {"bands": 3, "classes": 1, "upsampling": upsampling}
    assert (card.halo_px, card.stride) == (192, 32)
    own = load_bundle(tmp_path / "unet16.safetensors").network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


def test_doubled_keys_that_differ_are_refused(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in published_unet11().items()}
    state["conv3.bias"] += 1
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(BundleError, match=r"encoder\.8\.bias and conv3\.bias"):
        import_checkpoint(tmp_path / "t.pt", tmp_path / "x.safetensors", "unet11")
    assert not (tmp_path / "x.safetensors").exists()


def test_the_imagenet_encoder_imports_with_a_fresh_decoder(shared: Path, tmp_path: Path) -> None:
    source = shared / "weights" / "mobilenet_v2-imagenet.pth"
    published = torch.load(source, weights_only=True)
    card = import_checkpoint(source, tmp_path / "a.safetensors", "unet-mobilenetv2", seed=1)
    assert card.halo_px == 320
    assert "decoder untrained" in card.training_data[0]
    import_checkpoint(source, tmp_path / "b.safetensors", "unet-mobilenetv2", seed=1)
    assert file_digest(tmp_path / "a.safetensors") == file_digest(tmp_path / "b.safetensors")
    own = load_bundle(tmp_path / "a.safetensors").network.state_dict()
    encoder = [name for name in own if name.startswith("features.")]
    assert len(encoder) == 306
    assert all(torch.equal(own[name], published[name]) for name in encoder)


class Executed:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, ("raise SystemExit('code was run')",)


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda path: torch.save({"a": Executed()}, path), "weights only"),
    "a text": (lambda path: path.write_text("hello"), "weights only"),
    "an empty file": (lambda path: path.write_bytes(b""), "weights only"),
    "nothing": (lambda path: None, "cannot be read"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "expected a state dict"),
    "another network": (lambda path: torch.save({"a": torch.zeros(1)}, path), "1 keys unexpected"),
    "half an encoder": (lambda path: torch.save({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, path), "missing"),
    "another shape": (
        lambda path: torch.save({"features.0.0.weight": torch.zeros(64, 3, 3, 3)}, path),
        r"features\.0\.0\.weight is \(64, 3, 3, 3\), expected \(32, 3, 3, 3\)",
    ),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_of_the_network_is_told_in_one_line(kind: str, tmp_path: Path) -> None:
    write, told = NO_CHECKPOINTS[kind]
    write(tmp_path / "source.pth")
    with pytest.raises(BundleError, match=told) as caught:
        import_checkpoint(tmp_path / "source.pth", tmp_path / "x.safetensors", "unet-mobilenetv2")
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = build_network("unet-mobilenetv2").state_dict()
    state["head.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "source.pth")
    with pytest.raises(BundleError, match=r"head\.bias"):
        import_checkpoint(tmp_path / "source.pth", tmp_path / "x.safetensors", "unet-mobilenetv2")
