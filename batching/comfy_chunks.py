"""How much fits: rows of a sampling call by ComfyUI's own estimates, and pictures on the GPU beside them."""

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import torch
from torch import Tensor

from .rows import Conditioning

MOST_ROWS = 32
"""Of one call: more gain nothing, cancelling takes longer, and tensors of 2^31 numbers fail."""


PICTURES_HELD = 4
"""Canvas, input, mask, and what cutting and pasting take beside them."""

DEVICE_SHARE = 1 / 16
"""Of a GPU's memory that pictures may take from models and rows."""


MAIN_MEMORY = torch.device("cpu")


def rows_that_fit(
    model: Any, latent_shape: Sequence[int], conditioning: Conditioning | None = None, more_per_row: int = 0
) -> int:
    """How many rows one sampling call can hold; from 1 to ``MOST_ROWS``.

    The measure is the one ComfyUI's sampler uses before each model call: the estimate for the rows (it can run cond
    and uncond one after the other), times 1.5, must be free.

    Args:
        model: ModelPatcher.
        latent_shape: shape of one latent, without the batch.
        conditioning: of one row, whose ControlNets and reference latents take room too.
        more_per_row: bytes of what ComfyUI does not count.
    """
    conditioning = conditioning or {}
    device = model.load_device
    room = comfy.model_management.get_free_memory(device) - comfy.model_management.extra_reserved_memory()
    others, beside = comfy.sampler_helpers.get_additional_models({"": _fields(conditioning)}, model.model_dtype())
    to_load = 0
    if not comfy.model_management.is_device_cpu(device):
        # What models hold there, this one's own part too, ComfyUI takes back where a call needs it.
        room += sum(
            loaded.model_loaded_memory()
            for loaded in comfy.model_management.current_loaded_models
            if loaded.device == device and loaded.model is not None
        )
        to_load = sum(part.model_size() for part in {model, *others})
    per_row = row_bytes(model, latent_shape, conditioning) + more_per_row
    return rows_in(int(room), to_load, int(beside), per_row)


def rows_in(room: int, to_load: int, beside: int, per_row: int) -> int:
    """Rows from 1 to ``MOST_ROWS`` that fit in ``room``; all in bytes.

    Args:
        room: what is free, or held by weights.
        to_load: weights that should lie there too.
        beside: what ControlNets take to work, whatever the number of rows.
        per_row: what each row takes.
    """
    left = room - to_load - beside
    if left < per_row:
        # Weights are streamed for every call: more rows share the way, so half of the room is theirs.
        left = room // 2 - beside
    return max(1, min(MOST_ROWS, left // max(1, per_row)))


def row_bytes(model: Any, latent_shape: Sequence[int], conditioning: Conditioning | None = None) -> int:
    """ComfyUI's estimate of what one row takes while sampling, with the reserve its sampler keeps."""
    shapes: dict[str, list[Any]] = {}
    for fields in _fields(conditioning or {}):
        for name, shape in model.model.extra_conds_shapes(**fields).items():
            if name not in shapes or math.prod(shape) > math.prod(shapes[name][0]):
                shapes[name] = [shape]
    return int(1.5 * model.model.memory_required([1, *latent_shape], cond_shapes=shapes))


def _fields(conditioning: Conditioning) -> list[dict[str, Any]]:
    return [fields for conds in conditioning.values() for _, fields in conds]


def working_device(model: Any, image: Tensor) -> torch.device:
    """Where pictures are cut, decoded and pasted: on the model's GPU where the picture takes little of its memory.

    The whole memory counts, not what is free just now: the same inputs must be worked on alike in every run.

    Args:
        model: ModelPatcher.
        image: [B,H,W,C].
    """
    device: torch.device = model.load_device
    if device.type != "cuda":
        return MAIN_MEMORY
    needed = PICTURES_HELD * image.numel() * 4
    return device if needed <= DEVICE_SHARE * comfy.model_management.get_total_memory(device) else MAIN_MEMORY
