"""The stages on a worker: what one task reads from the store, which function of `tasks` works on it, what it writes.

Every task is idempotent, writes only its own region, and enters itself in the ledger last. It is named by the plan and
an absolute index, and returns a receipt of a few bytes: no array ever passes through the scheduler.
"""

from __future__ import annotations

import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from segpipe.tasks.errors import DamageError, RunError, TileError
from segpipe.tasks.files import file_digest, file_stamp
from segpipe.tasks.fragments import border_from_bytes, fragment_to_bytes
from segpipe.tasks.grid import Window
from segpipe.tasks.merge import merge
from segpipe.tasks.predict import INVALID, reach
from segpipe.tasks.read import Tile, check_readable, read_window
from segpipe.tasks.seams import Joins, collect, cut_buildings
from segpipe.tasks.seams import join as unite_pieces
from segpipe.tasks.validity import scan_tile
from segpipe.tasks.vectorize import UNKNOWN, Buildings, Components, finish, vectorize_block

from .ledger import Ledger
from .lock import check_lock
from .network import LoadedNetwork, Passed
from .plan import Plan, key_of
from .spare import Spare
from .storage import Folder
from .store import Store

Cell = tuple[int, int]
"""Absolute index (row, col) of a chunk or a block."""

ReadChunk = Callable[[str, str, Cell], NDArray[np.uint8]]

JOIN_CACHE_BYTES = 2**25
"""Decoded chunks that are held while the buildings of one block are joined."""

VERSIONS = {"scan": 2, "read": 3, "predict": 6, "vectorize": 3, "join": 3}
"""Raised when a stage of a new version gives other bytes for the same input: what older ones did is then not done."""


@dataclass(frozen=True)
class Receipt:
    """What a task tells the driver: pixels worked on, bytes written, seconds, and a few values of its stage."""

    stage: str
    unit: str
    pixels: int
    bytes: int
    seconds: float
    values: dict[str, Any]


class Site:
    """What a process holds to work on a plan: the store, the ledger, the network, and memory of windows."""

    def __init__(self, plan: Plan) -> None:
        plan.storage.use()
        self.plan = plan
        self.folder = plan.folder
        self.ledger = Ledger(plan.folder)
        self._lock = threading.Lock()
        self._store: Store | None = None
        self.network = LoadedNetwork(plan)
        self.spare = Spare()

    @property
    def store(self) -> Store:
        """The store, opened on first use."""
        with self._lock:
            if self._store is None:
                self._store = Store(self.folder)
            return self._store

    def begin(self, stage: str, unit: str) -> None:
        """Before the first write of a unit: take its old entry back, for its data is about to be another's.

        StorageError if another run has the lock by now: a task may outlive the driver that has sent it.
        """
        check_lock(self.folder, self.plan.lock)
        self.ledger.forget(stage, unit)


def tile_unit(plan: Plan, tile: int) -> str:
    """The name of a tile's ledger entry: its file name, told apart by its path."""
    path = Path(plan.tiles[tile].path)
    return f"{path.stem}-{blake2b(str(path).encode(), digest_size=4).hexdigest()}"


def cell_unit(row: int, col: int) -> str:
    """The name of a chunk's or block's ledger entry."""
    return f"{row}_{col}"


def scan_settings(plan: Plan, tile: int) -> str:
    """A digest of all that decides a tile's validity besides its pixels."""
    it = plan.tiles[tile]
    rule = (it.nodata, it.tolerance, it.speckle_tolerance, it.mask, plan.min_nodata_pixels(tile))
    return key_of(VERSIONS["scan"], it.window, it.bands, rule)


def chunk_key(plan: Plan, chunk: Cell, tiles: list[tuple[int, str]]) -> str:
    """What a chunk is made from: its place, and its tiles, by index and digest, each with where it lies."""
    lattice = plan.lattice
    place = (lattice.crs_wkt, lattice.pixel_size, lattice.phase_x, lattice.phase_y, plan.chunk_px, chunk)
    made_of = [
        (digest, scan_settings(plan, tile), plan.tiles[tile].mosaic, plan.tiles[tile].scale) for tile, digest in tiles
    ]
    return key_of(VERSIONS["read"], place, made_of)


def predict_key(plan: Plan, block: Cell, chunks: list[tuple[Cell, str]]) -> str:
    """What a block's probabilities are made from: weights, recipe, and the chunks under it, by index and key."""
    return key_of(VERSIONS["predict"], plan.model_digest, plan.recipe, block, chunks)


