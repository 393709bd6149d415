"""Config and tile headers to a plan: lattice, grid, blocks, halo, recipe, memory, disk. All checked before any work."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from segpipe.models.weights import (
    BundleError,
    Card,
    cache_folder,
    check_module,
    file_digest,
    read_card,
    resolve_bundle,
)
from segpipe.tasks.bucket import BucketFolder, Storage
from segpipe.tasks.errors import TileError, UnreachableError, UserError
from segpipe.tasks.files import is_remote
from segpipe.tasks.grid import Lattice, Window, WindowIndex
from segpipe.tasks.grid import ground_pixel_m as pixel_m_of_raster
from segpipe.tasks.mosaic import Mosaic
from segpipe.tasks.predict import reach
from segpipe.tasks.read import Tile, TileHeader, read_header, resolve_bands
from segpipe.tasks.remote import look_up, pieces
from segpipe.tasks.scale import Scale, percentile_scale, sample_values
from segpipe.tasks.validity import min_pixels, resolve_speckle_tolerance, resolve_tolerance
from segpipe.tasks.vectorize import VectorSettings

from .config import CityConfig
from .district import District, resolve_area
from .inputs import ASKED_AT_ONCE, find_images
from .manifest import check_folder_is_ours, check_not_foreign, own_files
from .place import Placed, check_scattered, ground_m, place_tiles, resolve_output_crs, settled_mosaics, tile_crs
from .recipe import Recipe, resolve_halo, resolve_recipe
from .storage import Folder, LocalFolder, desk_of, folder_at
from .store import Layout
from .tile_masks import file_names
from .workers import Crew, Workers, allowance, resolve_workers

SETTLED = "settled.json"


@dataclass(frozen=True)
class Plan:
    """Everything that a run is going to do, decided. Workers get it whole; it holds no pixels and no network."""

    name: str
    folder: Folder
    output: Path
    """Where published files are written: the folder itself, or one of the driver's from which they are uploaded."""
    tiles: tuple[Tile, ...]
    layout: Layout
    bounds: Window
    nodata_min_m2: float
    skip_bad_tiles: bool
    model: Path
    model_digest: str
    card: Card
    recipe: Recipe
    vector: VectorSettings
    workers: Workers
    task_bytes: int
    left_out: dict[str, str]
    notes: tuple[str, ...]
    area: District | None = None
    """The part that is asked for; None: all that the tiles cover."""
    lock: str = ""
    """Token of the lock under which tasks may write; an empty text: nobody asks."""
    model_url: str | None = None
    """Where the bundle is, if that is in a bucket: `model` is then the driver's copy."""
    storage: Storage = field(default_factory=Storage)

    def settled(self) -> dict[str, Any]:
        """What this run has settled for all later ones in its folder."""
        return {
            "lattice": asdict(self.lattice),
            "mosaics": settled_mosaics(self.mosaics),
            "scale": None if self.scale is None else [self.scale.low, self.scale.high],
            "block_px": self.block_px,
            "threads": self.recipe.threads,
        }

    @property
    def scale(self) -> Scale | None:
        """How samples become 8 bits, in all tiles alike; None: they are."""
        return self.tiles[0].scale

    @property
    def mosaics(self) -> tuple[Mosaic, ...]:
        """Grids of the tiles that are warped, in the order of their first tiles."""
        return tuple(dict.fromkeys(tile.mosaic for tile in self.tiles if tile.mosaic is not None))

    @property
    def lattice(self) -> Lattice:
        """The absolute pixel lattice."""
        return self.layout.lattice

    @property
    def chunk_px(self) -> int:
        """Side of a chunk."""
        return self.layout.chunk_px

    @property
    def block_px(self) -> int:
        """Side of a block's core."""
        return self.recipe.block_px

    def core(self, row: int, col: int) -> Window:
        """The core of the block with absolute index (row, col)."""
        return Window.cell(row, col, self.block_px)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Blocks to be predicted, by absolute index, row by row: those that meet a tile, and are near the area."""
        near = self.layout.grid if self.area is None else _near(self.area, self.recipe.halo_px)
        return (block for block in self._cells(self.block_px, near) if self._is_near_area(block))

    def is_predicted(self, block: tuple[int, int]) -> bool:
        """Whether a block is among `blocks`."""
        inside = self.core(*block).intersect(self.layout.grid)  # a warped tile's cover may reach beyond by a pixel
        return bool(self.tiles_in(inside)) and self._is_near_area(block)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Chunks to be read, by absolute index, row by row: those that meet a tile, and are seen by a block."""
        return (chunk for chunk in self._cells(self.chunk_px, self.seen) if self._is_seen(chunk))

    def chunks_in(self, window: Window) -> list[tuple[int, int]]:
        """Those of `chunks` that meet a window, row by row."""
        return [
            cell
            for cell in window.intersect(self.layout.grid).cells(self.chunk_px)
            if self.tiles_in(Window.cell(*cell, self.chunk_px)) and self._is_seen(cell)
        ]

    def predicted_chunks_in(self, window: Window) -> list[tuple[int, int]]:
        """Chunks that meet a window, of blocks to be predicted, row by row."""
        chunks, in_block = self.chunks_in(window), self.block_px // self.chunk_px
        if self.area is None:
            return chunks
        return [(row, col) for row, col in chunks if self.is_predicted((row // in_block, col // in_block))]

    def open_sides(self, block: tuple[int, int]) -> tuple[str, ...]:
        """Sides of a block beyond which there are tiles but nothing is predicted: buildings are cut there."""
        row, col = block
        beyond = {"top": (row - 1, col), "right": (row, col + 1), "bottom": (row + 1, col), "left": (row, col - 1)}
        return tuple(
            side
            for side, other in beyond.items()
            if self.area is not None and not self._is_near_area(other) and self.tiles_in(self.core(*other))
        )

    def tiles_seen(self) -> list[int]:
        """Indices of the tiles that a block sees."""
        if self.area is None:
            return [*range(len(self.tiles))]
        return sorted({tile for chunk in self.chunks() for tile in self.tiles_in(Window.cell(*chunk, self.chunk_px))})

    @property
    def seen(self) -> Window:
        """The part of the grid in which all `chunks` lie."""
        return _seen(self.layout.grid, self.area, self.recipe, self.card.stride)

    def _is_near_area(self, block: tuple[int, int]) -> bool:
        """Within a halo, so that a building that meets the area is whole at least as far as that."""
        if self.area is None:
            return True
        core, halo_px = self.core(*block), self.recipe.halo_px
        return core.meets(_near(self.area, halo_px)) and self.area.is_near(core, halo_px)

    def _is_seen(self, chunk: tuple[int, int]) -> bool:
        if self.area is None:
            return True
        window, halo_px, stride = Window.cell(*chunk, self.chunk_px), self.recipe.halo_px, self.card.stride
        return any(
            self.is_predicted(block) and reach(self.core(*block), halo_px, stride).intersect(window).pixels
            for block in window.pad(halo_px + stride).cells(self.block_px)
        )

    def tiles_in(self, window: Window) -> list[int]:
        """Indices of the tiles that a window meets, in the order of the list."""
        return self._index.meeting(window)

    def min_nodata_pixels(self, tile: int) -> int:
        """The least pixels of a nodata patch, at the tile's own ground resolution."""
        return min_pixels(self.nodata_min_m2, self.tile_pixel_m(tile) ** 2)

    def tile_pixel_m(self, tile: int) -> float:
        """Ground metres of a tile's own pixel, at its centre."""
        it = self.tiles[tile]
        return ground_pixel_m(self.lattice, it.window) if it.mosaic is None else _ground_m_of(it.mosaic, it.window)

    def _cells(self, step: int, near: Window) -> Iterator[tuple[int, int]]:
        """Cells that meet a window and, anywhere in the grid, a tile, row by row."""
        grid = self.layout.grid.intersect(near.snap(step))
        for row in range(grid.row_off // step, -(-grid.row_stop // step)):
            strip = Window(row * step, grid.col_off, step, grid.width).intersect(grid)
            cols = {
                col for tile in self.tiles_in(strip) for _, col in self.tiles[tile].cover.intersect(strip).cells(step)
            }
            yield from ((row, col) for col in sorted(cols))

    @cached_property
    def _index(self) -> WindowIndex:
        return WindowIndex([tile.cover for tile in self.tiles])


def read_settled(folder: Folder | Path) -> dict[str, Any] | None:
    """What runs have settled for all later ones in a folder (Plan.settled), and a digest of the last one's inputs."""
    try:
        settled: dict[str, Any] = json.loads(folder_at(folder).read(SETTLED) or b"")
    except ValueError:
        return None
    return settled


def _near(area: District, halo_px: int) -> Window:
    """What a block meets that is near an area. Parts of it that are thin as a hair reach further, and do not count."""
    return area.window.pad(halo_px + 1)


def _seen(grid: Window, area: District | None, recipe: Recipe, stride: int) -> Window:
    """The part of a grid that blocks near an area can see."""
    if area is None:
        return grid
    return area.window.pad(2 * recipe.halo_px + recipe.block_px + stride + 1).intersect(grid)


def _ground_m_of(mosaic: Mosaic, window: Window) -> float:
    row, col = window.row_off + window.height / 2, window.col_off + window.width / 2
    place = Affine(*mosaic.transform)
    return float(pixel_m_of_raster(mosaic.crs_wkt, place, np.array([row]), np.array([col]))[0])


@lru_cache(maxsize=4096)
def ground_pixel_m(lattice: Lattice, window: Window) -> float:
    """Ground metres of a pixel at the centre of a window."""
    row, col = window.row_off + window.height / 2, window.col_off + window.width / 2
    return float(lattice.ground_pixel_m(np.array([row]), np.array([col]))[0])


def make_plan(config: CityConfig, stored: dict[str, Any] | None = None, crew: Crew | None = None) -> Plan:
    """Decide everything and check it. stored: what an earlier run in this folder has settled (lattice, block_px).

    crew: the workers that predict; None: this machine's.

    Raises UserError, with what was found, what was expected and the cure, for anything that cannot be run.
    """
    stored = stored or {}
    folder, storage = check_folder(config.folder), config.find_buckets()
    output = desk_of(folder)
    check_folder_is_ours(folder, config.file)
    resolve_output_crs(config.outputs.crs)
    check_not_foreign(folder.top(), own_files(folder), config.outputs.formats)
    model = find_model(config.model, config.file.parent)
    card = _card(model, config.module)
    headers, left_out = read_headers(find_images(config.images, config), skip=config.on_tile_error == "skip")
    _check_bands(config, headers, card)
    _check_resolution(config, headers, card)
    placement = place_tiles(
        headers, config.images_crs, config.grid.crs, config.grid.resolution_m, card.resolution_m, stored
    )
    if not config.grid.sparse:
        check_scattered(headers, placement)
    lattice = placement.lattice
    tiles = tuple(
        make_tile(header, place, resolve_bands(config.bands, header), config.nodata, config.nodata_tolerance)
        for header, place in zip(headers, placement.places, strict=True)
    )
    scale = resolve_scale(config, tiles, stored.get("scale"))
    tiles = tuple(replace(tile, scale=scale) for tile in tiles)
    if config.publish.tile_masks:
        file_names(tiles)
    bounds = placement.bounds
    layout = Layout(lattice, bounds.snap(config.grid.chunk_px), config.grid.chunk_px, len(config.bands))
    workers = resolve_workers(config.cluster, stored.get("threads"), crew)
    halo_px, notes = resolve_halo(config, card)
    notes += _told_of_resolution(config, ground_pixel_m(lattice, bounds), card) + _told_of_resizing(card)
    area = resolve_area(config.area, lattice, [tile.cover for tile in tiles])
    extent = bounds if area is None else bounds.intersect(_near(area, halo_px))
    notes += [] if crew is None else crew.notes
    recipe, task_bytes = resolve_recipe(config, card, halo_px, layout, extent, workers, stored.get("block_px"), crew)
    _check_disk(folder, tiles, len(config.bands), _seen(layout.grid, area, recipe, card.stride))
    threshold = config.vectorize.threshold if config.vectorize.threshold is not None else card.threshold
    return Plan(
        name=config.name,
        folder=folder,
        output=output,
        tiles=tiles,
        layout=layout,
        bounds=bounds if area is None else bounds.intersect(area.window),
        nodata_min_m2=config.nodata_min_m2,
        skip_bad_tiles=config.on_tile_error == "skip",
        model=model,
        model_digest=file_digest(model),
        card=card,
        recipe=recipe,
        vector=VectorSettings(
            threshold_u8=max(1, math.ceil(round(250 * threshold, 9))),
            min_area_m2=config.vectorize.min_area_m2,
            fill_holes_m2=config.vectorize.fill_holes_m2,
            simplify_m=config.vectorize.simplify_m,
            regularize=config.vectorize.regularize,
            regularize_min_iou=config.vectorize.regularize_min_iou,
        ),
        workers=workers,
        task_bytes=task_bytes,
        left_out=left_out,
        notes=tuple(notes),
        area=area,
        model_url=config.model if is_remote(config.model) else None,
        storage=storage,
    )


def read_headers(paths: Sequence[str], skip: bool) -> tuple[tuple[TileHeader, ...], dict[str, str]]:
    """Headers of the tiles, and, if they are to be skipped, paths that cannot be read with the reason.

    UserError for a tile that cannot be read, or for all of them.
    """
    headers: list[TileHeader] = []
    left_out: dict[str, str] = {}
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for path, found in zip(paths, pool.map(_whole_header, paths), strict=True):
            if isinstance(found, TileHeader):
                headers.append(found)
            elif skip and len(left_out) < len(paths) - 1:
                left_out[path] = str(found)
            else:
                pool.shutdown(cancel_futures=True)
                raise found
    return tuple(headers), left_out


def _whole_header(path: str) -> TileHeader | UserError:
    try:
        header = read_header(path)
    except UserError as error:
        return error
    if header.missing_bytes:
        return UserError(
            f"{path}: truncated, {header.missing_bytes:,} bytes are missing at its end; expected a whole file;"
            " cure: copy it again, or `on_tile_error: skip`"
        )
    return header


def check_folder(folder: Folder) -> Folder:
    """The run folder, if it can be written or made, or its bucket answers. UserError otherwise."""
    if isinstance(folder, BucketFolder):
        folder.check("output")
    else:
        check_output(folder.path)
    return folder


def check_output(path: Path) -> Path:
    """The output folder, if it exists and can be written or can be made."""
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"output: {nearest} is a file; expected a folder, or a path that can become one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output: {nearest} is not writable; expected a folder in which {path.name} can be written")
    return path


def find_model(name: str, base: Path) -> Path:
    """The file of a bundle: a path relative to base, the name of one in the package, or a copy of one in a bucket."""
    try:
        return copied_bundle(name) if is_remote(name) else resolve_bundle(name, base)
    except (BundleError, TileError) as error:
        raise UserError(f"model: {error}") from None


def model_file(plan: Plan) -> Path:
    """The bundle of a plan as a file of this machine. TileError where it cannot be copied from its bucket."""
    return plan.model if plan.model_url is None else copied_bundle(plan.model_url)


def copied_bundle(url: str) -> Path:
    """The file of a bundle in a bucket, copied into the cache of this machine if it is not there yet.

    TileError if it cannot be had.
    """
    found = look_up(url)
    version = blake2b(f"{url}\n{found.size}\n{found.etag}\n{found.modified}".encode(), digest_size=8).hexdigest()
    copy = cache_folder() / "bundles" / version / PurePosixPath(url).name
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with LocalFolder(copy.parent).writing(copy.name) as file:
            for piece in pieces(url):
                file.write(piece)
    return copy


def _card(model: Path, allowed_module: str | None) -> Card:
    try:
        card = read_card(model)
        check_module(model, card, allowed_module)
        return card
    except BundleError as error:
        raise UserError(f"model: {error}") from None


def make_tile(
    header: TileHeader,
    place: Placed,
    bands: tuple[int, ...],
    nodata: tuple[float, ...] | None,
    tolerance: float | str,
    scale: Scale | None = None,
) -> Tile:
    """A tile at its place, with the rule for its invalid pixels; nodata None: the value that the file declares."""
    setting: Literal["auto"] | float = "auto" if tolerance == "auto" else float(tolerance)
    own = () if header.nodata is None else (header.nodata,)
    return Tile(
        path=header.path,
        window=place.window,
        bands=bands,
        nodata=own if nodata is None else nodata,
        tolerance=resolve_tolerance(setting, header),
        speckle_tolerance=resolve_speckle_tolerance(setting, header),
        mask=header.mask,
        scale=scale,
        mosaic=place.mosaic,
        warped_cover=place.cover,
    )


def _check_bands(config: CityConfig, headers: Sequence[TileHeader], card: Card) -> None:
    first = headers[0]
    if len(config.bands) != len(card.bands):
        raise UserError(
            f"bands: {list(config.bands)}, but the model {config.model} takes {len(card.bands)}"
            f" ({', '.join(card.bands)}); expected as many"
        )
    for header in headers:
        if header.bands != first.bands:
            raise UserError(
                f"{header.path}: {header.bands} bands, but {first.path} has {first.bands}; expected tiles of one kind;"
                " cure: gdal_translate -b 1 -b 2 -b 3, or leave the tile out of `images:`"
            )
        if header.dtype != first.dtype:
            raise UserError(
                f"{header.path}: samples of type {header.dtype}, but {first.path} has {first.dtype}; expected tiles of"
                " one kind; cure: gdal_translate -ot, or leave the tile out of `images:`"
            )
        if header.dtype.startswith("complex"):
            raise UserError(f"{header.path}: samples of type {header.dtype}; expected numbers that are not complex")
        if header.dtype != card.dtype and config.scale is None:
            raise UserError(
                f"{header.path}: samples of type {header.dtype}; expected {card.dtype}, which the model was trained on;"
                " cure: `scale: auto`, or `scale: [low, high]` with the samples that are to be black and white"
            )


def resolve_scale(config: CityConfig, tiles: Sequence[Tile], stored: Sequence[float] | None) -> Scale | None:
    """How samples become 8 bits: the pair of the YAML, or what the first run found in the whole city and has stored."""
    if config.scale is None:
        return None
    if config.scale != "auto":
        low, high = config.scale
        if low >= high:
            raise UserError(f"scale: [{low:g}, {high:g}]; expected two sample values, the lower one first")
        return Scale(low, high)
    if stored is not None:
        return Scale(*stored)

    def samples(tile: Tile) -> NDArray[Any]:
        try:
            return sample_values(tile)
        except TileError as error:
            if isinstance(error, UnreachableError) or config.on_tile_error != "skip":
                raise
            # Left out here as it is when it is read.
            return np.zeros(0, np.uint8)

    with ThreadPoolExecutor(allowance()[0]) as pool:
        return percentile_scale(pool.map(samples, tiles))


def _check_resolution(config: CityConfig, headers: Sequence[TileHeader], card: Card) -> None:
    low, high = card.resolution_range_m
    asked = config.grid.resolution_m
    if asked is not None and not low * 0.999 <= asked <= high * 1.001:
        raise UserError(
            f"grid.resolution_m: {asked:g}; expected {low:g} to {high:g} m, which the model was trained for"
        )
    for header in headers:
        metres = ground_m(header, tile_crs(header, config.images_crs))
        # What is finer loses nothing that the model knows of if it is asked to be averaged; what is coarser lacks it.
        if metres > high * 1.001 or (metres < low * 0.999 and asked is None):
            cure = f"`grid: {{resolution_m: {card.resolution_m:g}}}`" if metres < low else "finer imagery"
            raise UserError(
                f"{header.path}: {metres:.3g} m a pixel on the ground; expected {low:g} to {high:g} m, which the model"
                f" was trained for; cure: {cure}, or another `model:`"
            )


def _told_of_resolution(config: CityConfig, metres: float, card: Card) -> list[str]:
    """What may be gained where the city's pixels are coarser than the model's (docs/benchmarks.md, Resolution)."""
    if config.grid.resolution_m is not None or metres < card.resolution_m * 1.1:
        return []
    times = (metres / card.resolution_m) ** 2
    return [
        f"the model was trained at {card.resolution_m:g} m: `grid: {{resolution_m: {card.resolution_m:g}}}` makes it"
        f" {times:.1f} times the pixels, and finds more"
    ]


def _told_of_resizing(card: Card) -> list[str]:
    """What a network that was trained on images of one size meets in a city, which is never resized."""
    if card.resize_px is None:
        return []
    height, width = card.resize_px
    return [
        f"the model was trained on whole images resized to {width} x {height} px, and here sees pixels as they are:"
        " what it finds may be worse than its figures; `segpipe predict` resizes"
    ]


def _check_disk(folder: Folder, tiles: Sequence[Tile], bands: int, seen: Window) -> None:
    path = desk_of(folder)
    nearest = next(p for p in (path, *path.parents) if p.exists())
    have = shutil.disk_usage(nearest).free
    if isinstance(folder, BucketFolder):
        needed, kept = disk_bytes(tiles, 0, seen), 0
        what, cure = "the files of this city before they are uploaded", "set TMPDIR to a folder of a larger disk"
    else:
        needed, what, cure = disk_bytes(tiles, bands, seen), "this city", "another `output:`"
        kept = sum(p.stat().st_size for p in (path / "store.zarr").rglob("*") if p.is_file())
    if needed > have + kept:
        raise UserError(
            f"output: {have / 2**30:.2f} GiB free at {nearest}; expected {needed / 2**30:.2f} GiB for {what};"
            f" cure: {cure}"
        )


def disk_bytes(tiles: Sequence[Tile], bands: int, seen: Window) -> int:
    """What a run folder takes at most, while the mask is written: image, probability, this as a raster, footprints.

    seen: the window in which chunks lie. bands: of the image; 0 leaves it out.
    """
    # Bytes a pixel: imagery hardly gets smaller; probabilities took 0.8 in the store and 0.75 as a COG, a raster that
    # is not compressed 1.4 with its overviews, and all else, of a town as dense as one can be, 0.5.
    return int(sum(tile.cover.intersect(seen).pixels for tile in tiles) * (bands + 3.5)) + 16 * 2**20


def key_of(*parts: object) -> str:
    """A short digest of values whose text says all about them: the key of a unit of work in the ledger."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()
