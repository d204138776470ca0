"""Batches of latents that Flux samples on a tiny network, anchored by XLabs' and InstantX' adapters."""

from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter, _from_weights, load_ip_adapter
from luna_refinement.ip_adapter.embeds import RowEmbeds
from luna_refinement.ip_adapter.files import split_weights
from safetensors.torch import save_file
from torch import Tensor

from harness import tiny
from harness.anchored_sampling import plain_guider
from harness.ip_adapter_files import FLUX_CROSS, build_instantx, build_xlabs
from harness.seeding import StateDict, generator_for
from harness.still_models import flux_vae

DOUBLE, SINGLE, ROWS, HEIGHT, WIDTH = 2, 2, 3, 8, 12
KINDS = ("xlabs", "instantx")


def network() -> Any:
    """A MODEL whose blocks the adapters fit."""
    return tiny.flux(double=DOUBLE, single=SINGLE)


def file_of(kind: str) -> StateDict:
    if kind == "xlabs":
        return build_xlabs(tiny.CLIP_POOLED, tiny.FLUX_HIDDEN, DOUBLE)
    return build_instantx(tiny.CLIP_POOLED, tiny.FLUX_HIDDEN, DOUBLE + SINGLE)


def adapter(kind: str) -> IPAdapter:
    """As a loader reads it."""
    return load(file_of(kind), f"{kind}.safetensors")


def load(weights: StateDict, name: str) -> IPAdapter:
    return _from_weights(split_weights(weights, name))


def embeds(rows: int = ROWS, name: str = "pictures") -> RowEmbeds:
    """Image tokens that differ from row to row, and those of no picture."""
    cond, uncond = (torch.randn(count, 4, FLUX_CROSS, generator=generator_for(name, count)) for count in (rows, 1))
    return RowEmbeds(cond, uncond)


PROMPTS = {name: tiny.flux_conditioning(name) for name in ("positive", "negative")}
NOISE = torch.randn(ROWS, 16, HEIGHT, WIDTH, generator=generator_for("flux latents"))


def sigmas_of(model: Any) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)


def sample(model: Any, cfg: float = 3.0, noise: Tensor = NOISE, prompts: dict[str, Any] | None = None) -> Tensor:
    guider = plain_guider(model, prompts or PROMPTS, cfg)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas_of(model), disable_pbar=True, seed=1)


def refiner_settings(kind: str, folder: Path) -> dict[str, Any]:
    """A refiner's inputs, with the adapter as the loader node gives it."""
    model, file = network(), folder / f"{kind}.safetensors"
    save_file(file_of(kind), file)
    clip_vision, siglip = tiny.siglip_file(folder) if kind == "instantx" else (tiny.clip_vision(folder), None)
    return {
        "model": model,
        "vae": flux_vae(),
        "positive": PROMPTS["positive"],
        "negative": PROMPTS["negative"],
        "clip_vision": clip_vision,
        "ip_adapter": load_ip_adapter(str(file), None if siglip is None else str(siglip)),
    }
