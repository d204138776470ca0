"""The layers of a model that IP-Adapters act in, in the order in which their files number them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

LayerKey = tuple[str, int, int]
"""ComfyUI's address of a transformer block: part, number of the block in its part, number in the block."""


@dataclass(frozen=True)
class AttentionLayer:
    """One cross-attention layer of a UNet, or one block of Flux.

    Attributes:
        key: its address in ``patches_replace``; of Flux, the kind of block, its number, and 0.
        index: number of its block among all blocks with attention, in the order they run; presets go by it.
        inner_dim: width of its keys and values.
        context_dim: width of the text tokens it reads.
    """

    key: LayerKey
    index: int
    inner_dim: int
    context_dim: int

    @property
    def name(self) -> str:
        """As written in layer weights, for example "input.4.0"."""
        return ".".join(map(str, self.key))


def attention_layers(unet: nn.Module) -> list[AttentionLayer]:
    """Walks a UNet's own transformer blocks.

    Files number pairs as input blocks, output blocks, middle; blocks run as input, middle, output.

    Returns:
        The layers in the order of the pairs of an IP-Adapter file; empty for a model that is no UNet with
        cross-attention.
    """
    parts: dict[str, Any] = {
        "input": getattr(unet, "input_blocks", ()),
        "middle": [getattr(unet, "middle_block", None)],
        "output": getattr(unet, "output_blocks", ()),
    }
    found: dict[str, list[AttentionLayer]] = {part: [] for part in parts}
    index = 0
    for part, blocks in parts.items():
        for number, block in enumerate(blocks):
            for transformer in (module for module in block or () if hasattr(module, "transformer_blocks")):
                for place, layer in enumerate(transformer.transformer_blocks):
                    if getattr(layer, "attn2", None) is not None:
                        to_k = layer.attn2.to_k
                        inner, context = to_k.out_features, to_k.in_features
                        found[part].append(AttentionLayer((part, number, place), index, inner, context))
                index += 1
    return found["input"] + found["output"] + found["middle"]


FLUX_PARTS = ("double", "single")
"""Kinds of Flux' blocks, in the order they run."""


def flux_layers(flux: nn.Module, parts: Sequence[str] = FLUX_PARTS) -> list[AttentionLayer]:
    """The blocks of a Flux network in the order they run, which is that of the pairs of an IP-Adapter file.

    Args:
        flux: with ``double_blocks`` and ``single_blocks``, each of which knows its ``hidden_size``.
        parts: kinds of blocks to list.
    """
    text: Any = flux.get_submodule("txt_in")
    blocks = [(part, *entry) for part in parts for entry in enumerate(getattr(flux, f"{part}_blocks"))]
    return [
        AttentionLayer((part, number, 0), index, block.hidden_size, text.in_features)
        for index, (part, number, block) in enumerate(blocks)
    ]


def is_kolors(unet: nn.Module) -> bool:
    """Whether a UNet of SDXL's widths is Kolors': its size embedding is joined to a vector of 4096, not of 1280."""
    label = next((x for x in getattr(unet, "label_emb", nn.Identity()).modules() if isinstance(x, nn.Linear)), None)
    return label is not None and label.in_features == 4096 + 6 * 256
