"""The same work on real worker processes, which die, and in this process: the same bytes."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
import torch
from conftest import City, map_it, outputs, tasks_done, write_city
from distributed import LocalCluster
from rich.console import Console

from segpipe.models.weights import load_bundle, save_bundle
from segpipe.pipeline import cluster_check, cluster_fork, cluster_kinds, cluster_pool, cluster_worker, devices, run
from segpipe.pipeline.cluster import InProcess, Outcome, Task
from segpipe.pipeline.cluster_fork import forking
from segpipe.pipeline.cluster_pool import Distributed
from segpipe.pipeline.config import load_city, with_scheduler
from segpipe.pipeline.plan import Plan, make_plan
from segpipe.pipeline.stages import Receipt, Site
from segpipe.tasks.errors import RunError, UserError

MakeCity = Callable[..., City]

SMALL: dict[str, Any] = {
    "tile_px": 80,
    "nodata_min_m2": 50,
    "vectorize": {"min_area_m2": 0},
    "grid": {"chunk_px": 64, "block_px": 64},
    "predict": {"precision": "float32"},
    "cluster": {"workers": 1, "threads": 1},
}


@contextmanager
def twin(plan: Plan, cluster: object) -> Iterator[InProcess]:
    yield InProcess(plan)


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> City:
    """A city mapped in this process, by an untrained network that has been given contrast."""
    folder = tmp_path_factory.mktemp("city")
    city = write_city(folder, folder / "vivid.safetensors", **SMALL)
    it = load_bundle(bundle)
    head = it.network.head
    with torch.no_grad():
        logits = it.network(torch.from_numpy(city.image_CHW[None] / 255.0).float())
        head.weight *= 3 / logits.std()
        head.bias.copy_((head.bias - logits.quantile(0.7)) * 3 / logits.std())
    save_bundle(folder / "vivid.safetensors", it.network, it.card)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_pool", twin)
        assert map_it(city.config, "output=twin").buildings > 5
    return city


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one that is just dying has no command line
            started_by = " ".join(process.cmdline())
            if "spawn_main" in started_by or ("forkserver" in started_by and process.ppid() != os.getpid()):
                found.append(process)
    return found


@pytest.fixture(params=[nullcontext, forking], ids=["started anew", "forked"])
def starting(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each way in which worker processes of this machine start."""
    with request.param():
        yield


