import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.crops import cut, paste, reflected, resample
from luna_refinement.picture.boxes import Box


@given(st.integers(1, 50), st.integers(-200, 200), st.integers(1, 300))
def test_reflection_stays_inside_and_moves_by_at_most_one(limit: int, start: int, length: int) -> None:
    index = reflected(start, start + length, limit)
    assert index.min() >= 0
    assert index.max() < limit
    assert (index.diff().abs() <= 1).all()


def test_reflection_mirrors_without_repeating_the_edge() -> None:
    assert reflected(-2, 6, 4).tolist() == [2, 1, 0, 1, 2, 3, 2, 1]


def test_cut_at_the_same_size_is_the_picture_itself() -> None:
    image = torch.rand(40, 50, 3)
    assert torch.equal(cut(image, Box(10, 5, 30, 25), 20, 20), image[5:25, 10:30])


def test_cut_past_the_border_mirrors() -> None:
    image = torch.rand(20, 30, 3)
    crop = cut(image, Box(-5, -10, 35, 30), 40, 40)
    assert torch.equal(crop[10:30, 5:35], image)
    assert torch.equal(crop[:, :5], crop[:, 6:11].flip(1))


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(8, 160))
def test_a_ramp_survives_cut_and_paste_within_half_a_px(left: int, top: int, side: int) -> None:
    """Resampling to another size and back moves nothing: a linear ramp comes back as itself."""
    size = 96
    ramp = torch.linspace(0.1, 0.9, 192)
    image = (0.5 * ramp[:, None] + 0.5 * ramp[None, :])[..., None].repeat(1, 1, 3)
    crop = Box(left, top, left + size, top + size)
    canvas = image.clone()
    inner = Box(crop.x1 + 8, crop.y1 + 8, crop.x2 - 8, crop.y2 - 8)
    paste(canvas, cut(image, crop, side, side), crop, inner, torch.ones(inner.height, inner.width))
    per_px = 0.8 / 191
    # at the crop's own borders a resampler has nothing to look past, so only what lies well inside is compared
    margin = 4 * max(1, round(size / side))
    middle = slice(crop.y1 + 8 + margin, crop.y2 - 8 - margin), slice(crop.x1 + 8 + margin, crop.x2 - 8 - margin)
    difference = (canvas[middle] - image[middle]).abs()
    assert difference.numel() == 0 or difference.max() <= 0.5 * per_px


def test_paste_changes_no_bit_where_the_weight_is_zero() -> None:
    canvas = torch.rand(64, 64, 3)
    before = canvas.clone()
    crop, region = Box(8, 8, 40, 40), Box(12, 12, 36, 36)
    weights = torch.zeros(24, 24)
    weights[8:16, 8:16] = torch.rand(8, 8)
    paste(canvas, torch.rand(64, 64, 3), crop, region, weights)
    changed = (canvas != before).any(-1)
    assert changed[20:28, 20:28].any()
    changed[20:28, 20:28] = False
    assert not changed.any()


def test_resample_keeps_range() -> None:
    image = (torch.rand(31, 17, 3) > 0.5).float()
    for size in ((64, 64), (9, 11)):
        resampled = resample(image, *size)
        assert resampled.shape == (*size, 3)
        assert resampled.min() >= 0
        assert resampled.max() <= 1
