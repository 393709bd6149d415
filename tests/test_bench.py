"""The scripts in bench/ are there for everybody: each can be loaded, and says how it is called."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

SCRIPTS = sorted((Path(__file__).parents[1] / "bench").glob("*.py"))


def load(script: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    # As Python does for a script: one may import another.
    monkeypatch.syspath_prepend(script.parent)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_loads_and_names_the_command_that_runs_it(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(script, monkeypatch)
    if "__main__" not in script.read_text():
        assert any(f"from {script.stem} import" in other.read_text() for other in SCRIPTS), "imported by no script"
        return
    assert f"python bench/{script.name}" in (module.__doc__ or "")
    main = getattr(module, "main", None)
    if isinstance(main, click.Command):
        told = CliRunner().invoke(main, ["--help"])
        assert told.exit_code == 0, told.output


def test_the_script_for_gpus_and_its_workers_need_no_library_that_only_publishes_or_trains() -> None:
    missing = ("pyogrio", "geopandas", "lightning", "matplotlib", "kornia", "torchmetrics", "bokeh")
    code = (
        # What is None there cannot be imported.
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "import gpu, segpipe.pipeline.cluster_worker, segpipe.pipeline.stages"
    )
    command, folder = [sys.executable, "-c", code], SCRIPTS[0].parent
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


def test_every_table_of_the_page_of_benchmarks_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = (script for script in SCRIPTS if script.stem == "plots")
    page = tmp_path / "benchmarks.md"
    page.write_bytes((script.parents[1] / "docs" / "benchmarks.md").read_bytes())
    module = load(script, monkeypatch)
    monkeypatch.setattr(module, "PAGE", page)
    module.main()
    assert page.with_suffix(".png").stat().st_size > 10_000
