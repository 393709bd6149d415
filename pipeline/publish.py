"""Publish: footprints to a GeoPackage and rasters to COGs, each written beside, checked, and renamed into place."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segpipe.tasks.ahead import in_order
from segpipe.tasks.attributes import Imagery, publishable
from segpipe.tasks.files import tile_name
from segpipe.tasks.fragments import finished_from_bytes
from segpipe.tasks.grid import Cells, Window
from segpipe.tasks.neighbours import bounds_of, keep_apart, meeting
from segpipe.tasks.regularize import REACH_PX
from segpipe.tasks.vectorize import Buildings

from . import changes, manifest
from .allocator import give_freed_memory_back
from .beside import partial_path, remove_with_siblings
from .config import CityConfig
from .flow import Block
from .formats import remove_formats, write_formats
from .geopackage import CHANGES_LAYER, add_changes, read_rows, write_geopackage
from .lock import check_lock
from .place import resolve_output_crs
from .placing import find_published, place_geopackage
from .plan import Plan
from .progress import Listener, StageSums
from .rows import BATCH_ROWS
from .run_layers import about, add_run_layers
from .run_rasters import Rasters
from .stages import Receipt, Site, cell_unit, read_fragment, read_joined, tile_unit
from .storage import write_bytes
from .tile_masks import write_tile_masks

ORDER_CELL_PX = 4096
"""Buildings are published cell by cell of the lattice, row by row, and in a cell by first pixel: whatever the cut."""

CELLS_AT_ONCE = 2
"""Cells whose buildings are kept apart at once, while those of the one before are written."""

RIM_PX = 64
"""So far from the sides of its block a building is hardly ever met by one of another block."""

RIM_BLOCKS = 32
"""Blocks of which the buildings at the rim are held."""


@dataclass(frozen=True)
class Published:
    """What a run has published.

    changes: buildings added, removed and modified since the last publishing; validity: invalid pixels by reason, each
    counted on its tile's own grid, which need not be the lattice; invalid_m2: their ground area; skipped: tiles that
    could not be read, and why; device: seconds of the network and of what devices waited for; tile_masks, files: paths
    in the run folder of the masks of single tiles and of the footprints in other formats.
    """

    geopackage: Path
    rows_digest: str
    buildings: int
    buildings_m2: float
    mask_px: int
    valid_px: int
    changes: dict[str, int]
    validity: dict[str, int]
    invalid_m2: dict[str, float]
    skipped: dict[str, str]
    notes: tuple[str, ...]
    stages: dict[str, StageSums]
    device: dict[str, float]
    tile_masks: tuple[str, ...]
    files: tuple[str, ...]


def publish_all(
    config: CityConfig, plan: Plan, listener: Listener, homes: Cells, skipped: dict[int, str], rasters: Rasters
) -> Published:
    """Write the GeoPackage beside while the rasters are written, check it, and rename it into place.

    StorageError before anything is replaced, if another run has the lock by now.
    """
    start = time.perf_counter()
    listener.expect("publish", 1)
    check_lock(plan.folder, plan.lock)
    manifest.revoke(plan.folder)
    write_bytes(plan.output / "city.yaml", config.resolved_yaml().encode())
    site, folder = Site(plan), plan.output
    give_freed_memory_back()
    geopackage = partial_path(folder / "buildings.gpkg")
    area, counts = _Sum(), rasters.go_on()
    rows = batches_in_order(site, homes, _imagery(plan, counts.valid))
    try:
        written = write_geopackage(geopackage, area.of(rows), plan.lattice.crs_wkt, about(plan))
        rasters.finish()
        give_freed_memory_back()
        check_lock(plan.folder, plan.lock)
        asked_for = plan.tiles if config.publish.tile_masks else ()
        tile_masks = write_tile_masks(folder, folder / "mask.tif", asked_for, plan.lattice)
        notes = list(plan.notes)
        left: list[str] = []
        known = manifest.revoke(plan.folder, written.digest)
        changed = write_changes(plan, geopackage, written.digest, known, listener)
        sums = {"buildings": written.features, "buildings_m2": round(area.total, 2)}
        sums |= {"mask_px": counts.mask_px, "valid_px": counts.valid_px}
        add_run_layers(geopackage, plan, skipped, config.resolved_yaml(), sums)
        check_lock(plan.folder, plan.lock)
        placed = place_geopackage(
            geopackage,
            folder,
            known,
            lambda path, why: left.append(f"{path.name} {why}, and is left alone"),
        )
    finally:
        # Where it was not placed it goes: a disk that is full would stay so.
        remove_with_siblings(geopackage)
    files = _other_formats(config, plan, placed)
    if left:
        notes.append(f"{'; '.join(left)}; the new one is {plan.folder.file(placed.name)}")
        listener.say(notes[-1])
    if oversized := sum(_joined_at(site, home).get("oversized", 0) for home in homes):
        notes.append(
            f"{oversized} buildings reach further than a block: memory was set by them, not by the block alone"
        )
        listener.say(notes[-1])
    if again := _predicted_again(site):
        notes.append(f"blocks predicted twice: {again}; workers that were held for lost had finished them")
        listener.say(notes[-1])
    seconds = time.perf_counter() - start
    listener.done(Receipt("publish", plan.name, plan.bounds.pixels, placed.stat().st_size, seconds, {}))
    validity, invalid_m2 = _validity(site, skipped)
    return Published(
        geopackage=placed,
        rows_digest=written.digest,
        buildings=written.features,
        buildings_m2=area.total,
        mask_px=counts.mask_px,
        valid_px=counts.valid_px,
        changes=changed,
        validity=validity,
        invalid_m2=invalid_m2,
        skipped=plan.left_out | {plan.tiles[tile].path: reason for tile, reason in skipped.items()},
        notes=tuple(notes),
        stages=listener.stages,
        device=listener.device,
        tile_masks=tuple(tile_masks),
        files=tuple(files),
    )


def _other_formats(config: CityConfig, plan: Plan, geopackage: Path) -> list[str]:
    """Write the footprints in the formats that are asked for, and delete those that earlier runs were asked for."""
    asked, own = config.outputs.formats, manifest.own_files(plan.folder)
    manifest.begin_files(plan.folder, [manifest.FORMAT_FILES[each] for each in asked])
    remove_formats(plan.output, asked, own)
    out_wkt = resolve_output_crs(config.outputs.crs)
    return write_formats(plan.output, geopackage, asked, plan.lattice.crs_wkt, out_wkt)


def write_changes(
    plan: Plan, geopackage: Path, digest: str, known: Mapping[str, Collection[str]], listener: Listener
) -> dict[str, int]:
    """Add what has changed since the last publishing to a GeoPackage that is to be placed; number of each kind.

    digest: of its rows; known: digests of the rows that were published, by file name. The same rows again, be it after
    a kill or because a picture was missing, keep the changes that they came with. Nothing is told where nothing was
    published before, or on another lattice: ids are places on it.
    """
    name, lattice = manifest.last_published(plan.folder)
    last = find_published(plan.output, known, name)
    if last is not None and last[1] == digest:
        rows = read_rows(last[0], CHANGES_LAYER, changes.SCHEMA)
        return add_changes(geopackage, rows, plan.lattice.crs_wkt)
    rows = iter(())
    if last is not None and lattice == asdict(plan.lattice):
        rows = changes.compare(read_rows(last[0]), read_rows(geopackage), ORDER_CELL_PX)
    counts = add_changes(geopackage, rows, plan.lattice.crs_wkt)
    if last is not None:
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        listener.say(f"{'changes':>10}  {told if lattice == asdict(plan.lattice) else 'not told: another lattice'}")
    return counts


def _joined_at(site: Site, home: Block) -> dict[str, Any]:
    return site.ledger.entry("join", cell_unit(*home)) or {}


def _predicted_again(site: Site) -> int:
    """How often a block was predicted that had been already, from the same inputs and with the same settings."""
    entries = site.ledger.entries("predict", (cell_unit(*block) for block in site.plan.blocks()))
    return sum(entry.get("times", 1) - 1 for entry in entries if entry is not None)


class _Sum:
    """The sum of a column of batches on their way."""

    total = 0.0

    def of(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            self.total += float(np.asarray(batch.column("area_m2")).sum())
            yield batch


def _validity(site: Site, skipped: dict[int, str]) -> tuple[dict[str, int], dict[str, float]]:
    """Pixels found invalid in the tiles that were looked at, by reason, and their ground area in m2."""
    plan = site.plan
    pixels: Counter[str] = Counter()
    area_m2: defaultdict[str, float] = defaultdict(float)
    for tile in plan.tiles_seen():
        if tile in skipped:
            found = {"tile skipped": plan.tiles[tile].window.pixels}
        else:
            found = (site.ledger.entry("scan", tile_unit(plan, tile)) or {}).get("by_reason", {})
        for reason, px in found.items():
            if px:
                pixels[reason] += px
                area_m2[reason] += px * plan.tile_pixel_m(tile) ** 2
    return dict(sorted(pixels.items())), dict(area_m2)


def _imagery(plan: Plan, valid: Window | None) -> Imagery:
    """Where the tiles lie; one that could not be read is nodata. Of an area, what is valid does not tell the whole."""
    names, windows = [tile_name(tile.path) for tile in plan.tiles], [tile.cover for tile in plan.tiles]
    return Imagery(names, windows, valid if plan.area is None else None)


def batches_in_order(site: Site, homes: Cells, imagery: Imagery) -> Iterator[pa.RecordBatch]:
    """All buildings that meet the area in the order of the lattice, in batches of at most BATCH_ROWS rows.

    Their outlines are as asked for, or raw where they would overlap a neighbour's.
    """
    plan = site.plan
    held: list[pa.RecordBatch] = []
    rows = 0
    for apart in in_order(lambda cell: keep_apart(*cell, plan.lattice), _cells_in_order(site, homes), CELLS_AT_ONCE):
        found = apart if plan.area is None else apart.take(plan.area.meets(apart.geometry))
        found = found.take(np.lexsort((found.key_col, found.key_row)))
        batch = publishable(found, plan.lattice, imagery)
        while len(batch):
            part = batch.slice(0, BATCH_ROWS - rows)
            batch = batch.slice(len(part))
            held.append(part)
            rows += len(part)
            if rows == BATCH_ROWS:
                yield _one(held)
                held, rows = [], 0
    if held:
        yield _one(held)


def _cells_in_order(site: Site, homes: Cells) -> Iterator[tuple[Buildings, Buildings]]:
    """The buildings of each cell of the order, and all others that may be in their way.

    Besides those under way at most the buildings of the blocks under one cell are held, those beside it that touch the
    bounds of one of its own, and those at the rims of RIM_BLOCKS blocks.
    """
    plan = site.plan
    neighbours, blocks = _Neighbours(site, homes), _Blocks(site, homes)
    may_overlap = bool(plan.vector.simplify_m) or plan.vector.regularize != "none"
    for cell in plan.layout.grid.cells(ORDER_CELL_PX):
        window = Window.cell(*cell, ORDER_CELL_PX)
        under = [block for block in window.intersect(plan.layout.grid).cells(plan.block_px) if plan.is_predicted(block)]
        found = Buildings.concatenate([_first_pixel_in(part, window) for part in blocks.all_of(under)])
        others = Buildings.empty()
        if may_overlap:
            beside = blocks.meeting(bounds_of(found), neighbours.blocks(found))
            others = meeting(found, (_first_pixel_in(part, window, False) for part in beside))
        yield found, others


class _Blocks:
    """The buildings of blocks, read from their files. Of a few blocks all are held, of more those at their rims."""

    def __init__(self, site: Site, homes: Cells) -> None:
        self._site, self._homes = site, homes
        self._held: OrderedDict[Block, Buildings] = OrderedDict()
        self._most_held = (-(-ORDER_CELL_PX // site.plan.block_px) + 1) ** 2
        self._rims: OrderedDict[Block, Buildings] = OrderedDict()

    def all_of(self, blocks: list[Block]) -> Iterator[Buildings]:
        """All of their buildings, block by block; a bucket is asked for several at once."""
        held = self._held
        kept = {block: held.pop(block) for block in blocks if block in held}
        coming = self._site.folder.each(self._read, [block for block in blocks if block not in kept])
        for block in blocks:
            if block in kept:
                held[block] = kept.pop(block)
            else:
                held[block] = next(coming)
                self._hold_rim(block, held[block])
            yield held[block]
            if len(held) + len(kept) > self._most_held:
                held.popitem(last=False)

    def meeting(self, bounds: NDArray[np.float64], blocks: list[Block]) -> Iterator[Buildings]:
        """Those of their buildings whose bounds meet some of these (left, top, right, bottom), and others."""
        deep = []
        for block in blocks:
            inside = self._inside(block)
            reaches = (bounds[:, :2] <= inside[2:]).all(axis=1) & (bounds[:, 2:] >= inside[:2]).all(axis=1)
            if block in self._rims and not reaches.any():
                self._rims.move_to_end(block)
                yield self._rims[block]
            else:
                deep.append(block)
        yield from self.all_of(deep)

    def _read(self, block: Block) -> Buildings:
        parts = [finished_from_bytes(read_fragment(self._site, *block))]
        if block in self._homes:
            parts.append(read_joined(self._site, *block))
        return Buildings.concatenate(parts)

    def _hold_rim(self, block: Block, buildings: Buildings) -> None:
        inside, bounds = self._inside(block), bounds_of(buildings)
        at_rim = (bounds[:, :2] <= inside[:2]).any(axis=1) | (bounds[:, 2:] >= inside[2:]).any(axis=1)
        self._rims[block] = buildings.take(np.flatnonzero(at_rim))
        if len(self._rims) > RIM_BLOCKS:
            self._rims.popitem(last=False)

    def _inside(self, block: Block) -> NDArray[np.float64]:
        """Left, top, right and bottom of a block without its rim: what is not at the rim lies between them."""
        core, rim = Window.cell(*block, self._site.plan.block_px), RIM_PX
        return np.array([core.col_off + rim, core.row_off + rim, core.col_stop - rim, core.row_stop - rim], np.float64)


class _Neighbours:
    """Which blocks hold buildings that may be in the way of others."""

    def __init__(self, site: Site, homes: Cells) -> None:
        self._plan, self._homes = site.plan, homes
        reaches = (_joined_at(site, home).get("reach") or _NOWHERE for home in homes)
        self._reach = np.fromiter((edge for reach in reaches for edge in reach), np.float64).reshape(-1, 4)
        self._far = np.flatnonzero([self._goes_far(*it) for it in zip(homes, self._reach, strict=True)])

    def _goes_far(self, home: Block, reach: NDArray[np.float64]) -> bool:
        """Whether joined buildings reach beyond the blocks around their home."""
        around, px = self._plan.core(*home).pad(self._plan.block_px), reach.tolist()
        inside = px[0] >= around.col_off and px[1] >= around.row_off
        return px != [*_NOWHERE] and not (inside and px[2] <= around.col_stop and px[3] <= around.row_stop)

    def blocks(self, buildings: Buildings) -> list[Block]:
        """Blocks under or beside the bounds of these, and those whose joined buildings reach there, in order."""
        if not len(buildings):
            return []
        found: set[Block] = set()
        block_px, bounds = self._plan.block_px, bounds_of(buildings)
        grown = np.floor(bounds + np.array([-REACH_PX, -REACH_PX, REACH_PX, REACH_PX])).astype(np.int64)
        for left, top, right, bottom in np.unique(grown // block_px, axis=0).tolist():
            found.update((row, col) for row in range(top, bottom + 1) for col in range(left, right + 1))
        least, most = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
        (left, top), (right, bottom) = (np.floor(it / block_px).astype(np.int64).tolist() for it in (least, most))
        # A block further on can only be in the way if its buildings go far, and those are few.
        near = (self._homes.within(row, left - 2, right + 2) for row in range(top - 2, bottom + 2))
        places = np.concatenate([self._far, *(np.arange(it.start, it.stop) for it in near)])
        reach = self._reach[places]
        meets = (reach[:, :2] <= most).all(axis=1) & (reach[:, 2:] >= least).all(axis=1)
        found.update(self._homes[place] for place in places[meets].tolist())
        return sorted(block for block in found if self._plan.is_predicted(block))


_NOWHERE = (np.inf, np.inf, -np.inf, -np.inf)


def _first_pixel_in(buildings: Buildings, window: Window, wanted: bool = True) -> Buildings:
    """Those of the buildings that have their first pixel in a window, or, if not wanted, the others."""
    row, col = buildings.key_row, buildings.key_col
    inside = (row >= window.row_off) & (row < window.row_stop) & (col >= window.col_off) & (col < window.col_stop)
    return buildings.take(inside == wanted)


def _one(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
