import numpy as np
import pytest
import zarr

from segpipe.tasks.grid import Window
from segpipe.tasks.sample import Area, CropSampler


def make_area(name, height, width, seed=0, hole=True, weight=1.0):
    rng = np.random.default_rng(seed)
    image = rng.integers(1, 256, (3, height, width), np.uint8)
    label = rng.integers(0, 2, (height, width)).astype(np.uint8)
    valid = np.ones((height, width), np.uint8)
    if hole:
        valid[3:9, 4:11] = 0
    return Area.of_arrays(name, image, label, valid, weight)


def test_crops_are_the_same_for_the_same_seed_and_others_for_another():
    sampler = CropSampler([make_area("a", 80, 90), make_area("b", 40, 50, 1)], crop_px=32, margin_px=8)
    first, again, other = (sampler.draw(6, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert np.array_equal(first.image_BCHW, again.image_BCHW)
    assert not np.array_equal(first.image_BCHW, other.image_BCHW)
    assert first.image_BCHW.shape == (6, 3, 48, 48) and first.valid_BHW.shape == (6, 48, 48)


def test_every_crop_is_a_window_of_the_area_with_nothing_around_it():
    area = make_area("a", 40, 50)
    pad = ((0, 0), (16, 16), (16, 16))
    valid = np.pad(area.valid, 16)
    image, label = np.pad(area.image * area.valid, pad), np.pad(area.label * area.valid, 16)
    crops = CropSampler([area], crop_px=24, margin_px=16).draw(40, np.random.default_rng(0))
    places = set()
    for crop_image, crop_label, crop_valid in zip(crops.image_BCHW, crops.label_BHW, crops.valid_BHW, strict=True):
        views = np.lib.stride_tricks.sliding_window_view(image, (3, 56, 56))[0]
        (place,) = [p for p in np.ndindex(views.shape[:2]) if np.array_equal(views[p], crop_image)]
        row, col = place
        assert row <= 40 - 24 and col <= 50 - 24
        assert np.array_equal(crop_label, label[row : row + 56, col : col + 56])
        assert np.array_equal(crop_valid, valid[row : row + 56, col : col + 56])
        places.add(place)
    assert len(places) > 20


def test_an_area_smaller_than_the_crop_is_whole_in_it_and_the_rest_is_invalid():
    area = make_area("small", 20, 31)
    crops = CropSampler([area], crop_px=48).draw(30, np.random.default_rng(0))
    assert (crops.valid_BHW.sum(axis=(1, 2)) == area.valid_pixels).all()
    assert not (crops.image_BCHW * (1 - crops.valid_BHW[:, None])).any()
    tops = {int(np.flatnonzero(valid.any(axis=1))[0]) for valid in crops.valid_BHW}
    assert min(tops) < 5 and max(tops) > 23


def test_crops_from_zarr_chunks_are_those_from_arrays(tmp_path):
    area = make_area("a", 70, 90)
    group = zarr.open_group(tmp_path / "store.zarr", mode="w")
    arrays = {
        name: group.create_array(name, data=data, chunks=(*(3,) * (data.ndim - 2), 32, 32))
        for name, data in (("image", area.image), ("label", area.label), ("valid", area.valid))
    }
    stored = Area("a", arrays["image"], arrays["label"], arrays["valid"], area.window, area.valid_pixels)
    ours, theirs = (CropSampler([a], 40, 10).draw(5, np.random.default_rng(2)) for a in (area, stored))
    assert np.array_equal(ours.image_BCHW, theirs.image_BCHW)
    assert np.array_equal(ours.valid_BHW, theirs.valid_BHW)


def test_areas_are_drawn_by_weight_times_the_square_root_of_their_valid_pixels():
    areas = [make_area("a", 40, 90, hole=False), make_area("b", 20, 20, hole=False, weight=3.0)]
    sampler = CropSampler(areas, crop_px=16)
    assert sampler.probabilities == pytest.approx([0.5, 0.5])


def test_an_area_without_valid_pixels_or_of_unequal_arrays_is_refused():
    nothing = np.zeros((9, 9), np.uint8)
    with pytest.raises(ValueError, match="no valid pixel"):
        Area.of_arrays("empty", np.zeros((3, 9, 9), np.uint8), nothing, nothing)
    with pytest.raises(ValueError, match="one size"):
        Area("odd", np.zeros((3, 9, 8), np.uint8), nothing, nothing, Window(0, 0, 9, 9), 81)
