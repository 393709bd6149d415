"""What goes wrong between tasks: kills before the ledger, tasks that outlive their run, damage, changing tiles."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ORIGIN, City, FakePredictor, map_it, outputs, raster, stages_since, tasks_done, write_tile

from segpipe.pipeline import imagery, network, publish, run, stages
from segpipe.pipeline.config import load_city
from segpipe.pipeline.ledger import Ledger
from segpipe.pipeline.lock import LOCK, lock_token
from segpipe.pipeline.plan import Plan, make_plan
from segpipe.tasks.errors import RunError, StorageError, TileError

MakeCity = Callable[..., City]
Damage = Callable[[Path], None]

pytestmark = pytest.mark.usefixtures("in_process")

TILE = 144
SMALL: dict[str, Any] = {"tile_px": TILE, "grid": {"chunk_px": 64, "block_px": 128}, "nodata_min_m2": 50}
OTHER = "predict.precision=bfloat16"
"""The recipe with which the network of these tests gives other probabilities."""


class Halved(FakePredictor):
    def predict(self, *window: Any) -> np.ndarray:
        prob_HW = super().predict(*window)
        return np.where(prob_HW < 251, prob_HW // 2, prob_HW)


@pytest.fixture
def city(make_city: MakeCity, monkeypatch: pytest.MonkeyPatch) -> City:
    def load(plan: Plan) -> FakePredictor:
        return Halved() if plan.recipe.precision == "bfloat16" else FakePredictor()

    monkeypatch.setattr(network, "load_predictor", load)
    return make_city(**SMALL, predict={"precision": "float32"})


@pytest.fixture
def expected(city: City) -> Iterator[dict[str, Any]]:
    """Outputs of an undisturbed run."""
    map_it(city.config, "output=clean")
    yield outputs(city.folder / "clean")


def dies_before_the_ledger(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The first unit of a stage is written and the process killed before its entry is."""
    record = Ledger.record

    def killed(self: Ledger, at: str, unit: str, key: str, **values: object) -> None:
        if at == stage:
            raise KeyboardInterrupt
        record(self, at, unit, key, **values)

    monkeypatch.setattr(Ledger, "record", killed)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("scan", ["nodata=255"]),
        ("read", ["nodata=255"]),
        ("predict", [OTHER]),
        ("vectorize", ["vectorize.threshold=0.95"]),
        ("join", ["vectorize.threshold=0.3"]),
    ],
)
def test_killed_before_the_ledger_with_other_settings_one_run_with_the_old_ones_is_right(
    city: City, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str, settings: list[str]
) -> None:
    map_it(city.config)
    with monkeypatch.context() as patch:
        dies_before_the_ledger(patch, stage)
        with pytest.raises(KeyboardInterrupt):
            map_it(city.config, *settings)
    map_it(city.config)
    assert outputs(city.folder / "run") == expected


def test_killed_early_and_again_under_another_nodata_the_first_settings_find_their_own_holes(
    city: City, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, killed_after: Callable[[Path, int], bool]
) -> None:
    assert killed_after(city.config, 2)
    with monkeypatch.context() as patch:
        dies_before_the_ledger(patch, "scan")
        with pytest.raises(KeyboardInterrupt):
            map_it(city.config, "nodata=255")
    map_it(city.config)
    assert outputs(city.folder / "run") == expected


