"""Verify: prove a run's outputs from themselves and from its manifest. The first difference ends it.

What is proved does not come from the code that has made it where that can be avoided: a strip of the mask is
polygonized by rasterio, sums are taken again from the rasters, footprints are compared with regions of the mask by id.
"""

from __future__ import annotations

import math
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyogrio.errors
import pyogrio.raw
import rasterio
import rasterio.errors
import rasterio.features
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from rasterio.windows import Window as RasterWindow

from segpipe.models.weights import file_digest
from segpipe.tasks.errors import RunError, UserError
from segpipe.tasks.evaluate import near
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.outlines import Geometries
from segpipe.tasks.predict import INVALID
from segpipe.tasks.regularize import REACH_PX
from segpipe.tasks.vectorize import FULL_U8, VectorSettings, building_ids, finish, mask_of, polygonize

from .geopackage import LAYER, rows_digest
from .ledger import Ledger
from .manifest import kept_at, read_manifest, state_digest
from .place import one_wording
from .plan import read_settled
from .rasters import GDAL_CACHE_BYTES
from .regions import regions
from .rows import BATCH_ROWS
from .stages import cell_unit
from .store import Store

CELL_PX = 2048
STRIP_PX = (512, 2048)
"""Across a seam and along it."""


@dataclass(frozen=True)
class Claims:
    """What a manifest claims, and where its files are. bounds: of the rasters, on the lattice."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def lattice(self) -> Lattice:
        """The pixel lattice."""
        return Lattice(**self.manifest["lattice"])

    @property
    def bounds(self) -> Window:
        """The window of the rasters on the lattice."""
        return Window(**self.manifest["bounds"])

    @property
    def vector(self) -> VectorSettings:
        """How footprints were made of probabilities."""
        return VectorSettings(**self.manifest["vector"])

    @property
    def geopackage(self) -> Path:
        """The footprints."""
        names: list[str] = [name for name in self.manifest["outputs"] if name.endswith(".gpkg")]
        return self.folder / names[0]

    def expect(self, what: str, found: object, expected: object) -> None:
        """RunError where something is not as it should be."""
        if found != expected:
            raise RunError(f"{self.folder}: {what}: found {found}; expected {expected}")


Check = Callable[[Claims], str]


def verify_run(folder: Path) -> Iterator[tuple[str, str]]:
    """Prove everything about a finished run; gives what was proved, check by check.

    RunError at the first difference; UserError where there is no finished run.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no manifest of a finished run in it; expected the output folder of `segpipe run`")
    checks = {
        "files": check_files,
        "rasters": check_place,
        "pixels": check_pixels,
        "store": check_store,
        "rows": check_rows,
        "areas": check_areas,
        "strip": check_strip,
    }
    yield from _passed(Claims(folder, manifest), checks)


