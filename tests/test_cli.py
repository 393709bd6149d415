"""The command line: one line and an exit code for whatever goes wrong, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rasterio
from click.testing import CliRunner, Result
from conftest import ORIGIN, City, draw_blobs, map_it, outputs, stages_since, tasks_done, write_tile

from segpipe.models.networks import NETWORKS
from segpipe.pipeline import cli, evaluate, rasters, run, stages
from segpipe.pipeline import plan as plan_module
from segpipe.pipeline.cli import main
from segpipe.pipeline.lock import locked
from segpipe.pipeline.manifest import read_manifest
from segpipe.tasks.errors import TileError, UnreachableError

MakeCity = Callable[..., City]

pytestmark = pytest.mark.usefixtures("in_process", "signals")


@pytest.fixture
def city(make_city: MakeCity) -> City:
    return make_city(1, 2, tile_px=128, nodata=None, grid={"chunk_px": 64, "block_px": 64})


def segpipe(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    """What was told of an error: one line, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("segpipe: ")]
    assert "Traceback" not in result.output + result.stderr
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["train", "--help"], ["predict", "--help"], ["models", "list", "--help"]],
)
def test_help_is_told_without_importing_anything_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from segpipe.pipeline.cli import main; main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'dask', 'numpy', 'rasterio', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Usage:")


def test_a_run_says_what_it_made_and_a_second_that_nothing_has_changed(city: City) -> None:
    first = segpipe("run", city.config)
    assert first.exit_code == 0, first.stderr
    assert "buildings" in first.stdout
    assert str(city.folder / "run" / "buildings.gpkg") in first.stdout
    again = segpipe("run", city.config)
    assert again.exit_code == 0
    assert "nothing has changed since" in again.stdout
    fresh = segpipe("run", "--fresh", city.config)
    assert "nothing has changed" not in fresh.stdout
    changed = segpipe("run", city.config, "--set", "vectorize.threshold=0.3")
    assert changed.exit_code == 0
    assert "nothing has changed" not in changed.stdout


