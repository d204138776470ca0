"""Detections keep their place: between sizes, as normalised coordinates, cut out and pasted back."""

import math
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from luna_refinement.batching.upscale import fitted_size
from luna_refinement.errors import LunaInputError
from luna_refinement.picture.boxes import Box, outward_px
from luna_refinement.picture.detections import Detection, Detections, same_aspect
from luna_refinement.picture.masks import rasterise, union_masks

SIDE = 4096


def edges(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Where a rectangle's mask [H,W] crosses one half: x1, y1, x2, y2 px, between px by linear interpolation."""

    def span(profile: torch.Tensor) -> tuple[float, float]:
        inside = (profile >= 0.5).nonzero().flatten()
        low, high = int(inside[0]), int(inside[-1])

        def crossing(place: int, step: int) -> float:
            within, beyond = float(profile[place]), 0.0
            if 0 <= place + step < len(profile):
                beyond = float(profile[place + step])
            return place + 0.5 + step * (within - 0.5) / max(within - beyond, 1e-9)

        return crossing(low, -1), crossing(high, 1)

    row = mask[mask.shape[0] // 2] if mask.ndim == 2 else mask
    x1, x2 = span(row)
    y1, y2 = span(mask[:, mask.shape[1] // 2])
    return x1, y1, x2, y2


@st.composite
def boxes(draw: st.DrawFn, width: int, height: int) -> tuple[float, float, float, float]:
    x1 = draw(st.floats(0, width - 2))
    y1 = draw(st.floats(0, height - 2))
    x2 = draw(st.floats(x1 + 1, width))
    y2 = draw(st.floats(y1 + 1, height))
    return x1, y1, x2, y2


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(64, 2048), st.integers(64, 2048), st.integers(2, 8))
def test_box_survives_another_size_and_back(data: st.DataObject, width: int, height: int, factor: int) -> None:
    box = data.draw(boxes(width, height))
    found = Detections((Detection(0, box),), width, height)
    large = found.scaled_to(width * factor, height * factor)
    back = large.scaled_to(width, height)
    assert large.items[0].box == pytest.approx([value * factor for value in box], abs=1e-6)
    assert back.items[0].box == pytest.approx(box, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(16, 300), st.integers(16, 300))
def test_box_cut_out_and_pasted_back_lies_where_it_was(data: st.DataObject, width: int, height: int) -> None:
    box = data.draw(boxes(width, height))
    window = outward_px(box, width, height)
    x1, y1, x2, y2 = window
    canvas = torch.zeros(height, width)
    canvas[y1:y2, x1:x2] = rasterise(box, None, window)
    across, down = canvas.amax(dim=0), canvas.amax(dim=1)
    centre_x = float((across * (torch.arange(width) + 0.5)).sum() / across.sum())
    centre_y = float((down * (torch.arange(height) + 0.5)).sum() / down.sum())
    assert centre_x == pytest.approx((box[0] + box[2]) / 2, abs=0.5)
    assert centre_y == pytest.approx((box[1] + box[3]) / 2, abs=0.5)
    assert float(canvas.sum()) == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), rel=1e-4, abs=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 400), st.integers(8, 400), st.integers(8, 400), st.integers(8, 400))
def test_mask_at_quarter_resolution_lands_within_a_px_at_4k(left: int, top: int, wide: int, high: int) -> None:
    """A rectangle drawn into a mask of a quarter of the resolution has its edges where they belong at 4096 px."""
    quarter = torch.zeros(high + 16, wide + 16)
    quarter[8:-8, 8:-8] = 1
    box = (left * 4.0, top * 4.0, (left + wide + 16) * 4.0, (top + high + 16) * 4.0)
    (item,) = Detections((Detection(0, box, quarter),), SIDE, SIDE)
    window = outward_px(box, SIDE, SIDE)
    measured = edges(rasterise(item.box, item.mask, window))
    wanted = (8 * 4, 8 * 4, (8 + wide) * 4, (8 + high) * 4)
    assert measured == pytest.approx(wanted, abs=1.0)


def test_mask_at_its_own_resolution_is_unchanged() -> None:
    mask = torch.rand(40, 30)
    drawn = rasterise((5, 7, 35, 47), mask, Box(0, 0, 64, 64))
    assert torch.allclose(drawn[7:47, 5:35], mask, atol=1e-6)
    assert float(drawn.sum()) == pytest.approx(float(mask.sum()), rel=1e-5)


