"""Laws of runs in a bucket: a local run's bytes, resume after any kill, one run at a time, nothing lost in silence.

The servers are moto's, on loopback.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from buckets import BUCKET, KEY, SECRET, Buckets, OwnServer, serving_buckets, set_environment
from click.testing import CliRunner
from conftest import City, FakePredictor, map_it, outputs, write_city, write_tile
from deeds import DEED, DIARY, fragile_city
from hosts import DRIVER, Hosts, wait_until
from rich.console import Console

from segpipe.pipeline import lock as lock_module
from segpipe.pipeline import plan as plan_module
from segpipe.pipeline import run, stages
from segpipe.pipeline.cli import main
from segpipe.pipeline.config import load_city
from segpipe.pipeline.desk import RECORDS
from segpipe.pipeline.ledger import Ledger
from segpipe.pipeline.lock import LOCK, locked
from segpipe.pipeline.manifest import DROPPING, nothing_changed
from segpipe.pipeline.plan import make_plan
from segpipe.pipeline.status import PROGRESS, status_of
from segpipe.pipeline.storage import OWN_FOLDERS, desk_of
from segpipe.pipeline.store import Layout, Store, prepare_store
from segpipe.tasks import bucket
from segpipe.tasks.bucket import BucketFolder, Patience
from segpipe.tasks.errors import RunError, StorageError, UserError
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.read import _open_tiles

MakeCity = Callable[..., City]

RUN = f"s3://{BUCKET}/runs/tiny"
SMALL: dict[str, Any] = {"tile_px": 112, "seed": 4, "grid": {"chunk_px": 64, "block_px": 128}, "nodata_min_m2": 50}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Moto's server tells of each request."""
    logger = logging.getLogger("werkzeug")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Buckets]:
    """A server that a YAML has to name: the environment has its keys alone."""
    monkeypatch.setenv("SEGPIPE_CACHE", str(tmp_path / "cache"))
    with serving_buckets(monkeypatch) as found:
        yield found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a silent server up within a second."""
    patience = Patience(0.5, 0.2, 2, 0.05)
    for name in ("FOR_A_TILE", "FOR_A_STORE", "ONCE"):
        monkeypatch.setattr(bucket, name, patience)
    monkeypatch.setattr(BucketFolder.__init__, "__defaults__", (patience,))


@pytest.fixture
def folder(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> BucketFolder:
    """A run folder in the bucket, for who asks it without a YAML."""
    bucket.Storage(buckets.endpoint, "us-east-1").use()
    return BucketFolder(RUN)


_local: dict[str, Any] = {}


@pytest.fixture
def local(tmp_path: Path, bundle: Path, in_process: type[FakePredictor]) -> dict[str, Any]:
    """What a run of the small city publishes on a disk, done once."""
    if not _local:
        city = write_city(tmp_path / "local", bundle, 1, 2, **SMALL)
        map_it(city.config)
        _local.update(outputs(city.folder / "run"))
    return _local


def in_bucket(city: City, buckets: Buckets, **changes: Any) -> Path:
    """The city's YAML, its run in the bucket."""
    storage = {"endpoint": buckets.endpoint, "region": "us-east-1"}
    return city.set(output=RUN, storage=storage, **changes)


def upload(city: City, buckets: Buckets) -> dict[str, Any]:
    """Put tiles and model into the bucket; the values of the YAML that name them."""
    for path in (city.folder / "tiles").iterdir():
        buckets.client.upload_file(str(path), BUCKET, f"tiles/{path.name}")
    model = Path(yaml.safe_load(city.config.read_text())["model"])
    buckets.client.upload_file(str(model), BUCKET, "models/fake.safetensors")
    return {"images": f"s3://{BUCKET}/tiles/*.tif", "model": f"s3://{BUCKET}/models/fake.safetensors"}


def download(buckets: Buckets, to: Path, names: Iterable[str] | None = None) -> Path:
    """The run folder in the bucket, as an independent client sees it. names: of some files; else all."""
    for name in buckets.names("runs/tiny/") if names is None else names:
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buckets.get(f"runs/tiny/{name}"))
    return to


def outputs_in(buckets: Buckets, to: Path) -> dict[str, Any]:
    """What is published in the bucket, of all that must not depend on how the work was cut."""
    return outputs(download(buckets, to, ("buildings.gpkg", "mask.tif", "probability.tif")))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(buckets: Buckets) -> list[tuple[str, str]]:
    """Stage and unit of each task that was done, over all runs."""
    lines = [json.loads(line) for line in buckets.get(f"runs/tiny/{RECORDS}").decode().splitlines()]
    return [(it["stage"], it["unit"]) for it in lines if "error" not in it]


