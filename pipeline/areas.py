"""Labelled areas of a training: planned and read as cities are, so that crops come from the chunks of a store.

Tiles on one lattice, validity per tile, chunks of a Zarr store. Labels lie in a store of their own on the same
lattice, one band of 0 and 1. In the validity of an area 1 is imagery with a label, 2 imagery without one.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyogrio
import rasterio
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataSourceError
from pyproj import CRS
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.features import rasterize
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterWindow
from zict import LRU

from segpipe.tasks.errors import UserError
from segpipe.tasks.files import file_stamp
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.read import Tile, TileHeader, read_window
from segpipe.tasks.sample import CONTEXT, SCORED, Area
from segpipe.tasks.sample import count as count_pixels
from segpipe.tasks.validity import min_pixels, scan_tile

from .config import AreaConfig, MaskConfig, TrainConfig
from .inputs import RASTERS, find_images, natural
from .ledger import Ledger
from .place import Placed, misfit, on_lattice, place_tiles, tile_crs
from .plan import ground_pixel_m, key_of, make_tile, read_headers
from .store import Layout, Store, prepare_store

CHUNK_PX = 512
NODATA_MIN_M2 = 1000.0
LEAST_PX = 64
"""Areas that are smaller on one side teach nothing that could be measured."""
WORST_RESOLUTION = 1.1
"""Areas may differ by this factor in resolution; more is for the scale of the crops to teach."""
INRIA_M = 0.3
INRIA_VALIDATES = range(1, 6)
"""Numbers of the tiles of each city that validate, as the data set's authors propose."""
PICTURE_WKT = 'ENGCRS["Picture",EDATUM["Picture"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]'
"""The CRS of what has no place on the Earth."""
KEPT_BYTES = 160 * 2**20
"""Of decoded chunks that a process keeps."""
VERSION = 2
"""Raised when the same files give other chunks."""


