"""Which detections cover the same place, among thousands: boxes all at once, masks on shared grids drawn once each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..picture.boxes import Box, rescaled
from ..picture.detections import Detection
from ..picture.masks import rasterise

GRID_CELLS = 64
"""A mask's longer side has so many cells of its grid or up to twice as many: an IoU is good to about a hundredth."""

Array = np.ndarray


def box_iou(items: Sequence[Detection]) -> Tensor:
    """Intersection over union of the boxes of every two: [N,N] float64."""
    boxes = _boxes(items)
    return torch.from_numpy(np.stack([_ious(box, boxes) for box in boxes]) if len(boxes) else np.zeros((0, 0)))


def mask_iou(one: Detection, other: Detection) -> float:
    """Intersection over union of what two detections cover."""
    return _Drawn.of(one).iou(_Drawn.of(other))


def without_overlaps(items: Sequence[Detection], iou: float) -> list[Detection]:
    """Of items that overlap by more than ``iou`` only the one of the highest score (non-maximum suppression).

    Where one has a mask, masks decide: hair around a face shares its box but not its mask, and one stray px makes a box
    large but not a mask.

    Returns:
        The survivors in their given order.
    """
    boxes = _boxes(items)
    masked = np.array([item.mask is not None for item in items], dtype=bool)
    covered = np.array([_covered_px(item) for item in items])
    ranking = sorted(range(len(items)), key=lambda place: -items[place].score)
    drawn: dict[int, _Drawn] = {}
    kept = np.zeros(len(items), dtype=np.int64)
    count = 0
    for place in ranking:
        better = kept[:count]
        by_box = ~masked[better] & ~masked[place]
        same = by_box & (_ious(boxes[place], boxes[better]) > iou)
        if not same.any() and not _masks_overlap(place, better[~by_box], items, boxes, covered, drawn, iou):
            kept[count] = place
            count += 1
    return [items[place] for place in np.sort(kept[:count])]


def _masks_overlap(
    place: int,
    others: Array,
    items: Sequence[Detection],
    boxes: Array,
    covered: Array,
    drawn: "dict[int, _Drawn]",
    iou: float,
) -> bool:
    """Whether what one item covers is what one of the others does; only those are compared that could be the same."""
    shared = np.minimum(_shared(boxes[place], boxes[others]), np.minimum(covered[place], covered[others]))
    most = shared / np.maximum(covered[place] + covered[others] - shared, 1e-12)  # their IoU is not above this
    for other in others[(shared > 0) & (most > iou)].tolist():
        for each in (place, other):
            if each not in drawn:
                drawn[each] = _Drawn.of(items[each])
        if drawn[place].iou(drawn[other]) > iou:
            return True
    return False


def _boxes(items: Sequence[Detection]) -> Array:
    return np.array([item.box for item in items], dtype=np.float64).reshape(-1, 4)


def _shared(box: Array, others: Array) -> Array:
    """px² that a box [4] has in common with each of others [N,4]: [N]."""
    wide = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    high = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return wide.clip(min=0) * high.clip(min=0)


def _ious(box: Array, others: Array) -> Array:
    shared = _shared(box, others)
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    return shared / ((box[2] - box[0]) * (box[3] - box[1]) + areas - shared)


def _covered_px(item: Detection) -> float:
    """px² that an item covers, a little more where its mask is resampled."""
    return item.area if item.mask is None else 1.02 * item.area * float(item.mask.mean())


@dataclass(frozen=True, eq=False)
class _Drawn:
    """An item on a grid that all items of like size share: cells of 2**level px, counted from the picture's corner.

    Attributes:
        level: cells are 2**level px wide.
        left, top: of the first cell.
        cells: [h,w] float32, the share of each cell that is covered.
    """

    level: int
    left: int
    top: int
    cells: Array

    @staticmethod
    def of(item: Detection) -> "_Drawn":
        level = math.ceil(math.log2(max(item.width, item.height) / (2 * GRID_CELLS)))
        box = rescaled(item.box, (2.0**level, 2.0**level), (1, 1))
        window = Box.around(box)
        return _Drawn(level, window.x1, window.y1, rasterise(box, item.mask, window).numpy())

    def iou(self, other: "_Drawn") -> float:
        level = max(self.level, other.level)
        one, two = self._at(level), other._at(level)
        top, left = max(one.top, two.top), max(one.left, two.left)
        bottom = min(one.top + one.cells.shape[0], two.top + two.cells.shape[0])
        right = min(one.left + one.cells.shape[1], two.left + two.cells.shape[1])
        if top >= bottom or left >= right:
            return 0.0
        parts = [
            each.cells[top - each.top : bottom - each.top, left - each.left : right - each.left] for each in (one, two)
        ]
        shared = float(np.minimum(*parts).sum())
        union = float(one.cells.sum() + two.cells.sum()) - shared
        return shared / union if union > 0 else 0.0

    def _at(self, level: int) -> "_Drawn":
        """The same on a coarser grid."""
        drawn = self
        for _ in range(level - self.level):
            height, width = drawn.cells.shape
            above, before = drawn.top % 2, drawn.left % 2
            cells = np.pad(drawn.cells, ((above, (above + height) % 2), (before, (before + width) % 2)))
            cells = cells.reshape(cells.shape[0] // 2, 2, cells.shape[1] // 2, 2).mean(axis=(1, 3))
            drawn = _Drawn(drawn.level + 1, drawn.left // 2, drawn.top // 2, cells)
        return drawn
