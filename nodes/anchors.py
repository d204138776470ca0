"""The choice between anchored rows and text only."""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher

from ..batching.comfy_anchor import Anchor
from ..batching.comfy_style import Style, check_style, reads_style
from ..errors import LunaInputError
from ..ip_adapter import LayerWeights
from ..ip_adapter.comfy_adapter import as_ip_adapter
from ..ip_adapter.comfy_encode import check_compatible
from ..ip_adapter.comfy_patch import layers_for, model_supports_anchoring


def choose_anchor(
    model: ModelPatcher,
    ip_adapter: Any,
    clip_vision: ClipVisionModel | None,
    weight: float,
    start_percent: float,
    end_percent: float,
    layer_weights: LayerWeights | None,
    style: Style | None = None,
) -> tuple[Anchor | None, list[str]]:
    """The anchor to use, or None with the reasons why rows go by text only; a ``style`` anchors them too.

    Raises:
        LunaInputError: the inputs contradict each other, or adapter, encoder and model do not fit together.
    """
    if ip_adapter is None and style is not None:
        return None, []
    if ip_adapter is None:
        return None, ["ip_adapter is not connected: regions are refined from text only, without anchors"]
    if clip_vision is None:
        raise LunaInputError(
            "ip_adapter is connected but clip_vision is not: connect Load CLIP Vision with the encoder "
            "the adapter was trained with (usually ViT-H), or disconnect ip_adapter"
        )
    if start_percent > end_percent:
        raise LunaInputError(
            f"ip_adapter_start is {start_percent} and ip_adapter_end {end_percent}: the end must not come first"
        )
    if not model_supports_anchoring(model):
        left = "text only, without anchors" if style is None else "style_model alone anchors the regions"
        return None, [f"model has no UNet cross-attention, so ip_adapter cannot act on it: {left}"]
    adapter = as_ip_adapter(ip_adapter)
    check_compatible(model, adapter, clip_vision)
    layer_weights = layer_weights or LayerWeights()
    layer_weights.resolve(layers_for(model, adapter))
    return Anchor(adapter, clip_vision, weight, start_percent, end_percent, layer_weights), []


def choose_style(
    model: ModelPatcher,
    style_model: Any,
    clip_vision: ClipVisionModel | None,
    weight: float,
    start_percent: float,
    end_percent: float,
    layer_weights: LayerWeights | None,
) -> tuple[Style | None, list[str]]:
    """How pictures guide rows through their text, or None, with what the user should know.

    Raises:
        LunaInputError: clip_vision is missing, or model, style model and encoder do not fit together.
    """
    if style_model is None:
        return None, []
    if not reads_style(model):
        return None, ["model is no Flux, so style_model cannot act on it: rows get no tokens of their pictures"]
    if clip_vision is None:
        raise LunaInputError(
            "style_model is connected but clip_vision is not: connect Load CLIP Vision with the encoder the style "
            "model was trained with (sigclip_vision_patch14_384), or disconnect style_model"
        )
    check_style(model, style_model, clip_vision)
    layer_weights = layer_weights or LayerWeights()
    warnings = []
    if (start_percent, end_percent) != (0, 1) or not layer_weights.is_even:
        warnings.append(
            "style_model acts in the whole model and at every step: ip_adapter_start, ip_adapter_end and the depth in "
            "layer_weights do not change it"
        )
    return Style(style_model, clip_vision, weight, layer_weights), warnings
