"""One rasteriser: what the preview and the mask outputs show of a detection is, to the bit, what is pasted of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.picture.boxes import Box, picture_box
from luna_refinement.picture.detections import Detection, Detections
from luna_refinement.picture.drawing import FILL, colour_of, draw_detections
from luna_refinement.picture.masks import rasterise, single_masks, union_masks


def random_mask(height: int, width: int) -> torch.Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(height * 211 + width))


@st.composite
def found(draw: st.DrawFn) -> Detections:
    """One detection anywhere on a picture, with a mask coarser or finer than the picture, or none."""
    width, height = draw(st.integers(24, 160)), draw(st.integers(24, 160))
    x1, y1 = draw(st.floats(0, width - 2)), draw(st.floats(0, height - 2))
    x2, y2 = draw(st.floats(x1 + 1, width)), draw(st.floats(y1 + 1, height))
    size = draw(st.none() | st.tuples(st.integers(1, 200), st.integers(1, 200)))
    mask = None if size is None else random_mask(*size)
    return Detections((Detection(0, (x1, y1, x2, y2), mask),), width, height)


@settings(max_examples=100, deadline=None)
@given(found(), st.integers(60, 4000))
def test_what_is_shown_is_what_is_pasted(detections: Detections, px: int) -> None:
    """Without a feather, in whatever parts the paste is drawn."""
    crops = CropSettings(64, 0.2, feather_px=0)
    plan = plan_detections(detections.items, detections.width, detections.height, 1, crops, seed=0)
    pasted = torch.zeros(1, detections.height, detections.width)
    for part in plan.regions[0].paste.strips(px):
        pasted[0, part.y1 : part.y2, part.x1 : part.x2] = plan.regions[0].weights.draw(part)
    assert torch.equal(union_masks(detections), pasted)
    assert torch.equal(single_masks(detections), pasted)


@settings(max_examples=60, deadline=None)
@given(found(), st.data())
def test_a_px_is_the_same_in_every_window(detections: Detections, data: st.DataObject) -> None:
    (item,) = detections
    whole = rasterise(item.box, item.mask, picture_box(detections.width, detections.height))
    x1, y1 = data.draw(st.integers(0, detections.width - 1)), data.draw(st.integers(0, detections.height - 1))
    window = Box(x1, y1, data.draw(st.integers(x1 + 1, detections.width)), detections.height)
    assert torch.equal(rasterise(item.box, item.mask, window), whole[y1:, x1 : window.x2])


def test_windows_apart_from_the_box_are_empty() -> None:
    for window in (Box(60, 0, 80, 10), Box(-20, -10, 5, 0), Box(7, 7, 7, 20)):
        drawn = rasterise((5.5, 5.5, 50.0, 50.0), random_mask(9, 9), window)
        assert drawn.shape == (window.height, window.width)
        assert not drawn.any()


@pytest.mark.parametrize("times", [1, 2, 3, 8])
def test_whole_multiples_are_antialiased_as_pytorch_does_it(times: int) -> None:
    """Away from the border, where PyTorch reads past it in another way."""
    mask = random_mask(192, 240)
    for size, edge in (((192 * times, 240 * times), times), ((192 // times, 240 // times), 1)):
        wanted = torch.nn.functional.interpolate(mask[None, None].double(), size, mode="bilinear", antialias=True)
        drawn = rasterise((0, 0, size[1], size[0]), mask, picture_box(size[1], size[0]))
        assert float((drawn - wanted[0, 0])[edge:-edge, edge:-edge].abs().max()) < 1e-6


def test_a_tint_is_the_mask_that_is_pasted() -> None:
    """A soft mask without steep edges: its rim is fainter than its tint."""
    ramp = torch.linspace(0.2, 0.8, 64).expand(64, 64)
    detections = Detections((Detection(0, (40.0, 40.0, 104.0, 104.0), ramp),), 160, 160)
    drawn = draw_detections(torch.zeros(1, 160, 160, 3), detections)[0]
    wanted = union_masks(detections)[0, ..., None] * FILL * torch.tensor(colour_of(0)) / 255
    assert float((drawn - wanted)[50:94, 50:94].abs().max()) <= 0.5 / 255 + 1e-6
