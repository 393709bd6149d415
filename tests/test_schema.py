"""Laws of the schemas: they take every YAML of ours, refuse what the programme refuses, and lie in conf as they are."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from segpipe.pipeline.config import load_city, load_train
from segpipe.pipeline.schema import KINDS, schema_text
from segpipe.tasks.errors import UserError

CONF = Path(__file__).parent.parent / "conf"
JOBS = [path for path in sorted(CONF.rglob("*.yaml")) if re.search("^name:", path.read_text("utf-8"), re.MULTILINE)]
CITY = {"name": "a", "images": "*.tif", "model": "m", "output": "o"}


def validator(kind: str) -> Any:
    schema = json.loads(schema_text(kind))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def kind_of(path: Path) -> str:
    return "train" if path.parent.name == "train" else "city"


@pytest.mark.parametrize("kind", KINDS)
def test_the_schemas_in_conf_are_those_that_the_command_prints(kind: str) -> None:
    found = (CONF / f"{kind}.schema.json").read_text(encoding="utf-8")
    assert found == schema_text(kind), f"segpipe schema {kind} > conf/{kind}.schema.json"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_in_conf_names_its_schema_and_follows_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / name).resolve() == CONF / f"{kind_of(path)}.schema.json"
    validator(kind_of(path)).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"images": ["a.tif", "b/*.tif"], "nodata": [0, 255]},
        {"nodata": 0, "bands": ["nir", "red", 3], "grid": {"area": [0, 1, 2, 3]}},
        {"grid": {"area": "district.gpkg", "block_px": 2048}},
        {"colour": "red"},
        {"grid": {"chunk": 512}},
        {"grid": {"chunk_px": "512"}},
        {"grid": {"area": [0, 1, 2]}},
        {"bands": []},
        {"bands": [0]},
        {"on_tile_error": "ignore"},
        {"vectorize": {"threshold": 2}},
        {"name": ""},
        {"images": []},
        {"nodata": "white"},
    ],
)
def test_the_schema_refuses_what_the_programme_refuses(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "city.yaml"
    path.write_text(yaml.safe_dump(CITY | changes))
    try:
        load_city(path)
        is_right = True
    except UserError:
        is_right = False
    assert validator("city").is_valid(CITY | changes) == is_right


@pytest.mark.parametrize("change", [{"fit": {"epochs": 0}}, {"areas": [{"images": "a"}]}, {"split": {"validate": 0.2}}])
def test_so_it_is_with_trainings(tmp_path: Path, change: dict[str, Any]) -> None:
    values = {"name": "a", "network": {"name": "unet"}, "output": "o"} | change
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        load_train(path)
        is_right = True
    except UserError:
        is_right = False
    assert validator("train").is_valid(values) == is_right


def test_every_key_says_what_is_expected_there() -> None:
    for kind in KINDS:
        schema = json.loads(schema_text(kind))
        for section in (schema, *schema["$defs"].values()):
            for key, value in section.get("properties", {}).items():
                assert value.get("description"), key
