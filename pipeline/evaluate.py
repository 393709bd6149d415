"""Evaluate: finished runs against the truth, by pixels and by buildings, a cell of the raster at a time."""

from __future__ import annotations

import heapq
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import rasterio
import rasterio.errors
import shapely
from numpy.typing import NDArray
from rasterio.windows import Window as RasterWindow

from segpipe.tasks.errors import RunError, UserError
from segpipe.tasks.evaluate import (
    BOUNDARY_PX,
    FALSE_ALARM,
    HIT,
    MISS,
    ROW,
    Tally,
    code_pixels,
    histogram,
    row_of_codes,
)
from segpipe.tasks.files import tile_name
from segpipe.tasks.grid import Window, ground_pixel_m
from segpipe.tasks.outlines import Geometries
from segpipe.tasks.predict import INVALID

from . import judge
from .footprints import FOUND, TRUE, Cell, Cells, footprint_cells
from .manifest import kept_at, last_published, read_manifest
from .rasters import GDAL_CACHE_BYTES
from .rows import BATCH_ROWS
from .scores import CLASSES_M2, SEAM_PX, SQUARE_PX, City, Evaluation, Picture, Place, Run
from .truth import Truth, add_file_footprints, add_mask_footprints, choose_layer, open_truth

PLACE_PX = 256
"""Side of the places of which the worst are shown."""
WORST = 20


@dataclass
class _Sums:
    """What grows while a run is looked at, cell by cell."""

    pictures_rows: NDArray[np.int64]
    squares_rows: NDArray[np.int64]
    seam_row: NDArray[np.int64] = field(default_factory=lambda: np.zeros(ROW, np.int64))
    true_classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(CLASSES_M2), 2), np.int64))
    found_classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(CLASSES_M2), 2), np.int64))
    hidden_px: int = 0
    untold_px: int = 0
    apart_true: int = 0
    apart_found: int = 0
    worst: list[tuple[int, int, int, Place]] = field(default_factory=list)


def evaluate_runs(
    runs: Sequence[Path], truths: Sequence[Path], output: Path, group: str | None = None, truth_id: str | None = None
) -> Evaluation:
    """Compare the mask and the footprints of each run with its truth, where both are valid.

    output: a folder that gets evaluation.gpkg with hits, misses and false alarms; of several runs a file each. group: a
    regular expression, by what it finds in an image's name (its first group, if it has one) images are pooled too.
    truth_id: column of the truth's own ids. UserError where a run or a truth cannot be used.
    """
    if len(truths) != len(runs):
        raise UserError(f"{len(runs)} runs and {len(truths)} truths; expected one --truth for each run, in their order")
    opened = [read_run(folder, group) for folder in runs]
    names = [run.name for run in opened]
    if len(set(names)) < len(names):
        raise UserError(f"runs named {', '.join(names)}; expected runs of different names")
    with _made(output):
        return Evaluation(
            tuple(
                _evaluate_one(run, truth, layer_path(output, run, len(runs)), truth_id)
                for run, truth in zip(opened, truths, strict=True)
            )
        )


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Have a folder; one that was made for nothing goes again."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); expected a folder to write to; cure: --output"
        ) from None
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


def evaluate_to(
    output: Path, runs: Sequence[Path], truths: Sequence[Path], group: str | None = None, truth_id: str | None = None
) -> list[tuple[str, str]]:
    """Evaluate runs, and write tables, layers and the page of the worst places to a folder; labelled lines about it."""
    from .score_tables import terminal_rows, write_tables
    from .worst import write_worst

    evaluation = evaluate_runs(runs, truths, output, group, truth_id)
    write_tables(output, evaluation)
    page = output / "worst.html"
    notes = write_worst(page, evaluation, [layer_path(output, city.run, len(runs)) for city in evaluation.cities])
    lines = [*terminal_rows(evaluation), *(("no pictures", note) for note in notes)]
    return [*lines, ("written", f"{output}: evaluation.md, .csv, .json; worst.html; layers of hits and misses")]


def layer_path(output: Path, run: Run, runs: int) -> Path:
    """Where the layer of a run is written that was evaluated with others."""
    return output / ("evaluation.gpkg" if runs == 1 else re.sub(r"[^\w.-]+", "_", run.name) + ".gpkg")


