import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import LATTICE, RAW, THOROUGH, THRESHOLD, cities, reader
from rasterio.features import rasterize
from scipy import ndimage
from shapely.affinity import translate

from segpipe.tasks import vectorize
from segpipe.tasks.attributes import SCHEMA, Imagery, publishable
from segpipe.tasks.fragments import border_from_bytes, finished_from_bytes, fragment_to_bytes, sides_from_bytes
from segpipe.tasks.grid import Window
from segpipe.tasks.vectorize import (
    Buildings,
    VectorSettings,
    building_ids,
    finish,
    mask_of,
    polygonize,
    vectorize_block,
)

law = settings(max_examples=200 if THOROUGH else 30, derandomize=not THOROUGH, database=None)
PIXEL_M2 = 0.09


def components_of(prob, window):
    return polygonize(mask_of(prob, THRESHOLD), prob, window.row_off, window.col_off)[1]


def finished(prob, window, chosen):
    return finish(components_of(prob, window), chosen, LATTICE, reader(prob, window))


def drawn(rows, inside=200):
    """Probabilities from rows of text: # is a building, x invalid."""
    values = {"#": inside, "x": 255, ".": 10}
    return np.array([[values[letter] for letter in row] for row in rows], np.uint8)


@pytest.mark.parametrize("value", [0, 251, -3])
def test_thresholds_that_are_no_probability_are_refused(value):
    with pytest.raises(ValueError, match="threshold_u8"):
        VectorSettings(value, 10, 2, 0.3)


@pytest.mark.parametrize("bad", [(-1, 0, 0), (0, float("nan"), 0), (0, 0, float("inf"))])
def test_negative_and_endless_settings_are_refused(bad):
    with pytest.raises(ValueError, match="expected a number of 0 or more"):
        VectorSettings(100, *bad)


def test_a_pixel_is_a_buildings_from_the_threshold_on_and_never_where_invalid():
    prob = np.array([[99, 100, 250, 251, 255]], np.uint8)
    assert mask_of(prob, 100).tolist() == [[False, True, True, False, False]]


@law
@given(cities(100))
def test_outlines_are_canonical(city):
    prob, window, _ = city
    for polygon in components_of(prob, window).geometry:
        starts = []
        for index, ring in enumerate((polygon.exterior, *polygon.interiors)):
            points = shapely.get_coordinates(ring)[:-1]
            steps = np.roll(points, -1, 0) - points
            assert ((steps == 0).sum(axis=1) == 1).all(), "every side is horizontal or vertical"
            assert ((steps[:, 0] == 0) != (np.roll(steps, 1, 0)[:, 0] == 0)).all(), "every vertex is a corner"
            starts.append(tuple(points[0, ::-1]))
            assert starts[-1] == min(map(tuple, points[:, ::-1]))
            assert ring.is_ccw == (index == 0)
        assert starts[1:] == sorted(starts[1:])


@law
@given(cities(60))
def test_side_labels_are_the_pieces_along_the_sides(city):
    prob, window, _ = city
    fragment = vectorize_block(prob, window, LATTICE, RAW)
    labels = ndimage.label(mask_of(prob, THRESHOLD))[0]
    sides = fragment.sides
    for side, line in (
        (sides.top, labels[0]),
        (sides.bottom, labels[-1]),
        (sides.left, labels[:, 0]),
        (sides.right, labels[:, -1]),
    ):
        assert side.dtype == np.int32
        assert side.shape == line.shape
        for label, component in zip(side.tolist(), line.tolist(), strict=True):
            assert (label == 0) == (component == 0)
            if label:
                row, col = np.argwhere(labels == component)[0]
                key = sides.key_row[label - 1] - window.row_off, sides.key_col[label - 1] - window.col_off
                assert key == (row, col)
    assert set(np.concatenate([sides.top, sides.bottom, sides.left, sides.right]).tolist()) | {0} == set(
        range(len(fragment.border) + 1)
    )


@law
@given(cities(100))
def test_every_pixel_is_counted_once(city):
    prob, window, _ = city
    fragment = vectorize_block(prob, window, LATTICE, RAW)
    assert fragment.valid_pixels == (prob <= 250).sum()
    assert fragment.valid_pixels + fragment.invalid_pixels == window.pixels
    assert fragment.mask_pixels == mask_of(prob, THRESHOLD).sum()
    assert fragment.mask_pixels == fragment.finished.pixels.sum() + fragment.border.pixels.sum()


