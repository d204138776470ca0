"""From SAM3's raw outputs to detections: scores, boxes and masks in their place, exclusions, overlaps and limits."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..picture.boxes import BoxPx, outward_px, picture_box, rescaled
from ..picture.detections import Detection, Detections
from ..picture.masks import rasterise
from .concepts import Concept
from .from_masks import Picture, crop_mask, to_picture_px, visible_box
from .overlaps import without_overlaps

FINER = 4
"""How much finer than SAM3's own grid a mask's edge is kept: the logits between two texels say where it runs."""

LEAST_LEFT = 0.1
"""A detection that keeps less than this of its mask is the excluded thing itself."""

Outputs = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""What SAM3 gives for one concept on one picture: logits, presence, boxes and masks, as ``read_outputs`` takes them."""

MaskCut = Callable[[Tensor, BoxPx, Picture], tuple[BoxPx, Tensor] | None]
"""From mask logits [h,w] over the whole picture and a box (px) to what is kept: box and mask; None if it is empty."""


def collect(
    look: Callable[[int], Iterable[tuple[Concept, Outputs]]],
    concepts: Sequence[Concept],
    picture: Picture,
    threshold: float,
    max_detections: int,
    nms_iou: float,
    cut: MaskCut | None = None,
) -> tuple[Detections, tuple[str, ...]]:
    """What is found of all concepts on every picture of a batch.

    Args:
        look: gives, for the number of a picture, the outputs of every concept in order.
        concepts: what is looked for and left out.
        picture: the picture batch.
        threshold, cut: see ``read_outputs``.
        max_detections, nms_iou: see ``arrange``.

    Returns:
        The detections, picture by picture in the order of the concepts, and notices.
    """
    items: list[Detection] = []
    dropped = 0
    for index in range(picture.image_count):
        found: list[tuple[Concept, list[Detection]]] = []
        for concept, outputs in look(index):
            kept, empty = read_outputs(concept, *outputs, picture, index, threshold, cut)
            found.append((concept, kept))
            dropped += empty
        items += arrange(found, nms_iou, max_detections)
    notices = []
    if dropped:
        notices.append(f"{dropped} detection(s) had an empty mask or box and were left out")
    if not items:
        names = ", ".join(concept.text for concept in concepts if not concept.excluded)
        notices.append(f"nothing of {names} was found above a score of {threshold:g}")
    return Detections(tuple(items), picture.width, picture.height, picture.image_count), tuple(notices)


def read_outputs(
    concept: Concept,
    logits: Tensor,
    presence: Tensor | None,
    boxes: Tensor,
    masks: Tensor,
    picture: Picture,
    image_index: int,
    threshold: float,
    cut: MaskCut | None = None,
) -> tuple[list[Detection], int]:
    """The detections of one concept on one picture, the best first.

    SAM3 sees the picture squashed to a square, so its coordinates are fractions of the picture's own sides. The score
    is that of the query times that of the concept being in the picture at all, as in transformers' post-processing.

    Args:
        concept: what was looked for.
        logits: [Q] of the queries.
        presence: [1] logit of the concept, or None.
        boxes: [Q,4] x1, y1, x2, y2 as fractions of the picture.
        masks: [Q,h,w] logits over the whole picture.
        picture: its size, px.
        image_index: which picture of the batch.
        threshold: scores at or below it are dropped.
        cut: how a mask is cut to its box; ``cut_finer`` by default.

    Returns:
        The detections, and how many were dropped because their mask or box was empty.
    """
    scores = logits.float().sigmoid()
    if presence is not None:
        scores = scores * presence.float().sigmoid()
    found = (scores > threshold).nonzero().flatten()
    found = found[scores[found].argsort(descending=True, stable=True)]
    scores, boxes, masks = (given[found].float().cpu() for given in (scores, boxes, masks))
    items, empty = [], 0
    for score, corners, mask in zip(scores.tolist(), boxes.tolist(), masks, strict=True):
        box = _to_px(corners, picture)
        part = None if box is None else (cut or cut_finer)(mask, box, picture)
        if part is None:
            empty += 1
        else:
            items.append(Detection(image_index, *part, score, concept.text))
    return items, empty


