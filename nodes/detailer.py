"""Semantic Detailer: every detection becomes one row of one batch and is refined in one sampling call."""

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..batching.blend import BLENDS
from ..batching.comfy_engine import ComfyEngine
from ..batching.comfy_prompts import check_prompts
from ..batching.comfy_sampling import SamplingSettings
from ..batching.concepts import Concept, denoise_of
from ..batching.crop_plan import (
    AUTO_SIZES,
    LARGER_AUTO_SIZES,
    MASK_MODES,
    OVERLAP_MODES,
    CropSettings,
    plan_detections,
    size_notices,
)
from ..batching.crops import cut, fit_into
from ..batching.plan import RefinePlan
from ..batching.refine import PasteSettings, crop_batch, refine
from ..batching.resting import without_rows
from .anchors import anchor_inputs, choose_anchor
from .checks import check_depth, check_image, check_models, check_scaffold, fitted, latent_cell, range_notices
from .refiner_inputs import (
    choose_recipe,
    color_match_input,
    crop_sizes,
    custom_sampling_inputs,
    sampling_inputs,
    scaffold_input,
)
from .schema import LunaConcepts, LunaDetections, luna_schema, notice


class LunaSemanticDetailer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaSemanticDetailer",
            display_name="Semantic Detailer (Luna)",
            category="Luna/Refine",
            description="Refines every detection of a picture in one batched sampling call, each anchored by its own "
            "IP-Adapter embedding, and pastes the results back with soft edges.",
            search_aliases=["face detailer", "adetailer", "refine", "inpaint crop", "detail", "hand fix"],
            inputs=[
                io.Image.Input("image", tooltip="The picture or batch of pictures to refine. Alpha is kept as it is."),
                LunaDetections.Input("detections", tooltip="The regions to refine. None: the picture passes through."),
                *sampling_inputs(denoise=0.4),
                io.Int.Input(
                    "crop_size",
                    default=1024,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Side in px at which each crop, a square or a strip where the picture is narrower, is "
                    "refined; regions are scaled to it and back. "
                    f"0 = automatic: {', '.join(map(str, AUTO_SIZES))}, one batch per size: small regions cost less, "
                    f"and larger ones get up to {LARGER_AUTO_SIZES[-1]} where the model fits in memory with them.",
                ),
                io.Float.Input(
                    "padding",
                    default=0.15,
                    min=0.0,
                    max=8.0,
                    step=0.01,
                    tooltip="Context around each box, as a fraction of its longer side, on each side.",
                ),
                io.Int.Input(
                    "feather",
                    default=32,
                    min=0,
                    max=1024,
                    tooltip="Width in px of the picture of the soft edge. It lies outside the mask as far as the crop "
                    "has room, and never covers more than a quarter of a small region.",
                ),
                io.Combo.Input(
                    "mask_mode",
                    options=list(MASK_MODES),
                    default="mask",
                    tooltip="mask: paste what the detection's mask covers. box: paste its whole box.",
                ),
                io.Int.Input(
                    "chunk_size",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Regions per sampling call; 0 = as many as fit in memory, ideally all. "
                    "It changes memory and speed, never the result.",
                ),
                *anchor_inputs(weight=0.5),
                scaffold_input(),
                io.Combo.Input(
                    "overlap_mode",
                    options=list(OVERLAP_MODES),
                    default="together",
                    optional=True,
                    tooltip="together: one batch, overlapping results are blended. waves: overlapping regions run in "
                    "later batches that already see the earlier results.",
                ),
                io.Combo.Input(
                    "blend",
                    options=list(BLENDS),
                    default="feather",
                    optional=True,
                    tooltip="feather: one soft edge. multiband: coarse colours melt in widely, fine detail narrowly.",
                ),
                color_match_input(),
                io.Boolean.Input(
                    "mask_latent",
                    default=True,
                    optional=True,
                    tooltip="Also hold the latent outside the mask while sampling, so that the surroundings guide the "
                    "region; where the mask is soft, px join later (differential diffusion).",
                ),
                LunaConcepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="Prompt, anchor, denoise or LoRA by the label of a detection (Luna Concept).",
                ),
                *custom_sampling_inputs(),
            ],
            outputs=[
                io.Image.Output("refined_image", display_name="image", tooltip="The picture with refined regions."),
                io.Mask.Output("refined_mask", display_name="refined_mask", tooltip="What was pasted, 0 to 1."),
                io.Image.Output("crops_before", display_name="crops_before", tooltip="Each region as it was."),
                io.Image.Output("crops_after", display_name="crops_after", tooltip="Each region refined."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        detections: Any,
        model: Any,
        vae: Any,
        positive: list[Any],
        negative: list[Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        crop_size: int,
        padding: float,
        feather: int,
        mask_mode: Any,
        chunk_size: int,
        ip_adapter: Any = None,
        clip_vision: Any = None,
        ip_adapter_weight: float = 0.5,
        ip_adapter_start: float = 0.0,
        ip_adapter_end: float = 1.0,
        layer_weights: Any = None,
        noise_scaffold: Any = None,
        overlap_mode: Any = "together",
        blend: Any = "feather",
        color_match: Any = "none",
        mask_latent: bool = True,
        concepts: tuple[Concept, ...] = (),
        guider: Any = None,
        sampler: Any = None,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        check_image(image)
        count, height, width, _ = image.shape
        settings = SamplingSettings(seed, steps, cfg, sampler_name, scheduler, denoise)
        sizes = crop_sizes(model if guider is None else guider.model_patcher, vae)
        crops = CropSettings(crop_size, padding, feather, mask_mode, overlap_mode, latent_cell(vae), sizes)
        found = fitted(detections, image)
        plan = plan_detections(found.items, width, height, count, crops, seed)
        if not plan.regions:
            return _unchanged(image, plan, notice("detections holds no regions: the picture passes through unchanged"))
        resting = _resting(plan, concepts, denoise if sigmas is None else None)
        if len(resting) == len(plan.regions):
            return _unchanged(image, plan, notice("denoise is 0: the picture passes through unchanged"))
        plan = without_rows(plan, resting)
        recipe = choose_recipe(model, positive, negative, settings, guider, sampler, sigmas)
        check_models(recipe.model, vae, crop_size)
        check_depth(recipe.model, vae, crop_size, "crop_size", cfg)
        check_prompts(recipe.model, recipe.conditioning, concepts)
        anchor, warnings = choose_anchor(
            recipe.model, ip_adapter, clip_vision, ip_adapter_weight, ip_adapter_start, ip_adapter_end, layer_weights
        )
        engine = ComfyEngine(
            recipe,
            vae,
            chunk_size,
            anchor,
            plan,
            mask_latent=mask_latent,
            noise_scaffold=check_scaffold(noise_scaffold, vae, image),
            concepts=concepts,
        )
        warnings += size_notices(plan, crops) + _unused(concepts, found, anchored=anchor is not None)
        warnings += range_notices(image)
        if resting:
            warnings.append(f"denoise is 0 for {len(resting)} of {len(plan.regions)} regions: they stay as they are")
        refined = refine(image, plan, engine, PasteSettings(blend, color_match), keep_crops=True)
        warnings += engine.notices
        return io.NodeOutput(
            refined.image,
            refined.mask,
            refined.crops_before,
            refined.crops_after,
            ui=notice(*warnings) if warnings else None,
        )


def _resting(plan: RefinePlan, concepts: tuple[Concept, ...], denoise: float | None) -> set[int]:
    """Rows whose denoise is 0; ``denoise`` is that of rows without one of their own, None where sigmas are given."""
    return {region.row for region in plan.regions if denoise_of(region.label, concepts, denoise) == 0}


def _unused(concepts: tuple[Concept, ...], found: Any, anchored: bool) -> list[str]:
    """What of the concepts has no effect on this run."""
    idle = [concept for concept in concepts if not any(concept.matches(item.label) for item in found)]
    labels = ", ".join(sorted({item.label or "(none)" for item in found}))
    warnings = [f"concept '{concept.match}' matches no detection; their labels: {labels}" for concept in idle]
    if not anchored and any(c.image is not None or c.ip_adapter_weight is not None for c in concepts):
        warnings.append("concepts set an anchor, but rows are not anchored: connect ip_adapter and clip_vision")
    return warnings


def _unchanged(image: Tensor, plan: RefinePlan, ui: dict[str, Any]) -> io.NodeOutput:
    """The picture as it came; its regions as they are, or one black crop where there are none to show."""
    shown = crop_batch(plan) if plan.regions else torch.zeros(1, AUTO_SIZES[0], AUTO_SIZES[0], 3)
    for frame, region in zip(shown, plan.regions, strict=False):
        fit_into(frame, cut(image[region.image_index, ..., :3].float(), region.crop, *region.working_size))
    shown = shown.to(image.device)
    return io.NodeOutput(image, torch.zeros(image.shape[:3], device=image.device), shown, shown, ui=ui)


NODES = (LunaSemanticDetailer,)
