"""Conditioning for a batch: every row gets its own text and its own part of what guides the whole picture."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .fields import KINDS, TEXT, kind_of
from .kinds import Batch
from .plan import Region
from .rows import Conditioning, Row
from .spatial import PictureGuidance


class RowConditioning:
    """Makes conditioning for batches of rows.

    Args:
        width, height, image_count: of the picture batch, px.
        cell: px of a crop per latent px.
        has_frames: latents have a dimension for frames, of which there is one.

    Attributes:
        notices: what the user should know of what was done, each once.
    """

    def __init__(self, width: int, height: int, image_count: int, cell: int, has_frames: bool = False) -> None:
        self.notices: list[str] = []
        self._guidance = PictureGuidance(width, height, image_count, cell, has_frames)

    def check(self, conditioning: Conditioning) -> None:
        """Finds what cannot be cut to rows, before anything is sampled.

        Raises:
            LunaInputError: a text, mask, hint or latent holds another number of pictures than the image, or a field
                holds something that Luna does not know how to cut.
        """
        for name, conds in conditioning.items():
            for fields in map(_fields, conds):
                for key, value in fields.items():
                    whose = name if key == TEXT else f"{key} of {name}"
                    kind_of(key, value).check(value, whose, self._guidance)
                    if key not in KINDS:
                        self._note(f"conditioning field '{key}' is unknown to Luna: every row gets it as it is")

    def structure(self, row: Row, size: tuple[int, int]) -> Hashable:
        """What two rows must have in common to share a call: number of entries, and all that cannot differ by row.

        Args:
            row: with its conditioning.
            size: (height, width) of its latent.
        """
        batch = Batch([row.region], size, self._guidance)
        structure: list[Hashable] = []
        for name, conds in sorted(row.conditioning.items()):
            for fields in map(_fields, conds):
                kinds = ((key, kind_of(key, value)) for key, value in sorted(fields.items()))
                common = ((key, kind.in_common(key, fields, batch)) for key, kind in kinds if not kind.everywhere)
                structure.append((name, *common))
        return tuple(structure)

    def for_rows(self, rows: Sequence[Row], size: tuple[int, int]) -> Conditioning:
        """The conditioning of a batch whose rows are of one structure.

        Args:
            rows: which share a call.
            size: (height, width) of their latents.
        """
        batch = Batch([row.region for row in rows], size, self._guidance)
        made: Conditioning = {}
        for name in rows[0].conditioning:
            per_row = [row.conditioning[name] for row in rows]
            weights = [self._weights(conds, region, size) for conds, region in zip(per_row, batch.regions, strict=True)]
            entries = []
            for place in range(len(per_row[0])):
                own = [conds[place] for conds in per_row]
                weight = [row_weights[place] for row_weights in weights]
                if any(w is None or bool(w.any()) for w in weight):
                    entries.append(self._entry(own, weight, batch))
            made[name] = entries
        return made

    def _weights(self, conds: list[Any], region: Region, size: tuple[int, int]) -> list[Tensor | None]:
        """Where each entry acts in a row; a row that every entry misses keeps the first one everywhere."""
        weights = [self._guidance.weight(fields, region, size) for _, fields in conds]
        if weights and all(weight is not None and not bool(weight.any()) for weight in weights):
            self._note("no conditioning covers some regions: they are refined by the first one, without its area")
            weights[0] = None
        return weights

    def _entry(self, own: list[Any], weights: list[Tensor | None], batch: Batch) -> list[Any]:
        entries = [_fields(entry) for entry in own]
        fields: dict[str, Any] = {}
        for key, value in entries[0].items():
            made = None if value is None else kind_of(key, value).for_rows(key, entries, batch)
            if value is None or made is not None:
                fields[key] = made
        if any(weight is not None for weight in weights):
            ones = torch.ones(batch.size)
            masks = torch.stack([ones if weight is None else weight for weight in weights])
            fields["mask"] = masks[:, None] if self._guidance.has_frames else masks
            fields.setdefault("mask_strength", 1.0)
            fields["set_area_to_bounds"] = False
        return [fields.pop(TEXT), fields]

    def _note(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)


def _fields(entry: list[Any]) -> dict[str, Any]:
    """The fields of an entry [text, fields], the text among them."""
    return {TEXT: entry[0], **entry[1]}