@law
@given(cities(100), st.sampled_from([0.1, 1.0, 10.0]))
def test_holes_are_filled_if_small_valid_and_without_building(city, fill_holes_m2):
    prob, window, _ = city
    raw = components_of(prob, window)
    buildings = finished(prob, window, VectorSettings(THRESHOLD, 0, fill_holes_m2, 0))
    mask, expected = mask_of(prob, THRESHOLD), []
    for polygon, pixel_m in zip(raw.geometry, buildings.pixel_m, strict=True):
        kept = []
        for ring in polygon.interiors:
            hole = translate(shapely.Polygon(ring), -window.col_off, -window.row_off)
            inside = rasterize([hole], out_shape=prob.shape).astype(bool)
            small = inside.sum() * pixel_m**2 < fill_holes_m2
            if not small or mask[inside].any() or (prob[inside] == 255).any():
                kept.append(ring)
        expected.append(shapely.Polygon(polygon.exterior, kept))
    assert shapely.to_wkb(buildings.geometry).tolist() == shapely.to_wkb(np.array(expected, np.object_)).tolist()
    assert shapely.area(buildings.geometry).tolist() == buildings.area_px.tolist()
    assert buildings.pixels.tolist() == raw.pixels.tolist()


def test_small_buildings_are_dropped_by_their_area_after_filling():
    prob = drawn(["........", ".###.##.", ".#.#.##.", ".###.#..", "........"])
    window = Window(-15_000, 1_000_000, 5, 8)
    for least_px, left in ((8.9, 1), (9.1, 0), (4.9, 2)):
        chosen = VectorSettings(THRESHOLD, least_px * PIXEL_M2, 2, 0)
        assert len(finished(prob, window, chosen)) == left


@law
@given(cities(150 if THOROUGH else 60), st.sampled_from([0.3, 0.6, 3.0]))
def test_simple_outlines_are_valid_keep_their_holes_and_stay_near(city, simplify_m):
    prob, window, _ = city
    raw, simple = (finished(prob, window, VectorSettings(THRESHOLD, 0, 0, s)) for s in (0, simplify_m))
    assert shapely.is_valid(simple.geometry).all()
    assert (shapely.get_type_id(simple.geometry) == shapely.GeometryType.POLYGON).all()
    holes = shapely.get_num_interior_rings
    assert holes(simple.geometry).tolist() == holes(raw.geometry).tolist()
    # The simplification that keeps the topology may drop a ring's first vertex too, and so move twice the tolerance.
    assert (shapely.hausdorff_distance(simple.geometry, raw.geometry) <= 2 * simplify_m / raw.pixel_m).all()


def test_an_oblique_wall_is_simplified_to_a_straight_line():
    row, col = np.mgrid[:60, :60]
    prob = np.where((abs(row + 2 * col - 90) < 30) & (abs(2 * row - col - 30) < 30), 250, 0).astype(np.uint8)
    buildings = finished(prob, Window(-15_000, 1_000_000, 60, 60), VectorSettings(THRESHOLD, 10, 2, 0.4))
    assert shapely.get_num_coordinates(buildings.geometry).tolist() == [5]
    assert shapely.area(buildings.geometry)[0] == pytest.approx((prob > 0).sum(), rel=0.05)


@law
@given(cities(100))
def test_a_stored_fragment_is_the_fragment(city):
    prob, window, _ = city
    fragment = vectorize_block(prob, window, LATTICE, VectorSettings(THRESHOLD, 1, 1, 0.3))
    data = fragment_to_bytes(fragment)
    assert data == fragment_to_bytes(vectorize_block(prob, window, LATTICE, VectorSettings(THRESHOLD, 1, 1, 0.3)))
    assert finished_from_bytes(data).to_arrow().equals(fragment.finished.to_arrow())
    assert border_from_bytes(data).to_arrow().equals(fragment.border.to_arrow())
    sides = sides_from_bytes(data)
    assert sides.window == window
    for name in ("top", "right", "bottom", "left", "key_row", "key_col"):
        assert getattr(sides, name).tolist() == getattr(fragment.sides, name).tolist()