# Whole runs


@pytest.mark.usefixtures("in_process")
def test_a_run_in_a_bucket_gives_what_a_local_run_gives(make_city: MakeCity, buckets: Buckets, tmp_path: Path) -> None:
    city = make_city(1, 2, **SMALL)
    map_it(city.config)
    published = map_it(in_bucket(city, buckets, **upload(city, buckets)))
    found = download(buckets, tmp_path / "found")
    assert outputs(found) == outputs(city.folder / "run")
    assert published.buildings
    there = {path.name for path in found.iterdir()}
    assert there == {path.name for path in (city.folder / "run").iterdir()}
    for array in ("image", "valid", "probability"):
        ours = {p.relative_to(found): p.read_bytes() for p in (found / "store.zarr" / array).rglob("*") if p.is_file()}
        here = city.folder / "run"
        assert ours == {
            p.relative_to(here): p.read_bytes() for p in (here / "store.zarr" / array).rglob("*") if p.is_file()
        }


@pytest.mark.usefixtures("in_process")
def test_nothing_stays_on_this_machine(
    make_city: MakeCity, buckets: Buckets, folder: BucketFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    city = make_city(1, 2, **SMALL)
    left = desk_of(folder)
    left.mkdir()
    (left / "mask.partial-segpipe.tif").write_bytes(b"of a run that was killed")
    map_it(in_bucket(city, buckets))
    assert not list(room.iterdir())
    assert (
        sorted(path.name for path in city.folder.iterdir() if path.is_dir()) == ["bundle0", "tiles"]
        or not (city.folder / "run").exists()
    )
    assert not list(Path.cwd().glob("s3:*"))


@pytest.mark.usefixtures("in_process")
def test_a_second_run_finds_that_nothing_has_changed_with_a_few_requests(make_city: MakeCity, buckets: Buckets) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets, **upload(city, buckets))
    map_it(config)
    seen = Requests()
    with seen:
        assert nothing_changed(load_city(config)) is not None
    assert 0 < len(seen.lines) < 25
    assert not [line for line in seen.lines if "store.zarr" in line or "ledger" in line]


