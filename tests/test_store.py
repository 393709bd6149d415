"""The store by what other programs see of it; growth, damage, ledger and lock."""

import errno
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zarr
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS

from segpipe.pipeline import lock as module
from segpipe.pipeline.ledger import Ledger
from segpipe.pipeline.lock import check_lock, holder_of, lock_token, locked
from segpipe.pipeline.storage import remove_leftovers
from segpipe.pipeline.store import Layout, Store, prepare_store
from segpipe.tasks.errors import RunError, StorageError, UserError
from segpipe.tasks.grid import Lattice, Window

CHUNK = 32
LATTICE = Lattice(CRS.from_epsg(32633).to_wkt(), 0.3, 0.1, 0.2)
GRID = Window(-96, 64, 64, 96)


def layout(grid: Window = GRID, chunk_px: int = CHUNK, bands: int = 3) -> Layout:
    return Layout(LATTICE, grid, chunk_px, bands)


def chunk(row: int, col: int, *leading: int) -> NDArray[np.uint8]:
    """Pixels that can be told from those of any other chunk."""
    rng = np.random.default_rng((row + 100, col + 100))
    return rng.integers(0, 250, (*leading, CHUNK, CHUNK), np.uint8)


def fill_store(folder: Path, grid: Window = GRID) -> dict[tuple[str, int, int], int]:
    """Write all chunks of a grid; returns their checksums."""
    opened = prepare_store(folder, layout(grid))
    sums = {}
    for row, col in grid.cells(CHUNK):
        sums["image", row, col] = opened.write_chunk("image", row, col, chunk(row, col, 3))
        sums["valid", row, col] = opened.write_chunk("valid", row, col, chunk(row, col) % 2)
        sums["probability", row, col] = opened.write_chunk("probability", row, col, chunk(row, col))
    return sums


