"""How strongly each attention layer and each row is anchored: named presets, single blocks and a curve by text."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import LunaInputError
from ..values import real, shown
from ..words import split_list
from .layers import FLUX_PARTS, AttentionLayer

_MOST = 100.0
"""Weights lie within this of 0: larger ones are slips of the pen, and may end as infinite numbers in the model."""

_PAIR = re.compile(r"\s*([0-9]{1,4}|(?:input|middle|output|double|single)(?:\.[0-9]{1,4}){0,2})\s*:\s*(\S+)\s*")


@dataclass(frozen=True)
class LayerFactor:
    """What becomes of the weight in one layer.

    Attributes:
        factor: multiplies the weight; 0 leaves the layer alone.
        swapped: the picture anchors the negative prompt's rows instead, pushing its content away.
    """

    factor: float
    swapped: bool = False


# Blocks that carry style and composition, per number of blocks with attention (SDXL 11, SD1.5 16), as users of the
# field's weight types know them.
_STYLE = {11: {6}, 16: {0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15}}
_COMPOSITION = {11: {3: 1.0}, 16: {4: 0.25, 5: 1.0}}

_CURVES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda depth, middle: 1.0,
    "ease in": lambda depth, middle: 1 - depth,
    "ease out": lambda depth, middle: depth,
    "ease in-out": lambda depth, middle: 1 - middle,
    "reverse in-out": lambda depth, middle: middle,
}
"""Of the depth of a block, 0..1, and of its distance to the middle, 0..1."""

_WEAK = {"weak input": "input", "weak middle": "middle", "weak output": "output", "strong middle": "input output"}
"""Parts of the model that count little."""

_BY_BLOCK: dict[str, Callable[[float, float], LayerFactor]] = {
    "style transfer": lambda style, composition: LayerFactor(style),
    "composition": lambda style, composition: LayerFactor(composition),
    "strong style transfer": lambda style, composition: LayerFactor(0.0 if composition else 1.0),
    "style and composition": lambda style, composition: LayerFactor(style + composition),
    "strong style and composition": lambda style, composition: LayerFactor(1.0),
    "style transfer precise": lambda style, composition: LayerFactor(composition or style, composition > 0),
    "composition precise": lambda style, composition: LayerFactor(composition or style or 0.1, not composition),
}
"""Of how much style and composition a block carries, 0..1."""

LAYER_PRESETS = (*_CURVES, *_WEAK, *_BY_BLOCK, "none")


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

    @property
    def is_even(self) -> bool:
        """Whether it leaves every layer as it is; the rows may differ."""
        return self.preset == "linear" and not self.overrides

    def row_factors(self, count: int) -> Tensor:
        """What multiplies the weight of each of ``count`` rows: [count] float32."""
        if not self.row_curve:
            return torch.ones(count)
        places = np.linspace(0, len(self.row_curve) - 1, count)
        return torch.from_numpy(np.interp(places, np.arange(len(self.row_curve)), self.row_curve)).float()

    def _preset_factor(self, layer: AttentionLayer, count: int) -> LayerFactor:
        if self.preset == "none":
            return LayerFactor(0.0)
        if self.preset not in _CURVES and layer.key[0] in FLUX_PARTS:
            raise LunaInputError(
                f"layer_weights: preset '{self.preset}' names parts of a UNet, but model is Flux: use "
                f"{', '.join(_CURVES)} or none, and block:weight text such as double.4:0.5"
            )
        if self.preset in _WEAK:
            return LayerFactor(0.2 if layer.key[0] in _WEAK[self.preset].split() else 1.0)
        if self.preset in _CURVES:
            middle = abs(layer.index - count / 2) / (count / 2)
            return LayerFactor(0.05 + 0.95 * _CURVES[self.preset](layer.index / count, middle))
        if count not in _STYLE:
            raise LunaInputError(
                f"layer_weights: preset '{self.preset}' names blocks of SD1.5 and SDXL, "
                f"but this model has {count} blocks with attention: use another preset or block:weight text"
            )
        style, composition = float(layer.index in _STYLE[count]), _COMPOSITION[count].get(layer.index, 0.0)
        return _BY_BLOCK[self.preset](style, composition)


def parse_layer_weights(text: str) -> tuple[tuple[str, float], ...]:
    """Reads "block:weight" pairs, separated by commas or lines.

    A block is a number in the order they run ("6"), a part ("input", "middle", "output"), a block of a part
    ("output.3") or one transformer of a block ("output.3.1"); of Flux "double", "single" or "double.3".

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


def _entries(text: str) -> Iterator[str]:
    return filter(str.strip, re.split(r"[,;\n]", text))


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