def verify_quickly(folder: Path, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run proves of itself when it ends, in seconds: places, and a strip across a seam. RunError."""
    return list(_passed(Claims(folder, manifest), {"rasters": check_place, "strip": check_strip}))


def _passed(claims: Claims, checks: Mapping[str, Check]) -> Iterator[tuple[str, str]]:
    for name, check in checks.items():
        try:
            with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES):
                found = check(claims)
        except (rasterio.errors.RasterioError, pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
            raise RunError(f"{claims.folder}: {name}: cannot be read ({' '.join(str(error).split())})") from error
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"{claims.folder}: {name}: cannot be read ({error})") from error
        yield name, found


def check_files(claims: Claims) -> str:
    """All files that were published are there, and all but GeoPackages have the bytes that were."""
    digests = claims.manifest["digests"]
    for name in claims.manifest["outputs"]:
        path = claims.folder / name
        if not path.is_file():
            raise RunError(f"{path}: is missing; expected what the manifest names")
        if not name.endswith(".gpkg"):
            claims.expect(f"digest of {name}", file_digest(path), digests.get(name))
    return f"{len(claims.manifest['outputs'])} files are there, {len(digests)} of them to the byte"


def check_place(claims: Claims) -> str:
    """Rasters and footprints have one CRS, one place, and the kind that they should have."""
    lattice, bounds = claims.lattice, claims.bounds
    crs, transform = one_wording(lattice.crs_wkt), lattice.transform(bounds.row_off, bounds.col_off)
    for name in ("mask.tif", "probability.tif"):
        with rasterio.open(claims.folder / name) as raster:
            claims.expect(f"CRS of {name}", _is_crs(raster.crs and raster.crs.to_wkt(), crs), True)
            claims.expect(f"size of {name}", raster.shape, bounds.shape_yx)
            drift = np.abs(np.array(raster.transform[:6]) - np.array(transform[:6])).max()
            if drift > 1e-6 * lattice.pixel_size:
                raise RunError(f"{claims.folder / name}: at {raster.transform[:6]}; expected {transform[:6]}")
            kind = (raster.count, raster.dtypes[0], raster.nodata)
            claims.expect(f"kind of {name}", kind, (1, "uint8", INVALID))
    info = pyogrio.read_info(claims.geopackage, layer=LAYER, force_feature_count=True, force_total_bounds=True)
    claims.expect("number of footprints", info["features"], claims.manifest["counts"]["buildings"])
    claims.expect("CRS of the footprints", _is_crs(info["crs"], crs), True)
    if info["features"] and claims.manifest["area"] is None:
        xmin, ymin, xmax, ymax = info["total_bounds"]
        left, bottom, right, top = lattice.bounds(bounds)
        slack = REACH_PX * lattice.pixel_size
        if xmin < left - slack or ymin < bottom - slack or xmax > right + slack or ymax > top + slack:
            raise RunError(f"{claims.geopackage}: footprints reach {info['total_bounds']}, beyond the rasters")
    return f"one CRS and one place, {bounds.width} x {bounds.height} px"


def _is_crs(text: str | None, crs: CRS) -> bool:
    """Whether a file's CRS is the lattice's. Each library that writes or reads one has words of its own for it."""
    return text is not None and one_wording(text) == crs


def check_pixels(claims: Claims) -> str:
    """The mask is the probabilities above the threshold, pixel by pixel, and their sums are the manifest's."""
    vector, mask_px, valid_px = claims.vector, 0, 0
    with ExitStack() as stack:
        mask, prob = (stack.enter_context(rasterio.open(claims.folder / f"{it}.tif")) for it in ("mask", "probability"))
        for window in _windows(claims.bounds):
            mask_HW, prob_HW = _read(mask, claims, window), _read(prob, claims, window)
            seen_HW = prob_HW != INVALID
            expected_HW = np.where(seen_HW, mask_of(prob_HW, vector.threshold_u8), INVALID)
            wrong = np.argwhere((mask_HW != expected_HW) | (seen_HW & (prob_HW > FULL_U8)))
            if len(wrong):
                row, col = (wrong[0] + (window.row_off, window.col_off)).tolist()
                values = mask_HW[tuple(wrong[0])], prob_HW[tuple(wrong[0])]
                raise RunError(
                    f"{claims.folder}: pixel at row {row}, column {col} of the lattice: mask {values[0]} where the"
                    f" probability is {values[1]}/250; expected {expected_HW[tuple(wrong[0])]}, the threshold being"
                    f" {vector.threshold_u8}/250"
                )
            mask_px += int(np.count_nonzero(mask_HW == 1))
            valid_px += int(np.count_nonzero(seen_HW))
    claims.expect("pixels of the mask", mask_px, claims.manifest["counts"]["mask_px"])
    claims.expect("valid pixels", valid_px, claims.manifest["counts"]["valid_px"])
    return f"{valid_px:,} valid, {mask_px:,} in the mask"


def check_store(claims: Claims) -> str:
    """What the store has kept: every valid pixel predicted once, and every chunk what the rasters show.

    A run that comes later works in the same store, and what is published stays until it publishes.
    """
    if claims.manifest["config"]["store"]["keep"] == "none":
        return "not kept"
    kept = kept_at(claims.manifest, claims.folder)
    try:
        return _check_chunks(claims, Ledger(kept), Store(kept))
    except RunError:
        # Asked last: it may begin while chunks are looked at. An earlier version has not told what it began with.
        published = state_digest(claims.manifest["state"])
        if (read_settled(kept) or {}).get("inputs", published) != published:
            return "not looked at: a later run has begun in the store"
        raise


def _check_chunks(claims: Claims, ledger: Ledger, store: Store) -> str:
    keep, bounds = claims.manifest["config"]["store"]["keep"], claims.bounds
    chunk_px, block_px = claims.manifest["chunk_px"], claims.manifest["recipe"]["block_px"]
    tiles = [Window(**tile["window"]) for tile in claims.manifest["tiles"]]
    tree = shapely.STRtree([_box(tile) for tile in tiles])
    done: dict[tuple[int, int], int] = {}
    chunks = 0
    with rasterio.open(claims.folder / "probability.tif") as prob:
        for chunk in bounds.cells(chunk_px):
            window = Window.cell(*chunk, chunk_px)
            seen = [index for index in tree.query(_box(window)).tolist() if tiles[index].intersect(window).pixels]
            block = (chunk[0] * chunk_px // block_px, chunk[1] * chunk_px // block_px)
            entry = ledger.entry("predict", cell_unit(*block)) if seen else None
            part = window.intersect(bounds)
            shown_HW = _read(prob, claims, part)
            if entry is None:
                if claims.manifest["area"] is None:
                    claims.expect(f"ledger of block {cell_unit(*block)}", None if seen else {}, {})
                claims.expect(f"valid pixels in chunk {cell_unit(*chunk)}", bool((shown_HW != INVALID).any()), False)
                continue
            checksum = entry["checksum"].get(cell_unit(*chunk))
            claims.expect(f"chunk {cell_unit(*chunk)} in the ledger of its block", checksum is not None, True)
            prob_HW = store.read_chunk("probability", *chunk, checksum)
            if keep == "all":
                _check_predicted_once(claims, ledger, store, chunk, prob_HW)
            inside_HW = prob_HW[part.within(window)]
            # Outside the area that was asked for, the rasters show nothing.
            hidden_HW = shown_HW == INVALID if claims.manifest["area"] is not None else np.False_
            claims.expect(
                f"chunk {cell_unit(*chunk)} in probability.tif",
                bool(((shown_HW != inside_HW) & ~hidden_HW).any()), False,
            )  # fmt: skip
            done[block] = done.get(block, 0) + int(np.count_nonzero(prob_HW != INVALID))
            chunks += 1
    if claims.manifest["area"] is None:
        for block, valid_px in done.items():
            entry = ledger.entry("predict", cell_unit(*block)) or {}
            claims.expect(f"valid pixels of block {cell_unit(*block)}", valid_px, entry.get("valid_px"))
        claims.expect("valid pixels of all blocks", sum(done.values()), claims.manifest["counts"]["valid_px"])
    return f"{chunks:,} chunks of {len(done):,} blocks, every valid pixel predicted once"


def _check_predicted_once(
    claims: Claims, ledger: Ledger, store: Store, chunk: tuple[int, int], prob_HW: NDArray[np.uint8]
) -> None:
    entry = ledger.entry("read", cell_unit(*chunk))
    if entry is None:
        raise RunError(f"{claims.folder}: chunk {cell_unit(*chunk)} of `valid` is not in the ledger; expected it read")
    valid_HW = store.read_chunk("valid", *chunk, entry["checksum"]["valid"]) != 0
    twice_or_never = int(np.count_nonzero(valid_HW != (prob_HW != INVALID)))
    claims.expect(f"pixels of chunk {cell_unit(*chunk)} valid but not predicted, or the other way", twice_or_never, 0)


def check_rows(claims: Claims) -> str:
    """The footprints are those that were published, each a valid polygon with an id of its own."""
    path = claims.geopackage
    claims.expect(
        f"digest of the rows of {path.name}", rows_digest(path), claims.manifest["rows_digests"].get(path.name)
    )
    total = 0.0
    for batch, geometry in _rows(path, ["building_id", "area_m2"]):
        wrong = np.flatnonzero(~shapely.is_valid(geometry))
        if len(wrong):
            name, why = batch["building_id"][wrong[0]], shapely.is_valid_reason(geometry[wrong[0]])
            raise RunError(f"{path}: building {name} is no valid polygon ({why}); expected valid ones only")
        total += math.fsum(batch["area_m2"])
    expected = claims.manifest["counts"]["buildings_m2"]
    # The manifest has it rounded to 0.01 m², and the sum in another order differs in its last digits.
    if abs(total - expected) > 0.01 + 1e-9 * expected:
        raise RunError(f"{path}: sum of area_m2: found {total:.3f}; expected {expected}")
    return f"{claims.manifest['counts']['buildings']:,} footprints as they were published"


def check_areas(claims: Claims) -> str:
    """Every region of the mask is a building of its pixels, or too small to be one; areas are whole pixels, exactly."""
    bounds, lattice, vector = claims.bounds, claims.lattice, claims.vector
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="segpipe-verify-")))
        mask = stack.enter_context(rasterio.open(claims.folder / "mask.tif"))
        database = stack.enter_context(closing(sqlite3.connect(folder / "regions.sqlite", isolation_level=None)))
        for statement in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", _REGIONS):
            database.execute(statement)
        (folder / "windows").mkdir()
        area_px = 0
        for found in regions(
            _windows(bounds), lambda window: _read(mask, claims, window) == 1, lattice, folder / "windows"
        ):
            outline_px = shapely.area(found.geometry)
            area_px += int(outline_px.sum())
            xmin, ymin, xmax, ymax = shapely.bounds(found.geometry).T
            ground_m2 = outline_px * lattice.ground_pixel_m((ymin + ymax) / 2, (xmin + xmax) / 2) ** 2
            ids = building_ids(found.key_row, found.key_col)
            rows = zip(ids, outline_px.astype(np.int64).tolist(), ground_m2.tolist(), strict=True)
            database.execute("BEGIN")
            database.executemany("INSERT INTO regions VALUES (?, ?, ?)", rows)
            database.execute("COMMIT")
        claims.expect("area of the mask's regions in pixels", area_px, claims.manifest["counts"]["mask_px"])
        buildings = 0
        for batch, _ in _rows(claims.geopackage, ["building_id", "pixels"]):
            for name, pixels in zip(batch["building_id"], batch["pixels"], strict=True):
                _check_region(claims, database, name, pixels)
                buildings += 1
        if claims.manifest["area"] is None:
            large = database.execute(
                "SELECT id, pixels FROM regions WHERE ground_m2 >= ? LIMIT 1", (vector.min_area_m2 + 1e-6,)
            ).fetchone()
            if large is not None:
                raise RunError(
                    f"{claims.geopackage}: no building {large[0]}; expected one of the {large[1]} px that the mask has"
                )
    return f"{area_px:,} px of mask are {buildings:,} buildings, and regions that are too small"


