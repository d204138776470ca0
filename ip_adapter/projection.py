"""The network of an IP-Adapter: image projection, and the key and value layers of every cross-attention."""

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .files import HEAD_DIM, AdapterLayout, AdapterWeights, resampler_depth, resampler_width


class LinearProjection(nn.Module):
    """Plain: pooled image embed [N,clip_dim] → [N,tokens,cross_dim] (Ye et al. 2023, section 3.2)."""

    def __init__(self, clip_dim: int, cross_dim: int, tokens: int, operations: Any) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = operations.Linear(clip_dim, tokens * cross_dim)
        self.norm = operations.LayerNorm(cross_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(pooled), "n (t d) -> n t d", t=self.tokens))


class MLPProjection(nn.Module):
    """InstantX: pooled image embed [N,clip_dim] → [N,tokens,cross_dim], through a hidden layer."""

    def __init__(self, clip_dim: int, hidden_dim: int, cross_dim: int, tokens: int, operations: Any) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Sequential(
            operations.Linear(clip_dim, hidden_dim), nn.GELU(), operations.Linear(hidden_dim, tokens * cross_dim)
        )
        self.norm = operations.LayerNorm(cross_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(pooled), "n (t d) -> n t d", t=self.tokens))


class FullFaceProjection(nn.Module):
    """Full-face: hidden states [N,257,clip_dim] → [N,257,cross_dim], token by token."""

    def __init__(self, clip_dim: int, cross_dim: int, operations: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(clip_dim, clip_dim),
            nn.GELU(),
            operations.Linear(clip_dim, cross_dim),
            operations.LayerNorm(cross_dim),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden)


class _ResamplerAttention(nn.Module):
    """Queries attend to the picture's tokens and to themselves."""

    def __init__(self, dim: int, heads: int, head_dim: int, operations: Any) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(dim, 2 * inner, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def forward(self, picture: Tensor, queries: Tensor) -> Tensor:
        picture, queries = self.norm1(picture), self.norm2(queries)
        k, v = self.to_kv(torch.cat((picture, queries), dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(x, "n t (heads d) -> n heads t d", heads=self.heads) for x in (self.to_q(queries), k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "n heads t d -> n t (heads d)"))


class _ResamplerLayer(nn.ModuleList):
    """Attention and feed-forward, each added to its input; a list because files number them 0 and 1."""

    def __init__(self, dim: int, heads: int, head_dim: int, operations: Any) -> None:
        super().__init__([_ResamplerAttention(dim, heads, head_dim, operations), _feed_forward(dim, operations)])

    def forward(self, picture: Tensor, queries: Tensor) -> Tensor:
        queries = queries + self[0](picture, queries)
        return queries + self[1](queries)


class Resampler(nn.Module):
    """Plus: hidden states [N,257,clip_dim] → [N,tokens,cross_dim], a Perceiver resampler (Alayrac et al. 2022)."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        tokens: int,
        clip_dim: int,
        cross_dim: int,
        operations: Any,
        head_dim: int = HEAD_DIM,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, tokens, dim))
        self.proj_in = operations.Linear(clip_dim, dim)
        self.proj_out = operations.Linear(dim, cross_dim)
        self.norm_out = operations.LayerNorm(cross_dim)
        self.layers = nn.ModuleList(_ResamplerLayer(dim, heads, head_dim, operations) for _ in range(depth))

    def forward(self, hidden: Tensor) -> Tensor:
        picture = self.proj_in(hidden)
        queries = repeat(self.latents.to(picture), "1 t d -> n t d", n=len(hidden))
        for layer in self.layers:
            queries = layer(picture, queries)
        return self.norm_out(self.proj_out(queries))


def _feed_forward(dim: int, operations: Any) -> nn.Sequential:
    return nn.Sequential(
        operations.LayerNorm(dim),
        operations.Linear(dim, 4 * dim, bias=False),
        nn.GELU(),
        operations.Linear(4 * dim, dim, bias=False),
    )


class KeyValueLayers(nn.Module):
    """``to_k_ip`` and ``to_v_ip`` of every cross-attention, in pair order; XLabs' have biases."""

    def __init__(self, layout: AdapterLayout, operations: Any) -> None:
        super().__init__()
        biased = layout.kind == "xlabs"
        self.to_k, self.to_v = (
            nn.ModuleList(operations.Linear(layout.cross_dim, inner, bias=biased) for inner in layout.inner_dims)
            for _ in range(2)
        )

    def forward(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [N,T,inner] of tokens [N,T,cross_dim], one pair per layer."""
        return [(to_k(tokens), to_v(tokens)) for to_k, to_v in zip(self.to_k, self.to_v, strict=True)]


class AdapterNetwork(nn.Module):
    """Everything an IP-Adapter file holds.

    Args:
        weights, layout: of the file.
        operations: namespace with ``Linear`` and ``LayerNorm``: ``torch.nn``, or one that casts weights when used.
    """

    def __init__(self, weights: AdapterWeights, layout: AdapterLayout, operations: Any = nn) -> None:
        super().__init__()
        with torch.device("meta"):
            self.image_proj = _projection(weights, layout, operations)
            self.key_values = KeyValueLayers(layout, operations)
        self.image_proj.load_state_dict(weights.image_proj, strict=True, assign=True)
        self.key_values.load_state_dict(
            {
                f"to_{kind}.{index}.{part}": weights.ip_adapter[f"{number}.to_{kind}_ip.{part}"]
                for index, number in enumerate(layout.numbers)
                for kind in "kv"
                for part in (("weight", "bias") if layout.kind == "xlabs" else ("weight",))
            },
            strict=True,
            assign=True,
        )
        self.requires_grad_(False).eval()


def _projection(weights: AdapterWeights, layout: AdapterLayout, operations: Any) -> nn.Module:
    if layout.variant == "plain":
        return LinearProjection(layout.clip_dim, layout.cross_dim, layout.tokens, operations)
    if layout.variant == "mlp":
        hidden_dim = weights.image_proj["proj.0.weight"].shape[0]
        return MLPProjection(layout.clip_dim, hidden_dim, layout.cross_dim, layout.tokens, operations)
    if layout.variant == "full_face":
        return FullFaceProjection(layout.clip_dim, layout.cross_dim, operations)
    dim = weights.image_proj["latents"].shape[2]
    heads, depth = resampler_width(weights) // HEAD_DIM, resampler_depth(weights)
    return Resampler(dim, depth, heads, layout.tokens, layout.clip_dim, layout.cross_dim, operations)
