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
                LunaSAM3.Input("sam3", tooltip="From the SAM3 Loader."),
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
            ],
            outputs=[
                detections_output(),
                io.Mask.Output("mask", display_name="mask", tooltip="All of it together, one mask for each picture."),
                io.Image.Output("preview", display_name="preview", tooltip="Drawn over the picture."),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, sam3: Any, concepts: str, threshold: float, max_detections: int, nms_iou: float = 0.7
    ) -> io.NodeOutput:
        from ..sam3_bridge.comfy_sam3 import detect

        check_image(image)
        wanted = parse_concepts(concepts)
        detections, notices = detect(sam3, image, wanted, threshold, max_detections, nms_iou)
        return io.NodeOutput(
            detections,
            union_masks(detections),
            draw_detections(image, detections),
            ui=notice(*notices) if notices else None,
        )


NODES = (LunaSAM3Loader, LunaSAM3Detect)
