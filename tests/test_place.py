"""Where tiles lie: CRS, resolution, lattice, mosaics, groups; and warped pixels, with GDAL and SciPy as oracles."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from pyproj import CRS, Transformer
from rasterio.warp import Resampling, calculate_default_transform, reproject
from scipy.ndimage import map_coordinates

from segpipe.pipeline.place import check_scattered, one_wording, place_tiles, settled_mosaics
from segpipe.tasks.errors import UserError
from segpipe.tasks.grid import Window
from segpipe.tasks.mosaic import CELL_PX
from segpipe.tasks.read import Tile, TileHeader, read_header, read_window

UTM = "EPSG:32633"
X, Y = 500_100.0, 5_300_100.0
"""A place near the middle of zone 33, about 15 degrees east and 47.85 north."""


def header(transform: Affine, crs: str | None = UTM, side: int = 500, path: str = "tile.tif") -> TileHeader:
    numbers = tuple(float(v) for v in transform[:6])
    return TileHeader(
        path=path, width=side, height=side, bands=3, dtype="uint8", crs_wkt=crs and CRS(crs).to_wkt(),
        transform=numbers, nodata=None, lossy=False, mask="none", colours=(), block_shape_yx=(256, 256),
        missing_bytes=0,
    )  # fmt: skip


def utm(col: float = 0, row: float = 0, size: float = 0.3) -> Affine:
    return Affine(size, 0, X + col * size, 0, -size, Y - row * size)


def degrees(col: float = 0, row: float = 0, a: float = 4e-6, e: float = 2.7e-6) -> Affine:
    return Affine(a, 0, 15.0 + col * a, 0, -e, 47.85 - row * e)


# CRS


def test_the_crs_is_that_of_most_tiles_and_the_others_are_warped() -> None:
    headers = [header(utm()), header(degrees(), "EPSG:4326"), header(utm(500))]
    placement = place_tiles(headers)
    assert CRS(placement.lattice.crs_wkt) == CRS(UTM)
    assert [place.mosaic is None for place in placement.places] == [True, False, True]


@pytest.mark.parametrize(("lon", "lat", "zone"), [(15.0, 47.85, 32633), (-58.4, -34.6, 32721), (5.999, 60.0, 32631)])
def test_tiles_in_degrees_come_into_the_utm_zone_of_their_centre(lon: float, lat: float, zone: int) -> None:
    place = Affine(3e-6, 0, lon, 0, -3e-6, lat)
    placement = place_tiles([header(place, "EPSG:4326")])
    assert CRS(placement.lattice.crs_wkt).to_epsg() == zone


def test_crss_that_differ_in_wording_alone_are_one() -> None:
    with_shift = CRS("+proj=utm +zone=33 +ellps=WGS84 +towgs84=0,0,0 +units=m +type=crs").to_wkt()
    esri = CRS(UTM).to_wkt("WKT1_ESRI")
    compound = CRS("EPSG:32633+5773").to_wkt()
    headers = [header(utm()), *(header(utm(500 * n), wkt) for n, wkt in enumerate((with_shift, esri, compound), 1))]
    assert not place_tiles(headers).mosaics


@pytest.mark.parametrize("code", [3067, 3878, 3879, 5110, 3178, 3189, 25832, 3006, 2180, 28992])
def test_a_crs_in_gdals_words_is_epsgs_of_its_number(code: int) -> None:
    assert one_wording(rasterio.crs.CRS.from_epsg(code).to_wkt()) == CRS.from_epsg(code)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ('PARAMETER["central_meridian",27]', 'PARAMETER["central_meridian",24]'),
        ('PARAMETER["false_easting",500000]', 'PARAMETER["false_easting",400000]'),
        ('SPHEROID["GRS 1980",6378137,298.257222101', 'SPHEROID["other",6378388,297'),
        ('PRIMEM["Greenwich",0', 'PRIMEM["Paris",2.33722917'),
        ('AUTHORITY["EPSG","3067"]]', 'AUTHORITY["EPSG","999999"]]'),
        ('AUTHORITY["EPSG","3067"]]', 'AUTHORITY["ESRI","3067"]]'),
    ],
)
def test_a_crs_that_gives_itself_a_number_that_is_not_its_own_stays_what_it_is(own: str, other: str) -> None:
    wkt = rasterio.crs.CRS.from_epsg(3067).to_wkt()
    assert own in wkt
    wrong = wkt.replace(own, other)
    assert one_wording(wrong) == CRS.from_wkt(wrong) != CRS.from_epsg(3067)


def test_a_crs_in_degrees_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match=r"grid\.crs: EPSG:4326 counts in degrees"):
        place_tiles([header(utm())], crs="EPSG:4326")
    with pytest.raises(UserError, match=r"grid\.crs: EPSG:99 is not a CRS"):
        place_tiles([header(utm())], crs="EPSG:99")


def test_coordinates_that_are_none_of_their_crs_are_refused() -> None:
    with pytest.raises(UserError, match=r"tile\.tif"):
        place_tiles([header(utm(), "EPSG:4326")])


# Resolution


@pytest.mark.parametrize(
    ("size", "model", "asked", "expected"),
    [
        (0.3, 0.3, None, 0.3),
        (0.2, 0.3, None, 0.3),
        (0.29, 0.3, None, 0.29),
        (0.5, 0.3, None, 0.5),
        (0.3, 0.3, 0.45, 0.45),
        (0.45, 0.3, 0.3, 0.3),
        (0.2, 0.3, 0.2, 0.2),
    ],
)
def test_finer_tiles_come_to_the_models_resolution_and_coarser_ones_keep_theirs(
    size: float, model: float, asked: float | None, expected: float
) -> None:
    placement = place_tiles([header(utm(size=size))], resolution_m=asked, model_resolution_m=model)
    assert placement.lattice.pixel_size == pytest.approx(expected)
    (place,) = placement.places
    if size == expected:
        assert place.mosaic is None
    else:
        assert place.mosaic is not None
        assert place.mosaic.resampling == ("average" if size < expected else "bilinear")


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:2263", "EPSG:31256"])
def test_the_lattice_counts_ground_metres_in_any_unit_and_scale(crs: str) -> None:
    lon, lat = (-74.0, 40.7) if crs == "EPSG:2263" else (16.4, 48.2)
    place = Affine(2e-6, 0, lon, 0, -2e-6, lat)
    lattice = place_tiles([header(place, "EPSG:4326")], crs=crs, resolution_m=0.3).lattice
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    col, row = ~lattice.transform() * (x, y)
    assert float(lattice.ground_pixel_m(np.array([row]), np.array([col]))[0]) == pytest.approx(0.3, rel=0.006)


# Mosaics


def test_tiles_whose_pixels_differ_in_the_ninth_digit_are_one_mosaic_without_gap_or_doubled_line() -> None:
    rng = np.random.default_rng(0)
    headers = []
    for row in range(4):
        for col in range(4):
            a, e = 4e-6 * (1 + rng.uniform(-2e-9, 2e-9)), 2.7e-6 * (1 + rng.uniform(-2e-9, 2e-9))
            place = Affine(a, 0, 15 + col * 500 * 4e-6, 0, -e, 47.85 - row * 500 * 2.7e-6)
            headers.append(header(place, "EPSG:4326"))
    placement = place_tiles(headers)
    assert len(placement.mosaics) == 1
    expected = [Window(row * 500, col * 500, 500, 500) for row in range(4) for col in range(4)]
    assert [place.window for place in placement.places] == expected


def test_a_tile_half_a_pixel_off_is_shifted_by_a_mosaic_of_its_own() -> None:
    placement = place_tiles([header(utm()), header(utm(500.5)), header(utm(1000)), header(utm(0.0, 500.5))])
    assert [place.mosaic is None for place in placement.places] == [True, False, True, False]
    assert len(placement.mosaics) == 2


def test_what_the_first_run_settled_stays_whichever_tile_comes_first_later() -> None:
    first = [header(degrees(), "EPSG:4326"), header(degrees(500), "EPSG:4326")]
    placement = place_tiles(first, resolution_m=0.3)
    stored = {
        "lattice": {name: getattr(placement.lattice, name) for name in ("crs_wkt", "pixel_size", "phase_x", "phase_y")},
        "mosaics": settled_mosaics(placement.mosaics),
    }
    west = header(degrees(-4500), "EPSG:4326")
    grown = place_tiles([west, *first], resolution_m=0.3, stored=stored)
    assert grown.places[1:] == placement.places
    assert grown.places[0].window == Window(0, -4500, 500, 500)


def test_scattered_tiles_are_refused_by_groups() -> None:
    headers = [header(utm(500 * n), path=f"tiles/{n}.tif") for n in range(5)] + [
        header(utm(90_000, 70_000), path="far")
    ]
    with pytest.raises(UserError) as refused:
        check_scattered(headers, place_tiles(headers))
    assert all(
        word in str(refused.value) for word in ("2 groups", "5 around tiles/0.tif", "1 around far", "sparse: true")
    )
    check_scattered(headers[:5], place_tiles(headers[:5]))


# Pixels


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth enough that a shift of a pixel is seen, rough enough that a lost line is."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(rows / (7 + band) + cols / (11 - band)) for band in range(3)]
    return np.clip(np.stack(waves) + rng.normal(0, 12, (3, height, width)), 1, 255).astype(np.uint8)


def write(path: Path, image: np.ndarray, transform: Affine, crs: str) -> str:
    profile: dict[str, Any] = {"driver": "GTiff", "count": 3, "height": image.shape[1], "width": image.shape[2]}
    with rasterio.open(path, "w", dtype="uint8", crs=crs, transform=transform, **profile) as dataset:
        dataset.write(image)
    return str(path)


def placed(paths: list[str], **options: Any) -> list[Tile]:
    headers = [read_header(path) for path in paths]
    places = place_tiles(headers, **options).places
    return [
        Tile(it.path, place.window, (1, 2, 3), mosaic=place.mosaic, warped_cover=place.cover)
        for it, place in zip(headers, places, strict=True)
    ]


def in_chunks(tiles: list[Tile], bounds: Window, chunk_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole of bounds, read chunk by chunk from just the tiles that cover each."""
    image, valid = np.zeros((3, *bounds.shape_yx), np.uint8), np.zeros(bounds.shape_yx, bool)
    for cell in bounds.cells(chunk_px):
        chunk = Window.cell(*cell, chunk_px).intersect(bounds)
        seen = [tile for tile in tiles if tile.cover.intersect(chunk).pixels]
        if seen:
            part, ok = read_window(seen, chunk, lambda tile, window: None)
            image[(..., *chunk.within(bounds))], valid[chunk.within(bounds)] = part, ok
    return image, valid


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "turned", "finer"])
def test_warped_pixels_do_not_depend_on_the_chunks_nor_on_how_the_source_was_cut(tmp_path: Path, crs: str) -> None:
    image = picture(500, 700)
    transform, wkt, options = {
        "EPSG:4326": (degrees(), "EPSG:4326", {"resolution_m": 0.3}),
        "EPSG:3857": (Affine(0.45, 0, 1_670_000, 0, -0.45, 6_090_000), "EPSG:3857", {"crs": UTM, "resolution_m": 0.3}),
        "turned": (utm() * Affine.rotation(20), UTM, {"resolution_m": 0.3}),
        "finer": (utm(size=0.2), UTM, {"resolution_m": 0.3}),
    }[crs]
    whole = placed([write(tmp_path / "whole.tif", image, transform, wkt)], **options)
    bounds = whole[0].cover
    assert len([*bounds.cells(CELL_PX)]) > 1
    expected = in_chunks(whole, bounds, CELL_PX)
    assert expected[1].mean() > 0.4
    for chunk_px in (256, 1024, 96):
        assert all(map(np.array_equal, in_chunks(whole, bounds, chunk_px), expected))
    halves = [
        write(tmp_path / "left.tif", image[:, :, :333], transform, wkt),
        write(tmp_path / "right.tif", image[:, :, 333:], transform * Affine.translation(333, 0), wkt),
    ]
    cut = placed(halves, **options)
    assert cut[0].mosaic == cut[1].mosaic == whole[0].mosaic
    assert all(map(np.array_equal, in_chunks(cut, bounds, 256), expected))


