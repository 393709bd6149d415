"""Laws of the layer `changes`: what is published now against what was published last, whatever was done in between."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyogrio
import pytest
import shapely
from conftest import ORIGIN, City, draw_blobs, map_it, outputs, write_tile
from hypothesis import given, settings
from hypothesis import strategies as st
from published_rows import published_rows

from segpipe.pipeline import changes, publish
from segpipe.pipeline.changes import compare
from segpipe.pipeline.config import load_city
from segpipe.pipeline.manifest import nothing_changed
from segpipe.tasks.vectorize import building_ids, first_pixels

MakeCity = Callable[..., City]

TILE = 144
SMALL: dict[str, Any] = {"tile_px": TILE, "grid": {"chunk_px": 64, "block_px": 128}, "nodata": None}
CELL = 64


def batch(places: list[tuple[int, int, int]], confidence: float = 0.5) -> pa.RecordBatch:
    """Square buildings: first pixel's row and column, and side; in the order of the lattice."""
    places = sorted(places, key=lambda it: (it[0] // CELL, it[1] // CELL, it[0], it[1]))
    row, col, side = np.array(places, np.int64).reshape(-1, 3).T
    return published_rows(
        shapely.box(col, -row - side, col + side, -row),
        building_id=building_ids(row, col),
        area_m2=side**2 * 0.09,
        pixels=side**2,
        confidence=np.full(len(row), confidence),
    )


def told(old: list[tuple[int, int, int]], new: list[tuple[int, int, int]], rows: int = 3) -> list[tuple[Any, ...]]:
    """Changes without geometry and area, old and new cut into batches of a few rows."""
    pieces = [[whole.slice(at, rows) for at in range(0, len(whole), rows)] for whole in (batch(old), batch(new))]
    found = [it for changed in compare(*pieces, CELL) for it in changed.to_pylist()]
    return [(it["change"], it["building_id"], it["previous_id"]) for it in found]


def test_ids_tell_first_pixels() -> None:
    row, col = np.array([-17_000_000, 0, 5, -1]), np.array([3, -4, 0, 16_000_000])
    found = first_pixels(pa.array(building_ids(row, col)))
    assert [it.tolist() for it in found] == [row.tolist(), col.tolist()]
    with pytest.raises(ValueError, match="building town hall"):
        first_pixels(pa.array(["S1E1", "town hall"]))


def test_what_stays_is_not_told_and_what_goes_comes_or_grows_is() -> None:
    old = [(10, 10, 5), (30, 30, 6), (200, 10, 4)]
    new = [(10, 10, 5), (30, 30, 8), (100, 300, 7)]
    assert told(old, old) == []
    assert told(old, new) == [
        ("modified", "S30E30", "S30E30"),
        ("added", "S100E300", None),
        ("removed", None, "S200E10"),
    ]


def test_another_confidence_alone_is_a_modification() -> None:
    (changed,) = compare([batch([(1, 1, 5)])], [batch([(1, 1, 5)], confidence=0.6)], CELL)
    assert changed.column("change").to_pylist() == ["modified"]


def test_a_building_whose_first_pixel_has_moved_is_one_modified_building() -> None:
    assert told([(10, 10, 8)], [(9, 10, 8)]) == [("modified", "S9E10", "S10E10")]
    assert told([(10, 10, 8)], [(16, 16, 8)]) == [("removed", None, "S10E10"), ("added", "S16E16", None)]
    # The old one overlaps both; the one that overlaps more is it.
    assert told([(10, 10, 10)], [(9, 4, 10), (11, 9, 10)]) == [("added", "S9E4", None), ("modified", "S11E9", "S10E10")]


def test_columns_and_geometry_are_of_the_new_building_and_for_a_removed_one_of_the_old() -> None:
    found = [
        it
        for changed in compare([batch([(1, 1, 5), (40, 40, 5)])], [batch([(2, 1, 5)])], CELL)
        for it in changed.to_pylist()
    ]
    modified, removed = found
    assert (modified["area_m2"], modified["previous_area_m2"]) == (2.25, 2.25)
    assert shapely.from_wkb(modified["geometry"]).bounds == (1, -7, 6, -2)
    assert (removed["area_m2"], removed["previous_area_m2"]) == (None, 2.25)
    assert shapely.from_wkb(removed["geometry"]).bounds == (40, -45, 45, -40)


PLACES = st.dictionaries(
    st.tuples(st.integers(-150, 150), st.integers(-150, 150)), st.integers(1, 30), max_size=40
).map(lambda found: [(*place, side) for place, side in found.items()])


@settings(max_examples=100)
@given(PLACES, PLACES, st.integers(1, 7))
def test_changes_account_for_every_building_once_however_the_streams_are_cut(
    old: list[tuple[int, int, int]], new: list[tuple[int, int, int]], rows: int
) -> None:
    new = old[::2] + [it for it in new if it[:2] not in {place[:2] for place in old[::2]}]
    found = told(old, new, rows)
    assert found == told(old, new, 1000)
    before, after = (set(zip(*ids_of(places), strict=True)) for places in (old, new))
    gone = [previous for _, _, previous in found if previous]
    come = [current for _, current, _ in found if current]
    assert len(gone) == len(set(gone))
    assert len(come) == len(set(come))
    assert set(gone) == {it for it, side in before} - {it for it, side in before & after}
    assert set(come) == {it for it, side in after} - {it for it, side in before & after}
    back = told(new, old, rows)
    assert len(back) == len(found)


def ids_of(places: list[tuple[int, int, int]]) -> tuple[list[str], list[int]]:
    row, col, side = np.array(places, np.int64).reshape(-1, 3).T
    return building_ids(row, col), side.tolist()


# In whole runs


def layer(path: Path, name: str = "changes") -> geopandas.GeoDataFrame:
    return pyogrio.read_dataframe(path, layer=name)


def buildings(folder: Path) -> dict[str, tuple[Any, ...]]:
    frame = layer(folder / "buildings.gpkg", "buildings")
    return {row[0]: (*row[:-1], row[-1].wkb) for row in frame.itertuples(index=False, name=None)}


def check(folder: Path, before: dict[str, tuple[Any, ...]]) -> dict[str, int]:
    """Compare the layer with what was published before and is now; number of each kind."""
    after, found = buildings(folder), layer(folder / "buildings.gpkg")
    unchanged = {name for name in before if after.get(name) == before[name]}
    assert set(found.building_id.dropna()) == set(after) - unchanged
    assert set(found.previous_id.dropna()) == set(before) - unchanged
    for row in found.itertuples(index=False):
        present = (isinstance(row.building_id, str), isinstance(row.previous_id, str))
        assert present == {"added": (True, False), "removed": (False, True), "modified": (True, True)}[row.change]
        shown = after[row.building_id] if present[0] else before[row.previous_id]
        assert row.geometry.wkb == shown[-1]
        if present[0]:
            assert row.area_m2 == after[row.building_id][1]
        if present[1]:
            assert row.previous_area_m2 == before[row.previous_id][1]
    return {kind: int((found.change == kind).sum()) for kind in changes.KINDS}


@pytest.fixture
def city(make_city: MakeCity, in_process: type) -> City:
    return make_city(1, 2, **SMALL)


def test_the_layer_is_there_and_empty_when_nothing_was_published_before(city: City) -> None:
    published = map_it(city.config)
    info = pyogrio.read_info(published.geopackage, layer="changes")
    assert (info["features"], info["geometry_type"]) == (0, "Polygon")
    assert list(info["fields"]) == ["change", "building_id", "previous_id", "area_m2", "previous_area_m2"]
    assert published.changes == {"added": 0, "removed": 0, "modified": 0}
    assert pyogrio.read_info(published.geopackage, layer="buildings")["crs"] == info["crs"]


@pytest.mark.parametrize("cell_px", [64, 4096])
def test_a_replaced_an_added_and_a_removed_tile(
    make_city: MakeCity, in_process: type, cell_px: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(publish, "ORDER_CELL_PX", cell_px)
    city = make_city(1, 3, **SMALL)
    folder, tiles = tmp_path / "run", tmp_path / "tiles"
    map_it(city.config)
    before = buildings(folder)
    other = city.image_CHW[:, :, TILE : 2 * TILE].copy()
    other[:, 60:110, 60:110] = draw_blobs(50, 50, 7)
    write_tile(tiles / "tile2.tif", other, ORIGIN[0], ORIGIN[1] + TILE)
    published = map_it(city.config)
    assert published.changes == check(folder, before)
    assert sum(published.changes.values()) > 2
    unchanged = set(before) & set(buildings(folder)) - set(layer(folder / "buildings.gpkg").building_id)
    assert len(unchanged) > 3, "buildings that did not change keep their ids"

    before = buildings(folder)
    write_tile(tiles / "tile0.tif", draw_blobs(TILE, TILE, 9), ORIGIN[0], ORIGIN[1] - TILE)
    assert map_it(city.config).changes == check(folder, before)
    assert check(folder, before)["added"] > 3

    before = buildings(folder)
    (tiles / "tile3.tif").unlink()
    assert map_it(city.config).changes == check(folder, before)
    assert check(folder, before)["removed"] > 0


def test_publishing_the_same_rows_again_keeps_the_changes(city: City, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    map_it(city.config)
    changed = map_it(city.config, "vectorize.threshold=0.3").changes
    assert sum(changed.values()) > 1
    expected = layer(folder / "buildings.gpkg")
    (folder / "preview.png").unlink()
    assert map_it(city.config, "vectorize.threshold=0.3").changes == changed
    assert layer(folder / "buildings.gpkg").equals(expected)
    assert nothing_changed(load_city(city.config, ["vectorize.threshold=0.3"])) is not None


@pytest.mark.parametrize("step", ["add_changes", "place_geopackage"])
def test_killed_while_publishing_the_changes_are_those_of_a_run_that_was_not(
    city: City, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    map_it(city.config)
    shutil.copytree(city.folder / "run", city.folder / "other")
    map_it(city.config, "vectorize.threshold=0.3", "output=other")
    done = getattr(publish, step)

    def killed(*arguments: Any, **options: Any) -> Any:
        done(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish, step, killed)
        with pytest.raises(KeyboardInterrupt):
            map_it(city.config, "vectorize.threshold=0.3")
    map_it(city.config, "vectorize.threshold=0.3")
    expected = layer(city.folder / "other" / "buildings.gpkg")
    assert len(expected) > 1
    assert layer(city.folder / "run" / "buildings.gpkg").equals(expected)
    assert outputs(city.folder / "other") == outputs(city.folder / "run")


def test_changes_are_against_what_was_published_last_wherever_it_was_placed(city: City, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    map_it(city.config)
    wal = folder / "buildings.gpkg-wal"
    wal.touch()
    first = buildings(folder)
    second = map_it(city.config, "vectorize.threshold=0.3")
    assert second.geopackage.name == "buildings-2.gpkg"
    assert sum(second.changes.values()) > 0
    assert set(layer(second.geopackage).previous_id.dropna()) <= set(first)
    wal.unlink()
    third = map_it(city.config)
    assert third.geopackage.name == "buildings.gpkg"
    assert third.changes == {
        "added": second.changes["removed"],
        "removed": second.changes["added"],
        "modified": second.changes["modified"],
    }


def test_nothing_is_told_against_rows_that_were_not_published_or_lie_on_another_lattice(
    city: City, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    map_it(city.config)
    frame = layer(folder / "buildings.gpkg", "buildings").iloc[:2]
    pyogrio.write_dataframe(frame, folder / "buildings.gpkg", layer="buildings")
    published = map_it(city.config, "vectorize.threshold=0.3")
    assert (published.geopackage.name, sum(published.changes.values())) == ("buildings-2.gpkg", 0)
    (tmp_path / "tiles" / "tile2.tif").unlink()
    write_tile(tmp_path / "tiles" / "tile1.tif", city.image_CHW, *ORIGIN, crs="EPSG:32634")
    assert sum(map_it(city.config, fresh=True).changes.values()) == 0


def test_a_changed_layer_of_changes_protects_nothing_and_a_table_of_somebodys_own_does(
    city: City, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "buildings.gpkg"
    map_it(city.config)
    map_it(city.config, "vectorize.threshold=0.3")
    pyogrio.write_dataframe(layer(path).iloc[:1], path, layer="changes")
    assert map_it(city.config).geopackage == path
    pyogrio.write_dataframe(layer(path).iloc[:1], path, layer="field notes")
    assert map_it(city.config, "vectorize.threshold=0.3").geopackage.name == "buildings-2.gpkg"
