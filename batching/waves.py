"""The passes of regions that overlap: no crop sees what another of the same pass writes."""

from collections.abc import Sequence

import numpy as np

from .plan import Region


def together(regions: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    """All regions in one pass."""
    return (tuple(range(len(regions))),) if regions else ()


def waves(regions: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    """Passes in which no crop sees what another of the same pass writes.

    Greedy colouring of the overlap graph in row order: each region goes into the first pass that has room for it.
    """
    pictures: dict[int, list[Region]] = {}
    for region in regions:
        pictures.setdefault(region.image_index, []).append(region)
    turns: dict[int, int] = {}
    for on_picture in pictures.values():
        turns |= _turns(on_picture)
    passes: list[list[int]] = [[] for _ in range(max(turns.values(), default=-1) + 1)]
    for region in regions:
        passes[turns[region.row]].append(region.row)
    return tuple(tuple(rows) for rows in passes)


def _turns(regions: Sequence[Region]) -> dict[int, int]:
    """The pass of each region of one picture, by its row.

    Sorted by their left edges, only a short run of the regions can touch any one of them, and a run is compared at
    once: the work grows with the regions that lie beside each other, not with all pairs.
    """
    order = sorted(regions, key=lambda region: region.crop.x1)
    crops = np.array([region.crop for region in order]).T
    pastes = np.array([region.paste for region in order]).T
    left, widest = crops[0], (crops[2] - crops[0]).max()
    turns = np.full(len(order), -1)
    for place in sorted(range(len(order)), key=lambda place: order[place].row):
        near = slice(np.searchsorted(left, left[place] - widest), np.searchsorted(left, crops[2, place]))
        touches = _overlap(crops[:, place], pastes[:, near]) | _overlap(pastes[:, place], crops[:, near])
        taken = set(turns[near][touches].tolist())
        turns[place] = next(turn for turn in range(len(taken) + 1) if turn not in taken)
    return {region.row: int(turn) for region, turn in zip(order, turns, strict=True)}


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n] bool: which of ``others`` [4,n] (x1, y1, x2, y2 px) have px in common with ``box`` [4]."""
    return (others[0] < box[2]) & (others[2] > box[0]) & (others[1] < box[3]) & (others[3] > box[1])
