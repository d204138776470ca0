"""Semantic Detailer: every detection becomes one row of one batch and is refined in one sampling call."""

from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler
from comfy.sd import CLIP, VAE, StyleModel
from comfy_api.latest import io
from torch import Tensor

from ..batching.blend import BLENDS, Blend
from ..batching.color import ColorMatch
from ..batching.comfy_anchor import rows_for
from ..batching.comfy_chunks import working_device
from ..batching.comfy_engine import ComfyEngine
from ..batching.comfy_prompts import check_prompts
from ..batching.comfy_recipe import SamplingSettings
from ..batching.concepts import Concept
from ..batching.crop_plan import AUTO_SIZES, CropSettings, MaskMode, OverlapMode, plan_detections, size_notices
from ..batching.crops import cut, fit_into
from ..batching.pasting import PasteSettings
from ..batching.plan import RefinePlan
from ..batching.refine import crop_batch, refine
from ..batching.resting import without_rows
from ..batching.row_start import RowStart
from ..batching.rows import AnchorMode
from ..ip_adapter import LayerWeights
from ..picture.detections import Detections
from . import inputs
from .anchors import Strength, choose_anchors, choose_style, choose_words
from .checks import (
    cache_notices,
    check_depth,
    check_image,
    check_models,
    check_scaffold,
    fitted,
    latent_cell,
    mask_notices,
    range_notices,
)
from .refiner_inputs import choose_recipe, crop_sizes
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
                *inputs.sampling(denoise=0.4),
                *inputs.crop(),
                inputs.chunk_size(
                    "Regions per sampling call; 0 = as many as fit in memory, ideally all. "
                    "It changes memory and speed, never the result."
                ),
                *inputs.anchor(weight=0.5),
                inputs.scaffold(),
                inputs.overlap_mode(optional=True),
                io.Combo.Input(
                    "blend",
                    options=list(BLENDS),
                    default="feather",
                    optional=True,
                    tooltip="feather: one soft edge. multiband: coarse colours melt in widely, fine detail narrowly.",
                ),
                inputs.color_match(),
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
                *inputs.custom_sampling(),
                inputs.anchor_mode(),
                inputs.style_model(),
                *inputs.picture_text(),
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
        detections: Detections,
        model: ModelPatcher,
        vae: VAE,
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
        mask_mode: MaskMode,
        chunk_size: int,
        ip_adapter: Any = None,
        clip_vision: ClipVisionModel | None = None,
        ip_adapter_weight: float = 0.5,
        ip_adapter_start: float = 0.0,
        ip_adapter_end: float = 1.0,
        layer_weights: LayerWeights | None = None,
        noise_scaffold: dict[str, Any] | None = None,
        overlap_mode: OverlapMode = "together",
        blend: Blend = "feather",
        color_match: ColorMatch = "none",
        mask_latent: bool = True,
        concepts: tuple[Concept, ...] = (),
        guider: CFGGuider | None = None,
        sampler: Sampler | None = None,
        sigmas: Tensor | None = None,
        anchor_mode: AnchorMode = "ip_adapter",
        style_model: StyleModel | None = None,
        clip: CLIP | None = None,
        prompt: str = "",
    ) -> io.NodeOutput:
        check_image(image)
        count, height, width, _ = image.shape
        settings = SamplingSettings(seed, steps, cfg, sampler_name, scheduler, denoise)
        recipe = choose_recipe(model, positive, negative, settings, guider, sampler, sigmas)
        sizes = crop_sizes(recipe.model, vae, anchor_mode != "ip_adapter")
        crops = CropSettings(crop_size, padding, feather, mask_mode, overlap_mode, latent_cell(vae), sizes)
        found = fitted(detections, image)
        plan = plan_detections(found.items, width, height, count, crops, seed)
        if not plan.regions:
            return _unchanged(image, plan, notice("detections holds no regions: the picture passes through unchanged"))
        strength = Strength(ip_adapter_weight, ip_adapter_start, ip_adapter_end, layer_weights or LayerWeights())
        style, of_style = choose_style(recipe.model, style_model, clip_vision, strength)
        anchor, references, warnings = choose_anchors(
            anchor_mode, recipe.model, ip_adapter, clip_vision, strength, style
        )
        words, of_words = choose_words(clip, prompt, references, recipe)
        rows = rows_for(plan, recipe, anchor, concepts, style, references, words)
        resting = {row.region.row for row in rows if row.denoise == 0}
        if len(resting) == len(rows):
            return _unchanged(image, plan, notice("denoise is 0: the picture passes through unchanged"))
        plan = without_rows(plan, resting)
        check_models(recipe.model, vae, crop_size)
        check_depth(recipe.model, vae, crop_size, "crop_size", cfg)
        check_prompts(recipe.model, recipe.conditioning, concepts)
        start = RowStart(vae.spacial_compression_encode(), mask_latent, check_scaffold(noise_scaffold, vae, image))
        device = working_device(recipe.model, image)
        engine = ComfyEngine(recipe, vae, plan, rows, start, anchor, chunk_size, device, style, clip)
        warnings += size_notices(plan, crops) + _unused(concepts, found, bool(anchor or style), references)
        warnings += of_style + of_words + range_notices(image) + cache_notices(recipe.model)
        warnings += mask_notices(recipe.model) if mask_latent else []
        if resting:
            warnings.append(f"denoise is 0 for {len(resting)} of {len(rows)} regions: they stay as they are")
        refined = refine(image, plan, rows, engine, PasteSettings(blend, color_match), keep_crops=True)
        warnings += engine.notices
        return io.NodeOutput(
            refined.image,
            refined.mask,
            refined.crops_before,
            refined.crops_after,
            ui=notice(*warnings) if warnings else None,
        )


def _unused(concepts: tuple[Concept, ...], found: Detections, anchored: bool, references: bool) -> list[str]:
    """What of the concepts has no effect on this run."""
    idle = [concept for concept in concepts if not any(concept.matches(item.label) for item in found)]
    labels = ", ".join(sorted({item.label or "(none)" for item in found}))
    warnings = [f"concept '{concept.match}' matches no detection; their labels: {labels}" for concept in idle]
    weighed = [concept.ip_adapter_weight for concept in concepts if concept.ip_adapter_weight is not None]
    if references and not anchored and any(weighed):
        warnings.append("concepts set ip_adapter_weight, but a reference latent has no strength: only 0, no reference")
    if not (anchored or references) and (weighed or any(concept.image is not None for concept in concepts)):
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
