"""Tile grids: a whole picture as overlapping tiles, refined in chess order, in reading order or all at once."""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..errors import LunaInputError
from ..picture.boxes import Box, ceil_to, picture_box
from .noise import region_seed
from .plan import CELL_PX, RefinePlan, Region
from .weights import SharedWeights, TileWeights

TileOrder = Literal["chess", "linear", "single"]
TILE_ORDERS: tuple[TileOrder, ...] = get_args(TileOrder)


@dataclass(frozen=True)
class TileSettings:
    """How a picture becomes tiles.

    Attributes:
        tile_size: side of a tile, px, a multiple of ``cell_px``.
        min_overlap: smallest overlap of neighbours, as a fraction of the tile.
        feather: share of each tile's half of the overlap over which it fades out.
        order: "chess": even tiles, then odd ones that see them; "linear": one tile after the other; "single": all at
            once.
        cell_px: px per latent px of the VAE. Tiles start on multiples of it and are whole multiples of it, so that
            a tile lies on whole latent px: a VAE would cut off what is left over, and the tile would move.
    """

    tile_size: int = 1024
    min_overlap: float = 0.125
    feather: float = 1.0
    order: TileOrder = "chess"
    cell_px: int = CELL_PX

    def __post_init__(self) -> None:
        if self.tile_size < 64 or self.tile_size % self.cell_px:
            raise LunaInputError(f"tile_size is {self.tile_size}: use a multiple of {self.cell_px} from 64 on")
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

    The others are spread evenly on whole latent px. A side shorter than a tile is one span, rounded up to whole latent
    px and mirrored past the end.
    """
    tile, cell = settings.tile_size, settings.cell_px
    if length <= tile:
        return [Span(0, ceil_to(length, cell), 0, 0)]
    overlap = settings.min_overlap * tile
    count = math.ceil((length - overlap) / (tile - overlap))
    stride = (length - tile) / (count - 1)
    # rounding up keeps every gap to the next start at most one stride, rounded up, so neighbours never fall apart
    starts = [min(ceil_to(i * stride, cell), length - tile) for i in range(count - 1)] + [length - tile]
    fades = [_fade_px(a + tile - b, settings.feather) for a, b in itertools.pairwise(starts)]
    return [
        Span(start, start + tile, fade_in, fade_out)
        for start, fade_in, fade_out in zip(starts, [0, *fades], [*fades, 0], strict=True)
    ]


def _fade_px(overlap: int, feather: float) -> int:
    """px over which each of two neighbours fades: never past the middle, where the other one must be full."""
    return min(round(overlap / 2 * feather), overlap // 2)


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
    rows, columns = spans(height, settings), spans(width, settings)
    weights = [
        TileWeights(Box(x.start, y.start, x.stop, y.stop), (x.fade_in, y.fade_in, x.fade_out, y.fade_out))
        for y in rows
        for x in columns
    ]
    grid = list(itertools.product(range(len(rows)), range(len(columns))))
    turns = [{"chess": (r + c) % 2, "linear": n, "single": 0}[settings.order] for n, (r, c) in enumerate(grid)]
    near_rows, near_columns = _neighbours(rows), _neighbours(columns)
    picture = picture_box(width, height)
    regions = []
    for number, (r, c) in enumerate(grid):
        beside = [rr * len(columns) + cc for rr in near_rows[r] for cc in near_columns[c]]
        rivals = [other for other in beside if other != number and turns[other] == turns[number]]
        shared = SharedWeights(
            weights[number],
            earlier=tuple(weights[other] for other in rivals if other < number),
            later=tuple(weights[other] for other in rivals if other > number),
        )
        regions.append(_region(number, shared, picture, seed))
    passes: list[list[int]] = [[] for _ in range(max(turns) + 1)]
    for row, turn in enumerate(turns * image_count):
        passes[turn].append(row)
    others = (
        replace(region, row=image_index * len(regions) + region.row, image_index=image_index)
        for image_index in range(1, image_count)
        for region in regions
    )
    return RefinePlan(width, height, image_count, (*regions, *others), tuple(map(tuple, passes)))


def _neighbours(spans: Sequence[Span]) -> list[range]:
    """For each span the places of those that it has px in common with, itself among them."""
    starts, stops = [span.start for span in spans], [span.stop for span in spans]
    return [range(bisect_right(stops, span.start), bisect_left(starts, span.stop)) for span in spans]


def _region(number: int, weights: SharedWeights, picture: Box, seed: int) -> Region:
    tile = weights.own.tile
    return Region(
        row=number,
        image_index=0,
        crop=tile,
        paste=tile.intersect(picture),
        weights=weights,
        working_height=tile.height,
        working_width=tile.width,
        seed=region_seed(seed, tile),
    )
