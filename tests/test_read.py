"""Reading: headers, damaged files, and tiles mosaicked on the lattice, against rasterio and numpy on the whole."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio._err import CPLE_AppDefinedError
from rasterio.enums import ColorInterp

from segpipe.pipeline.plan import read_headers
from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.read import (
    OPEN_TILES,
    Tile,
    _OpenTiles,
    read_header,
    read_mask,
    read_samples,
    read_window,
)

SHARED = Path(os.environ.get("SEGPIPE_SHARED", "../shared"))
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no data under SEGPIPE_SHARED={SHARED}")


def write(path, image_CHW, colours=None, **profile) -> str:
    count, height, width = image_CHW.shape
    shape = {"width": width, "height": height, "count": count, "dtype": image_CHW.dtype}
    options = {"driver": "GTiff", "transform": Affine(0.3, 0, 9, 0, -0.3, 9)} | shape | profile
    with rasterio.open(path, "w", **options) as dataset:
        if colours:
            dataset.colorinterp = colours
        dataset.write(image_CHW)
    return str(path)


def noise(shape_CHW, seed=0):
    return np.random.default_rng(seed).integers(1, 255, shape_CHW, dtype=np.uint8)


def all_valid(_tile, _window):
    return None


def damaged(path: str, end: int | None = None, zeroed: tuple[int, int] = (0, 0)) -> str:
    """A copy of a file that ends early, or has a part of it overwritten with zeros."""
    content = bytearray(Path(path).read_bytes())
    content[slice(*zeroed)] = bytes(zeroed[1] - zeroed[0])
    copy = Path(path).with_stem(Path(path).stem + " damaged")
    copy.write_bytes(content[:end])
    return str(copy)


# Headers


def test_header_says_what_rasterio_says(tmp_path):
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    path = write(
        tmp_path / "größe 1.tif",
        noise((4, 40, 70)),
        colours,
        crs="EPSG:32645",
        nodata=7,
        tiled=True,
        blockxsize=16,
        blockysize=32,
    )
    header = read_header(path)
    with rasterio.open(path) as dataset:
        assert (header.height, header.width, header.bands) == (*dataset.shape, dataset.count) == (40, 70, 4)
        assert header.crs_wkt == dataset.crs.to_wkt() and header.transform == dataset.transform[:6]
    assert (header.dtype, header.nodata, header.lossy, header.mask) == ("uint8", 7.0, False, "alpha")
    assert header.colours == ("red", "green", "blue", "alpha")
    assert (header.block_shape_yx, header.missing_bytes) == ((32, 16), 0)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_header_of_a_tile_without_georeference_has_no_crs_and_warns_of_nothing(tmp_path, recwarn):
    path = write(tmp_path / "plain.tif", noise((3, 8, 8)), transform=None)
    recwarn.clear()
    header = read_header(path)
    assert (header.crs_wkt, header.transform, header.nodata) == (None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"Dear user,\nthis is no image", "is text that begins with 'Dear user, this is no image'"),
        (b"<html><body>404 Not Found</body></html>", "is text that begins with '<html><body>404 Not Found"),
        (b"", "is empty"),
        (b"PK\x03\x04\x00\x01\x02\xff\xfe", "is no raster: begins with the bytes 50 4b 03 04"),
        (b"II*\0\x08\0\0\0", "is a TIFF whose header is damaged or cut off (8 bytes"),
    ],
)
def test_what_is_no_raster_is_refused_in_one_line_that_says_what_it_is(tmp_path, content, found):
    path = tmp_path / "tile.tif"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_header(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: {found}") and "expected a raster" in message and "\n" not in message


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"tile\.tif: no such file"):
        read_header(str(tmp_path / "tile.tif"))
    with pytest.raises(UserError, match="is a folder"):
        read_header(str(tmp_path))


def test_a_tiff_cut_within_its_header_is_refused_in_one_line(tmp_path):
    path = write(tmp_path / "tile.tif", noise((3, 300, 200)), compress="deflate")
    for end in (3, 8, 100, 200):
        with pytest.raises(UserError) as error:
            read_header(damaged(path, end))
        assert "\n" not in str(error.value)


LAYOUTS = {
    "strips": {},
    "deflate": {"compress": "deflate"},
    "tiles": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "lzw"},
    "jpeg": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "jpeg", "photometric": "ycbcr"},
    "band by band": {"interleave": "band", "compress": "deflate"},
    "bigtiff": {"bigtiff": "yes", "compress": "deflate"},
    "big-endian": {"endianness": "big"},
    "one strip": {"blockysize": 200},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("short", [1, 500, 20_000])
def test_a_cut_tiff_is_known_from_its_header_and_fails_to_read_with_its_name(tmp_path, layout, short):
    path = write(tmp_path / "tile.tif", noise((3, 200, 190)), **LAYOUTS[layout])
    whole = read_header(path)
    # GDAL may leave unused bytes at the end of a file.
    padding = min(short, max(0, _unused_bytes(path)))
    header = read_header(damaged(path, Path(path).stat().st_size - short - padding))
    assert (whole.missing_bytes, header.missing_bytes) == (0, short)
    tile = Tile(header.path, Window(0, 0, 200, 190), (1, 2, 3))
    with pytest.raises(TileError, match="cannot be read") as error:
        read_window([tile], tile.window, all_valid)
    assert error.value.path == header.path and f"the file ends {short:,} bytes too early" in error.value.reason
    assert "\n" not in str(error.value)


def _unused_bytes(path: str) -> int:
    """Bytes of a TIFF behind its last strip or tile, as GDAL gives their places."""
    with rasterio.open(path) as dataset:
        ends = [0]
        for band in dataset.indexes:
            for (row, col), _ in dataset.block_windows(band):
                offset, size = (
                    dataset.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=band) for what in ("OFFSET", "SIZE")
                )
                ends.append(int(offset) + int(size))
    return Path(path).stat().st_size - max(ends)


def test_sparse_tiffs_and_cut_overviews_miss_nothing(tmp_path):
    path = str(tmp_path / "sparse.tif")
    profile = {"width": 512, "height": 512, "count": 1, "dtype": "uint8", "sparse_ok": True, "tiled": True}
    with rasterio.open(path, "w", driver="GTiff", transform=Affine(0.3, 0, 9, 0, -0.3, 9), **profile) as dataset:
        dataset.write(noise((1, 256, 256)), window=((0, 256), (0, 256)))
    assert read_header(path).missing_bytes == 0
    tile = Tile(path, Window(0, 0, 512, 512), (1,))
    image, _ = read_window([tile], tile.window, all_valid)
    assert image[0, :256, :256].all() and not image[0, 256:].any()
    path = write(tmp_path / "overviews.tif", noise((3, 256, 256)))
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2])
    assert read_header(damaged(path, Path(path).stat().st_size - 40)).missing_bytes == 0


def with_overviews(path: str) -> tuple[str, int]:
    """The same file with overviews, whose directories lie behind the image, and where the image ends."""
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    return path, Path(path).stat().st_size - _unused_bytes(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_tile_with_overviews_that_is_cut_within_its_image_is_refused_as_truncated(tmp_path, layout, share):
    path, end = with_overviews(write(tmp_path / "tile.tif", noise((3, 200, 190)), **LAYOUTS[layout]))
    broken = damaged(path, int(end * share))
    with pytest.raises(UserError) as error:
        read_headers([broken], skip=False)
    message = f"{broken}: truncated, {end - int(end * share):,} bytes are missing at its end; expected a "
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_tile_that_is_cut_within_the_directories_of_its_overviews_is_refused_in_one_line(tmp_path):
    path, end = with_overviews(write(tmp_path / "tile.tif", noise((3, 200, 190))))
    for beyond in range(0, 200, 40):
        with pytest.raises(UserError, match="header is damaged or cut off") as error:
            read_header(damaged(path, end + beyond))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", ["alpha", "per_dataset"])
def test_a_mask_in_a_tile_with_overviews_that_was_cut_after_the_plan_is_an_error_with_its_name(tmp_path, mask):
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    path, end = with_overviews(write(tmp_path / "tile.tif", noise((4, 200, 190)), colours))
    broken = damaged(path, end // 2)
    tile = Tile(broken, Window(0, 0, 200, 190), (1, 2, 3), mask=mask)
    with pytest.raises(TileError, match=r"cannot be read: .*bytes too early") as error:
        read_mask(tile, tile.window)
    assert error.value.path == broken


def test_what_gdal_cannot_say_of_the_bands_of_an_open_tile_is_an_error_with_its_name(tmp_path, monkeypatch):
    class Damaged:
        height, width, count = 8, 8, 4

        @property
        def colorinterp(self):
            raise CPLE_AppDefinedError(3, 1, "Failed to read directory at offset 99")

    tile = Tile(write(tmp_path / "tile.tif", noise((4, 8, 8))), Window(0, 0, 8, 8), (1, 2, 3), mask="alpha")
    monkeypatch.setattr(_OpenTiles, "get", lambda self, path: Damaged())
    with pytest.raises(TileError, match="cannot be read: Failed to read directory at offset 99") as error:
        read_mask(tile, tile.window)
    assert error.value.path == tile.path


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.jp2", "cut.webp", "zeroed.png", "zeroed.tif"])
def test_damaged_files_are_errors_and_never_black_pixels(tmp_path, name):
    drivers = {"jpg": "JPEG", "png": "PNG", "jp2": "JP2OpenJPEG", "webp": "WEBP", "tif": "GTiff"}
    driver = drivers[name.split(".")[1]]
    path = write(
        tmp_path / name, noise((3, 200, 190)), driver=driver, **({"compress": "lzw"} if driver == "GTiff" else {})
    )
    size = Path(path).stat().st_size
    broken = (
        damaged(path, size * 3 // 4) if name.startswith("cut") else damaged(path, zeroed=(size // 2, size // 2 + 2_000))
    )
    tile = Tile(broken, Window(0, 0, 200, 190), (1, 2, 3))
    with pytest.raises(TileError):
        read_window([tile], tile.window, all_valid)


# Mosaics


@settings(max_examples=60)
@given(data=st.data())
def test_any_window_of_overlapping_tiles_is_a_cut_of_their_mosaic(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    city = Window(-20, -30, 60, 70)
    image, valid = np.zeros((2, *city.shape_yx), np.uint8), np.zeros(city.shape_yx, bool)
    tiles, bad = [], {}
    for index in range(data.draw(st.integers(1, 4))):
        height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
        place = Window(data.draw(st.integers(-20, 0)), data.draw(st.integers(-30, 0)), height, width)
        samples = noise((3, height, width), seed=index)
        path = write(folder / f"mosaic{index}.tif", samples, tiled=True, blockxsize=16, blockysize=16)
        bad[path] = data.draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
        if bad[path] is not None:
            bad[path] = np.random.default_rng(index).random((height, width)) < bad[path]
        tiles.append(Tile(path, place, (3, 1)))
        good = np.ones((height, width), bool) if bad[path] is None else ~bad[path]
        image[(slice(None), *place.within(city))][:, good] = samples[[2, 0]][:, good]
        valid[place.within(city)] |= good

    def invalid(tile, part):
        return None if bad[tile.path] is None else bad[tile.path][part.within(tile.window)]

    row, col = data.draw(st.integers(-20, 39)), data.draw(st.integers(-30, 39))
    window = Window.between(row, col, data.draw(st.integers(row + 1, 40)), data.draw(st.integers(col + 1, 40)))
    image_CHW, valid_HW = read_window(tiles, window, invalid)
    assert image_CHW.dtype == np.uint8 and valid_HW.dtype == bool
    np.testing.assert_array_equal(valid_HW, valid[window.within(city)])
    np.testing.assert_array_equal(image_CHW, image[(slice(None), *window.within(city))])


def test_what_lies_under_invalid_pixels_never_matters(tmp_path):
    bad = np.random.default_rng(1).random((50, 60)) < 0.4
    windows = [Window(5, 5, 50, 60), Window(0, 40, 50, 60)]
    results = []
    for under in (0, 201):
        images = [np.where(bad, np.uint8(under), noise((3, 50, 60), seed=index)) for index in range(2)]
        paths = [write(tmp_path / f"{under} {index}.tif", image) for index, image in enumerate(images)]
        tiles = [Tile(path, window, (1, 2, 3)) for path, window in zip(paths, windows, strict=True)]
        results.append(read_window(tiles, Window(-3, -3, 70, 120), lambda tile, part: bad[part.within(tile.window)]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert not results[0][0][:, ~results[0][1]].any()


def test_tiles_of_different_band_numbers_or_none_are_our_own_mistake(tmp_path):
    path = write(tmp_path / "tile.tif", noise((3, 8, 8)))
    tiles = [Tile(path, Window(0, 0, 8, 8), (1, 2, 3)), Tile(path, Window(0, 0, 8, 8), (1,))]
    for some in (tiles, []):
        with pytest.raises(ValueError, match="bands"):
            read_window(some, Window(0, 0, 8, 8), all_valid)
    with pytest.raises(ValueError, match="1-based"):
        Tile(path, Window(0, 0, 8, 8), (0,))
    with pytest.raises(ValueError, match="within the tile"):
        read_samples(tiles[0], Window(0, 0, 9, 8))


def test_a_tile_that_changed_after_the_plan_is_named(tmp_path):
    path = write(tmp_path / "tile.tif", noise((3, 8, 8)))
    with pytest.raises(TileError, match="is 8 x 8 px with 3 bands, was planned as 9 x 8 px with band 3"):
        read_window([Tile(path, Window(0, 0, 8, 9), (1, 2, 3))], Window(0, 0, 8, 9), all_valid)
    with pytest.raises(TileError, match="band 4"):
        read_window([Tile(path, Window(0, 0, 8, 8), (4,))], Window(0, 0, 8, 8), all_valid)
    with pytest.raises(TileError, match="no alpha band any more"):
        read_mask(Tile(path, Window(0, 0, 8, 8), (1,), mask="alpha"), Window(0, 0, 8, 8))
    path = write(tmp_path / "deep.tif", noise((3, 8, 8)).astype(np.uint16))
    with pytest.raises(TileError, match="uint16 samples"):
        read_window([Tile(path, Window(0, 0, 8, 8), (1,))], Window(0, 0, 8, 8), all_valid)


def test_a_replaced_tile_is_opened_again_and_a_repaired_one_can_be_read(tmp_path):
    tile = Tile(str(tmp_path / "tile.tif"), Window(0, 0, 64, 64), (1, 2, 3))
    good, other = write(tmp_path / "good.tif", noise((3, 64, 64)), compress="lzw"), noise((3, 64, 64), seed=1)
    with pytest.raises(TileError, match="No such file"):
        read_window([tile], tile.window, all_valid)
    shutil.copy(damaged(good, 9_000), tile.path)
    with pytest.raises(TileError):
        read_window([tile], tile.window, all_valid)
    shutil.copy(good, tile.path)
    np.testing.assert_array_equal(read_window([tile], tile.window, all_valid)[0], noise((3, 64, 64)))
    write(tmp_path / "new.tif", other)
    (tmp_path / "new.tif").replace(tile.path)
    np.testing.assert_array_equal(read_window([tile], tile.window, all_valid)[0], other)


def test_many_tiles_in_many_threads_read_what_each_of_them_holds(tmp_path):
    size = 32
    tiles = [
        Tile(
            write(tmp_path / f"{index}.tif", noise((3, size, size), index)),
            Window(0, size * index, size, size),
            (1, 2, 3),
        )
        for index in range(OPEN_TILES + 4)
    ]
    whole = np.concatenate([noise((3, size, size), index) for index in range(len(tiles))], axis=2)
    wrong: list[int] = []
    done: list[int] = []

    def read_all(start: int) -> None:
        for col in range(start, whole.shape[2] - 40, 7):
            image, valid = read_window(tiles, Window(0, col, size, 40), all_valid)
            if not (valid.all() and (image == whole[:, :, col : col + 40]).all()):
                wrong.append(col)
        done.append(start)

    threads = [threading.Thread(target=read_all, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) == len(threads)
    # A thread's tiles are closed with it, and this one keeps the last few open.
    read_window(tiles, Window(0, 0, size, size * len(tiles)), all_valid)
    assert len([fd for fd in Path("/proc/self/fd").glob("*") if fd.resolve().parent == tmp_path]) == OPEN_TILES


# Stamps and digests


# Real data


@needs_data
def test_a_real_town_of_20_tiles_is_whole_and_equals_a_plain_mosaic():
    headers = [read_header(str(path)) for path in sorted((SHARED / "data/banepa/tiles").glob("*.tif"))]
    assert len(headers) == 20 and all(header.lossy and not header.missing_bytes for header in headers)
    tiles = []
    for header in headers:
        size, _, x, _, _, y = header.transform
        window = Window(round(-y / size), round(x / size), header.height, header.width)
        tiles.append(Tile(header.path, window, (1, 2, 3), tolerance=12.0))
    city = tiles[0].window
    for tile in tiles:
        city = city.union(tile.window)
    assert city.shape_yx == (3878, 5014)
    # A window over the corner where four tiles meet.
    corner = Window(city.row_off + 1024 - 100, city.col_off + 2048 - 150, 200, 300)
    image, valid = read_window(tiles, corner, all_valid)
    expected = np.zeros_like(image)
    for tile in tiles:
        part = tile.window.intersect(corner)
        with rasterio.open(tile.path) as dataset:
            expected[(slice(None), *part.within(corner))] = dataset.read()[(slice(None), *part.within(tile.window))]
    assert valid.all()
    np.testing.assert_array_equal(image, expected)