def arrange(
    found: Sequence[tuple[Concept, Sequence[Detection]]], nms_iou: float, max_detections: int
) -> list[Detection]:
    """What is kept of one picture: exclusions taken out, overlaps resolved across concepts, limits kept.

    Args:
        found: the detections of each concept, the best first.
        nms_iou: of two that overlap more than this the lower score goes.
        max_detections: the best so many of all; 0 for all.

    Returns:
        In the order of the concepts, and within each the best first.
    """
    excluded = [item for concept, items in found if concept.excluded for item in items]
    left = [without(item, excluded) for concept, items in found if not concept.excluded for item in items]
    kept = without_overlaps([item for item in left if item is not None], nms_iou)
    limits = {concept.text: concept.limit for concept, _ in found}
    counts: dict[str, int] = {}
    limited = []
    for item in kept:
        counts[item.label] = counts.get(item.label, 0) + 1
        if limits[item.label] == 0 or counts[item.label] <= limits[item.label]:
            limited.append(item)
    if max_detections == 0 or len(limited) <= max_detections:
        return limited
    best = sorted(range(len(limited)), key=lambda place: -limited[place].score)[:max_detections]
    return [limited[place] for place in sorted(best)]


def without(item: Detection, excluded: Sequence[Detection]) -> Detection | None:
    """A detection with other things cut out of its mask, its box drawn in to what is left; None when hardly any is."""
    x1, y1, x2, y2 = item.box
    reaching = [
        other
        for other in excluded
        if other.box[0] < x2 and other.box[2] > x1 and other.box[1] < y2 and other.box[3] > y1
    ]
    if not reaching:
        return item
    mask = torch.ones(math.ceil(item.height), math.ceil(item.width)) if item.mask is None else item.mask.clone()
    before = float(mask.sum())
    height, width = mask.shape
    for other in reaching:
        place = _within(other.box, item.box, width, height)
        mask *= 1 - rasterise(place, other.mask, picture_box(width, height))
    window = visible_box(mask)
    if window is None or float(mask.sum()) < LEAST_LEFT * before:
        return None
    left, top, right, bottom = to_picture_px(window, mask, Picture(1, 1, 1))
    box = (x1 + left * item.width, y1 + top * item.height, x1 + right * item.width, y1 + bottom * item.height)
    return replace(item, box=box, mask=crop_mask(mask, window))


def _to_px(corners: Sequence[float], picture: Picture) -> BoxPx | None:
    """A box of fractions in px, clipped to the picture; None when nothing of it is left."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in corners)
    if not (x1 < x2 and y1 < y2):  # also true for NaN
        return None
    return x1 * picture.width, y1 * picture.height, x2 * picture.width, y2 * picture.height


def cut_finer(logits: Tensor, box: BoxPx, picture: Picture) -> tuple[BoxPx, Tensor] | None:
    """The mask [h,w] of 0 and 1 over a box (px), on a grid ``FINER`` than its logits'; None where it is empty."""
    height, width = logits.shape
    finer_x = max(1, min(FINER, math.ceil(picture.width / width)))
    finer_y = max(1, min(FINER, math.ceil(picture.height / height)))
    columns = max(1, math.ceil((box[2] - box[0]) / picture.width * width * finer_x))
    rows = max(1, math.ceil((box[3] - box[1]) / picture.height * height * finer_y))
    whole = _within((0.0, 0.0, float(picture.width), float(picture.height)), box, columns, rows)
    likely = rasterise(whole, logits.sigmoid(), picture_box(columns, rows))
    mask = (likely > 0.5).float()
    return (box, mask) if bool(mask.any()) else None


def cut_px(logits: Tensor, box: BoxPx, picture: Picture) -> tuple[BoxPx, Tensor] | None:
    """The mask over the whole px a box touches, px for px as ComfyUI's own SAM3 draws it; None where it is empty.

    ComfyUI enlarges the logits [h,w] to the picture, bilinearly, and takes those above 0.
    """
    x1, y1, x2, y2 = outward_px(box, picture.width, picture.height)
    size = (picture.height, picture.width)
    drawn = functional.interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    mask = (drawn[y1:y2, x1:x2] > 0).float()
    return ((float(x1), float(y1), float(x2), float(y2)), mask) if bool(mask.any()) else None


def _within(box: BoxPx, frame: BoxPx, width: int, height: int) -> BoxPx:
    """A box (px) in texels of a grid of ``width`` x ``height`` that spans ``frame`` (px)."""
    left, top, right, bottom = frame
    inside = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return rescaled(inside, (right - left, bottom - top), (width, height))
