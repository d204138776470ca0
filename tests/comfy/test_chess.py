"""The Chess Refiner on real ComfyUI: passes, anchors per tile, less denoise where regions were refined."""

import pytest
import torch
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter import LayerWeights
from luna_refinement.picture.boxes import picture_box

from harness.refining import Studio, counting, photograph

TILES = {"tile_size": 64, "min_overlap": 0.125}


def test_a_4k_plan_scaled_down_runs_in_two_sampling_calls(sd15: Studio) -> None:
    image = photograph(height=256, width=256)  # 4 tiles of 64 px along a side need 5 with their overlap
    model, calls = counting(sd15.model)
    refined, drawing = sd15.chess(image, model=model, steps=2, **TILES)
    assert calls == [2 * 13] * 2 + [2 * 12] * 2
    assert drawing.shape == image.shape
    assert (refined != image).any(-1).float().mean() > 0.99


def test_a_pass_that_takes_several_calls_is_split_evenly(sd15: Studio) -> None:
    model, calls = counting(sd15.model)
    sd15.chess(photograph(height=256, width=256), model=model, steps=1, chunk_size=12, **TILES)
    assert calls == [2 * 7, 2 * 6, 2 * 12]


def test_another_anchor_changes_only_its_tile_and_what_follows_from_it(sd15: Studio) -> None:
    """An odd tile's anchor changes that tile alone: no other tile of its pass reads it."""
    image = photograph(height=256, width=256)
    settings = TileSettings(64, 0.125)
    plan = plan_tiles(256, 256, 1, settings, seed=7)
    region = plan.regions[plan.passes[1][0]]
    before = sd15.chess(image, steps=1, **TILES)[0]

    # The picture under this tile's centre, which no other odd tile and no even tile sees, is its anchor and its latent.
    others = [r.crop for r in plan.regions if r.row != region.row]
    seen = torch.zeros(256, 256, dtype=torch.bool)
    for crop in others:
        box = crop.intersect(picture_box(256, 256))
        seen[box.y1 : box.y2, box.x1 : box.x2] = True
    own = ~seen
    own[: region.crop.y1], own[region.crop.y2 :] = False, False
    own[:, : region.crop.x1], own[:, region.crop.x2 :] = False, False
    assert own.any()
    changed = image.clone()
    changed[0, own] = 1 - changed[0, own]
    after = sd15.chess(changed, steps=1, **TILES)[0]
    moved = (before != after).any(-1)[0]
    box = region.paste
    assert moved[own].any()
    moved[box.y1 : box.y2, box.x1 : box.x2] = False
    assert not moved.any()


def test_the_row_curve_weighs_tile_by_tile_in_each_picture(sd15: Studio) -> None:
    """Four tiles: with 0, 0, 0, 1 only the last even one is anchored, and the odd ones see it."""
    image = photograph(count=2, height=128, width=128)
    tiles = {"tile_size": 80, "min_overlap": 0.25, "denoise": 0.6}
    text = sd15.chess(image, ip_adapter_weight=0.0, **tiles)[0]
    last = sd15.chess(image, ip_adapter_weight=5.0, layer_weights=LayerWeights(row_curve=(0, 0, 0, 1)), **tiles)[0]
    assert torch.equal(last[:, :40, :40], text[:, :40, :40])
    for picture in (0, 1):
        assert (last[picture, 90:, 90:] - text[picture, 90:, 90:]).abs().max() > 1e-3


def test_refined_places_get_less_denoise(sd15: Studio) -> None:
    image = photograph(height=128, width=128)
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    settings = {"steps": 8, "denoise": 0.6, "tile_size": 128}
    full = sd15.chess(image, **settings)[0]
    gentle = sd15.chess(image, refined_mask=mask, refined_strength=0.3, **settings)[0]
    kept = sd15.chess(image, refined_mask=mask, refined_strength=0.0, **settings)[0]
    plain = sd15.chess(image, denoise=0.02, steps=1, tile_size=128)[0]  # the VAE's own loss

    def change(result: torch.Tensor) -> float:
        return float((result - plain)[:, :, 8:56].abs().mean())

    assert torch.equal(kept[:, :, :64], image[:, :, :64])
    assert change(gentle) < change(full)
    assert float((gentle - full)[:, :, 72:].abs().mean()) < float((gentle - full)[:, :, 8:56].abs().mean())
    with pytest.raises(LunaInputError, match="refined_mask"):
        sd15.chess(image, refined_mask=torch.zeros(3, 128, 128))
    with pytest.raises(LunaInputError, match=r"refined_mask has 128x50 px.*aspect"):
        sd15.chess(image, refined_mask=torch.ones(1, 50, 128))


def test_an_empty_mask_of_load_image_is_no_refined_mask(sd15: Studio) -> None:
    """Load Image gives 64x64 zeros for a picture without alpha, whatever its aspect."""
    image = photograph(height=64, width=128)
    plain = sd15.chess(image, steps=1, tile_size=64)[0]
    assert torch.equal(sd15.chess(image, steps=1, tile_size=64, refined_mask=torch.zeros(1, 64, 64))[0], plain)


@pytest.mark.parametrize("given", [torch.full((1, 64, 64), float("nan")), torch.full((1, 64, 64), 7.0), torch.ones(64)])
def test_what_is_no_refined_mask_is_named(sd15: Studio, given: torch.Tensor) -> None:
    with pytest.raises(LunaInputError, match="refined_mask"):
        sd15.chess(photograph(height=64, width=64), steps=1, tile_size=64, refined_mask=given)


def test_each_picture_has_its_own_refined_places(sd15: Studio) -> None:
    """Soft shares, which are sampled in part: the mask of one picture must not hold the other."""
    images = photograph(1, height=72, width=72).repeat(2, 1, 1, 1)
    masks = torch.stack([torch.zeros(72, 72), torch.ones(72, 72)])
    settings = {"steps": 6, "denoise": 0.6, "tile_size": 72, "refined_strength": 0.4, "ip_adapter": None}
    both = sd15.chess(images, refined_mask=masks, **settings)[0]
    for index in (0, 1):
        alone = sd15.chess(images[:1], refined_mask=masks[index : index + 1], **settings)[0]
        assert float((both[index] - alone[0]).abs().max()) <= 1e-4
    assert float((both[0] - both[1]).abs().max()) > 0.01


def test_batches_share_the_passes(sd15: Studio) -> None:
    images = photograph(2, height=120, width=120)
    model, calls = counting(sd15.model)
    refined = sd15.chess(images, model=model, steps=1, **TILES)[0]
    assert refined.shape == images.shape
    assert len(calls) == 2
    assert sum(calls) == 2 * 2 * 4  # four tiles on each of two pictures, with two prompts


def test_output_scale_supersamples(sd15: Studio) -> None:
    image = photograph(height=96, width=64)
    assert sd15.chess(image, steps=1, output_scale=1.5, tile_size=64)[0].shape == (1, 144, 96, 3)
