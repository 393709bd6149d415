"""Laws of the manifest: what it cannot vouch for is run again, and nobody's files are written over."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyogrio
import pytest
from conftest import City, map_it

from segpipe.pipeline.config import load_city
from segpipe.pipeline.geopackage import rows_digest
from segpipe.pipeline.manifest import check_folder_is_ours, nothing_changed, read_manifest, revoke
from segpipe.tasks.errors import UserError


@pytest.fixture
def city(make_city: Callable[..., City], in_process: type) -> City:
    return make_city(1, 2, tile_px=96, nodata=None, grid={"chunk_px": 64, "block_px": 64})


@pytest.fixture
def run(city: City) -> Path:
    """The folder of a finished run."""
    map_it(city.config)
    return city.folder / "run"


def unchanged(city: City, *overrides: str) -> bool:
    return nothing_changed(load_city(city.config, overrides)) is not None


# What is no whole manifest counts as none

DAMAGED = [b"", b"[]", b"{}", b"7", b'{"state": {}}', b"\xff\xfe\0", b"[" * 100_000, b'{"state": null, "model": 3}']


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:20]))
def test_what_is_no_manifest_counts_as_none_and_the_run_goes_on(city: City, run: Path, content: bytes) -> None:
    (run / "manifest.json").write_bytes(content)
    assert read_manifest(run) is None
    assert not unchanged(city)
    assert set().union(*revoke(run).values()) == set()
    map_it(city.config)
    assert unchanged(city)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["state"], None),
        (["state", "images"], []),
        (["state", "model"], ["m"]),
        (["model"], {}),
        (["model"], None),
        (["outputs"], ["mask.tif"]),
        (["outputs", "mask.tif"], "large"),
        (["skipped"], None),
        (["finished"], None),
        (["rows_digests"], 3),
        (["rows_digests"], {"buildings.gpkg": [1]}),
        (["rows_digests_begun"], {"a": 1}),
        (["rows_digests_begun"], [1, None]),
    ],
)
def test_a_manifest_with_a_part_of_another_kind_ends_in_no_error(
    city: City, run: Path, keys: list[str], value: object
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    part = manifest
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert unchanged(city) == keys[0].startswith("rows_digests")
    assert set(revoke(run)) == {"buildings.gpkg"}
    assert not unchanged(city)


# What is looked at


@pytest.mark.parametrize("name", ["mask.tif", "probability.tif", "preview.png", "report.html", "buildings.gpkg"])
def test_an_output_cut_short_or_gone_or_a_folder_is_a_change(city: City, run: Path, name: str) -> None:
    assert unchanged(city)
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[:-1])
    assert not unchanged(city)
    (run / name).unlink()
    assert not unchanged(city)
    (run / name).mkdir()
    assert not unchanged(city)
    (run / name).rmdir()
    (run / name).write_bytes(whole)
    assert unchanged(city)


def test_a_geopackage_may_grow_but_must_be_a_database(city: City, run: Path) -> None:
    path = run / "buildings.gpkg"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE notes (text TEXT)")
        database.execute("INSERT INTO notes VALUES (?)", ("x" * 10_000,))
    assert unchanged(city)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert not unchanged(city)


def test_a_corrected_world_file_is_a_change(city: City, run: Path) -> None:
    world = city.folder / "tiles" / "tile1.tfw"
    world.write_text("0.3\n0\n0\n-0.3\n5\n5\n")
    assert not unchanged(city)
    map_it(city.config)
    assert unchanged(city)
    world.write_text("0.3\n0\n0\n-0.3\n6\n5\n")
    os.utime(world, ns=(1, 1))
    assert not unchanged(city)


def test_a_run_that_skipped_tiles_tries_them_again(city: City) -> None:
    path = city.folder / "tiles" / "tile2.tif"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert list(map_it(city.config, "on_tile_error=skip").skipped) == [str(path)]
    assert not unchanged(city, "on_tile_error=skip")
    path.write_bytes(whole)
    assert not map_it(city.config, "on_tile_error=skip").skipped
    assert unchanged(city, "on_tile_error=skip")


def test_a_tile_of_a_vrt_that_is_gone_is_left_to_the_plan(city: City, run: Path) -> None:
    names = "".join(
        f"<SimpleSource><SourceFilename>{city.folder}/tiles/tile{i}.tif</SourceFilename></SimpleSource>" for i in (1, 3)
    )
    (city.folder / "city.vrt").write_text(f'<VRTDataset><VRTRasterBand band="1">{names}</VRTRasterBand></VRTDataset>')
    with pytest.raises(UserError, match=r"tile3\.tif"):
        map_it(city.config, "images=city.vrt")
    assert len(map_it(city.config, "images=city.vrt", "on_tile_error=skip").skipped) == 1


def test_tiles_of_a_vrt_in_another_order_are_a_change(city: City) -> None:
    def write_vrt(*order: int) -> None:
        names = "".join(
            f"<SimpleSource><SourceFilename>{city.folder}/tiles/tile{i}.tif</SourceFilename></SimpleSource>"
            for i in order
        )
        vrt = f'<VRTDataset><VRTRasterBand band="1">{names}</VRTRasterBand></VRTDataset>'
        (city.folder / "city.vrt").write_text(vrt)
        os.utime(city.folder / "city.vrt", ns=(1, 1))

    write_vrt(1, 2)
    map_it(city.config, "images=city.vrt")
    assert unchanged(city, "images=city.vrt")
    write_vrt(2, 1)
    assert not unchanged(city, "images=city.vrt")


def test_asking_imports_nothing_heavy(city: City, run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from segpipe.pipeline.config import load_city\n"
        "from segpipe.pipeline.manifest import nothing_changed, check_folder_is_ours\n"
        "assert nothing_changed(load_city(Path(sys.argv[1]))) is not None\n"
        "heavy = {'torch', 'distributed', 'dask', 'rasterio', 'zarr', 'numpy', 'pyogrio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(city.config)], check=True)


# Whose rows they are


def edit(path: Path) -> None:
    table = pyogrio.read_dataframe(path).iloc[:1]
    path.unlink()
    pyogrio.write_dataframe(table, path, layer="buildings")


def published(city: City, threshold: float) -> str:
    return map_it(city.config, f"vectorize.threshold={threshold}").geopackage.name


def test_after_a_second_name_an_untouched_file_is_updated_again(city: City, run: Path) -> None:
    wal = run / "buildings.gpkg-wal"
    wal.touch()
    first = rows_digest(run / "buildings.gpkg")
    assert published(city, 0.3) == "buildings-2.gpkg"
    assert rows_digest(run / "buildings.gpkg") == first
    wal.unlink()
    assert published(city, 0.4) == "buildings.gpkg"
    assert rows_digest(run / "buildings.gpkg") != first


def test_each_file_is_compared_with_what_was_published_under_its_own_name(city: City, run: Path) -> None:
    edit(run / "buildings.gpkg")
    mine = (run / "buildings.gpkg").read_bytes()
    assert published(city, 0.3) == "buildings-2.gpkg"
    assert published(city, 0.4) == "buildings-2.gpkg"
    edit(run / "buildings-2.gpkg")
    assert published(city, 0.3) == "buildings-3.gpkg"
    assert published(city, 0.4) == "buildings-3.gpkg"
    assert (run / "buildings.gpkg").read_bytes() == mine
    (run / "buildings-2.gpkg").unlink()
    assert published(city, 0.3) == "buildings-2.gpkg"
    assert set(json.loads((run / "manifest.json").read_text())["rows_digests"]) == {
        "buildings.gpkg",
        "buildings-2.gpkg",
        "buildings-3.gpkg",
    }


def test_rows_of_killed_runs_are_known_until_others_are_published(tmp_path: Path) -> None:
    for name in ("buildings.gpkg", "buildings-2.gpkg", "buildings-old.gpkg"):
        (tmp_path / name).touch()
    assert revoke(tmp_path, "one") == {"buildings.gpkg": set(), "buildings-2.gpkg": set()}
    assert revoke(tmp_path) == {"buildings.gpkg": {"one"}, "buildings-2.gpkg": {"one"}}
    assert revoke(tmp_path, "two")["buildings.gpkg"] == {"one"}
    assert revoke(tmp_path)["buildings.gpkg"] == {"one", "two"}


# Whose folder it is

OURS = ["mask.tif", "probability.tif", "report.html", "preview.png", "manifest.json", "city.yaml", "store.zarr"]


@pytest.mark.parametrize("name", OURS)
def test_a_folder_with_somebodys_own_file_under_our_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "tile.tif").touch()
    check_folder_is_ours(tmp_path)
    (tmp_path / name).write_text('{"name": "their web application"}')
    with pytest.raises(UserError, match=f"holds {name} of somebody's own.*cure"):
        check_folder_is_ours(tmp_path)


def test_a_folder_that_is_not_there_or_ours_is_not_refused(city: City, run: Path, tmp_path: Path) -> None:
    check_folder_is_ours(tmp_path / "new")
    check_folder_is_ours(run, city.config)
    (run / "manifest.json").write_text("[]")
    check_folder_is_ours(run)
    (run / "settled.json").unlink()
    check_folder_is_ours(run)


def test_what_a_killed_run_has_left_is_ours(city: City, killed_after: Callable[[Path, int], bool]) -> None:
    assert killed_after(city.config, 1)
    (city.folder / "run" / "mask.tif").touch()
    check_folder_is_ours(city.folder / "run")


def test_the_yaml_file_itself_is_not_written_over_and_the_resolved_one_may_be_run(city: City, run: Path) -> None:
    with pytest.raises(UserError, match=r"holds city\.yaml itself"):
        check_folder_is_ours(city.folder, city.config)
    check_folder_is_ours(run, run / "city.yaml")
