"""Right angles against truth: IoU, F1 and PoLiS of raw, simplified and regularized outlines, seconds, and memory.

    python bench/regularize.py truth FOLDER        # NAME_image.tif with NAME_buildings.gpkg
    python bench/regularize.py seconds FOLDER 100000
    python bench/regularize.py memory 1000000      # of publishing so many made-up buildings

The library buildingregulariser is measured beside where it is installed; the package does not need it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyogrio
import rasterio
import shapely
from city import SEGPIPE, peak_mib
from numpy.typing import NDArray
from PIL import Image

from segpipe.pipeline.formats import write_formats
from segpipe.pipeline.geopackage import write_geopackage
from segpipe.pipeline.rows import BATCH_ROWS
from segpipe.tasks.attributes import Imagery, publishable
from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.neighbours import keep_apart
from segpipe.tasks.vectorize import Buildings, VectorSettings, finish, mask_of, polygonize

Geometries = NDArray[Any]
THRESHOLD_U8 = 100
MODEL = "buildings-mobilenetv2"
LIBRARY = importlib.util.find_spec("buildingregulariser") is not None


def settings(simplify_m: float, regularize: Any) -> VectorSettings:
    return VectorSettings(THRESHOLD_U8, 10, 2, simplify_m, regularize)


def predicted(image: Path, folder: Path) -> tuple[NDArray[np.uint8], Lattice, Window]:
    """Probabilities of one image, by `segpipe predict`, and its place on a lattice."""
    arguments = ["predict", str(image), "--model", MODEL, "--output", str(folder)]
    subprocess.run([*SEGPIPE, *arguments], check=True, stdout=subprocess.DEVNULL)
    prob_HW = np.array(Image.open(folder / f"{image.stem}_probability.png"))
    with rasterio.open(image) as raster:
        to, size = raster.transform, raster.transform.a
        col, row = round(to.c / size), round(-to.f / size)
        lattice = Lattice(raster.crs.to_wkt(), size, to.c - col * size, to.f + row * size)
    return prob_HW, lattice, Window(row, col, *prob_HW.shape)


def buildings_of(prob_HW: NDArray[np.uint8], lattice: Lattice, window: Window, how: VectorSettings) -> Buildings:
    def read(part: Window) -> NDArray[np.uint8]:
        values, here = np.full(part.shape_yx, 255, np.uint8), part.intersect(window)
        values[here.within(part)] = prob_HW[here.within(window)]
        return values

    whole = polygonize(mask_of(prob_HW, THRESHOLD_U8), prob_HW, window.row_off, window.col_off)[1]
    return finish(whole, how, lattice, read)


def polis_px(one: shapely.Polygon, other: shapely.Polygon) -> float:
    """Mean distance of corners to the other outline, both ways (Avbelj et al. 2015, equation 1)."""

    def half(a: shapely.Polygon, b: shapely.Polygon) -> float:
        corners = shapely.points(shapely.get_coordinates(a.exterior)[:-1])
        return float(shapely.distance(corners, b.exterior).mean())

    return (half(one, other) + half(other, one)) / 2


def score(found: Geometries, truth: Geometries) -> tuple[float, float, float]:
    """Pixel-free IoU of all, F1 of buildings at IoU 0.5 (best pairs first), mean PoLiS of the pairs in pixels."""
    all_found, all_truth = shapely.union_all(found), shapely.union_all(truth)
    iou = all_found.intersection(all_truth).area / all_found.union(all_truth).area
    t, f = shapely.STRtree(found).query(truth, predicate="intersects")
    common = shapely.area(shapely.intersection(truth[t], found[f]))
    ratio = common / (shapely.area(truth[t]) + shapely.area(found[f]) - common)
    taken_t: set[int] = set()
    taken_f: set[int] = set()
    distances = []
    for index in np.argsort(-ratio, kind="stable").tolist():
        if ratio[index] >= 0.5 and t[index] not in taken_t and f[index] not in taken_f:
            taken_t.add(t[index])
            taken_f.add(f[index])
            distances.append(polis_px(truth[t[index]], found[f[index]]))
    return iou, 2 * len(distances) / (len(truth) + len(found)), float(np.mean(distances))


def overlapping(found: Geometries) -> float:
    """Share of outlines that overlap another one."""
    one, other = shapely.STRtree(found).query(found, predicate="intersects")
    pairs = one < other
    one, other = one[pairs], other[pairs]
    overlap = shapely.relate_pattern(found[one], found[other], "T********")
    return len({*one[overlap], *other[overlap]}) / len(found)


def by_library(raw: Geometries, pixel_m: float, cores: int) -> tuple[Geometries, float]:
    """Outlines by buildingregulariser with its defaults, in metres as it wants them, and the seconds that it took."""
    import buildingregulariser
    import geopandas

    metres = geopandas.GeoDataFrame(geometry=shapely.transform(raw, lambda xy: xy * [pixel_m, -pixel_m]))
    start = time.perf_counter()
    found = buildingregulariser.regularize_geodataframe(metres, num_cores=cores)
    seconds = time.perf_counter() - start
    return shapely.transform(found.geometry.to_numpy(), lambda xy: xy / [pixel_m, -pixel_m]), seconds


def truth_table(folder: Path) -> None:
    print("| area | outlines | IoU | F1 | PoLiS, m | overlapping | corners |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for image in sorted(folder.glob("*_image.tif")):
            name = image.stem.removesuffix("_image")
            prob_HW, lattice, window = predicted(image, Path(temporary))
            back = ~lattice.transform()
            truth = shapely.transform(
                pyogrio.read_dataframe(folder / f"{name}_buildings.gpkg").geometry.to_numpy(),
                lambda xy, back=back: np.stack([back.a * xy[:, 0] + back.c, back.e * xy[:, 1] + back.f], axis=1),
            )
            simple = buildings_of(prob_HW, lattice, window, settings(0.3, "none"))
            regular = buildings_of(prob_HW, lattice, window, settings(0.3, "orthogonal"))
            rows = {
                "raw": simple.raw,
                "simplified by 0.3 m": simple.geometry,
                f"orthogonal ({(regular.form == 2).mean():.0%} of them)": regular.geometry,
                "orthogonal, kept apart": keep_apart(regular, Buildings.empty(), lattice).geometry,
            }
            if LIBRARY:
                rows["buildingregulariser"] = by_library(simple.raw, lattice.pixel_size, 1)[0]
            for label, found in rows.items():
                iou, f1, polis = score(found, shapely.make_valid(truth))
                corners = shapely.get_num_coordinates(found).mean() - 1
                print(
                    f"| {name} | {label} | {iou:.3f} | {f1:.3f} | {polis * lattice.pixel_size:.2f} |"
                    f" {overlapping(found):.1%} | {corners:.0f} |"
                )


def many(buildings: Buildings, count: int, window: Window) -> Buildings:
    """Copies of buildings side by side until there are so many."""
    parts = []
    for number in range(-(-count // len(buildings))):
        shift = number * (window.width + 8)
        moved = {name: shapely.transform(getattr(buildings, name), lambda xy, by=shift: xy + np.array([by, 0]))
                 for name in ("geometry", "raw")}  # fmt: skip
        values = {name: getattr(buildings, name) for name in buildings.__dataclass_fields__} | moved
        parts.append(Buildings(**values | {"key_col": buildings.key_col + shift}))
    whole = Buildings.concatenate(parts)
    return whole.take(np.arange(count))


def seconds_table(folder: Path, count: int) -> None:
    from segpipe.tasks.regularize import orthogonal

    image = sorted(folder.glob("zanzibar_image.tif"))[0]
    with tempfile.TemporaryDirectory() as temporary:
        prob_HW, lattice, window = predicted(image, Path(temporary))
    some = many(buildings_of(prob_HW, lattice, window, settings(0.3, "orthogonal")), count, window)
    start = time.perf_counter()
    for first in range(0, count, 5000):  # as many as a block holds
        orthogonal(some.raw[first : first + 5000], some.pixel_m[first : first + 5000], 0.8)
    print(f"orthogonal, {count:,} buildings, one process: {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    for first in range(0, count, 5000):
        keep_apart(some.take(np.arange(first, min(count, first + 5000))), Buildings.empty(), lattice)
    print(f"kept apart: {time.perf_counter() - start:.1f} s")
    few = some.raw[: min(count, 5000)]
    for cores in (1, 0) if LIBRARY else ():
        seconds = by_library(few, lattice.pixel_size, cores)[1]
        print(f"buildingregulariser, {len(few):,} buildings, num_cores={cores}: {seconds:.1f} s")


def made_up(count: int, lattice: Lattice) -> Iterator[pa.RecordBatch]:
    """Batches as publishing makes them: cell by cell of 4096 px, outlines kept apart, attributes added."""
    rng = np.random.default_rng(0)
    prob_HW = rng.integers(0, 60, (1600, 1600)).astype(np.uint8)
    for row in range(4, 1570, 31):
        for col in range(4, 1570, 31):
            prob_HW[row : row + int(rng.integers(14, 26)), col : col + int(rng.integers(14, 26))] = 220
    first = buildings_of(prob_HW, lattice, Window(0, 0, 1600, 1600), settings(0.3, "orthogonal"))
    done = 0
    while done < count:
        shift = done // len(first) * 1700
        moved = {name: shapely.transform(getattr(first, name), lambda xy, by=shift: xy + np.array([by, 0]))
                 for name in ("geometry", "raw")}  # fmt: skip
        values = {name: getattr(first, name) for name in first.__dataclass_fields__} | moved
        cell = Buildings(**values | {"key_col": first.key_col + shift}).take(np.arange(min(len(first), count - done)))
        apart = keep_apart(cell, Buildings.empty(), lattice)
        batch = publishable(apart, lattice, Imagery(["a"], [Window(0, 0, 1600, 10**9)]))
        done += len(cell)
        for start in range(0, len(batch), BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def memory_table(count: int) -> None:
    wkt = rasterio.crs.CRS.from_epsg(32645).to_wkt()
    lattice = Lattice(wkt, 0.3, 0.0, 0.0)

    def peak_mb() -> float:
        return peak_mib(os.getpid())

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "buildings.gpkg"
        start = time.perf_counter()
        write_geopackage(path, made_up(count, lattice), wkt)
        print(f"{count:,} buildings, GeoPackage: peak {peak_mb():.0f} MB, {time.perf_counter() - start:.1f} s")
        for each in ("geoparquet", "geojson", "filegdb", "flatgeobuf"):
            start = time.perf_counter()
            write_formats(Path(temporary), path, [each], wkt, None)
            print(f"  then {each}: peak {peak_mb():.0f} MB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["truth", folder]:
            truth_table(Path(folder))
        case ["seconds", folder, count]:
            seconds_table(Path(folder), int(count))
        case ["memory", count]:
            memory_table(int(count))
        case _:
            sys.exit(__doc__)
