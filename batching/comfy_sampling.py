"""One sampling call for many rows on ComfyUI's own samplers, with noise that belongs to each row."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler
from torch import Tensor

from ..errors import LunaInputError
from .noise import RowStepNoise, row_seed

ROWS_ALONE = {"dpm_adaptive": "it chooses its step size from the error of the whole batch"}
"""Samplers whose rows would influence each other in one call, and why: their rows are sampled one by one."""

Callback = Callable[[int, Tensor, Tensor, int], None]


@dataclass(frozen=True)
class SamplingSettings:
    """A KSampler's settings.

    Attributes:
        seed: the run's seed (rows derive theirs from it in the plan).
        steps: steps that are sampled, whatever the denoise.
        cfg: guidance scale.
        sampler_name, scheduler: names ComfyUI lists.
        denoise: share of the schedule, 0..1; 0 leaves the picture as it is.
    """

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def __post_init__(self) -> None:
        if self.sampler_name not in comfy.samplers.SAMPLER_NAMES:
            raise LunaInputError(f"sampler_name '{self.sampler_name}' is not a sampler of this ComfyUI")
        if self.scheduler not in comfy.samplers.SCHEDULER_NAMES:
            raise LunaInputError(f"scheduler '{self.scheduler}' is not a scheduler of this ComfyUI")
        if self.steps < 1:
            raise LunaInputError(f"steps is {self.steps}: use at least 1")
        if not 0 <= self.denoise <= 1:
            raise LunaInputError(f"denoise is {self.denoise}: use 0 to 1")


def schedule(model: Any, settings: SamplingSettings) -> Tensor:
    """The sigmas a KSampler would use: [steps + 1], empty at denoise 0."""
    sampler = comfy.samplers.KSampler(
        model,
        steps=settings.steps,
        device=model.load_device,
        sampler=settings.sampler_name,
        scheduler=settings.scheduler,
        denoise=settings.denoise,
        model_options=model.model_options,
    )
    return sampler.sigmas


def row_sampler(sampler_name: str, seeds: Sequence[int]) -> comfy.samplers.KSAMPLER:
    """ComfyUI's sampler of that name, with a noise source per row.

    Samplers that draw no noise are returned as they are. "ddim" normally noises what lies outside a latent mask
    from a generator over the whole batch; here it uses the rows' own start noise, as every other sampler does.

    Args:
        sampler_name: a name ComfyUI lists.
        seeds: one seed per row of the batch that will be sampled.
    """
    base = comfy.samplers.sampler_object(sampler_name)
    function = base.sampler_function
    if "noise_sampler" not in inspect.signature(function).parameters:
        return comfy.samplers.KSAMPLER(function, base.extra_options, {})

    def sample(model: Any, x: Tensor, sigmas: Tensor, **arguments: Any) -> Tensor:
        noise = _step_noise(sampler_name, x, sigmas, seeds)
        return function(model, x, sigmas, noise_sampler=noise, **arguments)

    return comfy.samplers.KSAMPLER(sample, base.extra_options, {})


def _step_noise(sampler_name: str, x: Tensor, sigmas: Tensor, seeds: Sequence[int]) -> Any:
    """Brownian noise for the SDE family, whose steps overlap in time; independent draws for the others."""
    is_brownian = sampler_name.startswith("dpmpp_") and "sde" in sampler_name
    positive = sigmas[sigmas > 0]
    if not is_brownian or len(positive) == 0:
        return RowStepNoise(x, seeds)
    entropy = [row_seed(seed, "brownian") for seed in seeds]
    on_cpu = not sampler_name.endswith("_gpu")
    # a hair wider than the schedule: rounding between float32 and float64 must not step outside the tree
    return BrownianTreeNoiseSampler(x, positive.min() * 0.999, sigmas.max() * 1.001, seed=entropy, cpu=on_cpu)


def differential_mask(sigma: Tensor, denoise_mask: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """Turns a soft latent mask into differential diffusion (Levin & Fried 2023), px by px and row by row.

    A px of value v joins the denoising when the share v of the schedule (in timesteps) is left; until then it is
    held at the noised input. 1 is free from the first step on, 0 never.

    Args:
        sigma: [n], the step's noise level.
        denoise_mask: [n,c,h,w] in 0..1.
        extra_options: as ComfyUI passes them: the model and the sigmas of this run.
    """
    sampling = extra_options["model"].inner_model.model_sampling
    sigmas = extra_options["sigmas"]
    last = torch.maximum(sigmas[-1], torch.as_tensor(sampling.sigma_min).to(sigmas))
    first, last, now = (sampling.timestep(value) for value in (sigmas[0], last, sigma[0]))
    left = (now - last) / (first - last).clamp(min=1e-6)
    return ((denoise_mask > 0) & (denoise_mask >= left.clamp(max=1) - 1e-6)).to(denoise_mask.dtype)


def sample_rows(
    model: Any,
    latents: Tensor,
    noise: Tensor,
    positive: list[Any],
    negative: list[Any],
    settings: SamplingSettings,
    sigmas: Tensor,
    seeds: Sequence[int],
    denoise_mask: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Samples all rows in one call.

    Args:
        model: ModelPatcher, already patched for exactly these rows.
        latents, noise: [n,c,h,w].
        positive, negative: ComfyUI conditioning.
        settings: sampler, cfg and seed.
        sigmas: from ``schedule``.
        seeds: one per row.
        denoise_mask: [n,1,h,w] in 0..1, how much of the schedule the latent takes part in; a mask function that
            the model already carries is kept.
        callback: called at each step with (step, denoised, x, total).

    Returns:
        [n,c,h,w] float32 on ComfyUI's intermediate device.
    """
    if denoise_mask is not None and "denoise_mask_function" not in model.model_options:
        model = model.clone()
        model.set_model_denoise_mask_function(differential_mask)
    return comfy.sample.sample_custom(
        model,
        noise,
        settings.cfg,
        row_sampler(settings.sampler_name, seeds),
        sigmas,
        positive,
        negative,
        latents,
        noise_mask=denoise_mask,
        callback=callback,
        disable_pbar=True,
        seed=settings.seed,
    )


def rows_that_fit(model: Any, latent_shape: Sequence[int]) -> int:
    """How many rows one sampling call can hold by ComfyUI's own estimates; at least 1.

    The measure is the one ComfyUI's sampler uses before each model call: the estimate for the rows (it can run cond
    and uncond one after the other), times 1.5, must be free. Weights of other models count as free, since ComfyUI
    unloads them; what is still to be loaded of this model does not.

    Args:
        model: ModelPatcher.
        latent_shape: shape of one latent, without the batch.
    """
    device = model.load_device
    free = comfy.model_management.get_free_memory(device)
    if not comfy.model_management.is_device_cpu(device):
        free += sum(
            loaded.model_loaded_memory()
            for loaded in comfy.model_management.current_loaded_models
            if loaded.device == device and loaded.model is not None and not loaded.model.is_clone(model)
        )
        free -= max(0, model.model_size() - model.loaded_size())
    return max(1, int(free / max(1, row_bytes(model, latent_shape))))


def row_bytes(model: Any, latent_shape: Sequence[int]) -> int:
    """ComfyUI's estimate of what one row takes while sampling, with the reserve its sampler keeps."""
    return int(1.5 * model.memory_required([1, *latent_shape]))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)


def prepared_noise(noise: Tensor) -> Tensor:
    """Noise on the device ComfyUI keeps intermediate tensors on."""
    return noise.to(comfy.model_management.intermediate_device(), torch.float32)
