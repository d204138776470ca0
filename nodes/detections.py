"""Detections from masks and from boxes."""

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..errors import LunaInputError
from ..picture.detections import Detections
from ..sam3_bridge.from_boxes import from_boxes
from ..sam3_bridge.from_masks import MASK_THRESHOLD, Picture, from_masks
from ..sam3_bridge.read_boxes import BOX_FORMATS, BoxFormat, parse_boxes, read_label, with_scores
from ..values import text
from .checks import check_image
from .schema import LunaDetections, luna_schema, notice

CATEGORY = "Luna/Detections"


def picture_of(image: Tensor) -> Picture:
    """Size and number of a checked picture batch [B,H,W,C]."""
    check_image(image)
    count, height, width, _ = image.shape
    return Picture(width, height, count)


def detections_output(tooltip: str = "What was found, for the Semantic Detailer.") -> Any:
    return LunaDetections.Output("found", display_name="detections", tooltip=tooltip)


def node_output(detections: Detections, notices: tuple[str, ...]) -> io.NodeOutput:
    """The detections, with notices shown on the node."""
    return io.NodeOutput(detections, ui=notice(*notices) if notices else None)


class LunaDetectionsFromMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsFromMasks",
            display_name="Detections from Masks (Luna)",
            category=CATEGORY,
            description="Makes one detection of every mask, or of every connected area of it.",
            search_aliases=["mask to segs", "mask islands", "masks to regions"],
            inputs=[
                io.Mask.Input("masks", tooltip="One or many masks of the picture; another size of its aspect is fine."),
                io.Image.Input("image", tooltip="The picture the masks belong to: tells the size and the batch."),
                io.String.Input("label", default="", tooltip="A name for these detections, to filter and to match."),
                io.Boolean.Input(
                    "split_islands",
                    default=False,
                    tooltip="Every connected area of a mask becomes its own detection, each its own row of the batch.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=MASK_THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Values above it count as mask. Fainter ones are kept as the soft edge around it, and are "
                    "background elsewhere. Raise it for heat maps.",
                ),
            ],
            outputs=[detections_output()],
        )

    @classmethod
    def execute(
        cls,
        masks: Tensor,
        image: Tensor,
        label: str,
        split_islands: bool,
        mask_threshold: float = MASK_THRESHOLD,
    ) -> io.NodeOutput:
        return node_output(
            *from_masks(masks, picture_of(image), read_label(label, "label"), split_islands, mask_threshold)
        )


class LunaDetectionsFromBoxes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsFromBoxes",
            display_name="Detections from Boxes (Luna)",
            category=CATEGORY,
            description="Makes detections of boxes: those of ComfyUI's own detector nodes with their masks, "
            "x1 y1 x2 y2 arrays, or JSON text.",
            search_aliases=["bbox", "bounding box", "boxes to segs", "yolo", "ultralytics", "sam3 boxes"],
            inputs=[
                io.Image.Input("image", tooltip="The picture the boxes belong to; boxes are in its px."),
                io.String.Input("label", default="", tooltip="A name for boxes that bring none."),
                io.String.Input(
                    "boxes_json",
                    default="",
                    multiline=True,
                    tooltip="Boxes as JSON text in px: [[x1, y1, x2, y2], …], one list for all pictures or one for "
                    'each, or {"boxes": …, "scores": …, "labels": …}. Leave empty when bboxes is connected.',
                ),
                io.Custom("BOUNDING_BOX,BBOX").Input(
                    "bboxes",
                    optional=True,
                    tooltip="Boxes as ComfyUI's detector nodes give them, or rows of numbers from other packs.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per box in the same order, or one per picture. Without boxes they are the "
                    "detections, as SAM3 gives them for points.",
                ),
                io.String.Input(
                    "scores_json",
                    default="",
                    optional=True,
                    tooltip="Scores as JSON text, one per box, from nodes that give them apart: [0.93, 0.71]. "
                    "Empty: those the boxes bring.",
                ),
                io.Combo.Input(
                    "box_format",
                    options=list(BOX_FORMATS),
                    default=BOX_FORMATS[0],
                    optional=True,
                    tooltip="What four bare numbers of a box are. Boxes that name their numbers do not need it.",
                ),
            ],
            outputs=[detections_output()],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        label: str,
        boxes_json: str,
        bboxes: Any = None,
        masks: Tensor | None = None,
        scores_json: str = "",
        box_format: BoxFormat = BOX_FORMATS[0],
    ) -> io.NodeOutput:
        picture = picture_of(image)
        boxes_json, scores_json = text(boxes_json, "boxes_json"), text(scores_json, "scores_json")
        if bboxes is not None and boxes_json.strip():
            raise LunaInputError("both bboxes and boxes_json are given: clear the text, or disconnect bboxes")
        if bboxes is None and not boxes_json.strip():
            raise LunaInputError("neither bboxes nor boxes_json is given: connect boxes, or write them as JSON")
        given, name = (boxes_json, "boxes_json") if bboxes is None else (bboxes, "bboxes")
        boxes = parse_boxes(given, picture.image_count, name, box_format)
        if scores_json.strip():
            boxes = with_scores(boxes, scores_json)
        return node_output(*from_boxes(boxes, picture, masks, read_label(label, "label"), name))


NODES = (LunaDetectionsFromMasks, LunaDetectionsFromBoxes)
