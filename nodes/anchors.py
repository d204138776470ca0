"""The choice between anchored rows and text only."""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher

from ..batching.comfy_anchor import Anchor
from ..errors import LunaInputError
from ..ip_adapter import LayerWeights
from ..ip_adapter.comfy_adapter import as_ip_adapter
from ..ip_adapter.comfy_encode import check_compatible
from ..ip_adapter.comfy_patch import layers_for, unanchored


def choose_anchor(
    model: ModelPatcher,
    ip_adapter: Any,
    clip_vision: ClipVisionModel | None,
    weight: float,
    start_percent: float,
    end_percent: float,
    layer_weights: LayerWeights | None,
) -> tuple[Anchor | None, list[str]]:
    """The anchor to use, or None with the reasons why rows go by text only.

    Raises:
        LunaInputError: the inputs contradict each other, or adapter, encoder and model do not fit together.
    """
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
    adapter = as_ip_adapter(ip_adapter)
    if reason := unanchored(model, adapter):
        return None, [f"{reason}. Rows go by text only, without anchors"]
    check_compatible(model, adapter, clip_vision)
    layer_weights = layer_weights or LayerWeights()
    layer_weights.resolve(layers_for(model, adapter))
    return Anchor(adapter, clip_vision, weight, start_percent, end_percent, layer_weights), []
