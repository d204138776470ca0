"""How strongly each attention layer and each row is anchored: named presets, single blocks and a curve by text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import LunaInputError
from ..values import real, shown
from ..words import split_list
from .layers import AttentionLayer

_MOST = 100.0
"""Weights lie within this of 0: larger ones are slips of the pen, and may end as infinite numbers in the model."""

_PAIR = re.compile(r"\s*([0-9]{1,4}|(?:input|middle|output)(?:\.[0-9]{1,4}){0,2})\s*:\s*(\S+)\s*")

_SDXL_BLOCKS = 11  # blocks with attention of SDXL; SD1.5 has 16

# Block indices that carry style and composition, per number of blocks, as users of the field's weight types know them.
_STYLE = {11: {6}, 16: {0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15}}
_COMPOSITION: dict[int, dict[int, float]] = {11: {3: 1.0}, 16: {4: 0.25, 5: 1.0}}
_STRONG_COMPOSITION = {11: {3: 1.0}, 16: {4: 1.0, 5: 1.0}}

LAYER_PRESETS = (
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak middle",
    "weak output",
    "strong middle",
    "style transfer",
    "composition",
    "strong style transfer",
    "style and composition",
    "strong style and composition",
    "style transfer precise",
    "composition precise",
    "none",
)

_WEAK = {
    "weak input": ("input",),
    "weak middle": ("middle",),
    "weak output": ("output",),
    "strong middle": ("input", "output"),
}
_BY_BLOCK = frozenset(LAYER_PRESETS[9:16])


@dataclass(frozen=True)
class LayerFactor:
    """What becomes of the weight in one layer.

    Attributes:
        factor: multiplies the weight; 0 leaves the layer alone.
        swapped: the picture anchors the negative prompt's rows instead, pushing its content away.
    """

    factor: float
    swapped: bool = False


@dataclass(frozen=True)
class LayerWeights:
    """Weights over the depth of the model and over the rows of a picture.

    Attributes:
        preset: one of ``LAYER_PRESETS``; gives every layer its factor.
        overrides: (block, factor) pairs that replace the preset's factor, later ones over earlier ones.
        row_curve: factors spread evenly over the rows of a picture, linear in between; empty for 1 everywhere.
    """

    preset: str = "linear"
    overrides: tuple[tuple[str, float], ...] = ()
    row_curve: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in LAYER_PRESETS:
            raise LunaInputError(f"preset is '{self.preset}': use one of {', '.join(LAYER_PRESETS)}")
        for factor in (*self.row_curve, *(value for _, value in self.overrides)):
            if not -_MOST <= real(factor, "a factor of layer_weights") <= _MOST:
                raise LunaInputError(f"layer_weights holds {shown(factor)}: use factors from {-_MOST:g} to {_MOST:g}")

    def resolve(self, layers: Sequence[AttentionLayer]) -> list[LayerFactor]:
        """The factor of each layer.

        Raises:
            LunaInputError: a block of the overrides is not in this model, or the preset is not defined for it.
        """
        count = 1 + max(layer.index for layer in layers)
        factors = [self._preset_factor(layer, count) for layer in layers]
        for block, value in self.overrides:
            hits = [place for place, layer in enumerate(layers) if _matches(block, layer)]
            if not hits:
                raise LunaInputError(
                    f"layer_weights: this model has no block '{block}'. It has {describe_blocks(layers)}"
                )
            for place in hits:
                factors[place] = LayerFactor(value)
        return factors

    def row_factors(self, count: int) -> Tensor:
        """What multiplies the weight of each of ``count`` rows: [count] float32."""
        if not self.row_curve:
            return torch.ones(count)
        places = np.linspace(0, len(self.row_curve) - 1, count)
        return torch.from_numpy(np.interp(places, np.arange(len(self.row_curve)), self.row_curve)).float()

    def _preset_factor(self, layer: AttentionLayer, count: int) -> LayerFactor:
        if self.preset in _BY_BLOCK:
            if count not in _STYLE:
                raise LunaInputError(
                    f"layer_weights: preset '{self.preset}' names blocks of SD1.5 and SDXL, "
                    f"but this model has {count} blocks with attention: use another preset or block:weight text"
                )
            return _block_preset(self.preset, layer.index, count)
        return LayerFactor(_curve(self.preset, layer, count))


def _curve(preset: str, layer: AttentionLayer, count: int) -> float:
    if preset == "none":
        return 0.0
    if preset in _WEAK:
        return 0.2 if layer.key[0] in _WEAK[preset] else 1.0
    depth, middle = layer.index / count, abs(layer.index - count / 2) / (count / 2)
    rise = {"linear": 1.0, "ease in": 1 - depth, "ease out": depth, "ease in-out": 1 - middle, "reverse in-out": middle}
    return 0.05 + 0.95 * rise[preset]


def _block_preset(preset: str, index: int, count: int) -> LayerFactor:
    style = 1.0 if index in _STYLE[count] else 0.0
    composition = _COMPOSITION[count].get(index, 0.0)
    strong = _STRONG_COMPOSITION[count].get(index, 0.0)
    # Strong style leaves out only what draws composition: for SDXL block 3, for SD1.5 blocks 4 and 5.
    everywhere = 0.0 if strong else 1.0
    is_sdxl = count == _SDXL_BLOCKS
    if preset == "composition precise":
        if strong:
            return LayerFactor(composition)
        return LayerFactor(1.0 if style else 0.1, swapped=True)
    if preset == "style transfer precise":
        return LayerFactor(composition, swapped=True) if strong else LayerFactor(style)
    return LayerFactor(
        {
            "style transfer": style,
            "composition": composition,
            "style and composition": style + composition,
            "strong style transfer": everywhere if is_sdxl or index not in (4, 5) else 0.0,
            "strong style and composition": everywhere + strong,
        }[preset]
    )


def parse_layer_weights(text: str) -> tuple[tuple[str, float], ...]:
    """Reads "block:weight" pairs, separated by commas or lines.

    A block is a number in the order they run ("6"), a part ("input", "middle", "output"), a block of a part
    ("output.3") or one transformer of a block ("output.3.1").

    Raises:
        LunaInputError: an entry is no pair, or its weight no number or beyond reason.
    """
    pairs = []
    for entry in split_list(text):
        match = _PAIR.fullmatch(entry)
        value = _number(match[2]) if match else None
        if match is None or value is None:
            raise LunaInputError(
                f"layer_weights: '{entry}' is no block:weight pair with a weight from -{_MOST:g} to {_MOST:g}. "
                "Write for example 3:0.5, output.4:1.2 or middle:0"
            )
        pairs.append((match[1], value))
    return tuple(pairs)


def parse_numbers(text: str, name: str) -> tuple[float, ...]:
    """Reads numbers separated by commas or lines; ``name`` is the input's, for messages.

    Raises:
        LunaInputError: an entry is no number, or one beyond reason.
    """
    values = []
    for entry in split_list(text):
        value = _number(entry)
        if value is None:
            raise LunaInputError(
                f"{name} holds '{entry}', which is no number from -{_MOST:g} to {_MOST:g}: "
                "write for example 1, 0.5, 0.8"
            )
        values.append(value)
    return tuple(values)


def describe_blocks(layers: Sequence[AttentionLayer]) -> str:
    """The blocks of a model for messages: number, name, and how many transformers each holds."""
    blocks: dict[tuple[int, str], int] = {}
    for layer in sorted(layers, key=lambda layer: (layer.index, layer.key[2])):
        name = f"{layer.key[0]}.{layer.key[1]}"
        blocks[layer.index, name] = blocks.get((layer.index, name), 0) + 1
    return ", ".join(f"{index} = {name}" + (f" (x{n})" if n > 1 else "") for (index, name), n in blocks.items())


def _matches(block: str, layer: AttentionLayer) -> bool:
    if block.isdigit():
        return int(block) == layer.index
    return f"{layer.name}.".startswith(f"{block}.")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _MOST else None  # NaN is not
