"""How rows are sampled, as a KSampler or a custom sampling graph says it: guider, sampler and noise levels."""

from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..errors import LunaInputError
from .rows import Conditioning


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
    def denoise(self) -> float | None:
        """Share of the schedule; None for sigmas of a custom sampling graph."""
        return self.settings.denoise if self.settings else None

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


def with_denoise(recipe: Recipe, denoise: float | None) -> Recipe:
    """The recipe with another share of the schedule, or None to keep its own.

    Raises:
        LunaInputError: the recipe's sigmas were given by the user, so there is no schedule to take a share of.
    """
    if denoise is None or (recipe.settings is not None and recipe.settings.denoise == denoise):
        return recipe
    if recipe.settings is None:
        raise LunaInputError(
            "denoise of a concept cannot act together with sigmas of your own: leave it at -1, or disconnect sigmas"
        )
    settings = replace(recipe.settings, denoise=denoise)
    return replace(recipe, sigmas=_sigmas(recipe.model, settings), settings=settings)


def least_share(recipe: Recipe) -> float:
    """The smallest share of the denoise that is sampled at all: less joins after the last step has begun."""
    sampling = recipe.model.get_model_object("model_sampling")
    return float(schedule_left(sampling, recipe.sigmas, recipe.sigmas[-2]))


def schedule_left(sampling: Any, sigmas: Tensor, sigma: Tensor) -> Tensor:
    """Which share of a schedule is left at a noise level, measured in timesteps."""
    last = torch.maximum(sigmas[-1], torch.as_tensor(sampling.sigma_min).to(sigmas))
    first, last, now = (sampling.timestep(value) for value in (sigmas[0], last, sigma))
    return ((now - last) / (first - last).clamp(min=1e-6)).clamp(max=1) - 1e-6
