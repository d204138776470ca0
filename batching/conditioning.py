"""Conditioning for a batch: every row gets its own text and its own part of what guides the whole picture."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kinds import KINDS, Batch, Place, check_texts, kind_of, of_each_row
from .plan import Region
from .rows import Conditioning, Row
from .spatial import PictureGuidance

_LONGEST_REPEAT = 4
"""Texts are repeated to a common length up to this factor, as ComfyUI's sampler does; beyond it rows are grouped."""


class RowConditioning:
    """Makes conditioning for batches of rows.

    Args:
        width, height, image_count: of the picture batch, px.
        cell: px of a crop per latent px.

    Attributes:
        notices: what the user should know of what was done, each once.
    """

    def __init__(self, width: int, height: int, image_count: int, cell: int) -> None:
        self.notices: list[str] = []
        self._guidance = PictureGuidance(width, height, image_count, cell)

    def check(self, conditioning: Conditioning) -> None:
        """Finds what cannot be cut to rows, before anything is sampled.

        Raises:
            LunaInputError: a text, mask, hint or latent holds another number of pictures than the image, or a field
                holds something that Luna does not know how to cut.
        """
        for name, conds in conditioning.items():
            for text, fields in conds:
                if text is not None:
                    check_texts(text, name, self._guidance.image_count)
                for key, value in fields.items():
                    kind_of(key, value).check(value, f"{key} of {name}", self._guidance)
                    if key not in KINDS:
                        self._note(f"conditioning field '{key}' is unknown to Luna: every row gets it as it is")

    def structure(self, row: Row, size: tuple[int, int]) -> Hashable:
        """What two rows must have in common to share a call: number of entries, and all that cannot differ by row.

        Args:
            row: with its conditioning.
            size: (height, width) of its latent.
        """
        structure: list[Hashable] = []
        batch = Batch([row.region], size, self._guidance)
        for name, conds in sorted(row.conditioning.items()):
            for text, fields in conds:
                kinds = {key: kind_of(key, value) for key, value in sorted(fields.items())}
                common = tuple(
                    (key, kind.in_common(key, fields, batch))
                    for key, kind in kinds.items()
                    if not isinstance(kind, Place)
                )
                structure.append((name, _length_class(text), common))
                if _draws_for_the_batch(fields):
                    structure.append(row.region.row)
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
        text = self._texts([entry[0] for entry in own], batch.regions)
        entries = [entry[1] for entry in own]
        fields: dict[str, Any] = {}
        for key, value in entries[0].items():
            if value is None:
                fields[key] = value
                continue
            made = kind_of(key, value).for_rows(key, entries, batch)
            if made is not None:
                fields[key] = made
        if any(weight is not None for weight in weights):
            ones = torch.ones(batch.size)
            fields["mask"] = torch.stack([ones if weight is None else weight for weight in weights])
            fields.setdefault("mask_strength", 1.0)
            fields["set_area_to_bounds"] = False
        return [text, fields]

    def _texts(self, texts: list[Tensor | None], regions: Sequence[Region]) -> Tensor | None:
        """One text per row [N,T,D], or the shared [1,T,D]; shorter texts are repeated, which attention does not see."""
        given = [text for text in texts if text is not None]
        if not given:
            return None
        if given[0].ndim == 3:
            length = math.lcm(*(text.shape[1] for text in given))
            repeated = {id(text): text.repeat(1, length // text.shape[1], 1) for text in given}
            given = [repeated[id(text)] for text in given]
        return of_each_row(given, regions)

    def _note(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)


def _draws_for_the_batch(fields: dict[str, Any]) -> bool:
    """Models that noise the picture they are given draw for the whole batch at once: each row must be sampled alone."""
    return bool(fields.get("noise_augmentation")) and ("concat_image" in fields or "concat_latent_image" in fields)


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
