"""The run's manifest: what it was made from and with, and, before a run, whether anything of that has changed.

`nothing_changed` is what a second run asks first. It imports neither torch nor distributed, nor anything of GDAL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from segpipe.models.weights import BundleError, file_digest, resolve_bundle
from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.files import is_remote
from segpipe.tasks.remote import look_up

from .config import CityConfig
from .inputs import find_images, machine, stamps
from .ledger import Ledger, as_json
from .storage import Folder, LocalFolder, folder_at

if TYPE_CHECKING:
    from segpipe.tasks.mosaic import Mosaic

    from .plan import Plan
    from .publish import Published

MANIFEST = "manifest.json"
DROPPING = "dropping.json"
"""Is there from when a run has published all until it has dropped what `store.keep` does not keep."""
OUTPUTS = ("mask.tif", "probability.tif", "preview.png", "report.html", "probability.qml", "item.json")
"""What is published besides the GeoPackage."""
FORMAT_FILES = {
    "geoparquet": "buildings.parquet",
    "flatgeobuf": "buildings.fgb",
    "filegdb": "buildings.gdb",
    "geojson": "buildings.geojson",
}
"""What each of `outputs.formats` is written as in the run folder. A file geodatabase is a folder."""
TRACES = ("settled.json", "ledger")
"""What a run leaves in its folder before it writes anything else there."""
REPLACED = (
    *OUTPUTS,
    "city.yaml",
    MANIFEST,
    DROPPING,
    "tile_masks",
    "tasks.jsonl",
    "progress.json",
    "store.zarr",
    "fragments",
    "validity",
)
"""What a run writes in its folder whatever is there. Of GeoPackages it knows its own by their rows."""


STATE = ("config", "images", "machine", "area")
"""What must be as it was for nothing to have changed; a model may have another stamp."""


class _State(BaseModel):
    config: dict[str, Any]
    images: dict[str, list[str | int]]
    model: tuple[str, list[int | str]]
    machine: dict[str, str]
    area: list[int]


class _Model(BaseModel):
    digest: str


class _Whole(BaseModel):
    """What a manifest must hold for a run to be told from it that nothing has changed."""

    finished: str
    state: _State
    model: _Model
    outputs: dict[str, int]
    skipped: dict[str, str]


def read_manifest(folder: Folder | Path) -> dict[str, Any] | None:
    """The manifest of a run folder; None where no run was published, or it is not whole or was taken back."""
    manifest = _read(folder_at(folder))
    try:
        _Whole.model_validate(manifest)
    except ValidationError:
        return None
    return manifest


def _read(folder: Folder) -> dict[str, Any]:
    """manifest.json, be it whole or not; empty where it is none."""
    try:
        found = json.loads(folder.read(MANIFEST) or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def state_of_inputs(config: CityConfig) -> dict[str, Any]:
    """What the outputs depend on, as far as it can be seen without opening a file: to be stored with them.

    UserError for a model or images that are not there.
    """
    config.find_buckets()
    return {
        "config": config.model_dump(mode="json"),
        "images": stamps(find_images(config.images, config)),
        "model": _model_stamp(config),
        "machine": machine(),
        "area": _area_stamp(config),
    }


def state_digest(state: dict[str, Any]) -> str:
    """A short digest of a state of inputs, the same when it comes back from JSON."""
    return blake2b(as_json(state), digest_size=8).hexdigest()


def _model_stamp(config: CityConfig) -> list[Any]:
    """Where the bundle is, its size, and its mtime in ns or what a server has instead."""
    try:
        if is_remote(config.model):
            found = look_up(config.model)
            return [config.model, [found.size, found.etag or found.modified]]
        model = resolve_bundle(config.model, config.file.parent)
    except (BundleError, TileError) as error:
        raise UserError(f"model: {error}") from None
    status = model.stat()
    return [str(model), [status.st_size, status.st_mtime_ns]]


def _area_stamp(config: CityConfig) -> list[int]:
    """Size in bytes and mtime in ns of the file of `grid.area`, and of what may lie beside it: edits, and its CRS."""
    if not isinstance(config.area, Path):
        return []
    files = (config.area, Path(f"{config.area}-wal"), config.area.with_suffix(".prj"))
    stats = [file.stat() for file in files if file.exists()]
    return [value for it in stats for value in (it.st_size, it.st_mtime_ns)]


def nothing_changed(config: CityConfig) -> dict[str, Any] | None:
    """The manifest, if config, tiles, model and machine are as they were when it was written, and its outputs exist.

    A model file with another stamp is the same if its digest is; tiles with other stamps are left to the run to judge,
    and so are tiles that were skipped: they may be readable now.
    """
    config.find_buckets()
    folder = config.folder
    folder.check("output")
    manifest = read_manifest(folder)
    if manifest is None or manifest["skipped"]:
        return None
    try:
        now, then = state_of_inputs(config), manifest["state"]
        if now["model"] != then["model"] and not _is_same_model(now["model"][0], manifest["model"]["digest"]):
            return None
        whole = all(folder.each(lambda it: _is_there(folder, *it), manifest["outputs"].items()))
    except (UserError, OSError):
        return None
    # The order of tiles decides which of them wins where they overlap.
    same = all(now[part] == then[part] for part in STATE) and [*now["images"]] == [*then["images"]]
    return manifest if whole and same else None


def _is_same_model(place: str, digest: str) -> bool:
    """Whether a bundle with another stamp is the same; of one in a bucket the run finds out, which copies it."""
    return not is_remote(place) and file_digest(Path(place)) == digest


def _is_there(folder: Folder, name: str, size: int) -> bool:
    """Whether a published file is there in its size. A GeoPackage may have grown: QGIS writes into it."""
    found = folder.size(name)
    if found is None or not name.endswith(".gpkg"):
        return found == size
    return found >= size and folder.start_of(name, 16) == b"SQLite format 3\0"


def revoke(folder: Folder | Path, rows_digest: str | None = None) -> dict[str, set[str]]:
    """Say that the outputs are about to change: until the next manifest, no run finds that nothing has changed.

    rows_digest: of the GeoPackage that is to be published. Returns, for each GeoPackage that was published here, the
    digests of the rows that it has if nobody has changed it since: the last ones under this name, or those of a run
    that was killed while publishing.
    """
    place = folder_at(folder)
    manifest = _read(place)
    own, begun = _digests(manifest)
    if rows_digest is not None:
        manifest["rows_digests_begun"] = sorted(begun | {rows_digest})
    place.write(MANIFEST, as_json(manifest | {"state": None}))
    return {name: begun | {own[name]} if name in own else begun for name in geopackages(place)}


def begin_files(folder: Folder, names: Iterable[str]) -> None:
    """Say that files of these names are about to be written: they are ours, even if the run is killed on the way."""
    manifest = _read(folder)
    begun = {*_texts(manifest.get("files_begun")), *names}
    folder.write(MANIFEST, as_json(manifest | {"files_begun": sorted(begun)}))


def own_files(folder: Folder) -> set[str]:
    """Names of files that runs have written or begun to write in a folder, be they still there or not."""
    return {*outputs_of(folder), *_texts(_read(folder).get("files_begun"))}


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def outputs_of(folder: Folder) -> list[str]:
    """Names of the files that the last manifest tells of, be they still there or not."""
    outputs = _read(folder).get("outputs")
    return [name for name in outputs if isinstance(name, str)] if isinstance(outputs, dict) else []


def kept_at(manifest: dict[str, Any], folder: Path) -> Folder:
    """Where the store and the ledger of a run are: beside its files, unless these are copies of what is in a bucket."""
    output = manifest["config"]["output"]
    return folder_at(output if is_remote(output) else folder)


def last_published(folder: Folder | Path) -> tuple[str | None, dict[str, Any] | None]:
    """Name of the GeoPackage that the last manifest tells of, and the lattice of its rows; None where it tells none."""
    manifest = _read(folder_at(folder))
    outputs, lattice = manifest.get("outputs"), manifest.get("lattice")
    names = [name for name in outputs if name.endswith(".gpkg")] if isinstance(outputs, dict) else []
    return (names[0] if names else None), lattice if isinstance(lattice, dict) else None


def _digests(manifest: dict[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Digests of the rows published last, by file name, and of those of killed runs; what is no text is left out."""
    own, begun = manifest.get("rows_digests"), manifest.get("rows_digests_begun")
    return (
        {name: digest for name, digest in own.items() if isinstance(digest, str)} if isinstance(own, dict) else {},
        {digest for digest in begun if isinstance(digest, str)} if isinstance(begun, list) else set(),
    )


