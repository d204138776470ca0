"""SAM3: what to refine, said in words."""

from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..errors import LunaInputError
from ..picture.drawing import draw_detections
from ..picture.masks import union_masks
from ..sam3_bridge.concepts import parse_concepts
from ..sam3_bridge.sam3_files import find_model, list_models
from .checks import check_image
from .detections import CATEGORY, detections_output
from .folders import SAM3_FOLDER
from .schema import LunaSAM3, luna_schema, notice

USUAL_NAME = "sam3"
"""Offered where there is no model yet, so that running the node tells how to get one."""


class LunaSAM3Loader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaSAM3Loader",
            display_name="SAM3 Loader (Luna)",
            category=CATEGORY,
            description="Loads SAM3, which finds things by words. Its help page says how to get the weights.",
            search_aliases=["segment anything", "sam 3", "load sam3"],
            inputs=[
                io.Combo.Input(
                    "sam3_model",
                    options=list_models(folder_paths.get_folder_paths(SAM3_FOLDER)) or [USUAL_NAME],
                    tooltip="A folder in models/sam3 as it was downloaded (config.json, model.safetensors, processor "
                    "and tokenizer files), or a loose .safetensors file of the published weights.",
                )
            ],
            outputs=[LunaSAM3.Output("sam3", display_name="sam3", tooltip="For SAM3 Detect.")],
        )

    @classmethod
    def validate_inputs(cls, sam3_model: str) -> bool | str:
        """Stands in for ComfyUI's "not in list", which does not say how to get the weights."""
        try:
            find_model(sam3_model, folder_paths.get_folder_paths(SAM3_FOLDER))
        except LunaInputError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, sam3_model: str) -> io.NodeOutput:
        from ..sam3_bridge.comfy_sam3 import load_sam3

        return io.NodeOutput(load_sam3(find_model(sam3_model, folder_paths.get_folder_paths(SAM3_FOLDER))))


class LunaSAM3Detect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaSAM3Detect",
            display_name="SAM3 Detect (Luna)",
            category=CATEGORY,
            description="Finds everything that fits the words, with a mask, a box and a score for each.",
            search_aliases=["segment anything", "text to mask", "grounding", "find faces", "sam 3"],
            inputs=[
                io.Image.Input("image", tooltip="The picture or batch of pictures; each is looked at once."),
                LunaSAM3.Input(
                    "sam3",
                    optional=True,
                    tooltip="From the SAM3 Loader (Luna). Leave it empty where model and clip are connected.",
                ),
                io.String.Input(
                    "concepts",
                    default="face, hand",
                    multiline=True,
                    tooltip="What to look for, with commas or one per line. face:9 finds at most nine, the best first; "
                    "-glove cuts gloves out of everything else.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Scores up to this are left out. Lower finds more.",
                ),
                io.Int.Input(
                    "max_detections",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="At most so many in each picture, the highest scores. 0: all.",
                ),
                io.Float.Input(
                    "nms_iou",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Of two masks that cover the same place by more than this share, also of different "
                    "concepts, the lower score goes. 1: keep both.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Instead of sam3: MODEL of a SAM3 or SAM3.1 checkpoint, together with its clip. "
                    "Needs ComfyUI 0.20 or newer.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="CLIP of the SAM3 checkpoint that model comes from."),
            ],
            outputs=[
                detections_output(),
                io.Mask.Output("mask", display_name="mask", tooltip="All of it together, one mask for each picture."),
                io.Image.Output("preview", display_name="preview", tooltip="Drawn over the picture."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        sam3: Any = None,
        concepts: str = "",
        threshold: float = 0.5,
        max_detections: int = 0,
        nms_iou: float = 0.7,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        from ..sam3_bridge.comfy_core_sam3 import detect_core
        from ..sam3_bridge.comfy_sam3 import detect

        _check_source(sam3, model, clip)
        check_image(image)
        settings = (image, parse_concepts(concepts), threshold, max_detections, nms_iou)
        detections, notices = detect(sam3, *settings) if model is None else detect_core(model, clip, *settings)
        return io.NodeOutput(
            detections,
            union_masks(detections),
            draw_detections(image, detections),
            ui=notice(*notices) if notices else None,
        )


def _check_source(sam3: Any, model: Any, clip: Any) -> None:
    """Raises LunaInputError unless there is one SAM3: ``sam3``, or ``model`` together with ``clip``."""
    choice = "connect either a SAM3 Loader (Luna) to sam3, or MODEL and CLIP of a SAM3 checkpoint to model and clip"
    if sam3 is not None and not (model is None and clip is None):
        raise LunaInputError(f"sam3 is connected and so is {'clip' if model is None else 'model'}: {choice}")
    if sam3 is None and model is None and clip is None:
        raise LunaInputError(f"neither sam3 nor model and clip are connected: {choice}")
    if sam3 is None and (model is None or clip is None):
        given, missing = ("clip", "model") if model is None else ("model", "clip")
        raise LunaInputError(f"{given} is connected without {missing}: {choice}")


NODES = (LunaSAM3Loader, LunaSAM3Detect)