@dataclass(frozen=True)
class MaskValues:
    """Which values of a mask are buildings, which are not, and which pixels have no label.

    foreground None: all values but those of background and ignore. background None: 0 where 255 is foreground (a black
    and white mask), else all that is not foreground (a mask of class numbers).
    """

    foreground: tuple[int, ...] | None = None
    background: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = ()

    @staticmethod
    def of(config: MaskConfig) -> MaskValues:
        """As a section of the YAML has them. UserError for a value that is in two lists."""
        values = MaskValues(config.foreground, config.background, config.ignore)
        named = [*(values.foreground or ()), *(values.background or ()), *values.ignore]
        twice = next((value for value in named if named.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"foreground, background, ignore: {twice} is named twice; expected each value once")
        return values

    def read(self, mask_HW: NDArray[np.uint8], path: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """label_HW, 1 for buildings, and labelled_HW, False where there is no label. UserError for another value."""
        table = self._table()
        found = np.flatnonzero(np.bincount(mask_HW.ravel(), minlength=256))
        unknown = [int(value) for value in found if table[value] < 0]
        if unknown:
            shown = ", ".join(map(str, unknown[:4])) + (", ..." if len(unknown) > 4 else "")
            known = ", ".join(str(value) for value in range(256) if table[value] >= 0)
            raise UserError(
                f"{path}: holds the values {shown}; expected {known}; cure: name them in `foreground:`,"
                " `background:` or `ignore:`"
            )
        meaning_HW = table[mask_HW]
        return (meaning_HW == 1).astype(np.uint8), meaning_HW != 2

    def _table(self) -> NDArray[np.int8]:
        """Of each value: 0 background, 1 foreground, 2 no label, -1 none of these."""
        if self.foreground is None:
            table = np.ones(256, np.int8)
            table[list(self.background or (0,))] = 0
        else:
            strict = self.background is not None or 255 in self.foreground
            table = np.full(256, -1 if strict else 0, np.int8)
            table[list(self.background or (0,) if strict else ())] = 0
            table[list(self.foreground)] = 1
        table[list(self.ignore)] = 2
        return table


@dataclass(frozen=True)
class AreaPlan:
    """One labelled area: its tiles and labels on one lattice, and the folder that it is read into.

    label_tiles lie on the lattice; warped_labels are masks of another CRS; footprints are vector files. complete: where
    labels are complete, None: everywhere.
    """

    name: str
    folder: Path
    tiles: tuple[Tile, ...]
    label_tiles: tuple[Tile, ...]
    warped_labels: tuple[str, ...]
    footprints: tuple[Path, ...]
    complete: Path | None
    values: MaskValues
    lattice: Lattice
    bounds: Window
    resolution_m: float
    weight: float = 1.0

    @property
    def grid(self) -> Window:
        """The bounds, snapped to whole chunks."""
        return self.bounds.snap(CHUNK_PX)

    @property
    def layout(self) -> Layout:
        """Of the store of the images."""
        return Layout(self.lattice, self.grid, CHUNK_PX, len(self.tiles[0].bands))

    @property
    def key(self) -> str:
        """A digest of all that its chunks are made from."""
        sources = [tile.path for tile in (*self.tiles, *self.label_tiles)] + [*self.warped_labels]
        sources += [str(path) for path in (*self.footprints, self.complete) if path is not None]
        stamps = [(source, file_stamp(source)) for source in sources]
        return key_of(VERSION, self.layout, self.tiles, self.label_tiles, self.values, stamps)


@functools.lru_cache(maxsize=512)
def _opened(folder: Path, process: int) -> Store:
    """A store, opened once a process: loaders are forked, and share no handles."""
    return Store(folder)


_kept: LRU[tuple[Path, str, int, int], NDArray[np.uint8]] = LRU(KEPT_BYTES, {}, weight=lambda _, chunk: chunk.nbytes)
"""Decoded chunks by folder, array, row and column: crops overlap, and each place is looked at before it is read."""


def _chunks(folder: Path, array: str, window: Window) -> Iterator[tuple[Window, NDArray[np.uint8]]]:
    """The chunks that a window meets, each with its own window; those that are not kept are read in one go."""
    store = _opened(folder, os.getpid())
    cells = {cell: Window.cell(*cell, store.chunk_px) for cell in window.cells(store.chunk_px)}
    found = {cell: chunk for cell in cells if (chunk := _kept.get((folder, array, *cell))) is not None}
    missing = [cell for cell in cells if cell not in found]
    if missing:
        box = functools.reduce(Window.union, (cells[cell] for cell in missing))
        values = store.read(array, box, 0)
        for cell in missing:
            found[cell] = _kept[folder, array, *cell] = values[(..., *cells[cell].within(box))].copy()
    return ((cells[cell], chunk) for cell, chunk in found.items())


@dataclass(frozen=True)
class Pixels:
    """One array of a store as something to be sliced: rows and columns are counted from a corner, (row, col).

    The corner is that of the area's own grid: the store may cover more, since it never shrinks. band: the one band that
    is wanted, None: all of them.
    """

    folder: Path
    array: str
    corner_yx: tuple[int, int]
    shape: tuple[int, ...]
    band: int | None = None

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[np.uint8]:
        """The values in the slices, read from the chunks that they meet."""
        rows, cols = key[-2:]
        row_off, col_off = self.corner_yx
        window = Window(row_off + rows.start, col_off + cols.start, rows.stop - rows.start, cols.stop - cols.start)
        values = np.zeros((*self.shape[:-2], *window.shape_yx), np.uint8)
        for cell, chunk in _chunks(self.folder, self.array, window):
            common = cell.intersect(window)
            plane = chunk if self.band is None else chunk[self.band]
            values[(..., *common.within(window))] = plane[(..., *common.within(cell))]
        return values


def stored_area(name: str, folder: Path, layout: Layout, known: dict[str, list[int]], **options: object) -> Area:
    """An area in the store of a folder and that of its labels. known: its window and counts, as the ledger has them."""
    corner_yx, shape_yx = (layout.grid.row_off, layout.grid.col_off), layout.grid.shape_yx
    valid_px, positive_px = known["pixels"]
    return Area(
        name,
        Pixels(folder, "image", corner_yx, (layout.bands, *shape_yx)),
        Pixels(folder / "labels", "image", corner_yx, shape_yx, band=0),
        Pixels(folder, "valid", corner_yx, shape_yx),
        Window(*known["window"]),
        valid_px,
        positive_px,
        **options,  # type: ignore[arg-type]  # the fields that are left
    )


# Planning


def plan_area(config: TrainConfig, area: AreaConfig, folder: Path) -> AreaPlan:
    """Place an area's images and labels on one lattice. UserError where they do not fit."""
    base = config.file.parent.absolute()
    images = find_images(area.images, base, "areas.images")
    labels = _find_labels(area.labels, base)
    rasters = [path for path in labels if Path(path).suffix.lower() in RASTERS]
    footprints = tuple(Path(path) for path in labels if path not in rasters)
    if footprints and rasters:
        raise UserError(f"areas.labels: {', '.join(area.labels)}: rasters and footprints; expected one kind an area")
    headers, _ = read_headers(images, skip=False)
    _check_samples(headers, max(config.bands))
    placement = place_tiles(headers, area.images_crs)
    tiles = tuple(
        make_tile(header, place, config.bands, area.nodata, "auto")
        for header, place in zip(headers, placement.places, strict=True)
    )
    label_headers = read_headers(rasters, skip=False)[0] if rasters else ()
    _check_samples(label_headers, 1)
    label_tiles, warped = _place_labels(label_headers, area.images_crs, placement.lattice)
    complete = None if area.area is None else config.path(area.area)
    for path in (*footprints, *(() if complete is None else (complete,))):
        layer_of(path)
    lattice, bounds = placement.lattice, placement.bounds
    metres = ground_pixel_m(lattice, bounds)
    values, name = MaskValues.of(area), Path(tiles[0].path).stem
    return AreaPlan(
        name, folder, tiles, label_tiles, warped, footprints, complete, values, lattice, bounds, metres, area.weight
    )


def plan_picture(
    image: Path, mask: Path, bands: tuple[int, ...], values: MaskValues, metres: float, folder: Path
) -> AreaPlan:
    """An area of one image and its mask, pixel on pixel, wherever on the Earth that is."""
    (header, label), _ = read_headers((str(image), str(mask)), skip=False)
    _check_samples((header,), max(bands))
    _check_samples((label,), 1)
    if (header.height, header.width) != (label.height, label.width):
        raise UserError(
            f"{mask}: {label.height} x {label.width} px; expected {header.height} x {header.width}, as {image} has"
        )
    window = Window(0, 0, header.height, header.width)
    tile = make_tile(header, Placed(window), bands, None, "auto")
    label_tile = make_tile(label, Placed(window), (1,), (), 0.0)
    lattice = Lattice(PICTURE_WKT, 1.0, 0.0, 0.0)
    return AreaPlan(image.stem, folder, (tile,), (label_tile,), (), (), None, values, lattice, window, metres)


def plan_inria(config: TrainConfig, folder: Path) -> tuple[list[AreaPlan], list[AreaPlan]]:
    """The labelled tiles of the Inria data set, an area each: those that are trained on, and those that validate.

    PATH/train/images/austin1.tif and PATH/train/gt/austin1.tif. Tiles 1 to 5 of each city validate. TernausNet's text
    says 30 images of 6 cities, but 5 cities have labels, so they are 25.
    """
    assert config.inria is not None
    root = config.path(config.inria)
    images, masks = root / "train" / "images", root / "train" / "gt"
    found = sorted(images.glob("*.tif"), key=lambda path: natural(path.name))
    if not found:
        raise UserError(f"inria: no .tif in {images}; expected the data set's layout, train/images and train/gt")
    trained: list[AreaPlan] = []
    validating: list[AreaPlan] = []
    for image in found:
        city, number = split_name(image.stem)
        if not city or number is None:
            raise UserError(f"inria: {image}: expected a name of a city and a number such as austin1.tif")
        mask = masks / image.name
        if not mask.is_file():
            raise UserError(f"inria: {image} has no mask; expected {mask}")
        plan = plan_picture(image, mask, config.bands, MaskValues((255,)), INRIA_M, folder / image.stem)
        (validating if number in INRIA_VALIDATES else trained).append(plan)
    return trained, validating


def split_name(stem: str) -> tuple[str, int | None]:
    """austin12 to austin and 12."""
    city = stem.rstrip("0123456789")
    return city, int(stem[len(city) :]) if stem != city else None


def _find_labels(patterns: Sequence[str], base: Path) -> tuple[str, ...]:
    """Files of labels; a FileGDB is a folder that is one file, all others are found as images are."""
    found: list[str] = []
    for pattern in patterns:
        path = base / Path(pattern).expanduser()
        if path.is_dir() and path.suffix.lower() == ".gdb":
            found.append(str(path))
        else:
            # GeoJSON that is a label is footprints, not STAC items.
            found += find_images((pattern,), base, "areas.labels", stac=False)
    return tuple(found)


def _check_samples(headers: Sequence[TileHeader], band: int) -> None:
    for header in headers:
        if header.dtype != "uint8" or header.bands < band:
            raise UserError(
                f"{header.path}: {header.bands} bands of {header.dtype}; expected uint8 and band {band};"
                " cure: gdal_translate -ot Byte"
            )


def _place_labels(
    headers: Sequence[TileHeader], images_crs: str | None, lattice: Lattice
) -> tuple[tuple[Tile, ...], tuple[str, ...]]:
    """Masks on the lattice, pixel on pixel, and masks of another CRS, which are warped. UserError for all others."""
    tiles: list[Tile] = []
    warped: list[str] = []
    target = CRS.from_wkt(lattice.crs_wkt)
    for header in headers:
        system = tile_crs(header, images_crs)
        if system != target:
            warped.append(header.path)
            continue
        window = on_lattice(header, lattice)
        if window is None:
            why = misfit(header, system, lattice)
            raise UserError(
                f"{header.path}: {why}; expected images and labels of an area on the same pixels; cure: gdalwarp with"
                " one -t_srs, -tr and -tap on all of them"
            )
        # A mask's own nodata value is ignored: it is often 0, which here is a label. Its alpha band counts.
        tiles.append(make_tile(header, Placed(window), (1,), (), 0.0))
    return tuple(tiles), tuple(warped)


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


# Reading


def is_read(plan: AreaPlan) -> bool:
    """True if the chunks of an area are written, from these very files."""
    return Ledger(plan.folder).done("read", "area", plan.key) is not None


def write_area(plan: AreaPlan) -> None:
    """Read an area into chunks. TileError for a tile that cannot be read, UserError for a mask of other values."""
    store = prepare_store(plan.folder, plan.layout)
    labels = prepare_store(plan.folder / "labels", Layout(plan.lattice, plan.grid, CHUNK_PX, 1))
    windows: list[Window] = []
    pixels = np.zeros(2, np.int64)
    unlabelled = 0
    for window, valid_px, positive_px, bare in _write_chunks(plan, store, labels):
        pixels += (valid_px, positive_px)
        unlabelled += bare
        if valid_px:
            windows.append(window)
    box = windows[0] if windows else Window(0, 0, 0, 0)
    for other in windows[1:]:
        box = box.union(other)
    Ledger(plan.folder).record(
        "read",
        "area",
        plan.key,
        window=[box.row_off, box.col_off, *box.shape_yx],
        pixels=pixels.tolist(),
        unlabelled=unlabelled,
    )


def open_area(plan: AreaPlan) -> Area:
    """An area that is read, as something to draw crops from. UserError if it is of no use."""
    known = Ledger(plan.folder).done("read", "area", plan.key)
    if known is None:
        raise UserError(f"{plan.tiles[0].path}: changed while it was read; run again")
    if not known["pixels"][0]:
        raise UserError(f"{plan.tiles[0].path}: no pixel is both valid and labelled; expected some to learn from")
    _opened.cache_clear()
    _kept.clear()
    grid = plan.grid
    tiles = tuple(
        Window(cover.row_off - grid.row_off, cover.col_off - grid.col_off, *cover.shape_yx)
        for cover in (tile.cover.intersect(grid) for tile in plan.tiles)
    )
    area = stored_area(plan.name, plan.folder, plan.layout, known, weight=plan.weight, tiles=tiles)
    if min(area.window.shape_yx) < LEAST_PX:
        height, width = area.window.shape_yx
        raise UserError(
            f"{plan.tiles[0].path}: {height} x {width} labelled pixels; expected at least {LEAST_PX} on each side"
        )
    return area


def _write_chunks(plan: AreaPlan, store: Store, labels: Store) -> Iterator[tuple[Window, int, int, int]]:
    """Write all chunks; of each the bounding box of its labelled pixels, counted from the grid's corner.

    Then the number of these, of buildings among them, and of pixels that have no label.
    """
    least = max(1, min_pixels(NODATA_MIN_M2, plan.resolution_m**2))
    invalid = {tile.path: _invalid_pieces(tile, least) for tile in (*plan.tiles, *plan.label_tiles)}
    read_labels = _LabelReader(plan, invalid)
    grid = plan.grid
    for row, col in grid.cells(CHUNK_PX):
        window = Window.cell(row, col, CHUNK_PX)
        image_CHW, present_HW = read_window(plan.tiles, window, lambda tile, part: _at(invalid[tile.path], part))
        label_HW, labelled_HW = read_labels(window)
        valid_HW = np.where(present_HW, np.where(labelled_HW, SCORED, CONTEXT), 0).astype(np.uint8)
        store.write_chunk("image", row, col, image_CHW)
        store.write_chunk("valid", row, col, valid_HW)
        labels.write_chunk("image", row, col, label_HW[None])
        box, valid_px, positive_px = count_pixels(label_HW, valid_HW) or (Window(0, 0, 0, 0), 0, 0)
        row_off, col_off = window.row_off - grid.row_off, window.col_off - grid.col_off
        yield (
            Window(row_off + box.row_off, col_off + box.col_off, *box.shape_yx),
            valid_px,
            positive_px,
            int(np.count_nonzero(valid_HW == CONTEXT)),
        )


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


# Labels


class _LabelReader:
    """The labels of any window: burnt footprints, masks pixel on pixel, or warped masks, where they are complete."""

    def __init__(self, plan: AreaPlan, invalid: dict[str, Pieces]) -> None:
        self._plan, self._invalid = plan, invalid
        self._houses = polygons(plan.footprints, plan.lattice.crs_wkt) if plan.footprints else None
        self._complete = polygons((plan.complete,), plan.lattice.crs_wkt) if plan.complete is not None else None

    def __call__(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """label_HW, 1 for buildings, and labelled_HW, where there is a label."""
        plan = self._plan
        if self._houses is not None:
            label_HW = burn(self._houses, plan.lattice, window).astype(np.uint8)
            labelled_HW = np.ones(window.shape_yx, np.bool_)
        else:
            label_HW, labelled_HW = self._masks(window)
        if self._complete is not None:
            labelled_HW &= burn(self._complete, plan.lattice, window)
        return label_HW * labelled_HW, labelled_HW

    def _masks(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        plan = self._plan
        label_HW, labelled_HW = np.zeros(window.shape_yx, np.uint8), np.zeros(window.shape_yx, np.bool_)
        for tile in plan.label_tiles:
            if tile.window.intersect(window).pixels:
                band_CHW, there_HW = read_window((tile,), window, lambda it, part: _at(self._invalid[it.path], part))
                self._put(band_CHW[0], there_HW, tile.path, label_HW, labelled_HW)
        for path in plan.warped_labels:
            band_HW, there_HW = _warped(path, plan.lattice, window)
            self._put(band_HW, there_HW, path, label_HW, labelled_HW)
        return label_HW, labelled_HW

    def _put(
        self,
        mask_HW: NDArray[np.uint8],
        there_HW: NDArray[np.bool_],
        path: str,
        label_HW: NDArray[np.uint8],
        labelled_HW: NDArray[np.bool_],
    ) -> None:
        """Later masks win where they have a label. What lies where the mask has no pixel is no value of it."""
        meaning_HW, known_HW = np.zeros_like(label_HW), np.zeros_like(labelled_HW)
        meaning_HW[there_HW], known_HW[there_HW] = self._plan.values.read(mask_HW[there_HW], path)
        label_HW[known_HW] = meaning_HW[known_HW]
        labelled_HW |= known_HW


def _warped(path: str, lattice: Lattice, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A mask of another CRS on a window of the lattice, by its nearest pixels, and where it has any."""
    transform = lattice.transform(window.row_off, window.col_off)
    try:
        with (
            rasterio.open(path) as source,
            WarpedVRT(
                source,
                crs=lattice.crs_wkt,
                transform=transform,
                width=window.width,
                height=window.height,
                resampling=Resampling.nearest,
                src_nodata=None,
                add_alpha=source.count == 1,
            ) as warped,
        ):
            whole = RasterWindow(0, 0, window.width, window.height)
            band_HW: NDArray[np.uint8] = warped.read(1, window=whole)
            there_HW: NDArray[np.uint8] = warped.dataset_mask(window=whole)
            return band_HW, there_HW != 0
    except RasterioError as error:
        raise UserError(f"{path}: cannot be warped onto the images ({error})") from None


def burn(shapes: gpd.GeoSeries, lattice: Lattice, window: Window) -> NDArray[np.bool_]:
    """True for pixels whose centre lies in one of the shapes."""
    xmin, ymin, xmax, ymax = lattice.bounds(window)
    near = shapes.cx[xmin:xmax, ymin:ymax]
    if not len(near):
        return np.zeros(window.shape_yx, np.bool_)
    transform = lattice.transform(window.row_off, window.col_off)
    burnt_HW: NDArray[np.bool_] = (
        rasterize(near, window.shape_yx, transform=transform, dtype="uint8", all_touched=False) != 0
    )
    return burnt_HW


def layer_of(path: Path) -> str:
    """The layer of a vector file: its only one, or `buildings`. UserError if there is none, or it has no CRS."""
    try:
        layers = pyogrio.list_layers(path)
        names = [str(name) for name, kind in layers if kind is not None]
        name = "buildings" if len(names) > 1 and "buildings" in names else names[0] if len(names) == 1 else None
        if name is None:
            raise UserError(f"{path}: layers {', '.join(names) or 'none'}; expected one layer, or one named buildings")
        info = pyogrio.read_info(path, layer=name)
    except (DataSourceError, OSError) as error:
        raise UserError(f"{path}: {error}; expected footprints in a format of GDAL such as GeoPackage") from None
    if info["crs"] is None:
        raise UserError(f"{path}: no CRS; expected one, so that the footprints can be put on the images")
    return name


def polygons(paths: Sequence[Path], crs_wkt: str) -> gpd.GeoSeries:
    """The polygons of vector files in a CRS; lines and points are left out. UserError for a file without a CRS."""
    parts = []
    for path in paths:
        frame = gpd.read_file(path, layer=layer_of(path), columns=[])
        parts.append(frame.geometry.to_crs(crs_wkt).to_numpy())
    shapes = np.concatenate(parts) if parts else np.empty(0, object)
    kept = shapes[np.isin(shapely.get_type_id(shapes), (3, 6)) & ~shapely.is_empty(shapes)]
    return gpd.GeoSeries(kept, crs=crs_wkt)


def pixels_of(plans: Sequence[AreaPlan]) -> int:
    """Pixels that are to be read."""
    return sum(math.prod(plan.grid.shape_yx) for plan in plans)
