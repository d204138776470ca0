"""Boxes in px of a picture, and the crops that are cut around regions; plain numbers, no tensors."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import LunaInputError

BoxPx = tuple[float, float, float, float]
"""x1, y1, x2, y2 in px, fractional; px k reaches from k to k + 1. Every ``Box`` is one."""

LEAST_PX = 1 / 256
"""A box less wide or high is empty: no picture shows so little, and divisions by it leave all bounds."""


class Box(NamedTuple):
    """A half-open rectangle in whole px of a picture or a mask: columns ``x1..x2-1``, rows ``y1..y2-1``.

    It may reach past the picture where a crop needs more px than the picture has (those px are reflected).
    """

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def width(self) -> int:
        return self.x2 - self.x1

    @property
    def height(self) -> int:
        return self.y2 - self.y1

    @property
    def is_empty(self) -> bool:
        return self.x2 <= self.x1 or self.y2 <= self.y1

    def intersect(self, other: "Box") -> "Box":
        """The common part; empty (``is_empty``) when the boxes do not touch."""
        return Box(max(self.x1, other.x1), max(self.y1, other.y1), min(self.x2, other.x2), min(self.y2, other.y2))

    def join(self, other: "Box") -> "Box":
        """The smallest box that holds both."""
        return Box(min(self.x1, other.x1), min(self.y1, other.y1), max(self.x2, other.x2), max(self.y2, other.y2))

    def overlaps(self, other: "Box") -> bool:
        return not self.intersect(other).is_empty

    def contains(self, other: "Box") -> bool:
        return self.x1 <= other.x1 and self.y1 <= other.y1 and self.x2 >= other.x2 and self.y2 >= other.y2

    def grown(self, px: int) -> "Box":
        return Box(self.x1 - px, self.y1 - px, self.x2 + px, self.y2 + px)

    def relative_to(self, origin: "Box") -> "Box":
        """The same box measured from the corner of ``origin``."""
        return Box(self.x1 - origin.x1, self.y1 - origin.y1, self.x2 - origin.x1, self.y2 - origin.y1)

    def strips(self, px: int) -> Iterator["Box"]:
        """The box in upright strips of at most ``px`` px each (at least one column), from left to right."""
        step = max(1, px // self.height)
        for x in range(self.x1, self.x2, step):
            yield Box(x, self.y1, min(x + step, self.x2), self.y2)

    def bands(self, px: int) -> Iterator["Box"]:
        """The box in bands of whole rows of at most ``px`` px each (at least one row), from top to bottom."""
        step = max(1, px // self.width)
        for y in range(self.y1, self.y2, step):
            yield Box(self.x1, y, self.x2, min(y + step, self.y2))

    @staticmethod
    def around(box: BoxPx) -> "Box":
        """The smallest whole-px box that holds ``box``."""
        x1, y1, x2, y2 = box
        return Box(math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2))


def picture_box(width: int, height: int) -> Box:
    return Box(0, 0, width, height)


def outward_px(box: BoxPx, width: int, height: int) -> Box:
    """The smallest whole-px box that holds ``box``, clipped to a picture or mask of ``width`` x ``height`` px."""
    return Box.around(box).intersect(picture_box(width, height))


def clip_box(box: BoxPx, width: int, height: int) -> BoxPx | None:
    """The part of a box on a picture of ``width`` x ``height`` px; None where it lies outside."""
    x1, y1 = max(0.0, box[0]), max(0.0, box[1])
    x2, y2 = min(float(width), box[2]), min(float(height), box[3])
    return None if x2 - x1 < LEAST_PX or y2 - y1 < LEAST_PX else (x1, y1, x2, y2)


def rescaled(box: BoxPx, size: tuple[float, float], into: tuple[float, float]) -> BoxPx:
    """A box on a picture of ``size`` (width, height) as it lies on the same picture of size ``into``."""
    # multiplied before divided: a box that ends at the border still ends exactly at it
    x1, y1, x2, y2 = box
    return x1 * into[0] / size[0], y1 * into[1] / size[1], x2 * into[0] / size[0], y2 * into[1] / size[1]


def format_box(box: Sequence[float]) -> str:
    """A box for messages: at most two decimals."""
    return "[" + ", ".join(f"{value:.2f}".rstrip("0").rstrip(".") for value in box) + "]"


def check_box(box: Sequence[float], name: str) -> None:
    """Raises LunaInputError unless ``box`` is four finite numbers with x1 < x2 and y1 < y2."""
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise LunaInputError(f"{name}: box {list(box)} must be four finite numbers x1, y1, x2, y2 in px")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise LunaInputError(
            f"{name}: box {format_box(box)} is reversed or empty: x2 must be greater than x1 and y2 greater than y1"
        )


def place_span(centre: float, length: int, limit: int) -> tuple[int, int]:
    """Places ``length`` px around ``centre`` inside ``0..limit``, shifted inward at the ends.

    A span longer than ``limit`` is centred on the picture and reaches past both ends.
    """
    inside = min(max(round(centre - length / 2), 0), limit - length)
    start = inside if length < limit else -((length - limit) // 2)
    return start, start + length


def crop_around(target: Box, padding: float, min_side: int, width: int, height: int) -> Box:
    """The crop for ``target``: a square of its longer side, plus ``padding`` times that side on each side.

    The crop holds the whole target; at the picture's border it shifts inward. Where the picture is smaller than the
    square, the crop ends with the picture and is no square; only a side below ``min_side`` reaches past it.

    Args:
        target: the region, inside the picture, px.
        padding: fraction of the longer side added at each side.
        min_side: smallest side of the crop, px.
        width, height: picture size, px.
    """
    longer = max(target.width, target.height)
    side = max(math.ceil(longer * (1 + 2 * padding)), min_side)
    x1, x2 = place_span((target.x1 + target.x2) / 2, min(side, max(width, min_side)), width)
    y1, y2 = place_span((target.y1 + target.y2) / 2, min(side, max(height, min_side)), height)
    return Box(x1, y1, x2, y2)


def ceil_to(px: float, multiple: int) -> int:
    """``px`` rounded up to a multiple; what only rounding of floats lies above one counts as that one."""
    return math.ceil(px / multiple - 1e-9) * multiple


def working_size(crop: Box, longer_px: int, least_px: int, multiple: int) -> tuple[int, int]:
    """(height, width) px at which a crop is refined: its longer side at ``longer_px``, the other in proportion.

    Args:
        crop: px of the picture.
        longer_px: a multiple of ``multiple``.
        least_px: smallest side, as far as it does not exceed ``longer_px``.
        multiple: sides are rounded up to multiples of it.
    """
    scale = longer_px / max(crop.width, crop.height)

    def worked(side: int) -> int:
        return min(longer_px, ceil_to(max(side * scale, least_px), multiple))

    return worked(crop.height), worked(crop.width)


def with_aspect(crop: Box, size: tuple[int, int], width: int, height: int) -> Box:
    """The crop, its shorter side grown past the picture as far as the aspect of ``size`` (height, width) asks.

    Args:
        crop: spans the picture along its shorter side, or is a square, px.
        size: the size it is refined at, px.
        width, height: picture size, px.
    """
    per_px = max(crop.width, crop.height) / max(size)
    x1, x2 = place_span((crop.x1 + crop.x2) / 2, max(crop.width, round(size[1] * per_px)), width)
    y1, y2 = place_span((crop.y1 + crop.y2) / 2, max(crop.height, round(size[0] * per_px)), height)
    return Box(x1, y1, x2, y2)


def inner_margin(target: Box, crop: Box, width: int, height: int) -> int:
    """px between ``target`` and those borders of ``crop`` that are not also borders of the picture.

    This is the room a feather has before it would be cut off; borders shared with the picture need none.
    """
    picture = picture_box(width, height)
    margins = [
        target.x1 - crop.x1 if crop.x1 > picture.x1 else None,
        target.y1 - crop.y1 if crop.y1 > picture.y1 else None,
        crop.x2 - target.x2 if crop.x2 < picture.x2 else None,
        crop.y2 - target.y2 if crop.y2 < picture.y2 else None,
    ]
    inner = [margin for margin in margins if margin is not None]
    return min(inner) if inner else max(crop.width, crop.height)
