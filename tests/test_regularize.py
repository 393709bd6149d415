"""Laws of right-angled outlines: each a function of its building, near the raw outline, and none over another."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import LATTICE, THOROUGH, THRESHOLD, cities, cut, reader, vectorize_in_pieces
from shapely.affinity import rotate, translate

from segpipe.tasks.grid import Window
from segpipe.tasks.neighbours import bounds_of, keep_apart, meeting
from segpipe.tasks.outlines import Geometries
from segpipe.tasks.regularize import REACH_PX, iou, orthogonal
from segpipe.tasks.vectorize import FORMS, Buildings, VectorSettings, finish, mask_of, polygonize, to_crs

law = settings(max_examples=200 if THOROUGH else 30, derandomize=not THOROUGH, database=None, deadline=None)
SQUARE = VectorSettings(THRESHOLD, 0, 2, 0.3, "orthogonal", 0.8)
PLACE = Window(-15_000, 1_000_000, 120, 120)


def mask_prob(shape: shapely.Polygon) -> np.ndarray:
    """Probabilities of a building of this shape, in pixels of PLACE."""
    col, row = np.meshgrid(np.arange(120) + 0.5, np.arange(120) + 0.5)
    return np.where(shapely.contains_xy(shape, col, row), 200, 10).astype(np.uint8)


def buildings_of(prob: np.ndarray, window: Window, chosen: VectorSettings = SQUARE) -> Buildings:
    whole = polygonize(mask_of(prob, THRESHOLD), prob, window.row_off, window.col_off)[1]
    return finish(whole, chosen, LATTICE, reader(prob, window))


def corner_angles(polygon: shapely.Polygon) -> np.ndarray:
    """Angles at the corners of all rings, degrees."""
    angles = []
    for ring in (polygon.exterior, *polygon.interiors):
        points = shapely.get_coordinates(ring)[:-1]
        before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
        cosine = (before * after).sum(axis=1) / np.hypot(*before.T) / np.hypot(*after.T)
        angles.extend(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    return np.array(angles)


@pytest.mark.parametrize("turn", [0, 7, 20, 45, 61, 88])
def test_a_turned_house_gets_its_four_corners_back(turn: int) -> None:
    house = rotate(shapely.box(35, 40, 85, 75), turn)
    (regular,) = buildings_of(mask_prob(house), PLACE).geometry
    assert len(regular.exterior.coords) == 5
    assert corner_angles(regular) == pytest.approx(90, abs=1e-6)
    assert iou(np.array([translate(regular, -PLACE.col_off, -PLACE.row_off)]), np.array([house]))[0] > 0.96


def test_an_l_with_a_courtyard_keeps_its_wings_and_its_hole() -> None:
    house = rotate(shapely.box(20, 20, 100, 90) - shapely.box(60, 20, 100, 50) - shapely.box(35, 55, 50, 70), 17)
    (found,) = (buildings := buildings_of(mask_prob(house), PLACE)).geometry
    assert buildings.form.tolist() == [FORMS.index("orthogonal")]
    assert (len(found.exterior.coords), len(found.interiors)) == (7, 1)
    assert corner_angles(found) == pytest.approx(90, abs=1e-6)
    assert iou(np.array([translate(found, -PLACE.col_off, -PLACE.row_off)]), np.array([house]))[0] > 0.95


def test_a_shape_that_has_no_right_angles_is_kept_as_it_was_simplified_and_marked() -> None:
    star = shapely.Polygon(
        [
            (60 + r * np.cos(a), 60 + r * np.sin(a))
            for a, r in zip(np.linspace(0, 2 * np.pi, 11)[:-1], [55, 14] * 5, strict=True)
        ]
    )
    regular = buildings_of(mask_prob(star), PLACE)
    simple = buildings_of(mask_prob(star), PLACE, VectorSettings(THRESHOLD, 0, 2, 0.3))
    largest = regular.pixels.argmax()
    assert FORMS[regular.form[largest]] == "simplified"
    assert regular.geometry[largest].equals_exact(simple.geometry[largest])


@law
@given(cities(100), st.sampled_from([0.5, 0.8, 0.95]))
def test_regular_outlines_are_valid_right_angled_and_as_near_as_was_asked(city, least) -> None:
    prob, window, _ = city
    raw = buildings_of(prob, window, VectorSettings(THRESHOLD, 0, 2, 0)).geometry
    regular, good = orthogonal(raw, np.full(len(raw), 0.3), least)
    assert [a is b for a, b in zip(regular, raw, strict=True)] == (~good).tolist()
    assert shapely.is_valid(regular).all()
    for polygon, of in zip(regular[good], raw[good], strict=True):
        assert corner_angles(polygon) == pytest.approx(90, abs=1e-4)
        assert polygon.intersection(of).area / polygon.union(of).area >= least - 1e-9
        assert len(polygon.interiors) == len(of.interiors)
        assert shapely.box(*of.bounds).buffer(REACH_PX, join_style="mitre").covers(polygon)


@law
@given(cities(100))
def test_a_regular_outline_does_not_depend_on_what_is_worked_on_beside_it(city) -> None:
    prob, window, seed = city
    raw = buildings_of(prob, window, VectorSettings(THRESHOLD, 0, 2, 0)).geometry
    together, good = orthogonal(raw, np.full(len(raw), 0.3), 0.8)
    order = np.random.default_rng(seed).permutation(len(raw))[:40]
    for index in order:
        alone, fits = orthogonal(raw[[index]], np.full(1, 0.3), 0.8)
        assert fits[0] == good[index]
        assert shapely.to_wkb(alone[0]) == shapely.to_wkb(together[index])


@law
@given(cities(120))
def test_regular_outlines_are_the_same_for_any_cut(city) -> None:
    prob, window, seed = city
    pieces = vectorize_in_pieces(prob, window, cut(window, np.random.default_rng(seed)), SQUARE)
    whole = vectorize_in_pieces(prob, window, [window], SQUARE)
    assert pieces.to_arrow().equals(whole.to_arrow())


def overlapping(polygons: Geometries) -> set[int]:
    """Indices of those that overlap another, by looking at every pair."""
    return {
        index
        for i, one in enumerate(polygons)
        for j, other in enumerate(polygons[:i])
        if shapely.relate_pattern(one, other, "T********")
        for index in (i, j)
    }


@st.composite
def crowded(draw: st.DrawFn) -> tuple[np.ndarray, Window, int]:
    """Slanting houses side by side, a few pixels apart or corner to corner."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    row, col = np.mgrid[:120, :120]
    turn, width, gap = rng.uniform(0, np.pi), rng.uniform(6, 25), rng.uniform(0.8, 2.5)
    across, along = col * np.cos(turn) + row * np.sin(turn), row * np.cos(turn) - col * np.sin(turn)
    mask = (across % width > gap) & (along % (width * 1.7) > gap)
    mask &= rng.random(mask.shape) > 0.01
    return np.where(mask, 200, 10).astype(np.uint8), PLACE, int(rng.integers(2**32))


