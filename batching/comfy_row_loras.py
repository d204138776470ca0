"""LoRAs of single rows on ComfyUI, in one sampling call; its loader merges those that cannot be given per row.

LoRA and LoCon, LoHa and LoKr, and differences of weights and biases are given per row. What depends on the model's
weights or replaces them (DoRA, GLoRA, OFT, BOFT, set weights), or changes anything but linear layers and convolutions,
takes a sampling call of its own.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import comfy.lora
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..errors import LunaInputError, LunaRuntimeError
from .comfy_injection import inject_parts, levels_of
from .comfy_lora_parts import ModelLora, Patch, part_of, read_for
from .concepts import Lora
from .lora_parts import RowPart
from .row_loras import RowPlaces

LoraStack = tuple[Lora, ...]
StackKey = tuple[tuple[int, float], ...]
"""Weights (by identity) and strengths of a stack that acts."""


class RowLoras:
    """The LoRAs of a run, whose weights are loaded once, and models on which they act per row or merged.

    Args:
        model: ModelPatcher, or any clone of the one that will be sampled; not modified.
        stacks: every stack of the run. A row's LoRAs are added up, whatever their order.

    Raises:
        LunaInputError: a LoRA is damaged.
    """

    def __init__(self, model: Any, stacks: Iterable[LoraStack]) -> None:
        self._stacks = {_key(stack): stack for stack in stacks if _key(stack)}
        self._loras = self._read(model.model)
        self._numbers = {key: number for number, key in enumerate(self._per_row())}
        self._places: dict[str, dict[int, int]] = {}
        self._factors = self._load(model)
        self._levels = levels_of(model.model) if self._numbers else {}
        self._merged: dict[tuple[int, StackKey], tuple[Any, Any]] = {}
        self.notices = [line for lora in self._loras.values() for line in lora.notices]

    def needs_own_call(self, stack: LoraStack) -> bool:
        """Whether rows with this stack cannot share a call with others: sample them on ``merged``."""
        return _key(stack) != () and self._known(stack) not in self._numbers

    def patched(self, model: Any, stacks: Sequence[LoraStack]) -> Any:
        """A clone of the model for one sampling call whose row i has ``stacks[i]``; without any, the model itself.

        Raises:
            LunaRuntimeError: a stack needs a call of its own.
        """
        if any(map(self.needs_own_call, stacks)):
            raise LunaRuntimeError("loras of concepts: rows that need a call of their own were given to one for many")
        rows = RowPlaces([self._numbers[self._known(stack)] if _key(stack) else None for stack in stacks])
        if not any(map(_key, stacks)):
            return model
        layers = {
            path: at_work
            for path, parts in self._places.items()
            if (at_work := {number: place for number, place in parts.items() if number in rows.stacks})
        }
        return inject_parts(model, self._factors, layers, rows, self._levels)

    def merged(self, model: Any, stack: LoraStack) -> Any:
        """A clone of the model with the LoRAs of a stack merged one after the other; the same one each time."""
        key = (id(model), _key(stack))
        if key not in self._merged:
            clone = model
            for lora in stack:
                clone = comfy.sd.load_lora_for_models(clone, None, lora.weights, lora.strength, 0)[0]
            self._merged[key] = (model, clone)  # the model too, so that no other takes its id
        return self._merged[key][1]

    def _read(self, model: Any) -> dict[int, ModelLora]:
        """By the identity of their weights; a run without LoRAs does not go through the model's weights."""
        loras = {id(lora.weights): lora for stack in self._stacks.values() for lora in stack}
        if not loras:
            return {}
        weights, key_map = model.state_dict().keys(), comfy.lora.model_lora_keys_unet(model, {})
        return {key: read_for(lora, key_map, weights, model) for key, lora in loras.items()}

    def _known(self, stack: LoraStack) -> StackKey:
        key = _key(stack)
        if key not in self._stacks:
            raise LunaRuntimeError("loras of concepts: a stack was not among those of the run")
        return key

    def _per_row(self) -> list[StackKey]:
        return [
            key
            for key, stack in self._stacks.items()
            if not any(self._loras[id(lora.weights)].obstacle for lora in stack)
        ]

    def _load(self, model: Any) -> Any:
        """A ModelPatcher around the parts of all layers, in the order that ``_places`` tells."""
        parts: list[RowPart] = []
        dtype = _compute_dtype(model.model)
        for key, number in self._numbers.items():
            layers: dict[str, list[tuple[Patch, float, ModelLora]]] = {}
            for lora in self._stacks[key]:
                found = self._loras[id(lora.weights)]
                for patch in found.patches if lora.strength else ():
                    layers.setdefault(patch.layer, []).append((patch, lora.strength, found))
            for path, patches in layers.items():
                part = _checked_part(model.model.get_submodule(path), path, patches, dtype)
                if part is not None:
                    self._places.setdefault(path, {})[number] = len(parts)
                    parts.append(part)
        return _as_model(nn.ModuleList(parts), model.load_device, model.offload_device)


def _key(stack: LoraStack) -> StackKey:
    return tuple((id(lora.weights), lora.strength) for lora in stack if lora.strength)


def _checked_part(
    module: Any, path: str, patches: Sequence[tuple[Patch, float, ModelLora]], dtype: torch.dtype
) -> RowPart | None:
    try:
        return part_of(module, patches, dtype)
    except (RuntimeError, IndexError) as error:
        # torch's own arithmetic on weights that do not fit each other: its reason is passed on
        names = " or ".join(sorted({f"'{lora.name}'" for _, _, lora in patches}))
        raise LunaInputError(
            f"lora {names} has weights for {path} that do not fit each other, the file is damaged: download it again "
            f"({error})"
        ) from error


def _as_model(parts: nn.ModuleList, load_device: torch.device, offload_device: torch.device) -> Any:
    """In a ModelPatcher, so that ComfyUI loads and unloads it like any model."""
    patcher = ModelPatcher(parts, load_device, offload_device)
    if hasattr(patcher, "cached_patcher_init"):  # how newer ComfyUI makes the copies for further GPUs
        patcher.cached_patcher_init = (lambda: _as_model(copy.deepcopy(parts), load_device, offload_device), ())
    return patcher


def _compute_dtype(model: Any) -> torch.dtype:
    """In which the model computes: weights in eight bits are cast before use."""
    dtype = model.manual_cast_dtype or model.get_dtype()
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
