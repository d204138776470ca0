"""Seeded IP-Adapter weights in the layout of the published safetensors: plain and plus, for SD1.5 and SDXL."""

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


def _attention(family: Family, inner_dim: int, generator: torch.Generator) -> StateDict:
    shape = torch.Size((inner_dim, _CROSS_DIM[family]))
    weights: StateDict = {}
    for pair in range(_PAIRS[family]):
        number = 2 * pair + 1  # the published files count every attention layer; cross attention has the odd numbers
        weights[f"ip_adapter.{number}.to_k_ip.weight"] = fan_in_scaled(shape, generator)
        weights[f"ip_adapter.{number}.to_v_ip.weight"] = fan_in_scaled(shape, generator, _VALUE_GAIN)
    return weights