def geopackages(folder: Folder) -> list[str]:
    """Files with a name that footprints are published under: buildings.gpkg, buildings-2.gpkg and so on."""
    return [name for name in sorted(folder.top()) if re.fullmatch(r"buildings(-\d+)?\.gpkg", name)]


def check_folder_is_ours(place: Folder | Path, config: Path | None = None) -> None:
    """UserError where a run would write over somebody's own files in its output folder.

    That is where no run has left a trace there and one of them has a name that a run publishes under, or the YAML
    file itself (config) is in the place of the resolved one.
    """
    folder = folder_at(place)
    there = folder.top()
    if not there.isdisjoint(TRACES) or "state" in _read(folder):
        return
    if (
        config is not None
        and isinstance(folder, LocalFolder)
        and (folder.path / "city.yaml").resolve() == config.resolve()
    ):
        raise UserError(
            f"output: {folder} holds {config.name} itself, and a run writes the resolved one there; expected another"
            " folder; cure: `output: run`"
        )
    foreign = [name for name in REPLACED if name in there]
    if foreign:
        raise UserError(
            f"output: {folder} holds {', '.join(foreign)} of somebody's own: no run has left a trace there, and this"
            " one would write over it; expected a new folder; cure: name another one in `output:`, or move the files"
        )


def check_not_foreign(there: Collection[str], own: Collection[str], formats: Sequence[str]) -> None:
    """UserError where a file that a format would be written as is somebody's own.

    there: names in the run folder; own: paths in it that earlier runs have written or begun to write.
    """
    ours = {name.partition("/")[0] for name in own}
    for name in (FORMAT_FILES[each] for each in formats):
        if name in there and name not in ours:
            raise UserError(
                f"outputs.formats: {name} in the output folder was not written by a run, and this one would write over"
                " it; expected no such file; cure: move or rename it"
            )


