"""What was found in a picture: boxes, masks cropped to their box, scores and labels, whatever the detector."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LunaInputError
from ..words import tidy

BoxPx = tuple[float, float, float, float]
"""x1, y1, x2, y2 in px, fractional; px k reaches from k to k + 1."""

ASPECT_TOLERANCE = 0.02
"""How far two sizes may differ in aspect and still be one picture."""

ROUNDED_TO, ROUNDED_MOST = 64, 0.08
"""Sides that are multiples of up to so many px may have been rounded to them; how far the aspect may change by it."""

MOST_DETECTIONS = 4096
"""More rows than any run refines; of more islands than this the largest are kept."""

MOST_SIDE_PX, MOST_AREA_PX = 2**17, 2**29
"""Of a picture that an input may claim: its mask alone takes 2 GiB."""

LEAST_PX = 1 / 256
"""A box less wide or high is empty: no picture shows so little, and divisions by it leave all bounds."""

VISIBLE = 0.5 / 255
"""Mask values below half an 8-bit level are resampling noise, not mask."""


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
        items = [replace(item, box=self._scaled(item.box, width, height)) for item in self.items]
        return replace(self, items=tuple(items), width=width, height=height)

    def _scaled(self, box: BoxPx, width: int, height: int) -> BoxPx:
        # multiplied before divided: a box that ends at the border still ends exactly at it
        x1, y1, x2, y2 = box
        return (x1 * width / self.width, y1 * height / self.height, x2 * width / self.width, y2 * height / self.height)


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


def clip_box(box: BoxPx, width: int, height: int) -> BoxPx | None:
    """The part of a box on a picture of ``width`` x ``height`` px; None where it lies outside."""
    x1, y1 = max(0.0, box[0]), max(0.0, box[1])
    x2, y2 = min(float(width), box[2]), min(float(height), box[3])
    return None if x2 - x1 < LEAST_PX or y2 - y1 < LEAST_PX else (x1, y1, x2, y2)


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


def outward_px(box: BoxPx, width: int, height: int) -> tuple[int, int, int, int]:
    """The smallest whole-px box that holds ``box``, clipped to a picture or mask of ``width`` x ``height`` px."""
    x1, y1, x2, y2 = box
    return max(0, math.floor(x1)), max(0, math.floor(y1)), min(width, math.ceil(x2)), min(height, math.ceil(y2))


def rasterise(detection: Detection, window: tuple[int, int, int, int]) -> Tensor:
    """Draws one detection's mask over a window of its picture.

    Each px reads the mask through a triangle as wide as the px or the mask's own texel, whichever is wider, so masks
    finer and coarser than the picture are both resampled without shift. At its own resolution a mask is unchanged.

    Args:
        detection: its box is in px of the picture the window belongs to.
        window: x1, y1, x2, y2 in whole px.

    Returns:
        [y2-y1, x2-x1] float32 in 0..1, zero outside the box; a px the box covers in part gets its share.
    """
    x1, y1, x2, y2 = detection.box
    left, top, right, bottom = window
    share = _covered(y1, y2, top, bottom)[:, None] * _covered(x1, x2, left, right)[None, :]
    if detection.mask is None:
        return share
    mask = detection.mask.to(device="cpu", dtype=torch.float32)
    drawn = _resample_rows(mask, y1, y2, top, bottom)
    drawn = _resample_rows(drawn.T, x1, x2, left, right).T
    return drawn.clamp(0, 1).mul_(share)


def _covered(start: float, stop: float, first: int, last: int) -> Tensor:
    """[last-first]: the share of each px ``first..last-1`` inside the span."""
    px = torch.arange(first, last, dtype=torch.float64)
    return ((px + 1).clamp(max=stop) - px.clamp(min=start)).clamp(0, 1).float()


def _resample_rows(mask: Tensor, start: float, stop: float, first: int, last: int) -> Tensor:
    """Reads the rows of a mask [h,w], which span ``start..stop``, at px ``first..last-1``: [last-first,w]."""
    texels = mask.shape[0]
    per_px = texels / (stop - start)
    reach = max(1.0, per_px)
    px = torch.arange(first, last, dtype=torch.float64) + 0.5
    centres = ((px - start) * per_px - 0.5).clamp(0, texels - 1)
    if 2 * reach >= texels:  # a px reads most of the mask
        taps = torch.arange(texels).expand(len(px), -1)
    else:
        taps = ((centres - reach).floor().long() + 1)[:, None] + torch.arange(math.ceil(2 * reach))
    weights = (1 - (centres[:, None] - taps).abs() / reach).clamp(min=0).masked_fill((taps < 0) | (taps >= texels), 0)
    weights = (weights / weights.sum(dim=1, keepdim=True)).float()
    drawn = torch.zeros(last - first, mask.shape[1])
    for tap, weight in zip(taps.clamp(0, texels - 1).T, weights.T, strict=True):
        if weight.any():
            drawn.addcmul_(mask.index_select(0, tap), weight[:, None])
    return drawn
