import itertools

from hypothesis import given
from hypothesis import strategies as st
from luna_refinement.picture.boxes import (
    Box,
    crop_around,
    inner_margin,
    picture_box,
    place_span,
    with_aspect,
    working_size,
)

sides = st.integers(1, 8192)


@st.composite
def pictures_with_target(draw: st.DrawFn) -> tuple[int, int, Box]:
    width, height = draw(sides), draw(sides)
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x2, y2 = draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))
    return width, height, Box(x1, y1, x2, y2)


@given(pictures_with_target(), st.floats(0, 8), st.integers(1, 128))
def test_crop_is_a_square_as_far_as_the_picture_goes(case: tuple[int, int, Box], padding: float, min_side: int) -> None:
    width, height, target = case
    crop = crop_around(target, padding, min_side, width, height)
    side = max(crop.width, crop.height)
    assert crop.contains(target)
    assert side >= min_side
    assert crop.width in (side, max(width, min_side))
    assert crop.height in (side, max(height, min_side))


@given(pictures_with_target(), st.floats(0, 8), st.integers(1, 128))
def test_crop_leaves_the_picture_only_for_the_smallest_side(
    case: tuple[int, int, Box], padding: float, min_side: int
) -> None:
    width, height, target = case
    crop = crop_around(target, padding, min_side, width, height)
    assert crop.width <= max(width, min_side)
    assert crop.height <= max(height, min_side)
    assert (crop.x1 < 0 or crop.x2 > width) == (crop.width > width)
    assert (crop.y1 < 0 or crop.y2 > height) == (crop.height > height)


@given(pictures_with_target(), st.floats(0, 1))
def test_crop_grows_by_the_padding_on_each_side(case: tuple[int, int, Box], padding: float) -> None:
    width, height, target = case
    crop = crop_around(target, padding, 1, width, height)
    wanted = max(target.width, target.height) * (1 + 2 * padding)
    for side, limit in ((crop.width, width), (crop.height, height)):
        assert min(wanted, limit) <= side < min(wanted, limit) + 1 + 1e-6


@given(pictures_with_target(), st.floats(0, 3), st.integers(1, 128))
def test_margin_never_reaches_past_the_crop(case: tuple[int, int, Box], padding: float, min_side: int) -> None:
    width, height, target = case
    crop = crop_around(target, padding, min_side, width, height)
    margin = inner_margin(target, crop, width, height)
    grown = target.grown(margin).intersect(picture_box(width, height))
    assert crop.contains(grown)


@given(pictures_with_target(), st.floats(0, 8), st.sampled_from([64, 512, 1024, 2048]), st.sampled_from([8, 16, 32]))
def test_working_sizes_keep_the_aspect_on_whole_latent_px(
    case: tuple[int, int, Box], padding: float, longer: int, cell: int
) -> None:
    width, height, target = case
    crop = crop_around(target, padding, 32, width, height)
    size = working_size(crop, longer, 64, cell)
    whole = with_aspect(crop, size, width, height)
    assert max(size) == longer
    assert min(size) >= 64
    assert size[0] % cell == size[1] % cell == 0
    assert whole.contains(crop)
    if crop.width == crop.height:
        assert (whole, size) == (crop, (longer, longer))
    # both sides are scaled alike, to the rounding of the crop to whole px
    scale = longer / max(whole.width, whole.height)
    for side, worked in ((whole.width, size[1]), (whole.height, size[0])):
        assert abs(side - worked / scale) <= 0.5 + 1e-6


@given(pictures_with_target(), st.integers(1, 4096))
def test_strips_and_bands_are_the_box_in_parts(case: tuple[int, int, Box], px: int) -> None:
    _, _, box = case
    box = Box(box.x1, box.y1, min(box.x2, box.x1 + 40), min(box.y2, box.y1 + 40))
    for parts, least in ((list(box.strips(px)), box.height), (list(box.bands(px)), box.width)):
        assert sum(part.width * part.height for part in parts) == box.width * box.height
        assert all(box.contains(part) and not part.is_empty for part in parts)
        assert all(part.width * part.height <= max(px, least) for part in parts)
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(parts))


@given(st.floats(0, 8192), st.integers(1, 9000), sides)
def test_span_covers_the_picture_or_lies_inside_it(centre: float, length: int, limit: int) -> None:
    start, stop = place_span(centre, length, limit)
    assert stop - start == length
    assert (start <= 0 and stop >= limit) if length >= limit else (start >= 0 and stop <= limit)


def test_boxes_intersect_and_report_emptiness() -> None:
    assert Box(0, 0, 4, 4).intersect(Box(2, 1, 8, 3)) == Box(2, 1, 4, 3)
    assert not Box(0, 0, 4, 4).overlaps(Box(4, 0, 8, 4))
    assert Box.around((0.2, 0.9, 3.1, 4.0)) == Box(0, 0, 4, 4)