@law
@given(st.one_of(crowded(), cities(80)), st.sampled_from([SQUARE, VectorSettings(THRESHOLD, 0, 2, 1.2)]))
def test_published_outlines_overlap_nowhere_and_give_way_only_where_they_must(city, chosen) -> None:
    prob, window, _ = city
    before = buildings_of(prob, window, chosen)
    after = keep_apart(before, Buildings.empty(), LATTICE)
    published, raw, wished = (to_crs(it, LATTICE) for it in (after.geometry, before.raw, before.geometry))
    assert not overlapping(published)
    for index, form in enumerate(after.form.tolist()):
        if form == before.form[index]:
            continue
        assert FORMS[form] == "raw"
        assert any(
            shapely.relate_pattern(wished[index], other, "T********")
            for theirs in (raw, wished)
            for other in np.delete(theirs, index)
        )


def test_crowded_houses_do_overlap_before_they_are_kept_apart() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(20):
        turn = rng.uniform(0, np.pi)
        row, col = np.mgrid[:120, :120]
        across, along = col * np.cos(turn) + row * np.sin(turn), row * np.cos(turn) - col * np.sin(turn)
        prob = np.where((across % 14 > 1.2) & (along % 23 > 1.2), 200, 10).astype(np.uint8)
        found += len(overlapping(buildings_of(prob, PLACE).geometry))
    assert found > 10


@law
@given(crowded())
def test_who_gives_way_does_not_depend_on_the_order_nor_on_where_one_looks_from(city) -> None:
    prob, window, seed = city
    buildings = buildings_of(prob, window)
    whole = keep_apart(buildings, Buildings.empty(), LATTICE).to_arrow()
    rng = np.random.default_rng(seed)
    part = rng.integers(0, 3, len(buildings))
    parts = []
    for number in range(3):
        some = buildings.take(part == number)
        others = [buildings.take(part == other) for other in rng.permutation(3) if other != number]
        parts.append(keep_apart(some, meeting(some, others), LATTICE))
    found = Buildings.concatenate(parts)
    assert found.take(np.lexsort((found.key_col, found.key_row))).to_arrow().equals(whole)


def test_bounds_hold_both_outlines() -> None:
    buildings = buildings_of(mask_prob(rotate(shapely.box(35, 40, 85, 75), 20)), PLACE)
    box = shapely.box(*bounds_of(buildings)[0])
    assert box.covers(buildings.raw[0])
    assert box.covers(buildings.geometry[0])
