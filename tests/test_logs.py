"""What a run tells, kept in a file, and as lines of JSON for machines."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import City

from segpipe.pipeline import run
from segpipe.pipeline.cli import main
from segpipe.tasks.errors import RunError

MakeCity = Callable[..., City]

pytestmark = pytest.mark.usefixtures("in_process", "signals")


@pytest.fixture
def city(make_city: MakeCity) -> City:
    return make_city(1, 2, tile_px=128, nodata=None, grid={"chunk_px": 64, "block_px": 64})


def segpipe(*arguments: object) -> tuple[int, str]:
    """Exit code, and what was told on standard error."""
    found = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return found.exit_code, found.stderr


def test_a_log_file_has_what_was_told_and_is_appended_to(city: City, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    for fresh in ([], ["--fresh"]):
        code, told = segpipe("run", city.config, "--log-file", log, *fresh)
        assert code == 0, told
    lines = log.read_text().splitlines()
    assert sum("      grid  " in line for line in lines) == 2
    assert all(" INFO " in line for line in lines)


def test_lines_of_json_tell_all_that_words_do_and_nothing_else_is_on_standard_error(city: City, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    code, told = segpipe("run", city.config, "--log-file", log, "--log-format", "json")
    assert code == 0, told
    records = [json.loads(line) for line in told.splitlines()]
    assert log.read_text().splitlines() == told.splitlines()
    assert any("chunks of 64 px" in it["message"] for it in records)
    stages = next(it["stages"] for it in reversed(records) if it["event"] == "progress")
    assert stages["predict"]["units"] == stages["predict"]["total"] > 0
    assert stages["read"]["pixels"] > 0


@pytest.mark.parametrize(("made_by", "expected"), [("a mistake", 2), ("a failure", 1)])
def test_the_end_of_a_run_that_fails_is_a_line_of_json_too(
    city: City, monkeypatch: pytest.MonkeyPatch, made_by: str, expected: int
) -> None:
    def failing(*_: object) -> None:
        raise RunError("block 3_4 is too much")

    if made_by == "a failure":
        monkeypatch.setattr(run, "run_joins", failing)
    output = [] if made_by == "a failure" else ["--set", "output=city.yaml"]
    code, told = segpipe("run", city.config, "--log-format", "json", *output)
    assert code == expected
    last = json.loads(told.splitlines()[-1])
    assert (last["event"], last["level"], last["exit_code"]) == ("end", "error", expected)
    assert last["message"].startswith("segpipe: ")


def test_a_log_file_that_cannot_be_written_is_a_mistake(city: City, tmp_path: Path) -> None:
    code, told = segpipe("run", city.config, "--log-file", tmp_path / "none" / "log.txt")
    assert code == 2
    assert told.startswith(f"segpipe: --log-file {tmp_path}/none/log.txt: No such file or directory; expected ")
    assert not (city.folder / "run").exists()
