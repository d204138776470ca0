"""Random plans carried out by an exact engine: none fails, px outside keep their bits, shares of a grid add up to 1.

``LUNA_FUZZ_EXAMPLES`` says how many plans each test tries: 30 without it, 10,000 in all by ``nox -s fuzz``.
"""

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luna_refinement.batching.blend import BLENDS
from luna_refinement.batching.color import COLOR_MATCHES, ColorMatch
from luna_refinement.batching.crop_plan import (
    MASK_MODES,
    OVERLAP_MODES,
    SMALLEST_CROP,
    SMALLEST_WORKING,
    CropSettings,
    plan_detections,
)
from luna_refinement.batching.grid import TILE_ORDERS, TileSettings, plan_tiles
from luna_refinement.batching.pasting import PasteSettings
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.refine import Refined
from luna_refinement.picture.boxes import picture_box
from luna_refinement.picture.detections import Detection
from torch import Tensor

from harness.engines import ExactEngine, refine

LONG = os.environ.get("LUNA_FUZZ") == "long" or "LUNA_FUZZ_EXAMPLES" in os.environ

many = settings(
    max_examples=int(os.environ.get("LUNA_FUZZ_EXAMPLES") or (3400 if LONG else 30)),
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
)

sides = st.integers(1, 160) | st.sampled_from([1, 2, 7, 8, 9, 63, 64, 65, 125, 127, 128, 129])
paste_settings = st.builds(PasteSettings, st.sampled_from(BLENDS), st.sampled_from(COLOR_MATCHES))


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """One to three pictures [B,H,W,3 or 4] of any shape, some of them long strips."""
    height, width = draw(sides), draw(sides)
    if draw(st.integers(0, 9)) == 0:
        height, width = draw(st.sampled_from([(3000, 5), (7, 4000), (2, 2000)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return torch.rand(draw(st.integers(1, 3)), height, width, draw(st.sampled_from([3, 4])), generator=generator)


@st.composite
def detections(draw: st.DrawFn, image: Tensor) -> Detection:
    """A box anywhere on any picture, in whole px or in parts, with or without a mask of any resolution."""
    height, width = image.shape[1:3]
    x, y = draw(st.floats(0, width - 0.5)), draw(st.floats(0, height - 0.5))
    box = (x, y, min(width, x + draw(st.floats(0.25, width))), min(height, y + draw(st.floats(0.25, height))))
    mask = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        mask = torch.rand(draw(st.integers(1, 70)), draw(st.integers(1, 70)), generator=generator)
        if draw(st.booleans()):
            mask = (mask > draw(st.floats(0, 1))).float()
    return Detection(draw(st.integers(0, image.shape[0] - 1)), box, mask, draw(st.floats(0, 1)))


@st.composite
def region_plans(draw: st.DrawFn) -> tuple[Tensor, RefinePlan]:
    image = draw(batches())
    cell = draw(st.sampled_from([8, 16, 32]))
    crops = CropSettings(
        crop_size=draw(st.sampled_from([64, 96, 128])),
        padding=draw(st.floats(0, 8)),
        feather_px=draw(st.integers(0, 60) | st.sampled_from([200, 1024])),
        mask_mode=draw(st.sampled_from(MASK_MODES)),
        overlap_mode=draw(st.sampled_from(OVERLAP_MODES)),
        cell_px=cell,
    )
    found = [draw(detections(image)) for _ in range(draw(st.integers(1, 5)))]
    return image, plan_detections(found, image.shape[2], image.shape[1], image.shape[0], crops, seed=0)


@st.composite
def tile_plans(draw: st.DrawFn) -> tuple[Tensor, RefinePlan]:
    image = draw(batches())
    tiles = TileSettings(
        tile_size=draw(st.sampled_from([64, 96, 128])),
        min_overlap=draw(st.floats(0, 0.5)),
        feather=draw(st.floats(0, 1)),
        order=draw(st.sampled_from(TILE_ORDERS)),
        cell_px=draw(st.sampled_from([8, 16, 32])),
    )
    return image, plan_tiles(image.shape[2], image.shape[1], image.shape[0], tiles, seed=0)


def check_plan(image: Tensor, plan: RefinePlan) -> None:
    """What every plan keeps: each row once, whole latent px, and nothing larger than the picture or the model asks."""
    assert sorted(row for rows in plan.passes for row in rows) == list(range(len(plan.regions)))
    for region in plan.regions:
        assert region.crop.contains(region.paste)
        assert picture_box(plan.width, plan.height).contains(region.paste)
        assert not region.paste.is_empty
        inside = region.crop.intersect(picture_box(plan.width, plan.height))
        assert (inside.width, inside.height) == (
            min(region.crop.width, plan.width),
            min(region.crop.height, plan.height),
        )
        # past the picture lie only the px that round a side up to whole latent px, or to the least a model can read
        longer = max(region.crop.width, region.crop.height)
        assert longer <= max(plan.width, plan.height, SMALLEST_CROP) + 31
        if region.scale == 1 or min(region.working_size) > SMALLEST_WORKING:
            for side, limit in ((region.crop.width, plan.width), (region.crop.height, plan.height)):
                assert side <= max(limit, SMALLEST_CROP) + 32 / region.scale


def check_refined(image: Tensor, plan: RefinePlan, refined: Refined) -> None:
    """px that no region pastes, and the alpha, keep their bits; what is pasted is a picture."""
    assert refined.mask is not None
    changed = (refined.image != image).any(-1)
    assert not (changed & (refined.mask == 0)).any()
    for region in plan.regions:
        box = region.paste
        changed[region.image_index, box.y1 : box.y2, box.x1 : box.x2] = False
    assert not changed.any()
    assert torch.equal(refined.image[..., 3:], image[..., 3:])
    assert 0 <= float(refined.image.min()) <= float(refined.image.max()) <= 1 + 1e-6
    assert 0 <= float(refined.mask.min()) <= float(refined.mask.max()) <= 1 + 1e-6


@many
@given(region_plans(), paste_settings)
def test_any_regions_are_refined_and_nothing_else_changes(
    case: tuple[Tensor, RefinePlan], pasting: PasteSettings
) -> None:
    image, plan = case
    before = image.clone()
    check_plan(image, plan)
    refined = refine(image, plan, ExactEngine(lambda row, latent: 1 - latent), pasting, keep_crops=True)
    check_refined(image, plan, refined)
    assert torch.equal(image, before)
    assert refined.crops_before is not None
    assert len(refined.crops_before) == len(plan.regions)


@many
@given(tile_plans(), st.sampled_from(COLOR_MATCHES))
def test_the_shares_of_any_grid_add_up_to_one(case: tuple[Tensor, RefinePlan], color_match: ColorMatch) -> None:
    image, plan = case
    check_plan(image, plan)
    black = torch.zeros_like(image)
    white = refine(black, plan, ExactEngine(lambda row, latent: torch.ones_like(latent)))
    assert white.mask is not None
    assert float(white.mask.min()) > 1 - 2e-6
    assert float(white.image[..., :3].min()) > 1 - 2e-6
    check_refined(image, plan, refine(image, plan, ExactEngine(), PasteSettings(color_match=color_match)))


@many
@given(region_plans() | tile_plans())
def test_an_engine_that_changes_nothing_moves_nothing(case: tuple[Tensor, RefinePlan]) -> None:
    """What is scaled to another size and back stays in its place: a level picture stays level to rounding."""
    image, plan = case
    level = torch.full_like(image, 0.6)
    refined = refine(level, plan, ExactEngine())
    assert float((refined.image - level).abs().max()) < 1e-5
