"""The kinds of things a conditioning carries: how each is cut to rows, and when rows can share a call.

A new kind is one class here, and the fields of that kind one line of the table in ``fields.py``.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LunaInputError
from .plan import Region
from .spatial import PictureGuidance

LONGEST_REPEAT = 4
"""Texts are repeated to a common length up to this factor, as ComfyUI's sampler does; beyond it rows are grouped."""


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


class Kind:
    """A field that is the same for all rows of a call; other kinds say what differs.

    Attributes:
        any_value: reads whatever the field holds; others read tensors, and numbers are the same for all rows.
        everywhere: what an entry without the field means too, so that rows with and without it share a call.
    """

    any_value = False
    everywhere = False

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        """What must be equal for rows to share a call; ``batch`` holds one row."""
        return _identity(fields[key])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        """The field for all rows of a batch, from the entry of each; None leaves the field out."""
        return fields[0][key]

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        """Raises LunaInputError where ``value`` cannot be cut to rows; ``name`` says whose it is."""


class PerText(Kind):
    """Tensors that hold something for each text, such as pooled outputs: [1 or B,...]."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return tuple(fields[key].shape[1:])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        return _of_each_row([own[key] for own in fields], batch.regions)

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        if value.shape[0] not in (1, guidance.image_count):
            raise LunaInputError(
                f"{name} holds {value.shape[0]} texts, image holds {guidance.image_count} pictures: "
                "give one text for all, or one for each picture"
            )


class Text(PerText):
    """The prompt's tokens [1 or B,T,D]; shorter ones are repeated to a common length, which attention does not see."""

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        """Multiples of CLIP's 77 tokens can be brought to one length, up to ``LONGEST_REPEAT`` times as long."""
        text = fields[key]
        if text.ndim != 3:
            return tuple(text.shape[1:])
        tokens, width = text.shape[1:]
        return ("chunks" if tokens % 77 == 0 and tokens // 77 <= LONGEST_REPEAT else tokens, width)

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        texts = [own[key] for own in fields]
        if texts[0].ndim == 3:
            length = math.lcm(*(text.shape[1] for text in texts))
            repeated = {id(text): text.repeat(1, length // text.shape[1], 1) for text in texts}
            texts = [repeated[id(text)] for text in texts]
        return _of_each_row(texts, batch.regions)


class TextIds(Kind):
    """Numbers of the tokens of a text [T], from which the model itself makes the text for the whole call (Anima).

    Rows share a call only where they share the text.
    """

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        return tuple(fields[key].flatten().tolist()), id(fields.get("cross_attn"))


class NoiseAugmentation(Kind):
    """How far a model noises the picture it is given: it draws for the whole batch, so each row is sampled alone."""

    any_value = True

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        draws = bool(fields[key]) and ("concat_image" in fields or "concat_latent_image" in fields)
        return _identity(fields[key]), batch.regions[0].row if draws else None


class Place(Kind):
    """Where an entry acts: drawn as one mask per row by ``conditioning.py``."""

    any_value = everywhere = True

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        return None

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        if isinstance(value, Tensor):
            guidance.check_batch(value, name)
        elif isinstance(value, tuple) and len(value) != 4 + (value[0] == "percentage"):
            raise LunaInputError(f"{name} is {value}: Luna takes areas of still pictures, not of videos")


class Control(Kind):
    """A chain of ControlNets, whose hints are cut."""

    any_value = True

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


class Boxes(Kind):
    """GLIGEN boxes: rows share a call when they see the same ones in the same places."""

    any_value = True

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        cut = batch.guidance.boxes(fields[key], batch.regions[0], batch.size)
        return tuple((id(box[0]), *(round(side, 3) for side in box[1:])) for box in cut[2])

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        boxes = batch.guidance.boxes(fields[0][key], batch.regions[0], batch.size)
        return boxes if boxes[2] else None


class References(Kind):
    """Reference latents: those of this picture are cut, those of others stay whole."""

    any_value = True

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
            _check_frames(latent, name)


class Planes(Kind):
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
            masks = batch.guidance.planes(given, batch.regions, batch.regions[0].working_size).clamp(0, 1)
            return masks.unsqueeze(2) if batch.guidance.has_frames and masks.ndim == 4 else masks
        return batch.guidance.planes(given, batch.regions, batch.size)

    def check(self, value: Any, name: str, guidance: PictureGuidance) -> None:
        guidance.check_batch(value, name)
        _check_frames(value, name)


class TokenMask(PerText):
    """Which tokens a text has [1 or B,T], or how tokens of text and picture see one another [1 or B,L,L].

    Some models add up the tokens of the whole batch, so rows share a call only where theirs are the same.
    """

    def in_common(self, key: str, fields: Fields, batch: Batch) -> Hashable:
        mask = fields[key]
        if mask.ndim > 2:
            return tuple(mask.shape[1:])
        return tuple(batch.regions[0].of_picture(mask).tolist())

    def for_rows(self, key: str, fields: Sequence[Fields], batch: Batch) -> Any:
        masks = [own[key] for own in fields]
        if masks[0].ndim < 3:
            return batch.regions[0].of_picture(masks[0])[None]
        grid = fields[0].get("attention_mask_img_shape")
        if grid is None or all(batch.guidance.is_even(mask, grid) for mask in masks):
            return _of_each_row(masks, batch.regions)
        return batch.guidance.attention(masks, grid, batch.regions)


def _check_frames(planes: Tensor, name: str) -> None:
    """Raises LunaInputError where planes [B,c,T,h,w] are those of a video: of more than one frame."""
    if planes.ndim == 5 and planes.shape[2] != 1:
        raise LunaInputError(
            f"{name} holds a video of {planes.shape[2]} latent frames: Luna refines still pictures, give one of a "
            "single frame, or leave out the node that adds it"
        )


def _identity(value: Any) -> Hashable:
    if isinstance(value, bool | int | float | str | None.__class__):
        return value
    return id(value)


def _of_each_row(values: Sequence[Tensor], regions: Sequence[Region]) -> Tensor:
    """[N,...] from the [1 or B,...] of each row, or the [1,...] that all rows share."""
    first = values[0]
    if first.shape[0] == 1 and all(value is first for value in values):
        return first
    return torch.stack([region.of_picture(value) for value, region in zip(values, regions, strict=True)])