def assert_holds(opened: Store, sums: dict[tuple[str, int, int], int]) -> None:
    for (array, row, col), expected in sums.items():
        data = opened.read_chunk(array, row, col, expected)
        assert zlib.crc32(data.tobytes()) == expected


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every chunk file with its inode and time of change."""
    arrays = [folder / "store.zarr" / name for name in ("image", "valid", "probability")]
    found = [p for array in arrays for p in array.rglob("*") if p.is_file() and p.name.isdigit()]
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def test_any_zarr_reader_finds_pixels_crs_and_transform(tmp_path: Path) -> None:
    fill_store(tmp_path)
    group = zarr.open_group(tmp_path / "store.zarr", mode="r", zarr_format=3)
    for name, leading, fill in (("image", (3,), 0), ("valid", (), 0), ("probability", (), 255)):
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (array.shape, array.chunks) == ((*leading, 64, 96), (*leading, CHUNK, CHUNK))
        assert (array.dtype, array.fill_value) == (np.uint8, fill)
        assert array.metadata.dimension_names == (*("band" for _ in leading), "y", "x")
        assert array.attrs["grid_mapping"] == "spatial_ref"
        codec = json.loads((tmp_path / "store.zarr" / name / "zarr.json").read_text())["codecs"][-1]
        assert (codec["name"], codec["configuration"]["checksum"]) == ("zstd", True)
    whole = np.asarray(group["probability"])
    assert np.array_equal(whole[32:, 32:64], chunk(-2, 3))
    transform = Affine(0.3, 0, 0.1 + 64 * 0.3, 0, -0.3, 0.2 + 96 * 0.3)
    assert CRS.from_wkt(str(group.attrs["crs_wkt"])) == CRS.from_epsg(32633)
    assert group.attrs["transform"] == pytest.approx(transform[:6])
    reference = dict(group["spatial_ref"].attrs)
    assert CRS.from_wkt(reference["crs_wkt"]) == CRS.from_epsg(32633)
    assert [float(v) for v in reference["GeoTransform"].split()] == pytest.approx(transform.to_gdal())
    assert np.asarray(group["x"])[:2] == pytest.approx([transform.c + 0.15, transform.c + 0.45])
    assert np.asarray(group["y"])[:2] == pytest.approx([transform.f - 0.15, transform.f - 0.45])


def test_a_window_over_several_chunks_and_the_edge_reads_as_numpy_would(tmp_path: Path) -> None:
    fill_store(tmp_path)
    window = GRID.pad(5)
    found = Store(tmp_path).read("image", window, fill=9)
    frame = np.full((3, *window.shape_yx), 9, np.uint8)
    for cell in GRID.cells(CHUNK):
        frame[(..., *Window.cell(*cell, CHUNK).within(window))] = chunk(*cell, 3)
    assert np.array_equal(found, frame)


def test_a_chunk_of_nothing_but_fill_is_written_all_the_same(tmp_path: Path) -> None:
    opened = prepare_store(tmp_path, layout())
    expected = opened.write_chunk("probability", -3, 2, np.full((CHUNK, CHUNK), 255, np.uint8))
    assert (opened.read_chunk("probability", -3, 2, expected) == 255).all()


@pytest.mark.parametrize(
    ("row", "col", "shape"), [(-4, 2, (CHUNK, CHUNK)), (-3, 5, (CHUNK, CHUNK)), (-3, 2, (CHUNK, CHUNK - 1))]
)
def test_only_whole_chunks_of_the_grid_are_written(tmp_path: Path, row: int, col: int, shape: tuple[int, int]) -> None:
    opened = prepare_store(tmp_path, layout())
    with pytest.raises(ValueError, match="expected a whole chunk"):
        opened.write_chunk("valid", row, col, np.zeros(shape, np.uint8))


def test_a_missing_chunk_is_refused_and_named(tmp_path: Path) -> None:
    sums = fill_store(tmp_path)
    (tmp_path / "store.zarr" / "valid" / "c" / "1" / "2").unlink()
    with pytest.raises(RunError, match="chunk -2, 4 of valid is missing"):
        Store(tmp_path).read_chunk("valid", -2, 4, sums["valid", -2, 4])


def test_a_flipped_bit_anywhere_in_a_chunk_file_is_refused(tmp_path: Path) -> None:
    sums = fill_store(tmp_path)
    file = tmp_path / "store.zarr" / "probability" / "c" / "0" / "1"
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 7):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(RunError, match="chunk -3, 3 of probability"):
            Store(tmp_path).read_chunk("probability", -3, 3, sums["probability", -3, 3])


def test_a_whole_chunk_of_another_time_is_refused(tmp_path: Path) -> None:
    sums = fill_store(tmp_path)
    opened = Store(tmp_path)
    opened.write_chunk("probability", -3, 3, chunk(7, 7))
    with pytest.raises(RunError, match=r"expected .*, which the ledger names"):
        opened.read_chunk("probability", -3, 3, sums["probability", -3, 3])


def test_opening_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a store of segpipe"):
        Store(tmp_path)
    zarr.open_group(tmp_path / "store.zarr", mode="w", zarr_format=3)
    with pytest.raises(RunError, match="not a store of segpipe"):
        Store(tmp_path)


def test_preparing_a_store_again_touches_no_chunk(tmp_path: Path) -> None:
    sums = fill_store(tmp_path)
    before = files(tmp_path)
    assert_holds(prepare_store(tmp_path, layout()), sums)
    assert files(tmp_path) == before


GROWN = [
    pytest.param(Window(-96, 64, 128, 160), id="south-east"),
    pytest.param(Window(-160, 0, 128, 160), id="north-west"),
    pytest.param(Window(-96, 32, 64, 128), id="one-chunk-west"),
    pytest.param(Window(-128, 64, 96, 96), id="one-chunk-north"),
]


@pytest.mark.parametrize("grid", GROWN)
def test_a_store_grows_without_writing_a_chunk_anew(tmp_path: Path, grid: Window) -> None:
    sums = fill_store(tmp_path)
    before = sorted(files(tmp_path).values())
    opened = prepare_store(tmp_path, layout(grid))
    assert opened.grid == grid
    assert_holds(opened, sums)
    assert sorted(files(tmp_path).values()) == before
    group = zarr.open_group(tmp_path / "store.zarr", mode="r", zarr_format=3)
    assert all(group[name].shape[-2:] == grid.shape_yx for name in ("image", "valid", "probability"))
    assert group["x"].shape == (grid.width,)
    assert group.attrs["transform"] == pytest.approx(LATTICE.transform(grid.row_off, grid.col_off)[:6])


def test_a_store_never_shrinks(tmp_path: Path) -> None:
    sums = fill_store(tmp_path)
    opened = prepare_store(tmp_path, layout(Window(-64, 96, 32, 32)))
    assert opened.grid == GRID
    assert_holds(opened, sums)


def interrupted_after(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], bool]:
    """From the count-th rename on, everything that touches the disk fails. Returns whether that came to pass."""
    seen = 0
    rename = Path.rename

    def counted(self: Path, target: Path | str) -> Path:
        nonlocal seen
        if seen >= count:
            raise KeyboardInterrupt
        seen += 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    return lambda: seen >= count


def test_a_move_that_is_killed_at_any_rename_is_carried_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, grid = Window(-96, 64, 32, 64), Window(-128, 0, 64, 128)
    for count in range(100):
        folder = tmp_path / str(count)
        folder.mkdir()
        sums = fill_store(folder, small)
        with monkeypatch.context() as patch:
            killed = interrupted_after(patch, count)
            try:
                prepare_store(folder, layout(grid))
            except KeyboardInterrupt:
                pass
            else:
                assert not killed() or count
                break
        # The next run may want yet another grid.
        wanted = grid if count % 2 else grid.union(Window(-160, -32, 32, 32))
        opened = prepare_store(folder, layout(wanted))
        assert opened.grid == wanted
        assert_holds(opened, sums)
        assert not (folder / "store.zarr" / "moving.json").exists()
    assert count >= 6 + 3, "every chunk file and every array is renamed"


@pytest.mark.parametrize("other", [layout(Window(-128, 64, 128, 128), 64), layout(bands=4)])
def test_a_store_of_another_layout_is_replaced_and_its_chunks_are_forgotten(tmp_path: Path, other: Layout) -> None:
    fill_store(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.record("read", "-3_2", "key")
    ledger.record("predict", "-3_2", "key")
    ledger.record("scan", "tile", "key")
    prepare_store(tmp_path, other)
    assert not files(tmp_path)
    assert ledger.entry("read", "-3_2") is None
    assert ledger.entry("predict", "-3_2") is None
    assert ledger.entry("scan", "tile") is not None


def test_a_grid_off_the_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match="whole chunks of 32 px"):
        layout(Window(-95, 64, 64, 96))


# The ledger


def test_an_entry_counts_only_under_its_key(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record("read", "1_2", "key", checksum={"image": 5})
    assert ledger.done("read", "1_2", "key") == {"key": "key", "checksum": {"image": 5}}
    assert ledger.done("read", "1_2", "other") is None
    assert ledger.done("predict", "1_2", "key") is None
    ledger.forget("read", "1_2")
    ledger.forget("read", "1_2")
    assert ledger.entry("read", "1_2") is None


def test_a_torn_entry_is_as_good_as_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record("read", "1_2", "key")
    path = tmp_path / "ledger" / "read" / "1_2.json"
    path.write_text(path.read_text()[:5])
    assert ledger.done("read", "1_2", "key") is None


def test_what_killed_writers_left_is_removed_but_not_a_lock_in_the_making(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / f"a.json.{'0f' * 16}.partial").write_text("")
    (tmp_path / "notes.partial.txt").write_text("a user's own")
    (tmp_path / "mask.partial-segpipe.tif").write_text("")
    (tmp_path / "lock.abc.partial").write_text("")
    (tmp_path / "mask.tif").write_text("")
    assert remove_leftovers(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger", "lock.abc.partial", "mask.tif", "notes.partial.txt"]


# The lock


DEAD = 2**22 + 1
"""No process has this number."""


def hold(folder: Path, **changes: Any) -> Path:
    """A lock of somebody else's. None: it does not have that."""
    path, beside = folder / "lock.json", folder / "other.json"
    holder = json.loads(module._lock_text("other", 3)) | changes
    beside.write_text(json.dumps({key: value for key, value in holder.items() if value is not None}))
    return beside.replace(path)


