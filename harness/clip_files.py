"""Seeded CLIP weights in the layouts of published files: SD1.5's text encoder and the ViT-L image encoder.

The layers add little to what the embeddings put in, so that different words and different pictures stay different.
"""

import json
from pathlib import Path

import comfy.clip_model
import torch
from comfy.clip_model import CLIPTextModel, CLIPVisionModelProjection
from comfy.ops import disable_weight_init

from harness.seeding import StateDict, fan_in_scaled, generator_for, shapes_of

_LAYER_GAIN = 0.3  # of the attention and MLP outputs, which the residual stream adds up


def build_clip_text() -> StateDict:
    """CLIP-L text encoder, keys ``text_model.*`` as in ``cond_stage_model.transformer`` of an SD1.5 checkpoint."""
    weights = _build(CLIPTextModel, "sd1_clip_config.json")
    del weights["text_projection.weight"]  # SD1.5 checkpoints have none
    return weights


def build_clip_vision() -> StateDict:
    """CLIP ViT-L/14 image encoder with projection: width 1024, 24 layers, 257 tokens, image embeds of 768.

    The smallest CLIP encoder that ComfyUI's file detection knows.
    """
    return _build(CLIPVisionModelProjection, "clip_vision_config_vitl.json")


def _build(model: type[CLIPTextModel] | type[CLIPVisionModelProjection], config_name: str) -> StateDict:
    config = json.loads((Path(comfy.clip_model.__file__).parent / config_name).read_text(encoding="utf-8"))
    generator = generator_for(config_name)
    shapes = shapes_of(model(config, torch.float32, "meta", disable_weight_init))
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("class_embedding"):
        return torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return torch.ones(shape)
    if name.endswith("token_embedding.weight"):
        return torch.randn(shape, generator=generator)
    if name.endswith("position_embedding.weight"):
        return torch.randn(shape, generator=generator).mul_(0.3)
    outputs = name.endswith(("out_proj.weight", "fc2.weight"))
    return fan_in_scaled(shape, generator, _LAYER_GAIN if outputs else 1.0)
