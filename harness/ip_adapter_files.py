"""Seeded IP-Adapter weights in the layout of the published safetensors, for SD1.5, SDXL and Flux."""

from typing import Literal

import torch

from harness.seeding import StateDict, fan_in_scaled, generator_for

Family = Literal["sd15", "sdxl"]

_CROSS_DIM = {"sd15": 768, "sdxl": 2048}
_RESAMPLER_DIM = {"sd15": 768, "sdxl": 1280}
_PAIRS = {"sd15": 16, "sdxl": 70}
_TOKENS_PLAIN, _TOKENS_PLUS, _DEPTH = 4, 16, 4
_VALUE_GAIN = 1.5  # makes the image prompt about as strong as the text


def build_plain(family: Family, image_embed_dim: int, inner_dim: int) -> StateDict:
    """Plain adapter: one linear layer makes 4 tokens of the pooled image embed.

    ``inner_dim`` is the width of the UNet's attention layers, one number because the demo UNets have one.
    """
    generator = generator_for("ip-adapter", "plain", family)
    cross = _CROSS_DIM[family]
    weights = {
        "image_proj.proj.weight": fan_in_scaled(torch.Size((_TOKENS_PLAIN * cross, image_embed_dim)), generator),
        "image_proj.proj.bias": torch.zeros(_TOKENS_PLAIN * cross),
        "image_proj.norm.weight": torch.ones(cross),
        "image_proj.norm.bias": torch.zeros(cross),
    }
    return weights | _attention(family, inner_dim, generator)


def build_plus(family: Family, hidden_dim: int, inner_dim: int) -> StateDict:
    """Plus adapter: a resampler of 4 layers makes 16 tokens of the encoder's hidden states [257, hidden_dim]."""
    generator = generator_for("ip-adapter", "plus", family)
    cross, dim = _CROSS_DIM[family], _RESAMPLER_DIM[family]

    def linear(outputs: int, inputs: int) -> torch.Tensor:
        return fan_in_scaled(torch.Size((outputs, inputs)), generator)

    weights = {
        # Small queries: what the tokens say comes from the picture.
        "image_proj.latents": torch.randn((1, _TOKENS_PLUS, dim), generator=generator).mul_(0.1),
        "image_proj.proj_in.weight": linear(dim, hidden_dim),
        "image_proj.proj_in.bias": torch.zeros(dim),
        "image_proj.proj_out.weight": linear(cross, dim),
        "image_proj.proj_out.bias": torch.zeros(cross),
        "image_proj.norm_out.weight": torch.ones(cross),
        "image_proj.norm_out.bias": torch.zeros(cross),
    }
    for layer in range(_DEPTH):
        attention, feed_forward = f"image_proj.layers.{layer}.0.", f"image_proj.layers.{layer}.1."
        for norm in (f"{attention}norm1", f"{attention}norm2", f"{feed_forward}0"):
            weights |= {f"{norm}.weight": torch.ones(dim), f"{norm}.bias": torch.zeros(dim)}
        weights |= {
            f"{attention}to_q.weight": linear(dim, dim),
            f"{attention}to_kv.weight": linear(2 * dim, dim),
            f"{attention}to_out.weight": linear(dim, dim),
            f"{feed_forward}1.weight": linear(4 * dim, dim),
            f"{feed_forward}3.weight": linear(dim, 4 * dim),
        }
    return weights | _attention(family, inner_dim, generator)


def build_full_face(family: Family, hidden_dim: int, inner_dim: int) -> StateDict:
    """Full-face adapter: an MLP over every token of the encoder's hidden states."""
    generator = generator_for("ip-adapter", "full-face", family)
    cross = _CROSS_DIM[family]
    weights = {
        "image_proj.proj.0.weight": fan_in_scaled(torch.Size((hidden_dim, hidden_dim)), generator),
        "image_proj.proj.0.bias": torch.zeros(hidden_dim),
        "image_proj.proj.2.weight": fan_in_scaled(torch.Size((cross, hidden_dim)), generator),
        "image_proj.proj.2.bias": torch.zeros(cross),
        "image_proj.proj.3.weight": torch.ones(cross),
        "image_proj.proj.3.bias": torch.zeros(cross),
    }
    return weights | _attention(family, inner_dim, generator)


