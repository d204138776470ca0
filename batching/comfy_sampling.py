"""One sampling call for many rows on ComfyUI's own samplers and guiders, with noise that belongs to each row."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from .comfy_recipe import Recipe, schedule_left
from .noise import RowBrownianNoise, RowStepNoise
from .rows import Conditioning

Callback = Callable[[int, Tensor, Tensor, int], None]


def row_sampler(sampler: Any, seeds: Sequence[int]) -> Any:
    """The same sampler with a noise source per row.

    Samplers that draw no noise, or that are not k-diffusion functions, work as they are. "ddim" normally noises what
    lies outside a latent mask from a generator over the whole batch; here it uses the rows' own start noise, as every
    other sampler does.

    Args:
        sampler: ComfyUI sampler object.
        seeds: one seed per row of the batch that will be sampled.
    """
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        return sampler
    function = sampler.sampler_function
    if "noise_sampler" not in inspect.signature(function).parameters:
        return comfy.samplers.KSAMPLER(function, sampler.extra_options, {})

    # the steps of the DPM++ SDE family overlap in time, those of all others do not
    is_brownian = "dpmpp" in function.__name__ and "sde" in function.__name__

    def sample(model: Any, x: Tensor, sigmas: Tensor, **arguments: Any) -> Tensor:
        noise = RowBrownianNoise(x, seeds) if is_brownian else RowStepNoise(x, seeds)
        return function(model, x, sigmas, **(arguments | {"noise_sampler": noise}))

    return comfy.samplers.KSAMPLER(sample, sampler.extra_options, {})


def differential_mask(sigma: Tensor, denoise_mask: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """Turns a soft latent mask into differential diffusion (Levin & Fried 2023), px by px and row by row.

    A px of value v joins the denoising when the share v of the schedule (in timesteps) is left; until then it is
    held at the noised input. 1 is free from the first step on, 0 never.

    Args:
        sigma: [n], the step's noise level.
        denoise_mask: [n,c,h,w] or [n,c,1,h,w] in 0..1.
        extra_options: as ComfyUI passes them: the model and the sigmas of this run.
    """
    sampling = extra_options["model"].inner_model.model_sampling
    left = schedule_left(sampling, extra_options["sigmas"], sigma[0])
    return ((denoise_mask > 0) & (denoise_mask >= left)).to(denoise_mask.dtype)


def sample_rows(
    recipe: Recipe,
    model: Any,
    conditioning: Conditioning,
    latents: Tensor,
    noise: Tensor,
    seeds: Sequence[int],
    denoise_mask: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Samples all rows in one call.

    Args:
        recipe: guider, sampler, sigmas and seed.
        model: ModelPatcher, already patched for exactly these rows.
        conditioning: for exactly these rows.
        latents, noise: [n,c,h,w] or [n,c,1,h,w].
        seeds: one per row.
        denoise_mask: [n,1,h,w] or [n,1,1,h,w] in 0..1, how much of the schedule the latent takes part in; a mask
            function that the model already carries is kept.
        callback: called at each step with (step, denoised, x, total).

    Returns:
        Of the latents' shape, float32 on ComfyUI's intermediate device.
    """
    if denoise_mask is not None and "denoise_mask_function" not in model.model_options:
        model = model.clone()
        model.set_model_denoise_mask_function(differential_mask)
    guider = copy.copy(recipe.guider)
    guider.model_patcher = model
    guider.model_options = model.model_options
    guider.original_conds = {}
    guider.inner_set_conds(conditioning)
    # As in a KSampler: patches that draw at random, such as token merging, read the global generator. Seeded for each
    # call, all chunks draw alike.
    torch.manual_seed(recipe.seed)
    samples = guider.sample(
        noise,
        latents,
        row_sampler(recipe.sampler, seeds),
        recipe.sigmas,
        denoise_mask=denoise_mask,
        callback=callback,
        disable_pbar=True,
        seed=recipe.seed,
    )
    return samples.to(comfy.model_management.intermediate_device())


def prepared_noise(noise: Tensor) -> Tensor:
    """Noise on the device ComfyUI keeps intermediate tensors on."""
    return noise.to(comfy.model_management.intermediate_device(), torch.float32)
