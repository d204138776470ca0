"""SEGS of the Impact Pack and its relatives, in and out."""

from typing import Any

from comfy_api.latest import io

from ..picture.detections import Detections
from ..sam3_bridge.segs import from_segs, to_segs
from .detections import CATEGORY, detections_output, node_output
from .schema import LunaDetections, luna_schema, notice

Segs = io.Custom("SEGS")


class LunaDetectionsFromSEGS(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsFromSEGS",
            display_name="Detections from SEGS (Luna)",
            category=CATEGORY,
            description="Makes detections of SEGS, as the Impact Pack's detectors give them.",
            search_aliases=["impact pack", "segs to detections", "ultralytics", "bbox detector"],
            inputs=[Segs.Input("segs", tooltip="SEGS of one picture. What they carry is kept for the way back.")],
            outputs=[detections_output()],
        )

    @classmethod
    def execute(cls, segs: Any) -> io.NodeOutput:
        return node_output(*from_segs(segs))


class LunaDetectionsToSEGS(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaDetectionsToSEGS",
            display_name="Detections to SEGS (Luna)",
            category=CATEGORY,
            description="Makes SEGS of the detections of one picture, for the Impact Pack's nodes.",
            search_aliases=["impact pack", "detections to segs", "sam3 segs"],
            inputs=[
                LunaDetections.Input(
                    "detections", tooltip="Detections that came from SEGS go back as they were, with all they carried."
                ),
                io.Int.Input(
                    "image_index",
                    default=0,
                    min=0,
                    max=4095,
                    tooltip="Which picture of the batch, counted from 0: SEGS know only one picture.",
                ),
                io.Float.Input(
                    "crop_factor",
                    default=3.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Side of a new segment's crop region as a multiple of its box.",
                ),
            ],
            outputs=[Segs.Output("segs", display_name="segs", tooltip="For nodes that take SEGS.")],
        )

    @classmethod
    def execute(cls, detections: Detections, image_index: int, crop_factor: float) -> io.NodeOutput:
        segs = to_segs(detections, image_index, crop_factor)
        return io.NodeOutput(segs, ui=None if segs[1] else notice(f"no detection on picture {image_index}: empty SEGS"))


NODES = (LunaDetectionsFromSEGS, LunaDetectionsToSEGS)
