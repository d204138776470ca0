"""Conditioning for a batch: every row gets its own text and its own part of what guides the whole picture."""

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LunaInputError
from .plan import Region
from .spatial import PictureGuidance

log = logging.getLogger("luna")

Conditioning = dict[str, list[Any]]
"""ComfyUI conditioning by the guider's own names: lists of [text, fields]."""

_LONGEST_REPEAT = 4
"""Texts are repeated to a common length up to this factor, as ComfyUI's sampler does; beyond it rows are grouped."""

_CUT = frozenset({"area", "mask", "set_area_to_bounds", "control", "gligen", "reference_latents"})
_REPLACED = frozenset({"concat_latent_image", "concat_mask"})
"""The engine makes these per row for models that need them."""

_PASSED = frozenset(
    {
        "pooled_output", "strength", "mask_strength", "start_percent", "end_percent", "clip_start_percent",
        "clip_end_percent", "hooks", "default", "guidance", "width", "height", "crop_w", "crop_h", "target_width",
        "target_height", "aesthetic_score", "control_apply_to_uncond", "prompt_type", "unclip_conditioning",
        "noise_augmentation", "attention_mask", "attention_mask_img_shape", "t5xxl_ids", "t5xxl_weights",
        "conditioning_llama3", "reference_latents_method", "clip_vision_output", "cross_attn_controlnet", "seed",
        "concat_mask_index", "uuid", "model_conds", "guiding_frame_index", "ref_latents_method",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of a batch and what it is conditioned by.

    Attributes:
        region: the row.
        conditioning: whole-picture conditioning; rows may share one.
    """

    region: Region
    conditioning: Conditioning


class RowConditioning:
    """Makes conditioning for batches of rows.

    Args:
        width, height, image_count: of the picture batch, px.
        cell: px of a crop per latent px.
    """

    def __init__(self, width: int, height: int, image_count: int, cell: int) -> None:
        self.cell = cell
        self.image_count = image_count
        self._guidance = PictureGuidance(width, height, image_count)
        self._warned: set[str] = set()

    def groups(self, rows: Sequence[Row], size: tuple[int, int]) -> list[list[int]]:
        """Which rows can share a sampling call, as positions in ``rows``; as few groups as possible.

        Args:
            rows: in order.
            size: (height, width) of their latents.
        """
        found: dict[Hashable, list[int]] = {}
        for place, row in enumerate(rows):
            found.setdefault(self._structure(row, size), []).append(place)
        return list(found.values())

    def for_rows(self, rows: Sequence[Row], size: tuple[int, int]) -> Conditioning:
        """The conditioning of a batch whose rows share a group.

        Args:
            rows: of one group.
            size: (height, width) of their latents.

        Raises:
            LunaInputError: a text or a mask holds another number of pictures than the image.
        """
        regions = [row.region for row in rows]
        controls: dict[int, Any] = {}
        batch: Conditioning = {}
        for name in rows[0].conditioning:
            per_row = [row.conditioning[name] for row in rows]
            weights = [self._weights(conds, region, size) for conds, region in zip(per_row, regions, strict=True)]
            entries = []
            for place in range(len(per_row[0])):
                own = [conds[place] for conds in per_row]
                weight = [row_weights[place] for row_weights in weights]
                if any(w is None or bool(w.any()) for w in weight):
                    entries.append(self._entry(name, own, weight, regions, size, controls))
            batch[name] = entries
        return batch

    def _structure(self, row: Row, size: tuple[int, int]) -> Hashable:
        """What two rows must have in common to share a call: number of entries, and all that cannot differ by row."""
        structure: list[Hashable] = []
        for name, conds in sorted(row.conditioning.items()):
            for text, fields in conds:
                tokens = _length_class(text)
                fixed = tuple((key, _identity(fields[key])) for key in sorted(fields) if not _varies(key, fields[key]))
                shapes = tuple((key, tuple(v.shape[1:])) for key, v in sorted(fields.items()) if _is_row_tensor(key, v))
                boxes = self._boxes_identity(fields, row.region, size)
                structure.append((name, tokens, fixed, shapes, boxes))
        return tuple(structure)

    def _boxes_identity(self, fields: dict[str, Any], region: Region, size: tuple[int, int]) -> Hashable:
        if "gligen" not in fields:
            return None
        cut = self._guidance.boxes(fields["gligen"], region, size)
        return tuple((id(box[0]), *(round(value, 3) for value in box[1:])) for box in cut[2])

    def _weights(self, conds: list[Any], region: Region, size: tuple[int, int]) -> list[Tensor | None]:
        """Where each entry acts in a row; a row that every entry misses keeps the first one everywhere."""
        weights = [self._guidance.weight(fields, region, size) for _, fields in conds]
        if weights and all(weight is not None and not bool(weight.any()) for weight in weights):
            self._warn_once(
                "uncovered", "no conditioning covers some regions: they are refined by the first one, without its area"
            )
            weights[0] = None
        return weights

    def _entry(
        self,
        name: str,
        own: list[Any],
        weights: list[Tensor | None],
        regions: list[Region],
        size: tuple[int, int],
        controls: dict[int, Any],
    ) -> list[Any]:
        text = self._texts([entry[0] for entry in own], regions, name)
        fields: dict[str, Any] = {}
        for key, value in own[0][1].items():
            if key in _REPLACED:
                continue
            if key == "control":
                # positive and negative share one ControlNet, and ComfyUI tells so by identity
                if id(value) not in controls:
                    controls[id(value)] = self._guidance.control(value, regions)
                fields[key] = controls[id(value)]
            elif key == "gligen":
                boxes = self._guidance.boxes(value, regions[0], size)
                if boxes[2]:
                    fields[key] = boxes
            elif key == "reference_latents":
                fields[key] = [self._guidance.reference(latent, regions, size, self.cell) for latent in value]
            elif _is_row_tensor(key, value):
                fields[key] = self._stacked([entry[1][key] for entry in own], regions, f"{key} of {name}")
            elif key not in _CUT:
                if key not in _PASSED:
                    self._warn_once(key, f"conditioning field '{key}' is unknown to Luna: every row gets it as it is")
                fields[key] = value
        if any(weight is not None for weight in weights):
            fields["mask"] = torch.stack([torch.ones(size) if weight is None else weight for weight in weights])
            fields.setdefault("mask_strength", 1.0)
            fields["set_area_to_bounds"] = False
        return [text, fields]

    def _texts(self, texts: list[Tensor | None], regions: list[Region], name: str) -> Tensor | None:
        """One text per row [N,T,D], or the shared [1,T,D]; shorter texts are repeated, which attention does not see."""
        given = [text for text in texts if text is not None]
        if not given:
            return None
        length = math.lcm(*(text.shape[1] for text in given)) if given[0].ndim == 3 else 0
        if given[0].ndim == 3:
            repeated = {id(text): text.repeat(1, length // text.shape[1], 1) for text in given}
            given = [repeated[id(text)] for text in given]
        return self._stacked(given, regions, name)

    def _stacked(self, values: list[Tensor], regions: list[Region], name: str) -> Tensor:
        first = values[0]
        if first.shape[0] == 1 and all(value is first for value in values):
            return first
        rows = []
        for value, region in zip(values, regions, strict=True):
            if value.shape[0] not in (1, self.image_count):
                raise LunaInputError(
                    f"{name} holds {value.shape[0]} texts, image holds {self.image_count} pictures: "
                    "give one text for all, or one for each picture"
                )
            rows.append(value[region.image_index if value.shape[0] > 1 else 0])
        return torch.stack(rows)

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning(text)


def _is_row_tensor(key: str, value: Any) -> bool:
    """Tensors that hold something for each text: pooled outputs and the like."""
    return isinstance(value, Tensor) and key not in _CUT and key not in _REPLACED and value.ndim > 0


def _varies(key: str, value: Any) -> bool:
    """True for what may differ between the rows of a call."""
    return key in _REPLACED or key in ("area", "mask", "set_area_to_bounds", "gligen") or _is_row_tensor(key, value)


def _identity(value: Any) -> Hashable:
    if isinstance(value, bool | int | float | str | None.__class__):
        return value
    return id(value)


def _length_class(text: Tensor | None) -> Hashable:
    """Texts of one class can be brought to a common length: multiples of CLIP's 77 tokens up to four times as long."""
    if text is None:
        return None
    if text.ndim != 3:
        return tuple(text.shape[1:])
    tokens, width = text.shape[1:]
    if tokens % 77 == 0 and tokens // 77 <= _LONGEST_REPEAT:
        return ("chunks", width)
    return (tokens, width)
