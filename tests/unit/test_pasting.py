"""What is pasted: w·new + (1 - w)·old at every px, against the same worked out apart from the pack in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.blend import MOST_BANDS
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.grid import TILE_ORDERS, TileSettings, plan_tiles
from luna_refinement.batching.pasting import PasteSettings
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.weights import MaskWeights, SharedWeights
from luna_refinement.picture.detections import Detection

from harness import pasting
from harness.engines import ExactEngine, refine
from harness.pasting import Array

ROUNDING = 2e-5  # of float32, through two resamplings of some hundred taps

seeds = st.integers(0, 2**20)


def picture(seed: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def engine_that_gives(crops: dict[int, torch.Tensor]) -> ExactEngine:
    return ExactEngine(lambda row, latent: F.pixel_unshuffle(crops[row].movedim(-1, 0), 8))


@st.composite
def detection_plans(draw: st.DrawFn) -> RefinePlan:
    """One to four regions that often overlap, with masks, soft edges and scores, at sizes above and below their own."""
    width, height = draw(st.integers(40, 170)), draw(st.integers(40, 170))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        x1, y1 = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
        x2, y2 = draw(st.integers(x1 + 8, width)), draw(st.integers(y1 + 8, height))
        generator = torch.Generator().manual_seed(draw(seeds))
        mask = torch.rand(y2 - y1, x2 - x1, generator=generator) if draw(st.booleans()) else None
        found.append(Detection(0, (x1, y1, x2, y2), mask=mask, score=draw(st.sampled_from([0.2, 0.5, 0.9]))))
    crops = CropSettings(
        crop_size=draw(st.sampled_from([64, 96, 160])),
        padding=draw(st.floats(0, 1)),
        feather_px=draw(st.integers(0, 40)),
        overlap_mode=draw(st.sampled_from(["together", "waves"])),
    )
    return plan_detections(found, width, height, 1, crops, seed=0)


def weights_of(plan: RefinePlan) -> dict[int, Array]:
    """Every region's weight over the whole picture, and 0 beyond what is pasted."""
    drawn = {}
    for region in plan.regions:
        weights = region.weights
        assert isinstance(weights, MaskWeights)
        x1, y1, x2, y2 = (int(side) for side in weights.target)
        mask = torch.zeros(plan.height, plan.width)
        mask[y1:y2, x1:x2] = 1 if weights.mask is None else weights.mask
        soft = weights.feather_px > 0
        over = pasting.mask_weights(mask, weights.feather_px, weights.outward_px) if soft else mask.double().numpy()
        inside = np.zeros_like(over)
        box = region.paste
        inside[box.y1 : box.y2, box.x1 : box.x2] = 1
        assert (over * (1 - inside)).max() == 0
        drawn[region.row] = over
    return drawn


@settings(max_examples=40, deadline=None)
@given(detection_plans(), seeds)
def test_a_feathered_paste_is_the_weighted_mean_of_new_and_old_at_every_px(plan: RefinePlan, seed: int) -> None:
    image = picture(seed, plan.height, plan.width)
    crops = {region.row: pasting.noise_crop(region, seed) for region in plan.regions}
    refined = refine(image, plan, engine_that_gives(crops))
    weights = weights_of(plan)
    expected = pasting.pasted(image, crops, weights, plan)
    assert np.abs(refined.image[0].double().numpy() - expected).max() < ROUNDING
    left = np.prod([1 - weight for weight in weights.values()], axis=0)
    assert refined.mask is not None
    assert np.abs(refined.mask[0].double().numpy() - (1 - left)).max() < ROUNDING
    untouched = torch.from_numpy(np.max(list(weights.values()), axis=0) == 0)
    assert torch.equal(refined.image[0][untouched], image[0][untouched])


@settings(max_examples=25, deadline=None)
@given(detection_plans(), seeds)
def test_a_multiband_paste_mixes_band_by_band_and_fades_out_with_the_weight(plan: RefinePlan, seed: int) -> None:
    image = picture(seed, plan.height, plan.width)
    crops = {region.row: pasting.noise_crop(region, seed) for region in plan.regions}
    refined = refine(image, plan, engine_that_gives(crops), PasteSettings("multiband"))
    canvas = image[0].double().numpy().copy()
    weights = weights_of(plan)
    for rows in plan.passes:
        for region in sorted((plan.regions[row] for row in rows), key=lambda region: (region.score, region.row)):
            box = region.paste
            place = slice(box.y1, box.y2), slice(box.x1, box.x2)
            new = pasting.laid_out(crops[region.row], region, canvas.shape)[place]
            share = weights[region.row][place]
            bands = min(MOST_BANDS, max(1, min(share.shape).bit_length() - 3))
            blended = pasting.multiband(canvas[place], new, share, bands).clip(0, 1)
            fade = (4 * share).clip(0, 1)[..., None]
            canvas[place] = fade * blended + (1 - fade) * canvas[place]
    assert np.abs(refined.image[0].double().numpy() - canvas).max() < ROUNDING


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 300), st.integers(20, 300), st.sampled_from(TILE_ORDERS), st.data())
def test_tiles_of_one_pass_share_their_px_and_lie_over_the_pass_before(
    width: int, height: int, order: str, data: st.DataObject
) -> None:
    tiles = TileSettings(64, data.draw(st.floats(0, 0.5)), data.draw(st.floats(0, 1)), order)
    plan = plan_tiles(width, height, 1, tiles, seed=0)
    image = picture(data.draw(seeds), height, width)
    crops = {region.row: pasting.noise_crop(region, 1) for region in plan.regions}
    refined = refine(image, plan, engine_that_gives(crops))
    canvas = image[0].double().numpy().copy()
    for rows in plan.passes:
        own = []
        for region in (plan.regions[row] for row in rows):
            assert isinstance(region.weights, SharedWeights)
            tile, (left, top, right, bottom) = region.weights.own.tile, region.weights.own.fade_px
            columns = pasting.fade(tile.x1, tile.x2, left, right, width)
            own.append(pasting.fade(tile.y1, tile.y2, top, bottom, height)[:, None] * columns[None])
        share = np.stack(own) / np.maximum(1, np.sum(own, axis=0))
        new = [pasting.laid_out(crops[row], plan.regions[row], canvas.shape) for row in rows]
        kept = (1 - share.sum(0))[..., None] * canvas
        canvas = kept + sum(part[..., None] * laid for part, laid in zip(share, new, strict=True))
    # where a tile's weight runs out against a rival's, float32 knows their quotient to some 1e-3 of next to nothing
    assert np.abs(refined.image[0].double().numpy() - canvas).max() < 10 * ROUNDING


@pytest.mark.parametrize("blend", ["feather", "multiband"])
def test_a_large_region_pasted_in_parts_is_the_region_pasted_at_once(
    blend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Detection(0, (30, 20, 250, 190), mask=torch.rand(170, 220))]
    plan = plan_detections(found, 300, 260, 1, CropSettings(96, 0.3, 30), seed=0)
    image = picture(3, 260, 300)
    crops = {0: pasting.noise_crop(plan.regions[0], 3)}
    once = refine(image, plan, engine_that_gives(crops), PasteSettings(blend, "wavelet"))
    for module in ("pasting", "plan"):
        monkeypatch.setattr(f"luna_refinement.batching.{module}.WINDOW_PX", 2000)
    parts = refine(image, plan, engine_that_gives(crops), PasteSettings(blend, "wavelet"))
    assert (once.image - parts.image).abs().max() < 1e-6
    assert once.mask is not None
    assert parts.mask is not None
    assert (once.mask - parts.mask).abs().max() < 1e-6