def test_warping_is_gdals_with_an_exact_transformer(tmp_path: Path) -> None:
    image = picture(700, 800)
    (tile,) = placed([write(tmp_path / "tile.tif", image, degrees(), "EPSG:4326")], resolution_m=0.3)
    assert tile.mosaic is not None
    cell = Window.cell(*next(tile.cover.cells(CELL_PX)), CELL_PX)
    found, valid = in_chunks([tile], cell, CELL_PX)
    expected = np.zeros((3, CELL_PX, CELL_PX), np.uint8)
    reproject(
        image, expected, src_transform=degrees(), src_crs="EPSG:4326", resampling=Resampling.bilinear, tolerance=0,
        dst_transform=tile.mosaic.lattice.transform(cell.row_off, cell.col_off), dst_crs=UTM,
    )  # fmt: skip
    assert valid.any()
    inside = valid & (expected > 0).all(axis=0)
    # Up to the kernel's last digit, which depends on the window that GDAL is asked for.
    assert np.abs(found.astype(int) - expected)[:, inside].max() <= 1


@pytest.mark.parametrize("angle", [2, 20, 45, 117])
def test_a_turned_tile_is_interpolated_and_not_smoothed(tmp_path: Path, angle: float) -> None:
    image = np.random.default_rng(3).integers(1, 256, (3, 900, 900), np.uint8)
    transform = utm() * Affine.rotation(angle)
    (tile,) = placed([write(tmp_path / "tile.tif", image, transform, UTM)], crs=UTM, resolution_m=0.3)
    assert tile.mosaic is not None
    found, valid = in_chunks([tile], tile.cover, CELL_PX)
    rows, cols = np.nonzero(valid)
    x, y = tile.mosaic.lattice.transform(tile.cover.row_off, tile.cover.col_off) * (cols + 0.5, rows + 0.5)
    col, row = ~transform * (x, y)
    inside = (np.minimum(row, col) > 1) & (np.maximum(row, col) < 899)
    assert inside.sum() > 300_000
    for band, expected in zip(found, image, strict=True):
        interpolated = map_coordinates(expected.astype(float), [row[inside] - 0.5, col[inside] - 0.5], order=1)
        assert np.abs(band[rows[inside], cols[inside]] - interpolated).max() <= 0.51


