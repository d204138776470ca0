"""What a conditioning carries, field by field, and the kind of each.

The table names every field that ComfyUI's sampler and its models for still pictures read. Fields of other nodes pass
as they are, with a notice, unless they hold planes: those would show every row the whole picture, and are refused.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import LunaInputError
from .kinds import (
    Boxes,
    Control,
    Kind,
    NoiseAugmentation,
    PerText,
    Place,
    Planes,
    References,
    Text,
    TextIds,
    TokenMask,
)

TEXT = "cross_attn"
"""ComfyUI's name for an entry's text among its fields."""


def _table(*kinds: tuple[Kind, str]) -> Mapping[str, Kind]:
    return MappingProxyType({key: kind for kind, keys in kinds for key in keys.split()})


_ALIKE, _PER_TEXT = Kind(), PerText()

KINDS = _table(
    (Text(), TEXT),
    (NoiseAugmentation(), "noise_augmentation"),
    (Place(), "area mask set_area_to_bounds"),
    (Control(), "control"),
    (Boxes(), "gligen"),
    (References(), "reference_latents"),
    # concat_latent_image: inpaint, edit and control models; concat_image: SD x4 upscaler; stable_cascade_prior: its
    # stage B; lq_latent: PiD; noise_concat: any model
    (Planes(), "concat_latent_image concat_image noise_concat stable_cascade_prior lq_latent"),
    (Planes(is_mask=True), "concat_mask"),
    (TokenMask(), "attention_mask attention_mask_mt5xl"),
    (
        _PER_TEXT,
        "pooled_output conditioning_llama3 conditioning_mt5xl conditioning_byt5small cross_attn_controlnet "
        "text_input_ids degrade_sigma",
    ),
    (TextIds(), "t5xxl_ids t5xxl_weights"),
    (
        _ALIKE,
        "strength mask_strength start_percent end_percent clip_start_percent clip_end_percent hooks default guidance "
        "width height crop_w crop_h target_width target_height aspect_ratio aesthetic_score control_apply_to_uncond "
        "prompt_type unclip_conditioning unclip_noise_augment_merge attention_mask_img_shape "
        "reference_latents_method reference_latents_text_embeds clip_vision_output clip_vision_outputs seed "
        "concat_mask_index uuid model_conds guiding_frame_index ref_latents_method",
    ),
)
"""What is known of each field that holds something; a field that holds None or a number is the same for all rows."""


def kind_of(key: str, value: Any) -> Kind:
    """How a field is cut to rows.

    Raises:
        LunaInputError: nothing is known of the field, and it holds planes.
    """
    known = KINDS.get(key)
    if value is None:
        return _ALIKE
    if known is not None and known.any_value:
        return known
    if not isinstance(value, Tensor) or value.ndim == 0:
        if known is None and any(isinstance(v, Tensor) and v.ndim > 3 for v in _members(value)):
            raise _unknown_planes(key)
        return _ALIKE
    if known is None and value.ndim > 3:
        raise _unknown_planes(key)
    return _PER_TEXT if known is None or known is _ALIKE else known


def _members(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _unknown_planes(key: str) -> LunaInputError:
    return LunaInputError(
        f"a conditioning carries '{key}', a picture or video that Luna does not know how to cut to its regions: "
        "leave out the node that adds it"
    )
