"""Detections from boxes, in every form that detector nodes and API clients give them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import LunaInputError
from .detections import BoxPx, Detection, Detections, check_score, format_box, outward_px
from .from_masks import Picture, as_masks, crop_mask, to_picture_px, visible_box

BoxFormat = Literal["x1 y1 x2 y2", "x y width height"]
BOX_FORMATS: tuple[BoxFormat, ...] = ("x1 y1 x2 y2", "x y width height")

OWN_REACH = 0.5
"""How far a mask of a box's own may reach past it, as a fraction of the box's longer side."""

_FORMS = (
    "boxes as {x, y, width, height, score} or [x1, y1, x2, y2] in px, one list, or one list per picture, "
    "or {boxes, scores, labels}"
)


@dataclass(frozen=True)
class Box:
    """One box as it was given, not yet checked against the picture; it may be empty.

    Attributes:
        image_index: which picture of the batch; None for all of them.
        xyxy: px.
        score: 0..1.
        label: "" for none.
    """

    image_index: int | None
    xyxy: BoxPx
    score: float
    label: str

    @property
    def is_empty(self) -> bool:
        return self.xyxy[0] == self.xyxy[2] or self.xyxy[1] == self.xyxy[3]


def parse_boxes(given: Any, image_count: int, name: str = "bboxes", box_format: BoxFormat = "x1 y1 x2 y2") -> list[Box]:
    """Reads boxes.

    Args:
        given: JSON text, or what it would hold: a box, a list of boxes, or a list of lists, one per picture. A box is
            a dict {x, y, width, height} or {x1, y1, x2, y2} with score and label where known, or four to six numbers
            x1, y1, x2, y2, score, class. A dict {boxes, scores, labels} holds lists of the same length. Where there is
            but one list for many pictures, it is meant for each of them, as ComfyUI's own nodes have it.
        image_count: pictures in the batch.
        name: of the input, for messages.
        box_format: what the four numbers of a box without names are.

    Raises:
        LunaInputError: it is none of these, or a number is wrong.
    """
    if isinstance(given, str):
        given = _from_json(given, name)
    given = _plain(given)
    if _is_box(given) or (isinstance(given, Mapping) and "boxes" in given):
        given = [given]
    if not isinstance(given, Sequence):
        raise LunaInputError(f"{name} is a {type(given).__name__}: {_FORMS} are needed")
    per_picture = any(_is_list_of_boxes(entry) for entry in given) or (bool(given) and not any(map(_is_box, given)))
    if not per_picture:
        given = [given]
    if len(given) == 1:
        place = f"{name}: box " if not per_picture else f"{name}: picture 0, box "
        entries = _entries(given[0], f"{name}: picture 0")
        return [_box(entry, None, f"{place}{number}", box_format) for number, entry in enumerate(entries)]
    if len(given) > image_count:
        raise LunaInputError(f"{name} holds lists for {len(given)} pictures, image holds {image_count}")
    boxes = []
    for image_index, entry in enumerate(given):
        where = f"{name}: picture {image_index}"
        boxes += [
            _box(box, image_index, f"{where}, box {place}", box_format)
            for place, box in enumerate(_entries(entry, where))
        ]
    return boxes


def with_scores(boxes: Sequence[Box], given: Any, name: str = "scores_json") -> list[Box]:
    """The boxes with scores that came on their own, as JSON text or a list.

    Raises:
        LunaInputError: there is not one score from 0 to 1 for every box.
    """
    scores = _plain(_from_json(given, name, "[0.93, 0.71]") if isinstance(given, str) else given)
    if not isinstance(scores, list) or any(isinstance(s, bool) or not isinstance(s, int | float) for s in scores):
        raise LunaInputError(f"{name} is {scores!r}: a list of numbers is needed, for example [0.93, 0.71]")
    if len(scores) != len(boxes):
        raise LunaInputError(f"{name} holds {len(scores)} scores for {len(boxes)} boxes: give one for each")
    for place, score in enumerate(scores):
        check_score(score, f"{name}: number {place}")
    return [replace(box, score=float(score)) for box, score in zip(boxes, scores, strict=True)]


def from_boxes(
    boxes: Sequence[Box], picture: Picture, masks: Tensor | None = None, label: str = "", name: str = "bboxes"
) -> tuple[Detections, tuple[str, ...]]:
    """Detections of boxes, with masks where they are given.

    Args:
        boxes: as ``parse_boxes`` gives them.
        picture: the picture batch.
        masks: [N,h,w], one per box in the same order, or one per picture that covers all its boxes; any size of the
            picture's aspect.
        label: for boxes that bring none.
        name: of the input the boxes came by, for messages.

    Returns:
        The detections, picture by picture in the order of the boxes, and notices about boxes that were left out or
        clipped to the picture.

    Raises:
        LunaInputError: a box lies outside the picture, or the number of masks fits neither boxes nor pictures.
    """
    flat = None if masks is None else as_masks(masks, picture)
    if flat is not None and len(flat) not in (len(boxes), picture.image_count):
        raise LunaInputError(
            f"masks holds {len(flat)}, {name} {len(boxes)} boxes and image {picture.image_count} pictures: "
            "give one mask per box, or one per picture"
        )
    own = flat is not None and _are_own(flat, boxes, picture)
    cut = [_clip(box, picture, f"{name}: box {place} {format_box(box.xyxy)}") for place, box in enumerate(boxes)]
    items = []
    for image_index in range(picture.image_count):
        for place, (box, xyxy) in enumerate(zip(boxes, cut, strict=True)):
            if box.is_empty or box.image_index not in (None, image_index):
                continue
            mask = None
            if flat is not None:
                xyxy, mask = _cut_mask(flat[place if own else image_index], xyxy, picture, own)
            items.append(Detection(image_index, xyxy, mask, box.score, box.label or label))
    found = Detections(tuple(items), picture.width, picture.height, picture.image_count)
    return found, _notices(boxes, cut, name)


def _notices(boxes: Sequence[Box], cut: Sequence[BoxPx], name: str) -> tuple[str, ...]:
    empty = sum(box.is_empty for box in boxes)
    clipped = sum(not box.is_empty and box.xyxy != xyxy for box, xyxy in zip(boxes, cut, strict=True))
    notices = []
    if empty:
        notices.append(f"{name}: {empty} of {len(boxes)} boxes are empty and were left out")
    if clipped:
        notices.append(f"{name}: {clipped} of {len(boxes)} reached over the picture's edge and were clipped")
    return tuple(notices)


def _are_own(flat: Tensor, boxes: Sequence[Box], picture: Picture) -> bool:
    """Whether masks are one per box, rather than one per picture; where the counts allow both, their places tell."""
    if len(flat) != len(boxes) or len(flat) != picture.image_count:
        return len(flat) == len(boxes)
    return all(_fits(mask, box, picture) for mask, box in zip(flat, boxes, strict=True))


def _fits(mask: Tensor, box: Box, picture: Picture) -> bool:
    """Whether a mask covers a place within a box, or a little over it."""
    visible = visible_box(mask)
    if visible is None:
        return False
    x1, y1, x2, y2 = box.xyxy
    reach = OWN_REACH * max(x2 - x1, y2 - y1)
    left, top, right, bottom = to_picture_px(visible, mask, picture)
    return left >= x1 - reach and top >= y1 - reach and right <= x2 + reach and bottom <= y2 + reach


def _cut_mask(mask: Tensor, box: BoxPx, picture: Picture, own: bool) -> tuple[BoxPx, Tensor]:
    """The part of a mask that belongs to a box, and the box it spans exactly.

    A mask of the box's own may reach a little over it and is kept whole; one for all boxes is cut to the box.
    """
    height, width = mask.shape
    x1, y1, x2, y2 = box
    scaled = (
        x1 * width / picture.width,
        y1 * height / picture.height,
        x2 * width / picture.width,
        y2 * height / picture.height,
    )
    window = outward_px(scaled, width, height)
    visible = visible_box(mask) if own else None
    if visible is not None:
        lows = [min(a, b) for a, b in zip(window[:2], visible[:2], strict=True)]
        highs = [max(a, b) for a, b in zip(window[2:], visible[2:], strict=True)]
        window = (lows[0], lows[1], highs[0], highs[1])
    return to_picture_px(window, mask, picture), crop_mask(mask, window)


def _clip(box: Box, picture: Picture, name: str) -> BoxPx:
    if box.image_index is not None and box.image_index >= picture.image_count:
        raise LunaInputError(f"{name} is on picture {box.image_index}, image holds {picture.image_count}")
    x1, y1, x2, y2 = box.xyxy
    if box.is_empty:
        return box.xyxy
    if x2 <= 0 or y2 <= 0 or x1 >= picture.width or y1 >= picture.height:
        raise LunaInputError(
            f"{name} lies outside the {picture.width}x{picture.height} px picture: "
            "boxes are in px of the connected image; detect on this image"
        )
    return max(0.0, x1), max(0.0, y1), min(float(picture.width), x2), min(float(picture.height), y2)


def _from_json(text: str, name: str, example: str = "[[10, 20, 110, 140], [200, 40, 260, 120]]") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LunaInputError(
            f"{name} is no JSON ({error.msg} at line {error.lineno}, column {error.colno}): write for example {example}"
        ) from error


def _plain(given: Any) -> Any:
    """Arrays and tensors as nested lists."""
    if isinstance(given, Tensor):
        return given.detach().cpu().tolist()
    if isinstance(given, np.ndarray | np.generic):
        return given.tolist()
    if isinstance(given, Mapping):
        return {key: _plain(value) for key, value in given.items()}
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [_plain(entry) for entry in given]
    return given


def _is_box(entry: Any) -> bool:
    if isinstance(entry, Mapping):
        return "boxes" not in entry
    return isinstance(entry, list) and bool(entry) and all(isinstance(x, int | float) for x in entry)


def _is_list_of_boxes(entry: Any) -> bool:
    return isinstance(entry, list) and any(map(_is_box, entry))


def _entries(entry: Any, name: str) -> list[Any]:
    """The boxes of one picture."""
    if isinstance(entry, Mapping) and "boxes" in entry:
        boxes = entry["boxes"]
        columns = {"score": entry.get("scores"), "label": entry.get("labels")}
        for key, column in {"boxes": boxes, "scores": columns["score"], "labels": columns["label"]}.items():
            if not isinstance(column, list | None):
                raise LunaInputError(f"{name}: {key} is {column!r}: a list is needed")
        for key, column in columns.items():
            if column is not None and len(column) != len(boxes):
                raise LunaInputError(f"{name}: {len(boxes)} boxes but {len(column)} {key}s")
        return [
            {"box": box} | {key: column[place] for key, column in columns.items() if column is not None}
            for place, box in enumerate(boxes)
        ]
    if _is_box(entry):
        return [entry]
    if isinstance(entry, list):
        return entry
    raise LunaInputError(f"{name} holds {entry!r}: {_FORMS} are needed")


def _box(entry: Any, image_index: int | None, name: str, box_format: BoxFormat) -> Box:
    score: Any = 1.0
    label = ""
    named = False
    if isinstance(entry, Mapping):
        score, label = entry.get("score", 1.0), str(entry.get("label") or "")
        named = "box" not in entry
        entry = _corners(entry, name)
    if not isinstance(entry, list) or not 4 <= len(entry) <= 6:
        raise LunaInputError(f"{name} is {entry!r}: {_FORMS} are needed")
    if len(entry) > 4:
        score = entry[4]
    try:
        x1, y1, x2, y2 = (float(value) for value in entry[:4])
        score = float(score)
    except (TypeError, ValueError) as error:
        raise LunaInputError(f"{name} is {entry!r}: its numbers cannot be read ({error})") from error
    if box_format == "x y width height" and not named:
        x2, y2 = x1 + x2, y1 + y2
    if not all(math.isfinite(value) for value in (x1, y1, x2, y2)):
        raise LunaInputError(f"{name} is {entry!r}: four finite numbers in px are needed")
    if x2 < x1 or y2 < y1:
        raise LunaInputError(
            f"{name}: box {format_box((x1, y1, x2, y2))} is reversed: x2 must be greater than x1 and y2 greater than "
            f"y1. If its last two numbers are width and height, set box_format to '{BOX_FORMATS[1]}'"
        )
    check_score(score, name)
    return Box(image_index, (x1, y1, x2, y2), score, label)


def _corners(entry: Mapping[str, Any], name: str) -> Any:
    if "box" in entry:
        return entry["box"]
    try:
        if "width" in entry:
            x, y = entry["x"], entry["y"]
            return [x, y, x + entry["width"], y + entry["height"]]
        return [entry["x1"], entry["y1"], entry["x2"], entry["y2"]]
    except (KeyError, TypeError) as error:
        raise LunaInputError(f"{name} is {dict(entry)!r}: {_FORMS} are needed ({error!r})") from error
