"""What anchors rows: image embeddings, reference latents, both, or text only."""

from dataclasses import dataclass
from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..batching.comfy_anchor import Anchor
from ..batching.comfy_picture_text import reads_pictures
from ..batching.comfy_recipe import Recipe
from ..batching.comfy_reference import reads_references
from ..batching.comfy_style import Style, check_style, reads_style
from ..batching.rows import ANCHOR_MODES, AnchorMode
from ..errors import LunaInputError
from ..ip_adapter import LayerWeights
from ..ip_adapter.comfy_adapter import as_ip_adapter
from ..ip_adapter.comfy_encode import check_compatible
from ..ip_adapter.comfy_patch import layers_for, unanchored
from ..values import shown

_TEXT_ONLY = "regions are refined from text only, without anchors"
_HINT = "; if it was trained on reference latents, as Flux Kontext was, anchor_mode reference anchors them"


@dataclass(frozen=True)
class Strength:
    """How strongly pictures guide rows.

    Attributes:
        weight: of rows without one of their own.
        start, end: part of the schedule, 0..1.
        layers: over the depth of the model, and over the rows.
    """

    weight: float
    start: float
    end: float
    layers: LayerWeights


def choose_anchors(
    mode: AnchorMode,
    model: ModelPatcher,
    ip_adapter: Any,
    clip_vision: ClipVisionModel | None,
    strength: Strength,
    style: Style | None = None,
) -> tuple[Anchor | None, bool, list[str]]:
    """The IP-Adapter's anchor or None, whether rows get reference latents, and the reasons for what cannot act.

    A ``style`` anchors rows too, whatever the mode.

    Raises:
        LunaInputError: there is no such mode, the inputs contradict each other, or do not fit together.
    """
    if mode not in ANCHOR_MODES:
        raise LunaInputError(f"anchor_mode is {shown(mode)}: choose one of {', '.join(ANCHOR_MODES)}")
    able = reads_references(model)
    references = able and mode != "ip_adapter"
    anchor, reasons = None, []
    if mode == "reference":
        if ip_adapter is not None:
            reasons.append("ip_adapter does not act, because anchor_mode is reference")
    elif ip_adapter is not None or style is None:
        anchor, reason = _choose_anchor(model, ip_adapter, clip_vision, strength)
        reasons += [reason] if reason else []
    if mode != "ip_adapter" and not able:
        reasons.append(f"model reads no reference latents, which anchor_mode {mode} needs")
    if reasons and anchor is None:
        left = [name for name, acts in (("reference latents", references), ("style_model", style)) if acts]
        end = f"{' and '.join(left)} alone anchor{'' if references else 's'} the regions" if left else _TEXT_ONLY
        reasons[-1] += f": {end}{_HINT if able and not left else ''}"
    return anchor, references, reasons


def choose_words(clip: CLIP | None, prompt: str, references: bool, recipe: Recipe) -> tuple[dict[str, str], list[str]]:
    """The words to encode with the picture of each row's reference, by prompt, and why clip or prompt do not act.

    Raises:
        LunaInputError: there are no words, or a prompt has several parts, of which none can be told to have them.
    """
    if clip is None:
        return {}, ["prompt acts only with clip: the text of positive stays"] if prompt.strip() else []
    if not hasattr(clip, "tokenizer"):
        raise LunaInputError(f"clip is {shown(clip)}: connect the CLIP of the model's text encoder")
    if not references:
        return {}, ["clip does not act, because regions have no reference latents: the prompts keep their text"]
    if not reads_pictures(clip):
        return {}, ["clip does not act, because its tokenizer reads no pictures: the prompts keep their text"]
    if not prompt.strip():
        raise LunaInputError(
            "clip is connected but prompt is empty: write the words of positive into prompt, since a conditioning does "
            "not carry them, or disconnect clip"
        )
    words = {name: said for name, said in (("positive", prompt), ("negative", "")) if name in recipe.conditioning}
    for name in words:
        parts = len(recipe.conditioning[name])
        if parts != 1:
            raise LunaInputError(
                f"{name} holds {parts} prompts, but with clip one text takes its place: connect a single one, or "
                "disconnect clip"
            )
    return words, []


def _choose_anchor(
    model: ModelPatcher,
    ip_adapter: Any,
    clip_vision: ClipVisionModel | None,
    strength: Strength,
) -> tuple[Anchor | None, str | None]:
    """The IP-Adapter's anchor, or None with the reason why it cannot act.

    Raises:
        LunaInputError: the inputs contradict each other, or adapter, encoder and model do not fit together.
    """
    if ip_adapter is None:
        return None, "ip_adapter is not connected"
    if clip_vision is None:
        raise LunaInputError(
            "ip_adapter is connected but clip_vision is not: connect Load CLIP Vision with the encoder "
            "the adapter was trained with (usually ViT-H), or disconnect ip_adapter"
        )
    if strength.start > strength.end:
        raise LunaInputError(
            f"ip_adapter_start is {strength.start} and ip_adapter_end {strength.end}: the end must not come first"
        )
    adapter = as_ip_adapter(ip_adapter)
    if reason := unanchored(model, adapter):
        return None, reason
    check_compatible(model, adapter, clip_vision)
    strength.layers.resolve(layers_for(model, adapter))
    return Anchor(adapter, clip_vision, strength.weight, strength.start, strength.end, strength.layers), None


def choose_style(
    model: ModelPatcher,
    style_model: Any,
    clip_vision: ClipVisionModel | None,
    strength: Strength,
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
    warnings = []
    if (strength.start, strength.end) != (0, 1) or not strength.layers.is_even:
        warnings.append(
            "style_model acts in the whole model and at every step: ip_adapter_start, ip_adapter_end and the depth in "
            "layer_weights do not change it"
        )
    return Style(style_model, clip_vision, strength.weight, strength.layers), warnings