def test_a_full_mask_at_4k_draws_in_its_own_memory_and_time() -> None:
    """A dense product of px and texels would be seconds."""
    mask = torch.rand(SIDE, SIDE)
    item = Detection(0, (0, 0, SIDE, SIDE), mask)
    start = time.process_time()
    drawn = rasterise(item.box, item.mask, Box(0, 0, SIDE, SIDE))
    assert time.process_time() - start < 2
    assert torch.equal(drawn, mask)
    start = time.process_time()
    half = rasterise((0, 0, SIDE // 2, SIDE // 2), mask, Box(0, 0, SIDE // 2, SIDE // 2))
    assert time.process_time() - start < 2
    assert float((half - mask.view(SIDE // 2, 2, SIDE // 2, 2).mean((1, 3))).abs().mean()) < 0.2


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(1, 60))
def test_masks_are_read_through_triangles(data: st.DataObject, high: int, wide: int) -> None:
    """Against the dense product of the definition."""
    box = data.draw(boxes(100, 90))
    mask = torch.rand(high, wide, generator=torch.Generator().manual_seed(high * 61 + wide))
    wanted = triangles(box[1], box[3], 90, high) @ mask.double() @ triangles(box[0], box[2], 100, wide).T
    drawn = rasterise(box, mask, Box(0, 0, 100, 90))
    inside = rasterise(box, None, Box(0, 0, 100, 90))
    assert float((drawn - wanted * inside).abs().max()) < 1e-5


def triangles(start: float, stop: float, px: int, texels: int) -> torch.Tensor:
    """[px, texels]: how each px reads texels that span start..stop."""
    per_px = texels / (stop - start)
    centres = ((torch.arange(px).double() + 0.5 - start) * per_px - 0.5).clamp(0, texels - 1)
    weights = (1 - (centres[:, None] - torch.arange(texels).double()).abs() / max(1.0, per_px)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def test_a_window_sees_the_same_px_as_the_whole_picture() -> None:
    item = Detection(0, (10.3, 12.6, 50.2, 61.9), torch.rand(9, 13))
    whole = rasterise(item.box, item.mask, Box(0, 0, 80, 80))
    assert torch.allclose(rasterise(item.box, item.mask, Box(20, 30, 45, 70)), whole[30:70, 20:45], atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(4096, 3072), (512, 384), (1000, 750)])
def test_same_aspect_is_one_picture(width: int, height: int) -> None:
    assert same_aspect(1024, 768, width, height)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(32, 4096),
    st.integers(32, 4096),
    st.integers(7, 128),
    st.sampled_from([8, 32, 64]),
)
def test_a_picture_rounded_by_prep_upscale_is_still_that_picture(w: int, h: int, longer: int, multiple: int) -> None:
    assume(min(w, h) / max(w, h) * longer * 64 >= 448)  # below, rounding distorts more than can be told from a mistake
    size = fitted_size(w, h, longer * 64, multiple)
    assert same_aspect(w, h, *size)
    assert same_aspect(*size, w, h)


@pytest.mark.parametrize("other", [(512, 576), (576, 512), (1024, 1152), (64, 72), (2048, 2230)])
def test_a_tenth_more_on_one_side_is_another_picture(other: tuple[int, int]) -> None:
    assert not same_aspect(512, 512, *other)


def test_another_aspect_names_both_sizes() -> None:
    found = Detections((), 1024, 768)
    with pytest.raises(LunaInputError, match=r"1024x768 px.*1024x1024 px"):
        found.scaled_to(1024, 1024)


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ((10, 10, 5, 20), "reversed or empty"),
        ((10, 10, 20, 10), "reversed or empty"),
        ((10, math.nan, 20, 20), "finite"),
        ((10, 10, math.inf, 20), "finite"),
        ((1, 2, 3), "four finite numbers"),
    ],
)
def test_boxes_that_are_none_are_refused(box: tuple[float, ...], wanted: str) -> None:
    with pytest.raises(LunaInputError, match=f"face.*{wanted}"):
        Detection(0, box, label="face")


@pytest.mark.parametrize("score", [math.nan, -0.1, 1.5])
def test_scores_outside_0_to_1_are_refused(score: float) -> None:
    with pytest.raises(LunaInputError, match="score"):
        Detection(0, (0, 0, 1, 1), score=score)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 3, 3),
        torch.zeros(0, 3),
        torch.zeros(3, 3, dtype=torch.uint8),
        torch.full((3, 3), 2.0),
        torch.full((3, 3), math.nan),
    ],
)
def test_masks_that_are_none_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(LunaInputError, match="mask"):
        Detection(0, (0, 0, 1, 1), mask)


def test_items_outside_their_pictures_are_refused() -> None:
    with pytest.raises(LunaInputError, match=r"number 1.*outside the 64x32 px"):
        Detections((Detection(0, (0, 0, 4, 4)), Detection(0, (0, 0, 4, 33))), 64, 32)
    with pytest.raises(LunaInputError, match="on image 2"):
        Detections((Detection(2, (0, 0, 4, 4)),), 64, 32, image_count=2)
    with pytest.raises(LunaInputError, match="negative"):
        Detection(-1, (0, 0, 4, 4))


def test_500_detections_at_4k_take_a_second_and_no_full_mask_each() -> None:
    """Generous bounds: a full mask each would be 32 GB and minutes, so only a change of kind can fail this."""
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(500, 2, generator=generator) * 3900
    items = [Detection(0, (float(x), float(y), float(x) + 180, float(y) + 150), torch.ones(38, 45)) for x, y in corners]
    start = time.perf_counter()
    large = Detections(tuple(items), SIDE, SIDE).scaled_to(SIDE * 2, SIDE * 2).scaled_to(SIDE, SIDE)
    covered = union_masks(large)
    assert time.perf_counter() - start < 20
    assert covered.shape == (1, SIDE, SIDE)
    assert all(float(covered[0, int(y) + 75, int(x) + 90]) == pytest.approx(1) for x, y in corners)
