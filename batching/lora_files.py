"""What a LoRA file must hold before a model is touched: ComfyUI leaves out what is odd, with a line in the log."""

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from ..errors import LunaInputError
from ..weight_files import weight_fault

_PRODUCTS = (
    (".lora_up.weight", ".lora_down.weight", ".lora_mid.weight"),
    ("_lora.up.weight", "_lora.down.weight", ""),
    (".lora.up.weight", ".lora.down.weight", ""),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", ""),
    (".lora_B.weight", ".lora_A.weight", ""),
    (".lora_B.default.weight", ".lora_A.default.weight", ""),
    (".lora_B", ".lora_A", ""),
    (".hada_w1_a", ".hada_w1_b", ".hada_t1"),
    (".hada_w2_a", ".hada_w2_b", ".hada_t2"),
    (".lokr_w1_a", ".lokr_w1_b", ""),
    (".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
)
"""Halves that are multiplied, left [out,rank] by right [rank,in], and the core that may stand between them."""

_TOGETHER = (
    (".hada_w1_a", ".hada_w2_a"),
    (".hada_t1", ".hada_t2"),
    (".a1.weight", ".a2.weight"),
    (".a2.weight", ".b1.weight"),
    (".b1.weight", ".b2.weight"),
)
_LOKR = ((".lokr_w1", ".lokr_w1_a"), (".lokr_w2", ".lokr_w2_a"))
_MARKS = ("lora", "hada_", "lokr_", ".a1.weight", "oft_", ".diff", ".w_norm", ".set_weight")
_ALPHA, _RESHAPE = ".alpha", ".reshape_weight"
_MOST_WIDE = 2**17
"""Of the size that a layer is to grow to: far above any model's."""


def read_lora(state_dict: object, name: str) -> dict[str, Tensor]:
    """The weights of a LoRA file (LoRA, LoCon, LoHa, LoKr, GLoRA, OFT, BOFT, differences), checked.

    Args:
        state_dict: what the file holds.
        name: of the file, for messages.

    Raises:
        LunaInputError: it is no LoRA, or damaged: naming the weight.
    """
    if not isinstance(state_dict, Mapping) or not state_dict:
        what = "nothing" if isinstance(state_dict, Mapping) else f"a {type(state_dict).__name__}"
        raise LunaInputError(f"lora '{name}' holds {what}, so it is no LoRA: choose another file")
    weights = {str(key): value for key, value in state_dict.items()}
    if not any(mark in key for key in weights for mark in _MARKS):
        shown = ", ".join(list(weights)[:3])
        raise LunaInputError(f"lora '{name}' is no LoRA (found {shown}, …): choose another file")
    fault = next(_faults(weights), None) or next(_unpaired(weights), None)
    if fault is not None:
        raise LunaInputError(f"lora '{name}': {fault}. The file is damaged or not downloaded to the end")
    return weights


def _faults(weights: Mapping[str, object]) -> Iterator[str]:
    """What is wrong with single weights."""
    for key, value in weights.items():
        if key.endswith(_RESHAPE) and isinstance(value, Tensor):
            whole = not (value.is_floating_point() or value.is_complex()) and value.ndim == 1 and value.numel() > 0
            if not whole or not 0 < value.min() <= value.max() <= _MOST_WIDE:
                yield f"{key} is no size that a layer could have"
        elif key.endswith(_ALPHA) and isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex() or not math.isfinite(value.item()):
                yield f"{key} is no single number (shape {list(value.shape)})"
        elif fault := weight_fault(value):
            yield f"{key} {fault}"


def _unpaired(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Weights whose other half is missing, or cannot be multiplied with them."""
    for key, value in weights.items():
        for left, right, core in _PRODUCTS:
            if key.endswith(right) and key.removesuffix(right) + left not in weights:
                yield f"{key.removesuffix(right) + left} is missing"
            if key.endswith(left):
                yield from _unlike(weights, key, key.removesuffix(left) + right, key.removesuffix(left) + core)
        for one, other in _TOGETHER:
            for mine, theirs in ((one, other), (other, one)):
                if key.endswith(mine) and key.removesuffix(mine) + theirs not in weights:
                    yield f"{key.removesuffix(mine) + theirs} is missing"
        if ".lokr_w" in key:
            base = key[: key.index(".lokr_w")]
            yield from (f"{base}{part[0]} is missing" for part in _LOKR if not any(base + p in weights for p in part))
        if value.ndim > 5:
            yield f"{key} has shape {list(value.shape)}"


def _unlike(weights: Mapping[str, Tensor], left: str, right: str, core: str) -> Iterator[str]:
    if right not in weights:
        yield f"{right} is missing"
        return
    one, other = weights[left].shape, weights[right].shape
    if min(len(one), len(other)) < 2 or (core not in weights and math.prod(one[1:]) != other[0]):
        yield f"{left} {list(one)} and {right} {list(other)} do not fit each other"
