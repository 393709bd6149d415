"""On a scheduler that runs already, or in a cluster of any class: the same bytes, and nothing lost when parts die."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import City, map_it, outputs, tasks_done
from deeds import DEED, DIARY, fragile_city
from hosts import DRIVER, Certificates, Hosts, wait_until

from segpipe.pipeline import cluster_kinds, cluster_pool, run
from segpipe.pipeline.cluster import Outcome
from segpipe.pipeline.cluster_check import Facts, choose_crew
from segpipe.pipeline.cluster_pool import Distributed, workers_of
from segpipe.pipeline.config import load_city
from segpipe.pipeline.run import check_cluster
from segpipe.pipeline.storage import folder_at
from segpipe.tasks.errors import RunError, UserError

MOMENTS = sorted(random.sample(range(2, 17), 3))
"""After how many tasks something is killed, others every time: the early one, the middle one and the late one."""


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    return fragile_city(tmp_path_factory.mktemp("fragile"))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    found = Hosts(tmp_path)
    yield found
    found.end()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A scheduler with TLS and two workers."""
    folder = tmp_path_factory.mktemp("encrypted")
    found = Hosts(folder, Certificates.make(folder / "ours"))
    found.scheduler()
    for name in ("one", "two"):
        found.worker(name)
    yield found
    found.end()


def on(city: City, hosts: Hosts, **changes: Any) -> Path:
    """The city's YAML on a scheduler."""
    tls = {} if hosts.certificates is None else {"tls": hosts.certificates.yaml}
    return city.set(cluster={"kind": "scheduler", "threads": 1, "address": hosts.address} | tls | changes)


def refused(file: Path) -> str:
    """What is told in one line, before anything is written."""
    with pytest.raises(UserError) as caught:
        map_it(file, "output=refused")
    assert "\n" not in str(caught.value)
    assert not (file.parent / "refused").exists()
    return str(caught.value)


def when_done(patch: pytest.MonkeyPatch, count: int, deed: Callable[[Distributed], None]) -> None:
    """Do something once so many tasks are done."""
    take_next, done = Distributed.next, []

    def watching(self: Distributed) -> Outcome:
        outcome = take_next(self)
        done.append(outcome)
        if len(done) == count:
            deed(self)
        return outcome

    patch.setattr(Distributed, "next", watching)


# Encryption


def test_with_encryption_the_bytes_are_the_same(city: City, encrypted: Hosts) -> None:
    map_it(on(city, encrypted), "output=encrypted")
    assert outputs(city.folder / "encrypted") == outputs(city.folder / "twin")


def test_a_scheduler_may_be_named_by_its_file(city: City, encrypted: Hosts) -> None:
    file = on(city, encrypted, address=None, scheduler_file=str(encrypted.folder / "scheduler.json"))
    assert any(label == "workers" for label, _ in check_cluster(load_city(file, ["output=checked"])))
    assert not (city.folder / "checked").exists()


@pytest.mark.parametrize("wrong", ["ca", "cert", "none", "no file", "no pem", "plain"])
def test_whom_the_certificates_do_not_fit_is_refused_at_once_in_one_line(
    city: City, encrypted: Hosts, tmp_path: Path, wrong: str
) -> None:
    others, ours = Certificates.make(tmp_path / "others"), encrypted.certificates
    assert ours is not None
    made: dict[str, tuple[dict[str, Any], str]] = {
        "ca": ({"tls": ours.yaml | {"ca": str(others.ca)}}, "its certificate is not to be trusted"),
        "cert": ({"tls": others.yaml | {"ca": str(ours.ca)}}, "encryption is refused"),
        "none": ({"tls": None}, "no certificate to show; expected `cluster: {tls: {ca, cert, key}}`"),
        "no file": ({"tls": ours.yaml | {"key": str(tmp_path / "none.pem")}}, "cluster.tls.key: "),
        "no pem": ({"tls": ours.yaml | {"ca": __file__}}, "expected a PEM certificate"),
        "plain": ({"tls": None, "address": encrypted.address.replace("tls", "tcp")}, "it is encrypted; expected tls"),
    }
    changes, told = made[wrong]
    begun = time.monotonic()
    assert told in refused(on(city, encrypted, **changes))
    assert time.monotonic() - begun < 15, "the contract's time"


