"""Row identity of every sampler ComfyUI lists, on latents: rows sampled together equal rows sampled alone."""

from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from luna_refinement.batching.comfy_recipe import Recipe, SamplingSettings, ksampler_recipe
from luna_refinement.batching.comfy_sampling import sample_rows
from luna_refinement.batching.noise import row_noise
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter.comfy_encode import encode_rows
from luna_refinement.ip_adapter.comfy_patch import patch_model
from torch import Tensor

from harness import tiny
from harness.refining import Studio

SEEDS = [11, 22, 33]
SHAPE = (4, 16, 16)
BOUND = 1e-4

# Its step size depends on the error of the whole batch, so the engine samples its rows one by one.
BATCH_DEPENDENT = {"dpm_adaptive"}


def recipe_for(studio: Studio, sampler_name: str, **settings: Any) -> Recipe:
    given = {"seed": 0, "steps": 4, "cfg": 4.0, "scheduler": "karras", "denoise": 0.6} | settings
    positive, negative = (tiny.conditioning(studio.family, name) for name in ("positive", "negative"))
    return ksampler_recipe(studio.model, positive, negative, SamplingSettings(sampler_name=sampler_name, **given))


def sampled(studio: Studio, recipe: Recipe, rows: slice, mask: Tensor | None) -> Tensor:
    """The rows of a batch of three, each with its anchor, sampled in one call."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((3, *SHAPE), generator=generator)
    images = torch.rand((3, 64, 64, 3), generator=generator)
    with torch.inference_mode():
        embeds = encode_rows(studio.plus, studio.clip_vision, images)
        start, stop, _ = rows.indices(3)
        model = patch_model(recipe.model, studio.plus, embeds.take(range(start, stop)), 0.6)
        return sample_rows(
            recipe,
            model,
            recipe.conditioning,
            latents[rows],
            row_noise(SEEDS[rows], SHAPE),
            SEEDS[rows],
            None if mask is None else mask[rows],
        )


def soft_mask() -> Tensor:
    return torch.rand((3, 1, *SHAPE[1:]), generator=torch.Generator().manual_seed(2))


def assert_rows_apart(studio: Studio, recipe: Recipe, mask: Tensor | None) -> None:
    together = sampled(studio, recipe, slice(0, 3), mask)
    alone = torch.cat([sampled(studio, recipe, slice(row, row + 1), mask) for row in range(3)])
    assert torch.isfinite(together).all()
    assert float((together - alone).abs().max()) <= BOUND * max(1.0, float(together.abs().max()))


@pytest.mark.parametrize("sampler_name", [n for n in comfy.samplers.SAMPLER_NAMES if n not in BATCH_DEPENDENT])
def test_rows_do_not_depend_on_their_batch(sd15: Studio, sampler_name: str) -> None:
    recipe = recipe_for(sd15, sampler_name)
    assert recipe.rows_alone is None
    assert_rows_apart(sd15, recipe, None)


@pytest.mark.parametrize("sampler_name", ["euler", "ddim", "dpmpp_2m_sde", "uni_pc"])
def test_soft_masks_keep_rows_apart(sd15: Studio, sampler_name: str) -> None:
    assert_rows_apart(sd15, recipe_for(sd15, sampler_name), soft_mask())


@pytest.mark.parametrize("sampler_name", sorted(BATCH_DEPENDENT))
def test_samplers_that_mix_rows_say_why(sd15: Studio, sampler_name: str) -> None:
    assert "whole batch" in str(recipe_for(sd15, sampler_name).rows_alone)


def test_sdxl_rows_do_not_depend_on_their_batch(tmp_path_factory: pytest.TempPathFactory) -> None:
    studio = Studio("sdxl", tmp_path_factory.mktemp("models"))
    assert_rows_apart(studio, recipe_for(studio, "dpmpp_sde", steps=2), soft_mask())


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_three_way_guidance_keeps_rows_apart(sd15: Studio, style: str) -> None:
    recipe = recipe_for(sd15, "euler")
    guider = Guider_DualCFG(sd15.model)
    guider.set_conds(*(tiny.conditioning("sd15", name) for name in ("positive", "middle", "negative")))
    guider.set_cfg(4.0, 2.0, nested=style == "nested")
    assert_rows_apart(sd15, Recipe(guider, recipe.sampler, recipe.sigmas, 0), soft_mask())


def test_latents_outside_the_mask_are_held(sd15: Studio) -> None:
    mask = torch.zeros(3, 1, *SHAPE[1:])
    mask[..., 4:12, 4:12] = 1
    recipe = recipe_for(sd15, "euler")
    result = sampled(sd15, recipe, slice(0, 3), mask)
    latents = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(1))
    held = (mask == 0).expand_as(result)
    assert float((result - latents)[held].abs().max()) < 1e-4
    assert float((result - latents)[~held].abs().max()) > 0.1


def test_a_mask_function_that_the_model_carries_is_kept(sd15: Studio) -> None:
    """One that frees every px undoes a mask that holds all of them."""
    recipe = recipe_for(sd15, "euler", steps=2)
    free = sd15.model.clone()
    free.set_model_denoise_mask_function(lambda sigma, mask, extra_options: torch.ones_like(mask))
    positive, negative = (tiny.conditioning("sd15", name) for name in ("positive", "negative"))
    own = ksampler_recipe(free, positive, negative, recipe.settings)
    held = torch.zeros(3, 1, *SHAPE[1:])
    everywhere = sampled(sd15, recipe, slice(0, 3), None)
    assert float((sampled(sd15, own, slice(0, 3), held) - everywhere).abs().max()) <= BOUND
    assert float((sampled(sd15, recipe, slice(0, 3), held) - everywhere).abs().max()) > 0.1


def test_a_soft_mask_changes_latents_by_degrees(sd15: Studio) -> None:
    recipe = recipe_for(sd15, "euler", steps=12)
    latents = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(1))
    changes = []
    for level in (0.1, 0.5, 1.0):
        mask = torch.full((3, 1, *SHAPE[1:]), level)
        changes.append(float((sampled(sd15, recipe, slice(0, 3), mask) - latents).square().mean()))
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize(
    ("name", "value"), [("sampler_name", "magic"), ("scheduler", "magic"), ("steps", 0), ("denoise", 1.5)]
)
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    given = {"seed": 0, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5}
    with pytest.raises(LunaInputError, match=name):
        SamplingSettings(**(given | {name: value}))