def _warping(mosaic: Mosaic | None) -> dict[str, Any] | None:
    """The grid that a warped tile was on, and how it came onto the lattice; None for a tile that was copied."""
    if mosaic is None:
        return None
    return {"from_crs": mosaic.crs_wkt, "transform": mosaic.transform, "resampling": mosaic.resampling}


def make_manifest(config: CityConfig, plan: Plan, state: dict[str, Any], published: Published) -> dict[str, Any]:
    """All that is to be known of a run that has been published."""
    from .inputs import versions
    from .stages import tile_unit

    ledger = Ledger(plan.folder)
    entries = [ledger.entry("scan", tile_unit(plan, index)) or {} for index in range(len(plan.tiles))]
    tiles = [
        {"path": tile.path, "window": asdict(tile.cover), "warped": _warping(tile.mosaic)}
        | {name: entry.get(name) for name in ("digest", "stamp", "invalid_px", "by_reason")}
        for tile, entry in zip(plan.tiles, entries, strict=True)
    ]
    own, begun = _digests(_read(plan.folder))
    others = {*geopackages(plan.folder)} - {published.geopackage.name}
    outputs = (published.geopackage.name, *OUTPUTS, *published.tile_masks, *published.files)
    return {
        "name": plan.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "lattice": asdict(plan.lattice),
        "grid": asdict(plan.layout.grid),
        "bounds": asdict(plan.bounds),
        "area": None
        if plan.area is None
        else {"source": plan.area.source, "ground_km2": round(plan.area.ground_km2(plan.lattice), 6)},
        "chunk_px": plan.chunk_px,
        "recipe": asdict(plan.recipe),
        "model": {
            "path": plan.model_url or str(plan.model),
            "digest": plan.model_digest,
            "card": plan.card.model_dump(mode="json"),
        },
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
        "changes": published.changes,
        "invalid_px": published.validity,
        "skipped": published.skipped,
        "notes": published.notes,
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
        "device": {what: round(seconds, 3) for what, seconds in published.device.items()},
        "rows_digests": {name: digest for name, digest in own.items() if name in others}
        | {published.geopackage.name: published.rows_digest},
        "rows_digests_begun": sorted(begun) if others else [],
        "outputs": {name: (plan.output / name).stat().st_size for name in outputs},
        "digests": {name: file_digest(plan.output / name) for name in outputs if not name.endswith(".gpkg")},
        "tiles": tiles,
        "config": config.model_dump(mode="json"),
        "state": state,
    }


def write_manifest(folder: Folder, manifest: dict[str, Any]) -> None:
    """Write manifest.json, last of all: where it has a state, the outputs are whole."""
    folder.write(MANIFEST, as_json(manifest))
