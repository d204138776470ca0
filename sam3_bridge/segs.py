"""SEGS, the detections of the Impact Pack, in and out; known by their fields, so that pack need not be installed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import LunaInputError
from .detections import BoxPx, Detection, Detections, check_box, check_score, outward_px, rasterise
from .from_masks import RANGE_SLACK, crop_mask, visible_box

WindowPx = tuple[int, int, int, int]
Segs = tuple[tuple[int, int], list[Any]]
"""((height, width), [SEG, …])"""


class SEG(NamedTuple):
    """One segment, with the fields every SEGS node reads.

    Attributes:
        cropped_image: the picture inside ``crop_region``, or None.
        cropped_mask: [h,w] float32 in 0..1 over ``crop_region``.
        confidence: 0..1.
        crop_region: x1, y1, x2, y2 in whole px: what a detailer cuts out.
        bbox: x1, y1, x2, y2 px: what was found.
        label: "" for none.
        control_net_wrapper: what another node attached, or None.
    """

    cropped_image: Any = None
    cropped_mask: Any = None
    confidence: float = 1.0
    crop_region: Sequence[int] = (0, 0, 0, 0)
    bbox: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    label: str = ""
    control_net_wrapper: Any = None


@dataclass(frozen=True, eq=False)
class SegOrigin:
    """The segment a detection came from, and what the detection looked like then."""

    seg: Any
    box: BoxPx
    mask: Tensor | None

    def still_is(self, item: Detection) -> bool:
        """Whether the detection is as it came, so that the segment itself can be handed back."""
        return item.box == self.box and item.mask is self.mask


def from_segs(segs: Any) -> tuple[Detections, tuple[str, ...]]:
    """Detections of SEGS, on one picture, in their order.

    Args:
        segs: ``((height, width), [SEG, …])``; any object with a SEG's fields will do.

    Returns:
        The detections, each with its segment as ``extra``, and notices.

    Raises:
        LunaInputError: it is no SEGS, or a segment's numbers are wrong.
    """
    width, height, entries = _read_header(segs)
    items = [_detection(seg, place, width, height) for place, seg in enumerate(entries)]
    notices = () if items else ("segs holds no segment",)
    return Detections(tuple(items), width, height), notices


def to_segs(detections: Detections, image_index: int = 0, crop_factor: float = 3.0) -> Segs:
    """SEGS of one picture's detections.

    A detection that came from SEGS and was not changed goes back as the very segment it was.

    Args:
        detections: of any number of pictures; SEGS know only one.
        image_index: the picture.
        crop_factor: side of a new segment's ``crop_region`` as a multiple of its box.

    Returns:
        ``((height, width), [SEG, …])``

    Raises:
        LunaInputError: there is no such picture, or the factor is below 1.
    """
    if not 0 <= image_index < detections.image_count:
        raise LunaInputError(
            f"image_index is {image_index}, detections are on {detections.image_count} picture(s), counted from 0"
        )
    if not crop_factor >= 1:
        raise LunaInputError(f"crop_factor is {crop_factor}: 1 (the box itself) or more is needed")
    items = detections.on_image(image_index)
    return (detections.height, detections.width), [_seg(item, detections, crop_factor) for item in items]


def _read_header(segs: Any) -> tuple[int, int, Sequence[Any]]:
    try:
        (height, width, *_), entries = segs
        width, height, entries = int(width), int(height), list(entries)
    except (TypeError, ValueError) as error:
        raise LunaInputError(
            f"segs is a {type(segs).__name__} that is no SEGS: ((height, width), [segment, …]) is needed"
        ) from error
    return width, height, entries


def _detection(seg: Any, place: int, width: int, height: int) -> Detection:
    name = f"segs: segment {place}"
    missing = [field for field in ("cropped_mask", "confidence", "crop_region", "bbox") if not hasattr(seg, field)]
    if missing:
        raise LunaInputError(f"{name} is a {type(seg).__name__} without {', '.join(missing)}: a SEG is needed")
    bbox = _numbers(seg.bbox, f"{name}: bbox")
    check_box(bbox, f"{name}: bbox")
    score = _score(seg.confidence, name)
    bbox = (max(0.0, bbox[0]), max(0.0, bbox[1]), min(float(width), bbox[2]), min(float(height), bbox[3]))
    if bbox[0] >= bbox[2] or bbox[1] >= bbox[3]:
        raise LunaInputError(f"{name}: bbox {list(seg.bbox)} lies outside the {width}x{height} px picture")
    box, mask = bbox, None
    if seg.cropped_mask is not None:
        region = _region(seg.crop_region, name, width, height)
        box, mask = _cut(_mask(seg.cropped_mask, region, name), bbox, region)
    label = str(getattr(seg, "label", None) or "")
    return Detection(0, box, mask, score, label, extra=SegOrigin(seg, box, mask))


def _cut(mask: Tensor, bbox: BoxPx, region: WindowPx) -> tuple[BoxPx, Tensor]:
    """The box and what the mask covers beyond it, in whole px, with the mask over exactly that."""
    left, top, right, bottom = region
    inside = (bbox[0] - left, bbox[1] - top, bbox[2] - left, bbox[3] - top)
    window = outward_px(inside, right - left, bottom - top)
    windows = [each for each in (window, visible_box(mask)) if each is not None and each[0] < each[2]]
    windows = [each for each in windows if each[1] < each[3]] or [(0, 0, right - left, bottom - top)]
    x1, y1 = min(each[0] for each in windows), min(each[1] for each in windows)
    x2, y2 = max(each[2] for each in windows), max(each[3] for each in windows)
    return (
        (float(x1 + left), float(y1 + top), float(x2 + left), float(y2 + top)),
        crop_mask(mask, (x1, y1, x2, y2)),
    )


def _region(given: Any, name: str, width: int, height: int) -> WindowPx:
    numbers = _numbers(given, f"{name}: crop_region")
    check_box(numbers, f"{name}: crop_region")
    x1, y1, x2, y2 = (round(value) for value in numbers)
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise LunaInputError(f"{name}: crop_region {[x1, y1, x2, y2]} reaches outside the {width}x{height} px picture")
    return x1, y1, x2, y2


def _mask(given: Any, region: WindowPx, name: str) -> Tensor:
    mask = given if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    wanted = (region[3] - region[1], region[2] - region[0])
    if tuple(mask.shape) != wanted:
        raise LunaInputError(
            f"{name}: cropped_mask has shape {list(mask.shape)}, its crop_region {list(region)} needs {list(wanted)}"
        )
    scale = 1.0 if mask.is_floating_point() or mask.dtype == torch.bool else 255.0
    mask = mask.detach().to(device="cpu", dtype=torch.float32) / scale
    if not bool(((mask >= -RANGE_SLACK) & (mask <= 1 + RANGE_SLACK)).all()):
        raise LunaInputError(f"{name}: cropped_mask holds values outside 0..1")
    return mask.clamp(0, 1)


def _numbers(given: Any, name: str) -> BoxPx:
    try:
        x1, y1, x2, y2 = (float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise LunaInputError(f"{name} is {given!r}: four numbers x1, y1, x2, y2 are needed") from error
    return x1, y1, x2, y2


def _score(given: Any, name: str) -> float:
    try:
        score = float(np.asarray(given).reshape(()))
    except (TypeError, ValueError) as error:
        raise LunaInputError(f"{name}: confidence is {given!r}: a number from 0 to 1 is needed") from error
    check_score(score, f"{name}: confidence")
    return score


def _seg(item: Detection, pictures: Detections, crop_factor: float) -> Any:
    origin = item.extra if isinstance(item.extra, SegOrigin) else None
    if origin is not None and origin.still_is(item):
        return origin.seg
    region = crop_region(item.box, crop_factor, pictures.width, pictures.height)
    mask = rasterise(item, region).numpy()
    wrapper = None if origin is None else getattr(origin.seg, "control_net_wrapper", None)
    return SEG(None, mask, item.score, region, item.box, item.label, wrapper)


def crop_region(box: BoxPx, factor: float, width: int, height: int) -> WindowPx:
    """A window ``factor`` times the box around its centre, in whole px, shifted inward at the picture's edge."""
    x1, x2 = _stretch(box[0], box[2], factor, width)
    y1, y2 = _stretch(box[1], box[3], factor, height)
    return x1, y1, x2, y2


def _stretch(low: float, high: float, factor: float, limit: int) -> tuple[int, int]:
    length = min(limit, math.ceil((high - low) * factor) + 1)  # a px more: a box at a fraction of a px stays inside
    start = math.floor((low + high - length) / 2 + 0.5)
    start = max(0, min(start, limit - length))
    return min(start, math.floor(low)), max(start + length, min(limit, math.ceil(high)))
