"""Memory of arrays is used again, and never by two at once."""

from segpipe.pipeline.spare import Spare


def test_arrays_in_use_at_once_are_apart_and_later_ones_lie_in_their_memory() -> None:
    spare = Spare()
    with spare.array((3, 40, 50)) as one, spare.array((3, 40, 50)) as other:
        one.fill(1)
        other.fill(2)
        assert one.shape == (3, 40, 50)
        assert (one == 1).all()
        places = {one.ctypes.data, other.ctypes.data}
    for shape in ((4, 20, 30), (3, 40, 50)):
        with spare.array(shape) as again:
            assert again.shape == shape
            assert again.ctypes.data in places
    with spare.array((9, 40, 50)) as larger:
        larger.fill(3)
        assert larger.shape == (9, 40, 50)
