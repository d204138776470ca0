"""ComfyUI's own SAM3 with seeded random weights, in the layout its published checkpoints have.

The host tells a SAM3 by its keys and takes every size for granted. So a small one goes the way of its loader
(detection, conversion of the keys, the model's class, the text encoder's) with the sizes told in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

WIDTH, QUERIES = 64, 12

SMALL: dict[str, Any] = {
    "embed_dim": WIDTH,
    "d_model": 32,
    "num_queries": QUERIES,
    "depth": 2,
    "global_att_blocks": (1,),
    "patch_size": 56,
    "window_size": 6,
}
"""18 x 18 patches of the 1008 px that the host's node looks at; 64 channels are 16 heads of 4."""

SMALL_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": 16,
}

_TEXT = "detector.backbone.language_backbone.encoder."
_TABLES = ("embed.weight", "points.weight", "pos_embed", "embedding.weight")
_RESIDUAL = ("out_proj", "linear2", "fc2", "bbox_embed.layers.2", "attn.proj")

_FUSED = ("q_proj", "k_proj", "v_proj")


def small_core_sam3(family: str = "SAM3", seed: int = 0) -> tuple[ModelPatcher, comfy.sd.CLIP]:
    """MODEL and CLIP of a small SAM3 (``family`` "SAM3" or "SAM31")."""
    weights = checkpoint(family, SMALL, SMALL_TEXT, seed)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)
    config = comfy.model_detection.model_config_from_unet(weights, prefix)
    assert type(config).__name__ == family
    config.unet_config |= SMALL
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(weights, prefix)
    model.load_model_weights(weights, prefix)
    device = comfy.model_management.get_torch_device()
    patcher = ModelPatcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    with text_sizes(SMALL_TEXT) as options:
        target, state = config.clip_target(weights), config.process_clip_state_dict(weights)
        build: Any = comfy.sd.CLIP  # older releases, which have no SAM3, take no state_dict
        clip = build(target, tokenizer_data=state, state_dict=state, model_options=options)
    return patcher, clip


def checkpoint(family: str, sizes: dict[str, Any], text: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights under the keys of a published checkpoint; no ``sizes`` for those of the published model."""
    config = getattr(comfy.supported_models, family)({"image_model": family, **sizes})
    config.set_inference_dtype(torch.float32, None)
    with text_sizes(text) as options:
        encoder = config.clip_target({}).clip(device="cpu", dtype=torch.float32, model_options=options)
    generator = torch.Generator().manual_seed(seed)
    parts = {"": config.get_model({}).diffusion_model, "text.": encoder.sam3_clip.transformer}
    state = {
        f"{prefix}{name}": _drawn(name, tensor, generator)
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    return _published(state, family)


@contextmanager
def text_sizes(sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Options for a text encoder of other sizes; the host notes them in its table of sizes, which is put back."""
    from comfy.text_encoders.sam3_clip import SAM3_CLIP_CONFIG

    published = dict(SAM3_CLIP_CONFIG)
    try:
        yield {"sam3_clip_model_config": sizes}
    finally:
        SAM3_CLIP_CONFIG.update(published)


def _drawn(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep queries, concepts and pictures apart: norms near the identity, small additions to residuals."""
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim < 2:
        return (1 if name.endswith("weight") else 0) + 0.05 * noise
    if name.endswith(_TABLES):
        return noise
    return noise * (0.15 if any(part in name for part in _RESIDUAL) else 1.4) * tensor[0].numel() ** -0.5


def _published(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The keys of the host's modules as the published files have them: fused projections, OpenCLIP's text encoder."""
    renamed = {_published_name(name, family): tensor for name, tensor in state.items()}
    fused: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        base, _, kind = name.rpartition(".")
        place = base.rpartition(".")[2]
        is_fused = name.startswith(_TEXT) or (name.startswith("detector.") and "trunk" not in name)
        if place in _FUSED and is_fused:
            owner = base.rpartition(".")[0]
            if place == "q_proj":
                fused[f"{owner}.in_proj_{kind}"] = torch.cat([renamed[f"{owner}.{part}.{kind}"] for part in _FUSED])
        else:
            fused[name] = tensor
    return fused


def _published_name(name: str, family: str) -> str:
    if name.startswith("text."):
        name = name.removeprefix("text.").removeprefix("text_model.")
        for theirs, published in (
            ("encoder.layers.", "transformer.resblocks."),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("embeddings.token_embedding", "token_embedding"),
            ("final_layer_norm", "ln_final"),
        ):
            name = name.replace(theirs, published)
        return _TEXT + name
    if "sam_mask_decoder.transformer." in name:
        for theirs, published in (
            (".mlp.0.", ".mlp.lin1."),
            (".mlp.2.", ".mlp.lin2."),
            (".norm_final.", ".norm_final_attn."),
        ):
            name = name.replace(theirs, published)
    return name.replace("tracker.", "tracker.model.", 1) if family == "SAM31" and name.startswith("tracker.") else name
