"""Batches of anchored latents sampled by ComfyUI's own guiders on tiny models, without any refiner."""

from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
import torch
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter, as_ip_adapter
from luna_refinement.ip_adapter.comfy_patch import patch_model
from luna_refinement.ip_adapter.embeds import RowEmbeds
from torch import Tensor

from harness import tiny
from harness.ip_adapter_reference import ContentAdapter, marked
from harness.seeding import generator_for

ROWS = 3
SIDE = 16


def adapter(family: tiny.Family, variant: str = "plain") -> IPAdapter:
    """As another pack's loader gives it; plain is the smallest."""
    halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tiny.ip_adapter_weights(family, variant).items():
        half, name = key.split(".", 1)
        halves[half][name] = value
    return as_ip_adapter(halves)


def embeds(family: tiny.Family, rows: int = ROWS, name: str = "pictures") -> RowEmbeds:
    """Image tokens [rows,4,D] that differ from row to row, and those of no picture, far from zero."""
    cond, uncond = (
        torch.randn((count, 4, tiny.CONTEXT[family]), generator=generator_for(name, family, count))
        for count in (rows, 1)
    )
    return RowEmbeds(cond, uncond)


def content_adapter(family: tiny.Family, row_embeds: RowEmbeds, weight: Any = 1.0) -> ContentAdapter:
    """The independent reference for the same weights and embeddings."""
    weights = tiny.ip_adapter_weights(family, "plain")
    return ContentAdapter(weights, family, row_embeds.cond, row_embeds.uncond, weight)


def prompts(family: tiny.Family) -> dict[str, list[list[Any]]]:
    """A CONDITIONING of each role, recognisable by its content."""
    names = ("positive", "negative", "middle", "empty")
    return {name: marked(tiny.conditioning(family, name), name) for name in names}


def plain_guider(model: Any, given: Mapping[str, Any], cfg: float = 4.0) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(given["positive"], given["negative"])
    guider.set_cfg(cfg)
    return guider


def sample(
    guider: Any, steps: int = 2, rows: int = ROWS, callback: Callable[..., None] | None = None, side: int = SIDE
) -> Tensor:
    """[rows,4,side,side] after a few Euler steps from noise."""
    generator = generator_for("latents", rows)
    noise = torch.randn((rows, 4, side, side), generator=generator)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, disable_pbar=True, seed=1
        )


def anchored(model: Any, family: tiny.Family = "sd15", rows: int = ROWS, **settings: Any) -> Any:
    """The model with Luna's patch for the standard adapter and embeddings."""
    return patch_model(model, adapter(family), embeds(family, rows), **settings)


def node_defaults(node: Any) -> dict[str, Any]:
    """What a graph passes for the inputs of a node class that nobody has touched, in this release of ComfyUI."""

    def untouched(entry: Any) -> Any:
        default, options = getattr(entry, "default", None), getattr(entry, "options", None)
        return options[0] if default is None and options else default  # the page shows a list's first entry

    values = {entry.id: untouched(entry) for entry in node.define_schema().inputs}
    return {name: value for name, value in values.items() if value is not None}


def run_node(node: Any, *args: Any, **kwargs: Any) -> Any:
    """First output of a ComfyUI node class, written for its first or third node interface."""
    output = (
        node.execute(*args, **kwargs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*args, **kwargs)
    )
    return getattr(output, "result", output)[0]


def change(a: Tensor, b: Tensor) -> float:
    """Relative difference of two results."""
    return float((a.double() - b.double()).norm() / b.double().norm())
