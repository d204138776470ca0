"""One sampling call for many rows on ComfyUI's own samplers and guiders, with noise that belongs to each row."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler
from torch import Tensor

from ..errors import LunaInputError
from .conditioning import Conditioning
from .noise import RowStepNoise, row_seed

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


@dataclass(frozen=True)
class Recipe:
    """How rows are sampled: what a KSampler, or a custom sampling graph, would do to one latent.

    Attributes:
        guider: ComfyUI guider; its model and conditioning are replaced for each call, on a copy.
        sampler: ComfyUI sampler object.
        sigmas: [steps + 1].
        seed: the run's seed.
        settings: the KSampler settings the sigmas were made from, or None for sigmas of a custom sampling graph.
    """

    guider: Any
    sampler: Any
    sigmas: Tensor
    seed: int
    settings: SamplingSettings | None = None

    @property
    def model(self) -> Any:
        """The guider's ModelPatcher."""
        return self.guider.model_patcher

    @property
    def steps(self) -> int:
        """Steps of a sampling call."""
        return self.settings.steps if self.settings else len(self.sigmas) - 1

    @property
    def conditioning(self) -> Conditioning:
        """The guider's conditioning as nodes pass it: lists of [tensor, dict]."""
        return {name: [_as_given(cond) for cond in conds] for name, conds in self.guider.original_conds.items()}

    @property
    def rows_alone(self) -> str | None:
        """Why rows would influence each other in one call, so that each must be sampled by itself; None if not."""
        if not isinstance(self.sampler, comfy.samplers.KSAMPLER):
            return "its noise cannot be drawn per row"
        if "dpm_adaptive" in self.sampler.sampler_function.__name__:
            return "it chooses its step size from the error of the whole batch"
        return None


def _as_given(cond: dict[str, Any]) -> list[Any]:
    """Undoes the guider's own conversion of one conditioning entry."""
    made_by_guider = ("cross_attn", "model_conds", "uuid")
    return [cond.get("cross_attn"), {key: value for key, value in cond.items() if key not in made_by_guider}]


def ksampler_recipe(model: Any, positive: list[Any], negative: list[Any], settings: SamplingSettings) -> Recipe:
    """What a KSampler with these settings does; no sigmas at denoise 0.

    Raises:
        LunaInputError: the scheduler has no noise levels for this number of steps.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(settings.cfg)
    sampler = comfy.samplers.sampler_object(settings.sampler_name)
    return Recipe(guider, sampler, _sigmas(model, settings), settings.seed, settings)


def _sigmas(model: Any, settings: SamplingSettings) -> Tensor:
    """[steps + 1] noise levels of a KSampler with these settings; none at denoise 0."""
    try:
        sigmas = comfy.samplers.KSampler(
            model,
            steps=settings.steps,
            device=model.load_device,
            sampler=settings.sampler_name,
            scheduler=settings.scheduler,
            denoise=settings.denoise,
            model_options=model.model_options,
        ).sigmas
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        # a scheduler's own arithmetic: its reason is passed on
        raise _no_levels(settings, str(error)) from error
    if not bool(torch.isfinite(sigmas).all()):
        raise _no_levels(settings, "some are not numbers")
    if settings.denoise > 0 and len(sigmas) < 2:
        raise _no_levels(settings, f"it gives {len(sigmas)}")
    return sigmas


def _no_levels(settings: SamplingSettings, reason: str) -> LunaInputError:
    return LunaInputError(
        f"scheduler '{settings.scheduler}' has no noise levels for {settings.steps} steps at denoise "
        f"{settings.denoise:g} ({reason}): use more steps, or another scheduler"
    )


def with_denoise(recipe: Recipe, denoise: float) -> Recipe:
    """The recipe with another share of the schedule.

    Raises:
        LunaInputError: the recipe's sigmas were given by the user, so there is no schedule to take a share of.
    """
    if recipe.settings is None:
        raise LunaInputError(
            "denoise of a concept cannot act together with sigmas of your own: leave it at -1, or disconnect sigmas"
        )
    settings = replace(recipe.settings, denoise=denoise)
    return replace(recipe, sigmas=_sigmas(recipe.model, settings), settings=settings)


def least_share(recipe: Recipe) -> float:
    """The smallest share of the denoise that is sampled at all: less joins after the last step has begun."""
    sampling = recipe.model.get_model_object("model_sampling")
    return float(_schedule_left(sampling, recipe.sigmas, recipe.sigmas[-2]))


def _schedule_left(sampling: Any, sigmas: Tensor, sigma: Tensor) -> Tensor:
    """Which share of a schedule is left at a noise level, measured in timesteps."""
    last = torch.maximum(sigmas[-1], torch.as_tensor(sampling.sigma_min).to(sigmas))
    first, last, now = (sampling.timestep(value) for value in (sigmas[0], last, sigma))
    return ((now - last) / (first - last).clamp(min=1e-6)).clamp(max=1) - 1e-6


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

    def sample(model: Any, x: Tensor, sigmas: Tensor, **arguments: Any) -> Tensor:
        noise = _step_noise(function.__name__, x, sigmas, seeds)
        return function(model, x, sigmas, **(arguments | {"noise_sampler": noise}))

    return comfy.samplers.KSAMPLER(sample, sampler.extra_options, {})


def _step_noise(function_name: str, x: Tensor, sigmas: Tensor, seeds: Sequence[int]) -> Any:
    """Brownian noise for the DPM++ SDE family, whose steps overlap in time; independent draws for the others."""
    is_brownian = "dpmpp" in function_name and "sde" in function_name
    positive = sigmas[sigmas > 0]
    if not is_brownian or len(positive) == 0:
        return RowStepNoise(x, seeds)
    entropy = [row_seed(seed, "brownian") for seed in seeds]
    on_cpu = not function_name.endswith("_gpu")
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
    left = _schedule_left(sampling, extra_options["sigmas"], sigma[0])
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
        latents, noise: [n,c,h,w].
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


def prepared_noise(noise: Tensor) -> Tensor:
    """Noise on the device ComfyUI keeps intermediate tensors on."""
    return noise.to(comfy.model_management.intermediate_device(), torch.float32)
