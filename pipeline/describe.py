"""What a plan says to a person: its labelled lines, and the seconds that it may take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pyproj import CRS

from segpipe.tasks.grid import Window
from segpipe.tasks.predict import reach
from segpipe.tasks.read import Tile

from .place import crs_name
from .plan import Plan, disk_bytes, ground_pixel_m


def describe(plan: Plan) -> list[tuple[str, str]]:
    """The plan as labelled lines, for a person."""
    lattice, grid, bounds = plan.lattice, plan.layout.grid, plan.bounds
    covered = _covered_by(plan.tiles)
    chunks, blocks = sum(1 for _ in plan.chunks()), sum(1 for _ in plan.blocks())
    metres = ground_pixel_m(lattice, bounds)
    core_px, seen_px = pixels_seen(plan)
    nodata = sorted({(tile.nodata, tile.tolerance, tile.mask) for tile in plan.tiles})
    rule = "; ".join(
        f"{' or '.join(f'{v:g}' for v in values)} within {tolerance:g}" if values else f"mask: {mask}"
        for values, tolerance, mask in nodata
    )
    recipe = plan.recipe
    rows = [
        ("city", f"{plan.name}, into {plan.folder}"),
        (
            "tiles",
            f"{len(plan.tiles)}, {covered.width} x {covered.height} px in all, {metres:.3f} m a pixel on the ground",
        ),
        *_told_of_area(plan),
        (
            "lattice",
            f"{crs_name(CRS.from_wkt(lattice.crs_wkt))}, pixel {lattice.pixel_size:g}, phase"
            f" {lattice.phase_x:.6g}, {lattice.phase_y:.6g}",
        ),
        *_told_of_warping(plan),
        *([] if plan.scale is None else [("scale", f"{plan.scale.low:g} to {plan.scale.high:g} become 0 to 255")]),
        ("nodata", f"{rule}, in patches of at least {plan.nodata_min_m2:g} m2 or along a tile's edge"),
        (
            "grid",
            f"{grid.width} x {grid.height} px; {_counted(chunks, 'chunk')} of {plan.chunk_px} px,"
            f" {_counted(blocks, 'block')} of {plan.block_px} px",
        ),
        ("model", f"{plan.model.stem}, {plan.card.architecture}, threshold {plan.vector.threshold_u8}/250"),
        ("halo", f"{recipe.halo_px} px: {100 * (seen_px / core_px - 1):.0f} % more pixels than the tiles have"),
        (
            "recipe",
            f"{recipe.device}, {recipe.precision}, {recipe.mode}, {recipe.threads} threads, torch {recipe.torch}"
            + (", mean of the eight turns and flips" if recipe.tta == "d4" else ""),
        ),
        (
            "workers",
            f"{plan.workers.count} with {plan.workers.memory_bytes / 2**30:.1f} GiB each; a task takes up to"
            f" {plan.task_bytes / 2**30:.1f} GiB",
        ),
        (
            "disk",
            f"up to {disk_bytes(plan.tiles, plan.layout.bands, plan.seen) / 2**30:.2f} GiB in about"
            f" {4 * chunks + 4 * blocks + 30} files",
        ),
    ]
    rows += [("left out", reason) for reason in plan.left_out.values()]
    return rows + [("note", note) for note in plan.notes]


def _covered_by(tiles: Sequence[Tile]) -> Window:
    """The bounds of all tiles."""
    offs = ([getattr(tile.cover, name) for tile in tiles] for name in ("row_off", "col_off", "row_stop", "col_stop"))
    row_off, col_off, row_stop, col_stop = offs
    return Window.between(min(row_off), min(col_off), max(row_stop), max(col_stop))


def _told_of_area(plan: Plan) -> list[tuple[str, str]]:
    """A line for the area, if there is one."""
    if plan.area is None:
        return []
    km2, bounds = plan.area.ground_km2(plan.lattice), plan.bounds
    size = f"{km2:,.3f} km2 on the ground, {bounds.width} x {bounds.height} px of the tiles"
    return [("area", f"{plan.area.source}: {size}; {len(plan.tiles_seen())} tiles are seen")]


def _told_of_warping(plan: Plan) -> list[tuple[str, str]]:
    """A line for each kind of warping: how many tiles, from which CRS, how."""
    kinds = Counter(
        (crs_name(CRS.from_wkt(tile.mosaic.crs_wkt)), tile.mosaic.resampling)
        for tile in plan.tiles
        if tile.mosaic is not None
    )
    copied = len(plan.tiles) - sum(kinds.values())
    how = {"bilinear": "bilinear", "average": "mean of the area, being finer than the lattice"}
    others = f"; the other {copied} are copied" if copied else ""
    return [
        ("warped", f"{count} of {len(plan.tiles)} tiles, from {crs} ({how[resampling]}){others}")
        for (crs, resampling), count in kinds.items()
    ]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def pixels_seen(plan: Plan) -> tuple[int, int]:
    """Pixels of cores and of their windows, as if all pixels of the tiles' bounds were valid."""
    core_px = seen_px = 0
    for block in plan.blocks():
        core = plan.core(*block)
        parts = [plan.tiles[tile].cover.intersect(core) for tile in plan.tiles_in(core)]
        box = parts[0]
        for part in parts[1:]:
            box = box.union(part)
        core_px += box.pixels
        seen_px += reach(box, plan.recipe.halo_px, plan.card.stride).pixels
    return core_px, seen_px


def seconds_of(plan: Plan) -> float:
    """Seconds of network on one worker that a city takes, from one timed window of about 1024 px."""
    from .network import load_predictor

    side = min(plan.block_px + 2 * plan.recipe.halo_px, 1024) // plan.card.stride * plan.card.stride
    image = np.random.default_rng(0).integers(0, 255, (plan.layout.bands, side, side), np.uint8)
    predictor = load_predictor(plan)
    valid = np.ones((side, side), np.bool_)
    warm = plan.card.stride
    predictor.predict(image[:, :warm, :warm], valid[:warm, :warm])
    start = time.perf_counter()
    predictor.predict(image, valid)
    return (time.perf_counter() - start) / side**2 * pixels_seen(plan)[1] / plan.workers.count