def read_run(folder: Path, group: str | None = None) -> Run:
    """What is to be known of a finished run. UserError where it is none.

    Where there is no manifest, the raster counts as one image without seams.
    """
    mask = folder / "mask.tif"
    if not mask.is_file():
        raise UserError(f"{folder}: no mask.tif in it; expected the output folder of a finished `segpipe run`")
    try:
        with rasterio.open(mask) as dataset:
            extent = Window(0, 0, dataset.height, dataset.width)
    except rasterio.errors.RasterioIOError as error:
        raise UserError(f"{mask}: not a readable raster ({error})") from error
    try:
        pattern = None if group is None else re.compile(group)
    except re.error as error:
        raise UserError(
            f"--group {group}: not a regular expression ({error}); expected one such as '^[a-z]+'"
        ) from None
    manifest = read_manifest(folder)
    published, _ = last_published(folder)
    candidates = [folder / name for name in (published, "buildings.gpkg") if name is not None]
    geopackage = next((path for path in candidates if path.is_file()), None)
    if manifest is None:
        return Run(
            folder,
            str(folder),
            folder.name,
            (0, 0),
            None,
            (Picture("mask", extent, _group("mask", pattern)),),
            geopackage,
        )
    bounds = Window(**manifest["bounds"])
    pictures = []
    for tile in manifest["tiles"]:
        window = Window(**tile["window"]).intersect(bounds)
        if window.pixels:
            name = PurePosixPath(tile_name(tile["path"])).stem
            shifted = Window(window.row_off - bounds.row_off, window.col_off - bounds.col_off, *window.shape_yx)
            pictures.append(Picture(name, shifted, _group(name, pattern)))
    block_px = int(manifest["recipe"]["block_px"])
    return Run(
        folder,
        str(kept_at(manifest, folder)),
        manifest["name"],
        (bounds.row_off, bounds.col_off),
        block_px,
        tuple(pictures),
        geopackage,
    )


