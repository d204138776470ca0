"""Detections from boxes and the masks that come with them, above all as ComfyUI's own SAM3 nodes give both."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..errors import LunaInputError
from ..picture.boxes import Box, BoxPx, clip_box, format_box, outward_px, rescaled
from ..picture.detections import Detection, Detections
from .from_masks import (
    MASK_THRESHOLD,
    VISIBLE,
    Picture,
    as_masks,
    crop_mask,
    from_masks,
    to_picture_px,
    visible_box,
    without_background,
)
from .read_boxes import GivenBox

OWN_REACH = 0.5
"""How far a mask of a box's own may reach past it, as a fraction of the box's longer side."""


def from_boxes(
    boxes: Sequence[GivenBox], picture: Picture, masks: Tensor | None = None, label: str = "", name: str = "bboxes"
) -> tuple[Detections, tuple[str, ...]]:
    """Detections of boxes, with masks where they are given.

    Args:
        boxes: as ``parse_boxes`` gives them.
        picture: the picture batch.
        masks: [N,h,w], any size of the picture's aspect: one per box in the same order, or one per picture (or one
            for all) that covers all its boxes, or in each picture one more than it has boxes, before the others: that
            of SAM3's point prompts. Without boxes, as SAM3 gives for points or boxes alone, masks are detections.
        label: for boxes that bring none.
        name: of the input the boxes came by, for messages.

    Returns:
        The detections, picture by picture in the order of the boxes, and notices about what was left out, clipped or
        made of masks alone.

    Raises:
        LunaInputError: a box lies on a picture that does not exist, or the number of masks fits neither.
    """
    _check_places(boxes, picture, name)
    flat = None if masks is None else as_masks(masks, picture)
    cut = [_clipped(box, picture) for box in boxes]
    notices = _notices(boxes, cut, picture, name)
    if flat is not None and not boxes:
        return _of_masks_alone(flat, picture, label, name)
    own, shared, extra = _assign(flat, boxes, picture, name)
    items: list[Detection] = []
    alone = 0
    for image_index, places in enumerate(_by_picture(boxes, picture)):
        if extra:
            found = _single(extra[image_index], image_index, picture, label)
            items, alone = items + found, alone + len(found)
        for place in places:
            box, xyxy = boxes[place], cut[place]
            if box.is_empty or xyxy is None:
                continue
            mask = None
            if own:
                xyxy, mask = _cut_mask(own[place], xyxy, picture, own=True)
            elif shared:
                xyxy, mask = _cut_mask(shared[image_index], xyxy, picture, own=False)
            items.append(Detection(image_index, xyxy, mask, box.score, box.label or label))
    if alone:
        notices.append(f"masks: {alone} detections were made of masks alone, which come before those of {name}")
    if shared:
        notices += _left_over(items, shared, picture)
    return Detections(tuple(items), picture.width, picture.height, picture.image_count), tuple(notices)


def _check_places(boxes: Sequence[GivenBox], picture: Picture, name: str) -> None:
    for place, box in enumerate(boxes):
        if box.image_index is not None and box.image_index >= picture.image_count:
            raise LunaInputError(
                f"{name}: box {place} {format_box(box.xyxy)} is on picture {box.image_index}, image holds "
                f"{picture.image_count}"
            )


def _clipped(box: GivenBox, picture: Picture) -> BoxPx | None:
    """The part of a box on the picture; None where it lies outside."""
    if box.is_empty:
        return box.xyxy
    return clip_box(box.xyxy, picture.width, picture.height)


def _notices(boxes: Sequence[GivenBox], cut: Sequence[BoxPx | None], picture: Picture, name: str) -> list[str]:
    empty = sum(box.is_empty for box in boxes)
    outside = [place for place, xyxy in enumerate(cut) if xyxy is None]
    clipped = sum(xyxy is not None and xyxy != box.xyxy for box, xyxy in zip(boxes, cut, strict=True))
    notices = []
    if empty:
        notices.append(f"{name}: {empty} of {len(boxes)} boxes are empty and were left out")
    if outside:
        notices.append(
            f"{name}: {len(outside)} of {len(boxes)} boxes lie outside the {picture.width}x{picture.height} px picture "
            f"and were left out, first number {outside[0]} {format_box(boxes[outside[0]].xyxy)}: boxes are in px of "
            "the connected image, detect on this image"
        )
    if clipped:
        notices.append(f"{name}: {clipped} of {len(boxes)} reached over the picture's edge and were clipped")
    return notices


def _by_picture(boxes: Sequence[GivenBox], picture: Picture) -> list[list[int]]:
    """The places of the boxes of each picture, in order."""
    pictures: list[list[int]] = [[] for _ in range(picture.image_count)]
    for place, box in enumerate(boxes):
        for image_index in range(picture.image_count) if box.image_index is None else (box.image_index,):
            pictures[image_index].append(place)
    return pictures


def _of_masks_alone(flat: Tensor, picture: Picture, label: str, name: str) -> tuple[Detections, tuple[str, ...]]:
    """What SAM3 gives for points, or for boxes without words: masks and no boxes."""
    if len(flat) not in (0, 1, picture.image_count) and picture.image_count > 1:
        raise LunaInputError(
            f"masks holds {len(flat)}, {name} no box and image {picture.image_count} pictures: which mask is on which "
            "picture cannot be told. Switch individual_masks off at the detector, or give it one picture at a time"
        )
    found, notices = from_masks(flat, picture, label)
    if len(found):
        said = f"{name} holds no box: {len(found)} detections were made of masks alone"
        notices = (f"{said}, each with a score of 1", *notices)
    return found, notices


def _assign(
    flat: Tensor | None, boxes: Sequence[GivenBox], picture: Picture, name: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Which mask is whose: one for each box, or one for each picture, or one for each box and one more per picture.

    Raises:
        LunaInputError: the number of masks is none of these.
    """
    if flat is None:
        return [], [], []
    masks = [without_background(mask) for mask in flat]
    count, pictures = len(masks), picture.image_count
    if count == len(boxes) and (count != pictures or _all_fit(masks, boxes, picture)):
        return masks, [], []
    if count in (1, pictures):
        return [], masks * (pictures if count == 1 else 1), []
    if count == len(boxes) + pictures and (pictures == 1 or all(box.image_index is not None for box in boxes)):
        extra, own = _split_off_first(masks, _by_picture(boxes, picture), len(boxes))
        if _all_fit(own, boxes, picture):
            return own, [], extra
    raise LunaInputError(
        f"masks holds {count}, {name} {len(boxes)} boxes and image {pictures} pictures: "
        "give one mask per box, or one per picture (individual_masks off at ComfyUI's SAM3 Detect)"
    )


