"""Which detections to keep, and in which order: labels, scores, sizes, overlaps, the best of each kind."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import LunaInputError
from .detections import Detection, Detections, rasterise, same_aspect

Keep = Literal["all", "largest", "best", "most central"]
Order = Literal["as found", "score", "area", "left to right", "top to bottom"]
KEEPS: tuple[Keep, ...] = get_args(Keep)
ORDERS: tuple[Order, ...] = get_args(Order)

_OVERLAP_GRID = 64
"""Cells per side on which two masks are compared: an IoU is good to about a hundredth, at any picture size."""


@dataclass(frozen=True)
class LabelPatterns:
    """Label patterns: a label passes when one of ``wanted`` fits (or none is given) and none of ``unwanted`` does.

    ``*`` and ``?`` stand for any letters and any one letter; upper and lower case are the same.
    """

    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()

    def __contains__(self, label: object) -> bool:
        name = str(label).strip().lower()
        if any(fnmatchcase(name, pattern) for pattern in self.unwanted):
            return False
        return not self.wanted or any(fnmatchcase(name, pattern) for pattern in self.wanted)


@dataclass(frozen=True)
class Selection:
    """What to keep.

    Attributes:
        labels: which labels.
        min_score: 0..1.
        min_size, max_size: area of the box as a fraction of the picture's area.
        nms_iou: of two that overlap more than this the lower score goes; 1 keeps both.
        keep: all, or one of each label in each picture.
        order: within each picture.
        max_count: the first so many of each picture in ``order``; 0 for all.

    Raises:
        LunaInputError: a limit lies outside 0..1, or the sizes contradict each other.
    """

    labels: LabelPatterns = LabelPatterns()
    min_score: float = 0.0
    min_size: float = 0.0
    max_size: float = 1.0
    nms_iou: float = 1.0
    keep: Keep = "all"
    order: Order = "as found"
    max_count: int = 0

    def __post_init__(self) -> None:
        for name in ("min_score", "min_size", "max_size", "nms_iou"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise LunaInputError(f"{name} is {value}: a fraction from 0 to 1 is needed")
        if self.min_size > self.max_size:
            raise LunaInputError(f"min_size {self.min_size} is above max_size {self.max_size}: nothing could pass")
        if self.keep not in KEEPS:
            raise LunaInputError(f"keep is '{self.keep}': choose one of {', '.join(KEEPS)}")
        if self.order not in ORDERS:
            raise LunaInputError(f"order is '{self.order}': choose one of {', '.join(ORDERS)}")
        if self.max_count < 0:
            raise LunaInputError(f"max_count is {self.max_count}: give a number, or 0 for all")


def split_list(text: str) -> list[str]:
    """The entries of a list written with commas, semicolons or one per line; blanks are left out."""
    return [entry.strip() for entry in re.split(r"[,;\n]", text) if entry.strip()]


def parse_labels(text: str, name: str = "labels") -> LabelPatterns:
    """Reads ``face, *eye*, -hand``: patterns of labels, with a minus in front for those to leave out.

    Raises:
        LunaInputError: a minus stands alone.
    """
    wanted: list[str] = []
    unwanted: list[str] = []
    for entry in split_list(text.lower()):
        pattern = entry.lstrip("-").strip()
        if not pattern:
            raise LunaInputError(f"{name}: '{entry}' names no label: write for example face, -hand")
        (unwanted if entry.startswith("-") else wanted).append(pattern)
    return LabelPatterns(tuple(wanted), tuple(unwanted))


def select(detections: Detections, selection: Selection) -> Detections:
    """What passes: labels, score and size first, then overlaps, then the one of each label, then order and count."""
    picture_area = detections.width * detections.height
    kept: list[Detection] = []
    for index in range(detections.image_count):
        items = [
            item
            for item in detections.on_image(index)
            if item.label in selection.labels
            and item.score >= selection.min_score
            and selection.min_size <= item.area / picture_area <= selection.max_size
        ]
        if selection.nms_iou < 1:
            items = without_overlaps(items, selection.nms_iou)
        items = _one_of_each(items, selection.keep, detections)
        items = _ordered(items, selection.order)
        kept += items[: selection.max_count or None]
    return detections.with_items(kept)


def combine(parts: Mapping[int, Detections]) -> Detections:
    """All detections of the same pictures, part after part, at the size of the first part.

    Args:
        parts: by the number of their input, at least one.

    Raises:
        LunaInputError: the pictures differ in number or aspect, so they cannot be the same.
    """
    (first_number, first), *_ = parts.items()
    items: list[Detection] = []
    for number, part in parts.items():
        if part.image_count != first.image_count or not same_aspect(first.width, first.height, part.width, part.height):
            raise LunaInputError(
                f"detections_{number} was made on {_pictures(part)}, detections_{first_number} on {_pictures(first)}: "
                "only detections of the same pictures can be combined"
            )
        items += part.scaled_to(first.width, first.height).items
    return first.with_items(items)


def _pictures(detections: Detections) -> str:
    return f"{detections.image_count} picture(s) of {detections.width}x{detections.height} px"


def box_iou(items: Sequence[Detection]) -> Tensor:
    """Intersection over union of the boxes of every two: [N,N] float64."""
    boxes = torch.tensor([item.box for item in items], dtype=torch.float64).reshape(-1, 4)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return shared / (areas[:, None] + areas[None, :] - shared)


def mask_iou(one: Detection, other: Detection) -> float:
    """Intersection over union of two masks, compared on a coarse grid over both boxes."""
    left, top = min(one.box[0], other.box[0]), min(one.box[1], other.box[1])
    right, bottom = max(one.box[2], other.box[2]), max(one.box[3], other.box[3])
    across, down = _OVERLAP_GRID / (right - left), _OVERLAP_GRID / (bottom - top)
    drawn = []
    for item in (one, other):
        x1, y1, x2, y2 = item.box
        box = ((x1 - left) * across, (y1 - top) * down, (x2 - left) * across, (y2 - top) * down)
        drawn.append(rasterise(replace(item, box=box), (0, 0, _OVERLAP_GRID, _OVERLAP_GRID)))
    union = float(torch.maximum(*drawn).sum())
    return float(torch.minimum(*drawn).sum()) / union if union > 0 else 0.0


def without_overlaps(items: Sequence[Detection], iou: float) -> list[Detection]:
    """Of items that overlap by more than ``iou`` only the one of the highest score (non-maximum suppression).

    Where one has a mask, masks decide: hair around a face shares its box but not its mask, and one stray px makes a box
    large but not a mask.

    Returns:
        The survivors in their given order.
    """
    if not items:
        return []
    overlaps = box_iou(items).tolist()
    ranking = sorted(range(len(items)), key=lambda place: -items[place].score)
    kept: list[int] = []
    for place in ranking:
        if not any(_is_same(items[place], items[better], overlaps[place][better], iou) for better in kept):
            kept.append(place)
    return [items[place] for place in sorted(kept)]


def _is_same(one: Detection, other: Detection, overlap: float, iou: float) -> bool:
    if one.mask is None and other.mask is None:
        return overlap > iou
    return overlap > 0 and mask_iou(one, other) > iou


def _one_of_each(items: Sequence[Detection], keep: Keep, pictures: Detections) -> list[Detection]:
    if keep == "all":
        return list(items)
    rank = {
        "largest": lambda item: -item.area,
        "best": lambda item: -item.score,
        "most central": lambda item: (
            (item.centre[0] - pictures.width / 2) ** 2 + (item.centre[1] - pictures.height / 2) ** 2
        ),
    }[keep]
    winners: dict[str, Detection] = {}
    for item in items:
        if item.label not in winners or rank(item) < rank(winners[item.label]):
            winners[item.label] = item
    chosen = set(map(id, winners.values()))
    return [item for item in items if id(item) in chosen]


def _ordered(items: Iterable[Detection], order: Order) -> list[Detection]:
    """Stable: equals stay in the order they were found."""
    if order == "as found":
        return list(items)
    return sorted(
        items,
        key={
            "score": lambda item: -item.score,
            "area": lambda item: -item.area,
            "left to right": lambda item: item.centre[0],
            "top to bottom": lambda item: item.centre[1],
        }[order],
    )