class Requests(logging.Handler):
    """The requests that come to servers of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        logger = logging.getLogger("werkzeug")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("werkzeug")
        logger.setLevel(logging.ERROR)
        logger.propagate = True
        logger.removeHandler(self)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("what", ["output", "model", "tile"])
def test_what_has_changed_in_the_bucket_is_noticed(make_city: MakeCity, buckets: Buckets, what: str) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets, **upload(city, buckets))
    map_it(config)
    client = buckets.client
    if what == "output":
        client.put_object(Bucket=BUCKET, Key="runs/tiny/mask.tif", Body=b"short")
    elif what == "model":
        data = buckets.get("models/fake.safetensors").replace(b"not stated", b"all rights")
        client.put_object(Bucket=BUCKET, Key="models/fake.safetensors", Body=data)
    else:
        path = write_tile(city.folder / "other.tif", 255 - city.image_CHW[:, :144, :144], -17_666_700, 1_666_500)
        client.upload_file(str(path), BUCKET, "tiles/tile1.tif")
    before = len(records(buckets))
    assert nothing_changed(load_city(config)) is None
    map_it(config)
    done = [stage for stage, _ in records(buckets)[before:]]
    assert ("predict" in done) == (what != "output")
    assert nothing_changed(load_city(config)) is not None


@pytest.mark.parametrize("tasks", [1, 9, 24])
def test_killed_anywhere_a_run_goes_on_and_does_nothing_twice(
    make_city: MakeCity,
    buckets: Buckets,
    tmp_path: Path,
    killed_after: Callable[[Path, int], bool],
    tasks: int,
    local: dict[str, Any],
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets)
    assert killed_after(config, tasks)
    map_it(config)
    assert outputs_in(buckets, tmp_path / "found") == local
    done = records(buckets)
    assert len(set(done)) == len(done)


@pytest.mark.usefixtures("in_process")
def test_kept_probabilities_are_enough_for_another_threshold(make_city: MakeCity, buckets: Buckets) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets, store={"keep": "probability"})
    map_it(config)
    assert not buckets.names("runs/tiny/store.zarr/image/")
    before = len(records(buckets))
    map_it(config, "vectorize.threshold=0.7")
    assert {stage for stage, _ in records(buckets)[before:]} <= {"vectorize", "join", "publish"}
    map_it(config, "store.keep=none", "vectorize.threshold=0.6")
    assert not [
        name for name in buckets.names("runs/tiny/") if name.split("/")[0] in ("store.zarr", "ledger", "fragments")
    ]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("keep", ["none", "probability"])
def test_killed_while_the_store_is_dropped_the_next_command_drops_the_rest(
    make_city: MakeCity, buckets: Buckets, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    config = in_bucket(make_city(1, 2, **SMALL), buckets, store={"keep": keep})
    remove = BucketFolder.remove

    def killed(self: BucketFolder, *names: str) -> None:
        if any(name.startswith(("store.zarr/image", "fragments")) for name in names):
            raise KeyboardInterrupt
        remove(self, *names)

    with monkeypatch.context() as patch:
        patch.setattr(BucketFolder, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            map_it(config)
    before = buckets.objects("runs/tiny/")
    again = CliRunner().invoke(main, ["run", str(config)])
    assert again.exit_code == 0, again.stderr
    assert "nothing has changed" in again.stdout
    after = buckets.objects("runs/tiny/")
    own = ("store.zarr/image/", "store.zarr/valid/", "ledger/read/") if keep == "probability" else OWN_FOLDERS
    dropped = (*own, DROPPING, PROGRESS)
    assert before.keys() > after.keys()
    assert after == {name: data for name, data in before.items() if not name.startswith(dropped)}


@pytest.mark.usefixtures("in_process")
def test_fresh_starts_over_and_ends_the_same(make_city: MakeCity, buckets: Buckets, tmp_path: Path) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets)
    map_it(config)
    first = outputs_in(buckets, tmp_path / "first")
    map_it(config, fresh=True)
    assert outputs_in(buckets, tmp_path / "second") == first


@pytest.mark.usefixtures("in_process")
def test_too_little_room_for_what_is_to_be_uploaded_is_refused(
    make_city: MakeCity, buckets: Buckets, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_city(in_bucket(make_city(1, 1, **SMALL), buckets))
    config.find_buckets()
    make_plan(config)
    usage = shutil.disk_usage(tempfile.gettempdir())._replace(free=3 * 2**20)
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.00 GiB free .* cure: set TMPDIR"):
        make_plan(config)


@pytest.mark.usefixtures("in_process")
def test_a_run_in_a_bucket_is_verified_and_evaluated_by_its_yaml(
    make_city: MakeCity, buckets: Buckets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city(1, 2, **SMALL)
    map_it(city.config)
    truth = city.folder / "run" / "mask.tif"
    config = in_bucket(city, buckets)
    map_it(config)
    monkeypatch.chdir(tmp_path)
    verified = CliRunner().invoke(main, ["verify", str(config)])
    assert verified.exit_code == 0, verified.output
    assert "every valid pixel predicted once" in verified.output
    evaluated = CliRunner().invoke(main, ["evaluate", str(config), "--truth", str(truth)])
    assert evaluated.exit_code == 0, evaluated.output
    assert "no pictures" not in evaluated.output
    (run,) = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["runs"]
    assert run["run"] == RUN
    data = buckets.get("runs/tiny/probability.qml")
    buckets.client.put_object(Bucket=BUCKET, Key="runs/tiny/probability.qml", Body=data + b" ")
    damaged = CliRunner().invoke(main, ["verify", str(config)])
    assert damaged.exit_code == 1
    assert damaged.stderr.startswith(f"segpipe: {RUN}: digest of probability.qml: found ")


@pytest.mark.usefixtures("in_process")
def test_footprints_that_somebody_has_changed_are_left_alone_and_old_masks_go(
    make_city: MakeCity, buckets: Buckets
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets)
    map_it(config, "publish.tile_masks=true")
    assert len(buckets.names("runs/tiny/tile_masks/")) == 2
    mine = b"my own work"
    buckets.client.put_object(Bucket=BUCKET, Key="runs/tiny/buildings.gpkg", Body=mine)
    published = map_it(config)
    assert published.geopackage.name == "buildings-2.gpkg"
    assert buckets.get("runs/tiny/buildings.gpkg") == mine
    assert buckets.get("runs/tiny/buildings-2.gpkg").startswith(b"SQLite format 3\0")
    assert not buckets.names("runs/tiny/tile_masks/")


@pytest.mark.usefixtures("in_process")
def test_somebodys_own_files_in_the_bucket_are_not_written_over(make_city: MakeCity, buckets: Buckets) -> None:
    city = make_city(1, 2, **SMALL)
    buckets.client.put_object(Bucket=BUCKET, Key="runs/tiny/mask.tif", Body=b"mine")
    with pytest.raises(UserError, match=r"holds mask\.tif of somebody's own"):
        map_it(in_bucket(city, buckets))
    assert buckets.objects("runs/tiny/") == {"mask.tif": b"mine"}


# Damage and loss


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("how", ["lost", "flipped"])
def test_what_is_damaged_or_lost_in_the_bucket_is_made_anew(
    make_city: MakeCity, buckets: Buckets, tmp_path: Path, how: str
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets)
    map_it(config)
    first = outputs_in(buckets, tmp_path / "first")
    for what in ("store.zarr/image/c/0/1/1", "store.zarr/probability/c/2/2", "fragments/"):
        key = f"runs/tiny/{what}{buckets.names(f'runs/tiny/{what}')[0]}"
        data = buckets.get(key)
        half = len(data) // 2
        if how == "lost":
            buckets.client.delete_object(Bucket=BUCKET, Key=key)
        else:
            flipped = data[:half] + bytes([data[half] ^ 16]) + data[half + 1 :]
            buckets.client.put_object(Bucket=BUCKET, Key=key, Body=flipped)
    # Another threshold and back: all that is kept is read.
    map_it(config, "predict.halo=64", "vectorize.threshold=0.7")
    map_it(config)
    assert outputs_in(buckets, tmp_path / "second") == first


@pytest.mark.usefixtures("in_process")
def test_a_missing_chunk_that_is_all_fill_is_refused(folder: BucketFolder) -> None:
    layout = Layout(LATTICE, Window(0, 0, 64, 64), 32, 3)
    opened = prepare_store(folder, layout)
    empty = np.zeros((32, 32), np.uint8)
    expected = opened.write_chunk("valid", 0, 0, empty)
    assert (opened.read_chunk("valid", 0, 0, expected) == empty).all()
    folder.remove("store.zarr/valid/c/0/0")
    with pytest.raises(RunError, match="is missing"):
        opened.read_chunk("valid", 0, 0, expected)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("stage", ["read", "predict", "join"])
def test_a_store_that_is_lost_in_the_middle_of_a_run_is_an_error(
    make_city: MakeCity,
    buckets: Buckets,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: str,
    local: dict[str, Any],
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets)
    work = getattr(stages, stage)
    lost: list[str] = []

    def losing(site: stages.Site, *arguments: Any) -> stages.Receipt:
        if not lost:
            lost.extend(buckets.names("runs/tiny/"))
            keys = [{"Key": f"runs/tiny/{name}"} for name in lost]
            buckets.client.delete_objects(Bucket=BUCKET, Delete={"Objects": keys})
        receipt: stages.Receipt = work(site, *arguments)
        return receipt

    losing.__name__ = stage
    with monkeypatch.context() as patch:
        patch.setattr(stages, stage, losing)
        with pytest.raises(RunError, match=r"lock is gone|not in the ledger"):
            map_it(config)
    assert lost
    assert not [
        name
        for name in buckets.names("runs/tiny/")
        if name in ("buildings.gpkg", "mask.tif", "manifest.json", "progress.json", "tasks.jsonl")
    ]
    map_it(config)
    assert outputs_in(buckets, tmp_path / "found") == local


@pytest.mark.usefixtures("in_process", "buckets")
def test_a_bucket_that_is_not_there_is_the_users_mistake(make_city: MakeCity, buckets: Buckets) -> None:
    city = make_city(1, 2, **SMALL)
    config = city.set(output="s3://nowhere/run", storage={"endpoint": buckets.endpoint})
    result = CliRunner().invoke(main, ["run", str(config)], standalone_mode=False)
    assert isinstance(result.exception, SystemExit) and result.exception.code == 2
    assert (
        result.stderr.strip() == "segpipe: output: s3://nowhere/run: no such bucket (404); expected one that is there"
    )


@pytest.mark.usefixtures("in_process", "hasty")
def test_a_dead_endpoint_is_told_in_one_line(make_city: MakeCity, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
    city = make_city(1, 2, **SMALL)
    config = city.set(output=RUN, storage={"endpoint": "http://127.0.0.1:9"})
    result = CliRunner().invoke(main, ["run", str(config)], standalone_mode=False)
    assert isinstance(result.exception, SystemExit) and result.exception.code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"segpipe: {RUN}: the bucket does not answer (")
    assert line.endswith("its server is http://127.0.0.1:9")


def test_a_server_is_given_up_within_a_minute_in_the_worst_case() -> None:
    for patience in (bucket.FOR_A_TILE, bucket.FOR_A_STORE, bucket.ONCE):
        # The last try begins before tries_s is over, and ends after its connecting and its silence.
        assert patience.tries_s + 5 + patience.silence_s + 2 * bucket.ONCE.silence_s + lock_module.BEAT_S <= 60


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnServer]:
    set_environment(monkeypatch)
    server = OwnServer()
    server.buckets.make()
    yield server
    server.kill()


@pytest.mark.usefixtures("in_process", "hasty")
@pytest.mark.parametrize("stage", ["scan", "predict", "join"])
def test_after_a_server_was_silent_the_same_command_goes_on(
    make_city: MakeCity,
    own_server: OwnServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: str,
    local: dict[str, Any],
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, own_server.buckets)
    work = getattr(stages, stage)

    def silenced(site: stages.Site, *arguments: Any) -> stages.Receipt:
        own_server.pause()
        receipt: stages.Receipt = work(site, *arguments)
        return receipt

    silenced.__name__ = stage
    with monkeypatch.context() as patch:
        patch.setattr(stages, stage, silenced)
        with pytest.raises(StorageError, match=f"{RUN}.*does not answer"):
            map_it(config)
    own_server.go_on()
    # The lock could not be given back; of a process that has ended, as this one has not, it is taken over.
    own_server.buckets.client.delete_object(Bucket=BUCKET, Key=f"runs/tiny/{LOCK}")
    map_it(config)
    assert outputs_in(own_server.buckets, tmp_path / "found") == local
    done = records(own_server.buckets)
    twice = len(done) - len(set(done))
    assert twice <= 1


def test_a_server_that_stands_still_for_90_s_ends_the_run_and_nothing_is_done_twice(
    own_server: OwnServer, tmp_path: Path
) -> None:
    city = fragile_city(tmp_path)
    hosts = Hosts(tmp_path, environment={DEED: "slow", DIARY: os.devnull})
    command = ["-c", DRIVER, "run", str(in_bucket(city, own_server.buckets))]

    def predicted() -> list[dict[str, Any]]:
        return [json.loads(it) for it in own_server.buckets.objects("runs/tiny/ledger/predict/").values()]

    try:
        driver = hosts.start("driver", command)
        moment = random.randint(1, 6)
        wait_until(lambda: driver.poll() is not None or len(predicted()) >= moment, "nothing is predicted")
        own_server.pause()
        stopped = time.monotonic()
        assert driver.wait() == 1
        *_, told = (tmp_path / "driver.txt").read_text().splitlines()
        assert told.startswith("segpipe: ")
        assert "does not answer" in told
        assert own_server.buckets.endpoint in told
        time.sleep(max(0.0, 90 - (time.monotonic() - stopped)))
        own_server.go_on()
        assert hosts.start("driver", command).wait() == 0, (tmp_path / "driver.txt").read_text()
    finally:
        hosts.end()
    assert outputs_in(own_server.buckets, tmp_path / "found") == outputs(city.folder / "twin")
    assert {entry["times"] for entry in predicted()} == {1}


@pytest.mark.usefixtures("in_process", "hasty")
def test_a_server_that_comes_back_without_its_data_is_an_error_and_then_a_new_beginning(
    make_city: MakeCity, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local: dict[str, Any]
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, own_server.buckets)
    predict, others = stages.predict, []

    def losing(site: stages.Site, *arguments: Any) -> stages.Receipt:
        if not others:
            own_server.kill()
            others.append(OwnServer(own_server.port))
        return predict(site, *arguments)

    losing.__name__ = "predict"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "predict", losing)
        with pytest.raises(RunError):
            map_it(config)
    try:
        with pytest.raises(UserError, match="no such bucket"):
            map_it(config)
        others[0].buckets.make()
        map_it(config)
        assert outputs_in(others[0].buckets, tmp_path / "found") == local
    finally:
        others[0].kill()


@pytest.mark.usefixtures("in_process")
def test_a_tile_of_a_server_that_is_silent_is_not_skipped(
    make_city: MakeCity, buckets: Buckets, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets, on_tile_error="skip", **upload(city, buckets))
    scan = stages.scan

    def silent(site: stages.Site, tile: int) -> stages.Receipt:
        if tile == 1:
            raise bucket.UnreachableError(site.plan.tiles[tile].path, "the bucket does not answer")
        return scan(site, tile)

    silent.__name__ = "scan"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "scan", silent)
        with pytest.raises(RunError, match="does not answer"):
            map_it(config)
    assert not map_it(config).skipped


def test_a_copy_that_cannot_be_written_here_is_not_the_buckets_fault(folder: BucketFolder, tmp_path: Path) -> None:
    folder.write("tasks.jsonl", b"{}")
    (tmp_path / "full").symlink_to("/dev/full")
    for path, words in (
        (tmp_path / "full", "No space left on device"),
        (tmp_path / "none" / "tasks.jsonl", "No such file or directory"),
    ):
        with pytest.raises(RunError, match=f"^{path}: cannot be written: {words}; .*{RUN}/tasks.jsonl") as error:
            folder.download("tasks.jsonl", path)
        assert not isinstance(error.value, StorageError)


def test_what_is_copied_is_there_whole_and_what_is_not_there_leaves_nothing(
    folder: BucketFolder, tmp_path: Path
) -> None:
    for data in (b"", b"{}", os.urandom(2**24)):
        folder.write("tasks.jsonl", data)
        assert folder.download("tasks.jsonl", tmp_path / "tasks.jsonl")
        assert (tmp_path / "tasks.jsonl").read_bytes() == data
    assert not folder.download("none.jsonl", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


# The lock


def test_two_runs_do_not_share_a_folder_in_a_bucket(folder: BucketFolder) -> None:
    with locked(folder):
        holder = json.loads(folder.read(LOCK) or b"")
        assert (holder["pid"], holder["counter"]) == (os.getpid(), 0)
        with pytest.raises(UserError, match=f"{RUN}: another run is at work here"), locked(folder):
            pass
    assert folder.top() == set()
    with locked(folder):
        pass


def test_runs_in_folders_of_one_name_on_two_servers_write_their_files_apart(folder: BucketFolder) -> None:
    here = desk_of(folder)
    bucket.Storage("http://127.0.0.1:9", "us-east-1").use()
    assert desk_of(folder) != here


def hold(folder: BucketFolder, **changes: Any) -> None:
    """A lock of somebody else's."""
    me = json.loads(lock_module._lock_text("other", 3))
    folder.write(LOCK, json.dumps(me | changes).encode())


