"""What refiners make of their inputs: the working sizes to choose from, and the recipe of a run."""

from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler
from comfy.sd import VAE
from torch import Tensor

from ..batching.comfy_chunks import row_bytes
from ..batching.comfy_latents import latent_shape
from ..batching.comfy_recipe import Recipe, SamplingSettings, ksampler_recipe
from ..batching.comfy_reference import FIELD as REFERENCES
from ..batching.crop_plan import AUTO_SIZES, LARGER_AUTO_SIZES
from ..errors import LunaInputError
from ..values import shown
from .checks import is_plain


def crop_sizes(model: ModelPatcher, vae: VAE, references: bool = False) -> tuple[int, ...]:
    """Working sizes (px) that crop_size 0 chooses from on this model, rising.

    Beyond the usual ones those of which a row fits in the device's memory beside the model. The whole memory counts,
    not what is free just now: the same inputs must get the same size in every run.

    Args:
        model, vae: ComfyUI MODEL and VAE.
        references: each row reads a reference latent of its own size.
    """

    def needed(shape: tuple[int, ...]) -> int:
        own = {REFERENCES: [torch.empty(1, *shape, device="meta")]} if references else {}
        return row_bytes(model, shape, {"positive": [[None, own]]})

    if not isinstance(vae.spacial_compression_encode(), int):
        return AUTO_SIZES
    room = comfy.model_management.get_total_memory(model.load_device) - model.model_size()
    shapes = {size: latent_shape(vae, size, size) for size in LARGER_AUTO_SIZES}
    return AUTO_SIZES + tuple(size for size, shape in shapes.items() if needed(shape) <= room)


def _falls(sigmas: Tensor) -> bool:
    """Whether noise levels are numbers that never rise, and not all the same."""
    return bool(torch.isfinite(sigmas).all() and (sigmas.diff() <= 0).all() and sigmas[0] > sigmas[-1])


def choose_recipe(
    model: ModelPatcher,
    positive: list[Any],
    negative: list[Any],
    settings: SamplingSettings,
    guider: CFGGuider | None,
    sampler: Sampler | None,
    sigmas: Tensor | None,
) -> Recipe:
    """The KSampler's recipe, with those parts replaced that custom sampling gives.

    Raises:
        LunaInputError: the sigmas are no falling row of noise levels.
    """
    recipe = ksampler_recipe(model if guider is None else guider.model_patcher, positive, negative, settings)
    if guider is not None:
        recipe = replace(recipe, guider=guider)
    if sampler is not None:
        recipe = replace(recipe, sampler=sampler)
    if sigmas is not None:
        if not is_plain(sigmas) or not sigmas.is_floating_point():
            raise LunaInputError(f"sigmas is {shown(sigmas)}: connect the SIGMAS of a scheduler node")
        if sigmas.ndim != 1 or len(sigmas) < 2 or not _falls(sigmas):
            raise LunaInputError(
                f"sigmas has shape {list(sigmas.shape)}: at least two noise levels, from high to low, are needed"
            )
        recipe = replace(recipe, sigmas=sigmas, settings=None)
    return recipe
