"""A small, exact engine for tests of the refinement loop: its VAE loses nothing, its sampler adds what it is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from luna_refinement.batching.comfy_chunks import MAIN_MEMORY
from luna_refinement.batching.conditioning import RowConditioning
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.refine import Engine, Refined
from luna_refinement.batching.refine import refine as refine_rows
from luna_refinement.batching.rows import EncodedRow, Row, resolve_rows
from torch import Tensor


def refine(image: Tensor, plan: RefinePlan, engine: Engine, *args: Any, **settings: Any) -> Refined:
    """A refinement whose rows have nothing of their own but their regions."""
    return refine_rows(image, plan, resolve_rows(plan, {}), engine, *args, **settings)


def groups(conditioning: RowConditioning, rows: Sequence[Row], size: tuple[int, int]) -> list[list[int]]:
    """Which rows share a sampling call for latents of ``size`` (height, width), as positions in ``rows``."""
    found: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(conditioning.structure(row, size), []).append(place)
    return list(found.values())


@dataclass
class ExactEngine:
    """Encodes by folding 8x8 px into 192 channels, which decodes to the same bits.

    Attributes:
        change: gives the refined latent of a row from its number and its latent [c,h,w].
        calls: rows of each sampling call so far.
        device: where pictures are worked on.
    """

    change: Callable[[int, Tensor], Tensor] = lambda row, latent: latent
    px_per_batch: int = 2 * 64**2
    calls: list[list[int]] = field(default_factory=list)
    device: torch.device = MAIN_MEMORY

    def view(self, rows: Sequence[Row], crops: Tensor) -> list[Tensor | None]:
        return [None] * len(rows)

    def encode(self, rows: Sequence[Row], crops: Tensor, views: Sequence[Tensor | None]) -> list[EncodedRow]:
        return [row.encoded(latent) for row, latent in zip(rows, self.latents(crops), strict=True)]

    def anchor(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        return list(rows)

    def latents(self, crops: Tensor) -> Tensor:
        return F.pixel_unshuffle(crops.movedim(-1, 1), 8)

    def sample(self, rows: Sequence[EncodedRow]) -> list[Tensor]:
        self.calls.append([row.region.row for row in rows])
        return [self.change(row.region.row, row.latent) for row in rows]

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, 8).movedim(1, -1)
