"""Labelled areas: what becomes of images and labels of every kind, and what is refused."""

from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import yaml
from rasterio.transform import from_origin
from rasterio.warp import Resampling, calculate_default_transform, reproject
from shapely.affinity import affine_transform
from shapely.geometry import LineString, box
from zict import LRU

from segpipe.pipeline import areas
from segpipe.pipeline.areas import (
    MaskValues,
    common_resolution,
    is_read,
    open_area,
    plan_area,
    plan_inria,
    write_area,
)
from segpipe.pipeline.cluster_local import call_each
from segpipe.pipeline.config import load_train
from segpipe.pipeline.split import split_areas
from segpipe.pipeline.store import Store
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.sample import CONTEXT, SCORED, Area, CropSampler, cut

ORIGIN_X, ORIGIN_Y, PX_M = 500_000.1, 4_000_000.2, 0.3


def write_raster(path, array_CHW, off_px=0.0, **profile):
    transform = from_origin(ORIGIN_X + off_px * PX_M, ORIGIN_Y, PX_M, PX_M)
    count, height, width = array_CHW.shape
    options = {"crs": "EPSG:32633", "transform": transform, "dtype": "uint8"} | profile
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, **options) as f:
        f.write(array_CHW)


def draw_area(height, width, seed):
    """Bright houses on dark ground: image_CHW, label_HW (0 or 255), and the houses in pixels."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    houses = []
    for row, col in rng.integers(2, (height - 20, width - 20), (9, 2)).tolist():
        label[row : row + 14, col : col + 11] = 255
        houses.append(box(col, row, col + 11, row + 14))
    image = np.where(label, 190, 70) + rng.integers(-30, 30, (3, height, width))
    return image.astype(np.uint8), label, houses


def on_ground(shapes):
    placed = [affine_transform(shape, (PX_M, 0, 0, -PX_M, ORIGIN_X, ORIGIN_Y)) for shape in shapes]
    return gpd.GeoDataFrame(geometry=placed, crs="EPSG:32633")


@pytest.fixture
def job(tmp_path):
    """A folder with a labelled area of 130 x 150 px, its image, its label, and a function that reads it."""
    image, label, houses = draw_area(130, 150, 1)
    write_raster(tmp_path / "image.tif", image)
    write_raster(tmp_path / "mask.tif", label[None])
    on_ground(houses).to_crs(4326).to_file(tmp_path / "houses.gpkg")

    def read(**changes):
        config = configured(tmp_path, areas=[{"images": "image.tif", "labels": "mask.tif"} | changes])
        plan = plan_area(config, config.areas[0], tmp_path / "area")
        write_area(plan)
        return open_area(plan)

    return tmp_path, image, label, read


def configured(folder, **keys):
    least = {"name": "tiny", "network": {"name": "unet-mobilenetv2"}, "output": "run"}
    (folder / "train.yaml").write_text(yaml.safe_dump(least | keys))
    return load_train(folder / "train.yaml")


def whole(area):
    """Image, label and validity of all that an area covers, without the rest of its chunks."""
    key = area.window.within(Window(0, 0, *area.label.shape))
    return area.image[slice(0, 3), *key], area.label[key], area.valid[key]


@pytest.mark.parametrize("kept_bytes", [0, 300_000, 2**30])
def test_pieces_are_those_of_the_file_however_few_chunks_are_kept(job, monkeypatch, kept_bytes):
    folder, _, _, read = job
    image, label, _ = draw_area(700, 1100, 2)
    write_raster(folder / "image.tif", image)
    write_raster(folder / "mask.tif", label[None])
    area = read()
    kept = LRU(kept_bytes, {}, weight=lambda _, chunk: chunk.nbytes)
    monkeypatch.setattr(areas, "_kept", kept)
    reads = []
    monkeypatch.setattr(Store, "read", lambda *given, read=Store.read: reads.append(given) or read(*given))
    row, col = area.window.row_off, area.window.col_off
    rng = np.random.default_rng(0)
    for _ in range(30):
        (r, s), (c, d) = np.sort(rng.integers(0, 701, 2)), np.sort(rng.integers(0, 1101, 2))
        rows, cols = slice(row + r, row + s), slice(col + c, col + d)
        assert np.array_equal(area.image[:, rows, cols], image[:, r:s, c:d])
        assert np.array_equal(area.label[rows, cols] != 0, label[r:s, c:d] != 0)
        assert kept.total_weight <= kept_bytes
    if kept_bytes == 2**30:
        assert len(reads) <= 2 * 6  # of each array no chunk twice


@pytest.mark.parametrize("labels", ["mask.tif", "houses.gpkg", "houses.geojson", "houses.shp", "houses.gdb"])
def test_crops_from_the_chunks_are_those_of_the_files_for_masks_and_footprints_of_any_format(job, labels):
    folder, image, label, read = job
    if not labels.endswith((".tif", ".gpkg", ".gdb")):
        gpd.read_file(folder / "houses.gpkg").to_file(folder / labels)
    if labels.endswith(".gdb"):
        gpd.read_file(folder / "houses.gpkg").to_file(folder / labels, driver="OpenFileGDB")
    area = read(labels=labels)
    arrays = Area.of_arrays("a", image, label // 255, np.ones_like(label))
    assert (area.window.shape_yx, area.valid_pixels) == (arrays.window.shape_yx, arrays.valid_pixels)
    assert area.positive_pixels == arrays.positive_pixels == np.count_nonzero(label)
    ours, theirs = (CropSampler([one], 64, 40).draw(4, np.random.default_rng(0)) for one in (area, arrays))
    assert np.array_equal(ours.image_BCHW, theirs.image_BCHW)
    assert np.array_equal(ours.label_BHW, theirs.label_BHW)
    assert np.array_equal(ours.valid_BHW, theirs.valid_BHW)


def test_a_pixel_is_a_building_if_its_centre_is_in_a_footprint(job):
    folder, _, _, read = job
    # From 0.4 to 0.6 of a pixel at one end, so that the first is in and the last is not.
    on_ground([box(20.4, 30.4, 40.4, 50.4), LineString([(0, 0), (100, 100)])]).to_file(folder / "one.gpkg")
    _, label, _ = whole(read(labels="one.gpkg"))
    rows, cols = np.nonzero(label)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (30, 49, 20, 39)


def test_nodata_is_no_imagery_and_imagery_without_a_label_is_only_looked_at(job):
    folder, image, label, read = job
    image[:, :, 110:] = 0
    write_raster(folder / "image.tif", image)
    write_raster(folder / "mask.tif", label[None, 20:].copy(), nodata=0)
    with rasterio.open(folder / "mask.tif", "r+") as file:
        file.transform = from_origin(ORIGIN_X, ORIGIN_Y - 20 * PX_M, PX_M, PX_M)
    area = read(nodata=0)
    assert area.window.shape_yx == (110, 110)
    assert area.valid_pixels == 110 * 110
    rows, cols = area.window.within(Window(0, 0, *area.label.shape))
    valid = area.valid[slice(rows.start - 20, rows.stop), slice(cols.start, cols.start + 150)]
    assert (valid[:20, :110] == CONTEXT).all() and (valid[20:, :110] == SCORED).all() and not valid[:, 110:].any()


def test_labels_count_only_where_they_are_said_to_be_complete(job):
    folder, _, label, read = job
    on_ground([box(10, 20, 110, 100)]).to_crs(4326).to_file(folder / "mapped.geojson")
    area = read(area="mapped.geojson")
    assert area.window.shape_yx == (80, 100) and area.valid_pixels == 8000
    assert np.array_equal(whole(area)[1] != 0, label[20:100, 10:110] != 0)


def test_a_mask_of_another_crs_is_warped_by_its_nearest_pixels(job):
    folder, _, label, read = job
    with rasterio.open(folder / "mask.tif") as source:
        place, width, height = calculate_default_transform(source.crs, "EPSG:4326", 150, 130, *source.bounds)
        warped = np.zeros((1, height, width), np.uint8)
        reproject(
            label, warped[0], source.transform, src_crs=source.crs, dst_transform=place, dst_crs="EPSG:4326",
            resampling=Resampling.nearest,
        )  # fmt: skip
    write_raster(folder / "lonlat.tif", warped, crs="EPSG:4326", transform=place)
    _, found, valid = whole(read(labels="lonlat.tif"))
    assert found.shape[0] > 120 and (valid == SCORED).mean() > 0.95
    (rows, cols), (theirs_rows, theirs_cols) = np.nonzero(found), np.nonzero(label)
    assert abs(rows.mean() - theirs_rows.mean()) < 1.5 and abs(cols.mean() - theirs_cols.mean()) < 1.5
    assert found.sum() == pytest.approx(np.count_nonzero(label), rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, label: write_raster(folder / "mask.tif", label[None], off_px=0.5), "0.500 px off the lattice"),
        (
            lambda folder, label: write_raster(
                folder / "mask.tif", label[None, ::2, ::2], transform=from_origin(ORIGIN_X, ORIGIN_Y, 0.6, 0.6)
            ),
            "0.6 per pixel, not 0.3",
        ),
        (lambda folder, label: write_raster(folder / "mask.tif", label[None], crs=None), "no CRS"),
        (lambda folder, label: write_raster(folder / "image.tif", label[None]), "1 bands of uint8"),
        (lambda folder, label: write_raster(folder / "mask.tif", label[None].astype("f4"), dtype="float32"), "float32"),
        (lambda folder, label: (folder / "mask.tif").unlink(), "matches no file"),
        (lambda folder, label: write_raster(folder / "mask.tif", (label[None] // 255) * 128), "holds the values 128"),
        (lambda folder, label: write_raster(folder / "image.tif", np.zeros((3, 60, 150), "u1") + 9), "at least 64"),
    ],
)
def test_labels_and_images_that_do_not_fit_are_refused(job, change, message):
    folder, _, label, read = job
    change(folder, label)
    with pytest.raises(UserError, match=message) as caught:
        read(foreground=255)
    assert "\n" not in str(caught.value)


def test_footprints_without_a_crs_and_files_without_footprints_are_refused(job):
    folder, _, _, read = job
    on_ground([box(0, 0, 9, 9)]).set_crs(None, allow_override=True).to_file(folder / "nowhere.gpkg")
    with pytest.raises(UserError, match=r"nowhere\.gpkg: no CRS"):
        read(labels="nowhere.gpkg")
    (folder / "notes.txt").write_text("no footprints")
    with pytest.raises(UserError, match=r"notes\.txt: .*expected footprints"):
        read(labels="notes.txt")


def test_values_of_a_mask_mean_what_the_yaml_says():
    mask = np.array([[0, 1, 2, 3, 255]], np.uint8)
    for values, label, labelled in (
        (MaskValues(), [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        (MaskValues(ignore=(255,)), [0, 1, 1, 1, 0], [1, 1, 1, 1, 0]),
        (MaskValues((1,)), [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]),
        (MaskValues((255, 3), (0, 1, 2)), [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]),
    ):
        found = values.read(mask, "m.png")
        assert [plane.tolist() for plane in found] == [[label], [[bool(it) for it in labelled]]]
    for values in (MaskValues((255,)), MaskValues((1,), (0, 2))):
        with pytest.raises(UserError, match=r"m\.png: holds the values"):
            values.read(mask, "m.png")


def test_workers_write_the_chunks_that_this_process_writes(job):
    folder, _, _, read = job
    here = whole(read())
    config = configured(
        folder, areas=[{"images": "image.tif", "labels": label} for label in ("mask.tif", "houses.gpkg")]
    )
    plans = [plan_area(config, area, folder / f"there{n}") for n, area in enumerate(config.areas)]
    assert list(call_each(write_area, [(plan,) for plan in plans], workers=2)) == [1, 2]
    for plan in plans:
        assert is_read(plan)
        assert all(np.array_equal(*planes) for planes in zip(whole(open_area(plan)), here, strict=True))
    (folder / "image.tif").touch()
    assert not is_read(plans[0])


def test_an_area_that_once_had_more_tiles_is_read_where_its_own_lie(job):
    folder, image, label, read = job
    for kind, array in (("image", image), ("mask", label[None])):
        write_raster(folder / f"west_{kind}.tif", array, off_px=-1600.0)
    every = {"images": "*image.tif", "labels": "*mask.tif"}
    assert read(**every).valid_pixels == 2 * image[0].size
    for kind in ("image", "mask"):
        (folder / f"west_{kind}.tif").unlink()
    area = read(**every)
    found, buildings, valid = cut(area, area.window.pad(1600))
    core = area.window.within(area.window.pad(1600))
    assert np.array_equal(found[:, *core], image) and np.array_equal(buildings[core], label // 255)
    assert (valid[core] == SCORED).all() and np.count_nonzero(valid) == image[0].size, "nothing of what is gone"


def test_inria_validates_tiles_1_to_5_of_each_city(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "gt"):
        (tmp_path / "aerial" / "train" / kind).mkdir(parents=True)
    for name in ("austin1", "austin5", "austin6", "vienna2", "vienna10"):
        for kind, bands in (("images", 3), ("gt", 1)):
            array = rng.integers(0, 2, (bands, 70, 80)).astype(np.uint8) * 255
            write_raster(tmp_path / "aerial" / "train" / kind / f"{name}.tif", array, crs=None, transform=None)
    trained, validating = plan_inria(configured(tmp_path, inria="aerial"), tmp_path / "areas")
    assert [plan.name for plan in trained] == ["austin6", "vienna10"]
    assert [plan.name for plan in validating] == ["austin1", "austin5", "vienna2"]
    write_area(trained[0])
    area = open_area(trained[0])
    with rasterio.open(trained[0].tiles[0].path) as file, rasterio.open(trained[0].label_tiles[0].path) as labels:
        image, label, _ = whole(area)
        assert np.array_equal(image, file.read()) and np.array_equal(label * 255, labels.read(1))
    (tmp_path / "aerial" / "train" / "gt" / "vienna2.tif").unlink()
    with pytest.raises(UserError, match=r"vienna2\.tif has no mask"):
        plan_inria(configured(tmp_path, inria="aerial"), tmp_path / "areas")


def test_areas_of_another_resolution_are_refused(job):
    folder, _, _, _ = job
    config = configured(folder, areas=[{"images": "image.tif", "labels": "mask.tif"}])
    plan = plan_area(config, config.areas[0], folder / "area")
    coarse = replace(plan, resolution_m=0.6)
    assert common_resolution([plan, plan]) == pytest.approx(0.3, abs=0.001)
    with pytest.raises(UserError, match="one resolution"):
        common_resolution([plan, plan, coarse])


# Splits


def areas_in_memory(count, side=100):
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 255, (3, side, side), np.uint8) for _ in range(count)]
    ones = np.ones((side, side), np.uint8)
    return [Area.of_arrays(f"a{n}", image, image[0] % 2, ones) for n, image in enumerate(images)]


def test_a_share_a_number_and_a_list_split_areas_whatever_their_order(tmp_path):
    areas = areas_in_memory(20)
    config = configured(tmp_path, split={"validate": 0.25, "test": 3, "seed": 5})
    split, again = split_areas(config, areas, 0), split_areas(config, areas[::-1], 0)
    assert [len(part) for part in (split.train, split.validate, split.test)] == [12, 5, 3]
    assert {part: set(names) for part, names in split.names.items()} == {
        part: set(names) for part, names in again.names.items()
    }
    assert sorted(name for names in split.names.values() for name in names) == sorted(area.name for area in areas)
    other = split_areas(configured(tmp_path, split={"validate": 0.25, "seed": 6}), areas, 0)
    assert set(other.names["validate"]) != set(split.names["validate"])
    (tmp_path / "val.txt").write_text("# names\na3 1 1 1\na7.jpg 2 1 1\n")
    listed = split_areas(configured(tmp_path, split={"validate": "val.txt", "test": ["a1"]}), areas, 0)
    assert listed.names["validate"] == ["a3", "a7"] and listed.names["test"] == ["a1"] and len(listed.train) == 17
    with pytest.raises(UserError, match="b9 is not known"):
        split_areas(configured(tmp_path, split={"validate": ["b9"]}), areas, 0)
    with pytest.raises(UserError, match="some to train on"):
        split_areas(configured(tmp_path, split={"validate": 20}), areas, 0)


def test_blocks_of_one_scene_share_no_pixel_and_keep_a_gap_to_what_is_trained_on(tmp_path):
    (area,) = areas_in_memory(1, 300)
    config = configured(tmp_path, split={"by": "block", "validate": 2, "test": 1, "block_px": 100, "gap_px": 20})
    split = split_areas(config, [area], 999)
    masks = {}
    for part, (found,) in (("train", split.train), ("validate", split.validate), ("test", split.test)):
        masks[part] = found.valid[slice(0, 300), slice(0, 300)] == SCORED
        assert found.valid_pixels == masks[part].sum() > 0
        assert found.valid[slice(0, 300), slice(0, 300)].all(), "what is left out can still be looked at"
    assert [len(split.names[part]) for part in ("train", "validate", "test")] == [6, 2, 1]
    assert masks["test"].sum() == 100 * 100
    held = np.argwhere(masks["validate"] | masks["test"])
    for row, col in np.argwhere(masks["train"])[::97]:
        assert np.abs(held - (row, col)).max(axis=1).min() > 20
    crops = CropSampler(split.train, 64).draw(20, np.random.default_rng(0))
    assert crops.valid_BHW.any(axis=(1, 2)).all()
    seen = {tuple(pixel) for pixel in area.image[:, masks["validate"]].T.tolist()}
    scored = crops.image_BCHW.transpose(0, 2, 3, 1)[crops.valid_BHW == 1]
    fresh = {tuple(pixel) for pixel in area.image[:, masks["train"]].T.tolist()}
    assert {tuple(pixel) for pixel in scored.tolist()} <= fresh and not seen <= fresh


def test_tiles_of_an_area_are_split_and_none_is_in_two_parts(tmp_path):
    image, label, _ = draw_area(130, 300, 3)
    for n, cols in enumerate((slice(0, 100), slice(100, 200), slice(200, 300)), start=1):
        write_raster(tmp_path / f"t{n}_image.tif", image[..., cols], off_px=cols.start)
        write_raster(tmp_path / f"t{n}_mask.tif", label[None, :, cols], off_px=cols.start)
    config = configured(
        tmp_path,
        areas=[{"images": "t*_image.tif", "labels": "t*_mask.tif"}],
        split={"by": "tile", "validate": ["t1_image/tile2"]},
    )
    plan = plan_area(config, config.areas[0], tmp_path / "area")
    write_area(plan)
    split = split_areas(config, [open_area(plan)], 64)
    assert split.names == {"train": ["t1_image/tile1", "t1_image/tile3"], "validate": ["t1_image/tile2"], "test": []}
    assert split.train[0].valid_pixels == 2 * split.validate[0].valid_pixels == 130 * 200
    assert np.array_equal(whole(split.validate[0])[0], image[..., 100:200])