_REGIONS = "CREATE TABLE regions (id TEXT PRIMARY KEY, pixels INTEGER, ground_m2 REAL) WITHOUT ROWID"


def _check_region(claims: Claims, database: sqlite3.Connection, name: str, pixels: int) -> None:
    """A building's pixels are those of the region that begins where its id says; each region stands for one."""
    row = database.execute("DELETE FROM regions WHERE id = ? RETURNING pixels", (name,)).fetchone()
    if claims.manifest["area"] is not None:
        # Of a building that goes on outside the area, the mask has a part, which may begin elsewhere.
        if row is not None and row[0] > pixels:
            raise RunError(f"{claims.geopackage}: building {name} of {pixels} px; the mask has {row[0]} px of it")
        return
    if row is None:
        raise RunError(f"{claims.geopackage}: building {name}: no region of the mask begins there; expected one")
    claims.expect(f"pixels of building {name}", pixels, row[0])


def check_strip(claims: Claims) -> str:
    """A strip of the mask across a seam, drawn anew each time, polygonized by rasterio: the same footprints."""
    window = choose_strip(claims, np.random.default_rng())
    row, col = window.row_off - claims.bounds.row_off, window.col_off - claims.bounds.col_off
    what = f"rows {row} to {row + window.height}, columns {col} to {col + window.width} of mask.tif"
    with rasterio.open(claims.folder / "mask.tif") as mask, rasterio.open(claims.folder / "probability.tif") as prob:
        mask_HW, prob_HW = _read(mask, claims, window), _read(prob, claims, window)
    is_mask_HW = mask_HW == 1
    own = _whole_in(claims, window, mask_HW)
    oracle = {
        shapely.to_wkb(shapely.normalize(polygon))
        for polygon in shapely.simplify(
            [
                shapely.geometry.shape(shape)
                for shape, _ in rasterio.features.shapes(
                    is_mask_HW.astype(np.uint8), is_mask_HW, transform=_shift(window)
                )
            ],
            0,
        )
    }
    _, components = polygonize(is_mask_HW, np.where(is_mask_HW, prob_HW, 0), window.row_off, window.col_off)
    ours = {shapely.to_wkb(shapely.normalize(polygon)) for polygon in components.geometry}
    claims.expect(f"polygons of {what} that rasterio does not find alike", len(ours ^ oracle), 0)
    whole = components.take(own(components.geometry))
    lattice = claims.lattice

    def read(part: Window) -> NDArray[np.uint8]:
        here, values = part.intersect(window), np.full(part.shape_yx, INVALID, np.uint8)
        values[here.within(part)] = prob_HW[here.within(window)]
        return values

    expected = finish(whole, claims.vector, lattice, read)
    published = _published_in(claims, window)
    names = building_ids(expected.key_row, expected.key_col)
    for name, outline, raw in zip(names, expected.geometry, expected.raw, strict=True):
        if name not in published:
            raise RunError(f"{claims.geopackage}: no building {name}; expected one of {what}")
        # Where a neighbour is in the way of the outline, it is the raw one.
        if not any(_is_alike(claims, published[name], one) for one in (outline, raw)):
            raise RunError(f"{claims.geopackage}: building {name} has another outline; expected that of {what}")
    return f"{len(expected):,} footprints polygonized anew from {what}"


