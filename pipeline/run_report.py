"""The pictures of a run that has been published: preview.png, and the page of what was done."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import PurePosixPath

from segpipe.tasks.files import tile_name
from segpipe.tasks.predict import INVALID

from . import report
from .config import CityConfig
from .describe import describe, pixels_seen
from .imagery import imagery_of
from .inputs import versions
from .manifest import FORMAT_FILES
from .plan import Plan, ground_pixel_m
from .progress import told_of_device
from .publish import Published
from .rasters import reading_cog
from .report_charts import areas_chart, confidences_chart, read_spans, timeline_chart
from .report_map import TileKind, TileMark, draw_map
from .stages import Site

OUTPUTS = (
    ("mask.tif", "1 building, 0 not, 255 nodata"),
    ("probability.tif", "0 to 250 for 0 to 1, 255 nodata"),
    ("preview.png", "footprints over the imagery"),
    ("item.json", "a STAC Item: what these files are, with checksums"),
    ("manifest.json", "versions, recipe, digests, counts"),
    ("tasks.jsonl", "a line a task: seconds, bytes, worker"),
    ("city.yaml", "the resolved configuration"),
)


def write_preview_and_report(config: CityConfig, plan: Plan, published: Published, started: float) -> None:
    """Draw the footprints over the imagery, and say on one page what was done. started: when, in s of the epoch."""
    site, folder = Site(plan), plan.output
    with reading_cog(folder / "mask.tif", plan.bounds) as read_mask:
        plain = report.write_preview(
            folder / "preview.png",
            lambda window: imagery_of(site, window, published.skipped.keys()),
            lambda window: read_mask(window) != INVALID,
            plan.bounds,
            plan.lattice,
            published.geopackage,
        )
    city_map = draw_map(
        plain.picture, plain.factor, plan.bounds, plan.lattice, published.geopackage, _marks(plan, published)
    )
    core_px, seen_px = pixels_seen(plan)
    page = report.Report(
        name=plan.name,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        model=plan.model.stem,
        plan=tuple(describe(plan)),
        recipe=tuple((name, str(value)) for name, value in asdict(plan.recipe).items()),
        config_yaml=config.resolved_yaml(),
        tiles=len(plan.tiles),
        chunks=sum(1 for _ in plan.chunks()),
        blocks=sum(1 for _ in plan.blocks()),
        buildings=published.buildings,
        buildings_m2=published.buildings_m2,
        valid_px=published.valid_px,
        pixel_m=ground_pixel_m(plan.lattice, plan.bounds),
        invalid=tuple((reason, px, published.invalid_m2[reason]) for reason, px in published.validity.items()),
        halo_px=plan.recipe.halo_px,
        extra_pixels=seen_px / core_px - 1,
        stages=tuple(
            report.StageTime(name, it.units, it.reused, it.seconds, it.wall_s, it.pixels)
            for name, it in published.stages.items()
        ),
        device=told_of_device(published.device) if published.device else "",
        skipped=tuple(published.skipped.items()),
        warnings=published.notes,
        versions=tuple(versions().items()),
        outputs=(
            (published.geopackage.name, "layers buildings (the footprints), changes, tiles, skipped and run"),
            *((FORMAT_FILES[it], "the footprints") for it in config.outputs.formats),
            *([("tile_masks/", "a mask a tile: 255 building, 0 not")] if published.tile_masks else []),
            *OUTPUTS,
        ),
        changes=tuple(published.changes.items()),
        city_map=city_map,
        charts=(areas_chart(city_map.areas), confidences_chart(city_map.confidences)),
        timeline=timeline_chart(read_spans(folder / "tasks.jsonl", started)),
    )
    report.write_report(folder / "report.html", page)


def _marks(plan: Plan, published: Published) -> list[TileMark]:
    """Where tiles lie in the part that is shown, and what was done with them."""
    marks: list[TileMark] = []
    for tile in plan.tiles:
        window = tile.cover.intersect(plan.bounds)
        if window.pixels:
            kind: TileKind = "copied" if tile.mosaic is None else "warped"
            if tile.path in published.skipped:
                kind = "skipped"
            marks.append(TileMark(PurePosixPath(tile_name(tile.path)).name, kind, window))
    return marks
