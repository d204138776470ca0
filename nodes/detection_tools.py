"""What is done with detections once they are found: filter, combine, turn into masks, look at them."""

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..errors import LunaInputError
from ..picture.detections import Detections
from ..picture.drawing import draw_detections
from ..picture.masks import single_masks, union_masks
from ..sam3_bridge.select import KEEPS, ORDERS, Keep, Order, Selection, combine, parse_labels, select
from .checks import check_image, fitted
from .detections import CATEGORY, detections_output
from .schema import LunaDetections, luna_schema, notice

COMBINED = 6
"""Sockets of Combine; more are reached by chaining."""

MOST_BYTES = 16 * 2**30
"""Of masks, one for each detection."""

PER_PICTURE, PER_DETECTION = "one per picture", "one per detection"


class LunaDetectionsFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsFilter",
            display_name="Filter Detections (Luna)",
            category=CATEGORY,
            description="Keeps the detections that matter: by label, score, size and overlap, the best of each kind, "
            "in the order you want.",
            search_aliases=["segs filter", "largest face", "nms", "sort detections", "limit detections"],
            inputs=[
                LunaDetections.Input("detections", tooltip="What was found."),
                io.String.Input(
                    "labels",
                    default="",
                    tooltip="Labels to keep, with a minus to leave out: face, *eye*, -hand. Empty: all.",
                ),
                io.Float.Input(
                    "min_score", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Lower scores are left out."
                ),
                io.Float.Input(
                    "min_size",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    tooltip="Smallest box, as a fraction of the picture's area: 0.01 is a tenth of each side.",
                ),
                io.Float.Input(
                    "max_size",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    tooltip="Largest box, as a fraction of the picture's area.",
                ),
                io.Combo.Input(
                    "keep",
                    options=list(KEEPS),
                    default="all",
                    tooltip="all, or one of each label in each picture: the largest, the best (highest score) or the "
                    "most central.",
                ),
                io.Int.Input(
                    "max_count",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="At most so many in each picture, the first in the chosen order. 0: all.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default="as found",
                    tooltip="The order in each picture; it becomes the order of the rows. score and area: highest "
                    "first.",
                ),
                io.Float.Input(
                    "nms_iou",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Of two that cover the same place by more than this share, the lower score goes. Masks "
                    "count where there are any. 1: keep both.",
                ),
            ],
            outputs=[detections_output("What was kept.")],
        )

    @classmethod
    def execute(
        cls,
        detections: Detections,
        labels: str,
        min_score: float,
        min_size: float,
        max_size: float,
        keep: Keep,
        max_count: int,
        order: Order,
        nms_iou: float,
    ) -> io.NodeOutput:
        selection = Selection(
            parse_labels(labels), min_score, min_size, max_size, nms_iou, keep=keep, order=order, max_count=max_count
        )
        kept = select(detections, selection)
        if len(detections) == 0 or len(kept) > 0:
            return io.NodeOutput(kept)
        found = ", ".join(sorted({item.label or "(no label)" for item in detections}))
        return io.NodeOutput(kept, ui=notice(f"none of {len(detections)} detections passed; labels: {found}"))


class LunaDetectionsCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsCombine",
            display_name="Combine Detections (Luna)",
            category=CATEGORY,
            description="Puts detections of the same pictures together, one input after the other.",
            search_aliases=["segs concat", "merge detections", "concat detections"],
            inputs=[
                LunaDetections.Input(
                    f"detections_{number}",
                    optional=number > 1,
                    tooltip="Detections of the same pictures; another size of their aspect is fine.",
                )
                for number in range(1, COMBINED + 1)
            ],
            outputs=[detections_output("All of them, at the size of detections_1.")],
        )

    @classmethod
    def execute(
        cls,
        detections_1: Detections,
        detections_2: Detections | None = None,
        detections_3: Detections | None = None,
        detections_4: Detections | None = None,
        detections_5: Detections | None = None,
        detections_6: Detections | None = None,
    ) -> io.NodeOutput:
        others = (detections_2, detections_3, detections_4, detections_5, detections_6)
        return io.NodeOutput(combine({1: detections_1, **_connected(others)}))


def _connected(others: tuple[Detections | None, ...]) -> dict[int, Detections]:
    return {number: part for number, part in enumerate(others, start=2) if part is not None}


class LunaDetectionsToMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsToMask",
            display_name="Detections to Mask (Luna)",
            category=CATEGORY,
            description="Draws detections as masks: one for each picture, or one for each detection.",
            search_aliases=["segs to mask", "combine masks", "union mask"],
            inputs=[
                LunaDetections.Input("detections", tooltip="What was found. Those without a mask count as their box."),
                io.Combo.Input(
                    "masks",
                    options=[PER_PICTURE, PER_DETECTION],
                    default=PER_PICTURE,
                    tooltip="one per picture: all detections together. one per detection: a batch in their order; at "
                    "4096 px every mask takes 64 MiB.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="Draw the masks at this picture's size instead of the detector's."
                ),
            ],
            outputs=[io.Mask.Output("mask", display_name="mask", tooltip="1 where something was found.")],
        )

    @classmethod
    def execute(cls, detections: Detections, masks: str, image: Tensor | None = None) -> io.NodeOutput:
        if image is not None:
            check_image(image)
            detections = fitted(detections, image)
        if len(detections) == 0:
            empty = torch.zeros(detections.image_count, detections.height or 64, detections.width or 64)
            return io.NodeOutput(empty, ui=notice("detections are empty: the mask is black"))
        if masks == PER_PICTURE:
            return io.NodeOutput(union_masks(detections))
        needed = 4 * len(detections) * detections.width * detections.height
        if needed > MOST_BYTES:
            raise LunaInputError(
                f"{len(detections)} masks of {detections.width}x{detections.height} px would take "
                f"{needed / 2**30:.1f} GiB: filter the detections first, or connect a smaller image"
            )
        return io.NodeOutput(single_masks(detections))


class LunaDetectionsPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsPreview",
            display_name="Preview Detections (Luna)",
            category=CATEGORY,
            description="Shows what was found: masks and boxes in colour, row numbers, labels and scores.",
            search_aliases=["segs preview", "draw boxes", "show detections", "draw masks"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, at any size of the detections' aspect."),
                LunaDetections.Input("detections", tooltip="What was found."),
            ],
            outputs=[io.Image.Output("preview", display_name="preview", tooltip="The drawing, at the picture's size.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image: Tensor, detections: Detections) -> io.NodeOutput:
        check_image(image)
        drawn = draw_detections(image, fitted(detections, image))
        return io.NodeOutput(drawn, ui=ui.PreviewImage(drawn))


NODES = (LunaDetectionsFilter, LunaDetectionsCombine, LunaDetectionsToMask, LunaDetectionsPreview)
