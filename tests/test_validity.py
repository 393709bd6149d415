"""Validity: nodata patches found per tile, whatever the pieces, against scipy on the whole tile."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from scipy import ndimage

from segpipe.pipeline.draw import draw_city
from segpipe.tasks import validity
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.read import Tile, read_header, resolve_bands
from segpipe.tasks.validity import (
    EDGE_RUN_PX,
    LOSSY_TOLERANCE,
    Collar,
    Scan,
    collar_is_speckled,
    min_pixels,
    resolve_speckle_tolerance,
    resolve_tolerance,
    scan_tile,
)

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
    assert found.invalid_px == invalid.sum()
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


@settings(max_examples=150)
@given(grey=blotched(), smallest=st.integers(1, 700), piece_px=st.integers(7, 64), held=st.sampled_from([0, 40, 2**24]))
def test_patches_equal_those_of_the_whole_tile_for_any_piece_size(tmp_path_factory, grey, smallest, piece_px, held):
    tile = tile_of(tmp_path_factory.getbasetemp() / "blotched.tif", np.stack([grey] * 3))
    black, white = oracle(grey == 0, smallest), oracle(grey == 255, smallest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validity, "HELD_BYTES", held)
        found, invalid = scan(tile, smallest, piece_px)
    np.testing.assert_array_equal(invalid, black | white)
    expected = {"nodata 0": int(black.sum()), "nodata 255": int(white.sum())}
    assert found.by_reason == {reason: pixels for reason, pixels in expected.items() if pixels}


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), piece_px=st.integers(7, 64), share=st.floats(0.9, 0.99))
def test_speckled_patches_equal_those_of_the_whole_tile_for_any_piece_size(tmp_path_factory, seed, piece_px, share):
    grey = np.where(np.random.default_rng(seed).random((97, 83)) < share, 0, 9).astype(np.uint8)
    tile = tile_of(tmp_path_factory.getbasetemp() / "speckled.tif", np.stack([grey] * 3))
    np.testing.assert_array_equal(scan(tile, 40, piece_px)[1], oracle(grey == 0, 40))


def test_a_lossless_tile_with_a_nodata_hole_is_read_once(tmp_path, monkeypatch):
    grey = np.full((300, 300), 100, np.uint8)
    grey[90:160, 120:220] = 0
    tile = tile_of(tmp_path / "hole.tif", np.stack([grey] * 3))
    read_px = []
    read = validity.read_samples
    monkeypatch.setattr(validity, "read_samples", lambda tile, part: read_px.append(part.pixels) or read(tile, part))
    found, _ = scan(tile, 100, 300)
    assert found.by_reason == {"nodata 0": 7000}
    assert sum(read_px) == grey.size + 1  # one pixel tells the type of the samples


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


@pytest.mark.parametrize("value", [-9999.0, -0.1, -3.4028234663852886e38, -np.inf])
def test_nodata_of_float_tiles_may_lie_far_outside_the_samples(tmp_path, value):
    image = np.full((1, 50, 50), 0.5, np.float32)
    image[:, 10:40, 10:40] = value
    tile = tile_of(tmp_path / "float.tif", image, nodata=(value, 1.7e308), bands=(1,))
    assert scan(tile, 900, piece_px=20)[0].by_reason == {f"nodata {value:g}": 900}
    assert scan(tile, 901, piece_px=20)[0].by_reason == {}


@pytest.mark.parametrize("nodata", [(), (np.nan,), (0.0,)])
def test_nan_in_any_selected_band_makes_a_single_pixel_invalid(tmp_path, nodata):
    image = np.random.default_rng(0).random((4, 50, 60), np.float32) + 1
    image[3, 5] = np.nan  # not selected
    image[0, 7, 9] = image[2, 7, 9] = image[1, 49, 59] = np.nan
    image[1, 20:30, 20:30] = np.nan
    expected = np.isnan(image[:3]).any(axis=0)
    found, invalid = scan(tile_of(tmp_path / "nan.tif", image, nodata=nodata), 10_000, piece_px=16)
    np.testing.assert_array_equal(invalid, expected)
    assert found.by_reason == {"nan": 102}


@pytest.mark.parametrize("compress", ["deflate", "lzw"])
def test_nodata_and_tolerance_of_16_bits_are_in_units_of_the_samples(tmp_path, compress):
    image = np.full((3, 60, 60), 2_000, np.uint16)
    image[:, :20, :20], image[:, :20, 40:], image[:, 40:, :20] = 65_535, 65_500, 255
    tile = tile_of(tmp_path / "u16.tif", image, nodata=(65_535.0, -9999.0, np.inf), compress=compress)
    assert scan(tile, 400)[0].by_reason == {"nodata 65535": 400}
    tile = replace(tile, nodata=(65_535.0,), tolerance=35.0)
    assert scan(tile, 400, piece_px=21)[0].by_reason == {"nodata 65535": 800}


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


@pytest.mark.parametrize("compress", ["none", "lzw"])
def test_four_bands_written_with_no_options_lose_no_pixel(tmp_path, compress):
    image = np.random.default_rng(0).integers(0, 256, (4, 60, 70), dtype=np.uint8)
    image[3, :30] = 0  # water, black in near infrared
    tile = tile_of(tmp_path / "rgbi.tif", image, compress=compress)
    header = read_header(tile.path)
    assert (header.colours[3], header.mask) == ("alpha", "alpha")
    tile = Tile(tile.path, tile.window, resolve_bands((1, 2, 3), header), mask=header.mask)
    assert scan(tile, 1, piece_px=32)[0] == Scan(0, {})


@pytest.mark.parametrize(("opaque", "is_mask"), [(65_535, True), (255, True), (4_095, False)])
def test_an_alpha_band_of_16_bits_is_a_mask_if_it_is_0_or_opaque_everywhere(tmp_path, opaque, is_mask):
    image = np.full((4, 40, 50), opaque, np.uint16)
    image[3, :7, :9] = 0
    tile = tile_of(tmp_path / "rgba16.tif", image, nodata=(), mask="alpha", colours=RGBA)
    assert scan(tile, 1, piece_px=16)[0].by_reason == ({"alpha": 63} if is_mask else {})
    image[3, 39, 49] = 255 if opaque == 65_535 else 65_535  # both kinds of opaque: neither
    tile = tile_of(tmp_path / "both.tif", image, nodata=(), mask="alpha", colours=RGBA)
    assert scan(tile, 1, piece_px=16)[0].by_reason == {}


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


def test_tolerance_for_lossy_tiles_is_one_of_8_bits(tmp_path):
    image = np.full((1, 64, 64), 100, np.uint16)
    profile = {"driver": "JP2OpenJPEG", "quality": 25, "reversible": "NO"}
    header = read_header(tile_of(tmp_path / "deep.jp2", image, **profile).path)
    assert header.lossy and header.dtype == "uint16"
    assert (resolve_tolerance("auto", header), resolve_tolerance(7, header)) == (0.0, 7.0)
    assert resolve_speckle_tolerance("auto", header) == 0.0


@pytest.mark.parametrize(
    ("options", "lossy"),
    [
        ({"quality": 25, "reversible": "NO"}, True),
        ({"quality": 25, "reversible": "YES"}, True),
        ({"quality": 100, "reversible": "NO"}, True),
        ({}, True),
        ({"quality": 100, "reversible": "YES"}, False),
    ],
)
def test_jpeg_2000_is_lossy_exactly_where_it_changes_samples(tmp_path, options, lossy):
    image = np.random.default_rng(0).integers(0, 256, (3, 96, 96), dtype=np.uint8)
    tile = tile_of(tmp_path / "tile.jp2", image, driver="JP2OpenJPEG", **options)
    with rasterio.open(tile.path) as dataset:
        assert (dataset.read() != image).any() == lossy
    assert read_header(tile.path).lossy == lossy
    assert resolve_tolerance("auto", read_header(tile.path)) == (LOSSY_TOLERANCE if lossy else 0)


# Bands by number or colour: what else a band says of itself besides that it is a mask


def test_bands_are_found_by_colour_or_number(tmp_path):
    colours = (ColorInterp.nir, ColorInterp.blue, ColorInterp.green, ColorInterp.red)
    header = read_header(tile_of(tmp_path / "nrgb.tif", np.full((4, 8, 8), 9, np.uint8), colours=colours).path)
    assert resolve_bands(("red", "Green", "BLUE"), header) == (4, 3, 2)
    assert resolve_bands((1, "red", 1), header) == (1, 4, 1)


@pytest.mark.parametrize("name", ["nir", "Red", 0, 4, -1, "undefined"])
def test_bands_that_a_tile_does_not_have_are_refused_with_those_that_it_has(tmp_path, name):
    header = read_header(tile_of(tmp_path / "plain.tif", np.full((3, 8, 8), 9, np.uint16)).path)
    with pytest.raises(UserError, match=rf"plain\.tif: has \w+ bands? {name}: found 3 bands \(gray, undefined, undef"):
        resolve_bands((1, name), header)


# Speckled collars: tiles that went through JPEG and are lossless now


def drawn_ground(height, width, seed=0):
    """Ground with shadows down to 1 and roofs up to 254, in colour, with noise: nothing of it is exactly 0 or 255."""
    rng = np.random.default_rng(seed)
    ground = np.full((3, height, width), 90.0) + np.array([10, 0, -15])[:, None, None]
    for _ in range(height * width // 1_500):
        row, col = rng.integers(0, height), rng.integers(0, width)
        ground[:, row : row + rng.integers(5, 60), col : col + rng.integers(5, 60)] = rng.choice([6, 40, 140, 200, 250])
    return np.clip(ground + rng.normal(0, 3, ground.shape), 1, 254).astype(np.uint8)


def collared(image_CHW, kind, value, wide=29):
    height, width = image_CHW.shape[1:]
    row, col = np.mgrid[:height, :width]
    inside = {
        "side": row < wide,
        "frame": np.minimum(np.minimum(row, height - 1 - row), np.minimum(col, width - 1 - col)) < wide,
        "wedge": row + 0.2 * col < 2 * wide,
        "turned": (row < wide + 0.07 * col) | (col < wide + 0.07 * (height - row)),
    }[kind]
    return np.where(inside, np.uint8(value), image_CHW), inside


def through_jpeg(path, image_CHW, quality):
    tile_of(path, image_CHW, compress="jpeg", jpeg_quality=quality, photometric="ycbcr", tiled=True, nodata=())
    with rasterio.open(path) as dataset:
        return dataset.read()


def lossless(path, image_CHW, nodata=(0.0, 255.0), compress="lzw"):
    """A lossless tile as the plan makes it with `nodata_tolerance: auto`."""
    tile = tile_of(path, image_CHW, nodata=nodata, compress=compress)
    header = read_header(tile.path)
    speckle = resolve_speckle_tolerance("auto", header)
    assert (resolve_tolerance("auto", header), speckle) == (0.0, LOSSY_TOLERANCE)
    return replace(tile, speckle_tolerance=speckle)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("quality", [75, 85, 95])
@pytest.mark.parametrize("kind", ["side", "frame", "wedge", "turned"])
def test_a_collar_that_was_once_jpeg_is_found_in_a_lossless_tile(tmp_path, kind, quality, value):
    clean, inside = collared(drawn_ground(400, 500), kind, value)
    tile = lossless(tmp_path / "lzw.tif", through_jpeg(tmp_path / "jpeg.tif", clean, quality))
    found, invalid = scan(tile, min_pixels(1000, 0.09))
    assert list(found.by_reason) == [f"nodata {value}, speckled"]
    missed, exact_missed = (inside & ~invalid).sum(), (inside & ~scan(replace(tile, speckle_tolerance=0.0), 9)[1]).sum()
    assert missed < 0.5 * exact_missed and missed < 0.07 * inside.sum()


@pytest.mark.parametrize("kind", ["side", "frame", "wedge", "turned"])
def test_a_speckled_collar_makes_a_lossless_tile_count_as_jpeg(tmp_path, kind):
    clean, _ = collared(drawn_ground(400, 500), kind, 0)
    clean[:, 250:300, 250:300] = 253  # a white hole that only the tolerance finds
    tile = lossless(tmp_path / "lzw.tif", through_jpeg(tmp_path / "jpeg.tif", clean, 85))
    found, invalid = scan(tile, 2_000)
    as_jpeg, as_jpeg_invalid = scan(replace(tile, tolerance=LOSSY_TOLERANCE, speckle_tolerance=0.0), 2_000)
    np.testing.assert_array_equal(invalid, as_jpeg_invalid)
    assert invalid[250:300, 250:300].mean() > 0.9
    assert found.by_reason == {f"{reason}, speckled": pixels for reason, pixels in as_jpeg.by_reason.items()}


@pytest.mark.parametrize("piece_px", [37, 128, 401])
def test_evidence_of_speckle_does_not_depend_on_the_pieces(tmp_path, piece_px):
    for value, kind in ((0, "wedge"), (255, "turned")):
        clean, _ = collared(drawn_ground(400, 500), kind, value)
        tile = lossless(tmp_path / "lzw.tif", through_jpeg(tmp_path / "jpeg.tif", clean, 85))
        whole, invalid = scan(tile, 5_000)
        cut, invalid_cut = scan(tile, 5_000, piece_px)
        assert cut == whole and "speckled" in str(whole)
        np.testing.assert_array_equal(invalid_cut, invalid)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("kind", ["side", "frame", "wedge", "turned"])
def test_a_clean_collar_is_taken_as_it_is(tmp_path, kind, value):
    # The imagery was JPEG, the collar was cut afterwards; shadows and roofs meet it here and there.
    ground = np.clip(through_jpeg(tmp_path / "jpeg.tif", drawn_ground(400, 500), 85), 1, 254)
    clean, inside = collared(ground, kind, value)
    found, invalid = scan(lossless(tmp_path / "lzw.tif", clean), 5_000)
    assert found.by_reason == {f"nodata {value}": int(invalid.sum())}
    assert not (invalid & ~inside).any() and (inside & ~invalid).sum() < 20


@pytest.mark.parametrize("value", [0, 255])
def test_a_dark_lake_that_meets_a_clean_collar_stays_valid(tmp_path, value):
    ground = drawn_ground(400, 500)
    ground[:, :120, 200:330] = abs(value - np.random.default_rng(0).integers(1, 9, (3, 120, 130)))
    clean, inside = collared(ground, "side", value)
    found, invalid = scan(lossless(tmp_path / "lake.tif", clean), 5_000)
    np.testing.assert_array_equal(invalid, inside)
    assert found.by_reason == {f"nodata {value}": int(inside.sum())}


@pytest.mark.parametrize("value", [0, 255])
def test_dark_shadows_and_white_roofs_at_the_edges_stay_valid(tmp_path, value):
    ground = drawn_ground(400, 500)
    noise = np.random.default_rng(0).integers(0, 10, (3, 90, 150))
    ground[:, :90, 100:250] = ground[:, 310:, 300:450] = abs(value - noise)  # exact in one pixel of 1,000
    assert scan(lossless(tmp_path / "lzw.tif", ground), 2_000)[0] == Scan(0, {})


@pytest.mark.parametrize("seed", [1, 2])
def test_no_speckled_collar_is_seen_in_a_drawn_city(tmp_path, seed):
    image = np.moveaxis(draw_city(seed, 500, 500).image_HW3, -1, 0)
    assert scan(lossless(tmp_path / "city.tif", image), min_pixels(1000, 0.09))[0] == Scan(0, {})
    harsh = np.clip(image.astype(np.float32) * 2.2 - 110, 0, 255).astype(np.uint8)  # black shadows, white roofs
    assert (harsh == 0).all(axis=0).mean() > 0.01 and (harsh == 255).all(axis=0).mean() > 0.001
    assert "speckled" not in str(scan(lossless(tmp_path / "harsh.tif", harsh), min_pixels(1000, 0.09))[0])


def test_a_collar_too_thin_for_exact_pixels_is_found_by_its_length():
    assert collar_is_speckled([Collar(pixels=1_400, exact=150, near=0, far=0, thin=True)])
    assert not collar_is_speckled([Collar(pixels=1_400, exact=150, near=0, far=0, thin=False)])
    assert not collar_is_speckled([Collar(pixels=1_400, exact=3, near=0, far=0, thin=True)])  # a dark ditch
    assert not collar_is_speckled([Collar(pixels=1_400, exact=1_400, near=0, far=280, thin=True)])  # a clean collar
    assert not collar_is_speckled([])


def test_a_thin_collar_that_was_once_jpeg_is_found(tmp_path):
    clean, inside = collared(drawn_ground(400, 500), "side", 0, wide=7)
    found, invalid = scan(lossless(tmp_path / "lzw.tif", through_jpeg(tmp_path / "jpeg.tif", clean, 95)), 5_000)
    assert list(found.by_reason) == ["nodata 0, speckled"] and invalid[inside].mean() > 0.9


def test_a_tolerance_that_is_given_is_not_replaced(tmp_path):
    header = read_header(tile_of(tmp_path / "tile.tif", drawn_ground(64, 64), compress="lzw").path)
    assert (resolve_tolerance(0, header), resolve_speckle_tolerance(0, header)) == (0.0, 0.0)
    jpeg = read_header(tile_of(tmp_path / "jpeg.tif", drawn_ground(64, 64), compress="jpeg").path)
    assert (resolve_tolerance("auto", jpeg), resolve_speckle_tolerance("auto", jpeg)) == (LOSSY_TOLERANCE, 0.0)


def test_smallest_patch_in_pixels_is_the_area_rounded_up():
    assert min_pixels(1000, 0.3 * 0.3) == 11_112
    assert min_pixels(900, 0.3 * 0.3) == 10_000
    assert min_pixels(0, 0.09) == 1


def real_tile(path: Path) -> Tile:
    """A tile of the shared data with nodata 0 and 255, its upper left pixel at (0, 0)."""
    header = read_header(str(path))
    return Tile(
        path=str(path),
        window=Window(0, 0, header.height, header.width),
        bands=(1, 2, 3),
        nodata=(0.0, 255.0),
        tolerance=resolve_tolerance("auto", header),
        mask=header.mask,
        speckle_tolerance=resolve_speckle_tolerance("auto", header),
    )


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


@needs_data
@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("town", ["banepa", "zanzibar", "catanduanes"])
def test_no_speckled_collar_is_seen_in_lossless_imagery_of_real_towns(part, town):
    tile = real_tile(SHARED / f"data/{part}/{town}_image.tif")
    assert tile.speckle_tolerance == LOSSY_TOLERANCE
    assert scan_tile(tile, min_pixels(1000, 0.09), lambda _window, _mask: None) == Scan(0, {})


@needs_data
@pytest.mark.parametrize("number", [1, 5, 11, 16])
def test_wedges_and_holes_of_real_jpeg_tiles_are_found_after_they_were_rewritten_without_loss(tmp_path, number):
    jpeg = real_tile(SHARED / f"data/banepa/tiles/banepa{number}.tif")
    with rasterio.open(jpeg.path) as dataset:
        image = dataset.read()
    _, expected = scan(jpeg, min_pixels(1000, 0.09))
    tile = replace(lossless(tmp_path / "lzw.tif", image), window=jpeg.window)
    found, invalid = scan(tile, min_pixels(1000, 0.09))
    np.testing.assert_array_equal(invalid, expected)
    assert found.by_reason and all(reason.endswith(", speckled") for reason in found.by_reason)


@needs_data
@pytest.mark.parametrize("number", [7, 8, 9, 12, 13])
def test_real_tiles_without_a_collar_lose_nothing_after_they_were_rewritten_without_loss(tmp_path, number):
    with rasterio.open(SHARED / f"data/banepa/tiles/banepa{number}.tif") as dataset:
        image = dataset.read()
    tile = lossless(tmp_path / "lzw.tif", image)
    assert scan_tile(tile, min_pixels(1000, 0.09), lambda _window, _mask: None) == Scan(0, {})
