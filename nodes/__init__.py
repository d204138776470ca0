"""ComfyUI's face of the pack: schemas, input checks and calls into the core."""

from comfy_api.latest import io

from .folders import register_folders

register_folders()

from . import chess, detailer, detections, ip_adapter, plan, upscale  # noqa: E402 (the loaders list these folders)

NODES: tuple[type[io.ComfyNode], ...] = (
    *detailer.NODES,
    *chess.NODES,
    *plan.NODES,
    *upscale.NODES,
    *detections.NODES,
    *ip_adapter.NODES,
)