def test_pixels_that_are_narrow_one_way_are_smoothed_that_way(tmp_path: Path) -> None:
    image = np.random.default_rng(3).integers(1, 256, (3, 300, 600), np.uint8)
    transform = Affine(0.22, 0, X, 0, -0.4, Y)
    (tile,) = placed([write(tmp_path / "tile.tif", image, transform, UTM)], crs=UTM, resolution_m=0.3)
    assert tile.mosaic is not None
    assert tile.mosaic.resampling == "bilinear"
    assert tile.mosaic.scale(Window(5, 9, 64, 64)) == pytest.approx((0.22 / 0.3, 0.4 / 0.3))


def test_a_warped_tile_lies_where_it_lies(tmp_path: Path) -> None:
    image = np.full((3, 400, 400), 60, np.uint8)
    image[:, 150:250, 100:300] = 220
    source = write(tmp_path / "utm.tif", image, utm(), UTM)
    with rasterio.open(source) as dataset:
        transform, width, height = calculate_default_transform(UTM, "EPSG:4326", 400, 400, *dataset.bounds)
        turned = np.zeros((3, height, width), np.uint8)
        reproject(
            dataset.read(), turned, src_transform=dataset.transform, src_crs=UTM, dst_transform=transform,
            dst_crs="EPSG:4326", resampling=Resampling.bilinear,
        )  # fmt: skip
    path = write(tmp_path / "degrees.tif", turned, transform, "EPSG:4326")
    back, copy = placed([path], crs=UTM, resolution_m=0.3), placed([source])
    lattice = back[0].mosaic.lattice if back[0].mosaic else None
    assert lattice is not None
    found, _ = in_chunks(back, back[0].cover, 512)
    house = np.argwhere(found[0] > 140)
    (top, left), (bottom, right) = house.min(axis=0), house.max(axis=0) + 1
    xmin, ymax = lattice.transform(back[0].cover.row_off, back[0].cover.col_off) * (left, top)
    assert (xmin, ymax) == pytest.approx((X + 100 * 0.3, Y - 150 * 0.3), abs=0.4)
    assert (right - left, bottom - top) == (pytest.approx(200, abs=2), pytest.approx(100, abs=2))
    assert copy[0].mosaic is None