def vectorize_key(plan: Plan, predicted: str) -> str:
    """What a block's fragment is made from: its probabilities, by their key, and the settings."""
    return key_of(VERSIONS["vectorize"], predicted, plan.vector)


def join_key(plan: Plan, joins: Joins, blocks: Sequence[Cell], pieces: list[tuple[str, str]]) -> str:
    """What joined buildings are made from: the fragments of their pieces, by unit and key, and what goes together.

    Then whether all around these blocks is predicted, which decides what is cut.
    """
    around = [plan.open_sides(block) for block in blocks]
    numbers = (joins.building - joins.building[0], joins.block, joins.label)
    return key_of(VERSIONS["join"], pieces, [n.tolist() for n in numbers], around)


def _expect_key(found: str, key: str, what: str) -> None:
    if found != key:
        raise RunError(f"{what}: the ledger has other inputs by now than this task was sent for; run again")


def scan(site: Site, tile: int) -> Receipt:
    """Read one whole tile: its digest, and which of its pixels are invalid and why. Kept under `validity/`.

    A tile whose stamp has changed but whose digest has not is not looked at again. One that was skipped is decoded to
    its end before it counts as readable.
    """
    start = time.perf_counter()
    plan = site.plan
    it, unit, settings = plan.tiles[tile], tile_unit(plan, tile), scan_settings(plan, tile)
    stamp = list(file_stamp(it.path))
    digest = file_digest(it.path)
    if site.ledger.entry("skip", unit) is not None:
        check_readable(it)
        site.ledger.forget("skip", unit)
    known = site.ledger.done("scan", unit, settings)
    if known is not None and known["digest"] == digest:
        values = {name: known[name] for name in ("invalid_px", "by_reason")}
    else:
        with _Validity.writing(site.folder, unit, settings, digest) as write_invalid:
            found = scan_tile(it, plan.min_nodata_pixels(tile), write_invalid)
        values = {"invalid_px": found.invalid_px, "by_reason": found.by_reason}
    site.ledger.record("scan", unit, settings, path=it.path, stamp=stamp, digest=digest, **values)
    seconds = time.perf_counter() - start
    return Receipt("scan", unit, it.window.pixels, 0, seconds, values | {"tile": tile, "digest": digest})


class _Validity:
    """The invalid pixels of a tile: a zip file of bit masks, one for each piece that has any."""

    @staticmethod
    @contextmanager
    def writing(
        folder: Folder, unit: str, settings: str, digest: str
    ) -> Iterator[Callable[[Window, NDArray[np.bool_]], None]]:
        name = _Validity.name(unit, settings, digest)
        with folder.writing(name) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
            yield lambda window, mask: file.writestr(
                "_".join(str(n) for n in (window.row_off, window.col_off, *window.shape_yx)),
                np.packbits(mask).tobytes(),
            )

    @staticmethod
    def read(folder: Folder, name: str, window: Window) -> NDArray[np.bool_] | None:
        """True where a pixel of the window is invalid; None where all are valid."""
        invalid: NDArray[np.bool_] | None = None
        with folder.open(name) as stream, zipfile.ZipFile(stream) as file:
            for part in file.namelist():
                piece = Window(*(int(n) for n in part.split("_")))
                common = piece.intersect(window)
                if common.pixels:
                    invalid = np.zeros(window.shape_yx, np.bool_) if invalid is None else invalid
                    bits = np.unpackbits(np.frombuffer(file.read(part), np.uint8), count=piece.pixels)
                    mask = bits.reshape(piece.shape_yx).astype(np.bool_)
                    invalid[common.within(window)] = mask[common.within(piece)]
        return invalid

    @staticmethod
    def name(unit: str, settings: str, digest: str) -> str:
        return f"validity/{unit}-{settings[:8]}-{digest}.zip"