@contextmanager
def beating(folder: Path, **changes: Any) -> Iterator[None]:
    """A lock of somebody else's, whose counter moves."""
    over = threading.Event()

    def beat() -> None:
        for counter in itertools.count(4):
            if over.wait(0.02):
                return
            hold(folder, counter=counter, **changes)

    hold(folder, **changes)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def assert_judged_by_its_counter(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> None:
    with patch.context() as patient, beating(folder, **changes):
        patient.setattr(module, "_STALE_S", 60.0)
        with pytest.raises(UserError, match="another run is at work"), locked(folder):
            pass
    with locked(folder) as token:
        assert lock_token(folder) == token


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of an observer in tenths."""
    monkeypatch.setattr(module, "_STALE_S", 0.3)
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    sleep = module.time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on {socket.gethostname()}"), locked(tmp_path):
            pass
        assert (tmp_path / "lock.json").exists()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from segpipe.pipeline.lock import locked\n"
        "with locked(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert (tmp_path / "lock.json").exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_of_the_same_number_but_another_start_is_not_the_holder(tmp_path: Path) -> None:
    hold(tmp_path, started=1.0)
    with locked(tmp_path):
        pass


ELSEWHERE: dict[str, dict[str, str | None]] = {
    "another host": {"host": "elsewhere"},
    "a clone of this host": {"boot_id": "another"},
    "a container of this host": {"pid_namespace": "pid:[1]"},
    "an older version": {"boot_id": None, "pid_namespace": None},
}


@pytest.mark.parametrize("changes", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_lock_whose_process_cannot_be_seen_from_here_is_judged_by_its_counter(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]
) -> None:
    assert_judged_by_its_counter(tmp_path, monkeypatch, pid=DEAD, **changes)


def test_a_lock_is_judged_by_its_counter_where_there_is_no_proc(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROC", tmp_path / "none")
    assert_judged_by_its_counter(tmp_path, monkeypatch, pid=DEAD)


@pytest.mark.parametrize("error", [psutil.NoSuchProcess, psutil.AccessDenied])
def test_a_lock_of_a_living_process_that_is_hidden_from_us_is_judged_by_its_counter(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, error: type[psutil.Error]
) -> None:
    process = psutil.Process

    def hidden(pid: int | None = None) -> psutil.Process:
        if pid is not None:
            raise error(pid)
        return process()

    monkeypatch.setattr(module.psutil, "Process", hidden)
    assert_judged_by_its_counter(tmp_path, monkeypatch)


def test_a_run_in_another_pid_namespace_of_one_host_does_not_take_the_lock(tmp_path: Path, quick: None) -> None:
    alone = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no pid namespace can be made here")
    code = (
        "import sys; from pathlib import Path; from segpipe.pipeline.lock import locked\n"
        "with locked(Path(sys.argv[1])): pass"
    )
    with locked(tmp_path) as token:
        command = [*alone, sys.executable, "-c", code, str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert lock_token(tmp_path) == token
    assert "another run is at work here" in found.stderr


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_lock_of_another_host_whose_counter_stands_still_is_taken_over(
    tmp_path: Path, quick: None, text: str | None
) -> None:
    path = hold(tmp_path, host="elsewhere")
    if text is not None:
        path.write_text(text)
    with locked(tmp_path):
        assert json.loads(path.read_text())["token"] != "other"


def test_a_lock_that_was_taken_over_is_not_removed_by_its_first_holder(tmp_path: Path, quick: None) -> None:
    with locked(tmp_path):
        hold(tmp_path, token="another")
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "another"


def test_of_two_that_see_a_stale_lock_only_one_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path, pid=DEAD)
    stale, seen, taken, over = module._stale, threading.Event(), threading.Event(), threading.Event()
    inside: list[str] = []
    refused: list[str] = []

    def slow(lock: Any, holder: dict[str, Any]) -> bool:
        found = stale(lock, holder)
        if threading.current_thread().name == "slow":
            seen.set()
            taken.wait(10)
        return found

    def run() -> None:
        name = threading.current_thread().name
        try:
            with locked(tmp_path):
                inside.append(name)
                taken.set()
                over.wait(10)
        except UserError as error:
            refused.append(str(error))

    monkeypatch.setattr(module, "_stale", slow)
    threads = [threading.Thread(target=run, name=name) for name in ("slow", "quick")]
    threads[0].start()
    assert seen.wait(10)
    threads[1].start()
    threads[0].join()
    over.set()
    threads[1].join()
    assert inside == ["quick"]
    assert "another run is at work" in refused[0]


def test_the_token_of_the_lock_is_known_while_it_is_held(tmp_path: Path) -> None:
    with locked(tmp_path) as token:
        assert lock_token(tmp_path) == token
    assert lock_token(tmp_path) is None


def fail_to_read_once(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let reading the lock fail; gives what is set when it has."""
    read, failed = module._read, threading.Event()

    def failing(path: Path) -> dict[str, Any] | None:
        if failed.is_set():
            return read(path)
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(module, "_read", failing)
    return failed


def test_a_holder_that_cannot_read_its_lock_once_goes_on_to_move_the_counter(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path):
        assert fail_to_read_once(monkeypatch).wait(10)
        seen, end = holder_of(tmp_path), time.monotonic() + 10
        while holder_of(tmp_path) == seen:
            assert time.monotonic() < end


def test_a_lock_that_cannot_be_read_at_the_end_is_left_to_grow_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path) as token:
        failed = fail_to_read_once(monkeypatch)
    assert failed.is_set()
    assert lock_token(tmp_path) == token


def test_a_run_whose_lock_is_not_its_own_by_now_is_told_so(tmp_path: Path) -> None:
    with locked(tmp_path) as token:
        check_lock(tmp_path, token)
        path = hold(tmp_path, token="another")
        with pytest.raises(StorageError, match="another run is at work here"):
            check_lock(tmp_path, token)
        path.unlink()
        with pytest.raises(StorageError, match="its lock is gone"):
            check_lock(tmp_path, token)
        check_lock(tmp_path, "")
