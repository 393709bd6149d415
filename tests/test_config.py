"""YAML to frozen values: what is wrong is told with the key, what was found, what was expected."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from segpipe.pipeline.config import CityConfig, load_city, load_train
from segpipe.pipeline.inputs import find_images
from segpipe.tasks.errors import UserError

LEAST: dict[str, Any] = {"name": "x", "images": "tiles/*.tif", "model": "m.safetensors", "output": "run"}


def city(folder: Path, **changes: Any) -> Path:
    file = folder / "city.yaml"
    file.write_text(yaml.safe_dump(LEAST | changes))
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_city(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_least_that_works_has_the_defaults_of_the_contract(tmp_path: Path) -> None:
    config = load_city(city(tmp_path))
    assert config.images == ("tiles/*.tif",)
    assert config.model_dump(exclude=set(LEAST)) == {
        "asset": None,
        "bands": (1, 2, 3),
        "images_crs": None,
        "nodata": None,
        "nodata_tolerance": "auto",
        "nodata_min_m2": 1000,
        "on_tile_error": "fail",
        "grid": {"crs": None, "chunk_px": 1024, "block_px": "auto", "resolution_m": None, "area": None},
        "predict": {"halo": "auto", "precision": "auto", "tta": "none"},
        "vectorize": {
            "threshold": None,
            "min_area_m2": 10,
            "fill_holes_m2": 2,
            "simplify_m": 0.3,
            "regularize": "none",
        },
        "cluster": {"kind": "local", "workers": "auto", "threads": "auto", "memory": "auto"},
        "store": {"keep": "all"},
    }


def test_the_resolved_yaml_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_city(city(tmp_path, name="Wien, Ödland", nodata=[0, 255], grid={"block_px": 2048}))
    again = tmp_path / "again.yaml"
    again.write_text(config.resolved_yaml(), encoding="utf-8")
    assert load_city(again).model_dump() == config.model_dump()


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load_city(city(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vectorise": {}}, ["vectorise", "did you mean vectorize?"]),
        ({"vectorize": {"treshold": 0.4}}, ["vectorize.treshold", "did you mean threshold?"]),
        ({"grid": {"chunk": 512}}, ["grid.chunk", "did you mean chunk_px?"]),
        ({"zzz": 1}, ["zzz", "known here:", "images"]),
        ({"bands": "red"}, ["bands", '"red"']),
        ({"grid": {"chunk_px": "big"}}, ["grid.chunk_px", '"big"', "integer"]),
        ({"grid": {"chunk_px": 10}}, ["grid.chunk_px", "10", "64"]),
        ({"grid": {"block_px": "large"}}, ["grid.block_px", '"large"', "auto"]),
        ({"vectorize": {"threshold": 0}}, ["vectorize.threshold", "0", "greater than 0"]),
        ({"vectorize": {"threshold": float("nan")}}, ["vectorize.threshold", "finite"]),
        ({"vectorize": None}, ["vectorize", "null"]),
        ({"predict": {"halo": "none"}}, ["predict.halo", '"none"', "auto"]),
        ({"on_tile_error": "ignore"}, ["on_tile_error", '"ignore"', "skip"]),
        ({"cluster": {"memory": "lots"}}, ["cluster.memory", '"lots"']),
        ({"name": ""}, ["name"]),
        ({"images": []}, ["images"]),
    ],
)
def test_a_wrong_key_is_named_with_what_was_found_and_expected(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    message = refusal(city(tmp_path, **changes))
    assert all(word in message for word in ["city.yaml", *words]), message


def test_every_wrong_key_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(city(tmp_path, bandz=[1], vectorize={"simplify": 1}))
    assert "bandz" in message
    assert "vectorize.simplify" in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "city.yaml"
    file.write_text("name: x\nimages: a.tif\noutput: run\n")
    assert "model: missing" in refusal(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", ["a list", "mapping"]),
        ("just words", ["a str", "mapping"]),
        ("", ["nothing", "mapping"]),
        ("name: [1\nimages: x", ["not YAML", "line"]),
        ("name: !!python/object:os.system x", ["not YAML"]),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "city.yaml"
    file.write_text(text)
    message = refusal(file)
    assert all(word in message for word in words), message


def test_a_file_that_is_absent_or_binary_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read" in refusal(tmp_path / "binary.yaml")


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = city(tmp_path, vectorize={"threshold": 0.3})
    config = load_city(file, ["vectorize.threshold=0.4", "grid.block_px=2048", "nodata=[0, 255]", "name=a=b"])
    assert (config.vectorize.threshold, config.grid.block_px, config.nodata) == (0.4, 2048, (0, 255))
    assert config.name == "a=b"


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("vectorize.threshold", "expected key.path=value"),
        ("=1", "expected key.path=value"),
        ("name.first=x", "no mapping"),
        ("vectorize.treshold=1", "did you mean threshold?"),
        ("nodata=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, word: str) -> None:
    assert word in refusal(city(tmp_path), override)


def test_paths_are_relative_to_the_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b ü").mkdir()
    file = city(tmp_path / "a b ü")
    monkeypatch.chdir(tmp_path)
    assert load_city(file.relative_to(tmp_path)).path("run") == tmp_path / "a b ü" / "run"
    assert load_city(file).path("/else/where") == Path("/else/where")


def test_a_training_job_is_read_with_its_own_names(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    area = {"images": "a.tif", "labels": "b.tif"}
    data: dict[str, Any] = {"name": "t", "areas": [area], "validate": [area], "network": {"name": "n"}, "output": "o"}
    file.write_text(yaml.safe_dump(data))
    assert load_train(file).validate_on[0].labels == ("b.tif",)
    file.write_text(yaml.safe_dump(data | {"areas": [area | {"label": "c.tif"}]}))
    with pytest.raises(UserError, match=r"areas\.0\.label: unknown key; did you mean labels\?"):
        load_train(file)


# Which files are meant by `images:`


def images(folder: Path, *patterns: str) -> list[str]:
    config = CityConfig.model_validate(LEAST | {"images": list(patterns)})
    config._file = folder / "city.yaml"
    return [Path(path).name for path in find_images(config.images, config)]


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    (tmp_path / "tiles").mkdir()
    for name in ("tile10.tif", "tile2.tif", "tile1.tif", "notes.txt"):
        (tmp_path / "tiles" / name).write_text("")
    return tmp_path


def test_tiles_are_in_natural_order(tiles: Path) -> None:
    assert images(tiles, "tiles/*.tif") == ["tile1.tif", "tile2.tif", "tile10.tif"]


def test_a_folder_stands_for_the_rasters_in_it(tiles: Path) -> None:
    assert images(tiles, "tiles") == ["tile1.tif", "tile2.tif", "tile10.tif"]


def test_a_list_keeps_its_order(tiles: Path) -> None:
    assert images(tiles, "tiles/tile10.tif", "tiles/tile1.tif") == ["tile10.tif", "tile1.tif"]


def test_a_vrt_stands_for_its_sources(tiles: Path) -> None:
    sources = "".join(
        f'<SimpleSource><SourceFilename relativeToVRT="1">tiles/{name}</SourceFilename></SimpleSource>'
        for name in ("tile2.tif", "tile1.tif", "tile2.tif")
    )
    (tiles / "city.vrt").write_text(f"<VRTDataset><VRTRasterBand>{sources}</VRTRasterBand></VRTDataset>")
    assert images(tiles, "city.vrt") == ["tile2.tif", "tile1.tif"]


def test_a_pattern_without_a_match_is_refused_with_the_folder(tiles: Path) -> None:
    with pytest.raises(UserError, match=r"images: tiles/\*\.jp2 matches no file in .*expected a glob"):
        images(tiles, "tiles/*.jp2")


def test_a_tile_named_twice_is_refused(tiles: Path) -> None:
    with pytest.raises(UserError, match=r"tile2\.tif is named twice"):
        images(tiles, "tiles/*.tif", "tiles/tile2.tif")


def test_what_a_run_has_published_is_no_tile_of_the_next(tiles: Path) -> None:
    (tiles / "run").mkdir()
    (tiles / "run" / "mask.tif").write_text("")
    assert images(tiles, "**/*.tif") == ["tile1.tif", "tile2.tif", "tile10.tif"]
