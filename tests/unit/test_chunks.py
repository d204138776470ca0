"""How many rows a call holds: arithmetic of bytes."""

from hypothesis import given
from hypothesis import strategies as st
from luna_refinement.batching.comfy_chunks import MOST_ROWS, rows_in

GIB = 2**30
sizes = st.integers(0, 200 * GIB)


def test_rows_take_what_weights_and_controlnets_leave() -> None:
    assert rows_in(24 * GIB, to_load=0, beside=0, per_row=GIB) == 24
    assert rows_in(24 * GIB, to_load=6 * GIB, beside=0, per_row=GIB) == 18
    assert rows_in(24 * GIB, to_load=6 * GIB, beside=3 * GIB, per_row=GIB) == 15


def test_streamed_weights_do_not_leave_a_call_with_one_row() -> None:
    assert rows_in(8 * GIB, to_load=12 * GIB, beside=0, per_row=GIB // 2) == 8


@given(sizes, sizes, sizes, st.integers(0, 100 * GIB))
def test_there_is_always_a_row_and_never_more_than_the_cap(room: int, to_load: int, beside: int, per_row: int) -> None:
    assert 1 <= rows_in(room, to_load, beside, per_row) <= MOST_ROWS


@given(sizes, st.integers(1, 100 * GIB))
def test_rows_that_fit_really_fit(room: int, per_row: int) -> None:
    rows = rows_in(room, 0, 0, per_row)
    assert rows == 1 or rows * per_row <= room
