"""Schema inputs that more than one node has, so that they read the same everywhere."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..batching.color import COLOR_MATCHES
from ..batching.crop_plan import AUTO_SIZES, LARGER_AUTO_SIZES, MASK_MODES, OVERLAP_MODES
from ..batching.rows import ANCHOR_MODES
from .schema import IPAdapterType, LunaLayerWeightsType


def sampling(denoise: float) -> list[Any]:
    """The inputs every refiner shares: models, conditioning and a KSampler's settings."""
    return [
        io.Model.Input("model", tooltip="The model that refines. It is left unmodified."),
        io.Vae.Input("vae", tooltip="The model's VAE: crops are encoded afresh from px, never sliced from a latent."),
        io.Conditioning.Input("positive", tooltip="What the refined regions should show."),
        io.Conditioning.Input("negative", tooltip="What they should not show."),
        seed(
            "Seed of the run. Each region's noise depends on it and on the region's place in its own picture "
            "alone: a picture comes out the same by itself and in a batch."
        ),
        steps("Sampling steps."),
        io.Float.Input(
            "cfg",
            default=6.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Guidance: how strongly positive is followed. 1 skips the negative and halves the work.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=list(comfy.samplers.SAMPLER_NAMES),
            default="dpmpp_2m",
            tooltip="ComfyUI's sampler. Stochastic ones draw their noise per region.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(comfy.samplers.SCHEDULER_NAMES),
            default="karras",
            tooltip="How the noise levels are spread over the steps.",
        ),
        io.Float.Input(
            "denoise",
            default=denoise,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much is changed: 0 returns the picture as it is, 0.2 to 0.5 refines, 1 draws anew.",
        ),
    ]


def seed(tooltip: str) -> Any:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def steps(tooltip: str) -> Any:
    return io.Int.Input("steps", default=20, min=1, max=10000, tooltip=tooltip)


def chunk_size(tooltip: str) -> Any:
    return io.Int.Input("chunk_size", default=0, min=0, max=4096, tooltip=tooltip)


def lora_strength(tooltip: str) -> Any:
    return io.Float.Input("strength", default=1.0, min=-20.0, max=20.0, step=0.01, tooltip=tooltip)


def crop() -> list[Any]:
    """crop_size, padding, feather and mask_mode of crops around detections."""
    return [
        io.Int.Input(
            "crop_size",
            default=1024,
            min=0,
            max=4096,
            step=8,
            tooltip="Side in px at which each crop, a square or a strip where the picture is narrower, is "
            "refined; regions are scaled to it and back. "
            f"0 = automatic: {', '.join(map(str, AUTO_SIZES))}, one batch per size: small regions cost less, "
            f"and larger ones get up to {LARGER_AUTO_SIZES[-1]} where the model fits in memory with them.",
        ),
        io.Float.Input(
            "padding",
            default=0.15,
            min=0.0,
            max=8.0,
            step=0.01,
            tooltip="Context around each box, as a fraction of its longer side, on each side.",
        ),
        io.Int.Input(
            "feather",
            default=32,
            min=0,
            max=1024,
            tooltip="Width in px of the picture of the soft edge. It lies outside the mask as far as the crop "
            "has room, and never covers more than a quarter of a small region.",
        ),
        io.Combo.Input(
            "mask_mode",
            options=list(MASK_MODES),
            default="mask",
            tooltip="mask: paste what the detection's mask covers. box: paste its whole box.",
        ),
    ]


def overlap_mode(optional: bool) -> Any:
    return io.Combo.Input(
        "overlap_mode",
        options=list(OVERLAP_MODES),
        default="together",
        optional=optional,
        tooltip="together: one batch, overlapping results are blended. waves: overlapping regions run in "
        "later batches that already see the earlier results.",
    )


