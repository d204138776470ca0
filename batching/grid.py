"""Tile grids: a whole picture as overlapping tiles, refined in chess order, in reading order or all at once."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from ..errors import LunaInputError
from .geometry import Box, picture_box
from .noise import row_seed
from .plan import RefinePlan, Region
from .weights import SharedWeights, TileWeights

TileOrder = Literal["chess", "linear", "single"]
TILE_ORDERS: tuple[TileOrder, ...] = ("chess", "linear", "single")

STEP = 8
"""Tiles start on multiples of this many px, so that a crop at scale 1 lies on whole latent px."""


@dataclass(frozen=True)
class TileSettings:
    """How a picture becomes tiles.

    Attributes:
        tile_size: side of a tile, px, a multiple of 8.
        min_overlap: smallest overlap of neighbours, as a fraction of the tile.
        feather: share of each tile's half of the overlap over which it fades out.
        order: "chess": even tiles, then odd ones that see them; "linear": one tile after the other; "single": all at
            once.
    """

    tile_size: int = 1024
    min_overlap: float = 0.125
    feather: float = 1.0
    order: TileOrder = "chess"

    def __post_init__(self) -> None:
        if self.tile_size < 64 or self.tile_size % STEP:
            raise LunaInputError(f"tile_size is {self.tile_size}: use a multiple of {STEP} from 64 on")
        if not 0 <= self.min_overlap <= 0.5:
            raise LunaInputError(f"min_overlap is {self.min_overlap}: use a fraction of the tile from 0 to 0.5")
        if not 0 <= self.feather <= 1:
            raise LunaInputError(f"feather is {self.feather}: use a fraction of the overlap from 0 to 1")
        if self.order not in TILE_ORDERS:
            raise LunaInputError(f"order is '{self.order}': use one of {', '.join(TILE_ORDERS)}")


@dataclass(frozen=True)
class Span:
    """One tile along one side: ``start..stop`` px, and the px it fades over at its start and at its end."""

    start: int
    stop: int
    fade_in: int
    fade_out: int


def spans(length: int, settings: TileSettings) -> list[Span]:
    """Tiles along a side of ``length`` px: n = ceil((L - overlap) / (T - overlap)), first and last flush with the ends.

    The others are spread evenly on multiples of 8 px. A side shorter than a tile is one span, rounded up to 8 px and
    mirrored past the end.
    """
    tile = settings.tile_size
    if length <= tile:
        return [Span(0, math.ceil(length / STEP) * STEP, 0, 0)]
    overlap = settings.min_overlap * tile
    count = math.ceil((length - overlap) / (tile - overlap))
    stride = (length - tile) / (count - 1)
    # rounding up keeps every gap to the next start at most ceil8(stride), so neighbours never fall apart
    starts = [min(math.ceil(i * stride / STEP - 1e-9) * STEP, length - tile) for i in range(count - 1)] + [
        length - tile
    ]
    fades = [round((a + tile - b) / 2 * settings.feather) for a, b in itertools.pairwise(starts)]
    return [
        Span(start, start + tile, fade_in, fade_out)
        for start, fade_in, fade_out in zip(starts, [0, *fades], [*fades, 0], strict=True)
    ]


def plan_tiles(width: int, height: int, image_count: int, settings: TileSettings, seed: int) -> RefinePlan:
    """Plans the tiles of every image of a batch; tiles of all images share the passes.

    Each tile fades over its own half of the overlap, where its neighbour of the next pass is at full weight: nothing
    of the unrefined picture shows through. Tiles of one pass, which meet at corners only, share their px so that the
    weights add up to 1.

    Args:
        width, height, image_count: of the picture batch.
        settings: grid and order.
        seed: the run's seed.
    """
    tiles = [
        (r, c, row, column)
        for r, row in enumerate(spans(height, settings))
        for c, column in enumerate(spans(width, settings))
    ]
    passes: dict[int, list[int]] = {}
    own: list[tuple[int, int, TileWeights]] = []
    for image_index in range(image_count):
        for number, (r, c, row, column) in enumerate(tiles):
            turn = {"chess": (r + c) % 2, "linear": number, "single": 0}[settings.order]
            passes.setdefault(turn, []).append(len(own))
            fades = (column.fade_in, row.fade_in, column.fade_out, row.fade_out)
            own.append((turn, image_index, TileWeights(Box(column.start, row.start, column.stop, row.stop), fades)))
    regions = tuple(_region(index, own, width, height, seed) for index in range(len(own)))
    return RefinePlan(width, height, image_count, regions, tuple(tuple(rows) for _, rows in sorted(passes.items())))


def _region(index: int, own: list[tuple[int, int, TileWeights]], width: int, height: int, seed: int) -> Region:
    turn, image_index, weights = own[index]
    tile = weights.tile
    rivals = [
        (other, rival)
        for other, (its_turn, its_image, rival) in enumerate(own)
        if other != index and (its_turn, its_image) == (turn, image_index) and tile.overlaps(rival.tile)
    ]
    return Region(
        row=index,
        image_index=image_index,
        crop=tile,
        paste=tile.intersect(picture_box(width, height)),
        weights=SharedWeights(
            weights,
            earlier=tuple(rival for other, rival in rivals if other < index),
            later=tuple(rival for other, rival in rivals if other > index),
        ),
        working_height=tile.height,
        working_width=tile.width,
        seed=row_seed(seed, image_index, tile.x1, tile.y1, tile.x2, tile.y2),
    )
