"""Whole-pixel boxes and the squares that are cut around regions; pure integers, no tensors."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A half-open rectangle in whole px of the picture: columns ``x1..x2-1``, rows ``y1..y2-1``.

    It may reach past the picture where a crop is larger than the picture (those px are reflected).
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

    def overlaps(self, other: "Box") -> bool:
        return not self.intersect(other).is_empty

    def contains(self, other: "Box") -> bool:
        return self.x1 <= other.x1 and self.y1 <= other.y1 and self.x2 >= other.x2 and self.y2 >= other.y2

    def grown(self, px: int) -> "Box":
        return Box(self.x1 - px, self.y1 - px, self.x2 + px, self.y2 + px)

    def relative_to(self, origin: "Box") -> "Box":
        """The same box measured from the corner of ``origin``."""
        return Box(self.x1 - origin.x1, self.y1 - origin.y1, self.x2 - origin.x1, self.y2 - origin.y1)

    @staticmethod
    def around(box: tuple[float, float, float, float]) -> "Box":
        """The smallest whole-px box that holds ``box`` (xyxy px, fractional)."""
        x1, y1, x2, y2 = box
        return Box(math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2))


def picture_box(width: int, height: int) -> Box:
    return Box(0, 0, width, height)


def place_span(centre: float, length: int, limit: int) -> tuple[int, int]:
    """Places ``length`` px around ``centre`` inside ``0..limit``, shifted inward at the ends.

    A span longer than ``limit`` is centred on the picture and reaches past both ends.
    """
    inside = min(max(round(centre - length / 2), 0), limit - length)
    start = inside if length < limit else -((length - limit) // 2)
    return start, start + length


def square_around(target: Box, padding: float, min_side: int, width: int, height: int) -> Box:
    """The square crop for ``target``: its longer side, plus ``padding`` times that side on each side.

    The square holds the whole target; at the picture's border it shifts inward, and only a square larger than
    the picture reaches past it (to be reflected).

    Args:
        target: the region, inside the picture, px.
        padding: fraction of the longer side added at each side.
        min_side: smallest side of the square, px.
        width, height: picture size, px.
    """
    longer = max(target.width, target.height)
    side = max(math.ceil(longer * (1 + 2 * padding)), min_side)
    x1, x2 = place_span((target.x1 + target.x2) / 2, side, width)
    y1, y2 = place_span((target.y1 + target.y2) / 2, side, height)
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
