"""Whether prompts are of the model's family: told before ComfyUI's sampler fails on a shape or a missing key."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LunaInputError
from ..ip_adapter.layers import attention_layers
from .concepts import Concept
from .rows import Conditioning

_ADVICE = "encode it with the CLIP that belongs to this model"
_TEXT_LAYERS = ("txt_in", "context_embedder")
"""Linear layers by which models that are no UNet read text: Flux, SD3, Qwen-Image."""
_BEFORE_ATTENTION = "encoder_hid_proj"
"""Linear layer by which Kolors' UNet narrows its text."""


def check_prompts(model: Any, conditioning: Conditioning, concepts: Sequence[Concept] = ()) -> None:
    """Checks every prompt that rows may be sampled with.

    Args:
        model: ComfyUI MODEL.
        conditioning: of the guider, by its names.
        concepts: whose own prompts replace those named positive and negative.

    Raises:
        LunaInputError: a prompt was encoded for another family of models: naming it and what it lacks.
    """
    width = text_width(model)
    for name, text, fields in _prompts(conditioning, concepts):
        if isinstance(text, Tensor) and width is not None and text.shape[-1] != width:
            raise LunaInputError(
                f"{name} holds text {text.shape[-1]} wide, model reads text {width} wide: it was encoded for another "
                f"family of models; {_ADVICE}"
            )
        _check_vector(model.model, name, fields)


def _prompts(
    conditioning: Conditioning, concepts: Sequence[Concept]
) -> Iterator[tuple[str, Tensor | None, dict[str, Any]]]:
    named = list(conditioning.items())
    for concept in concepts:
        for kind, conds in (("positive", concept.positive), ("negative", concept.negative)):
            named.append((f"{kind} of concept '{concept.match}'", conds or []))
    for name, conds in named:
        for text, fields in conds:
            yield name, text, fields


def text_width(model: Any) -> int | None:
    """How wide a text the model reads; None where it does not say."""
    network = model.get_model_object("diffusion_model")
    narrows = getattr(getattr(network, _BEFORE_ATTENTION, None), "in_features", None)
    if isinstance(narrows, int):
        return narrows
    widths = {layer.context_dim for layer in attention_layers(network)}
    for name in _TEXT_LAYERS:
        width = getattr(getattr(network, name, None), "in_features", None)
        widths |= {width} if isinstance(width, int) else set()
    return widths.pop() if len(widths) == 1 else None


def _check_vector(base_model: Any, name: str, fields: dict[str, Any]) -> None:
    """The prompt as one vector, which SDXL, SD3 and Flux read beside the text, made as ComfyUI will make it."""
    if "unclip_conditioning" in fields:
        return  # pictures take its place, and turning them into a vector needs the model
    kind = "negative" if name.startswith("negative") else "positive"
    latent = torch.zeros(1, base_model.latent_format.latent_channels, 8, 8)
    try:
        vector = base_model.encode_adm(**(fields | {"noise": latent, "device": latent.device, "prompt_type": kind}))
    except KeyError as error:
        raise LunaInputError(
            f"{name} lacks {error.args[0]}, which model needs: it was encoded for another family of models; {_ADVICE}"
        ) from error
    wanted = base_model.adm_channels
    if isinstance(vector, Tensor) and wanted and vector.shape[-1] != wanted:
        raise LunaInputError(
            f"{name} makes a vector {vector.shape[-1]} wide, model reads one {wanted} wide: its pooled_output is of "
            f"another family of models; {_ADVICE}"
        )
