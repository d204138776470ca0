from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.crops import cut
from luna_refinement.batching.pasting import PasteSettings
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.refine import refine as refine_rows
from luna_refinement.batching.rows import EncodedRow, Row, resolve_rows
from luna_refinement.errors import LunaInputError, LunaRuntimeError
from luna_refinement.picture.detections import Detection
from skimage.data import astronaut

from harness.engines import ExactEngine, refine


def photograph(channels: int = 3, height: int = 240, width: int = 256) -> torch.Tensor:
    image = torch.from_numpy(astronaut()[:height, :width]).float()[None] / 255
    return image if channels == 3 else torch.cat([image, torch.rand(1, height, width, 1)], dim=-1)


BOXES = [(40.0, 30.0, 104.0, 94.0), (150.0, 40.0, 214.0, 104.0), (90.0, 140.0, 154.0, 204.0)]


def plan_for(boxes: list[tuple[float, float, float, float]], image: torch.Tensor, **settings: object) -> RefinePlan:
    crops = CropSettings(**({"crop_size": 64, "padding": 0.0, "feather_px": 0} | settings))
    detections = [Detection(0, box) for box in boxes]
    return plan_detections(detections, image.shape[2], image.shape[1], image.shape[0], crops, seed=5)


def brighten(row: int, latent: torch.Tensor) -> torch.Tensor:
    return latent * 0.5 + 0.1 * (row + 1)


def test_an_engine_that_changes_nothing_returns_the_same_bits() -> None:
    image = photograph()
    refined = refine(image, plan_for(BOXES, image), ExactEngine())
    assert torch.equal(refined.image, image)


def test_px_outside_the_paste_region_keep_their_bits() -> None:
    image = photograph(channels=4)
    plan = plan_for(BOXES, image, crop_size=96, padding=0.3, feather_px=12)
    refined = refine(image, plan, ExactEngine(brighten))
    changed = (refined.image != image).any(-1)
    assert changed.any()
    assert not (changed & (refined.mask == 0)).any()
    for region in plan.regions:
        changed[0, region.paste.y1 : region.paste.y2, region.paste.x1 : region.paste.x2] = False
    assert not changed.any()
    assert torch.equal(refined.image[..., 3], image[..., 3])


@pytest.mark.parametrize("blend", ["feather", "multiband"])
@pytest.mark.parametrize("color_match", ["none", "mean_std", "wavelet"])
def test_every_blend_and_color_match_stays_inside_the_mask(blend: str, color_match: str) -> None:
    image = photograph()
    plan = plan_for(BOXES, image, crop_size=96, padding=0.3, feather_px=12)
    refined = refine(image, plan, ExactEngine(brighten), PasteSettings(blend, color_match))
    changed = (refined.image != image).any(-1)
    assert changed.any()
    assert not (changed & (refined.mask == 0)).any()


@pytest.mark.parametrize("color_match", ["mean_std", "wavelet"])
def test_a_later_pass_takes_its_colours_from_the_input_picture(color_match: str) -> None:
    """Not from what earlier passes made of it: colours would drift from pass to pass."""
    image = torch.linspace(0.2, 0.8, 64).view(1, 1, 64, 1).expand(1, 64, 64, 3).contiguous()
    whole, left = (0.0, 0.0, 64.0, 64.0), (0.0, 16.0, 32.0, 48.0)
    plan = replace(plan_for([whole, left], image), passes=((0,), (1,)))
    mirror = ExactEngine(lambda row, latent: latent.flip(-1) if row == 0 else latent)
    refined = refine(image, plan, mirror, PasteSettings(color_match=color_match)).image
    inner = (0, slice(20, 44), slice(4, 28))
    assert refined[inner].mean() == pytest.approx(float(image[inner].mean()), abs=0.06)


def test_colours_are_matched_by_what_is_pasted_alone() -> None:
    """What the model makes of the context around a mask does not count."""
    image = photograph()
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    found = Detection(0, (40.0, 30.0, 104.0, 94.0), mask=mask)
    plan = plan_detections([found], 256, 240, 1, CropSettings(crop_size=64, padding=0.0, feather_px=0), seed=5)

    def change(row: int, latent: torch.Tensor) -> torch.Tensor:
        changed = latent * 0.5
        changed[..., 4:] = 1  # white beside the mask
        return changed

    inside = (0, slice(30, 94), slice(40, 72))
    refined = refine(image, plan, ExactEngine(change), PasteSettings(color_match="mean_std")).image
    assert refined[inside].mean((0, 1)) == pytest.approx(image[inside].mean((0, 1)), abs=0.01)


def test_input_picture_is_not_modified() -> None:
    image = photograph()
    before = image.clone()
    refine(image, plan_for(BOXES, image), ExactEngine(brighten))
    assert torch.equal(image, before)


def test_crops_come_back_in_the_order_of_the_detections_whatever_the_grouping() -> None:
    image = photograph()
    boxes = [(0.0, 0.0, 240.0, 240.0), (10.0, 10.0, 40.0, 40.0), (20.0, 100.0, 210.0, 200.0), (60.0, 60.0, 90.0, 90.0)]
    plan = plan_for(boxes, image, crop_size=0)
    engine = ExactEngine(lambda row, latent: latent * 0 + row / 10)
    refined = refine(image, plan, engine, keep_crops=True)
    assert refined.crops_before is not None
    assert refined.crops_after is not None
    assert [round(float(crop.mean()) * 10) for crop in refined.crops_after] == [0, 1, 2, 3]
    assert [crop.shape[0] for crop in refined.crops_before] == [512, 512, 512, 512]