def choose_strip(claims: Claims, rng: np.random.Generator) -> Window:
    """A window of STRIP_PX, or what a smaller city has, across a seam between two blocks; anywhere, where none is."""
    bounds, block_px = claims.bounds, claims.manifest["recipe"]["block_px"]
    rows = range(-(-(bounds.row_off + 1) // block_px) * block_px, bounds.row_stop, block_px)
    cols = range(-(-(bounds.col_off + 1) // block_px) * block_px, bounds.col_stop, block_px)
    seams = [("row", line) for line in rows] + [("col", line) for line in cols]
    across, along = STRIP_PX
    kind, line = (
        seams[rng.integers(len(seams))] if seams else ("row", int(rng.integers(bounds.row_off, bounds.row_stop)))
    )
    if kind == "row":
        height, width = across, along
        row, col = line, int(rng.integers(bounds.col_off, bounds.col_stop))
    else:
        height, width = along, across
        row, col = int(rng.integers(bounds.row_off, bounds.row_stop)), line
    # Moved inwards from the edge of the raster, not cut there: as many footprints as there can be are looked at.
    row = max(bounds.row_off, min(row - height // 2, bounds.row_stop - height))
    col = max(bounds.col_off, min(col - width // 2, bounds.col_stop - width))
    return Window(row, col, height, width).intersect(bounds)


def _whole_in(claims: Claims, window: Window, mask_HW: NDArray[np.uint8]) -> Callable[[Geometries], NDArray[np.bool_]]:
    """Which regions of a window are whole in it: they touch its edge only where the raster ends too."""
    bounds, has_area = claims.bounds, claims.manifest["area"] is not None
    beside_HW = near(mask_HW == INVALID, 1)

    def whole(geometry: Geometries) -> NDArray[np.bool_]:
        xmin, ymin, xmax, ymax = shapely.bounds(geometry).T
        sides = (
            (xmin == window.col_off) & (has_area | (window.col_off > bounds.col_off)),
            (ymin == window.row_off) & (has_area | (window.row_off > bounds.row_off)),
            (xmax == window.col_stop) & (has_area | (window.col_stop < bounds.col_stop)),
            (ymax == window.row_stop) & (has_area | (window.row_stop < bounds.row_stop)),
        )
        cut: NDArray[np.bool_] = np.any(sides, axis=0)
        if has_area:
            # At its edge the mask ends, but the footprint goes on.
            boxes = np.stack(
                [ymin - window.row_off, ymax - window.row_off, xmin - window.col_off, xmax - window.col_off]
            )
            for index, (top, bottom, left, right) in enumerate(boxes.T.astype(np.int64).tolist()):
                cut[index] |= bool(beside_HW[top:bottom, left:right].any())
        return ~cut

    return whole


def _published_in(claims: Claims, window: Window) -> dict[str, shapely.Polygon]:
    """Published footprints that meet a window, by id."""
    bbox = claims.lattice.bounds(window.pad(2))
    frame = pyogrio.read_dataframe(claims.geopackage, layer=LAYER, columns=["building_id"], bbox=bbox)
    return dict(zip(frame["building_id"], frame.geometry, strict=True))


def _is_alike(claims: Claims, published: shapely.Polygon, outline: shapely.Polygon) -> bool:
    """Whether a published footprint is an outline on the lattice, to a thousandth of a pixel."""
    lattice = claims.lattice
    place = lattice.transform()
    expected = shapely.affinity.affine_transform(outline, place.to_shapely())
    return bool(published.normalize().equals_exact(expected.normalize(), 1e-3 * lattice.pixel_size))


def _windows(bounds: Window) -> Iterator[Window]:
    for cell in bounds.cells(CELL_PX):
        yield Window.cell(*cell, CELL_PX).intersect(bounds)


def _read(raster: Any, claims: Claims, window: Window) -> NDArray[np.uint8]:
    bounds = claims.bounds
    inner = RasterWindow(window.col_off - bounds.col_off, window.row_off - bounds.row_off, window.width, window.height)
    pixels: NDArray[np.uint8] = raster.read(1, window=inner)
    return pixels


def _shift(window: Window) -> rasterio.Affine:
    return rasterio.Affine.translation(window.col_off, window.row_off)


def _box(window: Window) -> shapely.Polygon:
    return shapely.box(window.col_off, window.row_off, window.col_stop, window.row_stop)


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[dict[str, list[Any]], Geometries]]:
    """Columns and geometries of the footprints, some rows at a time."""
    how: dict[str, Any] = {"layer": LAYER, "columns": columns, "batch_size": BATCH_ROWS, "use_pyarrow": True}
    with pyogrio.raw.open_arrow(path, **how) as (meta, reader):
        for batch in reader:
            wkb = batch.column(meta["geometry_name"] or "wkb_geometry").to_numpy(zero_copy_only=False)
            yield {name: batch.column(name).to_pylist() for name in columns}, shapely.from_wkb(wkb)
