"""Blocks that kill their worker, whatever it is tried: the rest is finished, they are named, and tried again later."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import City, map_it, outputs, tasks_done
from deeds import DEED, DIARY, fragile_city
from distributed import Nanny, Status

from segpipe.pipeline.cluster_fork import forking
from segpipe.tasks.errors import RunError


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    return fragile_city(tmp_path_factory.mktemp("fragile"))


def fails(city: City, deed: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[str, int]:
    """What is told of a run in which one block does a deed, and how often it did it."""
    diary = city.folder / "diary.txt"
    diary.unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setenv(DEED, deed)
        patch.setenv(DIARY, str(diary))
        with pytest.raises(RunError) as caught, forking():
            map_it(city.config, f"output={deed}", *overrides)
    assert caught.value.exit_code == 1
    return str(caught.value), diary.read_text().count("\n")


def others_are_done(city: City, folder: Path) -> None:
    """All but one block are done."""
    twin = tasks_done(city.folder / "twin")
    blocks = {unit for stage, unit in twin if stage == "predict"}
    done = tasks_done(folder)
    missing = {unit for unit in blocks if ("vectorize", unit) not in done}
    assert len(missing) == 1


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take long to be started anew, as they do on a machine that is busy."""
    start = Nanny.instantiate

    async def starting(nanny: Nanny) -> Any:
        if nanny.status is Status.running:
            await asyncio.sleep(3)
        return await start(nanny)

    monkeypatch.setattr(Nanny, "instantiate", starting)


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize(
    ("deed", "told"),
    [
        ("exit", ["the process", "exited with status 7", "it ended itself"]),
        ("memory", ["of a limit of", "the plan's estimate is", "cure: more memory"]),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_block_that_kills_its_worker_twice_is_set_aside_and_only_it_is_done_by_the_next_run(
    city: City, monkeypatch: pytest.MonkeyPatch, deed: str, told: list[str], workers: int
) -> None:
    settings = [f"cluster.workers={workers}", f"cluster.memory={1.5 * workers} GiB", f"output={deed}{workers}"]
    message, times = fails(city, deed, monkeypatch, *settings)
    assert times == 2
    assert message.startswith("predict ")
    assert all(words in message for words in (*told, "died twice", "run the same command again")), message
    assert "\n" not in message
    folder = city.folder / f"{deed}{workers}"
    others_are_done(city, folder)
    before = tasks_done(folder)
    with forking():
        map_it(city.config, *settings)
    assert outputs(folder) == outputs(city.folder / "twin")
    again = tasks_done(folder) - before
    assert sum(stage in ("predict", "vectorize") for stage, _ in again) == 2
    assert not {stage for stage, _ in again} & {"scan", "read"}


def test_a_gpu_that_runs_out_of_memory_ends_the_run_and_the_setting_to_lower_is_named(
    city: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, times = fails(city, "oom", monkeypatch)
    assert times == 1
    assert "grid: {block_px: …}" in message, message
