"""Labelled areas of a training: planned and read as cities are, so that crops come from the chunks of a store.

Tiles on one lattice, validity per tile, chunks of a Zarr store. Labels lie in a store of their own on the same
lattice, one band of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
from numpy.typing import NDArray
from rasterio.features import rasterize

from segpipe.tasks.errors import UserError
from segpipe.tasks.files import file_stamp
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.read import Tile, read_window
from segpipe.tasks.sample import Area
from segpipe.tasks.validity import min_pixels, scan_tile

from .config import AreaConfig, TrainConfig
from .inputs import find_images
from .place import misfit, place_tiles, tile_crs
from .plan import ground_pixel_m, key_of, make_tile, read_headers
from .store import Layout, Ledger, Store, prepare_store

CHUNK_PX = 512
NODATA_MIN_M2 = 1000.0
VECTORS = frozenset({".gpkg", ".geojson", ".json", ".shp", ".fgb"})
WORST_RESOLUTION = 1.1
"""Areas may differ by this factor in resolution; more is for the scale of the crops to teach."""


@dataclass(frozen=True)
class AreaPlan:
    """One labelled area: its tiles and label tiles (or footprints) on one lattice, and where it is read to."""

    name: str
    folder: Path
    tiles: tuple[Tile, ...]
    label_tiles: tuple[Tile, ...]
    footprints: tuple[Path, ...]
    lattice: Lattice
    bounds: Window

    @property
    def grid(self) -> Window:
        """The bounds, snapped to whole chunks."""
        return self.bounds.snap(CHUNK_PX)

    @property
    def resolution_m(self) -> float:
        """Ground metres of a pixel."""
        return ground_pixel_m(self.lattice, self.bounds)


@dataclass(frozen=True)
class Pixels:
    """One array of a store as something to be sliced: rows and columns are counted from the grid's corner."""

    store: Store
    array: str
    shape: tuple[int, ...]

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[np.uint8]:
        """The values in the slices, read from the chunks that they meet."""
        rows, cols = key[-2:]
        grid = self.store.grid
        window = Window.between(rows.start, cols.start, rows.stop, cols.stop)
        window = Window(grid.row_off + window.row_off, grid.col_off + window.col_off, *window.shape_yx)
        return self.store.read(self.array, window, 0)


def plan_area(config: TrainConfig, area: AreaConfig, folder: Path) -> AreaPlan:
    """Place an area's images and labels on one lattice. UserError where they do not fit."""
    base = config.file.parent.absolute()
    images = find_images(area.images, base, "areas.images")
    # GeoJSON that is a label is footprints, not STAC items.
    labels = find_images(area.labels, base, "areas.labels", stac=False)
    footprints = tuple(Path(path) for path in labels if Path(path).suffix.lower() in VECTORS)
    if footprints and len(footprints) < len(labels):
        raise UserError(f"areas.labels: {', '.join(area.labels)}: rasters and footprints; expected one kind an area")
    headers, _ = read_headers(images, skip=False)
    for header in headers:
        if header.dtype != "uint8" or header.bands < max(config.bands):
            raise UserError(
                f"{header.path}: {header.bands} bands of {header.dtype}; expected uint8 and band {max(config.bands)}"
            )
    label_headers = () if footprints else read_headers(labels, skip=False)[0]
    both = (*headers, *label_headers)
    placement = place_tiles(both)
    for header, place in zip(both, placement.places, strict=True):
        if place.mosaic is not None:
            why = misfit(header, tile_crs(header, None), placement.lattice)
            raise UserError(
                f"{header.path}: {why}; expected images and labels of an area on the same pixels; cure: gdalwarp with"
                " one -t_srs, -tr and -tap on all of them"
            )
    tiles = tuple(
        make_tile(header, place, config.bands, area.nodata, "auto")
        for header, place in zip(headers, placement.places, strict=False)
    )
    # A mask's own nodata value is ignored: it is often 0, which here is a label. Its alpha band counts.
    label_tiles = tuple(
        make_tile(header, place, (1,), (), 0.0)
        for header, place in zip(label_headers, placement.places[len(headers) :], strict=True)
    )
    lattice = placement.lattice
    bounds = tiles[0].window
    for tile in tiles[1:]:
        bounds = bounds.union(tile.window)
    return AreaPlan(Path(tiles[0].path).stem, folder, tiles, label_tiles, footprints, lattice, bounds)


def common_resolution(plans: Sequence[AreaPlan]) -> float:
    """The median resolution of the areas in ground metres. UserError where one is far off."""
    metres = float(np.median([plan.resolution_m for plan in plans]))
    for plan in plans:
        if not metres / WORST_RESOLUTION <= plan.resolution_m <= metres * WORST_RESOLUTION:
            raise UserError(
                f"{plan.tiles[0].path}: {plan.resolution_m:.3g} m a pixel on the ground, but the median area has"
                f" {metres:.3g} m; expected one resolution; cure: gdalwarp -tr {metres:g} {metres:g} -r average"
            )
    return metres


