"""The cross-attention layers of a UNet, in the order in which IP-Adapter files number them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

LayerKey = tuple[str, int, int]
"""ComfyUI's address of a transformer block: part, number of the block in its part, number in the block."""


@dataclass(frozen=True)
class AttentionLayer:
    """One cross-attention layer.

    Attributes:
        key: its address in ``patches_replace``.
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
