"""Pictures and masks of another device, as ComfyUI's --gpu-only gives them: same results, on that device."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from luna_refinement.batching.blend import BLENDS
from luna_refinement.batching.color import COLOR_MATCHES
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.drawing import draw_plan
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.pasting import PasteSettings
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.upscale import UPSCALE_METHODS, scale_image
from luna_refinement.picture.detections import Detection

from harness.engines import ExactEngine, refine
from harness.other_device import OTHER, on_other_device, other_device, values


@pytest.fixture(autouse=True)
def a_second_device() -> Iterator[None]:
    with other_device():
        yield


def picture() -> torch.Tensor:
    return torch.rand(2, 120, 150, 4, generator=torch.Generator().manual_seed(1))


def plan(mask: torch.Tensor | None) -> RefinePlan:
    found = [Detection(0, (10, 20, 60, 70), mask=mask), Detection(1, (40, 30, 110, 100), mask)]
    return plan_detections(found, 150, 120, 2, CropSettings(64, 0.2, 8), seed=0)


def brighten(row: int, latent: torch.Tensor) -> torch.Tensor:
    return latent * 0.5 + 0.2


def test_the_other_device_does_not_mix_with_the_cpu() -> None:
    there = on_other_device(torch.rand(3, 4))
    assert there.device == OTHER
    assert torch.equal(values(there + there.mean()), values(there) + values(there).mean())
    assert torch.equal((there + 0.0).cpu(), values(there))
    for mix in (lambda: there + torch.rand(3, 4), lambda: torch.rand(3, 4).lerp_(there, torch.tensor(0.5))):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises((RuntimeError, TypeError)):
        np.asarray(there)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("color_match", COLOR_MATCHES)
def test_a_refinement_is_the_same_for_a_picture_and_masks_of_another_device(blend: str, color_match: str) -> None:
    image, mask = picture(), torch.rand(30, 40, generator=torch.Generator().manual_seed(2))
    settings = PasteSettings(blend, color_match)
    here = refine(image, plan(mask), ExactEngine(brighten), settings, keep_crops=True)
    there = refine(
        on_other_device(image), plan(on_other_device(mask)), ExactEngine(brighten), settings, keep_crops=True
    )
    for name in ("image", "mask", "crops_before", "crops_after"):
        assert torch.equal(values(getattr(there, name)), getattr(here, name)), name


def test_plans_are_drawn_over_pictures_of_another_device() -> None:
    image = picture()
    for drawn in (plan(None), plan_tiles(150, 120, 2, TileSettings(64), seed=0)):
        assert torch.equal(values(draw_plan(on_other_device(image), drawn)), draw_plan(image, drawn))


@pytest.mark.parametrize("method", UPSCALE_METHODS)
def test_scaled_pictures_stay_on_their_device(method: str) -> None:
    image = picture()
    there = scale_image(on_other_device(image), 60, 75, method)
    assert torch.allclose(values(there), scale_image(image, 60, 75, method), atol=1e-6)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("color_match", COLOR_MATCHES)
def test_a_picture_of_main_memory_is_worked_on_where_the_engine_is(blend: str, color_match: str) -> None:
    image, mask = picture(), torch.rand(30, 40, generator=torch.Generator().manual_seed(2))
    seen = []

    class Watching(ExactEngine):
        def latents(self, crops: torch.Tensor) -> torch.Tensor:
            seen.append(crops.device)
            return super().latents(crops)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(latents.device)
            return super().decode(latents)

    settings = PasteSettings(blend, color_match)
    here = refine(image, plan(mask), ExactEngine(brighten), settings, keep_crops=True)
    there = refine(image, plan(mask), Watching(brighten, device=OTHER), settings, keep_crops=True)
    assert set(seen) == {OTHER}
    for name in ("image", "mask", "crops_before", "crops_after"):
        # crops are resampled by other means there: equal to rounding
        assert torch.allclose(getattr(there, name), getattr(here, name), rtol=0, atol=2e-6), name