def tile(feather: str = "feather") -> list[Any]:
    """tile_size, min_overlap and the feather of the grid, a fraction; ``feather`` is its id."""
    return [
        io.Int.Input(
            "tile_size",
            default=1024,
            min=64,
            max=4096,
            step=8,
            tooltip="Side of a tile in px; tiles are refined at this size, so choose one the model was trained on.",
        ),
        io.Float.Input(
            "min_overlap",
            default=0.125,
            min=0.0,
            max=0.5,
            step=0.005,
            tooltip="Smallest overlap of neighbouring tiles, as a fraction of the tile. Tiles are spread evenly, so it "
            "is often more.",
        ),
        io.Float.Input(
            feather,
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of its half of the overlap over which each tile fades out. 0 = hard edges.",
        ),
    ]


def anchor(weight: float) -> list[Any]:
    """ip_adapter, clip_vision, weight, start and end; ``weight`` is the refiner's default."""
    return [
        IPAdapterType.Input(
            "ip_adapter",
            optional=True,
            tooltip="Anchors every region by its own picture. Without it the text alone guides all regions.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="The CLIP vision model the IP-Adapter was trained with (usually ViT-H).",
        ),
        io.Float.Input(
            "ip_adapter_weight",
            default=weight,
            min=-1.0,
            max=5.0,
            step=0.05,
            optional=True,
            tooltip="Strength of the anchor.",
        ),
        io.Float.Input(
            "ip_adapter_start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip="Where in the model's whole schedule the anchor begins to act, 0 = at full noise.",
        ),
        io.Float.Input(
            "ip_adapter_end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip="Where in the model's whole schedule the anchor stops, 1 = at no noise.",
        ),
        LunaLayerWeightsType.Input(
            "layer_weights",
            optional=True,
            tooltip="Strength over the depth of the model (Luna Layer Weights); without it the same everywhere.",
        ),
    ]


def anchor_mode() -> Any:
    return io.Combo.Input(
        "anchor_mode",
        options=list(ANCHOR_MODES),
        default="ip_adapter",
        optional=True,
        tooltip="What anchors each region. reference: its own latent as a reference latent, for models trained on "
        "these (Flux Kontext, Flux.2, Qwen-Image-Edit, OmniGen2, Z-Image Omni); needs no ip_adapter. both: both.",
    )


def style_model() -> Any:
    return io.StyleModel.Input(
        "style_model",
        optional=True,
        tooltip="Flux Redux: tokens of each region's own picture follow its text, as strong as ip_adapter_weight says "
        "(1 = ComfyUI's strength 1). clip_vision must be the SigLIP it was trained with.",
    )


def picture_text() -> list[Any]:
    """clip and prompt of text encoders that read pictures."""
    return [
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="For anchor_mode reference and both on models whose text reads the picture (Qwen-Image-Edit): "
            "prompt is encoded anew for each region, together with its picture, and takes the place of positive's "
            "text; no words and the picture take that of negative's.",
        ),
        io.String.Input(
            "prompt",
            default="",
            dynamic_prompts=True,
            optional=True,
            tooltip="The words of positive, used only with clip: a conditioning does not carry the words it was made "
            "of.",
        ),
    ]


def scaffold() -> Any:
    return io.Latent.Input(
        "noise_scaffold",
        optional=True,
        tooltip="Noise of the whole picture (Luna Noise Scaffold); each region takes the part at its own place. "
        "Without it each region has noise of its own.",
    )


def color_match() -> Any:
    return io.Combo.Input(
        "color_match",
        options=list(COLOR_MATCHES),
        default="none",
        optional=True,
        tooltip="Takes colours back to those of the input picture, measured inside the mask. mean_std: brightness and "
        "contrast of each channel. wavelet: all coarse colours, keeping only the refined detail.",
    )


def custom_sampling() -> list[Any]:
    """Optional guider, sampler and sigmas of ComfyUI's custom sampling, each replacing its part of a KSampler."""
    return [
        io.Guider.Input(
            "guider",
            optional=True,
            tooltip="Custom sampling: replaces model, positive, negative and cfg, for example by dual guidance.",
        ),
        io.Sampler.Input("sampler", optional=True, tooltip="Custom sampling: replaces sampler_name."),
        io.Sigmas.Input(
            "sigmas", optional=True, tooltip="Custom sampling: these noise levels replace scheduler, steps and denoise."
        ),
    ]
