"""IP-Adapter files, embeddings and the patch for samplers outside this pack."""

from typing import Any

import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..errors import LunaInputError
from ..ip_adapter import LayerWeights, RowEmbeds
from ..ip_adapter.anchors import SCALINGS, Scaling
from ..ip_adapter.comfy_adapter import IPAdapter, as_ip_adapter, load_ip_adapter
from ..ip_adapter.comfy_encode import check_clip_vision, check_compatible, encode_rows
from ..ip_adapter.comfy_patch import layers_for, patch_model, unanchored
from ..ip_adapter.layer_weights import LAYER_PRESETS, parse_layer_weights, parse_numbers
from ..sam3_bridge.from_masks import mask_batch
from .checks import check_image
from .folders import IP_ADAPTER_FOLDER
from .schema import IPAdapterType, LunaEmbeds, LunaLayerWeightsType, luna_schema, notice

CATEGORY = "Luna/IP-Adapter"
NO_FILE = "none"


class LunaIPAdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaIPAdapterLoader",
            display_name="IP-Adapter Loader (Luna)",
            category=CATEGORY,
            description="Loads an IP-Adapter: plain, plus, plus-face, full-face or composition for SD1.5 or SDXL, "
            "plus for Kolors, XLabs or InstantX for Flux.",
            search_aliases=["ipadapter", "ip adapter model", "load ipadapter"],
            inputs=[
                io.Combo.Input(
                    "ip_adapter_file",
                    options=folder_paths.get_filename_list(IP_ADAPTER_FOLDER),
                    tooltip="A file in models/ipadapter: .safetensors, or .bin read without running its code.",
                ),
                io.Combo.Input(
                    "pooling_file",
                    options=[NO_FILE, *folder_paths.get_filename_list("clip_vision")],
                    default=NO_FILE,
                    optional=True,
                    tooltip="Only for InstantX adapters of Flux: the SigLIP file that clip_vision is loaded from, "
                    "whose pooling head the adapter reads.",
                ),
            ],
            outputs=[IPAdapterType.Output("ip_adapter", display_name="ip_adapter", tooltip="For the refiners.")],
        )

    @classmethod
    def execute(cls, ip_adapter_file: str, pooling_file: str = NO_FILE) -> io.NodeOutput:
        path = _full_path(IP_ADAPTER_FOLDER, "ip_adapter_file", ip_adapter_file)
        pooling = None if pooling_file == NO_FILE else _full_path("clip_vision", "pooling_file", pooling_file)
        return io.NodeOutput(load_ip_adapter(path, pooling))


def _full_path(folder: str, name: str, file: str) -> str:
    path = folder_paths.get_full_path(folder, file)
    if path is None:
        raise LunaInputError(f"{name} '{file}' is not in models/{folder}: put it there and press R")
    return path


class LunaIPAdapterEmbeds(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaIPAdapterEmbeds",
            display_name="IP-Adapter Embeds (Luna)",
            category=CATEGORY,
            description="Encodes one image embed per picture, in their order, to be used again without encoding.",
            search_aliases=["ipadapter encode", "image embeds"],
            inputs=[
                IPAdapterType.Input("ip_adapter", tooltip="The adapter that will use the embeds."),
                io.ClipVision.Input("clip_vision", tooltip="The CLIP vision model the adapter was trained with."),
                io.Image.Input("images", tooltip="One picture per row; each is centre-cropped to a square."),
            ],
            outputs=[LunaEmbeds.Output("embeds", display_name="embeds", tooltip="For Apply IP-Adapter.")],
        )

    @classmethod
    def execute(cls, ip_adapter: Any, clip_vision: ClipVisionModel, images: Tensor) -> io.NodeOutput:
        adapter = as_ip_adapter(ip_adapter)
        check_clip_vision(adapter, clip_vision)
        check_image(images, "images")
        return io.NodeOutput(encode_rows(adapter, clip_vision, images))


class LunaApplyIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaApplyIPAdapter",
            display_name="Apply IP-Adapter per Row (Luna)",
            category=CATEGORY,
            description="Anchors latent i of a batch by image i, for a KSampler or any other sampler. "
            "The latent batch must hold as many latents as there are images.",
            search_aliases=["ipadapter apply", "ipadapter batch", "unfold batch"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SDXL or Flux model. It is left unmodified."),
                IPAdapterType.Input("ip_adapter", tooltip="An adapter of the model's family."),
                io.Float.Input("weight", default=0.5, min=-1.0, max=5.0, step=0.05, tooltip="Strength of the images."),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=1.0, step=0.001, tooltip="Share of the schedule to begin at."
                ),
                io.Float.Input(
                    "end", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="Share of the schedule to stop at."
                ),
                io.Combo.Input(
                    "scaling",
                    options=list(SCALINGS),
                    default=SCALINGS[0],
                    tooltip="What the weight multiplies: the image's part (V only), or its keys and values.",
                ),
                io.String.Input(
                    "row_weights",
                    default="",
                    tooltip="A factor per image, for example 1, 0.5, 0.8. Empty: 1 for all.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="Encodes images; not needed with embeds."),
                io.Image.Input("images", optional=True, tooltip="Image i anchors latent i; not needed with embeds."),
                LunaEmbeds.Input("embeds", optional=True, tooltip="Embeds of IP-Adapter Embeds instead of images."),
                LunaLayerWeightsType.Input("layer_weights", optional=True, tooltip="Weights over the model's depth."),
                io.Mask.Input(
                    "attn_mask",
                    optional=True,
                    tooltip="Where in its picture each row is anchored: one mask for all rows, or one per row.",
                ),
            ],
            outputs=[io.Model.Output("patched_model", display_name="model", tooltip="The model with anchors.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        ip_adapter: Any,
        weight: float,
        start: float,
        end: float,
        scaling: Scaling,
        row_weights: str,
        clip_vision: ClipVisionModel | None = None,
        images: Tensor | None = None,
        embeds: RowEmbeds | None = None,
        layer_weights: LayerWeights | None = None,
        attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        if start > end:
            raise LunaInputError(f"start is {start} and end {end}: the end must not come first")
        adapter = as_ip_adapter(ip_adapter)
        if reason := unanchored(model, adapter):
            return io.NodeOutput(model, ui=notice(f"{reason}. It is unchanged"))
        layers_for(model, adapter)
        rows = _row_embeds(model, adapter, clip_vision, images, embeds)
        patched = patch_model(
            model,
            adapter,
            rows,
            weight=weight
            * _row_weights(row_weights, len(rows))
            * (layer_weights or LayerWeights()).row_factors(len(rows)),
            start_percent=start,
            end_percent=end,
            layer_weights=layer_weights,
            scaling=scaling,
            row_masks=_row_masks(attn_mask, len(rows)),
        )
        return io.NodeOutput(patched)


def _row_embeds(
    model: ModelPatcher,
    adapter: IPAdapter,
    clip_vision: ClipVisionModel | None,
    images: Tensor | None,
    embeds: RowEmbeds | None,
) -> RowEmbeds:
    if embeds is not None:
        if images is not None:
            raise LunaInputError("both images and embeds are given: disconnect one of them")
        if embeds.cond.shape[2] != adapter.layout.cross_dim:
            raise LunaInputError(
                f"embeds are {embeds.cond.shape[2]} wide, ip_adapter '{adapter.name}' has {adapter.layout.cross_dim}: "
                "make them with this adapter"
            )
        if embeds.projection not in (None, adapter.projection):
            raise LunaInputError(
                f"embeds were made with another adapter than ip_adapter '{adapter.name}', whose attention does not "
                "read them: connect this adapter to IP-Adapter Embeds"
            )
        return embeds
    if images is None or clip_vision is None:
        raise LunaInputError("connect images and clip_vision, or embeds: there is nothing to anchor rows by")
    check_image(images, "images")
    check_compatible(model, adapter, clip_vision)
    return encode_rows(adapter, clip_vision, images)


def _row_weights(text: str, count: int) -> Tensor:
    weights = parse_numbers(text, "row_weights")
    if weights and len(weights) != count:
        raise LunaInputError(f"row_weights holds {len(weights)} numbers for {count} images: give one for each")
    return torch.tensor(weights) if weights else torch.ones(count)


def _row_masks(mask: Tensor | None, count: int) -> Tensor | None:
    if mask is None:
        return None
    masks = mask_batch(mask, "attn_mask")
    if len(masks) not in (1, count):
        raise LunaInputError(f"attn_mask holds {len(masks)} masks for {count} images: give one, or one for each")
    return masks.expand(count, -1, -1).clamp(0, 1)


class LunaLayerWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaLayerWeights",
            display_name="Layer Weights (Luna)",
            category=CATEGORY,
            description="How strongly each block of the model is anchored: a named preset, and single blocks by text. "
            "Also how the anchor changes from tile to tile.",
            search_aliases=["ipadapter weight type", "style transfer", "composition", "mad scientist"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(LAYER_PRESETS),
                    default="linear",
                    tooltip="linear: the same everywhere. style transfer, composition: only the blocks that carry it. "
                    "none: only the blocks of the text.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    multiline=True,
                    tooltip="block:weight pairs that replace the preset's weight, for example 3:0.5, output.4:1.2, "
                    "middle:0. A number counts the blocks with attention in the order they run.",
                ),
                io.String.Input(
                    "row_curve",
                    default="",
                    optional=True,
                    tooltip="Factors from a picture's first tile or region to its last, spread evenly: with 1, 0.3 the "
                    "anchor fades on the way. Empty: 1 for all.",
                ),
            ],
            outputs=[
                LunaLayerWeightsType.Output("layer_weights", display_name="layer_weights", tooltip="For the refiners.")
            ],
        )

    @classmethod
    def execute(cls, preset: str, blocks: str, row_curve: str = "") -> io.NodeOutput:
        return io.NodeOutput(LayerWeights(preset, parse_layer_weights(blocks), parse_numbers(row_curve, "row_curve")))


NODES = (LunaIPAdapterLoader, LunaIPAdapterEmbeds, LunaApplyIPAdapter, LunaLayerWeights)
