"""The jobs that Luna and the other packs do beside each other, as data: which regions or tiles, of which picture."""

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

Anchor = Literal["text only", "one adapter", "own adapter"]
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)
"""No image prompt; one picture's embedding for all regions; each region anchored by its own px."""

COUNTS = (1, 4, 9, 16)
COLUMNS, SPACING, BOX, CROP, WORKING = 4, 160, 40, 56, 64
"""Boxes of BOX px stand SPACING px apart; CROP px around each are refined at WORKING px, on every side alike."""

SMALL_PICTURE, PICTURES = 1024, (1024, 2048, 4096)
GRIDS = (2, 4, 6)
TILE, STRIDE = 64, 56
"""px that the UNet sees of a tile, and px from tile to tile."""

PADDING, FEATHER, OVERLAP = (CROP - BOX) / 2 / BOX, 8, (TILE - STRIDE) / TILE
"""The same geometry in Luna's words: fraction of the box, px of the picture, fraction of the tile."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class RegionJob:
    """Refine regions of a picture.

    Attributes:
        regions: how many.
        anchor: the image prompt.
        side: of the picture, px.
    """

    regions: int
    anchor: Anchor
    side: int = SMALL_PICTURE

    @property
    def boxes(self) -> tuple[Box, ...]:
        """x1, y1, x2, y2 px, none near the picture's border or another box's crop."""
        corners = [((k % COLUMNS) * SPACING + 32, (k // COLUMNS) * SPACING + 32) for k in range(self.regions)]
        return tuple((x, y, x + BOX, y + BOX) for x, y in corners)


@dataclass(frozen=True)
class TileJob:
    """Refine a whole picture in ``grid`` x ``grid`` tiles in chess order."""

    grid: int

    @property
    def side(self) -> int:
        """Of the picture, px: both Luna and Ultimate SD Upscale make ``grid`` tiles of it."""
        return self.grid * STRIDE


COUNT_JOBS = tuple(RegionJob(count, anchor) for anchor, count in itertools.product(ANCHORS, COUNTS))
LARGE_JOBS = tuple(RegionJob(4, anchor) for anchor in ANCHORS)
"""With the larger models, which take seconds per region."""
PICTURE_JOBS = tuple(RegionJob(4, "text only", side) for side in PICTURES)
TILE_JOBS = tuple(map(TileJob, GRIDS))