def test_a_task_that_outlives_its_run_cannot_feed_the_next_one(
    city: City, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_plan(load_city(city.config, [OTHER]))
    vectorize, tried = stages.vectorize, []

    def beside(site: stages.Site, row: int, col: int, key: str) -> stages.Receipt:
        if not tried:
            tried.append(key)
            lock = "the token of a run that was killed"
            site_of_old = stages.Site(run.replace(old, lock=lock))
            under = [
                (chunk, stages.key_in_ledger(site_of_old, "read", chunk))
                for chunk in old.chunks_in(stages.reach(old.core(row, col), old.recipe.halo_px, old.card.stride))
            ]
            with pytest.raises(RunError, match="another run is at work"):
                stages.predict(site_of_old, row, col, stages.predict_key(old, (row, col), under))
        return vectorize(site, row, col, key)

    monkeypatch.setattr(stages, "vectorize", beside)
    map_it(city.config)
    assert tried
    assert outputs(city.folder / "run") == expected


def test_a_task_refuses_inputs_other_than_those_that_it_was_sent_for(city: City) -> None:
    map_it(city.config)
    plan = make_plan(load_city(city.config))
    block = next(plan.blocks())
    for stage in (stages.predict, stages.vectorize):
        with pytest.raises(RunError, match="other inputs"):
            stage(stages.Site(plan), *block, "a key of yesterday")


def chunk_files(folder: Path, array: str) -> list[Path]:
    return sorted(p for p in (folder / "store.zarr" / array / "c").rglob("*") if p.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    ("array", "damage"), [("image", flip), ("valid", flip), ("probability", flip), ("probability", Path.unlink)]
)
def test_damaged_chunks_are_found_and_made_anew_in_one_run(
    city: City, expected: dict[str, Any], array: str, damage: Damage, count: int
) -> None:
    map_it(city.config)
    folder = city.folder / "run"
    for path in chunk_files(folder, array)[::2][:count]:
        damage(path)
    # Pixels are needed only if they are predicted again, probabilities whenever something is published.
    if array != "probability":
        shutil.rmtree(folder / "ledger" / "predict")
    (folder / "mask.tif").unlink()
    map_it(city.config)
    assert outputs(folder) == expected


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [("*[0-9].arrow", flip), ("*[0-9].arrow", Path.unlink), ("*.joined.arrow", flip), ("*", Path.unlink)],
)
def test_damaged_fragments_are_found_and_made_anew_in_one_run(
    city: City, expected: dict[str, Any], pattern: str, damage: Damage
) -> None:
    map_it(city.config)
    folder = city.folder / "run"
    before = tasks_done(folder)
    for path in sorted((folder / "fragments").glob(pattern)):
        damage(path)
    (folder / "mask.tif").unlink()
    map_it(city.config)
    assert outputs(folder) == expected
    assert not {"scan", "read", "predict"} & set(stages_since(folder, before))


@pytest.mark.parametrize("damage", [Path.unlink, cut_short])
def test_a_damaged_record_of_invalid_pixels_is_made_anew(city: City, expected: dict[str, Any], damage: Damage) -> None:
    map_it(city.config)
    folder = city.folder / "run"
    for stage in ("read", "predict"):
        shutil.rmtree(folder / "ledger" / stage)
    (found,) = [p for p in (folder / "validity").glob("tile1-*") if p.stat().st_size > 22]
    damage(found)
    (folder / "mask.tif").unlink()
    map_it(city.config)
    assert outputs(folder) == expected


def test_without_its_store_a_ledger_claims_nothing(city: City, expected: dict[str, Any]) -> None:
    map_it(city.config)
    shutil.rmtree(city.folder / "run" / "store.zarr")
    (city.folder / "run" / "mask.tif").unlink()
    map_it(city.config)
    assert outputs(city.folder / "run") == expected


def test_a_tile_that_changes_while_it_is_read_is_named_and_never_mixed(
    city: City, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = city.folder / "tiles" / "tile4.tif"
    old, status = path.read_bytes(), path.stat()
    other = np.ascontiguousarray(city.image_CHW[:, TILE:, TILE:][:, ::-1])
    read, count = stages.read, iter(range(1000))

    def changing(site: stages.Site, *arguments: Any) -> stages.Receipt:
        tiles = [site.plan.tiles[tile].path for tile, _ in arguments[3]]
        if str(path) in tiles and next(count) == 2:
            write_tile(path, other, ORIGIN[0] + TILE, ORIGIN[1] + TILE)
        return read(site, *arguments)

    changing.__name__ = "read"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "read", changing)
        with pytest.raises(RunError, match=r"tile4\.tif: has changed"):
            map_it(city.config)
    path.write_bytes(old)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    map_it(city.config)
    assert outputs(city.folder / "run") == expected


