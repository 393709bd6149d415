"""Windows against numpy slicing, cells against counting, the lattice against pyproj."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS, Geod, Transformer

from segpipe.tasks.grid import Cells, CellWindows, Lattice, Window, WindowIndex

SMALL = st.integers(-60, 60)
SIDE = st.integers(0, 40)
WINDOWS = st.builds(Window, SMALL, SMALL, SIDE, SIDE)
STEPS = st.integers(1, 33)
FRAME = Window(-200, -200, 400, 400)


def drawn(window: Window) -> np.ndarray:
    """The window as True in a picture of FRAME."""
    picture = np.zeros(FRAME.shape_yx, np.bool_)
    picture[window.within(FRAME)] = True
    return picture


@given(WINDOWS, WINDOWS)
def test_windows_intersect_and_unite_as_pictures_do(one: Window, other: Window) -> None:
    assert np.array_equal(drawn(one.intersect(other)), drawn(one) & drawn(other))
    both = one.union(other)
    rows = [one.row_off, other.row_off, one.row_stop, other.row_stop]
    cols = [one.col_off, other.col_off, one.col_stop, other.col_stop]
    assert (both.row_off, both.row_stop, both.col_off, both.col_stop) == (min(rows), max(rows), min(cols), max(cols))
    if other.pixels:
        assert one.contains(other) == (not (drawn(other) & ~drawn(one)).any())


@given(WINDOWS, st.integers(0, 50), st.integers(0, 10_000))
def test_a_window_cut_out_of_a_padded_one_is_the_same_part_of_the_array(window: Window, px: int, seed: int) -> None:
    outer = window.pad(px)
    assert outer.shape_yx == (window.height + 2 * px, window.width + 2 * px)
    array = np.random.default_rng(seed).integers(0, 255, outer.shape_yx)
    expected = array[px : px + window.height, px : px + window.width]
    assert np.array_equal(array[window.within(outer)], expected)


@given(WINDOWS.filter(lambda w: w.pixels > 0), STEPS)
def test_snapping_gives_the_smallest_window_on_the_step(window: Window, step: int) -> None:
    snapped = window.snap(step)
    sides = (snapped.row_off, snapped.col_off, snapped.row_stop, snapped.col_stop)
    assert all(side % step == 0 for side in sides)
    assert snapped.contains(window)
    assert snapped.height < window.height + 2 * step
    assert snapped.width < window.width + 2 * step
    assert snapped.snap(step) == snapped
    before = (window.row_off - snapped.row_off, window.col_off - snapped.col_off)
    after = (snapped.row_stop - window.row_stop, snapped.col_stop - window.col_stop)
    assert all(0 <= s < step for s in before + after)


@given(WINDOWS.filter(lambda w: w.pixels > 0), STEPS)
def test_halves_make_up_the_window_and_are_cut_on_the_step(window: Window, step: int) -> None:
    halves = window.halves(step)
    longer = max(window.shape_yx)
    if halves is None:
        assert longer < 2 * step
        return
    one, other = halves
    assert one.pixels and other.pixels
    assert np.array_equal(drawn(one) ^ drawn(other), drawn(window))
    cut = other.row_off if one.col_off == other.col_off else other.col_off
    assert cut % step == 0
    assert abs(max(one.shape_yx) - longer / 2) <= step or max(one.shape_yx) <= min(window.shape_yx)


@given(WINDOWS, STEPS)
def test_cells_cover_a_window_exactly_once_and_in_order(window: Window, step: int) -> None:
    cells = list(window.cells(step))
    assert cells == sorted(set(cells))
    count = np.zeros(FRAME.shape_yx, np.int64)
    for cell in cells:
        part = Window.cell(*cell, step).intersect(window)
        assert part.pixels
        count[part.within(FRAME)] += 1
    assert np.array_equal(count, drawn(window).astype(np.int64))


@given(WINDOWS, STEPS, st.integers(1, 4))
def test_a_cell_of_several_steps_is_whole_cells_of_one(window: Window, step: int, factor: int) -> None:
    for row, col in window.cells(step * factor):
        inside = list(Window.cell(row, col, step * factor).cells(step))
        assert len(inside) == factor**2
        assert all((r // factor, c // factor) == (row, col) for r, c in inside)


@given(st.lists(WINDOWS, max_size=12), st.integers(1, 60), st.lists(WINDOWS, max_size=8))
def test_an_index_finds_the_windows_that_share_a_pixel_with_another_one_in_their_order(
    windows: list[Window], times: int, asked: list[Window]
) -> None:
    # One of them may be as large as many others.
    windows = [*windows, Window(-60, -60, times, 60 * times)]
    index = WindowIndex(windows)
    for window in [*asked, Window(-4000, -4000, 8000, 8000)]:
        expected = [n for n, one in enumerate(windows) if one.intersect(window).pixels]
        assert index.meeting(window) == expected
        assert expected == [n for n, one in enumerate(windows) if one.meets(window)]


CELLS = st.sets(st.tuples(st.integers(-(2**24), 2**24), st.integers(-(2**24), 2**24)) | st.tuples(SMALL, SMALL))


@given(CELLS, SMALL, SMALL, SIDE)
def test_cells_are_what_a_sorted_list_of_them_would_be(
    cells: set[tuple[int, int]], row: int, col: int, count: int
) -> None:
    rising = sorted(cells)
    held = Cells(rising)
    assert [*held] == [held[n] for n in range(len(held))] == rising
    assert [held[n] for n in held.within(row, col, col + count)] == [
        cell for cell in rising if cell[0] == row and col <= cell[1] < col + count
    ]
    assert ((row, col) in held) == ((row, col) in cells)
    assert [*held.take(range(0, len(held), 2))] == rising[::2]
    assert [*CellWindows(held, 7)] == [Window.cell(*cell, 7) for cell in rising]


def test_cells_out_of_order_or_twice_are_refused() -> None:
    for cells in [(0, 1), (0, 0)], [(0, 1), (0, 1)]:
        with pytest.raises(ValueError, match="out of order"):
            Cells(cells)


def test_a_window_with_a_negative_side_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 x 5 px"):
        Window(0, 0, -1, 5)


@pytest.mark.parametrize("size", [0.0, -0.3, math.nan, math.inf])
def test_a_lattice_without_a_positive_pixel_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Lattice("", size, 0.0, 0.0)


@given(st.integers(-(10**7), 10**7), st.integers(-(10**7), 10**7), st.integers(0, 10_000), st.integers(0, 10_000))
def test_bounds_are_the_transform_of_the_corners(row: int, col: int, height: int, width: int) -> None:
    lattice = Lattice("", 0.3, 0.1, 0.2)
    xmin, ymin, xmax, ymax = lattice.bounds(Window(row, col, height, width))
    assert lattice.transform(row, col) * (0, 0) == pytest.approx((xmin, ymax), abs=1e-6)
    assert lattice.transform(row, col) * (width, height) == pytest.approx((xmax, ymin), abs=1e-6)
    assert xmax - xmin == pytest.approx(width * 0.3, abs=1e-6)
    assert ymax - ymin == pytest.approx(height * 0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("crs", "lon", "lat", "size"),
    [
        ("EPSG:32633", 13.4, 52.5, 0.3),
        ("EPSG:3857", 16.4, 48.2, 0.45),
        ("EPSG:2263", -74.0, 40.7, 1.0),
        ("EPSG:27572", 2.3, 48.9, 0.3),
    ],
)
def test_ground_pixels_are_as_long_as_geodesics_whatever_unit_and_scale(
    crs: str, lon: float, lat: float, size: float
) -> None:
    # EPSG:2263 counts in US feet; EPSG:3857 is stretched by 1 / cos(latitude); EPSG:27572's degrees are grads.
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    lattice = Lattice(CRS.from_user_input(crs).to_wkt(), size, 0.0, 0.0)
    row, col = -y / size, x / size
    back = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    ends = [back.transform(x + dx * size, y + dy * size) for dx, dy in ((-50, 0), (50, 0), (0, -50), (0, 50))]
    geod = Geod(ellps="GRS80")
    east = geod.inv(*ends[0], *ends[1])[2] / 100
    north = geod.inv(*ends[2], *ends[3])[2] / 100
    found = float(lattice.ground_pixel_m(np.array([row]), np.array([col]))[0])
    assert found == pytest.approx(math.sqrt(east * north), rel=1e-4)
