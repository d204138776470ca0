from hypothesis import given
from hypothesis import strategies as st
from luna_refinement.batching.geometry import Box, inner_margin, picture_box, place_span, square_around

sides = st.integers(1, 8192)


@st.composite
def pictures_with_target(draw: st.DrawFn) -> tuple[int, int, Box]:
    width, height = draw(sides), draw(sides)
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x2, y2 = draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))
    return width, height, Box(x1, y1, x2, y2)


@given(pictures_with_target(), st.floats(0, 3), st.integers(1, 128))
def test_crop_is_a_square_that_holds_its_target(case: tuple[int, int, Box], padding: float, min_side: int) -> None:
    width, height, target = case
    crop = square_around(target, padding, min_side, width, height)
    assert crop.width == crop.height >= min_side
    assert crop.contains(target)


@given(pictures_with_target(), st.floats(0, 3), st.integers(1, 128))
def test_crop_leaves_the_picture_only_when_it_is_larger(
    case: tuple[int, int, Box], padding: float, min_side: int
) -> None:
    width, height, target = case
    crop = square_around(target, padding, min_side, width, height)
    assert (crop.x1 < 0 or crop.x2 > width) == (crop.width > width)
    assert (crop.y1 < 0 or crop.y2 > height) == (crop.height > height)


@given(pictures_with_target(), st.floats(0, 1))
def test_crop_grows_by_the_padding_on_each_side(case: tuple[int, int, Box], padding: float) -> None:
    width, height, target = case
    longer = max(target.width, target.height)
    crop = square_around(target, padding, 1, width, height)
    assert longer * (1 + 2 * padding) <= crop.width < longer * (1 + 2 * padding) + 1 + 1e-6


@given(pictures_with_target(), st.floats(0, 3), st.integers(1, 128))
def test_margin_never_reaches_past_the_crop(case: tuple[int, int, Box], padding: float, min_side: int) -> None:
    width, height, target = case
    crop = square_around(target, padding, min_side, width, height)
    margin = inner_margin(target, crop, width, height)
    grown = target.grown(margin).intersect(picture_box(width, height))
    assert crop.contains(grown)


@given(st.floats(0, 8192), st.integers(1, 9000), sides)
def test_span_covers_the_picture_or_lies_inside_it(centre: float, length: int, limit: int) -> None:
    start, stop = place_span(centre, length, limit)
    assert stop - start == length
    assert (start <= 0 and stop >= limit) if length >= limit else (start >= 0 and stop <= limit)


def test_boxes_intersect_and_report_emptiness() -> None:
    assert Box(0, 0, 4, 4).intersect(Box(2, 1, 8, 3)) == Box(2, 1, 4, 3)
    assert not Box(0, 0, 4, 4).overlaps(Box(4, 0, 8, 4))
    assert Box.around((0.2, 0.9, 3.1, 4.0)) == Box(0, 0, 4, 4)
