import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.weights import MaskWeights, TileWeights, smoothstep
from luna_refinement.picture.boxes import Box, picture_box
from luna_refinement.picture.detections import Detection
from luna_refinement.picture.masks import rasterise


def test_box_mask_covers_fractions_of_px() -> None:
    drawn = rasterise((1.25, 1.0, 3.0, 2.5), None, Box(0, 0, 4, 4))
    assert drawn[1].tolist() == [0.0, 0.75, 1.0, 0.0]
    assert drawn[:, 2].tolist() == [0.0, 1.0, 0.5, 0.0]


def test_mask_at_its_own_resolution_is_drawn_as_it_is() -> None:
    mask = torch.rand(7, 5)
    drawn = rasterise((3.0, 2.0, 8.0, 9.0), mask, Box(0, 0, 12, 12))
    assert torch.allclose(drawn[2:9, 3:8], mask, atol=1e-6)
    drawn[2:9, 3:8] = 0
    assert drawn.max() == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(8, 60), st.integers(8, 60))
def test_mask_of_another_resolution_lands_within_a_px(factor: int, left: int, top: int) -> None:
    """A half-plane drawn from a mask ``factor`` times coarser has its edge where it belongs."""
    size = 32 * factor
    mask = torch.zeros(32, 32)
    mask[:, 16:] = 1
    drawn = rasterise((left, top, left + size, top + size), mask, picture_box(left + size, top + size))
    edge = left + size - drawn[top + size // 2].sum()
    assert abs(float(edge) - (left + size / 2)) <= 0.5


def test_a_straight_feather_is_a_smoothstep() -> None:
    weights = MaskWeights((0.0, 0.0, 200.0, 400.0), None, feather_px=40, outward_px=40, width=400, height=400)
    row = weights.draw(Box(190, 200, 250, 201))[0]
    position = (torch.arange(190, 250) + 0.5 - 200) / 40
    assert (row - smoothstep(1 - position)).abs().max() < 0.03
    assert row[:9].min() > 0.999
    assert row[51:].max() == 0


def test_feather_leaves_soft_masks_proportional() -> None:
    mask = torch.full((100, 100), 0.3)
    weights = MaskWeights((100.0, 100.0, 200.0, 200.0), mask, feather_px=16, outward_px=16, width=400, height=400)
    drawn = weights.draw(picture_box(400, 400))
    assert torch.allclose(drawn[120:180, 120:180], torch.tensor(0.3), atol=1e-5)
    assert drawn.max() < 0.3 + 1e-5


def test_feather_stops_at_no_picture_border() -> None:
    weights = MaskWeights((0.0, 0.0, 50.0, 50.0), None, feather_px=20, outward_px=20, width=200, height=200)
    assert weights.draw(Box(0, 0, 50, 50)).min() > 0.999


def test_beyond_the_picture_a_mask_goes_on_as_at_its_border() -> None:
    """Crops of long, thin pictures reach far past them, whole windows at a time."""
    weights = MaskWeights((10.0, 0.0, 30.0, 5.0), None, feather_px=4, outward_px=4, width=40, height=7)
    top, bottom = weights.draw(Box(0, 0, 40, 1)), weights.draw(Box(0, 6, 40, 7))
    assert torch.equal(weights.draw(Box(0, -100, 40, -60)), weights.draw(Box(0, -60, 40, -20)))
    assert torch.allclose(weights.draw(Box(0, -100, 40, -60)), top.expand(40, 40), atol=1e-6)
    assert weights.draw(Box(0, 50, 40, 60)).max() <= bottom.max()
    assert not weights.draw(Box(100, 0, 120, 7)).any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_paste_weights_vanish_outside_the_paste_box_and_hold_inside(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(64, 300)), data.draw(st.integers(64, 300))
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    feather, padding = data.draw(st.integers(0, 80)), data.draw(st.floats(0, 0.5))
    detection = Detection(0, (x1, y1, x2, y2))
    plan = plan_detections([detection], width, height, 1, CropSettings(256, padding, feather), seed=1)
    region = plan.regions[0]
    drawn = region.weights.draw(picture_box(width, height))
    outside = drawn.clone()
    outside[region.paste.y1 : region.paste.y2, region.paste.x1 : region.paste.x2] = 0
    assert outside.max() == 0
    assert drawn.max() > 0.35  # never so much feather that a small region vanishes
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_windows_of_the_same_weights_agree() -> None:
    weights = MaskWeights((40.5, 30.0, 90.0, 88.0), torch.rand(20, 20), 12, 8, 160, 150)
    whole = weights.draw(picture_box(160, 150))
    assert torch.allclose(weights.draw(Box(50, 20, 100, 70)), whole[20:70, 50:100], atol=1e-6)


def test_tile_fades_on_inner_edges_only() -> None:
    weights = TileWeights(Box(0, 64, 128, 192), fade_px=(0, 16, 16, 16)).draw(picture_box(256, 256))
    assert weights[128, 0] == 1
    assert weights[128, 127] < 0.01
    assert weights[64, 10] < 0.01
    assert weights[:64].max() == 0