FLUX_CROSS = 4096


def build_xlabs(image_embed_dim: int, inner_dim: int, double: int, tokens: int = 4) -> StateDict:
    """XLabs' adapter of Flux, the projection and the layers of the double blocks, with biases."""
    generator = generator_for("ip-adapter", "xlabs", double)
    weights = {
        "ip_adapter_proj_model.proj.weight": fan_in_scaled(
            torch.Size((tokens * FLUX_CROSS, image_embed_dim)), generator
        ),
        "ip_adapter_proj_model.proj.bias": torch.zeros(tokens * FLUX_CROSS),
        "ip_adapter_proj_model.norm.weight": torch.ones(FLUX_CROSS),
        "ip_adapter_proj_model.norm.bias": torch.zeros(FLUX_CROSS),
    }
    for block in range(double):
        for kind, gain in (("k", 1.0), ("v", _VALUE_GAIN)):
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind}_proj"
            weights[f"{name}.weight"] = fan_in_scaled(torch.Size((inner_dim, FLUX_CROSS)), generator, gain)
            weights[f"{name}.bias"] = torch.randn(inner_dim, generator=generator).mul_(0.5)
    return weights


def build_instantx(image_embed_dim: int, inner_dim: int, blocks: int, tokens: int = 4) -> StateDict:
    """InstantX' adapter of Flux: an MLP, and the layers of all blocks, without biases."""
    generator = generator_for("ip-adapter", "instantx", blocks)
    hidden = 2 * image_embed_dim
    weights = {
        "image_proj.proj.0.weight": fan_in_scaled(torch.Size((hidden, image_embed_dim)), generator),
        "image_proj.proj.0.bias": torch.randn(hidden, generator=generator).mul_(0.5),
        "image_proj.proj.2.weight": fan_in_scaled(torch.Size((tokens * FLUX_CROSS, hidden)), generator),
        "image_proj.proj.2.bias": torch.zeros(tokens * FLUX_CROSS),
        "image_proj.norm.weight": torch.ones(FLUX_CROSS),
        "image_proj.norm.bias": torch.zeros(FLUX_CROSS),
    }
    for block in range(blocks):
        for kind, gain in (("k", 1.0), ("v", _VALUE_GAIN)):
            shape = torch.Size((inner_dim, FLUX_CROSS))
            weights[f"ip_adapter.{block}.to_{kind}_ip.weight"] = fan_in_scaled(shape, generator, gain)
    return weights


def build_pooling_head(width: int) -> StateDict:
    """SigLIP's, keys as in the published files."""
    generator = generator_for("siglip head", width)
    shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width),
        "attention.out_proj.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "mlp.fc1.weight": (2 * width, width),
        "mlp.fc1.bias": (2 * width,),
        "mlp.fc2.weight": (width, 2 * width),
        "mlp.fc2.bias": (width,),
    }
    return {
        f"vision_model.head.{name}": torch.randn(shape, generator=generator).mul_(0.3 if name.endswith("bias") else 0.2)
        + (1.0 if name == "layernorm.weight" else 0.0)
        for name, shape in shapes.items()
    }


def _attention(family: Family, inner_dim: int, generator: torch.Generator) -> StateDict:
    shape = torch.Size((inner_dim, _CROSS_DIM[family]))
    weights: StateDict = {}
    for pair in range(_PAIRS[family]):
        number = 2 * pair + 1  # the published files count every attention layer; cross attention has the odd numbers
        weights[f"ip_adapter.{number}.to_k_ip.weight"] = fan_in_scaled(shape, generator)
        weights[f"ip_adapter.{number}.to_v_ip.weight"] = fan_in_scaled(shape, generator, _VALUE_GAIN)
    return weights
