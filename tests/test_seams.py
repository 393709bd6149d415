import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    LATTICE,
    RAW,
    THOROUGH,
    THRESHOLD,
    as_set,
    cities,
    cut,
    oracle_polygons,
    reader,
    stored_fragments,
    vectorize_in_pieces,
    with_corner_contacts,
)
from scipy import ndimage

from segpipe.tasks.attributes import Imagery, publishable
from segpipe.tasks.errors import RunError
from segpipe.tasks.fragments import border_from_bytes, sides_from_bytes
from segpipe.tasks.grid import Window
from segpipe.tasks.seams import collect, facing_pairs, group_nodes, join, neighbours, plan_joins
from segpipe.tasks.vectorize import VectorSettings, mask_of

law = settings(max_examples=500 if THOROUGH else 40, derandomize=not THOROUGH, database=None)
NOWHERE = Imagery()
whole_settings = st.builds(
    VectorSettings, st.just(THRESHOLD), st.sampled_from([0.0, 1.0, 10.0]), st.sampled_from([0.0, 0.5, 2.0, 40.0]),
    st.sampled_from([0.0, 0.3, 1.5]),
)  # fmt: skip


@law
@given(cities())
def test_polygons_in_pieces_are_those_of_one_polygonize_of_the_whole_mask(city):
    prob, window, seed = city
    rng = np.random.default_rng(seed)
    blocks = cut(window, rng)
    prob = with_corner_contacts(prob, window, blocks, rng)
    mask = mask_of(prob, THRESHOLD)

    buildings = vectorize_in_pieces(prob, window, blocks, RAW)

    assert as_set(buildings.geometry) == as_set(oracle_polygons(mask, window))
    assert shapely.is_valid(buildings.geometry).all()
    assert shapely.area(buildings.geometry).astype(np.int64).tolist() == buildings.pixels.tolist()
    assert buildings.pixels.sum() == mask.sum()


@settings(law, max_examples=500 if THOROUGH else 25)
@given(cities(200 if THOROUGH else 100), whole_settings)
def test_published_bytes_do_not_depend_on_the_cut(city, chosen):
    prob, window, seed = city
    rng = np.random.default_rng(seed)
    cuts = [cut(window, rng), cut(window, rng, 20, 150), [window.pad(1)]]
    prob = with_corner_contacts(prob, window, cuts[0], rng)

    first, second, uncut = (publishable(vectorize_in_pieces(prob, window, c, chosen), LATTICE, NOWHERE) for c in cuts)

    assert first.equals(uncut)
    assert second.equals(uncut)
    assert shapely.is_valid(shapely.from_wkb(uncut.column("geometry").to_numpy(zero_copy_only=False))).all()


