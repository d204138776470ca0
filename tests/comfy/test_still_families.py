"""Families that draw pictures without a UNet, told by ComfyUI's own detection: rows keep apart on all of them.

Among them are those whose latents have a dimension for frames: each row is a video of one frame.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.samplers
import pytest
import torch
from luna_refinement.batching.comfy_latents import latent_shape
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.noise import row_noise
from torch import Tensor

from harness.refining import BOXES, Studio, counting, detections, difference, photograph
from harness.still_models import FAMILIES

BOUND = 1e-4  # of the picture's scale
ROWS = BOXES[:3]

Settings = dict[str, Any]


def make_settings(name: str) -> Settings:
    """What puts a family in the place of a UNet."""
    family = FAMILIES[name]
    if not family.is_known:
        pytest.skip(f"this ComfyUI has no {family.detected}")
    prompts = {kind: family.conditioning(kind) for kind in ("positive", "negative")}
    return {"model": family.model(), "vae": family.vae(), "ip_adapter": None, "steps": 2, **prompts}


settings_of = cache(make_settings)
"""The same for all tests: none of them changes a model."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Settings:
    return settings_of(request.param)


def by_core(family: Settings, latents: Tensor, noise: Tensor) -> Tensor:
    """What ComfyUI's own KSampler makes of latents, with the detailer's settings."""
    model = family["model"]
    steps, device = family["steps"], torch.device("cpu")
    sampler = comfy.samplers.KSampler(model, steps, device, "euler", "normal", 0.4, model.model_options)
    prompts = family["positive"], family["negative"]
    with torch.inference_mode():
        return sampler.sample(noise, *prompts, cfg=3.0, latent_image=latents, disable_pbar=True, seed=7)


def test_rows_come_out_the_same_in_any_company(sd15: Studio, family: Settings) -> None:
    image = photograph()
    model, calls = counting(family["model"])
    options = str(family["model"].model_options)
    refined, mask, _, together = sd15.detail(image, detections(image, ROWS), **(family | {"model": model}))
    assert calls == [2 * 3] * 2
    assert str(family["model"].model_options) == options
    assert not ((refined != image).any(-1) & (mask == 0)).any()
    assert float(together.std()) > 0.01
    assert float(((together == 0) | (together == 1)).float().mean()) < 0.5  # what is clipped would hide a difference
    assert torch.equal(sd15.detail(image, detections(image, ROWS), **family)[3], together)
    alone = sd15.detail(image, detections(image, ROWS), chunk_size=1, **family)[3]
    assert difference(together, alone) <= BOUND
    assert torch.equal(sd15.detail(image, detections(image, ROWS), **(family | {"denoise": 0.0}))[0], image)


def test_what_lies_under_a_row_changes_that_row_and_no_other(sd15: Studio, family: Settings) -> None:
    image = photograph()
    changed = image.clone()
    x1, y1, x2, y2 = (int(x) for x in ROWS[1])
    changed[:, y1:y2, x1:x2] = 1 - changed[:, y1:y2, x1:x2]
    before, after = (sd15.detail(given, detections(image, ROWS), **family)[3] for given in (image, changed))
    moved = [difference(a, b) for a, b in zip(before, after, strict=True)]
    assert moved[1] > 0.01
    assert moved[0] == moved[2] == 0


def test_a_row_is_what_core_makes_of_its_crop(sd15: Studio, family: Settings) -> None:
    image = photograph()
    found = detections(image, ROWS)
    _, _, before, after = sd15.detail(image, found, mask_latent=False, **family)
    plan = plan_detections(found.items, 512, 512, 1, CropSettings(64, 0.15, 8), seed=7)
    vae = family["vae"]
    for crop, refined, region in zip(before, after, plan.regions, strict=True):
        with torch.inference_mode():
            latents = vae.encode(crop[None])
            noise = row_noise([region.seed], latents.shape[1:])
            picture = vae.decode(by_core(family, latents, noise))
        assert difference(refined, picture.reshape(refined.shape)) <= BOUND
        assert difference(refined, crop) > 0.01


def test_tiles_do_not_depend_on_chunk_size(sd15: Studio, family: Settings) -> None:
    image = photograph(height=96, width=120)
    refined = sd15.chess(image, tile_size=64, **family)[0]
    assert (refined != image).any()
    assert difference(refined, sd15.chess(image, tile_size=64, chunk_size=1, **family)[0]) <= BOUND


@pytest.mark.parametrize("name", FAMILIES)
def test_the_given_model_is_as_before(sd15: Studio, name: str) -> None:
    family, image = make_settings(name), photograph()  # its own: ComfyUI remembers clones that went down with an error
    latents = torch.randn(1, *latent_shape(family["vae"], 64, 64), generator=torch.Generator().manual_seed(3))
    before = by_core(family, latents, latents)
    sd15.detail(image, detections(image, ROWS), **family)

    def fail(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        raise RuntimeError("stopped on purpose")

    broken = family["model"].clone()
    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        sd15.detail(image, detections(image, ROWS), **(family | {"model": broken}))
    assert torch.equal(by_core(family, latents, latents), before)


@pytest.mark.parametrize(("name", "side", "channels"), [("flux", 8, 16), ("flux2", 4, 128), ("qwen_image", 8, 16)])
def test_latents_have_the_shape_that_is_planned_for(name: str, side: int, channels: int) -> None:
    vae = settings_of(name)["vae"]
    frames = [1] if name == "qwen_image" else []
    with torch.inference_mode():
        assert list(vae.encode(torch.rand(1, 64, 64, 3)).shape[1:]) == [channels, *frames, side, side]
    assert list(latent_shape(vae, 64, 64)) == [channels, *frames, side, side]
    assert list(latent_shape(vae, 65, 64)) == [channels, *frames, side + 1, side]
