"""Prompts and settings by the label of a detection."""

from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..batching.concepts import Concept, Lora
from ..errors import LunaInputError
from . import inputs
from .checks import check_image
from .row_lora import TEXT_HALF, load_lora
from .schema import LunaConcepts, LunaLoras, luna_schema

_NO_LORA = "none"
_KEEP = -1.0
"""Keeps the refiner's setting. Weights of a concept end above it, so that none is taken for it."""


class LunaConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaConcept",
            display_name="Concept (Luna)",
            category="Luna/Refine",
            description="Gives detections of one label their own prompt, anchor strength, denoise, LoRA or reference "
            "picture. Chain several; the first that matches a detection counts.",
            search_aliases=["prompt per detection", "per label prompt", "wildcard detailer", "concept stack"],
            inputs=[
                io.String.Input(
                    "match",
                    default="face",
                    tooltip="Labels this is for, separated by commas; * and ? are wildcards, * alone matches all.",
                ),
                io.Float.Input(
                    "ip_adapter_weight",
                    default=_KEEP,
                    min=-1.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Strength of the anchor for these detections. -1 keeps the refiner's, so that weights of "
                    "its own lie above -1, such as -0.95.",
                ),
                io.Float.Input(
                    "denoise",
                    default=_KEEP,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Denoise of these detections; -1 keeps the refiner's. Each value is a call of its own.",
                ),
                io.Combo.Input(
                    "lora",
                    options=[_NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=_NO_LORA,
                    tooltip=f"A LoRA for these detections only. {TEXT_HALF}",
                ),
                inputs.lora_strength("Strength of the LoRA."),
                io.Conditioning.Input("positive", optional=True, tooltip="Prompt instead of the refiner's positive."),
                io.Conditioning.Input("negative", optional=True, tooltip="Prompt instead of the refiner's negative."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Reference picture that anchors these detections instead of their own crop.",
                ),
                LunaConcepts.Input("concepts", optional=True, tooltip="Concepts before this one; they match first."),
                LunaLoras.Input(
                    "loras",
                    optional=True,
                    tooltip="More LoRAs for these detections (Luna Row LoRA), beside the concept's own.",
                ),
            ],
            outputs=[LunaConcepts.Output("stack", display_name="concepts", tooltip="For the Semantic Detailer.")],
        )

    @classmethod
    def execute(
        cls,
        match: str,
        ip_adapter_weight: float,
        denoise: float,
        lora: str,
        strength: float,
        positive: list[Any] | None = None,
        negative: list[Any] | None = None,
        image: Tensor | None = None,
        concepts: tuple[Concept, ...] = (),
        loras: tuple[Lora, ...] = (),
    ) -> io.NodeOutput:
        if image is not None:
            check_image(image)
            if len(image) != 1:
                raise LunaInputError(f"image holds {len(image)} pictures: a concept takes one reference picture")
        concept = Concept(
            match,
            positive,
            negative,
            None if ip_adapter_weight <= _KEEP else ip_adapter_weight,
            None if denoise < 0 else denoise,
            (*(() if lora == _NO_LORA else load_lora(lora, strength)), *loras),
            image,
        )
        return io.NodeOutput((*concepts, concept))


NODES = (LunaConcept,)