def test_a_dry_run_tells_the_plan_and_writes_nothing(city: City) -> None:
    before = sorted(city.folder.rglob("*"))
    found = segpipe("run", "--dry-run", city.config)
    assert found.exit_code == 0, found.stderr
    for label in ("tiles", "lattice", "grid", "halo", "recipe", "disk", "workers", "seconds", "invalid"):
        assert f"{label:>10}  " in found.stdout
    assert sorted(city.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runn"], ["No such command 'runn'", "segpipe --help"]),
        (["run"], ["Missing argument 'CITY'", "segpipe run --help"]),
        (["run", "--dryrun", "city.yaml"], ["--dryrun", "segpipe run --help"]),
        (["demo", "x", "--seed", "a"], ["--seed", "'a' is not a valid integer"]),
        (["run", "city.yaml", "--dry-run", "--fresh"], ["--dry-run only prints the plan", "--fresh does nothing"]),
        (["run", "city.yaml", "--dry-run", "--scheduler", "tcp://x:1"], ["--dry-run", "--scheduler does nothing"]),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    found = segpipe(*arguments)
    assert found.exit_code == 2
    assert found.stderr == one_line(found) + "\n"
    assert not found.stdout
    assert all(word in found.stderr for word in words), found.stderr


def test_the_bundles_and_the_networks_are_listed() -> None:
    found = segpipe("models", "list")
    assert "buildings-mobilenetv2: unet-mobilenetv2, 0.3 m a pixel" in found.stdout
    assert f"networks that can be trained: {', '.join(NETWORKS)}" in found.stdout


BAD: list[tuple[str, Callable[[City], Path], list[str]]] = [
    ("no yaml", lambda c: c.folder / "none.yaml", ["none.yaml", "cannot be read"]),
    ("misspelt key", lambda c: c.set(vectorise={}), ["vectorise", "did you mean vectorize?"]),
    ("mistyped key", lambda c: c.set(grid={"chunk_px": "big"}), ["grid.chunk_px", "big"]),
    ("no tile", lambda c: c.set(images="none/*.tif"), ["none/*.tif matches no file"]),
    ("no model", lambda c: c.set(model="none.safetensors"), ["model:", "none.safetensors"]),
    ("output is a file", lambda c: c.set(output="city.yaml"), ["output:", "city.yaml is a file"]),
    ("block of parts", lambda c: c.set(grid={"chunk_px": 64, "block_px": 100}), ["100", "multiple of 64"]),
    ("too little memory", lambda c: c.set(cluster={"memory": "100 MiB"}), ["cluster.memory", "0.1 GiB", "cure"]),
]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_users_mistake_is_one_line_and_exit_code_2(
    city: City, make: Callable[[City], Path], words: list[str]
) -> None:
    found = segpipe("run", make(city))
    assert found.exit_code == 2
    message = one_line(found)
    assert all(word in message for word in words), message
    assert not (city.folder / "run").exists()


def test_yaml_that_is_no_mapping_is_exit_code_2(city: City) -> None:
    city.config.write_text("- tiles\n- model\n")
    found = segpipe("run", city.config)
    assert found.exit_code == 2
    assert "expected keys and values" in one_line(found)


def test_a_tile_that_is_text_and_one_without_crs_are_exit_code_2(city: City) -> None:
    (city.folder / "tiles" / "tile2.tif").write_text("this is no raster")
    found = segpipe("run", city.config)
    assert found.exit_code == 2
    assert "tile2.tif" in one_line(found)
    write_tile(city.folder / "tiles" / "tile2.tif", draw_blobs(64, 64), ORIGIN[0], ORIGIN[1] + 128, crs=None)
    found = segpipe("run", city.config)
    assert found.exit_code == 2
    assert "images_crs:" in one_line(found)


def test_a_cut_tile_with_overviews_is_exit_code_2_or_left_out(city: City) -> None:
    path = city.folder / "tiles" / "tile2.tif"
    with rasterio.open(path, "r+") as tile:
        tile.build_overviews([2, 4])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = segpipe("run", city.config)
    assert found.exit_code == 2
    assert f"{path}: truncated, " in one_line(found)
    found = segpipe("run", city.config, "--set", "on_tile_error=skip")
    assert found.exit_code == 0, found.stderr
    assert list(read_manifest(city.folder / "run")["skipped"]) == [str(path)]


@pytest.fixture
def damaged_tile(city: City) -> Path:
    """A tile of the city that ends its decoding in the middle; its header is whole."""
    path = city.folder / "tiles" / "tile2.tif"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 5000] = b"\xff" * 5000
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("scale", [None, "auto"])
def test_a_dry_run_leaves_out_the_damaged_tile_that_a_run_leaves_out(
    city: City, damaged_tile: Path, scale: str | None
) -> None:
    config = city.set(nodata=0, on_tile_error="skip", scale=scale)
    found = segpipe("run", "--dry-run", config)
    assert found.exit_code == 0, found.stderr
    (line,) = [line for line in found.stdout.splitlines() if line.startswith(f"{'left out':>10}  ")]
    assert f"{damaged_tile}: cannot be read" in line
    assert segpipe("run", config).exit_code == 0
    assert list(read_manifest(city.folder / "run")["skipped"]) == [str(damaged_tile)]