@pytest.mark.usefixtures("starting")
def test_worker_processes_give_the_bytes_of_this_process_and_one_may_be_killed(
    city: City, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = city.folder / request.node.name
    killed: list[int] = []
    take_next = Distributed.next

    def killing(self: Distributed) -> Outcome:
        outcome = take_next(self)
        assert outcome.receipt is not None
        if outcome.receipt.stage == "predict" and not killed:
            victim = workers()[0]
            victim.kill()
            killed.append(victim.pid)
        return outcome

    monkeypatch.setattr(Distributed, "next", killing)
    map_it(city.config, f"output='{folder}'", "cluster.workers=2")
    assert killed
    assert outputs(folder) == outputs(city.folder / "twin")
    done = tasks_done(folder)
    assert set(done) == set(tasks_done(city.folder / "twin"))
    assert not workers()


def wait_for(process: "subprocess.Popen[str]", records: Path, lines: int) -> None:
    """Wait until so many tasks are done."""
    while process.poll() is None and (not records.exists() or records.read_text().count("\n") < lines):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def test_a_killed_driver_goes_on_where_it_was(city: City) -> None:
    folder = city.folder / "killed"
    command = [sys.executable, "-c", "from segpipe.pipeline.cli import main; main()", "run", str(city.config)]
    for lines, sign in ((6, signal.SIGTERM), (25, signal.SIGKILL)):
        process = subprocess.Popen(
            [*command, "--set", "output=killed"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(process, folder / "tasks.jsonl", lines)
        process.send_signal(sign)
        _, told = process.communicate()
        if sign == signal.SIGTERM:
            assert process.returncode == 1
            assert "run the same command again to go on" in told
            assert "Traceback" not in told
            assert not (folder / "lock.json").exists()
        else:
            assert process.returncode == -signal.SIGKILL
            assert (folder / "lock.json").exists()
    subprocess.run([*command, "--set", "output=killed"], capture_output=True, check=True)
    assert outputs(folder) == outputs(city.folder / "twin")
    done = tasks_done(folder)
    assert set(done.values()) == {1}, "nothing that was finished is done again"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_terminal_ends_all_processes_within_10_s_and_without_a_traceback(
    city: City, sign: signal.Signals
) -> None:
    folder = city.folder / f"stopped by {sign.name}"
    command = [sys.executable, "-c", "from segpipe.pipeline.cli import main; main()", "run", str(city.config)]
    # Ctrl-C is ignored when it starts, as in what a script starts with &
    in_background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    process = subprocess.Popen(
        [*in_background, *command, "--set", f"output={folder.name}", "--set", "cluster.workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(process, folder / "tasks.jsonl", 3)
    family = psutil.Process(process.pid).children(recursive=True)
    for _ in range(3):
        os.killpg(process.pid, sign)
        time.sleep(0.1)
    # The contract's time: all that waits for the pipes to close, workers too.
    _, told = process.communicate(timeout=10)
    assert process.returncode == 1
    assert told.splitlines()[-1].startswith("segpipe: stopped; what is done is kept; run the same command again")
    assert "Traceback" not in told
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not [it for it in alive if it.status() != psutil.STATUS_ZOMBIE]
    assert not (folder / "lock.json").exists()


def held_back(pid: int) -> set[int]:
    """Signals that a process does not take."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigBlk", "SigIgn"))]
    return {number for number in range(1, 32) for mask in masks if mask >> (number - 1) & 1}


@pytest.mark.usefixtures("starting")
def test_dasks_page_is_served_and_only_imported_when_it_is_looked_at() -> None:
    code = """
import sys
from urllib.request import urlopen
from segpipe.pipeline.cluster_local import _local_client
if __name__ == "__main__":
    with _local_client({"nthreads": 1, "memory_limit": 0}, [{}]) as client:
        assert "bokeh" not in sys.modules
        link = client.dashboard_link
        for page in (link.replace("status", ""), link, link.replace("status", "tasks")):
            with urlopen(page) as answer:
                assert answer.status == 200 and b"bokeh" in answer.read().lower(), page
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc that tells of signals")
def test_a_worker_has_one_gpu_and_leaves_ctrl_c_to_the_driver_also_when_it_is_started_anew(
    city: City, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7f")
    plan = make_plan(load_city(city.config))
    plan = replace(
        plan, recipe=replace(plan.recipe, device="cuda sm_90"), workers=replace(plan.workers, count=2, memory_bytes=0)
    )
    settings = dict(dask.config.config["distributed"]["nanny"]["pre-spawn-environ"])

    def devices_of() -> dict[int, str]:
        found = pool._client.run(lambda: (os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]))
        return dict(found.values())

    own = held_back(os.getpid())
    with cluster_kinds.open_pool(plan, None) as pool:
        assert isinstance(pool, Distributed)
        before = devices_of()
        assert sorted(before.values()) == ["3", "GPU-7f"]
        assert all(signal.SIGINT in held_back(pid) for pid in before)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        after = before
        while victim in after or len(after) < 2:
            # Asking one that is just dying or starting fails.
            with suppress(OSError):
                after = devices_of()
        assert sorted(after.values()) == ["3", "GPU-7f"]
        assert all(signal.SIGINT in held_back(pid) for pid in after)
        assert held_back(os.getpid()) == own
    # What was killed is gone when the system has come to it.
    assert not psutil.wait_procs(workers(), timeout=60)[1]
    assert dask.config.config["distributed"]["nanny"]["pre-spawn-environ"] == settings


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


def fork_servers() -> list[psutil.Process]:
    return [it for it in psutil.Process().children() if "multiprocessing.forkserver" in it.cmdline()[-1]]


@ON_LINUX
def test_what_is_forked_from_ends_with_the_block_even_amid_its_imports_and_changes_no_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    before = dict(os.environ)
    with forking():
        assert os.environ == before
        (server,) = fork_servers()
        assert signal.SIGINT in held_back(server.pid)
        assert server.environ()["GOMP_SPINCOUNT"] == "7"
        assert server.environ()["MALLOC_TOP_PAD_"] == cluster_fork.STARTED_WITH["MALLOC_TOP_PAD_"]
        assert cluster_fork.starting_method() == "forkserver"
    assert not server.is_running()
    assert cluster_fork.starting_method() == "spawn"


@ON_LINUX
def test_what_ends_a_run_is_told_also_where_the_process_to_fork_from_was_gone_before() -> None:
    with pytest.raises(RunError, match="its own"), forking():
        (server,) = fork_servers()
        server.kill()
        server.wait()  # nobody else is told of its end then
        raise RunError("its own")
    assert cluster_fork.starting_method() == "spawn"


@ON_LINUX
@pytest.mark.usefixtures("signals")
def test_ctrl_c_while_it_starts_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
    ensure_running = cluster_fork.forkserver.ensure_running

    def interrupted() -> None:
        ensure_running()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cluster_fork.forkserver, "ensure_running", interrupted)
    with pytest.raises(KeyboardInterrupt), forking():
        raise AssertionError("it comes as soon as signals are let through")
    assert not fork_servers()


@ON_LINUX
def test_a_module_in_the_working_directory_takes_no_librarys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "distributed.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with forking():
        context = multiprocessing.get_context("forkserver")
        child = context.Process(target=os.getpid)  # behind all imports
        child.start()
        child.join()
    assert child.exitcode == 0
    assert not (tmp_path / "run").exists()


def test_where_its_socket_has_no_place_workers_start_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_fork.forkserver, "ensure_running", partial(os.listdir, "/not there"))
    with forking():
        assert cluster_fork.starting_method() == "spawn"


LOOK_AT_IMPORTS = """
import importlib, os, sys, threading
import torch

def refuse(*arguments):
    raise AssertionError("asked for a GPU")

torch.cuda.init = torch.cuda.is_available = torch.cuda.device_count = refuse
for name in sys.argv[1:]:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
names = [open(f"/proc/self/task/{it}/comm").read().strip() for it in os.listdir("/proc/self/task")]
# Arrow's jemalloc does without its own thread behind a fork.
assert len([it for it in names if it != "jemalloc_bg_thd"]) == 1, names
"""


@ON_LINUX
def test_what_workers_are_forked_with_has_no_threads_and_no_gpu() -> None:
    environment = os.environ | cluster_fork.STARTED_WITH
    subprocess.run([sys.executable, "-c", LOOK_AT_IMPORTS, *cluster_fork.IMPORTED], env=environment, check=True)


def test_without_a_choice_of_gpus_they_are_counted() -> None:
    for environment, expected in (({}, ["0", "1", "2"]), ({"CUDA_VISIBLE_DEVICES": "5, 6"}, ["5", "6", "5"])):
        found = devices.one_device_each(3, environment)
        assert [it["CUDA_VISIBLE_DEVICES"] for it in found] == expected


@pytest.fixture
def clusters() -> Iterator[list[LocalCluster]]:
    """The clusters that a test starts, to be closed behind it."""
    started: list[LocalCluster] = []
    yield started
    for it in started:
        it.close()


@pytest.fixture
def scheduler(clusters: list[LocalCluster]) -> Callable[..., str]:
    """Start a scheduler with one worker in this process; gives its address."""

    def start(**options: Any) -> str:
        clusters.append(
            LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, **options)
        )
        return str(clusters[-1].scheduler_address)

    return start


def attach(city: City, address: str, output: str) -> run.Published:
    config = with_scheduler(load_city(city.config, [f"output={output}"]), address)
    return run.map_city(config, Console(file=StringIO()))


def test_a_running_scheduler_gives_the_same_bytes_and_keeps_nothing_of_the_run(
    city: City, scheduler: Callable[..., str]
) -> None:
    address = scheduler(protocol="tcp", host="127.0.0.1", resources={"GPU": 1})
    attach(city, address, "attached")
    assert outputs(city.folder / "attached") == outputs(city.folder / "twin")
    assert not cluster_worker._sites


def test_a_scheduler_without_the_resource_gpu_is_refused_before_any_work(
    city: City, scheduler: Callable[..., str]
) -> None:
    address = scheduler(protocol="tcp", host="127.0.0.1")
    with pytest.raises(UserError, match=r'1 workers, none with the resource GPU.*--resources "GPU=1"'):
        attach(city, address, "refused")
    assert not (city.folder / "refused").exists()


def test_a_scheduler_whose_workers_are_too_small_is_refused_before_any_work(
    city: City, scheduler: Callable[..., str]
) -> None:
    # It is in this process, which is larger than that: it would pause.
    with dask.config.set({"distributed.worker.memory.pause": False}):
        address = scheduler(protocol="tcp", host="127.0.0.1", resources={"GPU": 1}, memory_limit=200 * 2**20)
    with pytest.raises(UserError, match=r"cluster.memory: 0\.2 GiB a worker, but a block of 64 px .* takes .* GiB"):
        attach(city, address, "refused")
    assert not (city.folder / "refused").exists()


def test_a_run_whose_last_gpu_worker_leaves_ends_and_says_how_to_go_on(
    city: City, scheduler: Callable[..., str], clusters: list[LocalCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = scheduler(protocol="tcp", host="127.0.0.1", resources={"GPU": 1})
    take_next = Distributed.next

    def leaving(self: Distributed) -> Outcome:
        outcome = take_next(self)
        for worker in clusters[0].workers.values():
            clusters[0].sync(worker.close, executor_wait=False)
        return outcome

    monkeypatch.setattr(Distributed, "next", leaving)
    monkeypatch.setattr(cluster_pool, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(cluster_pool, "GONE_FOR_S", 0.3)
    with pytest.raises(RunError, match=r"no worker .* is kept; start workers .* run the same command again"):
        attach(city, address, "left alone")
    assert tasks_done(city.folder / "left alone")


def test_an_address_without_a_scheduler_is_refused(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_check, "ANSWER_S", 0.3)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(UserError, match="expected a Dask scheduler"):
            attach(city, address, "refused")


# The pool in itself


def test_the_twin_runs_by_priority_and_hands_errors_over(city: City) -> None:
    plan = make_plan(load_city(city.config))
    pool = InProcess(plan)
    seen: list[str] = []

    def work(site: Site, name: str) -> Receipt:
        seen.append(name)
        if name == "bad":
            raise RunError("as expected")
        return Receipt("read", name, 0, 0, 0.0, {})

    for name, priority in (("late", 3), ("first", 0), ("bad", 1), ("second", 0)):
        pool.submit(Task(work, (name,), False, priority))
    found = [pool.next() for _ in range(4)]
    assert seen == ["first", "second", "bad", "late"]
    assert [type(it.error) for it in found] == [type(None), type(None), RunError, type(None)]


def test_two_plans_share_a_worker(city: City) -> None:
    import pickle

    plan = pickle.dumps(make_plan(load_city(city.config)))
    for name in ("one", "other"):
        cluster_worker._take_plan(name, plan, cluster_check.own_versions(), False)
    cluster_worker._leave_plan("one")
    cluster_worker._leave_plan("one")
    assert set(cluster_worker._sites) == {"other"}
    cluster_worker._leave_plan("other")


def test_a_worker_that_cannot_honour_the_recipe_is_refused(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    from segpipe.models import predictor

    plan = make_plan(load_city(city.config))
    other = predictor.device_recipe(predictor.resolve_device()) | {"device": "cpu OTHER"}
    monkeypatch.setattr(predictor, "device_recipe", lambda device: other)
    with pytest.raises(RunError, match=re.escape(f"expected {plan.recipe.device} and torch")):
        _ = Site(plan).network.predictor
