"""Flux on ComfyUI: which models are Flux, whether this release can carry adapters, and the patch of its blocks."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import comfy.ldm.modules.attention
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..errors import LunaInputError
from .anchors import KeyValues
from .comfy_adapter import IPAdapter
from .flux import AnchoredBlock, normed_keys
from .layers import AttentionLayer, flux_layers

CARRIES_FLUX_ADAPTERS = (
    hasattr(comfy.ldm.modules.attention, "wrap_attn")
    and "transformer_options" in inspect.signature(DoubleStreamBlock.forward).parameters
)
"""Whether a block's attention can be replaced in the options of a call."""


def is_flux(network: nn.Module) -> bool:
    """True for ComfyUI's own Flux made of its own blocks; other packs' quantised blocks are their own."""
    if not isinstance(network, Flux):
        return False
    blocks: list[Any] = [*network.double_blocks, *network.single_blocks]
    return all(isinstance(block, DoubleStreamBlock | SingleStreamBlock) for block in blocks)


def flux_layers_for(network: nn.Module, adapter: IPAdapter) -> list[AttentionLayer]:
    """The blocks of Flux, one per key and value pair of the adapter.

    Raises:
        LunaInputError: the model was pruned, or is another of Flux' kin.
    """
    layout = adapter.layout
    layers = flux_layers(network, ("double",) if layout.kind == "xlabs" else ("double", "single"))
    if tuple(layer.inner_dim for layer in layers) != layout.inner_dims:
        widths = "/".join(map(str, sorted({layer.inner_dim for layer in layers})))
        raise LunaInputError(
            f"ip_adapter '{adapter.name}' has {len(layout.numbers)} layers {layout.inner_dims[0]} wide for Flux' "
            f"blocks, model has {len(layers)} of {widths}: it was made for FLUX.1; pruned models and others of the "
            "family need an adapter of their own"
        )
    return layers


def flux_key_values(model: ModelPatcher, adapter: IPAdapter) -> Callable[[Tensor], KeyValues]:
    """What makes keys and values [n,T,inner] of every block, in the dtype the model computes in: there are many."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    network: Any = model.get_model_object("diffusion_model")
    heads = network.num_heads

    def key_values_of(tokens: Tensor) -> KeyValues:
        pairs = adapter.key_values(tokens)
        if adapter.layout.kind == "instantx":
            pairs = [(normed_keys(k, heads), v) for k, v in pairs]
        return [(k.to(dtype), v.to(dtype)) for k, v in pairs]

    return key_values_of


def patch_blocks(patched: ModelPatcher, adapter: IPAdapter, layers: Sequence[AttentionLayer], patch: int) -> None:
    """Sets a replacement for every block of the adapter; those without a weight of their own only pass on."""
    for pair, layer in enumerate(layers):
        part, number, _ = layer.key
        block = (f"{part}_block", number)
        replaced = patched.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
        anchored = AnchoredBlock(patch, pair, _attention, adapter.layout.kind == "instantx", replaced.get(block))
        patched.set_model_patch_replace(anchored, "dit", *block)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = optimized_attention(q, k, v, q.shape[1], skip_reshape=True)
    return out
