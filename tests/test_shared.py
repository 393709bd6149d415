"""Real towns, the real network, all stages: what the shipped bundle is worth, and that its footprints are exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.features
import shapely
import yaml
from conftest import map_it, raster

from segpipe.models.weights import packaged_bundles, read_card
from segpipe.pipeline import run
from segpipe.pipeline.cluster import InProcess
from segpipe.pipeline.evaluate import evaluate_runs
from segpipe.pipeline.plan import Plan

BUNDLE = "buildings-mobilenetv2"
RAW = {"min_area_m2": 0, "fill_holes_m2": 0, "simplify_m": 0}


@pytest.fixture(autouse=True)
def without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is enough for what is asked here."""

    @contextmanager
    def open_pool(plan: Plan, scheduler: str | None) -> Iterator[InProcess]:
        yield InProcess(plan)

    monkeypatch.setattr(run, "open_pool", open_pool)


def map_images(folder: Path, *images: Path, **settings: object) -> Path:
    """Map images with the shipped bundle in small blocks, outlines as the mask has them; returns the run folder."""
    config = folder / "city.yaml"
    job = {
        "name": "real",
        "images": [str(image.resolve()) for image in images],
        "model": BUNDLE,
        "output": "run",
        "nodata": [0, 255],
        "grid": {"chunk_px": 256, "block_px": 1024},
        "vectorize": RAW,
    }
    config.write_text(yaml.safe_dump(job | settings))
    map_it(config)
    return folder / "run"


def in_pixels(footprints: np.ndarray, transform: rasterio.Affine) -> set[bytes]:
    """Footprints as normalised WKB in whole pixels, from the raster's upper left corner."""

    def back(xy: np.ndarray) -> np.ndarray:
        pixels = (xy - [transform.c, transform.f]) / [transform.a, transform.e]
        assert np.abs(pixels - np.round(pixels)).max() < 1e-3
        return np.round(pixels)

    return set(shapely.to_wkb(shapely.normalize(shapely.transform(footprints, back))))


def one_polygonize(mask: np.ndarray) -> set[bytes]:
    """The polygons of the whole mask by rasterio, without the corners on straight sides that it leaves."""
    found = rasterio.features.shapes(mask, mask == 1, connectivity=4)
    polygons = shapely.simplify([shapely.geometry.shape(shape) for shape, _ in found], 0)
    return set(shapely.to_wkb(shapely.normalize(polygons)))


@pytest.mark.parametrize("area", ["zanzibar", "catanduanes"])
def test_shipped_bundle_is_as_good_as_its_card_says(area: str, shared: Path, tmp_path: Path) -> None:
    folder = map_images(tmp_path, shared / "data" / "val" / f"{area}_image.tif")

    truth = shared / "data" / "val" / f"{area}_mask.tif"
    found = evaluate_runs([folder], [truth], tmp_path / "evaluation").cities[0].whole.pixels.iou

    (bundle,) = (path for path in packaged_bundles() if path.stem == BUNDLE)
    promised = read_card(bundle).metrics["iou"]
    assert isinstance(promised, dict)
    assert abs(found - promised[area]) < 0.01


def test_polygons_of_a_town_are_those_of_one_polygonize_and_hold_no_invalid_pixel(shared: Path, tmp_path: Path) -> None:
    folder = map_images(tmp_path, shared / "data" / "banepa" / "tiles" / "banepa5.tif")

    footprints = pyogrio.read_dataframe(folder / "buildings.gpkg", layer="buildings").geometry
    mask = raster(folder / "mask.tif")
    with rasterio.open(folder / "mask.tif") as dataset:
        burned = rasterio.features.rasterize(footprints, mask.shape, transform=dataset.transform, dtype="uint8")
        assert in_pixels(footprints.to_numpy(), dataset.transform) == one_polygonize(mask)
    assert len(footprints) > 30
    assert (mask == 255).sum() > 180_000, "the white hole and the black wedge are invalid"
    assert not burned[mask == 255].any()
    assert np.array_equal(burned == 1, mask == 1)
    assert shapely.is_valid(footprints.to_numpy()).all()


def test_white_roofs_are_no_nodata(shared: Path, tmp_path: Path) -> None:
    from segpipe.pipeline.config import load_city
    from segpipe.pipeline.plan import make_plan
    from segpipe.tasks.validity import scan_tile

    config = tmp_path / "city.yaml"
    image = (shared / "data" / "train" / "zanzibar_image.tif").resolve()
    job = {"name": "roofs", "images": str(image), "model": BUNDLE, "output": "run", "nodata": [0, 255]}
    config.write_text(yaml.safe_dump(job | {"nodata_tolerance": 12}))
    plan = make_plan(load_city(config))

    assert scan_tile(plan.tiles[0], plan.min_nodata_pixels(0), lambda window, mask: None).invalid_px == 0