def test_sides_are_read_without_the_polygons(monkeypatch):
    prob = np.full((9, 9), 200, np.uint8)
    data = fragment_to_bytes(vectorize_block(prob, Window(0, 0, 9, 9), LATTICE, RAW))
    monkeypatch.setattr(shapely, "from_wkb", lambda wkb: pytest.fail("a polygon was read"))
    assert sides_from_bytes(data).top.tolist() == [1] * 9


def test_probabilities_of_another_shape_than_the_window_are_refused():
    with pytest.raises(ValueError, match="expected"):
        vectorize_block(np.zeros((4, 5), np.uint8), Window(0, 0, 5, 4), LATTICE, RAW)


def test_ids_tell_the_first_pixel():
    rows, cols = np.array([-12, 0, 7, -1]), np.array([-3, 0, 5, 4])
    assert building_ids(rows, cols) == ["N12W3", "S0E0", "S7E5", "N1E4"]


def test_published_geometry_area_and_confidence_are_those_of_the_building():
    prob = drawn(["......", ".####.", ".#..#.", ".####.", "......"], inside=125)
    window = Window(-10_150_000, 1_100_000, 5, 6)
    buildings = finished(prob, window, RAW)
    row = publishable(buildings, LATTICE, Imagery()).to_pylist()[0]
    geometry = shapely.from_wkb(row["geometry"])
    size, x, y = 0.3, 0.11 + 1_100_001 * 0.3, 0.07 + 10_149_999 * 0.3
    house = shapely.box(x, y - 3 * size, x + 4 * size, y) - shapely.box(x + size, y - 2 * size, x + 3 * size, y - size)
    assert geometry.symmetric_difference(house).area < 1e-6
    assert geometry.exterior.is_ccw
    assert not geometry.interiors[0].is_ccw
    assert row["building_id"] == "N10149999E1100001"
    assert row["pixels"] == 10
    assert row["confidence"] == 0.5
    # The scale of this UTM zone at x = 330 km is a little below 1, so the ground is larger than the map.
    assert row["area_m2"] == round(10 * 0.09 * (buildings.pixel_m[0] / 0.3) ** 2, 2)
    assert buildings.pixel_m[0] == pytest.approx(0.3, rel=1e-3)


def test_no_buildings_are_a_table_without_rows():
    none = Buildings.from_arrow(Buildings.empty().to_arrow())
    assert len(none) == 0
    assert publishable(none, LATTICE, Imagery()).schema == SCHEMA
    assert len(Buildings.concatenate([])) == 0


def test_a_wall_that_a_hole_leans_on_is_not_simplified_through_the_hole():
    prob = drawn(
        ["." * 22]
        + [".......########......."]
        + [".......#......#......."]
        + [".#######......#######."] * 3
        + [".####################."] * 6
        + ["." * 22]
    )
    window = Window(-15_000, 1_000_000, *prob.shape)
    raw, simple = (finished(prob, window, VectorSettings(THRESHOLD, 0, 0, s)) for s in (0, 0.75))
    without_bump = shapely.simplify(raw.geometry[0].exterior, 2.5, preserve_topology=False)
    assert not shapely.is_valid(shapely.Polygon(without_bump, raw.geometry[0].interiors))
    assert shapely.is_valid(simple.geometry[0])
    assert len(simple.geometry[0].interiors) == 1


def test_an_outline_of_too_many_corners_for_the_slow_way_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(vectorize, "_TOPOLOGY_CORNERS", 100)
    rng = np.random.default_rng(3)
    prob = np.where(rng.random((60, 60)) < 0.65, 200, 0).astype(np.uint8)
    window = Window(-15_000, 1_000_000, 60, 60)
    raw, simple = (finished(prob, window, VectorSettings(THRESHOLD, 0, 0, s)) for s in (0, 0.6))
    largest = raw.pixels.argmax()
    assert raw.geometry[largest].equals_exact(simple.geometry[largest])
    assert shapely.is_valid(simple.geometry).all()
    assert shapely.get_num_coordinates(simple.geometry).sum() < shapely.get_num_coordinates(raw.geometry).sum()
