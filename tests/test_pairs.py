"""Images without georeference and their masks: matched by name, read in all their kinds, cached, dealt out."""

import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from segpipe.pipeline.config import load_train
from segpipe.pipeline.pairs import (
    open_pairs,
    parts_to_read,
    plan_pairs,
    prepare_pairs,
    read_mask,
    read_picture,
    resize_image,
    resize_mask,
    write_part,
)
from segpipe.pipeline.sources import Sources, read_sources
from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.sample import SCORED, CropSampler, cut, permutation

SHAPES = {"cat_1": (90, 120), "cat_2": (70, 66), "dog_10": (100, 80)}


@pytest.fixture
def job(tmp_path):
    """Three images of different sizes with trimaps (1 pet, 2 ground, 3 rim), and a function that reads them."""
    rng = np.random.default_rng(0)
    pictures = {}
    for folder in ("images", "trimaps"):
        (tmp_path / folder).mkdir()
    for name, shape in SHAPES.items():
        image = rng.integers(1, 256, (*shape, 3), np.uint8)
        trimap = rng.integers(1, 4, shape, np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(trimap).save(tmp_path / "trimaps" / f"{name}.png")
        pictures[name] = image.transpose(2, 0, 1), trimap

    def read(**changes):
        plan = plan_pairs(configured(tmp_path, **changes), tmp_path / "areas")
        prepare_pairs(plan)
        for part in parts_to_read(plan):
            write_part(plan, part)
        assert not parts_to_read(plan)
        return open_pairs(plan)

    return tmp_path, pictures, read


def configured(folder, **changes):
    pairs = {"images": "images/*.png", "masks": "trimaps/{stem}.png", "foreground": 1} | changes
    data = {"name": "pets", "network": {"name": "unet"}, "output": "run", "pairs": pairs}
    (folder / "train.yaml").write_text(yaml.safe_dump(data))
    return load_train(folder / "train.yaml")


def test_every_pair_is_cached_as_it_is_on_disk(job):
    _, pictures, read = job
    areas = read()
    assert [area.name for area in areas] == list(SHAPES)
    for area in areas:
        image, trimap = pictures[area.name]
        found, label, valid = cut(area, area.window)
        assert np.array_equal(found, image) and np.array_equal(label, trimap == 1) and (valid == SCORED).all()
        assert area.positive_pixels == np.count_nonzero(trimap == 1)
        assert not cut(area, area.window.pad(9))[2][:9].any(), "its neighbours in the store are not seen"


def test_ignored_values_of_a_trimap_have_no_label(job):
    _, pictures, read = job
    for area in read(ignore=3):
        _, label, valid = cut(area, area.whole)
        trimap = pictures[area.name][1]
        assert np.array_equal(valid == SCORED, trimap != 3) and np.array_equal(label, trimap == 1)


def test_resizing_takes_the_place_of_cropping_and_masks_stay_as_they_are_named(job):
    _, pictures, read = job
    areas = read(resize_px=[64, 96])
    for area in areas:
        image, trimap = pictures[area.name]
        found, label, _ = cut(area, area.window)
        assert np.array_equal(found, resize_image(image, (64, 96)))
        # The oracle for nearest: the pixel under the centre of each new one.
        rows = ((np.arange(64) + 0.5) * trimap.shape[0] / 64).astype(int)
        cols = ((np.arange(96) + 0.5) * trimap.shape[1] / 96).astype(int)
        assert np.array_equal(label, trimap[np.ix_(rows, cols)] == 1)
    assert np.abs(resize_image(np.full((1, 50, 50), 77, np.uint8), (64, 96)) - 77).max() == 0
    assert set(np.unique(resize_mask(np.eye(50, dtype=np.uint8) * 9, (33, 40)))) == {0, 9}
    crops = CropSampler(areas, (64, 96)).cut([2, 0], np.random.default_rng(0))
    assert np.array_equal(crops.image_BCHW[0], resize_image(pictures["dog_10"][0], (64, 96)))


def test_grey_is_repeated_palettes_are_expanded_and_alpha_is_validity(tmp_path):
    rng = np.random.default_rng(1)
    rgba = rng.integers(1, 256, (8, 9, 4), np.uint8)
    rgba[2:4, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    image, valid = read_picture(tmp_path / "rgba.png")
    assert np.array_equal(valid, rgba[..., 3] != 0) and np.array_equal(image, rgba[..., :3].transpose(2, 0, 1) * valid)
    Image.fromarray(rgba[..., 0]).save(tmp_path / "grey.png")
    assert (read_picture(tmp_path / "grey.png")[0] == rgba[..., 0]).all()
    palette = Image.fromarray(rgba[..., 0] % 3, mode="P")
    palette.putpalette([9, 8, 7, 60, 50, 40, 200, 100, 0])
    palette.save(tmp_path / "palette.png")
    colours = np.array([[9, 8, 7], [60, 50, 40], [200, 100, 0]], np.uint8)
    assert np.array_equal(read_picture(tmp_path / "palette.png")[0], colours[rgba[..., 0] % 3].transpose(2, 0, 1))
    assert np.array_equal(read_mask(tmp_path / "palette.png")[0], rgba[..., 0] % 3), "classes, not colours"
    palette.save(tmp_path / "first.gif")
    assert np.array_equal(read_mask(tmp_path / "first.gif")[0] != 0, rgba[..., 0] % 3 != 0)
    Image.fromarray(rgba[..., 0] > 128).save(tmp_path / "bits.png")
    assert np.array_equal(read_mask(tmp_path / "bits.png")[0], (rgba[..., 0] > 128) * 255)
    assert np.array_equal(read_picture(tmp_path / "rgba.png", (3, 1))[0], image[[2, 0]])
    with pytest.raises(UserError, match="a mask in colours"):
        read_mask(tmp_path / "rgba.png")
    Image.fromarray(rgba[..., 0].astype(np.uint16) * 9).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="expected 8 bits"):
        read_picture(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgba.png").read_bytes()[:200])
    with pytest.raises(TileError, match=r"cut\.png: cannot be decoded"):
        read_picture(tmp_path / "cut.png")


def test_images_without_a_mask_with_two_or_with_one_of_another_size_are_named(job):
    folder, _, read = job
    with pytest.raises(UserError, match=r"cat_1\.png has 2 masks \(cat_1\.png, cat_1_old\.png\)"):
        Image.new("L", (120, 90)).save(folder / "trimaps" / "cat_1_old.png")
        read(masks="trimaps/{stem}*.png")
    Image.new("L", (66, 71)).save(folder / "trimaps" / "cat_2.png")
    with pytest.raises(UserError, match=r"cat_2\.png: 71 x 66 px; expected 70 x 66, as .*cat_2\.png has"):
        read()
    (folder / "trimaps" / "cat_2.png").unlink()
    with pytest.raises(UserError, match=r"cat_2\.png has no mask; expected one"):
        read()
    with pytest.raises(UserError, match=r"expected \{stem\} in it"):
        read(masks="trimaps/mask.png")
    with pytest.raises(UserError, match="matches no file"):
        read(images="pictures/*.png")


def test_values_that_are_not_declared_and_pictures_that_are_too_small_are_refused(job):
    folder, _, read = job
    with pytest.raises(UserError, match=r"cat_1\.png: holds the values 3; expected 1, 2"):
        read(background=2)
    Image.new("RGB", (63, 80)).save(folder / "images" / "dog_10.png")
    Image.new("L", (63, 80)).save(folder / "trimaps" / "dog_10.png")
    with pytest.raises(UserError, match=r"dog_10\.png: 80 x 63 px; expected at least 64"):
        read()


def test_only_pairs_whose_files_have_changed_are_read_again(job):
    folder, pictures, read = job
    read()
    plan = plan_pairs(configured(folder), folder / "areas")
    Image.fromarray(np.full_like(pictures["cat_2"][1], 2)).save(folder / "trimaps" / "cat_2.png")
    assert parts_to_read(plan) == plan.parts
    assert [area.positive_pixels for area in read()][1] == 0


def test_looking_for_what_is_to_be_read_writes_nothing(job):
    folder, _, read = job
    plan = plan_pairs(configured(folder), folder / "areas")
    assert parts_to_read(plan) == plan.parts and not (folder / "areas").exists()
    read()
    before = {path: path.read_bytes() for path in (folder / "areas").rglob("*") if path.is_file()}
    for ending in ("images", "trimaps"):
        Image.new("L", (300, 200), 1).save(folder / ending / "dog_10.png")
    larger = plan_pairs(configured(folder), folder / "areas")
    assert larger.chunk_px != plan.chunk_px and parts_to_read(larger) == larger.parts
    assert {path: path.read_bytes() for path in (folder / "areas").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("gone", ["areas/store.zarr", "areas/labels/store.zarr"])
def test_a_store_that_is_gone_is_read_again_whole_whatever_the_ledger_says(job, gone):
    folder, pictures, read = job
    read()
    shutil.rmtree(folder / gone)
    plan = plan_pairs(configured(folder), folder / "areas")
    assert parts_to_read(plan) == plan.parts
    read_sources(Sources((), (), (), plan), 1, Console(quiet=True))
    for area in open_pairs(plan):
        image, trimap = pictures[area.name]
        found, label, _ = cut(area, area.window)
        assert np.array_equal(found, image) and np.array_equal(label, trimap == 1)


def test_an_epoch_takes_each_pair_once_in_an_order_of_its_own():
    first, second = (permutation(9, seed=4, epoch=epoch).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(9)) and first != second
    assert permutation(9, seed=4, epoch=0).tolist() == first
