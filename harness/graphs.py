"""The bundled workflows in API form, with the small models in place of the published ones."""

import copy
import json
from typing import Any

from harness import assets, workspace

Graph = dict[str, dict[str, Any]]

WORKFLOWS = workspace.ROOT / "workflows"

_Files = dict[tuple[str, str], str]
SMALL_FILES: _Files = {
    ("CheckpointLoaderSimple", "ckpt_name"): assets.SD15_CHECKPOINT,
    ("LoraLoaderModelOnly", "lora_name"): assets.SD15_LORA,
    ("CLIPVisionLoader", "clip_name"): assets.CLIP_VISION,
    ("LunaIPAdapterLoader", "ip_adapter_file"): assets.SD15_PLUS,
}
TRAINED_FILES: _Files = {
    ("CheckpointLoaderSimple", "ckpt_name"): assets.FACES_CHECKPOINT,
    ("CLIPVisionLoader", "clip_name"): assets.FACES_CLIP_VISION,
    ("LunaIPAdapterLoader", "ip_adapter_file"): assets.FACES_PLUS,
}
_SMALL_WORK = {
    "target_size": 256,
    "crop_size": 128,
    "tile_size": 128,
    "steps": 4,
    "cfg": 3.0,
    "sampler_name": "euler",
    "scheduler": "normal",
}


def workflow(name: str, picture: str = assets.PAINTED_ASTRONAUT, files: _Files = SMALL_FILES, **settings: Any) -> Graph:
    """A bundled workflow that this machine can run in seconds.

    Args:
        name: of the file in ``workflows/api`` without suffix.
        picture: file in ComfyUI's input folder for the workflow's Load Image.
        files: of the models, by class and input of what loads them.
        settings: inputs of Luna's nodes, wherever a node has one of that name, over small defaults.
    """
    graph: Graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        inputs = node["inputs"]
        for key in inputs:
            if (node["class_type"], key) in files:
                inputs[key] = files[node["class_type"], key].split("/", 1)[1]
        if node["class_type"] == "LoadImage":
            inputs["image"] = picture
        inputs.update({key: value for key, value in (_SMALL_WORK | settings).items() if key in inputs})
    return graph


def change(graph: Graph, class_type: str, **inputs: Any) -> Graph:
    """A copy in which every node of a class has other inputs; None removes one."""
    changed = copy.deepcopy(graph)
    for node in changed.values():
        if node["class_type"] == class_type:
            node["inputs"] = {key: value for key, value in (node["inputs"] | inputs).items() if value is not None}
    return changed


def node_id(graph: Graph, class_type: str) -> str:
    """The id of the only node of a class."""
    (found,) = (key for key, node in graph.items() if node["class_type"] == class_type)
    return found
