"""ComfyUI's face of the pack: schemas, input checks and calls into the core."""

from comfy_api.latest import io

NODES: tuple[type[io.ComfyNode], ...] = ()
