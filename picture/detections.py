"""What was found in a picture: boxes, masks cropped to their box, scores and labels, whatever the detector."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LunaInputError
from ..words import tidy
from .boxes import BoxPx, check_box, format_box, rescaled

ASPECT_TOLERANCE = 0.02
"""How far two sizes may differ in aspect and still be one picture."""

ROUNDED_TO, ROUNDED_MOST = 64, 0.08
"""Sides that are multiples of up to so many px may have been rounded to them; how far the aspect may change by it."""

MOST_DETECTIONS = 4096
"""More rows than any run refines; of more islands than this the largest are kept."""

MOST_SIDE_PX, MOST_AREA_PX = 2**17, 2**29
"""Of a picture that an input may claim: its mask alone takes 2 GiB."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One thing that was found.

    Attributes:
        image_index: which picture of the batch.
        box: xyxy px of the picture.
        mask: [h,w] float32 in 0..1 that spans ``box`` exactly, at any resolution; None for the whole box.
        score: 0..1.
        label: the concept, "" when the detector names none; brought to one line and composed accents.
        extra: what else a detector's format carries, handed back untouched when going back to that format.

    Raises:
        LunaInputError: the box is not finite, reversed or empty, or the score or the mask leaves 0..1.
    """

    image_index: int
    box: BoxPx
    mask: Tensor | None = field(default=None, repr=False)
    score: float = 1.0
    label: str = ""
    extra: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        name = f"detection '{self.label}'" if self.label else "detection"
        if self.image_index < 0:
            raise LunaInputError(f"{name}: image index {self.image_index} is negative; pictures count from 0")
        check_box(self.box, name)
        check_score(self.score, name)
        if self.mask is not None:
            check_mask(self.mask, name)
        object.__setattr__(self, "label", tidy(self.label))

    @property
    def width(self) -> float:
        """px"""
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        """px"""
        return self.box[3] - self.box[1]

    @property
    def area(self) -> float:
        """px² of the box"""
        return self.width * self.height

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) px"""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in a batch of pictures of one size, in a stable order.

    Attributes:
        items: the detections.
        width, height: size of the pictures, px; both 0 where nothing was found on pictures of unknown size.
        image_count: number of pictures in the batch.

    Raises:
        LunaInputError: the size is none or beyond reason, an item lies outside its picture, or on a picture that does
            not exist.
    """

    items: tuple[Detection, ...]
    width: int
    height: int
    image_count: int = 1

    def __post_init__(self) -> None:
        size = f"detections: {self.image_count} picture(s) of {self.width}x{self.height} px"
        if not self.is_unplaced and (self.width < 1 or self.height < 1 or self.image_count < 1):
            raise LunaInputError(f"{size}: at least one picture of 1x1 px is needed")
        if max(self.width, self.height) > MOST_SIDE_PX or self.width * self.height > MOST_AREA_PX:
            raise LunaInputError(
                f"{size}: at most {MOST_SIDE_PX} px a side and {MOST_AREA_PX // 10**6} Mpx are handled"
            )
        for index, item in enumerate(self.items):
            x1, y1, x2, y2 = item.box
            if x1 < 0 or y1 < 0 or x2 > self.width or y2 > self.height:
                raise LunaInputError(
                    f"detections: box {format_box(item.box)} of number {index} reaches outside the "
                    f"{self.width}x{self.height} px picture"
                )
            if item.image_index >= self.image_count:
                raise LunaInputError(
                    f"detections: number {index} is on image {item.image_index}, "
                    f"but there are {self.image_count} (0 to {self.image_count - 1})"
                )

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.items)

    @property
    def is_unplaced(self) -> bool:
        """Whether this is nothing on pictures of unknown size, which fits any picture."""
        return not self.items and self.width == self.height == 0

    def with_items(self, items: Sequence[Detection]) -> "Detections":
        """The same pictures with other items."""
        return replace(self, items=tuple(items))

    def on_image(self, image_index: int) -> tuple[Detection, ...]:
        """The items of one picture, in order."""
        return tuple(item for item in self.items if item.image_index == image_index)

    def by_image(self) -> list[list[Detection]]:
        """The items of every picture, in order."""
        pictures: list[list[Detection]] = [[] for _ in range(self.image_count)]
        for item in self.items:
            pictures[item.image_index].append(item)
        return pictures

    def scaled_to(self, width: int, height: int) -> "Detections":
        """The same detections on the pictures at another size; masks keep their own resolution.

        Args:
            width, height: px, of the same aspect as here within rounding.

        Raises:
            LunaInputError: the aspect is another, so the pictures cannot be the same.
        """
        if (width, height) == (self.width, self.height):
            return self
        if self.is_unplaced:
            return replace(self, width=width, height=height)
        if not same_aspect(self.width, self.height, width, height):
            raise LunaInputError(
                f"detections were made on a picture of {self.width}x{self.height} px, the picture here has "
                f"{width}x{height} px: only another size of the same aspect fits. Detect again on this picture"
            )
        size = (self.width, self.height)
        items = [replace(item, box=rescaled(item.box, size, (width, height))) for item in self.items]
        return replace(self, items=tuple(items), width=width, height=height)


def check_score(score: float, name: str) -> None:
    """Raises LunaInputError unless ``score`` is a number in 0..1."""
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise LunaInputError(f"{name}: score {score} must be a number from 0 to 1")


def check_mask(mask: Tensor, name: str) -> None:
    """Raises LunaInputError unless ``mask`` is a non-empty [h,w] float tensor of finite values in 0..1."""
    if mask.ndim != 2 or 0 in mask.shape or not mask.is_floating_point():
        raise LunaInputError(
            f"{name}: mask has shape {list(mask.shape)} and type {mask.dtype}: a float mask [h,w] is needed"
        )
    low, high = (float(value) for value in torch.aminmax(mask))
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise LunaInputError(
            f"{name}: mask holds values from {low:.4g} to {high:.4g}: finite values in 0..1 are needed"
        )


def same_aspect(width: int, height: int, other_width: int, other_height: int) -> bool:
    """Whether two sizes (px) are one picture at two scales, up to rounding of the sides of either."""
    off = abs(other_width * height / (width * other_height) - 1)
    if off <= ASPECT_TOLERANCE + 0.5 / min(width, other_width) + 0.5 / min(height, other_height):
        return True
    return off <= ROUNDED_MOST and (
        _is_rounded(width, height, other_width, other_height) or _is_rounded(other_width, other_height, width, height)
    )


def _is_rounded(width: int, height: int, rounded_width: int, rounded_height: int) -> bool:
    """Whether the second size is the first at some scale, both sides rounded to the multiple they have in common."""
    slack = math.gcd(rounded_width, rounded_height, ROUNDED_TO) / 2
    low = max((rounded_width - slack) / width, (rounded_height - slack) / height)
    high = min((rounded_width + slack) / width, (rounded_height + slack) / height)
    return low < high
