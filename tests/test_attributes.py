"""What is said of a building, against pixels counted one by one."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import LATTICE, THOROUGH, THRESHOLD, cities, cut, vectorize_in_pieces
from scipy import ndimage

from segpipe.tasks.attributes import Imagery, publishable
from segpipe.tasks.grid import Window
from segpipe.tasks.vectorize import VectorSettings, mask_of

law = settings(max_examples=150 if THOROUGH else 25, derandomize=not THOROUGH, database=None, deadline=None)
PLAIN = VectorSettings(THRESHOLD, 0, 2, 0)
CROSS = ndimage.generate_binary_structure(2, 1)


@law
@given(cities(120), st.booleans())
def test_edge_confidence_and_touching_nodata_are_those_of_the_pixels_for_any_cut(city, in_pieces) -> None:
    prob, window, seed = city
    blocks = cut(window, np.random.default_rng(seed)) if in_pieces else [window]
    rows = publishable(vectorize_in_pieces(prob, window, blocks, PLAIN), LATTICE, Imagery()).to_pylist()
    labels, count = ndimage.label(mask_of(prob, THRESHOLD))
    assert len(rows) == count
    by_id = {row["building_id"]: row for row in rows}
    invalid = np.pad(prob == 255, 1, constant_values=True)
    for number in range(1, count + 1):
        inside = np.pad(labels == number, 1)
        edge = (inside & ~ndimage.binary_erosion(inside, CROSS))[1:-1, 1:-1]
        row, col = np.argwhere(inside[1:-1, 1:-1])[0] + (window.row_off, window.col_off)
        found = by_id[f"{'N' if row < 0 else 'S'}{abs(row)}{'E' if col >= 0 else 'W'}{abs(col)}"]
        assert found["edge_confidence"] == pytest.approx(prob[edge].mean() / 250, abs=5.1e-5)
        assert found["touches_nodata"] == bool((ndimage.binary_dilation(inside, CROSS) & invalid).any())


@law
@given(cities(120))
def test_attributes_are_the_same_for_any_cut(city) -> None:
    prob, window, seed = city
    rng = np.random.default_rng(seed)
    tiles = cut(window, rng, 20, 90)
    imagery = Imagery([f"{n}.tif" for n in range(len(tiles))], tiles, window)
    settings_ = VectorSettings(THRESHOLD, 0, 2, 0.3, "orthogonal")
    pieces, whole = (vectorize_in_pieces(prob, window, it, settings_) for it in (cut(window, rng), [window]))
    assert publishable(pieces, LATTICE, imagery).equals(publishable(whole, LATTICE, imagery))


@law
@given(cities(100))
def test_tiles_are_those_that_hold_one_of_the_pixels_and_edges_those_beyond_which_no_tile_is(city) -> None:
    prob, window, seed = city
    rng = np.random.default_rng(seed)
    tiles = [it.intersect(window) for it in cut(window, rng, 8, 50) if rng.random() < 0.8]
    names = [f"{n}.tif" for n in range(len(tiles))]
    # Without holes: filled pixels are no building's.
    prob = np.where(ndimage.binary_fill_holes(prob >= THRESHOLD), np.maximum(prob, THRESHOLD), prob).astype(np.uint8)
    prob[prob > 250] = 250
    owner = np.zeros(window.shape_yx, np.bool_)
    for tile in tiles:
        owner[tile.intersect(window).within(window)] = True
    prob[~owner] = 255
    buildings = vectorize_in_pieces(prob, window, [window], PLAIN)
    rows = publishable(buildings, LATTICE, Imagery(names, tiles)).to_pylist()
    labels = ndimage.label(mask_of(prob, THRESHOLD))[0]
    beyond = np.pad(~owner, 1, constant_values=True)
    for row, key_row, key_col in zip(rows, buildings.key_row, buildings.key_col, strict=True):
        inside = labels == labels[key_row - window.row_off, key_col - window.col_off]
        on = [
            name for name, tile in zip(names, tiles, strict=True) if inside[tile.intersect(window).within(window)].any()
        ]
        assert row["tiles"] == ", ".join(on)
        touches = (ndimage.binary_dilation(np.pad(inside, 1), CROSS) & beyond).any()
        assert row["touches_edge"] == bool(touches)


def test_the_edge_of_the_imagery_is_where_its_last_valid_pixels_are_whatever_collar_a_tile_has() -> None:
    prob = np.full((20, 20), 255, np.uint8)
    prob[5:15, 5:15] = 10
    prob[5:8, 7:10] = 200
    prob[10:12, 10:12] = 200
    wide, tight = Window(100, 100, 20, 20), Window(105, 105, 10, 10)
    rows = [
        publishable(vectorize_in_pieces(prob, wide, [wide], PLAIN), LATTICE, Imagery(["a"], [tile], tight)).to_pylist()
        for tile in (wide, tight)
    ]
    assert rows[0] == rows[1]
    assert [row["touches_edge"] for row in rows[0]] == [True, False]


def test_measures_of_a_known_building() -> None:
    prob = np.full((12, 14), 10, np.uint8)
    prob[2:10, 2:12] = 250
    prob[4:8, 4:8] = 10
    prob[2, 2] = 125
    window = Window(-10_150_000, 1_100_000, *prob.shape)
    buildings = vectorize_in_pieces(prob, window, [window], VectorSettings(THRESHOLD, 0, 0, 0))
    (row,) = publishable(buildings, LATTICE, Imagery(["a.tif"], [window])).to_pylist()
    pixel_m = float(buildings.pixel_m[0])
    assert row["area_m2"] == round(64 * pixel_m**2, 2)
    assert row["perimeter_m"] == round((36 + 16) * pixel_m, 2)
    assert (row["pixels"], row["holes"], row["outline"], row["tiles"]) == (64, 1, "raw", "a.tif")
    assert row["rectangularity"] == pytest.approx(64 / 80, abs=1e-4)
    edge = 2 * 10 + 2 * 6 + 2 * 4 + 2 * 4
    assert row["edge_confidence"] == pytest.approx((edge - 0.5) / edge, abs=5.1e-5)
    assert not row["touches_nodata"] and not row["touches_edge"] and not row["cut"]


def test_review_puts_doubtful_buildings_before_sure_ones() -> None:
    prob = np.full((30, 90), 10, np.uint8)
    prob[5:25, 5:25] = 250
    prob[5:25, 35:55] = 120
    prob[5:25, 65:85] = 250
    prob[5:25, 85:] = 255
    window = Window(0, 0, *prob.shape)
    rows = publishable(vectorize_in_pieces(prob, window, [window], PLAIN), LATTICE, Imagery()).to_pylist()
    sure, weak, cut_off = (row["review"] for row in rows)
    assert sure == 0
    assert weak > cut_off > sure
    assert all(0 <= row["review"] < 1 for row in rows)


def test_shapes_are_what_they_were_before_attributes_were_made() -> None:
    prob = np.full((30, 30), 10, np.uint8)
    prob[5:25, 5:25] = 250
    window = Window(0, 0, 30, 30)
    buildings = vectorize_in_pieces(prob, window, [window], PLAIN)
    before = shapely.to_wkb(buildings.geometry).tolist()
    publishable(buildings, LATTICE, Imagery())
    assert shapely.to_wkb(buildings.geometry).tolist() == before
