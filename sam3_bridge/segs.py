"""SEGS, the detections of the Impact Pack, in and out; known by their fields, so that pack need not be installed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import LunaInputError
from ..picture.boxes import Box, BoxPx, check_box, clip_box, outward_px, picture_box, place_span
from ..picture.detections import MOST_AREA_PX, MOST_SIDE_PX, Detection, Detections, check_score
from ..picture.masks import rasterise
from ..values import real, shown, whole
from .from_masks import check_range, crop_mask, plain_numbers, visible_box, without_background
from .read_boxes import read_label

Segs = tuple[tuple[int, int], list[Any]]
"""((height, width), [SEG, …])"""

MOST_BYTES = 8 * 2**30
"""Of the masks of SEGS: their format wants one for each whole crop region."""


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
        segs: ``((height, width), [SEG, …])``; any object with a SEG's fields will do. ``((0, 0), [])``, which stands
            for nothing, is nothing on pictures of unknown size.

    Returns:
        The detections, each with its segment as ``extra``, and notices.

    Raises:
        LunaInputError: it is no SEGS, or a segment's numbers are wrong.
    """
    width, height, entries = _read_header(segs)
    found = [_detection(seg, place, width, height) for place, seg in enumerate(entries)]
    outside = [place for place, item in enumerate(found) if item is None]
    notices = []
    if not entries:
        notices.append("segs holds no segment")
    if outside:
        notices.append(
            f"segs: {len(outside)} of {len(entries)} segments lie outside the {width}x{height} px picture and were "
            f"left out, first number {outside[0]}"
        )
    return Detections(tuple(item for item in found if item is not None), width, height), tuple(notices)


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
        LunaInputError: there is no such picture, the factor is below 1, or the masks would not fit in memory.
    """
    image_index, crop_factor = whole(image_index, "image_index"), real(crop_factor, "crop_factor")
    if image_index >= detections.image_count:
        raise LunaInputError(
            f"image_index is {image_index}, detections are on {detections.image_count} picture(s), counted from 0"
        )
    if not crop_factor >= 1:
        raise LunaInputError(f"crop_factor is {crop_factor}: 1 (the box itself) or more is needed")
    items = detections.on_image(image_index)
    new = [item for item in items if _unchanged(item) is None]
    sizes = [crop_region(item.box, crop_factor, detections.width, detections.height) for item in new]
    needed = 4 * sum(size.width * size.height for size in sizes)
    if needed > MOST_BYTES:
        raise LunaInputError(
            f"crop_factor is {crop_factor:g}: the masks of {len(new)} segments would take {needed / 2**30:.1f} GiB, "
            "for SEGS hold one for each whole crop region. Lower it, or filter the detections first"
        )
    return (detections.height, detections.width), [_seg(item, detections, crop_factor) for item in items]


def _read_header(segs: Any) -> tuple[int, int, Sequence[Any]]:
    no_segs = f"segs is a {type(segs).__name__} that is no SEGS: ((height, width), [segment, …]) is needed"
    try:
        (height, width, *_), entries = segs
    except (TypeError, ValueError, RuntimeError) as error:
        raise LunaInputError(no_segs) from error
    if not isinstance(entries, list | tuple) or isinstance(height, str):
        raise LunaInputError(no_segs)
    width, height = whole(width, "segs: width"), whole(height, "segs: height")
    if (width == 0 or height == 0) and not (width == height == len(entries) == 0):
        raise LunaInputError(f"segs holds {len(entries)} segments on a picture of {width}x{height} px: detect again")
    if width > MOST_SIDE_PX or height > MOST_SIDE_PX or width * height > MOST_AREA_PX:
        raise LunaInputError(f"segs claims a picture of {width}x{height} px, which is larger than any")
    return width, height, entries


def _detection(seg: Any, place: int, width: int, height: int) -> Detection | None:
    """A segment as a detection; None where it lies outside the picture."""
    name = f"segs: segment {place}"
    missing = [field for field in ("cropped_mask", "confidence", "crop_region", "bbox") if not hasattr(seg, field)]
    if missing:
        raise LunaInputError(f"{name} is a {type(seg).__name__} without {', '.join(missing)}: a SEG is needed")
    score = _score(seg.confidence, name)
    bbox = clip_box(_numbers(seg.bbox, f"{name}: bbox"), width, height)
    if bbox is None:
        return None
    box, mask = bbox, None
    if seg.cropped_mask is not None:
        region = _region(seg.crop_region, name, width, height)
        box, mask = _cut(without_background(_mask(seg.cropped_mask, region, name)), bbox, region)
    label = read_label(getattr(seg, "label", None), name)
    return Detection(0, box, mask, score, label, extra=SegOrigin(seg, box, mask))


def _cut(mask: Tensor, bbox: BoxPx, region: Box) -> tuple[BoxPx, Tensor]:
    """The box and what the mask covers beyond it, in whole px, with the mask over exactly that."""
    found, visible = Box.around(bbox).intersect(region).relative_to(region), visible_box(mask)
    windows = [each for each in (found, visible) if each is not None and not each.is_empty]
    window = windows[0].join(windows[-1]) if windows else picture_box(region.width, region.height)
    left, top = region.x1, region.y1
    box = (float(window.x1 + left), float(window.y1 + top), float(window.x2 + left), float(window.y2 + top))
    return box, crop_mask(mask, window)


def _region(given: Any, name: str, width: int, height: int) -> Box:
    x1, y1, x2, y2 = (round(value) for value in _numbers(given, f"{name}: crop_region"))
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise LunaInputError(f"{name}: crop_region {[x1, y1, x2, y2]} reaches outside the {width}x{height} px picture")
    return Box(x1, y1, x2, y2)


def _mask(given: Any, region: Box, name: str) -> Tensor:
    """A segment's mask [h,w] over its region as float32 in 0..1."""
    name = f"{name}: cropped_mask"
    mask = given if isinstance(given, Tensor) else _tensor(given, name)
    if mask.ndim == 3:
        mask = mask[0] if mask.shape[0] == 1 else mask[..., 0] if mask.shape[2] == 1 else mask
    wanted = (region.height, region.width)
    if tuple(mask.shape) != wanted or 0 in wanted:
        raise LunaInputError(
            f"{name} has shape {list(mask.shape)}, its crop_region {list(region)} needs {list(wanted)}"
        )
    mask = plain_numbers(mask, name)
    check_range(mask, f"{name} holds values outside 0..1,")
    return mask.clamp(0, 1)