def test_a_tile_that_was_skipped_costs_its_own_decoding_and_nothing_more(make_city: MakeCity, tmp_path: Path) -> None:
    city = make_city(**SMALL | {"on_tile_error": "skip", "nodata": None})
    path = tmp_path / "tiles" / "tile4.tif"
    write_tile(path, city.image_CHW[:, TILE:, TILE:], ORIGIN[0] + TILE, ORIGIN[1] + TILE, blockysize=8)
    data = bytearray(path.read_bytes())
    data[-3500:-2000] = b"\xff" * 1500
    path.write_bytes(data)
    assert list(map_it(city.config).skipped) == [str(path)]
    before = tasks_done(tmp_path / "run")
    assert list(map_it(city.config, "vectorize.threshold=0.45").skipped) == [str(path)]
    assert not {"read", "predict"} & set(stages_since(tmp_path / "run", before))


def test_a_skipped_tile_is_left_out_of_the_picture_where_the_imagery_was_not_kept(
    make_city: MakeCity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city(1, 2, **SMALL | {"on_tile_error": "skip", "nodata": None, "store": {"keep": "probability"}})
    path = str(tmp_path / "tiles" / "tile2.tif")
    read_window = imagery.read_window

    def broken(tiles: Any, *arguments: Any) -> Any:
        if path in [tile.path for tile in tiles]:
            raise TileError(path, "input/output error")
        return read_window(tiles, *arguments)

    monkeypatch.setattr(stages, "read_window", broken)
    monkeypatch.setattr(imagery, "read_window", broken)
    map_it(city.config)
    assert list(map_it(city.config, "vectorize.threshold=0.45").skipped) == [path]
    assert (raster(tmp_path / "run" / "mask.tif")[:, TILE:] == 255).all()


def test_killed_between_manifest_and_dropping_the_store_nothing_is_computed_again(
    make_city: MakeCity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city(**SMALL | {"store": {"keep": "none"}})

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "drop_store", killed)
        with pytest.raises(KeyboardInterrupt):
            map_it(city.config)
    before = tasks_done(tmp_path / "run")
    map_it(city.config)
    assert not {"read", "predict", "vectorize"} & set(stages_since(tmp_path / "run", before))
    assert not (tmp_path / "run" / "store.zarr").exists()


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (run, "run_joins"),
        (publish, "write_geopackage"),
        (publish, "add_run_layers"),
        (run, "write_item"),
        (run, "show"),
    ],
)
def test_a_run_that_slept_while_another_took_its_lock_places_nothing_more(
    make_city: MakeCity, monkeypatch: pytest.MonkeyPatch, module: Any, step: str
) -> None:
    city = make_city(**SMALL | {"store": {"keep": "probability"}})
    map_it(city.config)
    folder, before = city.folder / "run", (city.folder / "run" / "buildings.gpkg").read_bytes()
    do = getattr(module, step)

    def sleeps(*arguments: Any, **named: Any) -> Any:
        done = do(*arguments, **named)
        holder = json.loads((folder / LOCK).read_text())
        (folder / LOCK).write_text(json.dumps(holder | {"token": "another"}))
        return done

    monkeypatch.setattr(module, step, sleeps)
    with pytest.raises(StorageError, match="another run is at work here"):
        map_it(city.config, "vectorize.threshold=0.95", "store.keep=none")
    assert lock_token(folder) == "another"
    assert (folder / "store.zarr").exists()
    placed = module is run and step != "run_joins"
    assert ((folder / "buildings.gpkg").read_bytes() == before) != placed
    assert (json.loads((folder / "manifest.json").read_text()).get("state") is None) == (step != "run_joins")
