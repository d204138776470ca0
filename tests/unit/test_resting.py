"""What a run leaves as it is: rows in no pass, and px that sampling does not reach."""

import torch
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.resting import ScaledWeights, without_px, without_rows
from luna_refinement.picture.boxes import Box
from luna_refinement.picture.detections import Detection

from harness.engines import ExactEngine, refine

CELL = 8


def invert(row: int, latent: torch.Tensor) -> torch.Tensor:
    return 1 - latent


def test_rows_in_no_pass_keep_their_numbers_crops_and_bits() -> None:
    image = torch.rand(2, 96, 96, 3, generator=torch.Generator().manual_seed(1))
    places = [(0, (8.0, 8.0, 40.0, 40.0)), (1, (8.0, 8.0, 40.0, 40.0)), (1, (50.0, 50.0, 90.0, 90.0))]
    found = [Detection(index, box) for index, box in places]
    plan = plan_detections(found, 96, 96, 2, CropSettings(64, 0.0, 0), seed=0)
    rested = without_rows(plan, {1})
    assert rested.passes == ((0, 2),)
    engine = ExactEngine(invert)
    usual = refine(image, plan, ExactEngine(), keep_crops=True)
    refined = refine(image, rested, engine, keep_crops=True)
    assert engine.calls == [[0, 2]]
    assert torch.equal(refined.image[1, 8:40, 8:40], image[1, 8:40, 8:40])
    assert (refined.image[0, 8:40, 8:40] != image[0, 8:40, 8:40]).any()
    assert refined.mask is not None
    assert float(refined.mask[1, 8:40, 8:40].max()) == 0
    assert refined.crops_before is not None
    assert refined.crops_after is not None
    assert usual.crops_before is not None
    assert torch.equal(refined.crops_before[1], usual.crops_before[1])
    assert torch.equal(refined.crops_after[1], usual.crops_before[1])
    assert torch.equal(refined.crops_before[2], usual.crops_before[2])
    assert without_rows(plan, {0, 1, 2}).passes == ()


def tiled(share: torch.Tensor, least: float = 0.1, tile: int = 64) -> tuple[torch.Tensor, list[list[int]]]:
    """How much each px of pictures [B,H,W] changes when a refiner turns black into white."""
    count, height, width = max(1, len(share)), *share.shape[1:]
    plan = plan_tiles(width, height, count, TileSettings(tile, 0.125), seed=0)
    engine = ExactEngine(lambda row, latent: latent * 0 + 1)
    image = torch.zeros(count, height, width, 3)
    return refine(image, without_px(plan, share, least, CELL), engine).image[..., 0], engine.calls


def test_nothing_is_pasted_within_a_latent_px_of_what_is_not_sampled() -> None:
    share = torch.ones(1, 64, 128)
    share[:, :, :50] = 0.05
    change, _ = tiled(share)
    assert float(change[..., : 50 + CELL].max()) == 0
    columns = change[0, 20]
    assert (columns.diff() >= 0).all()  # it rises from there
    assert float(columns.diff().max()) < 0.25  # without a hard edge
    assert float(change[..., 50 + 2 * CELL + 1 :].min()) == 1


def test_shares_that_are_sampled_are_pasted_whole() -> None:
    plan = plan_tiles(128, 64, 1, TileSettings(64, 0.125), seed=0)
    assert without_px(plan, torch.full((1, 64, 128), 0.1), 0.1, CELL) is plan
    assert without_px(plan, torch.full((1, 64, 128), 1e-3), -1e-6, CELL) is plan
    assert without_px(plan, torch.zeros(1, 64, 128), -1e-6, CELL).passes == ()


def test_each_picture_rests_by_its_own_share() -> None:
    share = torch.ones(2, 64, 64)
    share[0] = 0
    change, calls = tiled(share)
    assert float(change[0].max()) == 0
    assert float(change[1].min()) == 1
    assert calls == [[1]]


def test_one_share_counts_for_all_pictures_and_whole_tiles_rest() -> None:
    share = torch.ones(1, 64, 176)
    share[:, :, :70] = 0
    plan = plan_tiles(176, 64, 2, TileSettings(64, 0.125), seed=0)
    first = [region.row for region in plan.regions if region.crop.x1 == 0]
    rested = without_px(plan, share, 0.1, CELL)
    at_work = {row for rows in rested.passes for row in rows}
    assert len(first) == 2
    assert not at_work & set(first)
    assert at_work == {region.row for region in plan.regions} - set(first)


def test_scaled_weights_are_those_of_their_place() -> None:
    class Ones:
        def draw(self, window: Box) -> torch.Tensor:
            return torch.ones(window.height, window.width)

    scale = torch.rand(20, 30, generator=torch.Generator().manual_seed(2))
    weights = ScaledWeights(Ones(), scale)
    assert torch.equal(weights.draw(Box(4, 3, 14, 9)), scale[3:9, 4:14])
    beyond = weights.draw(Box(-2, -3, 32, 23))
    assert torch.equal(beyond[3:23, 2:32], scale)
    beyond[3:23, 2:32] = 0
    assert float(beyond.max()) == 0
