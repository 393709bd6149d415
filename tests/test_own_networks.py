"""A user's own network runs where the YAML names its module, with the halo that was found, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import City, map_it, outputs

from segpipe.models.field import probe_field
from segpipe.models.losses import resolve_loss
from segpipe.models.networks import build_network
from segpipe.models.weights import Card, load_bundle, packaged_bundles, save_bundle
from segpipe.pipeline import run
from segpipe.pipeline.cluster import InProcess
from segpipe.pipeline.config import load_city
from segpipe.pipeline.describe import describe
from segpipe.pipeline.plan import Plan, make_plan
from segpipe.tasks.errors import UserError

MakeCity = Callable[..., City]


def save_own(path: Path, name: str, effective_halo_px: int | None = None, **arguments: Any) -> str:
    """A bundle of an own network with the field that is found for it; gives its module."""
    torch.manual_seed(0)
    network = build_network(name, bands=3, classes=1, **arguments)
    field = probe_field(network, network.stride, bands=3)
    card = Card(
        architecture=name,
        module=name,
        arguments={"bands": 3, "classes": 1, **arguments},
        bands=("red", "green", "blue"),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        stride=network.stride,
        halo_px=field.halo_px,
        receptive_field_px=field.receptive_field_px,
        effective_halo_px=effective_halo_px,
        resolution_m=0.3,
        resolution_range_m=(0.15, 0.6),
    )
    save_bundle(path, network, card)
    return name


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test work in this process, with the networks of their bundles."""

    @contextmanager
    def open_pool(plan: Plan, scheduler: str | None) -> Iterator[InProcess]:
        yield InProcess(plan)

    monkeypatch.setattr(run, "open_pool", open_pool)


@pytest.fixture
def blurred(make_city: MakeCity, tmp_path: Path, here: None) -> City:
    module = save_own(tmp_path / "blur.safetensors", "own_networks:Blur", radius=3)
    predict = {"precision": "float32"}
    return make_city(1, 2, tile_px=150, model="blur.safetensors", module=module, predict=predict)


def test_a_city_is_mapped_with_an_own_network_and_any_block_size_gives_the_same_bytes(blurred: City) -> None:
    plan = make_plan(load_city(blurred.config, []))
    assert (plan.recipe.halo_px, plan.card.stride) == (3, 1)
    map_it(blurred.config)
    map_it(blurred.config, "grid.block_px=128", "output=other")
    found = outputs(blurred.folder / "run")
    assert found == outputs(blurred.folder / "other")
    assert len(set(found["probability"])) > 20


def test_d4_is_part_of_the_recipe_and_does_not_depend_on_the_cut_either(blurred: City) -> None:
    plan = make_plan(load_city(blurred.config, ["predict.tta=d4"]))
    assert plan.recipe.tta == "d4"
    assert "eight turns and flips" in dict(describe(plan))["recipe"]
    map_it(blurred.config)
    plain = outputs(blurred.folder / "run")
    map_it(blurred.config, "predict.tta=d4")
    turned = outputs(blurred.folder / "run")
    assert turned["probability"] != plain["probability"]
    map_it(blurred.config, "predict.tta=d4", "grid.block_px=128", "output=other")
    assert outputs(blurred.folder / "other") == turned


@pytest.mark.parametrize("module", [None, "own_networks:Steps"])
def test_without_its_module_in_the_yaml_no_plan_is_made_and_the_line_is_told(blurred: City, module: str | None) -> None:
    config = load_city(blurred.set(module=module), [])
    with pytest.raises(UserError, match=r"model: .*`module: own_networks:Blur`") as caught:
        make_plan(config)
    assert "\n" not in str(caught.value)


def test_a_field_without_a_bound_gets_its_effective_halo_and_the_plan_says_so(
    make_city: MakeCity, tmp_path: Path
) -> None:
    module = save_own(tmp_path / "gated.safetensors", "own_networks:Gated", effective_halo_px=64)
    city = make_city(1, 1, tile_px=64, model="gated.safetensors", module=module)
    plan = make_plan(load_city(city.config, []))
    assert plan.recipe.halo_px == 64
    assert any("results depend on the block size" in note for note in plan.notes)
    assert make_plan(load_city(city.config, ["predict.halo=32"])).recipe.halo_px == 32
    with pytest.raises(UserError, match="no bound; expected auto or pixels"):
        make_plan(load_city(city.config, ["predict.halo=exact"]))
    save_own(tmp_path / "gated.safetensors", "own_networks:Gated")
    with pytest.raises(UserError, match="no effective halo was measured in training; expected pixels"):
        make_plan(load_city(city.config, []))


def test_the_page_of_docs_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "networks.md").read_text(encoding="utf-8")
    notebook, own = (part.partition("```")[0] for part in page.split("```python\n")[1:])
    (tmp_path / "own.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    save_own(tmp_path / "own.safetensors", "own:Net", width=4)
    bundle = load_bundle(tmp_path / "own.safetensors", allowed_module="own:Net")
    assert (bundle.card.stride, bundle.card.halo_px, bundle.card.arguments["width"]) == (4, 0, 4)
    logits_BKHW = torch.randn(2, 1, 8, 8, requires_grad=True)
    target_BKHW, valid_BHW = (torch.rand(2, 1, 8, 8) < 0.5).float(), torch.rand(2, 8, 8) < 0.5
    loss = resolve_loss("own:focal", {"gamma": 1.0})(logits_BKHW, target_BKHW, valid_BHW)
    (gradient_BKHW,) = torch.autograd.grad(loss, logits_BKHW)
    assert torch.equal(gradient_BKHW[:, 0] != 0, valid_BHW)
    path = str(packaged_bundles()[0])
    names: dict[str, Any] = {"image_HWC": np.full((40, 50, 3), 128, np.uint8)}
    exec(notebook.replace("runs/buildings/model.safetensors", path), names)
    assert (names["prob_HW"].shape, names["mask_HW"].dtype) == ((40, 50), np.bool_)
