"""What all node files share: socket types, a schema that fits every supported ComfyUI, notices on the node."""

import dataclasses
import logging
from typing import Any

from comfy_api.latest import io

from ..texts import inert, readable

log = logging.getLogger("luna")

LunaDetections = io.Custom("LUNA_DETECTIONS")
LunaConcepts = io.Custom("LUNA_CONCEPTS")
LunaLoras = io.Custom("LUNA_LORAS")
LunaLayerWeightsType = io.Custom("LUNA_LAYER_WEIGHTS")
LunaSAM3 = io.Custom("LUNA_SAM3")
LunaEmbeds = io.Custom("LUNA_EMBEDS")
IPAdapterType = io.Custom("IPADAPTER")

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def luna_schema(*, search_aliases: list[str] | None = None, **fields: Any) -> io.Schema:
    """An ``io.Schema``; ``search_aliases`` is passed on only where the running ComfyUI knows the field."""
    if search_aliases and "search_aliases" in _SCHEMA_FIELDS:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)


def notice(*lines: str) -> dict[str, tuple[str, ...]]:
    """Shows ``lines`` on the node that is running and logs them as warnings.

    Lines quote labels and patterns, which come from anywhere: in the log they stay on their line, on the node they
    are no HTML.

    Returns the node's ``ui`` dict, so that the same text stands in the queue's history for API clients.
    Without a server (a node called from Python) only the log and the returned dict carry it.
    """
    shown = tuple(map(readable, lines))
    for line in shown:
        log.warning("%s", line)
    _show_on_node("\n".join(map(inert, shown)))
    return {"text": shown}


def _show_on_node(text: str) -> None:
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    if context is None:  # and maybe no server either, nor what it needs
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, context.node_id)
