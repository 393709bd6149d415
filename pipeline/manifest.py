"""The run's manifest: what it was made from and with, and, before a run, whether anything of that has changed.

`nothing_changed` is what a second run asks first. It imports neither torch nor distributed, nor anything of GDAL.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segpipe.models.weights import BundleError, file_digest, resolve_bundle
from segpipe.tasks.errors import UserError

from .config import CityConfig
from .inputs import find_images, machine, stamp

if TYPE_CHECKING:
    from .plan import Plan
    from .run import Published

MANIFEST = "manifest.json"
OUTPUTS = ("mask.tif", "probability.tif", "preview.png", "report.html")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run folder, None where no run was published."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return manifest


def state_of_inputs(config: CityConfig) -> dict[str, Any]:
    """What the outputs depend on, as far as it can be seen without opening a file: to be stored with them.

    UserError for a model or images that are not there.
    """
    try:
        model = resolve_bundle(config.model, config.file.parent)
    except BundleError as error:
        raise UserError(f"model: {error}") from None
    return {
        "config": config.model_dump(mode="json"),
        "images": {str(path): stamp(path) for path in find_images(config.images, config)},
        "model": [str(model), stamp(model)],
        "machine": machine(),
    }


def nothing_changed(config: CityConfig) -> dict[str, Any] | None:
    """The manifest, if config, tiles, model and machine are as they were when it was written, and the outputs exist.

    A model file with another stamp is the same if its digest is; tiles with other stamps are left to the run to judge.
    """
    folder = config.path(config.output)
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("state") is None:
        return None
    try:
        now, then = state_of_inputs(config), manifest["state"]
    except (UserError, OSError):
        return None
    if now["model"] != then["model"] and file_digest(Path(now["model"][0])) != manifest["model"]["digest"]:
        return None
    same = all(now[part] == then[part] for part in ("config", "images", "machine"))
    return manifest if same and all((folder / name).exists() for name in manifest["outputs"]) else None


def revoke(folder: Path, rows_digest: str | None = None) -> str | None:
    """Say that the outputs are about to change: until the next manifest, no run finds that nothing has changed.

    rows_digest: of the GeoPackage that is to be published. Returns the digest that buildings.gpkg has if nobody has
    changed it since it was published, be it the last run's or one of a run that was killed while publishing.
    """
    from pyogrio.errors import DataLayerError, DataSourceError

    from .publish import rows_digest as digest_of
    from .store import write_json

    manifest = read_manifest(folder) or {"rows_digest": None}
    known: list[str | None] = [manifest["rows_digest"], *manifest.get("rows_digests_begun", [])]
    if rows_digest is not None:
        manifest["rows_digests_begun"] = [*known[1:], rows_digest]
    write_json(folder / MANIFEST, manifest | {"state": None})
    path = folder / "buildings.gpkg"
    if len(known) == 1 or not path.exists():
        return known[0]
    try:
        found = digest_of(path)
    except (DataSourceError, DataLayerError):
        return known[0]
    return found if found in known else known[0]


def make_manifest(config: CityConfig, plan: Plan, state: dict[str, Any], published: Published) -> dict[str, Any]:
    """All that is to be known of a run that has been published."""
    from .inputs import versions
    from .stages import tile_unit
    from .store import Ledger

    ledger = Ledger(plan.output)
    tiles = [
        {"path": tile.path, "window": asdict(tile.window)}
        | {name: entry.get(name) for name in ("digest", "stamp", "invalid_px", "by_reason")}
        for index, tile in enumerate(plan.tiles)
        if (entry := ledger.entry("scan", tile_unit(plan, index)) or {}) is not None
    ]
    return {
        "name": plan.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "lattice": asdict(plan.lattice),
        "grid": asdict(plan.layout.grid),
        "bounds": asdict(plan.bounds),
        "chunk_px": plan.chunk_px,
        "recipe": asdict(plan.recipe),
        "model": {"path": str(plan.model), "digest": plan.model_digest, "card": plan.card.model_dump(mode="json")},
        "vector": asdict(plan.vector),
        "counts": {
            "tiles": len(plan.tiles),
            "chunks": sum(1 for _ in plan.chunks()),
            "blocks": sum(1 for _ in plan.blocks()),
            "buildings": published.buildings,
            "buildings_m2": round(published.buildings_m2, 2),
            "valid_px": published.valid_px,
            "mask_px": published.mask_px,
        },
        "invalid_px": published.validity,
        "skipped": published.skipped,
        "notes": plan.notes,
        "stages": {
            stage: {
                "done": sums.units,
                "reused": sums.reused,
                "seconds": round(sums.seconds, 3),
                "wall_s": round(sums.wall_s, 3),
                "pixels": sums.pixels,
            }
            for stage, sums in published.stages.items()
        },
        "rows_digest": published.rows_digest,
        "outputs": [published.geopackage.name, *OUTPUTS],
        "tiles": tiles,
        "config": config.model_dump(mode="json"),
        "state": state,
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, last of all: where it stands, the outputs are whole."""
    from .store import write_json

    write_json(folder / MANIFEST, manifest)
