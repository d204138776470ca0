"""Detections from mask pictures: one per mask or one per island, each cropped to what it covers."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..errors import LunaInputError
from .detections import VISIBLE, BoxPx, Detection, Detections, same_aspect

RANGE_SLACK = 1e-3
"""Overshoot of 0..1 that resampling leaves and that is clamped away."""


@dataclass(frozen=True)
class Picture:
    """The picture batch detections are made for: px and number of pictures."""

    width: int
    height: int
    image_count: int


def as_masks(masks: Tensor, picture: Picture, name: str = "masks") -> Tensor:
    """Checks masks and brings them to [N,H,W] float32 in 0..1 on the CPU.

    Args:
        masks: [H,W], [N,H,W], or more leading dimensions, which are flattened.
        picture: the picture the masks belong to; their size may be another of the same aspect.
        name: of the input, for messages.

    Raises:
        LunaInputError: wrong shape, another aspect than the picture, or values that are no mask.
    """
    if masks.ndim < 2 or 0 in masks.shape[-2:]:
        raise LunaInputError(f"{name} has shape {list(masks.shape)}: a mask batch [N,H,W] is needed")
    flat = masks.reshape(-1, *masks.shape[-2:]).to(device="cpu", dtype=torch.float32)
    height, width = flat.shape[1:]
    nothing_drawn = not flat.any()  # Load Image gives 64x64 zeros for a picture without alpha
    if not nothing_drawn and not same_aspect(width, height, picture.width, picture.height):
        raise LunaInputError(
            f"{name} has {width}x{height} px, image has {picture.width}x{picture.height} px: the aspect is another, "
            "so they do not belong together. Use masks made from this image"
        )
    for index, mask in enumerate(flat):
        low, high = (float(value) for value in torch.aminmax(mask))
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):  # also true for NaN
            raise LunaInputError(
                f"{name}: mask {index} holds values from {low:.4g} to {high:.4g}: finite values from 0 to 1 are needed"
            )
    return flat


def visible_box(mask: Tensor) -> tuple[int, int, int, int] | None:
    """The smallest box x1, y1, x2, y2 (px of the mask) around what a mask [H,W] covers; None when it covers nothing."""
    covered = mask > VISIBLE
    rows = covered.any(dim=1).nonzero()
    if len(rows) == 0:
        return None
    columns = covered.any(dim=0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def crop_mask(mask: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """A copy of a window (px of the mask) of a mask [H,W], so that the whole mask is not kept alive."""
    x1, y1, x2, y2 = window
    return mask[y1:y2, x1:x2].clamp(0, 1).clone()


def to_picture_px(window: tuple[int, int, int, int], mask: Tensor, picture: Picture) -> BoxPx:
    """A window in px of a mask [H,W] as a box in px of the picture."""
    height, width = mask.shape
    x1, y1, x2, y2 = window
    return (
        x1 * picture.width / width,
        y1 * picture.height / height,
        x2 * picture.width / width,
        y2 * picture.height / height,
    )


def from_masks(
    masks: Tensor, picture: Picture, label: str = "", split_islands: bool = False
) -> tuple[Detections, tuple[str, ...]]:
    """One detection per mask, or per island of each mask.

    Args:
        masks: [H,W] or [N,H,W] in 0..1; N masks on one picture are N detections on it, N masks on N pictures
            lie one on each.
        picture: the picture batch.
        label: of all detections.
        split_islands: every connected area of a mask becomes its own detection.

    Returns:
        The detections in the order of the masks (islands from top to bottom), and notices about what was skipped.

    Raises:
        LunaInputError: the counts do not fit, or a mask cannot be used.
    """
    flat = as_masks(masks, picture)
    count = len(flat)
    if picture.image_count > 1 and count != picture.image_count:
        raise LunaInputError(
            f"masks holds {count} and image {picture.image_count}: give one mask per picture, "
            "or any number of masks for a single picture"
        )
    items: list[Detection] = []
    empty: list[int] = []
    for index, mask in enumerate(flat):
        image_index = index if picture.image_count > 1 else 0
        parts = _islands(mask) if split_islands else _whole(mask)
        if not parts:
            empty.append(index)
        items += [
            Detection(image_index, to_picture_px(window, mask, picture), part, label=label) for window, part in parts
        ]
    notices = (f"masks: {_numbers(empty)} of {count} empty, skipped",) if empty else ()
    return Detections(tuple(items), picture.width, picture.height, picture.image_count), notices


def _whole(mask: Tensor) -> list[tuple[tuple[int, int, int, int], Tensor]]:
    window = visible_box(mask)
    return [] if window is None else [(window, crop_mask(mask, window))]


def _islands(mask: Tensor) -> list[tuple[tuple[int, int, int, int], Tensor]]:
    """The connected areas (diagonals count) of a mask [H,W], each with its window; soft values are kept."""
    numbers, _ = ndimage.label((mask > VISIBLE).numpy(), structure=np.ones((3, 3)))
    parts = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), start=1):
        window = (columns.start, rows.start, columns.stop, rows.stop)
        own = torch.from_numpy(numbers[rows, columns] == number)
        parts.append((window, crop_mask(mask, window) * own))
    return parts


def _numbers(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"number {shown}"