def read(site: Site, row: int, col: int, key: str, tiles: tuple[tuple[int, str], ...]) -> Receipt:
    """Copy tiles into one chunk of `image` and `valid`. tiles: index and digest of those to be read, the last wins.

    What is done already is not done again, as in `predict`.
    """
    start = time.perf_counter()
    plan, unit = site.plan, cell_unit(row, col)
    window = Window.cell(row, col, plan.chunk_px)
    if (known := site.ledger.done("read", unit, key)) is not None:
        values = {"valid_px": known["valid_px"]}
        return Receipt("read", unit, window.pixels, 0, time.perf_counter() - start, values)
    entries = {plan.tiles[tile].path: _scanned(site, tile, digest) for tile, digest in tiles}

    def invalid(tile: Tile, part: Window) -> NDArray[np.bool_] | None:
        name, _ = entries[tile.path]
        try:
            return _Validity.read(site.folder, name, part)
        except (OSError, zipfile.BadZipFile, zlib.error, ValueError) as error:
            site.ledger.forget("scan", tile_unit(plan, plan.tiles.index(tile)))
            raise DamageError(
                f"{site.folder.file(name)}: {error}; expected what scan wrote; run again, it will be made anew"
            ) from None

    if tiles:
        image_CHW, valid_HW = read_window([plan.tiles[tile] for tile, _ in tiles], window, invalid)
    else:
        image_CHW = np.zeros((plan.layout.bands, *window.shape_yx), np.uint8)
        valid_HW = np.zeros(window.shape_yx, np.bool_)
    for path, (_, stamp) in entries.items():
        if list(file_stamp(path)) != stamp:
            raise TileError(path, "has changed since it was looked at, in the middle of this run")
    site.begin("read", unit)
    valid_u8 = valid_HW.astype(np.uint8)
    sums = {
        "image": site.store.write_chunk("image", row, col, image_CHW),
        "valid": site.store.write_chunk("valid", row, col, valid_u8),
    }
    valid_px = int(np.count_nonzero(valid_HW))
    site.ledger.record("read", unit, key, checksum=sums, valid_px=valid_px)
    seconds = time.perf_counter() - start
    return Receipt("read", unit, window.pixels, image_CHW.nbytes, seconds, {"valid_px": valid_px})


def _scanned(site: Site, tile: int, digest: str) -> tuple[str, list[str | int]]:
    """Where the invalid pixels of a tile are, and the stamp that it had when it was looked at."""
    unit, settings = tile_unit(site.plan, tile), scan_settings(site.plan, tile)
    entry = site.ledger.done("scan", unit, settings)
    if entry is None or entry["digest"] != digest:
        raise DamageError(f"{site.plan.tiles[tile].path}: the ledger has another scan of it by now; run again")
    return _Validity.name(unit, settings, digest), entry["stamp"]


def predict(site: Site, row: int, col: int, key: str) -> Receipt:
    """Predict the core of one block and write its chunks of `probability`.

    What is done already is not done again: a worker may have died before its receipt was fetched.
    """
    start = time.perf_counter()
    plan, unit = site.plan, cell_unit(row, col)
    core = plan.core(row, col)
    outer = reach(core, plan.recipe.halo_px, plan.card.stride)
    under = [(chunk, key_in_ledger(site, "read", chunk)) for chunk in plan.chunks_in(outer)]
    _expect_key(predict_key(plan, (row, col), under), key, f"block {unit}")
    if (known := site.ledger.done("predict", unit, key)) is not None:
        values = {"valid_px": known["valid_px"], "seen_px": 0, "device": {}}
        return Receipt("predict", unit, known["valid_px"], 0, time.perf_counter() - start, values)
    with site.spare.array((plan.layout.bands + 1, *outer.shape_yx)) as planes_PHW:
        # The last plane is what is valid, 0 or 1, the others are the image.
        valid_HW = _merged(site, "read", "valid", outer, 0, out=planes_PHW[-1]).view(np.bool_)
        if valid_HW[core.within(outer)].any():
            image_CHW = read_image(site, outer, out=planes_PHW[:-1])
            passed = site.network.predict_core(image_CHW, valid_HW, core, start)
        else:
            passed = Passed(np.full(core.shape_yx, INVALID, np.uint8), 0, {})
    prob_HW = passed.prob_HW
    # Another worker may have done it in the meantime: one that was held for lost.
    earlier = site.ledger.done("predict", unit, key)
    site.begin("predict", unit)
    sums = {}
    for chunk in plan.chunks_in(core):
        part = prob_HW[Window.cell(*chunk, plan.chunk_px).within(core)]
        sums[cell_unit(*chunk)] = site.store.write_chunk("probability", *chunk, part)
    site.network.written()
    valid_px = int(np.count_nonzero(prob_HW != INVALID))
    times = 1 if earlier is None else earlier.get("times", 1) + 1
    site.ledger.record("predict", unit, key, checksum=sums, valid_px=valid_px, times=times)
    values = {"valid_px": valid_px, "seen_px": passed.seen_px, "device": passed.seconds}
    return Receipt("predict", unit, valid_px, len(sums) * plan.chunk_px**2, time.perf_counter() - start, values)


