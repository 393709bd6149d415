"""The story of inference, top to bottom: plan, read, predict, merge, vectorize, publish."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from segpipe.tasks.errors import DamageError, RunError, TileError, UnreachableError, UserError
from segpipe.tasks.validity import scan_tile

from . import manifest, publish
from .cluster import Cluster, GpuUse, Pool
from .cluster_kinds import open_cluster, open_pool
from .config import CityConfig
from .describe import describe, seconds_of
from .desk import RECORDS, desk, fetch, show
from .flow import Flow, run_joins
from .ledger import as_json
from .lock import check_lock, locked
from .plan import SETTLED, Plan, make_plan, read_settled
from .progress import Listener, told_of_device, watching
from .publish import Published
from .run_rasters import Rasters
from .run_report import write_preview_and_report
from .stac_item import write_item
from .stages import Site, forget_damaged
from .status import PROGRESS, following
from .storage import OWN_FOLDERS, Folder, LocalFolder, remove_leftovers
from .store import prepare_store
from .verify import verify_quickly

MOST_PASSES = 4
"""Passes over a city at most that heal what is damaged."""
DESCRIBED = ("mask.tif", "probability.tif", "preview.png", "report.html")
"""What the STAC Item tells of, besides vectors."""
LOOKED_AT = 40
"""Tiles at most that a dry run reads."""
NOT_KEPT: dict[str, tuple[str, ...]] = {
    "all": (),
    # The ledger first: killed in between, it must not name what is gone.
    "probability": ("ledger/read", "store.zarr/image", "store.zarr/valid"),
    "none": OWN_FOLDERS,
}
"""Folders of a run folder that are dropped when all is published, by `store.keep`."""


def map_city(config: CityConfig, console: Console, fresh: bool = False, performance: Path | None = None) -> Published:
    """Map a city, going on where an earlier run has stopped, or starting over if fresh.

    Raises UserError before any work where the plan cannot be run or somebody else is at work in the folder, and
    RunError where a part failed: what is done is kept, and running again goes on from there. performance: the file of
    Dask's own page on a run, if it is asked for.
    """
    state = manifest.state_of_inputs(config)
    folder = config.folder
    with ExitStack() as stack:
        cluster = stack.enter_context(open_cluster(config, lambda text: console.print(text, highlight=False)))
        plan = make_plan(config, None if fresh else read_settled(folder), None if cluster is None else cluster.crew)
        make_output(folder)
        plan = replace(plan, lock=stack.enter_context(locked(folder)))
        # What an earlier run was killed over is wanted again: from now on it is this run that drops it.
        folder.remove(manifest.DROPPING)
        if fresh:
            start_over(folder)
        stack.enter_context(desk(folder))
        listener = stack.enter_context(watching(plan.output, console))
        stack.enter_context(following(plan, listener))
        for label, text in describe(plan):
            listener.say(f"{label:>10}  {text}")
        remove_leftovers(folder)
        folder.write(SETTLED, as_json(plan.settled() | {"inputs": manifest.state_digest(state)}))
        prepare_store(folder, plan.layout)
        published = run_plan(config, plan, listener, cluster, performance)
        check_lock(folder, plan.lock)
        write_preview_and_report(config, plan, published, listener.started)
        named = [published.geopackage.name, *DESCRIBED, *published.files]
        write_item(plan.output, plan.name, named, plan.lattice, plan.bounds, {"title": f"Buildings of {plan.name}"})
        done = manifest.make_manifest(config, plan, state, published)
        for label, text in verify_quickly(plan.output, done):
            listener.say(f"{label:>10}  {text}")
        check_lock(folder, plan.lock)
        show(plan, done["outputs"])
        check_lock(folder, plan.lock)
        # The manifest first: killed in between, what is published counts, and the next command drops what is left.
        folder.write(manifest.DROPPING, as_json({"keep": config.store.keep}))
        manifest.write_manifest(folder, done)
        drop_store(folder, config.store.keep)
    return published


def dry_run(config: CityConfig) -> list[tuple[str, str]]:
    """The plan of a city as labelled lines, with the area that is invalid and the seconds from one timed window.

    Writes nothing. Of many tiles only some are looked at for validity, evenly spread over the list.
    """
    config.find_buckets()
    plan = make_plan(config, stored=read_settled(config.folder))
    rows = describe(plan)
    seen = plan.tiles_seen()
    step = -(-len(seen) // LOOKED_AT)
    looked = seen[::step]
    reasons: defaultdict[str, float] = defaultdict(float)
    for tile in looked:
        try:
            scan = scan_tile(plan.tiles[tile], plan.min_nodata_pixels(tile), lambda window, mask: None)
        except TileError as error:
            if isinstance(error, UnreachableError) or not plan.skip_bad_tiles:
                raise
            rows.append(("left out", str(error)))
            continue
        for reason, pixels in scan.by_reason.items():
            reasons[reason] += pixels * plan.tile_pixel_m(tile) ** 2 * step
    of = "" if step == 1 else f" (estimated from {len(looked)} of {len(seen)} tiles)"
    found = [f"{reason}: {area:,.0f} m2" for reason, area in sorted(reasons.items()) if area]
    rows.append(("invalid", (", ".join(found) or "nothing") + of))
    rows.append(("seconds", f"about {seconds_of(plan):,.0f} of predicting, from one timed window"))
    return rows


def check_cluster(config: CityConfig) -> list[tuple[str, str]]:
    """What is checked before a run, and nothing else: labelled lines of the workers that were found fit.

    UserError for whatever a run would not start with. What is written to see that it can be is taken away again.
    """
    config.find_buckets()
    output = config.folder
    made = _missing_folders(output)
    with open_cluster(config, lambda text: None) as cluster:
        plan = make_plan(config, read_settled(output), None if cluster is None else cluster.crew)
        make_output(output)
        try:
            with open_pool(plan, cluster) as pool:
                lines = [("workers", line) for line in pool.staff()]
        finally:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()  # only if it is empty
    rows = [("kind", config.cluster.kind), ("recipe", f"{plan.recipe.device}, torch {plan.recipe.torch}"), *lines]
    return [*rows, *(("note", note) for note in plan.notes)]


def _missing_folders(output: Folder) -> list[Path]:
    """Folders of this machine that a look at the output would leave behind, the innermost first."""
    if not isinstance(output, LocalFolder):
        return []
    path = output.path
    return [path / "ledger" / "probe", path / "ledger", *(it for it in (path, *path.parents) if not it.exists())]


def make_output(folder: Folder) -> None:
    """Make the output folder. UserError where that is not possible."""
    if not isinstance(folder, LocalFolder):
        return
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be made: {error.strerror}; expected a folder to write to") from None


def start_over(folder: Folder) -> None:
    """Delete what earlier runs have kept. Published files stay until new ones take their place."""
    manifest.revoke(folder)
    folder.remove(SETTLED, RECORDS)
    for name in OWN_FOLDERS:
        folder.remove_all(name)


def run_plan(
    config: CityConfig, plan: Plan, listener: Listener, cluster: Cluster | None, performance: Path | None
) -> Published:
    """All stages of a plan: read, predict and vectorize block by block, join over seams, publish."""
    listener.expect("scan", len(plan.tiles_seen()))
    listener.expect("read", sum(1 for _ in plan.chunks()))
    for stage in ("predict", "vectorize"):
        listener.expect(stage, sum(1 for _ in plan.blocks()))
    for passes_left in (2, 1, 0):
        try:
            with ExitStack() as publishing:
                with open_pool(plan, cluster) as pool, pool.reporting(performance):
                    if pool.dashboard:
                        listener.say(f"{'dashboard':>10}  {pool.dashboard}")
                    with listener.showing():
                        skipped = carry_all(plan, pool, listener)
                        rasters = publishing.enter_context(closing(Rasters(Site(plan))))
                        homes = run_joins(plan, pool, listener)
                    if listener.device:
                        listener.say(f"{'device':>10}  {told_of_device(listener.device)}")
                    if (use := pool.gpu_use()) is not None:
                        listener.say(told_of_gpus(use))
                        plan = replace(plan, notes=(*plan.notes, told_of_gpus(use)))
                fetch(plan)
                return publish.publish_all(config, plan, listener, homes, skipped, rasters)
        except DamageError as error:
            # What another run takes away looks like damage.
            check_lock(plan.folder, plan.lock)
            if not passes_left:
                raise
            listener.say(f"damaged: {error}")
            listener.say(f"{forget_damaged(Site(plan)) + 1} files are damaged or missing, and are made anew")
    raise AssertionError("the last pass returns or raises")


def told_of_gpus(use: GpuUse) -> str:
    """How long GPUs were held, and how much of that for nothing."""
    idle_s = max(0.0, use.held_s - use.busy_s)
    return f"GPUs: {use.held_s:.0f} s held, of these {idle_s:.0f} s idle"


def carry_all(plan: Plan, pool: Pool, listener: Listener) -> dict[int, str]:
    """Carry all blocks up to their fragments; returns the tiles that were skipped, and why.

    A tile that cannot be read in the middle of a run makes its chunks and the blocks that saw it stale, whether it is
    to be skipped or repaired: their keys no longer hold, so another pass does just them. So it is with a chunk that is
    found damaged.
    """
    skipped: dict[int, str] = {}
    for number in itertools.count(1):
        flow = Flow(plan, pool, listener, skipped)
        flow.run()
        if (
            flow.failures
            and all(isinstance(error, DamageError) for _, _, error in flow.failures)
            and number < MOST_PASSES
        ):
            listener.say(f"damaged: {flow.failures[0][2]}, and {len(flow.failures) - 1} more")
            continue
        if flow.failures:
            raise RunError(_told(flow.failures))
        if not flow.newly_skipped:
            return skipped
        skipped |= flow.newly_skipped
    raise AssertionError("passes have no end but a return")


def _told(failures: list[tuple[str, str, BaseException]]) -> str:
    """One line for all failures: each different cause once."""
    causes = Counter(f"{error}" or type(error).__name__ for _, _, error in failures)
    (first, count), *rest = causes.most_common()
    stage, unit, _ = failures[0]
    more = f" ({count} tasks)" if count > 1 else ""
    others = "".join(f"; {cause}" for cause, _ in rest[:4])
    return (
        f"{stage} {unit} failed: {first}{more}{others}; all else is done and kept; run the same command again to go on"
    )


def drop_store(folder: Folder, keep: Literal["all", "probability", "none"]) -> None:
    """Delete what `store.keep` does not keep, with its entries in the ledger."""
    for name in NOT_KEPT[keep]:
        folder.remove_all(name)
    folder.remove(manifest.DROPPING)


def finish_dropping(config: CityConfig) -> None:
    """Do what a run that was killed while it dropped its store did not. UserError if somebody is at work there."""
    with locked(config.folder):
        config.folder.remove(PROGRESS)
        drop_store(config.folder, config.store.keep)
