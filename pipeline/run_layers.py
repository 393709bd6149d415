"""Layers that say what a run was made from: `tiles`, `skipped` and `run`, beside the footprints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from affine import Affine
from pyproj import CRS, Transformer

from segpipe.tasks.files import tile_name
from segpipe.tasks.grid import Lattice
from segpipe.tasks.read import Tile

from .geopackage import add_layer
from .inputs import versions
from .plan import Plan
from .styles import RUN_QML, SKIPPED_QML, TILES_QML

TILES_LAYER, SKIPPED_LAYER, RUN_LAYER = "tiles", "skipped", "run"

TILES_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("path", pa.string()),
        pa.field("status", pa.string()),
        pa.field("warped", pa.bool_()),
        pa.field("geometry", pa.binary()),
    ]
)
"""status: used, skipped (it could not be read), or not seen (an area was asked for, and it lies beyond)."""

SKIPPED_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("path", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("geometry", pa.binary()),
    ]
)
"""Where a tile lies is not known if its header could not be read."""


def about(plan: Plan) -> dict[str, str]:
    """What the metadata of the footprints say of where they come from."""
    return {
        "TITLE": f"Building footprints of {plan.name}",
        "SOFTWARE": f"segpipe {versions()['segpipe']}",
        "MODEL": f"{plan.model.stem} {plan.model_digest}",
    }


def add_run_layers(
    path: Path, plan: Plan, skipped: Mapping[int, str], config_yaml: str, counts: dict[str, Any]
) -> None:
    """Add the three layers to a GeoPackage. skipped: indices of tiles that could not be read, and why.

    counts: numbers that are columns of layer `run`. Raises RunError, and leaves no file.
    """
    wkt, seen = plan.lattice.crs_wkt, {*plan.tiles_seen()}
    outlines = [footprint(tile, plan.lattice) for tile in plan.tiles]
    status = ["skipped" if i in skipped else "used" if i in seen else "not seen" for i in range(len(plan.tiles))]
    columns: dict[str, Any] = {
        "name": [tile_name(tile.path) for tile in plan.tiles],
        "path": [tile.path for tile in plan.tiles],
        "status": status,
        "warped": [tile.mosaic is not None for tile in plan.tiles],
        "geometry": shapely.to_wkb(outlines).tolist(),
    }
    add_layer(path, TILES_LAYER, _batch(columns, TILES_SCHEMA), wkt, TILES_QML)
    reasons = [(plan.tiles[i].path, reason, shapely.to_wkb(outlines[i])) for i, reason in skipped.items()]
    reasons += [(tile, reason, None) for tile, reason in plan.left_out.items()]
    columns = {
        "name": [tile_name(tile) for tile, _, _ in reasons],
        "path": [tile for tile, _, _ in reasons],
        "reason": [reason for _, reason, _ in reasons],
        "geometry": [wkb for _, _, wkb in reasons],
    }
    add_layer(path, SKIPPED_LAYER, _batch(columns, SKIPPED_SCHEMA), wkt, SKIPPED_QML)
    add_layer(path, RUN_LAYER, _run(plan, config_yaml, counts), wkt, RUN_QML)


def _batch(columns: dict[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _run(plan: Plan, config_yaml: str, counts: dict[str, Any]) -> pa.RecordBatch:
    """One row: what the manifest knows when the GeoPackage is written."""
    values: dict[str, Any] = {
        "name": plan.name,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "segpipe": versions()["segpipe"],
        "model": plan.model_url or str(plan.model),
        "model_digest": plan.model_digest,
        "recipe": json.dumps(asdict(plan.recipe)),
        "vector": json.dumps(asdict(plan.vector)),
        "lattice": json.dumps(asdict(plan.lattice)),
        "versions": json.dumps(versions()),
        "config": config_yaml,
        **counts,
        "geometry": shapely.to_wkb(shapely.box(*plan.lattice.bounds(plan.bounds))),
    }
    kinds: dict[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bytes: pa.binary()}
    schema = pa.schema([pa.field(name, kinds[type(value)]) for name, value in values.items()])
    return _batch({name: [value] for name, value in values.items()}, schema)


def footprint(tile: Tile, lattice: Lattice) -> shapely.Polygon:
    """Where a tile lies, in coordinates of the lattice's CRS; the sides of a warped one are bent with it."""
    if tile.mosaic is None:
        return shapely.box(*lattice.bounds(tile.window))
    window, to_x_y = tile.window, Affine(*tile.mosaic.transform)
    corners = [
        (window.col_off, window.row_off),
        (window.col_off, window.row_stop),
        (window.col_stop, window.row_stop),
        (window.col_stop, window.row_off),
    ]
    ring = shapely.segmentize(shapely.Polygon(corners), max(window.shape_yx) / 8)
    transformer = Transformer.from_crs(CRS.from_wkt(tile.mosaic.crs_wkt), CRS.from_wkt(lattice.crs_wkt), always_xy=True)

    def move(col_row: Any) -> Any:
        x, y = to_x_y * (col_row[:, 0], col_row[:, 1])
        return np.stack(transformer.transform(x, y), axis=1)

    moved = shapely.transform(ring, move)
    polygon: shapely.Polygon = moved if moved.is_valid else moved.convex_hull
    return shapely.orient_polygons(polygon)