def _group(name: str, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        return None
    found = pattern.search(name)
    if found is None:
        raise UserError(f"--group {pattern.pattern}: finds nothing in the image name {name}; expected it in every name")
    return found.group(1 if pattern.groups else 0)


def _evaluate_one(run: Run, truth_path: Path, layer: Path, truth_id: str | None) -> City:
    from .geopackage import write_verdicts

    mask_path = run.folder / "mask.tif"
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES))
        mask = stack.enter_context(rasterio.open(mask_path))
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".cells-", dir=layer.parent)))
        extent = Window(0, 0, mask.height, mask.width)
        try:
            cells = stack.enter_context(footprint_cells(temporary / "footprints.sqlite", extent, BOUNDARY_PX + 1))
            notes = _add_found(run, mask, cells)
            truth = open_truth(truth_path, mask, run.offset, cells, truth_id)
            cells.seal()
            verdicts = judge.Verdicts(cells.count[FOUND], cells.count[TRUE])
            squares = (-(-extent.height // SQUARE_PX), -(-extent.width // SQUARE_PX))
            sums = _Sums(np.zeros((len(run.pictures), ROW), np.int64), np.zeros((*squares, ROW), np.int64))
            eye = _Eye(run, mask, truth, cells)
            for cell in cells.cells():
                _look(eye, cell, verdicts, sums)
            judge.settle(verdicts, cells)
            batches = _tallied(eye, judge.judged(verdicts, cells), sums)
            write_verdicts(layer, batches, VERDICTS, mask.crs.to_wkt())
        except rasterio.errors.RasterioIOError as error:
            raise RunError(f"{mask_path} or {truth_path}: cannot be read to the end ({error})") from error
        except sqlite3.Error as error:
            raise RunError(f"{temporary}: footprints cannot be kept there ({error}); is the disk full?") from error
        return _city(run, truth_path, truth, sums, eye, (*notes, *truth.notes))


def _add_found(run: Run, mask: Any, cells: Cells) -> tuple[str, ...]:
    """Put the run's footprints into cells; notes."""
    if run.geopackage is None:
        add_mask_footprints(
            cells, FOUND, lambda window: mask.read(1, window=_to_rasterio(window)) == 1, mask, run.offset
        )
        return ("no buildings.gpkg in the run: connected regions of its mask stand for its buildings",)
    layer = choose_layer(run.geopackage, {"buildings": "Polygon"})
    add_file_footprints(cells, FOUND, run.geopackage, layer, mask)
    return ()


class _Eye:
    """What is needed to look at a cell: the open rasters, and where images and seams are."""

    def __init__(self, run: Run, mask: Any, truth: Truth, cells: Cells) -> None:
        self.run, self.mask, self.truth, self.cells = run, mask, truth, cells
        boxes = [
            shapely.box(it.col_off, it.row_off, it.col_stop, it.row_stop) for it in (p.window for p in run.pictures)
        ]
        self.pictures = shapely.STRtree(boxes)
        height, width = mask.shape
        self.on_seam = {
            axis: near_seams(offset, size, run.block_px)
            for axis, offset, size in (("row", run.offset[0], height), ("col", run.offset[1], width))
        }
        self.wkt = mask.crs.to_wkt()

    def pictures_in(self, window: Window) -> list[int]:
        box = shapely.box(window.col_off, window.row_off, window.col_stop, window.row_stop)
        return sorted(self.pictures.query(box).tolist())

    def picture_at(self, x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """The first of the images that each point lies in, -1 where there is none."""
        found = np.full(len(x), -1, np.int64)
        point, picture = self.pictures.query(shapely.points(x, y), predicate="intersects")
        order = np.argsort(-picture, kind="stable")
        found[point[order]] = picture[order]
        return found


def near_seams(offset: int, size: int, block_px: int | None) -> NDArray[np.bool_]:
    """True for the rows (or columns) of a raster that are within SEAM_PX of a line between two blocks in it.

    offset: the first row on the lattice.
    """
    near = np.zeros(size, np.bool_)
    if block_px is not None:
        for line in range(-(-(offset + 1) // block_px) * block_px - offset, size, block_px):
            near[max(0, line - SEAM_PX) : line + SEAM_PX] = True
    return near


def _look(eye: _Eye, cell: Cell, verdicts: judge.Verdicts, sums: _Sums) -> None:
    """Count the pixels of one cell, and judge its footprints."""
    window = eye.cells.window(cell)
    wide = window.pad(BOUNDARY_PX).intersect(eye.cells.extent)
    sides = {kind: eye.cells.read(cell, kind) for kind in (FOUND, TRUE)}
    mask_HW = eye.mask.read(1, window=_to_rasterio(wide))
    truth_HW, told_HW = eye.truth.read(wide, sides[TRUE])
    seen_HW = mask_HW != INVALID
    core = window.within(wide)
    code_HW = np.ascontiguousarray(code_pixels(mask_HW == 1, truth_HW, seen_HW & told_HW)[core])
    sums.hidden_px += int(np.count_nonzero(~seen_HW[core]))
    sums.untold_px += int(np.count_nonzero(seen_HW[core] & ~told_HW[core]))
    judge.judge_cell(verdicts, eye.cells, cell, sides, (seen_HW & told_HW)[core])
    for index in window.cells(SQUARE_PX):
        part = Window.cell(*index, SQUARE_PX).intersect(window)
        sums.squares_rows[index] += row_of_codes(histogram(code_HW[part.within(window)]))
    for picture in eye.pictures_in(window):
        part = eye.run.pictures[picture].window.intersect(window)
        sums.pictures_rows[picture] += row_of_codes(histogram(code_HW[part.within(window)]))
    rows, cols = (
        eye.on_seam[axis][it] for axis, it in zip(("row", "col"), window.within(eye.cells.extent), strict=True)
    )
    sums.seam_row += row_of_codes(histogram(code_HW[rows]) + histogram(code_HW[~rows][:, cols]))
    _note_worst(code_HW, window, sums)


def _note_worst(code_HW: NDArray[np.uint8], window: Window, sums: _Sums) -> None:
    """Keep the places with the most wrong pixels."""
    for index in window.cells(PLACE_PX):
        place = Window.cell(*index, PLACE_PX).intersect(window)
        counts = row_of_codes(histogram(code_HW[place.within(window)])).tolist()
        wrong = counts[1] + counts[2]
        if wrong:
            heapq.heappush(sums.worst, (wrong, -place.row_off, -place.col_off, Place(place, counts[1], counts[2])))
            if len(sums.worst) > WORST:
                heapq.heappop(sums.worst)


VERDICTS = pa.schema(
    [
        pa.field("verdict", pa.string()),
        pa.field("truth_id", pa.string()),
        pa.field("building_id", pa.string()),
        pa.field("iou", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("area_m2", pa.float64()),
        pa.field("geometry", pa.binary()),
    ]
)


def _tallied(eye: _Eye, found: Iterator[judge.Judged], sums: _Sums) -> Iterator[pa.RecordBatch]:
    """Count buildings by place and class on their way into the layer; a true one that is hit is not told twice."""
    place = eye.mask.transform

    def to_crs(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = place @ (xy[:, 0], xy[:, 1])
        return np.column_stack([x, y])

    for it in found:
        if not len(it.kind):
            continue
        x, y = _middles(it.geometry)
        area_m2 = shapely.area(it.geometry) * ground_pixel_m(eye.wkt, place, y, x) ** 2
        _count_buildings(eye, it, area_m2, sums)
        told = np.flatnonzero(~(it.is_true & it.is_hit))
        for first in range(0, len(told), BATCH_ROWS):
            yield _batch(it, area_m2, told[first : first + BATCH_ROWS], to_crs)


def _batch(
    it: judge.Judged,
    area_m2: NDArray[np.float64],
    told: NDArray[np.int64],
    to_crs: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> pa.RecordBatch:
    """Rows of the layer."""
    geometry = shapely.transform(it.geometry[told], to_crs)
    # What was valid in pixels may be, by rounding, just not so in the CRS.
    wrong = ~shapely.is_valid(geometry)
    geometry[wrong] = shapely.make_valid(geometry[wrong], method="structure", keep_collapsed=False)
    parts, owner = shapely.get_parts(geometry, return_index=True)
    numbers = [_or_none(values[told], digits) for values, digits in ((it.iou, 4), (it.confidence, 4), (area_m2, 2))]
    columns = [it.kind[told], it.truth_id[told], it.building_id[told], *numbers]
    columns.append(shapely.to_wkb(shapely.multipolygons(parts, indices=owner)))
    arrays = [pa.array(column.tolist(), field.type) for column, field in zip(columns, VERDICTS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=VERDICTS)


def _middles(geometry: Geometries) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """X and y of the middles of bounding boxes."""
    xmin, ymin, xmax, ymax = shapely.bounds(geometry).T
    return (xmin + xmax) / 2, (ymin + ymax) / 2


def _or_none(values: NDArray[np.float64], digits: int) -> NDArray[np.object_]:
    """Rounded, and None where there is none (NaN)."""
    rounded = np.round(values, digits).astype(np.object_)
    rounded[np.isnan(values)] = None
    return rounded


def _count_buildings(eye: _Eye, it: judge.Judged, area_m2: NDArray[np.float64], sums: _Sums) -> None:
    """A building counts where the middle of its bounding box lies; a hit, where the one found has it."""
    x, y = _middles(it.geometry)
    height, width = eye.mask.shape
    col = np.clip(np.floor(x), 0, width - 1).astype(np.int64)
    row = np.clip(np.floor(y), 0, height - 1).astype(np.int64)
    picture = eye.picture_at(col + 0.5, row + 0.5)
    on_seam = eye.on_seam["row"][row] | eye.on_seam["col"][col]
    area_class = np.searchsorted(CLASSES_M2, area_m2, "right") - 1
    apart = it.kind == judge.APART
    sums.apart_true += int(np.count_nonzero(apart & it.is_true))
    sums.apart_found += int(np.count_nonzero(apart & ~it.is_true))
    for classes, side in ((sums.true_classes, it.is_true), (sums.found_classes, ~it.is_true)):
        judged = side & ~apart
        np.add.at(classes, (area_class[judged], (~it.is_hit[judged]).astype(np.int64)), 1)
    told = {HIT: it.is_hit & ~it.is_true, FALSE_ALARM: it.kind == judge.FALSE_ALARM, MISS: it.kind == judge.MISS}
    for place, chosen in told.items():
        np.add.at(sums.squares_rows, (row[chosen] // SQUARE_PX, col[chosen] // SQUARE_PX, place), 1)
        in_picture = chosen & (picture >= 0)
        np.add.at(sums.pictures_rows, (picture[in_picture], place), 1)
        sums.seam_row[place] += int(np.count_nonzero(chosen & on_seam))


def _city(run: Run, truth_path: Path, truth: Truth, sums: _Sums, eye: _Eye, notes: tuple[str, ...]) -> City:
    whole = Tally.of_row(sums.squares_rows.sum(axis=(0, 1)))
    told = sums.squares_rows[..., [*range(4), *range(8, 11)]].any(axis=-1)
    row, col = np.nonzero(told)
    height, width = eye.mask.shape
    x, y = (np.minimum(it * SQUARE_PX + SQUARE_PX // 2, size - 1) for it, size in ((col, width), (row, height)))
    picture = eye.picture_at(x + 0.5, y + 0.5)
    groups = np.array([None if one < 0 else run.pictures[one].group for one in picture.tolist()], np.object_)
    sizes = sum(it.window.pixels for it in run.pictures)
    if sizes > eye.cells.extent.pixels:
        notes += ("images overlap: what they share counts in each of them, and once in what is pooled over the run",)
    return City(
        run=run,
        truth=truth_path,
        whole=whole,
        seam=Tally.of_row(sums.seam_row),
        pictures_rows=sums.pictures_rows,
        squares_rows=sums.squares_rows[told],
        square_groups=groups,
        true_classes=sums.true_classes,
        found_classes=sums.found_classes,
        hidden_px=sums.hidden_px,
        untold_px=sums.untold_px,
        apart_true=sums.apart_true,
        apart_found=sums.apart_found,
        outside=truth.outside,
        worst=tuple(place for *_, place in sorted(sums.worst, reverse=True)),
        notes=notes + whole.pixels.notes,
    )


def _to_rasterio(window: Window) -> RasterWindow:
    return RasterWindow(window.col_off, window.row_off, window.width, window.height)
