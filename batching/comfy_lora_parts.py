"""What a LoRA file changes on a model of ComfyUI, by its own key maps and adapters, and as parts for single layers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from .concepts import Lora
from .lora_parts import LowRank, Offset, RowPart, low_rank

_PER_ROW = ("lora", "loha", "lokr")
"""Adapters whose difference is the same whatever the weight."""
_OF_TEXT = ("lora_te", "lora_prior_te", "text_encoder", "text_model", "te_", "te1_", "te2_", "lycoris_text_encoder")


@dataclass(frozen=True, eq=False)
class Patch:
    """One change of a LoRA.

    Attributes:
        layer: path of the module in the model.
        weight: name of its parameter.
        content: ComfyUI's adapter or tuple.
        offset: the part of the parameter that is meant.
        function: what ComfyUI does with the difference before it adds it, where the model's layout is another one.
    """

    layer: str
    weight: str
    content: Any
    offset: Offset | None
    function: Callable[[Tensor], Tensor] | None


@dataclass(eq=False)
class ModelLora:
    """A LoRA as it meets a model.

    Attributes:
        name: of the file.
        patches: in the file's order.
        obstacle: why it cannot be given per row.
        idle: patches that change nothing.
        only_text: it is for the text encoder alone.
    """

    name: str
    patches: list[Patch] = field(default_factory=list)
    obstacle: str | None = None
    idle: set[Patch] = field(default_factory=set)
    only_text: bool = False

    @property
    def notices(self) -> list[str]:
        """What the user should know of it."""
        name = f"lora '{self.name}'"
        if self.only_text:
            return [
                f"{name} only changes the text encoder, so it does nothing here: give it to a LoRA loader on the CLIP "
                "that encodes the concept's prompt"
            ]
        if not self.patches:
            return [f"{name} fits no layer of this model, so it does nothing: it was made for another one"]
        if self.obstacle:
            return [f"{name} takes a sampling call of its own for its rows: {self.obstacle}"]
        if self.idle:
            return [
                f"{name}: {len(self.idle)} of its {len(self.patches)} weights change nothing, since they have another "
                "size than the model's or hold zeros: see that it was made for this model"
            ]
        return []


def read_for(lora: Lora, key_map: Mapping[str, Any], weights: Collection[str], model: nn.Module) -> ModelLora:
    """What ComfyUI's loader would change.

    Args:
        lora: weights as in the file.
        key_map: of ComfyUI, names in files to names in the model.
        weights: names of the model's weights.
        model: ComfyUI's.
    """
    file = comfy.lora_convert.convert_lora(lora.weights)
    found = ModelLora(lora.name)
    for target, content in comfy.lora.load_lora(file, key_map, log_missing=False).items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        if key in weights:
            layer, _, weight = key.rpartition(".")
            found.patches.append(Patch(layer, weight, content, offset, function))
    if any(key.endswith(".dora_scale") for key in file):
        found.obstacle = "it is a DoRA, which depends on the model's weights"
    else:
        obstacles = (_obstacle(patch, model) for patch in found.patches)
        found.obstacle = next((obstacle for obstacle in obstacles if obstacle), None)
    found.only_text = not found.patches and all(key.startswith(_OF_TEXT) for key in file)
    return found


def _obstacle(patch: Patch, model: nn.Module) -> str | None:
    """Why a change cannot be given per row."""
    content = patch.content
    if isinstance(content, WeightAdapterBase):
        if content.name not in _PER_ROW:
            return f"{content.name.upper()} depends on the model's weights"
        if content.name == "lora" and content.weights[5] is not None:
            return "it makes layers of the model wider"
    elif not isinstance(content, tuple) or content[0] != "diff":
        return "it replaces weights of the model"
    if patch.weight not in ("weight", "bias") or _weight_shape(model.get_submodule(patch.layer)) is None:
        return f"{patch.layer} is neither a linear layer nor a convolution"
    return None


def _weight_shape(module: Any) -> tuple[int, ...] | None:
    """(out, in, *kernel) of a linear layer or a convolution, however its weight is stored; None for other modules."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return (module.out_features, module.in_features)
    if hasattr(module, "_conv_forward") and not module.transposed:
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return None


def part_of(module: Any, patches: Sequence[tuple[Patch, float, ModelLora]], dtype: torch.dtype) -> RowPart | None:
    """What the LoRAs of a stack add to one layer, or None where none fits."""
    shape = _weight_shape(module)
    assert shape is not None
    products: list[LowRank] = []
    given: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    made = []
    for patch, strength, lora in patches:
        if patch.offset is not None and sum(patch.offset[1:]) > shape[patch.offset[0]]:
            lora.idle.add(patch)
            continue
        product = _product(patch, strength, shape) if getattr(module, "groups", 1) == 1 else None
        if product is not None:
            products.append(product)
            continue
        difference = _difference(patch, strength, shape if patch.weight == "weight" else shape[:1])
        if not difference.any():
            lora.idle.add(patch)
        elif isinstance(patch.content, WeightAdapterBase) and patch.content.name != "lora":
            made.append((partial(_make, patch, strength), [t for t in patch.content.weights if isinstance(t, Tensor)]))
        else:
            given[patch.weight].append(difference)
    weight, bias = (sum(found[1:], found[0]) if found else None for found in given.values())
    if not products and weight is None and bias is None and not made:
        return None
    return RowPart(shape, products, weight, bias, made, dtype)


def _product(patch: Patch, strength: float, shape: Sequence[int]) -> LowRank | None:
    if patch.weight != "weight" or patch.function or getattr(patch.content, "name", None) != "lora":
        return None
    up, down, alpha, core = patch.content.weights[:4]
    scale = strength if alpha is None else strength * alpha / down.shape[0]
    return low_rank(up, down, core, scale, shape, patch.offset)


def _difference(patch: Patch, strength: float, shape: Sequence[int]) -> Tensor:
    """What ComfyUI would add to the weight, in full."""
    return _calculated(patch, patch.content, strength, torch.zeros(tuple(shape)))


def _make(patch: Patch, strength: float, tensors: Sequence[Tensor], whole: Tensor) -> Tensor:
    """The same from tensors that are where the model computes."""
    loaded = iter(tensors)
    weights = tuple(next(loaded) if isinstance(part, Tensor) else part for part in patch.content.weights)
    return _calculated(patch, type(patch.content)(patch.content.loaded_keys, weights), strength, whole)


def _calculated(patch: Patch, content: Any, strength: float, whole: Tensor) -> Tensor:
    change = (strength, content, 1.0, patch.offset, patch.function)
    key = f"{patch.layer}.{patch.weight}"
    return comfy.lora.calculate_weight([change], whole, key, intermediate_dtype=whole.dtype)