def test_higher_scores_lie_on_top() -> None:
    image = photograph()
    box = (40.0, 30.0, 104.0, 94.0)
    detections = [Detection(0, box, score=0.9), Detection(0, box, score=0.4)]
    plan = plan_detections(detections, 256, 240, 1, CropSettings(64, 0.0, 0), seed=0)
    refined = refine(image, plan, ExactEngine(lambda row, latent: latent * 0 + (1 - row)))
    assert refined.image[0, 60, 70].tolist() == [1, 1, 1]


def test_overlapping_soft_pastes_never_darken() -> None:
    """Two overlapping feathered regions that both bring the same white: the seam is white, not a dark edge."""
    image = torch.ones(1, 200, 200, 3)
    plan = plan_for([(40.0, 40.0, 110.0, 110.0), (90.0, 60.0, 160.0, 130.0)], image, padding=0.3, feather_px=20)
    refined = refine(image, plan, ExactEngine())
    assert refined.image.min() > 1 - 1e-5


def test_together_is_one_call_and_waves_let_later_regions_see_earlier_ones() -> None:
    image = torch.zeros(1, 200, 200, 3)
    boxes = [(40.0, 40.0, 104.0, 104.0), (72.0, 40.0, 136.0, 104.0), (140.0, 140.0, 190.0, 190.0)]

    def add(row: int, latent: torch.Tensor) -> torch.Tensor:
        return latent + 0.25

    together, in_waves = ExactEngine(add), ExactEngine(add)
    once = refine(image, plan_for(boxes, image), together).image
    twice = refine(image, plan_for(boxes, image, overlap_mode="waves"), in_waves).image
    assert together.calls == [[0, 1, 2]]
    assert in_waves.calls == [[0, 2], [1]]
    assert once[0, 70, 90, 0] == pytest.approx(0.25, abs=1e-3)
    assert twice[0, 70, 90, 0] == pytest.approx(0.5, abs=1e-3)


def test_images_of_a_batch_share_one_call() -> None:
    image = torch.cat([photograph(), photograph().flip(2), photograph().flip(1)])
    detections = [Detection(i, BOXES[0]) for i in (2, 0, 1)]
    plan = plan_detections(detections, 256, 240, 3, CropSettings(64, 0.0, 0), seed=0)
    engine = ExactEngine(lambda row, latent: latent * 0 + row / 10)
    refined = refine(image, plan, engine)
    assert engine.calls == [[0, 1, 2]]
    assert [round(float(refined.image[i, 60, 70, 0]) * 10) for i in (2, 0, 1)] == [0, 1, 2]


def test_results_that_are_not_numbers_are_an_error() -> None:
    image = photograph()
    with pytest.raises(LunaRuntimeError, match="fp32-vae"):
        refine(image, plan_for(BOXES, image), ExactEngine(lambda row, latent: latent * float("nan")))


def test_row_seeds_depend_on_seed_image_and_region_alone() -> None:
    image = photograph()
    both, alone = plan_for(BOXES, image), plan_for(BOXES[1:2], image)
    assert both.regions[1].seed == alone.regions[0].seed
    assert len({region.seed for region in both.regions}) == 3


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"crop_size": 100}, "crop_size"),
        ({"padding": -1.0}, "padding"),
        ({"feather_px": -1}, "feather"),
        ({"mask_mode": "x"}, "mask_mode"),
        ({"overlap_mode": "x"}, "overlap_mode"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, object], word: str) -> None:
    with pytest.raises(LunaInputError, match=word):
        CropSettings(**settings)


def test_detections_that_fit_no_picture_are_named() -> None:
    with pytest.raises(LunaInputError, match="image 3"):
        plan_detections([Detection(3, BOXES[0])], 256, 240, 1, CropSettings(), seed=0)
    with pytest.raises(LunaInputError, match="outside"):
        plan_detections([Detection(0, (300, 0, 320, 20))], 256, 240, 1, CropSettings(), seed=0)


def test_crops_are_cut_once_in_the_first_pass_and_for_anchors_from_the_input_in_later_ones() -> None:
    image = photograph()
    plan = plan_for([*BOXES, (60.0, 60.0, 120.0, 120.0)], image, overlap_mode="waves")
    assert len(plan.passes) == 2
    given: list[tuple[str, int]] = []

    class Watching(ExactEngine):
        def view(self, rows: Sequence[Row], crops: torch.Tensor) -> list[torch.Tensor | None]:
            for row, crop in zip(rows, crops, strict=True):
                region = row.region
                assert torch.equal(crop, cut(image[0], region.crop, *region.working_size))
            given.append(("view", crops.data_ptr()))
            return super().view(rows, crops)

        def encode(
            self, rows: Sequence[Row], crops: torch.Tensor, views: Sequence[torch.Tensor | None]
        ) -> list[EncodedRow]:
            given.append(("encode", crops.data_ptr()))
            return super().encode(rows, crops, views)

    rows = resolve_rows(plan, {}, anchor_weight=1.0)
    refine_rows(image, plan, rows, Watching(brighten, px_per_batch=10**9))
    assert [kind for kind, _ in given] == ["view", "encode"] * len(plan.passes)
    assert given[0][1] == given[1][1]
    refine_rows(image, plan, resolve_rows(plan, {}), Watching(brighten))
    assert "view" not in [kind for kind, _ in given[2 * len(plan.passes) :]]
