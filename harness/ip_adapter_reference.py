"""IP-Adapters by the published formulas, written apart from the pack: what its engine is measured against.

Ye et al. 2023 (decoupled cross-attention, linear projection), Alayrac et al. 2022 (resampler). Plain tensor algebra
in float64 where the caller gives float64; nothing is shared with the engine, not even the order of the layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SD15_KEYS = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("output", n) for n in range(3, 12)] + [("middle", 0)]
"""(part, block) of pair 0..15, by hand; each block holds one transformer."""

SDXL_KEYS = (
    [("input", n, t) for n in (4, 5) for t in range(2)]
    + [("input", n, t) for n in (7, 8) for t in range(10)]
    + [("output", n, t) for n in (0, 1, 2) for t in range(10)]
    + [("output", n, t) for n in (3, 4, 5) for t in range(2)]
    + [("middle", 0, t) for t in range(10)]
)
"""(part, block, transformer) of pair 0..69, by hand."""


def keys(family: str) -> list[tuple[str, int, int]]:
    """ComfyUI's keys of all pairs, in the order of the files."""
    return list(SDXL_KEYS) if family == "sdxl" else [(part, block, 0) for part, block in SD15_KEYS]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head; [R,tokens,inner] all three."""
    parts = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
        parts.append(torch.softmax(scores, dim=-1) @ vh)
    return torch.cat(parts, dim=-1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def linear_projection(weights: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
    """[N,clip] → [N,tokens,cross]."""
    tokens = pooled @ weights["proj.weight"].T + weights["proj.bias"]
    width = len(weights["norm.weight"])
    return layer_norm(tokens.reshape(len(pooled), -1, width), weights["norm.weight"], weights["norm.bias"])


def full_face(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """[N,257,clip] → [N,257,cross]."""
    x = gelu(hidden @ weights["proj.0.weight"].T + weights["proj.0.bias"])
    x = x @ weights["proj.2.weight"].T + weights["proj.2.bias"]
    return layer_norm(x, weights["proj.3.weight"], weights["proj.3.bias"])


def resampler(weights: Mapping[str, Tensor], hidden: Tensor, depth: int, heads: int) -> Tensor:
    """[N,257,clip] → [N,queries,cross]."""
    picture = hidden @ weights["proj_in.weight"].T + weights["proj_in.bias"]
    latents = weights["latents"].expand(len(hidden), -1, -1)
    for layer in range(depth):
        first, second = f"layers.{layer}.0.", f"layers.{layer}.1."
        x = layer_norm(picture, weights[first + "norm1.weight"], weights[first + "norm1.bias"])
        y = layer_norm(latents, weights[first + "norm2.weight"], weights[first + "norm2.bias"])
        both = torch.cat([x, y], dim=1)
        k, v = (both @ half.T for half in weights[first + "to_kv.weight"].chunk(2))
        attended = attention(y @ weights[first + "to_q.weight"].T, k, v, heads)
        latents = latents + attended @ weights[first + "to_out.weight"].T
        inner = layer_norm(latents, weights[second + "0.weight"], weights[second + "0.bias"])
        latents = latents + gelu(inner @ weights[second + "1.weight"].T) @ weights[second + "3.weight"].T
    out = latents @ weights["proj_out.weight"].T + weights["proj_out.bias"]
    return layer_norm(out, weights["norm_out.weight"], weights["norm_out.bias"])


def decoupled(q: Tensor, k_ip: Tensor, v_ip: Tensor, heads: int, weight: Tensor | float, scaling: str) -> Tensor:
    """What the picture adds to a layer's output, by scaling mode; ``weight`` is a number or [R,1,1]."""
    if scaling == "V only":
        return attention(q, k_ip, v_ip, heads) * weight
    if scaling == "K+V":
        return attention(q, k_ip * weight, v_ip * weight, heads)
    penalised = weight * (k_ip.shape[-1] / 1280)
    if scaling == "K+V w/ C penalty":
        return attention(q, k_ip * penalised, v_ip * penalised, heads)
    assert scaling == "K+mean(V) w/ C penalty"
    mean = v_ip.mean(dim=1, keepdim=True)
    return attention(q, k_ip * penalised, v_ip - mean + mean * penalised, heads)


MARKS = {"positive": 5.0, "middle": 9.0, "negative": -5.0, "empty": -9.0}
"""First value of a prompt's first token: tells every attention call which prompt each of its rows belongs to."""


def marked(conditioning: list[list[Any]], name: str) -> list[list[Any]]:
    """A CONDITIONING that tells its role by its own content."""
    marked_conditioning = []
    for text, extra in conditioning:
        text = text.clone()
        text[:, 0, 0] = MARKS[name]
        marked_conditioning.append([text, dict(extra)])
    return marked_conditioning


class ContentAdapter:
    """Per-row anchors that read each row's role off its prompt, so no bookkeeping of the engine is shared.

    Attributes:
        rows: for every model call, its rows as (mark of the prompt, latent).
    """

    def __init__(
        self, weights: Mapping[str, Tensor], family: str, cond: Tensor, uncond: Tensor, weight: Sequence[float] | float
    ) -> None:
        self.weights, self.family = weights, family
        self.cond, self.uncond = cond, uncond.expand(len(cond), -1, -1)
        self.weight = torch.as_tensor(weight).expand(len(cond))
        self.marks: Tensor = torch.empty(0)
        self.rows: list[list[tuple[float, int]]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContentAdapter":
        return self  # ComfyUI copies a model's options deeply with every clone

    def patch(self, model: Any) -> Any:
        patched = model.clone()
        patched.set_model_attn2_patch(self._read_marks)
        for pair, key in enumerate(keys(self.family)):
            patched.set_model_attn2_replace(self._layer(pair), *key)
        return patched

    def _read_marks(self, n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        self.marks = context[:, 0, 0].clone()
        if options["block"] == ("middle", 0) and options["block_index"] == 0:
            self.rows.append([(float(mark), row % len(self.cond)) for row, mark in enumerate(self.marks)])
        return n, context, value

    def _layer(self, pair: int) -> Any:
        to_k, to_v = (self.weights[f"ip_adapter.{2 * pair + 1}.to_{kind}_ip.weight"] for kind in "kv")

        def replace(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            chosen = torch.stack([
                (self.cond if mark > 0 else self.uncond)[row % len(self.cond)] for row, mark in enumerate(self.marks)
            ])  # fmt: skip
            weight = torch.stack([self.weight[row % len(self.cond)] for row in range(len(q))])[:, None, None]
            heads = options["n_heads"]
            picture = decoupled(q, chosen @ to_k.T, chosen @ to_v.T, heads, weight, "V only")
            return attention(q, k, v, heads) + picture

        return replace
