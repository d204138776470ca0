"""Detections from mask pictures: one per mask or one per island, each cropped to what it covers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..errors import LunaInputError
from ..picture.boxes import Box, BoxPx, rescaled
from ..picture.detections import MOST_DETECTIONS, Detection, Detections, same_aspect
from ..values import fraction, shown

VISIBLE = 0.5 / 255
"""Mask values below half an 8-bit level are resampling noise, not mask."""

RANGE_SLACK = 1e-3
"""Overshoot of 0..1 that resampling leaves and that is clamped away."""

MASK_THRESHOLD = 0.1
"""Values up to this are a mask's soft edge or its background, not what it covers."""

SOFT_EDGE = 64
"""A soft edge reaches this part of a mask's longer side past what the mask covers; beyond lies the background."""

MOST_BYTES = 2 * 2**30
"""Of the masks of islands that lie around each other, each of which needs its whole box."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Picture:
    """The picture batch detections are made for: px and number of pictures."""

    width: int
    height: int
    image_count: int


def as_masks(masks: Tensor, picture: Picture, name: str = "masks") -> Tensor:
    """Checks masks and brings them to [N,H,W] float32 in 0..1 on the CPU.

    Args:
        masks: [H,W], [N,H,W], or more leading dimensions, which are flattened; floats in 0..1, or whole numbers or
            booleans in 0..1 or 0..255.
        picture: the picture the masks belong to; their size may be another of the same aspect, or any where nothing
            is drawn.
        name: of the input, for messages.

    Raises:
        LunaInputError: wrong shape, another aspect than the picture, or values that are no mask.
    """
    flat = mask_batch(masks, name)
    height, width = flat.shape[1:]
    nothing_drawn = not len(flat) or not flat.any()  # Load Image gives 64x64 zeros for a picture without alpha
    if not nothing_drawn and not same_aspect(width, height, picture.width, picture.height):
        raise LunaInputError(
            f"{name} has {width}x{height} px, image has {picture.width}x{picture.height} px: the aspect is another, "
            "so they do not belong together. Use masks made from this image"
        )
    return flat


def mask_batch(masks: Tensor, name: str) -> Tensor:
    """Masks of any size as [N,H,W] float32 in 0..1 on the CPU; as ``as_masks``, but for no picture.

    Raises:
        LunaInputError: wrong shape, or values that are no mask.
    """
    if not isinstance(masks, Tensor):
        raise LunaInputError(f"{name} is {shown(masks)}: a mask batch [N,H,W] is needed")
    if masks.ndim < 2 or 0 in masks.shape[-2:]:
        raise LunaInputError(f"{name} has shape {list(masks.shape)}: a mask batch [N,H,W] is needed")
    flat = plain_numbers(masks, name).reshape(-1, *masks.shape[-2:])
    for index, mask in enumerate(flat):
        check_range(mask, f"{name}: mask {index} holds values")
    return flat


def plain_numbers(mask: Tensor, name: str) -> Tensor:
    """A mask as float32 on the CPU; whole numbers of 0..255 become 0..1.

    Raises:
        LunaInputError: it holds no real numbers, or is no plain tensor.
    """
    if mask.layout != torch.strided or mask.device.type == "meta" or mask.dtype not in _FLOATS + _WHOLE:
        raise LunaInputError(f"{name} is a {mask.layout} tensor of {mask.dtype}: a float mask from 0 to 1 is needed")
    flat = mask.detach().to(device="cpu", dtype=torch.float32)
    if mask.dtype in _WHOLE and flat.numel() and 1 < float(flat.amax()) <= 255:
        flat = flat / 255
    return flat


def check_range(mask: Tensor, name: str) -> None:
    """Raises LunaInputError unless all values of a mask are numbers in 0..1, but for the overshoot of a resampling."""
    low, high = (float(value) for value in torch.aminmax(mask))
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):  # also true for NaN
        raise LunaInputError(f"{name} from {low:.4g} to {high:.4g}: finite values from 0 to 1 are needed")


def visible_box(mask: Tensor) -> Box | None:
    """The smallest box (px of the mask) around what a mask [H,W] covers; None when it covers nothing."""
    covered = mask > VISIBLE
    rows = covered.any(dim=1).nonzero()
    if len(rows) == 0:
        return None
    columns = covered.any(dim=0).nonzero()
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def without_background(mask: Tensor, threshold: float = MASK_THRESHOLD) -> Tensor:
    """A mask [H,W] without what is faint and lies apart; all other values, soft edges above all, stay as they are.

    Px above the threshold are covered. Fainter ones are the soft edge of what is covered where they lie near it and
    above what lies farther away, the background: a detector's haze or a heat map would make the whole picture the
    region.
    """
    faint = (mask > VISIBLE) & (mask <= threshold)
    if not faint.any():
        return mask
    reach = max(1, round(max(mask.shape) / SOFT_EDGE))
    near = torch.from_numpy(ndimage.maximum_filter((mask > threshold).numpy(), size=2 * reach + 1, mode="constant"))
    background = mask.masked_fill(near, 0).amax()
    return mask * (near & (mask > background))


def crop_mask(mask: Tensor, window: Box) -> Tensor:
    """A copy of a window (px of the mask) of a mask [H,W], so that the whole mask is not kept alive."""
    return mask[window.y1 : window.y2, window.x1 : window.x2].clamp(0, 1).clone()


def to_picture_px(window: Box, mask: Tensor, picture: Picture) -> BoxPx:
    """A window in px of a mask [H,W] as a box in px of the picture."""
    return rescaled(window, (mask.shape[1], mask.shape[0]), (picture.width, picture.height))


def from_masks(
    masks: Tensor,
    picture: Picture,
    label: str = "",
    split_islands: bool = False,
    mask_threshold: float = MASK_THRESHOLD,
) -> tuple[Detections, tuple[str, ...]]:
    """One detection per mask, or per island of each mask.

    Args:
        masks: [H,W] or [N,H,W] in 0..1; N masks on one picture are N detections on it, N masks on N pictures
            lie one on each, one mask on N pictures lies on each of them.
        picture: the picture batch.
        label: of all detections.
        split_islands: every connected area of a mask becomes its own detection.
        mask_threshold: values above it are covered; see ``without_background``.

    Returns:
        The detections in the order of the masks (islands from top to bottom), and notices about what was left out.

    Raises:
        LunaInputError: the counts do not fit, or a mask cannot be used.
    """
    threshold = fraction(mask_threshold, "mask_threshold")
    flat = as_masks(masks, picture)
    count, pictures = len(flat), picture.image_count
    if count == 0:
        return Detections((), picture.width, picture.height, pictures), ("masks holds none: nothing is detected",)
    if pictures > 1 and count not in (1, pictures):
        raise LunaInputError(
            f"masks holds {count} and image {pictures}: give one mask for all pictures or one for each, "
            "or any number of masks for a single picture"
        )
    notices = list(_faint_notices(flat, threshold))
    items: list[Detection] = []
    islands = 0
    for index, given in enumerate(flat):
        mask = without_background(given, threshold)
        parts, found = _islands(mask) if split_islands else _whole(mask)
        islands = max(islands, found)
        on = range(pictures) if count == 1 else (index if pictures > 1 else 0,)
        items += [
            Detection(image_index, to_picture_px(window, mask, picture), part, label=label)
            for image_index in on
            for window, part in parts
        ]
    if islands > MOST_DETECTIONS:
        notices.append(f"masks: {islands} islands, the {MOST_DETECTIONS} largest were kept")
    return Detections(tuple(items), picture.width, picture.height, pictures), tuple(notices)


def _faint_notices(flat: Tensor, threshold: float) -> Sequence[str]:
    """What is said of masks [N,H,W] that are empty, wholly faint, or mostly faint."""
    empty, nothing, mostly = [], [], []
    for index, mask in enumerate(flat):
        visible, covered = int((mask > VISIBLE).sum()), int((mask > max(threshold, VISIBLE)).sum())
        if not visible:
            empty.append(index)
        elif not covered:
            nothing.append(index)
        elif covered < visible - covered:
            mostly.append(index)
    lines = {
        f"masks: {_numbers(empty)} of {len(flat)} empty, skipped": empty,
        f"masks: nothing of {_numbers(nothing)} is above mask_threshold {threshold:g}, left out: lower it": nothing,
        f"masks: most of {_numbers(mostly)} is not above mask_threshold {threshold:g} and was taken for background: "
        "lower it if that is too little, raise it if the regions are too large": mostly,
    }
    return [line for line, indices in lines.items() if indices]


def _whole(mask: Tensor) -> tuple[list[tuple[Box, Tensor]], int]:
    window = visible_box(mask)
    return ([] if window is None else [(window, crop_mask(mask, window))]), 1


def _islands(mask: Tensor) -> tuple[list[tuple[Box, Tensor]], int]:
    """The connected areas (diagonals count) of a mask [H,W], each with its window, and how many there are.

    Soft values are kept; of very many areas the largest.
    """
    numbers, count = ndimage.label((mask > VISIBLE).numpy(), structure=np.ones((3, 3)))
    places: list[Any] = ndimage.find_objects(numbers)
    kept = range(1, count + 1)
    if count > MOST_DETECTIONS:
        areas = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
        kept = np.sort(np.argsort(-areas, kind="stable")[:MOST_DETECTIONS] + 1).tolist()
    windows = {number: _window(places[number - 1]) for number in kept}
    bytes_needed = 4 * sum(window.width * window.height for window in windows.values())
    if bytes_needed > max(MOST_BYTES, 8 * mask.nbytes):
        raise LunaInputError(
            f"masks: {len(windows)} islands lie around each other, their masks would take "
            f"{bytes_needed / 2**30:.1f} GiB: switch split_islands off, or use a smaller mask"
        )
    parts = []
    for number, window in windows.items():
        own = torch.from_numpy(numbers[window.y1 : window.y2, window.x1 : window.x2] == number)
        parts.append((window, crop_mask(mask, window).mul_(own)))
    return parts, count


def _window(place: tuple[slice, slice]) -> Box:
    rows, columns = place
    return Box(columns.start, rows.start, columns.stop, rows.stop)


def _numbers(indices: list[int]) -> str:
    shown_ones = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"number {shown_ones}"