def _split_off_first(
    masks: Sequence[Tensor], by_picture: Sequence[Sequence[int]], count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The first mask of each picture, and those of the boxes by their places."""
    own: dict[int, Tensor] = {}
    extra = []
    rest = iter(masks)
    for places in by_picture:
        extra.append(next(rest))
        own.update((place, next(rest)) for place in places)
    return extra, [own[place] for place in range(count)]


def _all_fit(masks: Sequence[Tensor], boxes: Sequence[GivenBox], picture: Picture) -> bool:
    return all(_fits(mask, box, picture) for mask, box in zip(masks, boxes, strict=True))


def _fits(mask: Tensor, box: GivenBox, picture: Picture) -> bool:
    """Whether a mask covers a place within a box, or a little over it."""
    visible = visible_box(mask)
    if visible is None:
        return False
    x1, y1, x2, y2 = box.xyxy
    reach = OWN_REACH * max(x2 - x1, y2 - y1)
    left, top, right, bottom = to_picture_px(visible, mask, picture)
    return left >= x1 - reach and top >= y1 - reach and right <= x2 + reach and bottom <= y2 + reach


def _single(mask: Tensor, image_index: int, picture: Picture, label: str) -> list[Detection]:
    found = from_masks(mask, replace(picture, image_count=1), label)[0]
    return [replace(item, image_index=image_index) for item in found]


def _cut_mask(mask: Tensor, box: BoxPx, picture: Picture, own: bool) -> tuple[BoxPx, Tensor]:
    """The part of a mask that belongs to a box, and the box it spans exactly.

    A mask of the box's own may reach a little over it and is kept whole; one for all boxes is cut to the box.
    """
    window = _window(box, mask, picture)
    visible = visible_box(mask) if own else None
    if visible is not None:
        window = window.join(visible)
    return to_picture_px(window, mask, picture), crop_mask(mask, window)


def _window(box: BoxPx, mask: Tensor, picture: Picture) -> Box:
    """The px of a mask [H,W] that a box of the picture touches."""
    height, width = mask.shape
    return outward_px(rescaled(box, (picture.width, picture.height), (width, height)), width, height)


def _left_over(items: Sequence[Detection], shared: Sequence[Tensor], picture: Picture) -> list[str]:
    """What is said of areas of the pictures' masks that no box touches, such as the thing under a point prompt."""
    areas = 0
    found = Detections(tuple(items), picture.width, picture.height, picture.image_count)
    for mask, on_picture in zip(shared, found.by_image(), strict=True):
        numbers, count = ndimage.label((mask > max(VISIBLE, MASK_THRESHOLD)).numpy(), structure=np.ones((3, 3)))
        touched = torch.zeros(count + 1, dtype=torch.bool)
        for item in on_picture:
            window = _window(item.box, mask, picture)
            touched[np.unique(numbers[window.y1 : window.y2, window.x1 : window.x2])] = True
        areas += count - int(touched[1:].sum())
    if not areas:
        return []
    return [f"masks: {areas} area(s) that no box touches were left out: use Detections from Masks for them"]
