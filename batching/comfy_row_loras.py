"""LoRAs of rows on ComfyUI."""

from collections.abc import Iterable, Sequence
from typing import Any

import comfy.sd

from .concepts import Lora

LoraStack = tuple[Lora, ...]


class RowLoras:
    """Stand-in until rows carry LoRAs."""

    def __init__(self, model: Any, stacks: Iterable[LoraStack]) -> None:
        self.notices: list[str] = []

    def needs_own_call(self, stack: LoraStack) -> bool:
        return bool(stack)

    def patched(self, model: Any, stacks: Sequence[LoraStack]) -> Any:
        return model

    def merged(self, model: Any, stack: LoraStack) -> Any:
        for lora in stack:
            model = comfy.sd.load_lora_for_models(model, None, lora.weights, lora.strength, 0)[0]
        return model