@pytest.mark.parametrize("dead", [{"pid": 2**22 + 1}, {"started": 1.0}, {"host": "elsewhere"}])
def test_a_stale_lock_in_a_bucket_is_taken_over(
    folder: BucketFolder, monkeypatch: pytest.MonkeyPatch, dead: dict[str, Any]
) -> None:
    monkeypatch.setattr(lock_module, "_STALE_S", 0.3)
    hold(folder, **dead)
    with locked(folder) as token:
        assert lock_module.lock_token(folder) == token
    assert folder.read(LOCK) is None


def test_a_lock_in_a_bucket_whose_counter_moves_is_respected(
    folder: BucketFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.02)
    with locked(folder) as token:
        seen = lock_module.holder_of(folder)
        assert seen is not None
        assert lock_module.is_alive(folder, seen | {"host": "elsewhere"}, 60)
        assert lock_module.lock_token(folder) == token


@pytest.mark.parametrize("error", [OSError, FileNotFoundError, StorageError])
def test_a_holder_that_cannot_move_its_counter_in_a_bucket_once_goes_on_to(
    folder: BucketFolder, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.02)
    write_where, failed = BucketFolder.write_where, threading.Event()

    def failing(self: BucketFolder, name: str, data: bytes, tag: str | None) -> str | None:
        if failed.is_set():
            return write_where(self, name, data, tag)
        failed.set()
        raise error("once")

    with locked(folder):
        monkeypatch.setattr(BucketFolder, "write_where", failing)
        assert failed.wait(10)
        seen, end = lock_module.holder_of(folder), time.monotonic() + 10
        while lock_module.holder_of(folder) == seen:
            assert time.monotonic() < end


