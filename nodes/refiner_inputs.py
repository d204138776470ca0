"""Schema inputs that both refiners share, so that they read the same everywhere."""

from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..batching.color import COLOR_MATCHES
from ..batching.comfy_sampling import Recipe, SamplingSettings, ksampler_recipe, row_bytes
from ..batching.crop_plan import AUTO_SIZES, LARGER_AUTO_SIZES
from ..errors import LunaInputError
from ..values import shown
from .checks import is_plain


def sampling_inputs(denoise: float) -> list[Any]:
    """The inputs every refiner shares: models, conditioning and a KSampler's settings."""
    return [
        io.Model.Input("model", tooltip="The model that refines. It is left unmodified."),
        io.Vae.Input("vae", tooltip="The model's VAE: crops are encoded afresh from px, never sliced from a latent."),
        io.Conditioning.Input("positive", tooltip="What the refined regions should show."),
        io.Conditioning.Input("negative", tooltip="What they should not show."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Seed of the run. Each region's noise depends on it and on the region's place in its own picture "
            "alone: a picture comes out the same by itself and in a batch.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps."),
        io.Float.Input(
            "cfg",
            default=6.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Guidance: how strongly positive is followed. 1 skips the negative and halves the work.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=list(comfy.samplers.SAMPLER_NAMES),
            default="dpmpp_2m",
            tooltip="ComfyUI's sampler. Stochastic ones draw their noise per region.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(comfy.samplers.SCHEDULER_NAMES),
            default="karras",
            tooltip="How the noise levels are spread over the steps.",
        ),
        io.Float.Input(
            "denoise",
            default=denoise,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much is changed: 0 returns the picture as it is, 0.2 to 0.5 refines, 1 draws anew.",
        ),
    ]


def scaffold_input() -> Any:
    return io.Latent.Input(
        "noise_scaffold",
        optional=True,
        tooltip="Noise of the whole picture (Luna Noise Scaffold); each region takes the part at its own place. "
        "Without it each region has noise of its own.",
    )


def color_match_input() -> Any:
    return io.Combo.Input(
        "color_match",
        options=list(COLOR_MATCHES),
        default="none",
        optional=True,
        tooltip="Takes colours back to those of the input picture, measured inside the mask. mean_std: brightness and "
        "contrast of each channel. wavelet: all coarse colours, keeping only the refined detail.",
    )


def custom_sampling_inputs() -> list[Any]:
    """Optional guider, sampler and sigmas of ComfyUI's custom sampling, each replacing its part of a KSampler."""
    return [
        io.Guider.Input(
            "guider",
            optional=True,
            tooltip="Custom sampling: replaces model, positive, negative and cfg, for example by dual guidance.",
        ),
        io.Sampler.Input("sampler", optional=True, tooltip="Custom sampling: replaces sampler_name."),
        io.Sigmas.Input(
            "sigmas", optional=True, tooltip="Custom sampling: these noise levels replace scheduler, steps and denoise."
        ),
    ]


def crop_sizes(model: Any, vae: Any) -> tuple[int, ...]:
    """Working sizes (px) that crop_size 0 chooses from on this model, rising.

    Beyond the usual ones those of which a row fits in the device's memory beside the model. The whole memory counts,
    not what is free just now: the same inputs must get the same size in every run.
    """
    ratio = vae.spacial_compression_encode()
    if not isinstance(ratio, int):
        return AUTO_SIZES
    room = comfy.model_management.get_total_memory(model.load_device) - model.model_size()
    shapes = {size: (vae.latent_channels, size // ratio, size // ratio) for size in LARGER_AUTO_SIZES}
    return AUTO_SIZES + tuple(size for size, shape in shapes.items() if row_bytes(model, shape) <= room)


def _falls(sigmas: Tensor) -> bool:
    """Whether noise levels are numbers that never rise, and not all the same."""
    return bool(torch.isfinite(sigmas).all() and (sigmas.diff() <= 0).all() and sigmas[0] > sigmas[-1])


def choose_recipe(
    model: Any,
    positive: list[Any],
    negative: list[Any],
    settings: SamplingSettings,
    guider: Any,
    sampler: Any,
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
