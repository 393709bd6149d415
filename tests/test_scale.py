"""Scale: samples of any type to 8 bits, by one pair of values for a city that no order of its tiles changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from rasterio.enums import ColorInterp

from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.read import Tile
from segpipe.tasks.scale import SAMPLE_SIDE_PX, Scale, percentile_scale, sample_values, sample_windows


def tile_of(path, image_CHW, bands=(1, 2, 3), colours=None, **fields) -> Tile:
    count, height, width = image_CHW.shape
    shape = {"width": width, "height": height, "count": count, "dtype": image_CHW.dtype}
    with rasterio.open(path, "w", driver="GTiff", transform=Affine(0.3, 0, 9, 0, -0.3, 9), **shape) as dataset:
        if colours:
            dataset.colorinterp = colours
        dataset.write(image_CHW)
    return Tile(str(path), Window(-70_001, 33_000, height, width), bands, **fields)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (math.nan, 1), (0, math.nan), (0, math.inf)])
def test_a_scale_that_is_none_is_refused(low, high):
    with pytest.raises(ValueError, match="expected two finite numbers"):
        Scale(low, high)


def test_8_bits_scaled_from_0_to_255_are_themselves():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    np.testing.assert_array_equal(Scale(0, 255).to_u8(every), every)
    for dtype in (np.uint16, np.int16, np.float32):
        np.testing.assert_array_equal(Scale(0, 255).to_u8(every.astype(dtype)), every)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_scaled_samples_are_those_of_the_formula_in_every_type(dtype):
    samples = np.arange(0, 128, dtype=dtype).reshape(2, 8, 8) * (1 if dtype == np.uint8 else 250)
    low, high = (7, 100) if dtype == np.uint8 else (1_750, 25_000)
    scaled = Scale(low, high).to_u8(samples)
    expected = [min(255, max(0, round((float(x) - low) / (high - low) * 255))) for x in samples.ravel()]
    assert scaled.dtype == np.uint8 and scaled.shape == samples.shape
    assert scaled.ravel().tolist() == expected


def test_nan_becomes_0_and_infinite_samples_the_ends():
    samples = np.array([[[math.nan, -math.inf, math.inf, 3e38, -3e38, 0.5]]], np.float32)
    assert Scale(0.0, 1.0).to_u8(samples).tolist() == [[[0, 0, 255, 255, 0, 128]]]


def test_colours_keep_their_balance():
    grey = np.full((3, 4, 4), 900, np.uint16)
    assert len(np.unique(Scale(100, 3_000).to_u8(grey))) == 1


@given(
    values=npst.arrays(np.uint16, st.integers(2, 400)).filter(lambda a: np.ptp(np.sort(a)[1:-1] if len(a) > 50 else a)),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    random=st.randoms(use_true_random=False),
)
def test_percentiles_are_those_of_all_values_whatever_the_tiles_and_their_order(values, cuts, random):
    parts = np.split(values, sorted(cuts))
    random.shuffle(parts)
    low, high = np.percentile(values, (2, 98), method="inverted_cdf")
    if low == high:
        with pytest.raises(UserError, match="scale: auto"):
            percentile_scale(parts)
    else:
        assert percentile_scale(parts) == Scale(float(low), float(high))


@given(
    values=npst.arrays(np.float32, st.integers(50, 300), elements=st.floats(-1e6, 1e6, width=32)),
    cut=st.integers(0, 50),
)
def test_percentiles_of_floats_are_right_to_a_65536th_part(values, cut):
    low, high = np.sort(values)[[max(0, math.ceil(len(values) * 0.02) - 1), math.ceil(len(values) * 0.98) - 1]]
    assume(low + abs(low) * 1e-4 + 1e-30 < high - abs(high) * 1e-4)  # below, float32 itself is coarser
    found = percentile_scale([values[:cut], values[cut:]])
    assert found == percentile_scale([values[cut:], values[:cut]])
    for value, expected in ((found.low, low), (found.high, high)):
        assert expected - abs(expected) / 65_536 - 1e-40 <= value <= expected


def test_counts_that_are_added_up_in_between_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    tiles = [rng.normal(300, 90, 500).astype(np.float32) for _ in range(20)]
    whole = percentile_scale(tiles)
    monkeypatch.setattr("segpipe.tasks.scale.WAITING_KEYS", 700)
    assert percentile_scale(reversed(tiles)) == whole


@pytest.mark.parametrize("samples", [[], [np.zeros(0, np.uint16)], [np.full(9, 7, np.uint16)]])
def test_cities_without_two_values_are_refused_with_the_cure(samples):
    with pytest.raises(UserError, match=r"scale: auto.*cure: `scale: \[low, high\]`"):
        percentile_scale(samples)


@pytest.mark.parametrize(("height", "width", "number"), [(1000, 700, 9), (192, 5000, 3), (10, 12, 1), (193, 193, 9)])
def test_places_of_samples_lie_in_the_tile_apart_and_reach_its_edges(height, width, number):
    tile = Window(-5, 17, height, width)
    windows = sample_windows(tile)
    assert len(windows) == number and all(tile.contains(window) for window in windows)
    assert not any(a.intersect(b).pixels for index, a in enumerate(windows) for b in windows[:index])
    assert (windows[0].row_off, windows[0].col_off) == (-5, 17)
    assert tile.row_stop - windows[-1].row_stop <= 1 and tile.col_stop - windows[-1].col_stop <= 1


def test_places_of_samples_move_with_the_tile():
    here, there = sample_windows(Window(0, 0, 999, 400)), sample_windows(Window(7, -9, 999, 400))
    assert there == [Window(w.row_off + 7, w.col_off - 9, w.height, w.width) for w in here]


def test_values_of_a_large_tile_are_those_at_its_places(tmp_path):
    image = np.random.default_rng(0).integers(0, 4_000, (4, 300, 500), dtype=np.uint16)
    tile = tile_of(tmp_path / "large.tif", image, bands=(4, 1))
    corner = image[[3, 0], :SAMPLE_SIDE_PX, :SAMPLE_SIDE_PX].ravel()
    values = sample_values(tile)
    assert values.dtype == np.uint16 and len(values) == 2 * 9 * SAMPLE_SIDE_PX**2
    np.testing.assert_array_equal(values[: len(corner)], corner)


def test_nodata_nan_and_infinite_pixels_are_left_out_whole(tmp_path):
    image = np.full((3, 20, 20), 5, np.float32)
    image[:, 0] = -9999
    image[0, 1] = -9999  # one band alone is imagery
    image[1, 2] = np.nan
    image[2, 3] = np.inf
    values = sample_values(tile_of(tmp_path / "float.tif", image, nodata=(-9999.0, math.nan)))
    assert sorted(np.unique(values).tolist()) == [-9999, 5] and len(values) == 3 * 17 * 20
    assert (values == -9999).sum() == 20


def test_nodata_of_unsigned_samples_is_compared_without_wrapping_around(tmp_path):
    image = np.full((3, 8, 8), 5, np.uint16)
    image[:, :4] = 65_530
    assert set(sample_values(tile_of(tmp_path / "u16.tif", image, nodata=(65_535.0,), tolerance=6.0))) == {5}
    assert set(sample_values(tile_of(tmp_path / "u16.tif", image, nodata=(0.0,), tolerance=6.0))) == {65_530}


def test_masked_pixels_are_left_out(tmp_path):
    image = np.full((4, 8, 8), 5, np.uint8)
    image[:3, :4] = 99
    image[3] = 255
    image[3, :4] = 0
    rgba = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    assert set(sample_values(tile_of(tmp_path / "rgba.tif", image, colours=rgba, mask="alpha"))) == {5}
    tile = tile_of(tmp_path / "masked.tif", image[:3], mask="per_dataset")
    with rasterio.open(tile.path, "r+") as dataset:
        dataset.write_mask(image[3] > 0)
    assert set(sample_values(tile)) == {5}