def _tensor(given: Any, name: str) -> Tensor:
    """An array of any layout and byte order as a tensor of PyTorch's own."""
    wanted = f"{name} is {shown(given)}: an array [h,w] of numbers is needed"
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists and the like
        raise LunaInputError(wanted) from error
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3):
        raise LunaInputError(wanted)
    whole_numbers = array.dtype.kind in "bui"
    with np.errstate(over="ignore"):  # what leaves float32 becomes infinite and is refused for it
        return torch.from_numpy(np.array(array, dtype=np.int64 if whole_numbers else np.float32, order="C"))


def _numbers(given: Any, name: str) -> BoxPx:
    """Four finite numbers of a box that is neither reversed nor empty."""
    try:
        row = [] if isinstance(given, str) else list(given)
    except TypeError:
        row = []
    if len(row) != 4:
        raise LunaInputError(f"{name} is {shown(given)}: four numbers x1, y1, x2, y2 are needed")
    x1, y1, x2, y2 = (real(value, f"{name}: number {place}") for place, value in enumerate(row))
    check_box((x1, y1, x2, y2), name)
    return x1, y1, x2, y2


def _score(given: Any, name: str) -> float:
    name = f"{name}: confidence"
    if isinstance(given, float):
        check_score(given, name)
    score = real(given, name)
    check_score(score, name)
    return score


def _unchanged(item: Detection) -> Any:
    """The segment a detection came from, where it is as it came."""
    origin = item.extra
    return origin.seg if isinstance(origin, SegOrigin) and origin.still_is(item) else None


def _seg(item: Detection, pictures: Detections, crop_factor: float) -> Any:
    unchanged = _unchanged(item)
    if unchanged is not None:
        return unchanged
    origin = item.extra if isinstance(item.extra, SegOrigin) else None
    region = crop_region(item.box, crop_factor, pictures.width, pictures.height)
    mask = rasterise(item.box, item.mask, region).numpy()
    wrapper = None if origin is None else getattr(origin.seg, "control_net_wrapper", None)
    return SEG(None, mask, item.score, tuple(region), item.box, item.label, wrapper)


def crop_region(box: BoxPx, factor: float, width: int, height: int) -> Box:
    """A window ``factor`` times the box around its centre, in whole px, shifted inward at the picture's edge."""
    # a px more: a box at a fraction of a px stays inside
    wide, high = (math.ceil((box[side + 2] - box[side]) * factor) + 1 for side in (0, 1))
    x1, x2 = place_span((box[0] + box[2]) / 2, min(wide, width), width)
    y1, y2 = place_span((box[1] + box[3]) / 2, min(high, height), height)
    return Box(x1, y1, x2, y2).join(outward_px(box, width, height))
