"""The IP-Adapter inputs the refiners share, and the choice between anchored rows and text only."""

from typing import Any

from comfy_api.latest import io

from ..batching.comfy_engine import Anchor
from ..errors import LunaInputError
from ..ip_adapter import LayerWeights
from ..ip_adapter.comfy_adapter import as_ip_adapter
from ..ip_adapter.comfy_encode import check_compatible
from ..ip_adapter.comfy_patch import layers_for, model_supports_anchoring
from .schema import IPAdapterType, LunaLayerWeightsType


def anchor_inputs(weight: float) -> list[Any]:
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


def choose_anchor(
    model: Any,
    ip_adapter: Any,
    clip_vision: Any,
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
    if not model_supports_anchoring(model):
        return None, ["model has no UNet cross-attention, so ip_adapter cannot act on it: text only, without anchors"]
    adapter = as_ip_adapter(ip_adapter)
    check_compatible(model, adapter, clip_vision)
    if layer_weights is not None:
        layer_weights.resolve(layers_for(model, adapter))
    return Anchor(adapter, clip_vision, weight, start_percent, end_percent, layer_weights), []
