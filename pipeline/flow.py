"""Which task is next: blocks carried through scan, read, predict and vectorize with no barrier between the stages.

A block is predicted as soon as the chunks under it and its halo are read, while others are still being read or are
already vectorized. Only a window of blocks as wide as the pool's capacity is under way; of the rest nothing is held
but a byte a chunk. What the ledger says is done is not done again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

import numpy as np

from segpipe.tasks.errors import DamageError, RunError, StorageError, TileError, UnreachableError
from segpipe.tasks.files import file_stamp
from segpipe.tasks.fragments import sides_from_bytes
from segpipe.tasks.grid import Cells, CellWindows, Window
from segpipe.tasks.predict import reach
from segpipe.tasks.seams import Joins, plan_joins

from . import stages
from .cluster import Outcome, Pool, Task
from .plan import Plan
from .progress import Listener
from .stages import Site, cell_unit, scan_settings, tile_unit

Block = stages.Cell
Chunk = stages.Cell

STAGES = ("scan", "read", "predict", "vectorize")
_PRIORITY = {"vectorize": 0, "predict": 1, "read": 2, "scan": 3, "join": 0}
_UNKNOWN, _DONE, _FAILED = 0, 1, 2
LOOK_AHEAD = 64
"""Blocks whose entries are asked for together, where the ledger is in a bucket."""
GIVE_UP_AFTER = 10
"""Failures without any success after which the rest is not tried: something is wrong everywhere."""


class Flow:
    """One pass over all blocks of a plan. skipped: tiles that cannot be read, and why; they count as invalid."""

    def __init__(self, plan: Plan, pool: Pool, listener: Listener, skipped: dict[int, str]) -> None:
        self._plan, self._pool, self._listener = plan, pool, listener
        self._site = Site(plan)
        self._skipped = dict(skipped)
        self._digests: dict[int, str] = {}
        grid = plan.layout.grid
        self._origin = (grid.row_off // plan.chunk_px, grid.col_off // plan.chunk_px)
        self._chunks = np.zeros((grid.height // plan.chunk_px, grid.width // plan.chunk_px), np.uint8)
        self._failed_tiles: set[int] = set()
        self._waiting: defaultdict[tuple[str, int | Chunk], list[Block]] = defaultdict(list)
        self._missing: dict[Block, int] = {}
        self._in_flight = 0
        self._to_predict = 0
        self._successes = 0
        self.failures: list[tuple[str, str, BaseException]] = []
        self.newly_skipped: dict[int, str] = {}
        # What is asked for again by the next block or by the next row of them, and no more than that.
        rows_seen = (plan.block_px + 2 * (plan.recipe.halo_px + plan.card.stride)) // plan.chunk_px + 2
        self._chunk_key = lru_cache(maxsize=rows_seen * self._chunks.shape[1])(self._key_of_chunk)
        self._chunks_under = lru_cache(maxsize=LOOK_AHEAD)(self._chunks_seen_by)
        self._predict_key = lru_cache(maxsize=4 * LOOK_AHEAD)(self._key_of_block)

    def run(self) -> None:
        """Carry every block as far as it goes. What failed is in `failures`, tiles to be skipped in `newly_skipped`."""
        blocks = self._blocks()
        more = True
        while more or self._in_flight:
            while more and self._in_flight < self._pool.capacity:
                block = next(blocks, None)
                more = block is not None and not self._hopeless()
                if more and block is not None:
                    self._admit(block)
            if not (more or self._missing or self._to_predict):
                self._pool.spare_gpus()
            if self._in_flight:
                self._take(self._pool.next())

    def _blocks(self) -> Iterator[Block]:
        """All blocks of the plan, the ledger being asked for those to come."""
        blocks = self._plan.blocks()
        while some := [*islice(blocks, LOOK_AHEAD)]:
            self._site.ledger.look_ahead(
                (stage, cell_unit(*block)) for block in some for stage in ("predict", "vectorize")
            )
            yield from some

    def _hopeless(self) -> bool:
        return self._successes == 0 and len(self.failures) >= GIVE_UP_AFTER

    # A block's way

    def _admit(self, block: Block) -> None:
        tiles = self._tiles_under(block)
        wanted: list[tuple[str, int | Chunk]] = []
        for tile in sorted(tiles - self._skipped.keys() - self._digests.keys()):
            if tile in self._failed_tiles:
                return
            # What is under way may be in the ledger already; its outcome will come all the same.
            if ("scan", tile) in self._waiting or not self._scan_is_known(tile):
                wanted.append(("scan", tile))
        self._missing[block] = 0
        for unit in wanted:
            self._want(unit, block)
        if not self._missing.get(block, 1):
            self._tiles_are_known(block)

    def _tiles_are_known(self, block: Block) -> None:
        del self._missing[block]
        if self.newly_skipped and not self._tiles_under(block).isdisjoint(self.newly_skipped):
            return
        ledger, unit, key = self._site.ledger, cell_unit(*block), self._predict_key(block)
        if ledger.done("predict", unit, key) is not None:
            self._listener.reused("predict")
            vectorized = stages.vectorize_key(self._plan, key)
            if ledger.done("vectorize", unit, vectorized) is not None:
                self._listener.reused("vectorize")
            else:
                self._submit("vectorize", (*block, vectorized))
            return
        chunks = self._chunks_under(block)
        if any(self._state(chunk) == _FAILED for chunk in chunks):
            return
        self._missing[block] = 0
        for chunk in chunks:
            if self._state(chunk) != _DONE and (("read", chunk) in self._waiting or not self._read_is_known(chunk)):
                self._want(("read", chunk), block)
        if not self._missing[block]:
            self._chunks_are_read(block)

    def _chunks_are_read(self, block: Block) -> None:
        del self._missing[block]
        self._submit("predict", (*block, self._predict_key(block)), gpu=True)

    # Tiles and chunks, wanted by several blocks

    def _want(self, unit: tuple[str, int | Chunk], block: Block) -> None:
        self._missing[block] += 1
        first = unit not in self._waiting
        self._waiting[unit].append(block)
        if first:
            stage, index = unit
            if isinstance(index, int):
                self._submit(stage, (index,))
            else:
                tiles = tuple((t, self._digests[t]) for t in self._readable_tiles(index))
                self._submit(stage, (*index, self._chunk_key(index), tiles))

    def _scan_is_known(self, tile: int) -> bool:
        entry = self._site.ledger.done("scan", tile_unit(self._plan, tile), scan_settings(self._plan, tile))
        try:
            known = entry is not None and self._site.ledger.entry("skip", tile_unit(self._plan, tile)) is None
            known = (
                known and entry is not None and list(entry["stamp"]) == list(file_stamp(self._plan.tiles[tile].path))
            )
        except TileError:
            return False
        if known and entry is not None:
            self._digests[tile] = entry["digest"]
            self._listener.reused("scan")
        return known

    def _read_is_known(self, chunk: Chunk) -> bool:
        done = self._site.ledger.done("read", cell_unit(*chunk), self._chunk_key(chunk)) is not None
        if done:
            self._set(chunk, _DONE)
            self._listener.reused("read")
        return done

    # Tasks

    def _submit(self, stage: str, arguments: tuple[object, ...], gpu: bool = False) -> None:
        self._in_flight += 1
        self._to_predict += gpu
        self._pool.submit(Task(getattr(stages, stage), arguments, gpu, _PRIORITY[stage]))

    def _take(self, outcome: Outcome) -> None:
        self._in_flight -= 1
        self._to_predict -= outcome.task.gpu
        stage, arguments = outcome.task.stage.__name__, outcome.task.arguments
        if outcome.receipt is None:
            assert outcome.error is not None
            self._failed(stage, arguments, outcome.error)
            return
        self._successes += 1
        self._listener.done(outcome.receipt, outcome)
        if stage == "scan":
            self._digests[arguments[0]] = outcome.receipt.values["digest"]
            self._release(("scan", arguments[0]), self._tiles_are_known)
        elif stage == "read":
            self._set(arguments[:2], _DONE)
            self._release(("read", arguments[:2]), self._chunks_are_read)
        elif stage == "predict":
            self._submit("vectorize", (*arguments[:2], stages.vectorize_key(self._plan, arguments[2])))

    def _release(self, unit: tuple[str, int | Chunk], go_on: Callable[[Block], None]) -> None:
        for block in self._waiting.pop(unit):
            if block in self._missing:
                self._missing[block] -= 1
                if not self._missing[block]:
                    go_on(block)

    def _failed(self, stage: str, arguments: tuple[object, ...], error: BaseException) -> None:
        unit: tuple[str, int | Chunk]
        if stage == "scan":
            assert isinstance(arguments[0], int)
            unit = ("scan", arguments[0])
            self._failed_tiles.add(arguments[0])
            name = self._plan.tiles[arguments[0]].path
        else:
            index = (int(str(arguments[0])), int(str(arguments[1])))
            unit, name = (stage, index), cell_unit(*index)
            if stage == "read":
                self._set(index, _FAILED)
        for block in self._waiting.pop(unit, ()):
            self._missing.pop(block, None)
        if isinstance(error, StorageError):
            raise error
        unreadable = isinstance(error, TileError) and not isinstance(error, UnreachableError)
        if isinstance(error, TileError) and unreadable and self._plan.skip_bad_tiles:
            tile = next(i for i, tile in enumerate(self._plan.tiles) if tile.path == error.path)
            if tile not in self.newly_skipped:
                self._listener.say(f"skipped: {error}; it counts as nodata")
                self._site.ledger.record("skip", tile_unit(self._plan, tile), error.reason)
            self.newly_skipped[tile] = error.reason
            return
        self._listener.failed(stage, name, error)
        self.failures.append((stage, name, error))

    # Keys: from which inputs and settings a unit is made

    def _key_of_chunk(self, chunk: Chunk) -> str:
        return stages.chunk_key(self._plan, chunk, [(t, self._digests[t]) for t in self._readable_tiles(chunk)])

    def _key_of_block(self, block: Block) -> str:
        chunks = [(chunk, self._chunk_key(chunk)) for chunk in self._chunks_under(block)]
        return stages.predict_key(self._plan, block, chunks)

    # Where things lie

    def _chunks_seen_by(self, block: Block) -> list[Chunk]:
        plan = self._plan
        return plan.chunks_in(reach(plan.core(*block), plan.recipe.halo_px, plan.card.stride))

    def _tiles_under(self, block: Block) -> set[int]:
        cells = (Window.cell(*chunk, self._plan.chunk_px) for chunk in self._chunks_under(block))
        return {tile for cell in cells for tile in self._plan.tiles_in(cell)}

    def _readable_tiles(self, chunk: Chunk) -> list[int]:
        tiles = self._plan.tiles_in(Window.cell(*chunk, self._plan.chunk_px))
        return [tile for tile in tiles if tile not in self._skipped]

    def _state(self, chunk: Chunk) -> int:
        return int(self._chunks[chunk[0] - self._origin[0], chunk[1] - self._origin[1]])

    def _set(self, chunk: Chunk, state: int) -> None:
        self._chunks[chunk[0] - self._origin[0], chunk[1] - self._origin[1]] = state


def run_joins(plan: Plan, pool: Pool, listener: Listener) -> Cells:
    """Unite the buildings that seams have cut; returns the blocks that are home of one. RunError if one fails."""
    site = Site(plan)
    blocks = Cells(plan.blocks())
    fragments = site.folder.each(lambda block: stages.read_fragment(site, *block), blocks)
    joins = plan_joins(CellWindows(blocks, plan.block_px), lambda _: sides_from_bytes(next(fragments)))
    homes = np.unique(joins.home)
    listener.expect("join", len(homes))
    # A building is joined at most a few rows of blocks from where its home's other buildings are.
    key_of = lru_cache(maxsize=4 * plan.layout.grid.width // plan.block_px + LOOK_AHEAD)(
        lambda block: stages.key_in_ledger(site, "vectorize", block)
    )
    failures: list[tuple[str, BaseException]] = []
    waiting = map(int, homes)
    in_flight, more = 0, True
    while more or in_flight:
        while more and in_flight < pool.capacity:
            home = next(waiting, None)
            more = home is not None
            if home is not None and (task := _join_task(site, blocks, joins.at(home), home, key_of)) is not None:
                pool.submit(task)
                in_flight += 1
            elif home is not None:
                listener.reused("join")
        if in_flight:
            outcome = pool.next()
            in_flight -= 1
            if outcome.receipt is not None:
                listener.done(outcome.receipt, outcome)
            elif isinstance(outcome.error, StorageError):
                raise outcome.error
            elif outcome.error is not None:
                unit = cell_unit(*outcome.task.arguments[:2])
                listener.failed("join", unit, outcome.error)
                failures.append((unit, outcome.error))
    if failures:
        unit, error = failures[0]
        kind = DamageError if isinstance(error, DamageError) else RunError
        raise kind(f"joining at block {unit}: {error}")
    return blocks.take(homes)


def _join_task(site: Site, blocks: Cells, joins: Joins, home: int, key_of: Callable[[Block], str]) -> Task | None:
    """The task of one home block, None if it is done. key_of: the key of a block's fragment."""
    members, place = np.unique(joins.block, return_inverse=True)
    around = tuple(blocks[int(member)] for member in members)
    pieces = [(cell_unit(*block), key_of(block)) for block in around]
    local = type(joins)(joins.home, joins.building, place.astype(np.int32), joins.label)
    key = stages.join_key(site.plan, local, around, pieces)
    if site.ledger.done("join", cell_unit(*blocks[home]), key) is not None:
        return None
    arguments = (*blocks[home], key, local, around)
    return Task(stages.join, arguments, False, _PRIORITY["join"])