@settings(law, max_examples=200 if THOROUGH else 20)
@given(cities(100))
def test_statistics_are_those_of_the_whole_building(city):
    prob, window, seed = city
    mask = mask_of(prob, THRESHOLD)
    labels, count = ndimage.label(mask)
    index = np.arange(1, count + 1)
    first = np.unique(labels, return_index=True)[1][-count:] if count else np.zeros(0, np.int64)

    buildings = vectorize_in_pieces(prob, window, cut(window, np.random.default_rng(seed)), RAW)

    assert (buildings.key_row - window.row_off).tolist() == (first // window.width).tolist()
    assert (buildings.key_col - window.col_off).tolist() == (first % window.width).tolist()
    assert buildings.pixels.tolist() == ndimage.sum_labels(mask, labels, index).tolist()
    assert buildings.prob_sum.tolist() == ndimage.sum_labels(prob.astype(np.int64), labels, index).tolist()


@settings(law, max_examples=200 if THOROUGH else 20)
@given(cities(100), st.randoms(use_true_random=False))
def test_joins_do_not_depend_on_the_order_of_blocks(city, random):
    prob, window, seed = city
    blocks = cut(window, np.random.default_rng(seed))
    shuffled = random.sample(blocks, len(blocks))

    in_rows, in_any_order = (vectorize_in_pieces(prob, window, order, RAW) for order in (blocks, shuffled))

    assert in_any_order.to_arrow().equals(in_rows.to_arrow())


def test_every_piece_has_one_home_the_block_of_the_first_pixel():
    prob = np.zeros((20, 20), np.uint8)
    prob[3:18, 12] = prob[17, 2:13] = 200
    prob[0, 0] = prob[9, 9] = prob[10, 10] = 200
    window = Window(0, 0, 20, 20)
    blocks = [Window.cell(row, col, 10) for row, col in window.cells(10)]
    stored = stored_fragments(prob, window, blocks, RAW)

    joins = plan_joins(blocks, lambda index: sides_from_bytes(stored[index]))

    assert joins.home.tolist() == [0, 0, 1, 1, 1, 3]
    assert joins.block.tolist() == [0, 0, 1, 2, 3, 3]
    assert joins.building.tolist() == [0, 1, 2, 2, 2, 3]
    assert joins.at(2).home.size == 0


def test_sides_of_a_block_are_read_once_and_dropped_after_their_last_seam():
    window = Window(0, 0, 40, 40)
    prob = np.full((40, 40), 200, np.uint8)
    blocks = [Window.cell(row, col, 8) for row, col in window.cells(8)]
    stored = stored_fragments(prob, window, blocks, RAW)
    reads = []

    def read_sides(index):
        reads.append(index)
        return sides_from_bytes(stored[index])

    plan_joins(blocks, read_sides)

    assert reads == list(range(25))


def test_labels_face_each_other_straight_across_only():
    a, b = np.array([1, 1, 0, 2, 2, 0, 3], np.int32), np.array([4, 4, 5, 0, 6, 7, 4], np.int32)
    assert facing_pairs(a, b).tolist() == [[1, 4], [2, 6], [3, 4]]
    assert facing_pairs(a, np.zeros(7, np.int32)).shape == (0, 2)


def test_nodes_of_a_chain_of_pairs_are_one_group():
    group = group_nodes(np.array([[0, 3], [3, 5], [1, 4], [3, 0]]), 7)
    assert group[0] == group[3] == group[5]
    assert group[1] == group[4]
    assert len(set(group.tolist())) == 4


@settings(law, max_examples=200 if THOROUGH else 30)
@given(st.integers(0, 2**32))
def test_neighbours_are_the_blocks_that_share_a_stretch_of_seam(seed):
    rng = np.random.default_rng(seed)
    blocks = cut(Window(-50, -20, 120, 90), rng)
    boxes = [shapely.box(b.col_off, b.row_off, b.col_stop, b.row_stop) for b in blocks]
    sharing = {
        (i, j)
        for i in range(len(boxes))
        for j in range(i + 1, len(boxes))
        if boxes[i].intersection(boxes[j]).length > 0
    }
    found = neighbours(blocks).tolist()
    assert {(min(pair), max(pair)) for pair in found} == sharing
    assert len(found) == len(sharing)


def test_blocks_that_overlap_are_refused():
    with pytest.raises(ValueError, match="overlap along a seam"):
        neighbours([Window(0, 0, 10, 10), Window(0, 8, 10, 10)])


@pytest.mark.parametrize("doubled", [True, False])
def test_a_doubled_or_missing_piece_is_refused(doubled):
    prob = np.zeros((12, 30), np.uint8)
    prob[5, 1:29] = 250
    window = Window(0, 0, 12, 30)
    blocks = [Window(0, 0, 12, 10), Window(0, 10, 12, 10), Window(0, 20, 12, 10)]
    stored = stored_fragments(prob, window, blocks, RAW)
    joins = plan_joins(blocks, lambda index: sides_from_bytes(stored[index]))
    pieces, building = collect(joins.at(0), lambda index: border_from_bytes(stored[index]))
    chosen = np.array([0, 1, 1, 2] if doubled else [0, 2])
    assert len(join(pieces, building)) == 1
    with pytest.raises(RunError, match=r"joining the pieces|missing or doubled"):
        join(pieces.take(chosen), building[chosen])


def test_a_fragment_of_another_place_is_refused():
    prob = np.zeros((8, 8), np.uint8)
    block = Window(0, 0, 8, 8)
    stored = stored_fragments(prob, block, [block], RAW)
    with pytest.raises(RunError, match="expected"):
        plan_joins([Window(8, 0, 8, 8)], lambda index: sides_from_bytes(stored[index]))


def test_a_hole_across_a_seam_is_filled_unless_a_pixel_in_it_is_invalid_or_a_building():
    settings_ = VectorSettings(THRESHOLD, 0, 2, 0)
    window = Window(-100, 100, 20, 40)
    prob = np.zeros((20, 40), np.uint8)
    prob[2:18, 2:38] = 250
    prob[9:11, 8:12] = 0
    prob[9:11, 18:22] = 0
    prob[10, 20] = 255
    prob[7:12, 28:32] = 0
    prob[9, 30] = 250
    blocks = [Window(-100 + row, 100 + col, 10, 10) for row in (0, 10) for col in (0, 10, 20, 30)]
    for cutting in (blocks, [window]):
        buildings = vectorize_in_pieces(prob, window, cutting, settings_)
        big = buildings.geometry[buildings.pixels > 1][0]
        assert sorted(shapely.Polygon(ring).area for ring in big.interiors) == [8, 20]
        assert buildings.pixels.tolist() == [16 * 36 - 8 - 8 - 20, 1]
        assert buildings.area_px.tolist() == [16 * 36 - 8 - 20, 1]


def test_a_city_without_buildings_has_none():
    window = Window(0, 0, 30, 30)
    blocks = [Window.cell(row, col, 10) for row, col in window.cells(10)]
    for value in (0, 255):
        buildings = vectorize_in_pieces(np.full((30, 30), value, np.uint8), window, blocks, RAW)
        assert len(buildings) == 0
        assert publishable(buildings, LATTICE, Imagery()).num_rows == 0
    assert plan_joins([], lambda index: pytest.fail("no block to read")).home.size == 0


def test_reading_beyond_the_city_gives_invalid_pixels():
    assert reader(np.zeros((2, 2), np.uint8), Window(0, 0, 2, 2))(Window(-1, -1, 2, 2)).tolist() == [
        [255, 255],
        [255, 0],
    ]
