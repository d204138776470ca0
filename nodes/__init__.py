"""ComfyUI's face of the pack: schemas, input checks and calls into the core."""

from comfy_api.latest import io

from .folders import register_folders

register_folders()

from . import (  # noqa: E402 (the loaders list these folders)
    chess,
    concepts,
    detailer,
    detection_tools,
    detections,
    ip_adapter,
    plan,
    row_lora,
    sam3,
    segs,
    upscale,
)

NODES: tuple[type[io.ComfyNode], ...] = (
    *detailer.NODES,
    *concepts.NODES,
    *row_lora.NODES,
    *chess.NODES,
    *plan.NODES,
    *upscale.NODES,
    *detections.NODES,
    *sam3.NODES,
    *segs.NODES,
    *detection_tools.NODES,
    *ip_adapter.NODES,
)
