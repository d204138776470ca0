"""Image embeddings, one per row of the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LunaInputError


@dataclass(frozen=True, eq=False)
class RowEmbeds:
    """Row i of a batch attends to embedding i.

    Attributes:
        cond: [N,T,D] image tokens of each row.
        uncond: [1,T,D] image tokens of no picture, or [N,T,D] of a negative picture for each row.
        projection: digest of the image projection that made them; None when unknown.

    Raises:
        LunaInputError: the shapes do not fit together.
    """

    cond: Tensor
    uncond: Tensor
    projection: bytes | None = None

    def __post_init__(self) -> None:
        fits = self.cond.ndim == self.uncond.ndim == 3 and self.cond.shape[1:] == self.uncond.shape[1:]
        if not fits or self.uncond.shape[0] not in (1, self.cond.shape[0]) or not len(self.cond):
            raise LunaInputError(
                f"image embeds have shapes {list(self.cond.shape)} and (without picture) {list(self.uncond.shape)}: "
                "[N,T,D] and [1 or N,T,D] are needed"
            )

    def __len__(self) -> int:
        return self.cond.shape[0]

    def take(self, places: Sequence[int]) -> "RowEmbeds":
        """The embeddings of the rows at these positions."""
        uncond = self.uncond if self.uncond.shape[0] == 1 else self.uncond[list(places)]
        return replace(self, cond=self.cond[list(places)], uncond=uncond)

    @staticmethod
    def concat(parts: Sequence["RowEmbeds"]) -> "RowEmbeds":
        """The rows of all parts, in order."""
        cond = torch.cat([part.cond for part in parts])
        if all(part.uncond.shape[0] == 1 and torch.equal(part.uncond, parts[0].uncond) for part in parts):
            return replace(parts[0], cond=cond)
        return replace(parts[0], cond=cond, uncond=torch.cat([part.uncond.expand(len(part), -1, -1) for part in parts]))
