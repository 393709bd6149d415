"""Every pixel exactly once, whatever the order; a missing or doubled chunk is refused."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from segpipe.tasks.errors import RunError
from segpipe.tasks.grid import Window
from segpipe.tasks.merge import merge

Parts = list[tuple[Window, NDArray[np.uint8]]]


def cut(array: NDArray[np.uint8], frame: Window, step: int) -> Parts:
    windows = [Window.cell(*cell, step) for cell in frame.cells(step)]
    return [(w, array[(..., *w.within(frame))]) for w in windows]


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.randoms())
def test_any_cut_in_any_order_gives_the_whole(
    row: int, col: int, step: int, cells: int, bands: int, random: Random
) -> None:
    frame = Window(row * step, col * step, cells * step, 2 * step)
    rng = np.random.default_rng(random.randint(0, 10**6))
    whole = rng.integers(0, 255, (*[bands] * (bands > 0), *frame.shape_yx), np.uint8)
    parts = cut(whole, frame, step)
    random.shuffle(parts)
    window = frame.pad(3)
    merged = merge(window, iter(parts), [w for w, _ in parts], fill=7)
    assert np.array_equal(merged[(..., *frame.within(window))], whole)
    out = rng.integers(0, 255, merged.shape, np.uint8)
    assert merge(window, iter(parts), [w for w, _ in parts], fill=7, out=out) is out
    assert np.array_equal(out, merged)
    around = np.ones(window.shape_yx, np.bool_)
    around[frame.within(window)] = False
    assert (merged[..., around] == 7).all()


@pytest.fixture
def parts() -> Parts:
    frame = Window(-8, 4, 8, 12)
    return cut(np.arange(96, dtype=np.uint8).reshape(frame.shape_yx), frame, 4)


FRAME = Window(-8, 4, 8, 12)


def test_a_missing_chunk_is_refused_and_named(parts: Parts) -> None:
    gone = parts.pop(2)[0]
    with pytest.raises(RunError, match=f"row_off={gone.row_off}, col_off={gone.col_off}.*missing"):
        merge(FRAME, parts, [*[w for w, _ in parts], gone], fill=0)


def test_a_doubled_chunk_is_refused_and_named(parts: Parts) -> None:
    twice = parts[3]
    with pytest.raises(RunError, match=f"row_off={twice[0].row_off}, col_off={twice[0].col_off}.*twice"):
        merge(FRAME, [*parts, twice], [w for w, _ in parts], fill=0)


def test_a_chunk_that_was_not_asked_for_is_refused(parts: Parts) -> None:
    with pytest.raises(RunError, match="not asked for"):
        merge(FRAME, parts, [w for w, _ in parts[1:]], fill=0)


def test_a_chunk_of_another_shape_is_refused(parts: Parts) -> None:
    window, pixels = parts[0]
    with pytest.raises(RunError, match=r"\(3, 4\) px; expected \(4, 4\)"):
        merge(FRAME, [(window, pixels[:3]), *parts[1:]], [w for w, _ in parts], fill=0)


def test_a_window_without_any_chunk_is_fill() -> None:
    assert (merge(FRAME, [], [], fill=255) == 255).all()
