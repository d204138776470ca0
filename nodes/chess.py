"""Chess Refiner: the whole picture as tiles on a chess pattern, even tiles first, then odd ones that see them."""

from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler
from comfy.sd import CLIP, VAE, StyleModel
from comfy_api.latest import io
from torch import Tensor

from ..batching.color import ColorMatch
from ..batching.comfy_anchor import rows_for
from ..batching.comfy_chunks import working_device
from ..batching.comfy_engine import ComfyEngine
from ..batching.comfy_prompts import check_prompts
from ..batching.comfy_recipe import SamplingSettings, least_share
from ..batching.drawing import draw_plan
from ..batching.grid import TileSettings, plan_tiles
from ..batching.pasting import PasteSettings
from ..batching.refine import refine
from ..batching.resting import without_px
from ..batching.row_start import RowStart
from ..batching.rows import AnchorMode
from ..batching.upscale import scale_image
from ..errors import LunaInputError
from ..ip_adapter import LayerWeights
from ..sam3_bridge.from_masks import Picture, as_masks
from . import inputs
from .anchors import Strength, choose_anchors, choose_style, choose_words
from .checks import (
    cache_notices,
    check_depth,
    check_image,
    check_models,
    check_scaffold,
    latent_cell,
    mask_notices,
    range_notices,
)
from .refiner_inputs import choose_recipe
from .schema import luna_schema, notice

_ROUNDING = 0.5 / 255
"""What is left of a mask of 1 after scaling, and less than masks of 8 bits can mean."""


class LunaChessRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaChessRefiner",
            display_name="Chess Refiner (Luna)",
            category="Luna/Refine",
            description="Refines a whole picture in overlapping tiles on a chess pattern: all even tiles in one "
            "sampling call, then all odd tiles, which see the even ones. Each tile is anchored by its own picture.",
            search_aliases=["tile refiner", "tiled upscale", "ultimate upscale", "4k refine", "tiled diffusion"],
            inputs=[
                io.Image.Input("image", tooltip="The picture or batch to refine, usually upscaled. Alpha is kept."),
                *inputs.sampling(denoise=0.3),
                *inputs.tile(),
                inputs.chunk_size(
                    "Tiles per sampling call; 0 = as many as fit in memory, a whole pass if it does. "
                    "It changes memory and speed, never the result."
                ),
                *inputs.anchor(weight=0.4),
                io.Mask.Input(
                    "refined_mask",
                    optional=True,
                    tooltip="What the Semantic Detailer has refined already: denoised less here.",
                ),
                io.Float.Input(
                    "refined_strength",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of the denoise used where refined_mask is 1: 0 leaves it alone, 1 ignores the mask.",
                ),
                inputs.scaffold(),
                io.Float.Input(
                    "output_scale",
                    default=1.0,
                    min=0.1,
                    max=4.0,
                    step=0.05,
                    optional=True,
                    tooltip="Scales the finished picture by Lanczos: 0.5 makes a crisp 2K picture of a refined 4K one.",
                ),
                inputs.color_match(),
                *inputs.custom_sampling(),
                inputs.anchor_mode(),
                inputs.style_model(),
                *inputs.picture_text(),
            ],
            outputs=[
                io.Image.Output("refined_image", display_name="image", tooltip="The refined picture."),
                io.Image.Output("tile_plan", display_name="tile_plan", tooltip="The tiles, even and odd coloured."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
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
        tile_size: int,
        min_overlap: float,
        feather: float,
        chunk_size: int,
        ip_adapter: Any = None,
        clip_vision: ClipVisionModel | None = None,
        ip_adapter_weight: float = 0.4,
        ip_adapter_start: float = 0.0,
        ip_adapter_end: float = 1.0,
        layer_weights: LayerWeights | None = None,
        refined_mask: Tensor | None = None,
        refined_strength: float = 0.5,
        noise_scaffold: dict[str, Any] | None = None,
        output_scale: float = 1.0,
        color_match: ColorMatch = "none",
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
        tiles = TileSettings(tile_size, min_overlap, feather, cell_px=latent_cell(vae))
        plan = plan_tiles(width, height, count, tiles, seed)
        drawing = draw_plan(image, plan)
        if denoise == 0 and sigmas is None:
            warning = notice("denoise is 0: the picture is not refined")
            return io.NodeOutput(_scaled(image, output_scale), drawing, ui=warning)
        recipe = choose_recipe(model, positive, negative, settings, guider, sampler, sigmas)
        check_models(recipe.model, vae, tile_size)
        check_depth(recipe.model, vae, tile_size, "tile_size", cfg)
        check_prompts(recipe.model, recipe.conditioning)
        strength = Strength(ip_adapter_weight, ip_adapter_start, ip_adapter_end, layer_weights or LayerWeights())
        style, of_style = choose_style(recipe.model, style_model, clip_vision, strength)
        anchor, references, warnings = choose_anchors(
            anchor_mode, recipe.model, ip_adapter, clip_vision, strength, style
        )
        words, of_words = choose_words(clip, prompt, references, recipe)
        cell = vae.spacial_compression_encode()
        share = _denoise_share(refined_mask, refined_strength, image)
        if share is not None:
            plan = without_px(plan, share, least_share(recipe), cell)
        rows = rows_for(plan, recipe, anchor, (), style, references, words)
        start = RowStart(cell, noise_scaffold=check_scaffold(noise_scaffold, vae, image), denoise_share=share)
        device = working_device(recipe.model, image)
        engine = ComfyEngine(recipe, vae, plan, rows, start, anchor, chunk_size, device, style, clip)
        warnings += of_style + of_words + range_notices(image) + cache_notices(recipe.model)
        warnings += [] if share is None else mask_notices(recipe.model)
        refined = refine(image, plan, rows, engine, PasteSettings(color_match=color_match), keep_mask=False)
        warnings += engine.notices
        return io.NodeOutput(_scaled(refined.image, output_scale), drawing, ui=notice(*warnings) if warnings else None)


def _scaled(image: Tensor, scale: float) -> Tensor:
    height, width = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale))
    return scale_image(image, height, width, "lanczos")


def _denoise_share(mask: Tensor | None, strength: float, image: Tensor) -> Tensor | None:
    """1 where the mask is 0, ``strength`` where it is 1: [1 or B,H,W] at the picture's size."""
    if mask is None or strength >= 1:
        return None
    count, height, width, _ = image.shape
    masks = as_masks(mask, Picture(width, height, count), "refined_mask")
    if len(masks) not in (0, 1, count):
        raise LunaInputError(
            f"refined_mask has shape {list(mask.shape)} for {count} picture(s): connect one mask, or one per picture"
        )
    if not masks.any():  # Load Image gives 64x64 zeros for a picture without alpha
        return None
    mask = scale_image(masks[..., None], height, width, "bicubic")[..., 0]
    share = 1 - (1 - strength) * mask.clamp(0, 1)
    return torch.where(share < _ROUNDING, 0, share)


NODES = (LunaChessRefiner,)
