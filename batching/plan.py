"""What will be refined, as data: regions, crops, paste weights, row seeds and the order of the work; no pixels yet."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..picture.boxes import Box
from .crops import WINDOW_PX
from .weights import PasteWeights

CELL_PX = 8
"""px per latent px of most VAEs."""


@dataclass(frozen=True)
class Region:
    """One row of the batch.

    Attributes:
        row: position among all rows; outputs keep this order.
        image_index: which image of the batch.
        crop: what is cut out, px; may reach past the picture when it is larger.
        paste: the part of the picture that is written, px.
        weights: paste weight over the picture.
        working_height, working_width: size the crop is refined at, px.
        seed: seed of this row's noise.
        score, label: of the detection; "" and 1 for tiles.
    """

    row: int
    image_index: int
    crop: Box
    paste: Box
    weights: PasteWeights
    working_height: int
    working_width: int
    seed: int
    score: float = 1.0
    label: str = ""

    @property
    def working_size(self) -> tuple[int, int]:
        """(height, width) px."""
        return self.working_height, self.working_width

    def of_picture(self, batch: Tensor) -> Tensor:
        """What a batch [1 or B,...] holds for the region's picture: [...]."""
        return batch[self.image_index if batch.shape[0] > 1 else 0]

    def weights_over_crop(self, height: int, width: int) -> Tensor:
        """The paste weight over the crop, scaled to [height, width]; 0..1."""
        drawn = torch.cat([_scaled(self.weights.draw(band), band.height, width) for band in self.crop.bands(WINDOW_PX)])
        return _scaled(drawn, height, width).clamp(0, 1)

    @property
    def scale(self) -> float:
        """px of the working size per px of the picture, along the longer side."""
        return max(self.working_size) / max(self.crop.width, self.crop.height)


def _scaled(weights: Tensor, height: int, width: int) -> Tensor:
    """[h,w] at another size, antialiased."""
    return F.interpolate(weights[None, None], size=(height, width), mode="bilinear", antialias=True)[0, 0]


@dataclass(frozen=True)
class RefinePlan:
    """Everything a refiner is about to do.

    Attributes:
        width, height, image_count: of the picture batch.
        regions: all rows.
        passes: rows per pass; the crops of a pass are cut before anything of that pass is pasted.
    """

    width: int
    height: int
    image_count: int
    regions: tuple[Region, ...]
    passes: tuple[tuple[int, ...], ...]

    def batches(self, rows: Iterable[int]) -> list[list[Region]]:
        """The regions of ``rows`` grouped by working size: what can share one sampling call."""
        groups: dict[tuple[int, int], list[Region]] = {}
        for row in rows:
            region = self.regions[row]
            groups.setdefault(region.working_size, []).append(region)
        return list(groups.values())

    def paste_order(self, rows: Iterable[int]) -> list[Region]:
        """Lowest score first, so that the surest detection lies on top where regions overlap."""
        return sorted((self.regions[row] for row in rows), key=lambda region: (region.score, region.row))


def even_chunk(total: int, most: int) -> int:
    """Rows per sampling call so that ``total`` rows take as few calls as with ``most`` in each, all of like size.

    13 rows where 12 fit become 7 and 6: the same number of calls at little more than half the memory.
    """
    return math.ceil(total / math.ceil(total / most))


def name_rows(rows: Sequence[int]) -> str:
    """Rising row numbers for messages: "row 3", "rows 0, 2-5"."""
    # what rises by one together with its place is one run
    runs = [[row for _, row in run] for _, run in itertools.groupby(enumerate(rows), lambda each: each[1] - each[0])]
    names = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(names)}"