def test_a_dry_run_fails_at_a_tile_at_which_a_run_fails(
    city: City, damaged_tile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = segpipe("run", "--dry-run", city.set(nodata=0))
    assert found.exit_code == 1
    assert f"{damaged_tile}: cannot be read" in one_line(found)

    def silent(tile: Any, *_: Any) -> Any:
        raise UnreachableError(tile.path, "the server does not answer")

    monkeypatch.setattr(run, "scan_tile", silent)
    found = segpipe("run", "--dry-run", city.set(nodata=0, on_tile_error="skip"))
    assert found.exit_code == 1
    assert "the server does not answer" in one_line(found)


def test_a_pickle_is_no_model(city: City) -> None:
    import torch

    torch.save({"weight": torch.zeros(3)}, city.folder / "model.safetensors")
    found = segpipe("run", city.set(model="model.safetensors"))
    assert found.exit_code == 2
    assert "never loaded as a bundle" in one_line(found)


def test_debug_shows_where_an_error_comes_from(city: City) -> None:
    found = segpipe("run", "--debug", city.set(model="none.safetensors"))
    assert found.exc_info is not None
    assert found.exc_info[0] is not SystemExit


def test_a_second_run_in_the_same_folder_is_exit_code_2(city: City) -> None:
    (city.folder / "run").mkdir()
    with locked(city.folder / "run"):
        found = segpipe("run", city.config)
    assert found.exit_code == 2
    assert f"process {os.getpid()}" in one_line(found)


def test_a_tile_that_breaks_mid_run_is_exit_code_1_and_the_run_resumes(
    city: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        scan = stages.scan_tile

        def broken(tile: Any, *arguments: Any) -> Any:
            if tile.path.endswith("tile2.tif"):
                raise TileError(tile.path, "cannot be read: input/output error")
            return scan(tile, *arguments)

        patch.setattr(stages, "scan_tile", broken)
        found = segpipe("run", city.config)
    assert found.exit_code == 1
    message = one_line(found)
    assert all(word in message for word in ("tile2.tif", "input/output error", "run the same command again")), message
    before = tasks_done(city.folder / "run")
    assert any(stage == "vectorize" for stage, _ in before), "what can be done is done"
    assert segpipe("run", city.config).exit_code == 0
    assert set(tasks_done(city.folder / "run").values()) == {1}


@pytest.fixture
def killed_while_dropping(city: City, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Run the city and kill it when it has published all and dropped nothing yet; gives its YAML."""

    def kill(keep: str) -> Path:
        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        config = city.set(store={"keep": keep})
        with monkeypatch.context() as patch:
            patch.setattr(run, "drop_store", killed)
            assert segpipe("run", config).exit_code == 1
        return config

    return kill


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        ("none", ()),
        ("none", ("store.zarr", "ledger/read")),
        ("probability", ()),
        ("probability", ("ledger/read", "store.zarr/image/zarr.json")),
        ("probability", ("ledger/read", "store.zarr/image")),
    ],
)
def test_killed_while_the_store_is_dropped_the_next_command_drops_the_rest_and_does_nothing_else(
    city: City, killed_while_dropping: Callable[[str], Path], keep: str, gone: tuple[str, ...]
) -> None:
    config, folder = killed_while_dropping(keep), city.folder / "run"
    for name in gone:
        remove = shutil.rmtree if (folder / name).is_dir() else Path.unlink
        remove(folder / name)
    before = files_below(folder)
    again = segpipe("run", config)
    assert again.exit_code == 0, again.stderr
    assert "nothing has changed" in again.stdout
    found = files_below(folder)
    assert found == {name: data for name, data in before.items() if name in found}
    assert segpipe("run", config, "--set", "output=other").exit_code == 0
    assert found.keys() == files_below(city.folder / "other").keys()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_while_another_run_is_at_work_nothing_is_dropped(
    city: City, killed_while_dropping: Callable[[str], Path]
) -> None:
    config = killed_while_dropping("none")
    with locked(city.folder / "run"):
        before = files_below(city.folder / "run")
        found = segpipe("run", config)
        assert files_below(city.folder / "run") == before
    assert found.exit_code == 2
    assert "another run is at work" in one_line(found)


def test_what_a_killed_run_with_other_settings_has_done_is_not_dropped_by_a_command_with_the_old_ones(
    city: City, killed_while_dropping: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = killed_while_dropping("none"), city.folder / "run"
    other = ("--set", "vectorize.threshold=0.3")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_joins", killed)
        assert segpipe("run", config, *other).exit_code == 1
    before = tasks_done(folder)
    assert "nothing has changed" in segpipe("run", config).stdout
    assert segpipe("run", config, *other).exit_code == 0
    assert set(stages_since(folder, before)) == {"join", "publish"}
    assert not (folder / "store.zarr").exists()


def test_a_second_run_without_a_store_imports_nothing_heavy(city: City) -> None:
    config = city.set(store={"keep": "none"})
    assert segpipe("run", config).exit_code == 0
    code = (
        "import sys; from segpipe.pipeline.cli import main; main(['run', sys.argv[1]], standalone_mode=False)\n"
        "heavy = {'torch', 'distributed', 'dask', 'rasterio', 'zarr', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "nothing to do" in found.stdout


def test_ctrl_c_is_exit_code_1_and_says_how_to_resume(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_joins", interrupted)
    found = segpipe("run", city.config)
    assert found.exit_code == 1
    assert "run the same command again" in one_line(found)
    assert not (city.folder / "run" / "lock.json").exists()


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), OSError(5, "Input/output error"), KeyError("x")])
def test_only_a_command_that_keeps_something_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, cause: BaseException
) -> None:
    def broken(*_: Any) -> None:
        raise cause

    monkeypatch.setattr(evaluate, "evaluate_to", broken)
    found = segpipe("evaluate", ".", "--truth", "x.tif")
    assert found.exit_code == 1
    assert "kept" not in one_line(found)
    assert "again" not in one_line(found)


@pytest.mark.parametrize("module", ["click", "pydantic"])
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(city: City, module: str) -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from segpipe.pipeline.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "run", str(city.config)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.startswith("segpipe: stopped")
    assert found.stderr.count("\n") == 1


def test_a_second_ctrl_c_does_not_disturb_the_closing_unless_that_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a process that a script has started with &
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cli._take_signals()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(cli, "CLOSING_S", -1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk in memory, or change the one that is."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    is_mounted = False

    def mount(options: str) -> Path:
        nonlocal is_mounted
        remount = "remount," if is_mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        is_mounted = True
        return folder

    yield mount
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_output_that_is_not_writable_is_exit_code_2(city: City, mounted: Callable[[str], Path]) -> None:
    folder = mounted("ro,size=1m") if os.geteuid() == 0 else city.folder / "closed"
    if os.geteuid():
        folder.mkdir(mode=0o500)
    for output in (folder, folder / "run"):
        found = segpipe("run", city.set(output=str(output)))
        assert found.exit_code == 2
        assert "not writable" in one_line(found)


def test_a_disk_that_fills_up_mid_run_is_exit_code_1_and_nothing_is_lost(
    city: City, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    map_it(city.config)
    whole = tasks_done(city.folder / "run")
    monkeypatch.setattr(plan_module, "_check_disk", lambda *_: None)
    monkeypatch.setattr(rasters, "GDAL_CACHE_BYTES", 2**20)
    output = mounted("size=48k") / "run"
    config = city.set(output=str(output))
    failures = 0
    before: Counter[tuple[str, str]] = Counter()
    for kilobytes in [*range(96, 1600, 128), 16_000]:
        found = segpipe("run", config)
        if found.exit_code == 0:
            break
        failures += 1
        assert found.exit_code == 1, found.stderr
        message = one_line(found)
        assert any(word in message for word in ("No space left", "full")), message
        if (output / "tasks.jsonl").exists():
            done = tasks_done(output)
            assert not before - done, "what was done stays done"
            before = done
        mounted(f"size={kilobytes}k")
    assert failures >= 4
    assert found.exit_code == 0, found.stderr
    assert outputs(output) == outputs(city.folder / "run")
    assert set(tasks_done(output)) <= set(whole)
    assert not list(output.rglob("*partial*"))
