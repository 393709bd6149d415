"""A SLURM of one node with two GPUs that are none: jobs are asked for, lost, replaced and given back, and the bytes
are those of this process.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import City, map_it, outputs, tasks_done
from deeds import DEED, DIARY, fragile_city

from segpipe.pipeline import cluster_slurm
from segpipe.pipeline.cluster import Outcome
from segpipe.pipeline.cluster_pool import Distributed, workers_of
from segpipe.pipeline.cluster_slurm import SlurmJobs
from segpipe.pipeline.config import load_city
from segpipe.pipeline.run import check_cluster
from segpipe.tasks.errors import RunError, UserError

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
GPU = "--gres=gpu:1"


def free_ports() -> int:
    """The first of two ports that nobody has."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install and start SLURM, as only root can."""
    if os.getuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("SLURM's daemons are started by root on Linux")
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
        if shutil.which("apt-get") is None or subprocess.run(install, capture_output=True, check=False).returncode:
            pytest.skip("no SLURM, and apt-get cannot install slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {"SLURM_PORT": str(free_ports())}
    up = subprocess.run(
        ["bash", str(HERE / "slurm_up.sh"), str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert up.returncode == 0, up.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        # Jobs begin in a shell of their own: they find the network of these tests by this.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield
        subprocess.run(["bash", str(HERE / "slurm_down.sh"), str(folder)], capture_output=True, check=False)


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    return fragile_city(tmp_path_factory.mktemp("fragile"))


@pytest.fixture
def on_slurm(slurm: None, city: City) -> Callable[..., Path]:
    """The city's YAML with jobs of SLURM."""

    def make(**changes: Any) -> Path:
        jobs = {"cores": 1, "memory": "1536 MiB"}
        cluster = {
            "kind": "slurm",
            "threads": 1,
            "interface": "lo",
            "log_directory": "logs",
            "cpu": jobs,
            "gpu": jobs | {"count": 2, "directives": [GPU]},
        }
        return city.set(cluster=cluster | changes)

    return make


def jobs_end() -> bool:
    """Wait until no job is there: one that was cancelled is still completing for a moment."""
    deadline = time.monotonic() + 120
    while jobs_there() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not jobs_there()


def jobs_there() -> list[str]:
    found = subprocess.run(["squeue", "-h", "-o", "%j %i"], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


def when_predicted(patch: pytest.MonkeyPatch, count: int, deed: Callable[[Distributed], None]) -> None:
    """Do something once so many blocks are predicted."""
    take_next, done = Distributed.next, []

    def watching(self: Distributed) -> Outcome:
        outcome = take_next(self)
        if outcome.task.gpu:
            done.append(outcome)
            if len(done) == count:
                deed(self)
        return outcome

    patch.setattr(Distributed, "next", watching)


def test_two_jobs_with_a_gpu_each_are_there_while_there_is_something_to_predict(
    city: City, on_slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = city.folder / "two jobs"
    seen: list[tuple[str, int, set[str]]] = []
    scale = SlurmJobs.scale

    def watched(self: SlurmJobs, name: str, count: int) -> None:
        done = {stage for stage, _ in tasks_done(folder)} if (folder / "tasks.jsonl").exists() else set()
        seen.append((name, count, done))
        scale(self, name, count)

    monkeypatch.setattr(SlurmJobs, "scale", watched)
    published = map_it(on_slurm(), f"output={folder.name}")
    assert outputs(folder) == outputs(city.folder / "twin")
    gpus = [(count, done) for name, count, done in seen if name == "gpu"]
    asked = next(done for count, done in gpus if count == 2)
    assert "read" in asked
    assert "predict" not in asked
    assert gpus[-1][0] == 0
    blocks = sum(stage == "predict" for stage, _ in tasks_done(city.folder / "twin"))
    assert blocks == sum(stage == "predict" for stage, _ in tasks_done(folder))
    assert any("s held, of these" in note and note.endswith("s idle") for note in published.notes)
    assert jobs_end()


def test_a_cancelled_job_is_replaced_and_the_bytes_are_the_same(
    city: City, on_slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Later than Dask would give it up, were it left to it, as SLURM is asked when it is not patched.
    monkeypatch.setattr(cluster_slurm, "ASK_EVERY_S", 5.0)
    cancelled: list[str] = []

    def cancel(pool: Distributed) -> None:
        cancelled.append(next(job for job in jobs_there() if job.startswith("segpipe-gpu")).split()[1])
        subprocess.run(["scancel", cancelled[0]], check=True)

    when_predicted(monkeypatch, 2, cancel)
    map_it(on_slurm(gpu={"cores": 1, "memory": "1536 MiB", "directives": [GPU]}), "output=cancelled")
    assert cancelled
    assert outputs(city.folder / "cancelled") == outputs(city.folder / "twin")
    assert jobs_end()


def test_workers_of_one_job_take_a_device_of_its_list_each(
    city: City, on_slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def ask(pool: Distributed) -> None:
        while len(devices) < 2:
            found = pool._client.run(lambda: os.environ.get("CUDA_VISIBLE_DEVICES", ""), on_error="ignore")
            names = {address: worker["name"] for address, worker in workers_of(pool._client).items()}
            devices[:] = [it for address, it in found.items() if str(names.get(address)).startswith("gpu")]

    when_predicted(monkeypatch, 1, ask)
    jobs = {"cores": 2, "memory": "3 GiB", "processes": 2, "directives": ["--gres=gpu:2"]}
    map_it(on_slurm(gpu=jobs), "output=one job")
    assert sorted(devices) == ["0", "1"]
    assert outputs(city.folder / "one job") == outputs(city.folder / "twin")


def test_jobs_without_gpus_predict_where_no_others_are_named(city: City, on_slurm: Callable[..., Path]) -> None:
    map_it(on_slurm(cpu={"cores": 1, "memory": "2 GiB"}, gpu=None), "output=cpu")
    assert outputs(city.folder / "cpu") == outputs(city.folder / "twin")


@pytest.mark.parametrize(
    ("jobs", "told"),
    [
        ({"queue": "nonsense"}, "Invalid partition"),
        ({"directives": ["--gres=gpu:7"]}, "cluster.gpu: SLURM would not take such a job: "),
        ({"cores": 99}, "cluster.gpu: SLURM would not take such a job: "),
    ],
)
def test_what_sbatch_would_not_take_is_refused_in_its_own_words_before_anything_is_written(
    city: City, on_slurm: Callable[..., Path], jobs: dict[str, Any], told: str
) -> None:
    file = on_slurm(gpu={"cores": 1, "memory": "1 GiB"} | jobs)
    with pytest.raises(UserError) as caught:
        map_it(file, "output=refused")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (city.folder / "refused").exists()
    assert jobs_end()


def test_jobs_that_end_before_a_worker_joins_end_the_run(
    city: City, on_slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_slurm, "ASK_EVERY_S", 0.5)
    with pytest.raises(RunError, match=r"3 jobs of SLURM ended before a worker joined .*log_directory"):
        map_it(on_slurm(gpu={"cores": 1, "memory": "1 GiB", "prologue": ["exit 3"]}), "output=stillborn")
    assert jobs_end()


def test_a_block_that_ends_its_job_process_is_set_aside(
    city: City, on_slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = city.folder / "diary.txt"
    with monkeypatch.context() as patch:
        patch.setenv(DEED, "exit")
        patch.setenv(DIARY, str(diary))
        with pytest.raises(RunError, match=r"died twice.*exited with status 7"):
            map_it(on_slurm(), "output=deadly")
    assert diary.read_text().count("\n") == 2
    map_it(on_slurm(), "output=deadly")
    assert outputs(city.folder / "deadly") == outputs(city.folder / "twin")


def test_a_check_of_the_cluster_names_a_worker_of_each_group_and_leaves_nothing(
    city: City, on_slurm: Callable[..., Path]
) -> None:
    lines = check_cluster(load_city(on_slurm(), ["output=checked"]))
    workers = [text for label, text in lines if label == "workers"]
    assert sum(it.startswith("cpu-") for it in workers) == 1
    assert [it.endswith("predicts") for it in workers if it.startswith("gpu-")] == [True]
    assert not (city.folder / "checked").exists()
    assert jobs_end()


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("scancel", 15), FileNotFoundError("scancel")])
def test_a_controller_that_is_slow_or_gone_at_the_end_fails_no_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked: list[list[str]] = []

    def failing(command: list[str], **_: object) -> None:
        asked.append(command)
        raise error

    monkeypatch.setattr(subprocess, "run", failing)
    jobs = object.__new__(SlurmJobs)
    jobs._ids = {"12", "7"}
    jobs.cancel_all()
    assert asked == [["scancel", "12", "7"]]
