import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from masks import THOROUGH, THRESHOLD, cities, reader
from scipy import ndimage

from segpipe.tasks.edges import edges_of_mask, edges_of_outlines
from segpipe.tasks.outlines import find_runs, stable_order
from segpipe.tasks.vectorize import mask_of, polygonize

law = settings(max_examples=500 if THOROUGH else 60, derandomize=not THOROUGH, database=None)
CROSS = ndimage.generate_binary_structure(2, 1)


@law
@given(cities(120))
def test_edges_are_the_pixels_with_a_neighbour_outside_by_mask_and_by_outline(city):
    prob, window, _ = city
    prob = np.pad(prob, 1, constant_values=255)
    window = window.pad(1)
    mask = mask_of(prob, THRESHOLD)
    labels, count = ndimage.label(mask)
    index = np.arange(1, count + 1)
    edge = mask & ~ndimage.binary_erosion(mask, CROSS)
    beside_nodata = mask & ndimage.binary_dilation(prob == 255, CROSS)

    runs, components = polygonize(mask, prob, window.row_off, window.col_off)
    by_mask = edges_of_mask(mask, prob, runs)
    by_outline = edges_of_outlines(components.geometry, reader(prob, window))

    for found in (by_mask, by_outline):
        assert found.pixels.tolist() == ndimage.sum_labels(edge, labels, index).tolist()
        assert found.prob_sum.tolist() == ndimage.sum_labels(prob * edge.astype(np.int64), labels, index).tolist()
        assert found.touches_nodata.tolist() == ndimage.maximum(beside_nodata, labels, index).astype(bool).tolist()


def test_a_mask_of_several_strips_has_the_edges_of_one(monkeypatch):
    rng = np.random.default_rng(0)
    prob = np.where(rng.random((50, 40)) < 0.7, 200, 0).astype(np.uint8)
    mask = np.pad(mask_of(prob, THRESHOLD)[1:-1, 1:-1], 1)
    runs = find_runs(mask)[0]
    whole = edges_of_mask(mask, prob, runs)

    monkeypatch.setattr("segpipe.tasks.edges._STRIP_PIXELS", 3 * 40)
    pieces = edges_of_mask(mask, prob, runs)

    assert pieces.pixels.tolist() == whole.pixels.tolist()
    assert pieces.prob_sum.tolist() == whole.prob_sum.tolist()


@given(st_numpy.arrays(np.int64, st.integers(0, 300), elements=st.integers(0, 2**40) | st.integers(0, 5)))
def test_stable_order_is_that_of_a_stable_sort(values):
    assert stable_order(values).tolist() == np.argsort(values, kind="stable").tolist()