def read_area(plan: AreaPlan) -> Area:
    """Read an area into chunks, once, and give it as something to draw crops from.

    Raises UserError if none of its pixels is both valid and labelled, and TileError for a tile that cannot be read.
    """
    layout = Layout(plan.lattice, plan.grid, CHUNK_PX, len(plan.tiles[0].bands))
    sources = [tile.path for tile in (*plan.tiles, *plan.label_tiles)] + [str(path) for path in plan.footprints]
    key = key_of(layout, plan.tiles, plan.label_tiles, [(source, file_stamp(source)) for source in sources])
    ledger = Ledger(plan.folder)
    store = prepare_store(plan.folder, layout)
    labels = prepare_store(plan.folder / "labels", Layout(plan.lattice, plan.grid, CHUNK_PX, 1))
    known = ledger.done("read", "area", key)
    if known is None:
        written = list(_write_chunks(plan, store, labels))
        if not written:
            raise UserError(f"{plan.tiles[0].path}: no pixel is both valid and labelled; expected some to learn from")
        window = written[0][0]
        for other, _ in written[1:]:
            window = window.union(other)
        known = {"window": [window.row_off, window.col_off, *window.shape_yx], "valid_px": sum(n for _, n in written)}
        ledger.record("read", "area", key, **known)
    shape_yx = plan.grid.shape_yx
    return Area(
        plan.name,
        Pixels(store, "image", (layout.bands, *shape_yx)),
        # The label is the one band of its store.
        Plane(Pixels(labels, "image", (1, *shape_yx))),
        Pixels(store, "valid", shape_yx),
        Window(*known["window"]),
        known["valid_px"],
    )


def _write_chunks(plan: AreaPlan, store: Store, labels: Store) -> Iterator[tuple[Window, int]]:
    """Write all chunks; of those with valid pixels: their bounding box, counted from the grid's corner, and number."""
    least = min_pixels(NODATA_MIN_M2, plan.resolution_m**2)
    invalid = {tile.path: _invalid_pieces(tile, least) for tile in (*plan.tiles, *plan.label_tiles)}
    shapes = _shapes(plan)
    for row, col in plan.grid.cells(CHUNK_PX):
        window = Window.cell(row, col, CHUNK_PX)
        image_CHW, valid_HW = read_window(plan.tiles, window, lambda tile, part: _at(invalid[tile.path], part))
        label_HW, labelled_HW = _labels(plan, window, shapes, invalid)
        valid_HW &= labelled_HW
        store.write_chunk("image", row, col, image_CHW)
        store.write_chunk("valid", row, col, valid_HW.astype(np.uint8))
        labels.write_chunk("image", row, col, label_HW[None])
        if valid_HW.any():
            yield _bounds(valid_HW, window, plan.grid), int(np.count_nonzero(valid_HW))


def _bounds(valid_HW: NDArray[np.bool_], window: Window, grid: Window) -> Window:
    """The bounding box of a window's valid pixels, counted from the grid's corner."""
    rows, cols = np.flatnonzero(valid_HW.any(axis=1)), np.flatnonzero(valid_HW.any(axis=0))
    row_off, col_off = window.row_off - grid.row_off, window.col_off - grid.col_off
    return Window.between(
        row_off + int(rows[0]), col_off + int(cols[0]), row_off + int(rows[-1]) + 1, col_off + int(cols[-1]) + 1
    )


@dataclass(frozen=True)
class Plane:
    """The only band of an array with one."""

    pixels: Pixels

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W)."""
        return self.pixels.shape[1:]

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[np.uint8]:
        """The values in the slices."""
        plane: NDArray[np.uint8] = self.pixels[key][0]
        return plane


Pieces = list[tuple[Window, NDArray[np.bool_]]]


def _invalid_pieces(tile: Tile, least: int) -> Pieces:
    pieces: Pieces = []
    if tile.nodata or tile.mask != "none":
        scan_tile(tile, least, lambda window, mask: pieces.append((window, mask)), CHUNK_PX)
    return pieces


def _at(pieces: Pieces, window: Window) -> NDArray[np.bool_] | None:
    invalid: NDArray[np.bool_] | None = None
    for piece, mask in pieces:
        common = piece.intersect(window)
        if common.pixels:
            invalid = np.zeros(window.shape_yx, np.bool_) if invalid is None else invalid
            invalid[common.within(window)] = mask[common.within(piece)]
    return invalid


def _shapes(plan: AreaPlan) -> gpd.GeoSeries | None:
    """Footprints in the CRS of the lattice; None where the labels are rasters."""
    if not plan.footprints:
        return None
    parts = []
    for path in plan.footprints:
        frame = gpd.read_file(path)
        if frame.crs is None:
            raise UserError(f"{path}: no CRS; expected one, so that the footprints can be put on the images")
        parts.append(frame.geometry.to_crs(plan.lattice.crs_wkt))
    shapes = gpd.GeoSeries(np.concatenate([part.to_numpy() for part in parts]), crs=plan.lattice.crs_wkt)
    return shapes[~(shapes.is_empty | shapes.isna())]


def _labels(
    plan: AreaPlan, window: Window, shapes: gpd.GeoSeries | None, invalid: dict[str, Pieces]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """label_HW, 1 for buildings (pixels whose centre lies in a footprint), and labelled_HW, where there is a label."""
    if shapes is None:
        band_CHW, labelled_HW = read_window(plan.label_tiles, window, lambda tile, part: _at(invalid[tile.path], part))
        return (band_CHW[0] != 0).astype(np.uint8), labelled_HW
    xmin, ymin, xmax, ymax = plan.lattice.bounds(window)
    near = shapes.cx[xmin:xmax, ymin:ymax]
    transform = plan.lattice.transform(window.row_off, window.col_off)
    burnt = rasterize(near, window.shape_yx, transform=transform, dtype="uint8") if len(near) else 0
    return np.zeros(window.shape_yx, np.uint8) + burnt, np.ones(window.shape_yx, np.bool_)
