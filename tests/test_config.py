"""YAML to frozen values: what is wrong is told with the key, what was found, what was expected."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from segpipe.pipeline.config import CityConfig, TrainConfig, _section_of, load_city, load_train
from segpipe.pipeline.inputs import find_images
from segpipe.tasks.errors import UserError

LEAST: dict[str, Any] = {"name": "x", "images": "tiles/*.tif", "model": "m.safetensors", "output": "run"}


def city(folder: Path, **changes: Any) -> Path:
    file = folder / "city.yaml"
    file.write_text(yaml.safe_dump(LEAST | changes))
    return file


def train(folder: Path, **changes: Any) -> Path:
    file = folder / "train.yaml"
    area = {"images": "a.tif", "labels": "b.tif"}
    data = {"name": "t", "areas": [area], "validate": [area], "network": {"name": "n"}, "output": "o"}
    file.write_text(yaml.safe_dump(data | changes))
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
        "module": None,
        "asset": None,
        "bands": (1, 2, 3),
        "scale": None,
        "images_crs": None,
        "nodata": None,
        "nodata_tolerance": "auto",
        "nodata_min_m2": 1000,
        "on_tile_error": "fail",
        "grid": {
            "crs": None,
            "chunk_px": 1024,
            "block_px": "auto",
            "resolution_m": None,
            "sparse": False,
            "area": None,
        },
        "predict": {"halo": "auto", "precision": "auto", "tta": "none"},
        "vectorize": {
            "threshold": None,
            "min_area_m2": 10,
            "fill_holes_m2": 2,
            "simplify_m": 0.3,
            "regularize": "none",
            "regularize_min_iou": 0.8,
        },
        "cluster": {"kind": "local", "workers": "auto", "threads": "auto", "memory": "auto"},
        "publish": {"tile_masks": False},
        "outputs": {"formats": (), "crs": None},
        "storage": {"endpoint": None, "region": None, "anonymous": False},
        "store": {"keep": "all"},
    }


def test_the_resolved_yaml_means_the_same_from_any_folder(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "Wien, Ödland", "nodata": [0, 255], "grid": {"block_px": 2048}}
    config = load_city(city(tmp_path, images=["tiles/*.tif", "/else/a.tif"], **settings))
    again = tmp_path / "run" / "city.yaml"
    again.parent.mkdir()
    again.write_text(config.resolved_yaml(), encoding="utf-8")
    found = load_city(again)
    paths = {"images", "output"}
    assert found.model_dump(exclude=paths) == config.model_dump(exclude=paths)
    assert found.images == (str(tmp_path / "tiles" / "*.tif"), "/else/a.tif")
    assert found.output == str(tmp_path / "run")
    assert found.model == "m.safetensors", "a name that is no file is that of a bundle in the package"
    (tmp_path / "m.safetensors").write_bytes(b"")
    again.write_text(config.resolved_yaml(), encoding="utf-8")
    assert load_city(again).model == str(tmp_path / "m.safetensors")


def test_the_resolved_training_means_the_same_from_any_folder(tmp_path: Path) -> None:
    file, again = train(tmp_path, network={"name": "n", "initialisation": "w.pth"}), tmp_path / "run" / "train.yaml"
    again.parent.mkdir()
    again.write_text(load_train(file).resolved_yaml(), encoding="utf-8")
    found = load_train(again)
    assert found.areas[0].images == (str(tmp_path / "a.tif"),)
    assert found.validate_on[0].labels == (str(tmp_path / "b.tif"),)
    assert found.network.initialisation == str(tmp_path / "w.pth")
    assert found.output == str(tmp_path / "o")
    again.write_text(load_train(train(tmp_path)).resolved_yaml(), encoding="utf-8")
    assert load_train(again).network.initialisation == "lecun"


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
        ({"grid": {"chunk_px": "big"}}, ["grid.chunk_px", '"big"', "whole number"]),
        ({"grid": {"chunk_px": 10}}, ["grid.chunk_px", "10", "64"]),
        ({"grid": {"block_px": "large"}}, ["grid.block_px", '"large"', "auto"]),
        ({"vectorize": {"threshold": 0}}, ["vectorize.threshold", "found 0", "above 0"]),
        ({"vectorize": {"threshold": float("nan")}}, ["vectorize.threshold", "NaN", "up to 1"]),
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


JARGON = ("valid", "dictionary", "instance", "tuple", "string", "input", "pattern", "Config", "item")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grid=5", "grid: found 5; expected keys and values such as {chunk_px: 1024}"),
        (
            "cluster.memory=8",
            "cluster.memory: found 8; expected auto, or a number with GiB, GB, MiB or MB such as 8",
        ),
        ("cluster.memory=8 gib", 'cluster.memory: found "8 gib"; expected auto, or a number with GiB'),
        (
            "bands=1,2,3",
            'bands: found "1,2,3"; expected a list of band numbers from 1, such as [1, 2, 3], or of colours',
        ),
        ("bands=[0]", "bands: found [0]; expected a list of band numbers from 1, such as [1, 2, 3], or of colours"),
        ("bands=[]", "bands: found []; expected a list of band numbers from 1"),
        ("nodata=[0, black]", 'nodata: found [0, "black"]; expected null, a number, or a list of numbers'),
        ("predict.halo=-1", "predict.halo: found -1; expected auto, exact, or a whole number of pixels from 0"),
        # Mistyped, though it could be made to fit
        ("cluster.workers=true", "cluster.workers: found true; expected auto, or a whole number from 1"),
        ("nodata=true", "nodata: found true;"),
        ("nodata_min_m2=true", "nodata_min_m2: found true; expected a number"),
        ("vectorize.threshold='0.4'", 'vectorize.threshold: found "0.4"; expected null, or a number above 0'),
        ("grid.chunk_px='512'", 'grid.chunk_px: found "512"; expected a whole number'),
        ("grid.chunk_px=512.0", "grid.chunk_px: found 512.0; expected a whole number"),
        ("bands=[1, true, 3]", "bands: found [1, true, 3];"),
        ("name=2024", "name: found 2024; expected a text such as vienna"),
        # Paths that are none
        ("output=''", 'output: found ""; expected a folder'),
        ("model=", "model: found null; expected the file of a model bundle"),
        ("model=''", 'model: found "";'),
        ("images=''", 'images: found "";'),
        ('output="a\\0b"', 'output: "a\\u0000b" holds a null character; expected a folder'),
        ('images=[a.tif, "a\\0b"]', 'images: ["a.tif", "a\\u0000b"] holds a null character; expected a glob'),
        ("output=~nobodyx/y", 'output: "~nobodyx/y" names a home folder that is not there; expected a folder'),
        ("model=~nobodyx/y", 'model: "~nobodyx/y" names a home folder that is not there;'),
    ],
)
def test_a_wrong_value_is_told_once_in_plain_words_and_with_its_set(
    tmp_path: Path, override: str, expected: str
) -> None:
    message = refusal(city(tmp_path), override)
    assert message.startswith(f"--set {override}: {expected}"), message
    assert not any(word in message.removeprefix(f"--set {override}") for word in JARGON), message
    assert "city.yaml" not in message
    key = expected.partition(":")[0]
    assert message.removeprefix(f"--set {override}").count(f"{key}: ") == 1, "told once"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("vectorize.simplify_m=1", 1.0),
        ("nodata=0", (0.0,)),
        ("bands=[1, 1, 1]", (1, 1, 1)),
        ("name=a/b", "a/b"),
        ("cluster.memory=8GiB", "8GiB"),
        ("cluster.memory=auto", "auto"),
    ],
)
def test_a_whole_number_is_a_number_and_a_band_may_be_repeated(tmp_path: Path, override: str, value: Any) -> None:
    found: Any = load_city(city(tmp_path), [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


def test_a_fault_is_told_of_where_it_comes_from(tmp_path: Path) -> None:
    file = city(tmp_path, bands=[0], vectorize={"threshold": 7})
    message = refusal(file, "vectorize.threshold=9", "vectorise.threshold=1", "grid.chunk_px=1")
    assert message.split("; --set ") == [
        f"{file}: bands: found [0]; expected a list of band numbers from 1, such as [1, 2, 3], or of colours",
        "grid.chunk_px=1: grid.chunk_px: found 1; expected a whole number of pixels from 64 to 8192",
        "vectorize.threshold=9: vectorize.threshold: found 9;"
        " expected null, or a number above 0 and up to 1 such as 0.4",
        "vectorise.threshold=1: vectorise: unknown key; did you mean vectorize?",
    ]
    assert load_city(file, ["vectorize.threshold=0.5", "bands=[1]"]).bands == (1,)


def test_keys_that_are_no_text_are_unknown(tmp_path: Path) -> None:
    file = city(tmp_path, grid={1: 2})
    assert "grid.1: unknown key; known here: area, block_px" in refusal(file)


@pytest.mark.parametrize("job", [CityConfig, TrainConfig])
def test_every_key_says_what_is_expected(job: type[BaseModel]) -> None:
    def silent(kind: type[BaseModel]) -> Iterator[str]:
        for name, field in kind.model_fields.items():
            if not field.description:
                yield f"{kind.__name__}.{name}"
            if (section := _section_of(field.annotation)) is not None:
                yield from silent(section)

    assert not list(silent(job))


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
        ("- a\n- b\n", ["a list", "keys and values"]),
        ("just words", ["just words", "keys and values"]),
        ("5", ["found 5", "keys and values"]),
        ("", ["nothing", "keys and values"]),
        ("made: 2024-99-99", ["not YAML"]),
        ("name: 'a\0b'", ["not YAML"]),
        ("name: [1\nimages: x", ["not YAML", "line"]),
        ("name: !!python/object:os.system x", ["not YAML"]),
        ("nodata: 0\nname: here\nnodata: 255", ["line 3: found the key nodata again, which is in line 1 too"]),
        ("grid: {halo_px: 32, block_px: 1024, halo_px: 64}", ["found the key halo_px again"]),
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
        ("name.first=x", "no keys below it"),
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
    assert load_train(train(tmp_path)).validate_on[0].labels == ("b.tif",)
    with pytest.raises(UserError, match=r"areas\.0\.label: unknown key; did you mean labels\?"):
        load_train(train(tmp_path, areas=[{"images": "a.tif", "label": "c.tif"}]))
    with pytest.raises(UserError, match=r"areas: found \[5\]; expected a list such as"):
        load_train(train(tmp_path, areas=[5]))
    with pytest.raises(UserError, match=r"output: .*is no folder of this machine; expected a folder"):
        load_train(train(tmp_path, output="s3://bucket/run"))


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
