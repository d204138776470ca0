"""Detections from boxes, in every form that detector nodes and API clients give them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import LunaInputError
from .detections import BoxPx, Detection, Detections, check_box, check_score, format_box, outward_px
from .from_masks import Picture, as_masks, crop_mask, to_picture_px, visible_box

_FORMS = (
    "boxes as {x, y, width, height, score} or [x1, y1, x2, y2] in px, one list, or one list per picture, "
    "or {boxes, scores, labels}"
)


@dataclass(frozen=True)
class Box:
    """One box as it was given, not yet checked against the picture."""

    image_index: int
    xyxy: BoxPx
    score: float
    label: str


def parse_boxes(given: Any, image_count: int, name: str = "bboxes") -> list[Box]:
    """Reads boxes.

    Args:
        given: JSON text, or what it would hold: a box, a list of boxes, or a list of lists, one per picture. A box is
            a dict {x, y, width, height} or {x1, y1, x2, y2} with score and label where known, or four to six numbers
            x1, y1, x2, y2, score, class. A dict {boxes, scores, labels} holds lists of the same length.
        image_count: pictures in the batch.
        name: of the input, for messages.

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
        return [_box(entry, 0, f"{name}: box {place}") for place, entry in enumerate(given)]
    if len(given) > image_count:
        raise LunaInputError(f"{name} holds lists for {len(given)} pictures, image holds {image_count}")
    boxes = []
    for image_index, entry in enumerate(given):
        where = f"{name}: picture {image_index}"
        boxes += [_box(box, image_index, f"{where}, box {place}") for place, box in enumerate(_entries(entry, where))]
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
        The detections in the order of the boxes, and notices about boxes that were clipped to the picture.

    Raises:
        LunaInputError: a box lies outside the picture, or the number of masks fits neither boxes nor pictures.
    """
    flat = None if masks is None else as_masks(masks, picture)
    if flat is not None and len(flat) not in (len(boxes), picture.image_count):
        raise LunaInputError(
            f"masks holds {len(flat)}, {name} {len(boxes)} boxes and image {picture.image_count} pictures: "
            "give one mask per box, or one per picture"
        )
    items, clipped = [], 0
    for place, box in enumerate(boxes):
        xyxy = _clip(box, picture, f"{name}: box {place} {format_box(box.xyxy)}")
        clipped += xyxy != box.xyxy
        mask = None
        if flat is not None:
            own = len(flat) == len(boxes)
            xyxy, mask = _cut_mask(flat[place if own else box.image_index], xyxy, picture, own)
        items.append(Detection(box.image_index, xyxy, mask, box.score, box.label or label))
    notice = f"{name}: {clipped} of {len(boxes)} reached over the picture's edge and were clipped"
    found = Detections(tuple(items), picture.width, picture.height, picture.image_count)
    return found, (notice,) if clipped else ()


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
    check_box(box.xyxy, name)
    if box.image_index >= picture.image_count:
        raise LunaInputError(f"{name} is on picture {box.image_index}, image holds {picture.image_count}")
    x1, y1, x2, y2 = box.xyxy
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
    if isinstance(given, np.ndarray):
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


def _box(entry: Any, image_index: int, name: str) -> Box:
    score: Any = 1.0
    label = ""
    if isinstance(entry, Mapping):
        score, label = entry.get("score", 1.0), str(entry.get("label") or "")
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
    check_box((x1, y1, x2, y2), name)
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