def test_encryption_for_a_scheduler_that_has_none_is_refused(city: City, hosts: Hosts, tmp_path: Path) -> None:
    hosts.scheduler()
    ours = Certificates.make(tmp_path / "ours")
    told = refused(on(city, hosts, address=hosts.address.replace("tcp", "tls"), tls=ours.yaml))
    assert "encryption is refused" in told


# Before work


def test_a_worker_of_another_version_is_refused_by_name(
    city: City, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts.scheduler()
    hosts.worker("old one")
    monkeypatch.setattr(cluster_pool, "own_versions", lambda: {"segpipe": "9", "torch": "9", "zarr": "9", "dask": "9"})
    with pytest.raises(UserError, match=r"worker old one \(tcp://.*it has segpipe .*; expected 9, as the driver"):
        map_it(on(city, hosts), "output=older")
    assert not tasks_done(city.folder / "older")


def test_a_scheduler_of_another_version_is_refused(city: City, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.scheduler()
    monkeypatch.setattr(cluster_kinds, "own_versions", lambda: {"zarr": "9"})
    assert "it has zarr " in refused(on(city, hosts))


@pytest.mark.parametrize("what", ["tile", "weights", "output"])
def test_a_worker_that_cannot_reach_what_it_needs_is_refused_with_the_reason(
    city: City, hosts: Hosts, monkeypatch: pytest.MonkeyPatch, what: str, tmp_path: Path
) -> None:
    hosts.scheduler()
    hosts.worker("lost one")
    make_plan = run.make_plan

    def elsewhere(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        if what == "tile":
            return run.replace(plan, tiles=(run.replace(plan.tiles[0], path="/none/tile1.tif"), *plan.tiles[1:]))
        if what == "weights":
            return run.replace(plan, model_digest="that of another")
        # As if the same path were another disk there.
        return run.replace(plan, folder=folder_at(str(tmp_path / "another disk")))

    (tmp_path / "another disk").mkdir()
    monkeypatch.setattr(run, "make_plan", elsewhere)
    told = {"tile": "the tile /none/tile1.tif: ", "weights": "another file than the driver's", "output": "the output "}
    with pytest.raises(UserError) as caught:
        map_it(on(city, hosts), f"output=lost {what}")
    assert "worker lost one" in str(caught.value)
    assert told[what] in str(caught.value)
    assert not tasks_done(city.folder / f"lost {what}")


def facts(name: str, device: str, predicts: bool = True) -> Facts:
    return Facts(f"tcp://{name}:1", predicts, device, "2.13.0", 8, 4, 2**30)


def test_workers_of_another_device_are_left_out_and_told_of() -> None:
    found = [facts("a", "cpu AVX512"), facts("b", "cuda sm_90"), facts("c", "cpu AVX512"), facts("d", "", False)]
    crew, unfit = choose_crew("x", found)
    assert (crew.device, crew.workers) == ("cuda sm_90", 1)
    assert unfit == {"tcp://a:1", "tcp://c:1"}
    assert crew.notes == (
        "2 of 3 workers are left out: they are cpu AVX512 with torch 2.13.0,"
        " and the others cuda sm_90 with torch 2.13.0",
    )


# What dies while it works


def assert_as_undisturbed(city: City, name: str) -> None:
    """The outputs are those of the twin, and no task is in the records twice, nor a block in the ledger."""
    folder = city.folder / name
    assert outputs(folder) == outputs(city.folder / "twin")
    twice = sum(count - 1 for count in tasks_done(folder).values())
    assert not twice, f"{twice} tasks were done twice"
    entries = [json.loads(path.read_text()) for path in (folder / "ledger" / "predict").iterdir()]
    assert {entry["times"] for entry in entries} == {1}


@pytest.mark.parametrize("moment", range(3))
def test_a_scheduler_that_dies_ends_the_run_in_one_line_and_the_next_one_goes_on(
    city: City, hosts: Hosts, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    count = MOMENTS[moment]
    scheduler = hosts.scheduler()
    hosts.worker("one")
    file = on(city, hosts)
    with monkeypatch.context() as patch:
        when_done(patch, count, lambda pool: scheduler.kill())
        with pytest.raises(RunError, match=r"^the Dask scheduler was lost; what is done is kept; run the same command"):
            map_it(file, f"output=orphan{count}")
    assert tasks_done(city.folder / f"orphan{count}")
    hosts.scheduler()
    hosts.worker("another")
    map_it(on(city, hosts), f"output=orphan{count}")
    assert_as_undisturbed(city, f"orphan{count}")


@pytest.mark.parametrize("known", [{}, {"workers": {"tcp://10.0.0.1:1": {}}}], ids=["nothing", "what was"])
def test_a_client_that_closes_while_it_is_asked_says_that_the_scheduler_was_lost(known: dict[str, Any]) -> None:
    class Closing:
        status = "running"

        def scheduler_info(self, n_workers: int) -> dict[str, Any]:
            self.status = "closed"
            return known

    with pytest.raises(RunError, match=r"^the Dask scheduler was lost"):
        workers_of(Closing())


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("victim", ["worker", "nanny"])
def test_a_killed_worker_or_nanny_costs_what_it_was_doing(
    city: City, hosts: Hosts, monkeypatch: pytest.MonkeyPatch, victim: str, moment: int
) -> None:
    count = MOMENTS[moment]
    hosts.scheduler()
    first = hosts.worker("one")
    hosts.worker("two")
    killed: list[int] = []

    def kill(pool: Distributed) -> None:
        nanny = psutil.Process(first.pid)
        wait_until(nanny.children, "no worker process")
        children = nanny.children()
        for process in [nanny] if victim == "nanny" else children:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    when_done(monkeypatch, count, kill)
    name = f"{victim} killed {count}"
    map_it(on(city, hosts), f"output={name}")
    assert killed
    assert_as_undisturbed(city, name)


def test_a_driver_killed_again_and_again_leaves_workers_that_the_next_one_finds(city: City, hosts: Hosts) -> None:
    hosts.scheduler()
    hosts.worker("one")
    file, folder = on(city, hosts), city.folder / "driverless"
    command = ["-c", DRIVER, "run", str(file), "--set", "output=driverless"]

    def done() -> int:
        records = folder / "tasks.jsonl"
        return records.read_text().count("\n") if records.exists() else 0

    for number in MOMENTS:
        driver = hosts.start("driver", command)
        while driver.poll() is None and done() < number:
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    map_it(file, "output=driverless")
    assert_as_undisturbed(city, "driverless")


def test_a_block_that_kills_workers_is_set_aside_also_where_the_scheduler_would_try_it_again(
    city: City, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = city.folder / "diary.txt"
    hosts.environment = {DEED: "exit", DIARY: str(diary), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    hosts.scheduler()
    hosts.worker("one")
    hosts.worker("two")
    with pytest.raises(RunError, match=r"died twice.*exited with status 7"):
        map_it(on(city, hosts), "output=stubborn")


# A cluster of any class


def processes() -> set[int]:
    children = psutil.Process().children(recursive=True)
    return {it.pid for it in children if "spawn_main" in " ".join(it.cmdline())}


def test_a_cluster_of_a_named_class_gives_the_same_bytes_and_is_closed(city: City) -> None:
    kwargs = {"n_workers": 0, "threads_per_worker": 2, "dashboard_address": None, "resources": {"GPU": 1}}
    before = processes()
    described = {"kind": "class", "class": "distributed.LocalCluster", "kwargs": kwargs, "workers": 2, "threads": 1}
    map_it(city.set(cluster=described), "output=class")
    assert outputs(city.folder / "class") == outputs(city.folder / "twin")
    wait_until(lambda: processes() == before, "workers that outlive their cluster")


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("distributed.NoSuchCluster", {}, "has no attribute 'NoSuchCluster'"),
        ("no_such_package.Cluster", {}, "No module named 'no_such_package'"),
        ("pathlib.Path", {}, "expected a subclass of distributed's Cluster"),
        ("distributed.LocalCluster", {"n_wrkers": 2}, "with these kwargs: "),
    ],
)
def test_a_class_that_is_none_is_refused(city: City, name: str, kwargs: dict[str, Any], told: str) -> None:
    assert told in refused(city.set(cluster={"kind": "class", "class": name, "kwargs": kwargs}))


def test_dask_writes_its_own_report_where_it_is_asked_for(city: City, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    command = ["-c", DRIVER, "run", str(city.config), "--set", "output=reported", "--performance-report", str(page)]
    hosts = Hosts(tmp_path)
    log = tmp_path / "log.jsonl"
    driver = hosts.start("driver", [*command, "--log-file", str(log), "--log-format", "json"])
    assert driver.wait() == 0, (tmp_path / "driver.txt").read_text()
    assert "Dask Performance Report" in page.read_text()
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "level", "event", "message"} <= it.keys() for it in told)
    last = [it for it in told if it["event"] == "progress"][-1]["stages"]
    assert last["predict"]["units"] == last["predict"]["total"]
