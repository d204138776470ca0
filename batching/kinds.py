"""The kinds of things a conditioning carries, in one table: how each is cut to rows, and when rows can share a call.

The table names every field that ComfyUI's sampler and its models for still pictures read. Fields of other nodes pass
as they are, with a notice, unless they hold planes: those would show every row the whole picture, and are refused.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import LunaInputError
from .plan import Region
from .spatial import PictureGuidance


@dataclass(frozen=True)
class Batch:
    """The rows that a kind makes its values for.

    Attributes:
        regions: the rows.
        size: (height, width) of their latents.
        guidance: cuts what belongs to the whole picture.
        controls: ControlNets made so far; positive and negative share one, and ComfyUI tells so by identity.
    """

    regions: Sequence[Region]
    size: tuple[int, int]
    guidance: PictureGuidance
    controls: dict[int, Any] = field(default_factory=dict)


Fields = Mapping[str, Any]
"""The fields of one entry of a conditioning."""


class Kind(Protocol):
    """What rows ask of a field of a conditioning."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        """What must be equal for rows to share a call; ``batch`` holds one row."""
        ...

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        """The field for all rows of a batch, from the entry of each; None leaves the field out."""
        ...

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        """Raises LunaInputError where ``value`` cannot be cut to rows; ``name`` says whose it is."""
        ...


class Place:
    """Where an entry acts: drawn as one mask per row, beside this table."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return None

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        return None

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        if isinstance(value, Tensor):
            guidance.check_batch(value, name)
        elif isinstance(value, tuple) and len(value) != 4 + (value[0] == "percentage"):
            raise LunaInputError(f"{name} is {value}: Luna takes areas of still pictures, not of videos")


class Control:
    """A chain of ControlNets, whose hints are cut."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return id(fields[key])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        control = fields[0][key]
        if id(control) not in batch.controls:
            batch.controls[id(control)] = batch.guidance.control(control, batch.regions)
        return batch.controls[id(control)]

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        while value is not None:
            for hint in (value.cond_hint_original, *(getattr(value, "extra_concat_orig", None) or ())):
                if isinstance(hint, Tensor):
                    guidance.check_batch(hint, f"hint in {name}")
            value = value.previous_controlnet


class Boxes:
    """GLIGEN boxes: rows share a call when they see the same ones in the same places."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        cut = batch.guidance.boxes(fields[key], batch.regions[0], batch.size)
        return tuple((id(box[0]), *(round(side, 3) for side in box[1:])) for box in cut[2])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        boxes = batch.guidance.boxes(fields[0][key], batch.regions[0], batch.size)
        return boxes if boxes[2] else None

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        pass


class References:
    """Reference latents: those of this picture are cut, those of others stay whole."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return tuple(
            tuple(latent.shape[1:-2] if batch.guidance.is_this_picture(latent) else latent.shape[1:])
            for latent in fields[key]
        )

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        per_row = [own[key] for own in fields]
        return [batch.guidance.reference(latents, batch.regions, batch.size) for latents in zip(*per_row, strict=True)]

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        for latent in value:
            # HiDream-O1 takes pictures [B,H,W,3] here
            if not isinstance(latent, Tensor) or latent.ndim < 4 or latent.shape[-1] == 3:
                raise LunaInputError(
                    f"{name} are no latents, and Luna does not know how to cut them to its regions: "
                    "leave out the node that adds them"
                )
            guidance.check_batch(latent, name)


class Planes:
    """A picture, latent or mask of the whole picture that the model reads beside its own latent, px by px.

    Args:
        is_mask: values lie in 0..1.
    """

    def __init__(self, is_mask: bool = False) -> None:
        self._is_mask = is_mask

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return tuple(fields[key].shape[1:-2])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        given = [own[key] for own in fields]
        if self._is_mask:
            # models read a mask px by px, or scale it to the latent themselves
            return batch.guidance.planes(given, batch.regions, batch.regions[0].working_size).clamp(0, 1)
        return batch.guidance.planes(given, batch.regions, batch.size)

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        guidance.check_batch(value, name)


class PerText:
    """Tensors that hold something for each text, such as pooled outputs: [1 or B,...]."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return tuple(fields[key].shape[1:])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        return of_each_row([own[key] for own in fields], batch.regions)

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        check_texts(value, name, guidance.image_count)


class TokenMask:
    """Which tokens a text has [1 or B,T], or how tokens of text and picture see one another [1 or B,L,L].

    Some models add up the tokens of the whole batch, so rows share a call only where theirs are the same.
    """

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        mask = fields[key]
        if mask.ndim > 2:
            return tuple(mask.shape[1:])
        return tuple(mask[_place(mask, batch.regions[0])].tolist())

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        masks = [own[key] for own in fields]
        if masks[0].ndim < 3:
            return masks[0][_place(masks[0], batch.regions[0])][None]
        grid = fields[0].get("attention_mask_img_shape")
        if grid is None or all(batch.guidance.is_even(mask, grid) for mask in masks):
            return of_each_row(masks, batch.regions)
        return batch.guidance.attention(masks, grid, batch.regions)

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        check_texts(value, name, guidance.image_count)


class Alike:
    """The same for all rows of a call."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return identity(fields[key])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        return fields[0][key]

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        pass


def _table(*kinds: tuple[Kind, str]) -> Mapping[str, Kind]:
    return MappingProxyType({key: kind for kind, keys in kinds for key in keys.split()})


_ALIKE, _PER_TEXT = Alike(), PerText()

KINDS = _table(
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
        "pooled_output conditioning_llama3 conditioning_mt5xl conditioning_byt5small cross_attn_controlnet t5xxl_ids "
        "t5xxl_weights text_input_ids degrade_sigma",
    ),
    (
        _ALIKE,
        "strength mask_strength start_percent end_percent clip_start_percent clip_end_percent hooks default guidance "
        "width height crop_w crop_h target_width target_height aspect_ratio aesthetic_score control_apply_to_uncond "
        "prompt_type unclip_conditioning unclip_noise_augment_merge noise_augmentation attention_mask_img_shape "
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
    if isinstance(known, Place | Control | Boxes | References):
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


def identity(value: Any) -> Hashable:
    if isinstance(value, bool | int | float | str | None.__class__):
        return value
    return id(value)


def check_texts(value: Tensor, name: str, image_count: int) -> None:
    """Raises LunaInputError where ``value`` [1 or B,...] holds another number of texts than there are pictures."""
    if value.shape[0] not in (1, image_count):
        raise LunaInputError(
            f"{name} holds {value.shape[0]} texts, image holds {image_count} pictures: "
            "give one text for all, or one for each picture"
        )


def of_each_row(values: Sequence[Tensor], regions: Sequence[Region]) -> Tensor:
    """[N,...] from the [1 or B,...] of each row, or the [1,...] that all rows share."""
    first = values[0]
    if first.shape[0] == 1 and all(value is first for value in values):
        return first
    return torch.stack([value[_place(value, region)] for value, region in zip(values, regions, strict=True)])


def _place(batch: Tensor, region: Region) -> int:
    """Which of [1 or B,...] belongs to the row's picture."""
    return region.image_index if batch.shape[0] > 1 else 0