def vectorize(site: Site, row: int, col: int, key: str) -> Receipt:
    """Make the fragment of one block: finished buildings, pieces that touch its sides, sums."""
    start = time.perf_counter()
    plan, unit = site.plan, cell_unit(row, col)
    core = plan.core(row, col)
    _expect_key(vectorize_key(plan, key_in_ledger(site, "predict", (row, col))), key, f"block {unit}")
    prob_HW = read_probability(site, core)
    fragment = vectorize_block(prob_HW, core, plan.lattice, plan.vector)
    data = fragment_to_bytes(fragment)
    site.begin("vectorize", unit)
    site.folder.write(fragment_name(row, col), data)
    values = {
        "valid_px": fragment.valid_pixels,
        "mask_px": fragment.mask_pixels,
        "finished": len(fragment.finished),
        "border": len(fragment.border),
    }
    site.ledger.record("vectorize", unit, key, checksum=zlib.crc32(data), **values)
    return Receipt("vectorize", unit, fragment.valid_pixels, len(data), time.perf_counter() - start, values)


def join(site: Site, row: int, col: int, key: str, joins: Joins, blocks: tuple[Cell, ...]) -> Receipt:
    """Unite the buildings whose first pixel lies in one block and which touch its sides. blocks: index by number."""
    start = time.perf_counter()
    plan, unit = site.plan, cell_unit(row, col)
    pieces = [(cell_unit(*block), key_in_ledger(site, "vectorize", block)) for block in blocks]
    _expect_key(join_key(plan, joins, blocks, pieces), key, f"joining at block {unit}")

    def read_border(number: int) -> Components:
        return border_from_bytes(read_fragment(site, *blocks[number]))

    found, building = collect(joins, read_border)
    whole = unite_pieces(found, building)
    cut = cut_buildings(found, building, plan.block_px, plan.open_sides)
    # Pixels are looked at by cells of a chunk, row by row: the chunks of a few rows are decoded once.
    read_chunk = lru_cache(max(1, JOIN_CACHE_BYTES // plan.chunk_px**2))(partial(_checked_chunk, site))
    buildings = finish(whole, plan.vector, plan.lattice, partial(_read_known, site, read_chunk), cut)
    data = _to_ipc(buildings.to_arrow())
    site.begin("join", unit)
    site.folder.write(joined_name(row, col), data)
    bounds = shapely.bounds(whole.geometry)
    oversized = int(np.count_nonzero((bounds[:, 2:] - bounds[:, :2] > plan.block_px).any(axis=1)))
    reach = shapely.total_bounds([*buildings.geometry, *buildings.raw]).tolist() if len(buildings) else None
    values = {"joined": len(whole), "finished": len(buildings), "oversized": oversized, "reach": reach}
    site.ledger.record("join", unit, key, checksum=zlib.crc32(data), **values)
    return Receipt("join", unit, int(whole.pixels.sum()), len(data), time.perf_counter() - start, values)


def _read_known(site: Site, read_chunk: ReadChunk, window: Window) -> NDArray[np.uint8]:
    """prob_HW of a window, UNKNOWN where there is imagery but nothing is predicted."""
    plan, prob_HW = site.plan, _merged(site, "predict", "probability", window, INVALID, read_chunk)
    for block in window.cells(plan.block_px) if plan.area is not None else ():
        core = plan.core(*block)
        if not plan.is_predicted(block) and plan.tiles_in(core):
            prob_HW[core.intersect(window).within(window)] = UNKNOWN
    return prob_HW


def fragment_name(row: int, col: int) -> str:
    """The file of a block's fragment."""
    return f"fragments/{cell_unit(row, col)}.arrow"


def joined_name(row: int, col: int) -> str:
    """The file of the buildings that were joined over seams and have their first pixel in a block."""
    return f"fragments/{cell_unit(row, col)}.joined.arrow"


def key_in_ledger(site: Site, stage: str, cell: Cell) -> str:
    """The key in a unit's ledger entry. DamageError where there is none (any more)."""
    entry = site.ledger.entry(stage, cell_unit(*cell))
    if entry is None:
        raise DamageError(f"{stage} {cell_unit(*cell)}: not in the ledger; expected it done; run again")
    return str(entry["key"])


def read_fragment(site: Site, row: int, col: int) -> bytes:
    """The file of a block's fragment, compared with the ledger's checksum. RunError if it is missing or another one."""
    return _checked(site, "vectorize", row, col, fragment_name(row, col))


def read_joined(site: Site, row: int, col: int) -> Buildings:
    """The joined buildings that have their first pixel in a block, compared with the ledger's checksum."""
    data = _checked(site, "join", row, col, joined_name(row, col))
    # In this thread: so little is decompressed that handing it to others takes longer.
    return Buildings.from_arrow(pa.ipc.open_file(data, options=pa.ipc.IpcReadOptions(use_threads=False)).get_batch(0))


def _to_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _checked(site: Site, stage: str, row: int, col: int, name: str) -> bytes:
    entry = site.ledger.entry(stage, cell_unit(row, col))
    try:
        data = site.folder.read(name) or b""
        reason = "another checksum than the ledger's" if data else "missing"
    except OSError as error:
        data, reason = b"", str(error)
    if entry is None or not data or zlib.crc32(data) != entry["checksum"]:
        site.ledger.forget(stage, cell_unit(row, col))
        raise DamageError(
            f"{site.folder.file(name)}: {reason}; expected the file that {stage} wrote; run again, it will be made anew"
        )
    return data


def read_probability(site: Site, window: Window) -> NDArray[np.uint8]:
    """prob_HW of any window of the lattice, 255 where nothing is predicted. RunError for a missing or damaged chunk."""
    return _merged(site, "predict", "probability", window, INVALID)


def read_image(site: Site, window: Window, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """image_CHW of any window of the lattice, 0 outside the tiles. RunError for a missing or damaged chunk."""
    return _merged(site, "read", "image", window, 0, out=out)


def _merged(
    site: Site,
    stage: str,
    array: str,
    window: Window,
    fill: int,
    read_chunk: ReadChunk | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """A window of an array, put together from whole chunks, each compared with its checksum in the ledger.

    read_chunk: gives a chunk of an array that a stage has written, with its checksum compared. out: where it is put.
    """
    plan, read_chunk = site.plan, read_chunk or partial(_checked_chunk, site)
    chunks = plan.chunks_in(window) if stage == "read" else plan.predicted_chunks_in(window)

    def read(chunk: Cell) -> NDArray[np.uint8] | DamageError:
        try:
            return read_chunk(stage, array, chunk)
        except DamageError as error:
            return error

    def parts() -> Iterator[tuple[Window, NDArray[np.uint8]]]:
        damaged: list[RunError] = []
        for chunk, found in zip(chunks, site.folder.each(read, chunks), strict=True):
            if isinstance(found, DamageError):
                damaged.append(found)
            else:
                yield Window.cell(*chunk, plan.chunk_px), found
        if damaged:
            # All of them are looked at, and forgotten, before the first is told: one more pass is to heal them all.
            raise damaged[0]

    return merge(window, parts(), [Window.cell(*chunk, plan.chunk_px) for chunk in chunks], fill, out)


def _checked_chunk(site: Site, stage: str, array: str, chunk: Cell) -> NDArray[np.uint8]:
    """A whole chunk, compared with its checksum in the ledger, where that stage has entered it."""
    plan = site.plan
    # A probability chunk is entered under its block, the others under themselves.
    owner = chunk if stage == "read" else tuple(i * plan.chunk_px // plan.block_px for i in chunk)
    unit = cell_unit(*owner)
    entry = site.ledger.entry(stage, unit)
    if entry is None:
        raise DamageError(f"chunk {cell_unit(*chunk)} of {array}: not in the ledger; expected it done by {stage}")
    try:
        return site.store.read_chunk(array, *chunk, entry["checksum"][array if stage == "read" else cell_unit(*chunk)])
    except RunError as error:
        site.ledger.forget(stage, unit)
        raise DamageError(f"{error}; run again, it will be made anew") from None


def forget_damaged(site: Site) -> int:
    """Look at all that the ledger says is vectorized, predicted or joined, and take back what is damaged; how many."""
    plan, count = site.plan, 0
    for block in plan.blocks():
        looks: list[Callable[[], object]] = [partial(read_fragment, site, *block)]
        if site.ledger.entry("join", cell_unit(*block)) is not None:
            looks.append(partial(read_joined, site, *block))
        looks += [
            partial(_checked_chunk, site, "predict", "probability", chunk)
            for chunk in plan.chunks_in(plan.core(*block))
        ]
        for look in looks:
            try:
                look()
            except DamageError:
                count += 1
    return count
