"""Validity: nodata patches found per tile, whatever the pieces, against scipy on the whole tile."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from scipy import ndimage

from segpipe.tasks.grid import Window
from segpipe.tasks.read import Tile, read_header
from segpipe.tasks.validity import EDGE_RUN_PX, Scan, min_pixels, resolve_tolerance, scan_tile

OFF = (-1_000_003, 1_177_997)
SHARED = Path(os.environ.get("SEGPIPE_SHARED", "../shared"))
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no data under SEGPIPE_SHARED={SHARED}")


def tile_of(
    path, image_CHW, *, nodata=(0.0, 255.0), tolerance=0.0, mask="none", bands=(1, 2, 3), colours=None, **profile
):
    """Write an array as a raster and place it on the lattice."""
    count, height, width = image_CHW.shape
    options = {
        "driver": "GTiff",
        "transform": Affine(0.3, 0, 9, 0, -0.3, 9),
        "width": width,
        "height": height,
        "count": count,
        "dtype": image_CHW.dtype,
    } | profile
    with rasterio.open(path, "w", **options) as dataset:
        if colours:
            dataset.colorinterp = colours
        dataset.write(image_CHW)
    return Tile(str(path), Window(*OFF, height, width), bands, nodata, tolerance, mask)


def scan(tile, smallest, piece_px=2048) -> tuple[Scan, np.ndarray]:
    """The scan and its invalid mask over the whole tile."""
    invalid = np.zeros(tile.window.shape_yx, bool)
    written = []

    def write(window, mask):
        assert mask.shape == window.shape_yx and mask.dtype == bool and mask.any()
        assert tile.window.contains(window) and max(window.shape_yx) <= piece_px
        written.append(window)
        invalid[window.within(tile.window)] = mask

    found = scan_tile(tile, smallest, write, piece_px)
    assert len(set(written)) == len(written)
    assert found.invalid_px == invalid.sum() and found.any_invalid == invalid.any()
    return found, invalid


def oracle(candidates, smallest):
    """The rule on a whole tile, by scipy: beyond the tile everything is candidate."""
    opened = ndimage.binary_opening(np.pad(candidates, 8, constant_values=True), np.ones((5, 5)))[8:-8, 8:-8]
    labels, count = ndimage.label(opened)
    keep = np.zeros(count + 1, bool)
    for index in range(1, count + 1):
        patch = labels == index
        keep[index] = patch.sum() >= smallest
        for side in (patch[0], patch[-1], patch[:, 0], patch[:, -1]):
            run = longest = 0
            for inside in side:
                run = run + 1 if inside else 0
                longest = max(longest, run)
            keep[index] |= longest >= min(EDGE_RUN_PX, len(side))
    return keep[labels]


@st.composite
def blotched(draw):
    """Small tiles with rectangles of two nodata values and holes in them, thin bars among them, some along edges."""
    height, width = draw(st.integers(5, 110)), draw(st.integers(5, 110))
    grey = np.full((height, width), 100, np.uint8)
    for _ in range(draw(st.integers(1, 9))):
        row, col = draw(st.integers(-9, height - 1)), draw(st.integers(-9, width - 1))
        tall, wide = draw(st.sampled_from([1, 2, 4, 5, 6, 9, 20, 80])), draw(st.sampled_from([1, 3, 5, 7, 12, 30, 80]))
        value = draw(st.sampled_from([0, 0, 255, 255, 100]))
        grey[max(row, 0) : max(row + tall, 0), max(col, 0) : max(col + wide, 0)] = value
    return grey


@settings(max_examples=150, deadline=None)
@given(grey=blotched(), smallest=st.integers(1, 700), piece_px=st.integers(7, 64))
def test_patches_equal_those_of_the_whole_tile_for_any_piece_size(tmp_path_factory, grey, smallest, piece_px):
    tile = tile_of(tmp_path_factory.getbasetemp() / "blotched.tif", np.stack([grey] * 3))
    black, white = oracle(grey == 0, smallest), oracle(grey == 255, smallest)
    found, invalid = scan(tile, smallest, piece_px)
    np.testing.assert_array_equal(invalid, black | white)
    expected = {"nodata 0": int(black.sum()), "nodata 255": int(white.sum())}
    assert found.by_reason == {reason: pixels for reason, pixels in expected.items() if pixels}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), piece_px=st.integers(7, 64), share=st.floats(0.9, 0.99))
def test_speckled_patches_equal_those_of_the_whole_tile_for_any_piece_size(tmp_path_factory, seed, piece_px, share):
    grey = np.where(np.random.default_rng(seed).random((97, 83)) < share, 0, 9).astype(np.uint8)
    tile = tile_of(tmp_path_factory.getbasetemp() / "speckled.tif", np.stack([grey] * 3))
    np.testing.assert_array_equal(scan(tile, 40, piece_px)[1], oracle(grey == 0, 40))


def test_a_patch_that_winds_through_many_pieces_is_counted_once_as_a_whole(tmp_path):
    grey = np.full((120, 120), 100, np.uint8)
    for row in range(4, 110, 12):  # a comb whose teeth meet at their right ends only
        grey[row : row + 6, 4:110] = 0
    grey[4:106, 104:110] = 0
    tile = tile_of(tmp_path / "comb.tif", np.stack([grey] * 3))
    area = int((grey == 0).sum())
    for piece_px in (16, 31, 200):
        assert scan(tile, area, piece_px)[0].invalid_px == area
        assert scan(tile, area + 1, piece_px)[0].invalid_px == 0


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize(("length", "kept"), [(64, True), (63, False)])
def test_a_small_patch_is_kept_if_it_runs_along_64_px_of_any_side(tmp_path, turn, length, kept):
    grey = np.full((200, 200), 100, np.uint8)
    grey[:6, 20 : 20 + length] = 255
    image = np.ascontiguousarray(np.stack([np.rot90(grey, turn)] * 3))
    found, _ = scan(tile_of(tmp_path / "edge.tif", image), 5_000, piece_px=33)
    assert found.invalid_px == (6 * length if kept else 0)


def test_a_small_patch_along_the_whole_of_a_short_side_is_kept(tmp_path):
    image = np.full((3, 40, 300), 100, np.uint8)
    image[:, :, 290:] = 0
    assert scan(tile_of(tmp_path / "short.tif", image), 5_000)[0].by_reason == {"nodata 0": 400}


def test_white_roofs_and_black_shadows_inside_a_tile_stay_valid(tmp_path):
    image = np.full((3, 300, 300), 100, np.uint8)
    image[:, 100:160, 100:160] = 255
    image[:, 200:203, 10:280] = 0  # large enough, but thinner than 5 px
    assert scan(tile_of(tmp_path / "roof.tif", image), 3_601)[0].invalid_px == 0
    assert scan(tile_of(tmp_path / "roof.tif", image), 3_600)[0].by_reason == {"nodata 255": 3_600}


def test_only_pixels_where_every_selected_band_is_within_the_tolerance_are_candidates(tmp_path):
    image = np.full((4, 40, 160), 100, np.uint8)
    image[:, :, :40] = 12
    image[:, :, 40:80] = 13
    image[:, :, 80:120] = 0
    image[2, :, 80:120] = 200
    image[3] = 77
    tile = tile_of(tmp_path / "bands.tif", image, nodata=(0.0,), tolerance=12.0)
    assert scan(tile, 1_000)[0].by_reason == {"nodata 0": 1_600}
    two_bands = tile_of(tmp_path / "bands.tif", image, nodata=(0.0,), tolerance=12.0, bands=(1, 2))
    assert scan(two_bands, 1_000)[0].by_reason == {"nodata 0": 3_200}
    exact = tile_of(tmp_path / "bands.tif", image, nodata=(0.0,), bands=(1, 2))
    assert scan(exact, 1_000)[0].by_reason == {"nodata 0": 1_600}


@pytest.mark.parametrize("value", [np.nan, -9999.0])
def test_nodata_of_float_tiles_may_be_nan_or_far_outside_the_samples(tmp_path, value):
    image = np.full((1, 50, 50), 0.5, np.float32)
    image[:, 10:40, 10:40] = value
    tile = tile_of(tmp_path / "float.tif", image, nodata=(value,), bands=(1,))
    assert scan(tile, 900, piece_px=20)[0].by_reason == {f"nodata {value:g}": 900}


@pytest.mark.parametrize("internal", [True, False])
def test_a_mask_band_is_taken_as_it_is_without_a_patch_rule(tmp_path, internal):
    mask = np.random.default_rng(0).random((60, 70)) < 0.9
    tile = tile_of(tmp_path / "masked.tif", np.full((3, 60, 70), 100, np.uint8), mask="per_dataset")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(tile.path, "r+") as dataset:
        dataset.write_mask(mask)
    assert (tmp_path / "masked.tif.msk").exists() != internal
    assert read_header(tile.path).mask == "per_dataset"
    found, invalid = scan(tile, 10_000, piece_px=16)
    np.testing.assert_array_equal(invalid, ~mask)
    assert found.by_reason == {"mask band": int((~mask).sum())}


RGBA = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)


def test_an_alpha_band_of_0_and_255_alone_is_a_mask(tmp_path):
    image = np.full((4, 60, 70), 100, np.uint8)
    image[3] = np.where(np.random.default_rng(0).random((60, 70)) < 0.9, 255, 0)
    tile = tile_of(tmp_path / "rgba.tif", image, mask="alpha", colours=RGBA)
    assert read_header(tile.path).mask == "alpha"
    found, invalid = scan(tile, 10_000, piece_px=16)
    np.testing.assert_array_equal(invalid, image[3] == 0)
    assert found.by_reason == {"alpha": int((image[3] == 0).sum())}


def test_one_sample_between_0_and_255_anywhere_makes_an_alpha_band_imagery(tmp_path):
    image = np.full((4, 60, 70), 100, np.uint8)
    image[3] = np.where(np.random.default_rng(0).random((60, 70)) < 0.9, 255, 0)
    image[3, 59, 69] = 254
    assert scan(tile_of(tmp_path / "rgbi.tif", image, mask="alpha", colours=RGBA), 1, piece_px=16)[0].invalid_px == 0


def test_an_alpha_band_that_is_selected_is_imagery(tmp_path):
    image = np.full((4, 60, 70), 100, np.uint8)
    image[3, :30] = 0
    image[3, 30:] = 255
    tile = tile_of(tmp_path / "selected.tif", image, mask="alpha", colours=RGBA, bands=(4, 1, 2))
    assert scan(tile, 1)[0].invalid_px == 0


def test_reasons_that_overlap_count_a_pixel_once_in_the_total(tmp_path):
    image = np.full((4, 50, 50), 255, np.uint8)
    image[:, 10:40, 10:40] = 0
    tile = tile_of(tmp_path / "both.tif", image, nodata=(0.0,), mask="alpha", colours=RGBA)
    found, _ = scan(tile, 900)
    assert (found.invalid_px, found.by_reason) == (900, {"nodata 0": 900, "alpha": 900})


def test_tolerance_follows_the_compression_unless_it_is_given(tmp_path):
    image = np.full((3, 64, 64), 100, np.uint8)
    expected = {"jpeg": 12.0, "deflate": 0.0, "lzw": 0.0, "webp": 12.0}
    for compress, tolerance in expected.items():
        header = read_header(tile_of(tmp_path / f"{compress}.tif", image, compress=compress).path)
        assert resolve_tolerance("auto", header) == tolerance
        assert resolve_tolerance(3, header) == 3.0
    for name, driver, options, tolerance in [
        ("lossless.tif", "GTiff", {"compress": "webp", "webp_lossless": True}, 0.0),
        ("lossy.jp2", "JP2OpenJPEG", {"quality": 10}, 12.0),
        ("lossless.jp2", "JP2OpenJPEG", {"quality": 100, "reversible": "YES"}, 0.0),
        ("plain.jpg", "JPEG", {}, 12.0),
        ("plain.png", "PNG", {}, 0.0),
    ]:
        header = read_header(tile_of(tmp_path / name, image, driver=driver, **options).path)
        assert resolve_tolerance("auto", header) == tolerance, name


def test_smallest_patch_in_pixels_is_the_area_rounded_up():
    assert min_pixels(1000, 0.3 * 0.3) == 11_112
    assert min_pixels(900, 0.3 * 0.3) == 10_000
    assert min_pixels(0, 0.09) == 1


def real_tile(path: Path) -> Tile:
    """A tile of the shared data with nodata 0 and 255, its upper left pixel at (0, 0)."""
    header = read_header(str(path))
    tolerance = resolve_tolerance("auto", header)
    return Tile(str(path), Window(0, 0, header.height, header.width), (1, 2, 3), (0.0, 255.0), tolerance, header.mask)


@needs_data
@pytest.mark.parametrize("tolerance", [0.0, 12.0])
@pytest.mark.parametrize("area", ["train/zanzibar", "val/zanzibar", "train/catanduanes", "train/banepa"])
def test_white_roofs_of_real_towns_stay_valid(area, tolerance):
    tile = real_tile(SHARED / f"data/{area}_image.tif")
    tile = Tile(tile.path, tile.window, tile.bands, tile.nodata, tolerance)
    assert scan_tile(tile, min_pixels(1000, 0.09), lambda _window, _mask: None).invalid_px == 0


@needs_data
def test_white_holes_and_black_wedges_of_a_real_town_are_invalid():
    found = {}
    for name in ("banepa5", "banepa14", "banepa1", "banepa7"):
        tile = real_tile(SHARED / f"data/banepa/tiles/{name}.tif")
        found[name] = scan_tile(tile, min_pixels(1000, 0.09), lambda _window, _mask: None).by_reason
    assert found["banepa5"]["nodata 255"] > 137_000  # the hole in the north-east, cut by no tile edge
    assert found["banepa14"] == {"nodata 255": pytest.approx(77_000, rel=0.01)}
    assert found["banepa1"] == {"nodata 0": pytest.approx(45_000, rel=0.02)}  # the corner of two wedges
    assert found["banepa7"] == {}


@needs_data
def test_invalid_pixels_of_a_real_tile_do_not_depend_on_the_piece():
    tile = real_tile(SHARED / "data/banepa/tiles/banepa5.tif")
    whole, invalid = scan(tile, min_pixels(1000, 0.09))
    cut, invalid_cut = scan(tile, min_pixels(1000, 0.09), piece_px=200)
    assert cut == whole
    np.testing.assert_array_equal(invalid_cut, invalid)