def test_of_many_that_see_a_stale_lock_in_a_bucket_only_one_takes_over(folder: BucketFolder) -> None:
    hold(folder, pid=2**22 + 1)
    inside: list[str] = []
    refused: list[str] = []
    ready, over = threading.Barrier(5), threading.Event()

    def take() -> None:
        ready.wait(60)
        try:
            with locked(folder) as token:
                inside.append(token)
                over.wait(60)
        except UserError as error:
            refused.append(str(error))
            if len(refused) == 4:
                over.set()

    threads = [threading.Thread(target=take) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inside), len(refused)) == (1, 4)


def test_a_server_that_knows_no_conditional_writes_is_refused(
    folder: BucketFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(self: BucketFolder, name: str, data: bytes, tag: str | None) -> str:
        self.write(name, data)
        return "tag"

    monkeypatch.setattr(BucketFolder, "write_where", careless)
    with pytest.raises(RunError, match="If-None-Match"), locked(folder):
        pass
    assert folder.top() == set()


def test_a_lock_that_was_taken_over_is_not_removed_by_its_first_holder(folder: BucketFolder) -> None:
    with locked(folder):
        hold(folder, token="another")
    assert lock_module.lock_token(folder) == "another"


# The store


LATTICE = Lattice("EPSG:32633", 0.3, 0.1, 0.2)
CHUNK = 32


def layout(grid: Window) -> Layout:
    return Layout(LATTICE, grid, CHUNK, 3)


def fill_store(folder: BucketFolder, grid: Window) -> dict[tuple[str, int, int], int]:
    opened = prepare_store(folder, layout(grid))
    rng = np.random.default_rng(0)
    return {
        (array, row, col): opened.write_chunk(array, row, col, rng.integers(0, 250, (*leading, CHUNK, CHUNK), np.uint8))
        for row, col in grid.cells(CHUNK)
        for array, leading in (("image", (3,)), ("valid", ()), ("probability", ()))
    }


def assert_holds(opened: Store, sums: dict[tuple[str, int, int], int]) -> None:
    for (array, row, col), expected in sums.items():
        opened.read_chunk(array, row, col, expected)


@pytest.mark.parametrize("count", [0, 1, 4, 6, 8, 11, 100])
def test_a_store_in_a_bucket_grows_though_it_is_killed_at_any_object(
    folder: BucketFolder, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    small, grid = Window(-96, 64, 32, 64), Window(-128, 0, 64, 128)
    sums = fill_store(folder, small)
    move, left = BucketFolder.move, [count]

    def counted(self: BucketFolder, name: str, to: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        move(self, name, to)

    with monkeypatch.context() as patch:
        patch.setattr(BucketFolder, "move", counted)
        patch.setattr(bucket, "AT_ONCE", 1)
        if count < 12:
            with pytest.raises(KeyboardInterrupt):
                prepare_store(folder, layout(grid))
        else:
            prepare_store(folder, layout(grid))
    opened = prepare_store(folder, layout(grid))
    assert opened.grid == grid
    assert_holds(opened, sums)
    assert not [name for name in folder.names("store.zarr") if "moved" in name or "moving" in name]


def test_a_store_of_another_layout_in_a_bucket_is_replaced_and_forgotten(folder: BucketFolder) -> None:
    fill_store(folder, Window(-96, 64, 32, 64))
    Ledger(folder).record("read", "-3_2", "key")
    Ledger(folder).record("scan", "tile", "key")
    prepare_store(folder, Layout(LATTICE, Window(-128, 64, 64, 64), 64, 3))
    assert not [
        name for name in folder.names("store.zarr") if "/c/" in name and name.split("/")[1] in ("image", "valid")
    ]
    assert Ledger(folder).entry("read", "-3_2") is None
    assert Ledger(folder).entry("scan", "tile") is not None


def test_entries_that_were_asked_for_ahead_are_those_of_now(folder: BucketFolder) -> None:
    ledger = Ledger(folder)
    ledger.record("predict", "1_1", "key")
    ledger.look_ahead([("predict", "1_1"), ("predict", "1_2")])
    ledger.record("predict", "1_2", "key")
    ledger.forget("predict", "1_1")
    assert ledger.done("predict", "1_1", "key") is None
    assert ledger.done("predict", "1_2", "key") is not None


# Secrets


@pytest.mark.usefixtures("in_process")
def test_no_secret_is_written_anywhere(
    make_city: MakeCity, buckets: Buckets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets, **upload(city, buckets))
    text = StringIO()
    run.map_city(load_city(config), Console(file=text))
    buckets.client.delete_object(Bucket=BUCKET, Key="tiles/tile2.tif")
    # GDAL takes its header from memory as long as it is open.
    _open_tiles.drop(f"s3://{BUCKET}/tiles/tile2.tif")
    with pytest.raises(UserError):
        run.map_city(load_city(config, [f"images=s3://{BUCKET}/tiles/tile2.tif"]), Console(file=text))
    told = [text.getvalue().encode(), *buckets.objects().values()]
    told += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(told) > 40
    for secret in (SECRET, KEY):
        assert not [data for data in told if secret.encode() in data]


# The configuration


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output": "https://host/run"}, "output: .* is no folder in a bucket"),
        ({"output": "s3://bucket"}, "output: .* is no folder in a bucket"),
        ({"storage": {"endpoint": "http://user:secret@host"}}, "storage.endpoint: .*expected null, or the address"),
        ({"storage": {"endpoint": "host:9000"}}, "storage.endpoint: .*expected null, or the address"),
        ({"storage": {"key": "x"}}, "storage.key: unknown key"),
    ],
)
def test_what_cannot_be_reached_is_refused(make_city: MakeCity, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_city(make_city().set(**changes))


@pytest.mark.usefixtures("buckets")
def test_what_storage_leaves_open_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_S3_ENDPOINT", "of.the.environment")
    bucket.Storage(region="eu-central-1").use()
    assert os.environ["AWS_S3_ENDPOINT"] == "of.the.environment"
    assert os.environ["AWS_REGION"] == "eu-central-1"
    bucket.Storage("https://own.example:9000/", anonymous=True).use()
    assert os.environ["AWS_S3_ENDPOINT"] == "own.example:9000"
    assert (os.environ["AWS_HTTPS"], os.environ["AWS_NO_SIGN_REQUEST"]) == ("YES", "YES")
    bucket.Storage().use()
    assert os.environ["AWS_S3_ENDPOINT"] == "of.the.environment"
    assert not {"AWS_HTTPS", "AWS_NO_SIGN_REQUEST", "AWS_REGION"} & os.environ.keys()


# Status


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("where", ["bucket", "disk"])
def test_status_tells_of_a_run_from_its_store_alone(
    make_city: MakeCity,
    buckets: Buckets,
    killed_after: Callable[[Path, int], bool],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets) if where == "bucket" else city.config
    with pytest.raises(UserError, match="no run has left a trace"):
        status_of(str(config))
    seen: list[dict[str, str]] = []
    join, blocks = stages.join, len(list(make_plan(load_city(config)).blocks()))

    def looking(site: stages.Site, *arguments: Any) -> stages.Receipt:
        if not seen:
            while not (seen and seen[0].get("vectorize", "").startswith(f"{blocks} of {blocks}")):
                seen[:] = [dict(status_of(str(config)))]
        return join(site, *arguments)

    looking.__name__ = "join"
    with monkeypatch.context() as patch:
        patch.setattr("segpipe.pipeline.status.BEAT_S", 0.3)
        patch.setattr(stages, "join", looking)
        map_it(config)
    assert seen[0]["state"].startswith(f"running: process {os.getpid()} on ")
    after = dict(status_of(str(config)))
    assert "state" not in after
    assert "buildings on 2 tiles" in after["published"]


@pytest.mark.parametrize("where", ["bucket", "disk"])
def test_status_tells_why_a_run_has_stopped(
    make_city: MakeCity, buckets: Buckets, in_process: type[FakePredictor], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    city = make_city(1, 2, **SMALL)
    config = in_bucket(city, buckets) if where == "bucket" else city.config

    def broken(site: stages.Site, *arguments: Any) -> stages.Receipt:
        raise RunError("the cause")

    broken.__name__ = "vectorize"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "vectorize", broken)
        with pytest.raises(RunError):
            map_it(config)
    told = dict(status_of(str(load_city(config).folder)))
    assert told["state"].startswith("failed: vectorize")
    assert "the cause" in told["state"]
    assert told["vectorize"].startswith("0 of ")
    assert "failed" in told["vectorize"]
    folder = load_city(config).folder
    progress = json.loads(folder.read(PROGRESS) or b"")
    folder.write(PROGRESS, json.dumps(progress | {"failed": ""}).encode())
    assert dict(status_of(str(folder)))["state"].startswith("killed")
    result = CliRunner().invoke(main, ["status", str(folder)], standalone_mode=False)
    assert f"predict  {told['predict']}" in result.stdout