def test_finer_imagery_is_the_mean_of_its_area(tmp_path: Path) -> None:
    image = picture(600, 600)
    (tile,) = placed([write(tmp_path / "fine.tif", image, utm(size=0.15), UTM)], resolution_m=0.3)
    found, valid = in_chunks([tile], tile.cover, 512)
    mean = image.reshape(3, 300, 2, 300, 2).mean(axis=(2, 4))
    inner = found[:, valid]
    assert abs(inner.mean() - mean.mean()) < 0.5
    assert inner.std() == pytest.approx(mean.std(), rel=0.1)


def test_invalid_pixels_have_no_share_in_any_value(tmp_path: Path) -> None:
    image = np.full((3, 300, 300), 200, np.uint8)
    image[:, :, 150:] = 7
    (tile,) = placed([write(tmp_path / "tile.tif", image, degrees(), "EPSG:4326")], resolution_m=0.3)
    bounds = tile.cover

    def invalid(it: Tile, window: Window) -> np.ndarray:
        bad = np.zeros(window.shape_yx, bool)
        bad[:, max(0, 150 - window.col_off) :] = True
        return bad

    found, valid = read_window([tile], bounds, invalid)
    assert set(np.unique(found[:, valid])) == {200}
    assert valid.any()
    assert not found[:, ~valid].any()
