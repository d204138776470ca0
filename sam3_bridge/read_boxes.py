"""Boxes and scores in every form that detector nodes and API clients give them; no picture is needed to read them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from ..errors import LunaInputError
from ..picture.boxes import LEAST_PX, BoxPx, format_box
from ..picture.detections import check_score
from ..values import LONGEST_TEXT, real, shown
from ..words import tidy

BoxFormat = Literal["x1 y1 x2 y2", "x y width height"]
BOX_FORMATS: tuple[BoxFormat, ...] = get_args(BoxFormat)

MOST_BOXES = 65_536
"""Of one input."""

_FORMS = (
    "boxes as {x, y, width, height, score} or [x1, y1, x2, y2] in px, one list, or one list per picture, "
    "or {boxes, scores, labels}"
)
_LIST_TYPES = (Tensor, np.ndarray, list, tuple)


@dataclass(frozen=True)
class GivenBox:
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
        x1, y1, x2, y2 = self.xyxy
        return x2 - x1 < LEAST_PX or y2 - y1 < LEAST_PX


def parse_boxes(
    given: Any, image_count: int, name: str = "bboxes", box_format: BoxFormat = "x1 y1 x2 y2"
) -> list[GivenBox]:
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
    if box_format not in BOX_FORMATS:
        raise LunaInputError(f"box_format is {shown(box_format)}: choose one of {', '.join(BOX_FORMATS)}")
    given = _from_json(given, name) if isinstance(given, str) else given
    if isinstance(given, Mapping) or _is_box(given):
        given = [given]
    entries = _list(given, name)
    per_picture = any(_is_list_of_boxes(entry) for entry in entries) or (
        bool(entries) and not any(map(_is_box, entries))
    )
    if not per_picture:
        entries = [entries]
    if len(entries) > max(1, image_count):
        raise LunaInputError(f"{name} holds lists for {len(entries)} pictures, image holds {image_count}")
    boxes: list[GivenBox] = []
    for index, entry in enumerate(entries):
        picture = f"{name}: picture {index}"
        place = f"{picture}, box " if per_picture else f"{name}: box "
        image_index = None if len(entries) == 1 else index
        rows = _rows(entry, picture)
        if len(boxes) + len(rows) > MOST_BOXES:
            raise LunaInputError(f"{name} holds {len(boxes) + len(rows)} boxes or more: at most {MOST_BOXES} are read")
        boxes += [_box(row, image_index, f"{place}{number}", box_format) for number, row in enumerate(rows)]
    return boxes


def with_scores(boxes: Sequence[GivenBox], given: Any, name: str = "scores_json") -> list[GivenBox]:
    """The boxes with scores that came on their own, as JSON text or a list.

    Raises:
        LunaInputError: there is not one score from 0 to 1 for every box.
    """
    example = "[0.93, 0.71]"
    scores = _from_json(given, name, example) if isinstance(given, str) else given
    if isinstance(scores, _LIST_TYPES):
        scores = _list(scores, name)
    if not isinstance(scores, list) or any(isinstance(s, bool) or not isinstance(s, int | float) for s in scores):
        raise LunaInputError(f"{name} is {shown(scores)}: a list of numbers is needed, for example {example}")
    if len(scores) != len(boxes):
        raise LunaInputError(f"{name} holds {len(scores)} scores for {len(boxes)} boxes: give one for each")
    return [
        replace(box, score=_score(score, f"{name}: number {place}"))
        for place, (box, score) in enumerate(zip(boxes, scores, strict=True))
    ]


def _from_json(text: str, name: str, example: str = "[[10, 20, 110, 140], [200, 40, 260, 120]]") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError:
        reason = "a number of thousands of digits"
    except RecursionError:
        reason = "nested without end"
    raise LunaInputError(f"{name} is no JSON that can be read ({reason}): write for example {example}")


def _list(given: Any, name: str) -> list[Any]:
    """A list, tuple, array or tensor as a list; arrays and tensors become nested lists."""
    if isinstance(given, Tensor | np.ndarray):
        size = given.numel() if isinstance(given, Tensor) else given.size
        if size > 6 * MOST_BOXES:
            raise LunaInputError(f"{name} is an array of {size} numbers: {_FORMS} are needed")
        try:
            given = given.tolist()
        except (RuntimeError, TypeError, ValueError) as error:
            raise LunaInputError(f"{name} is {shown(given)}: {_FORMS} are needed") from error
    if not isinstance(given, list | tuple):
        raise LunaInputError(f"{name} is a {type(given).__name__}: {_FORMS} are needed")
    return list(given)


def _is_box(entry: Any) -> bool:
    """Whether an entry stands for a single box: names for its numbers, or a row of numbers."""
    if isinstance(entry, Mapping):
        return "boxes" not in entry
    if isinstance(entry, Tensor | np.ndarray):
        return entry.ndim == 1 and len(entry) > 0
    return isinstance(entry, list | tuple) and bool(entry) and all(map(_is_number, entry))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0
    return isinstance(value, int | float | complex | np.number | str)


def _is_list_of_boxes(entry: Any) -> bool:
    if isinstance(entry, Tensor | np.ndarray):
        return entry.ndim == 2
    return isinstance(entry, list | tuple) and any(map(_is_box, entry))


def _rows(entry: Any, name: str) -> list[Any]:
    """The boxes of one picture."""
    if isinstance(entry, Mapping) and "boxes" in entry:
        return _columns(entry, name)
    if _is_box(entry):
        return [entry]
    if isinstance(entry, _LIST_TYPES):
        return _list(entry, name)
    raise LunaInputError(f"{name} holds {shown(entry)}: {_FORMS} are needed")


def _columns(entry: Mapping[str, Any], name: str) -> list[Any]:
    """The boxes of {boxes, scores, labels}, each with what the other columns say of it."""
    columns: dict[str, list[Any]] = {}
    for key in ("boxes", "scores", "labels"):
        column = entry.get(key)
        if column is None and key != "boxes":
            continue
        if not isinstance(column, _LIST_TYPES):
            raise LunaInputError(f"{name}: {key} is {shown(column)}: a list is needed")
        columns[key] = _list(column, f"{name}: {key}")
    boxes = columns.pop("boxes")
    for key, column in columns.items():
        if len(column) != len(boxes):
            raise LunaInputError(f"{name}: {len(boxes)} boxes but {len(column)} {key}")
    return [
        {"box": box} | {key[:-1]: column[place] for key, column in columns.items()} for place, box in enumerate(boxes)
    ]


def _box(entry: Any, image_index: int | None, name: str, box_format: BoxFormat) -> GivenBox:
    score: Any = 1.0
    label = ""
    if isinstance(entry, Mapping):
        score, label = entry.get("score", 1.0), read_label(entry.get("label"), name)
    named = isinstance(entry, Mapping) and "box" not in entry
    row = _named_corners(entry, name) if named else _row(entry, name)
    if len(row) > 4:
        score = row[4]
    x1, y1, x2, y2 = (real(value, f"{name}: number {place}") for place, value in enumerate(row[:4]))
    if "width" in entry if named else box_format == "x y width height":
        x2, y2 = x1 + x2, y1 + y2
    if x2 < x1 or y2 < y1:
        raise LunaInputError(
            f"{name}: box {format_box((x1, y1, x2, y2))} is reversed: x2 must be greater than x1 and y2 greater than "
            f"y1. If its last two numbers are width and height, set box_format to '{BOX_FORMATS[1]}'"
        )
    return GivenBox(image_index, (x1, y1, x2, y2), _score(score, name), label)


def _row(entry: Any, name: str) -> list[Any]:
    """Four numbers, and score and class where they follow."""
    row = entry["box"] if isinstance(entry, Mapping) else entry
    row = _list(row, name) if isinstance(row, _LIST_TYPES) else row
    if not isinstance(row, list) or not 4 <= len(row) <= 6:
        raise LunaInputError(f"{name} is {shown(entry)}: {_FORMS} are needed")
    return row


def _named_corners(entry: Mapping[str, Any], name: str) -> list[Any]:
    keys = ("x", "y", "width", "height") if "width" in entry else ("x1", "y1", "x2", "y2")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise LunaInputError(f"{name} is {shown(entry)} without {', '.join(missing)}: {_FORMS} are needed")
    return [entry[key] for key in keys]


def _score(value: Any, name: str) -> float:
    """A score from 0 to 1; what is not even finite is named as a score too."""
    if isinstance(value, float):
        check_score(value, name)
    score = real(value, f"{name}: score")
    check_score(score, name)
    return score


def read_label(value: Any, name: str) -> str:
    """A label: text, a number, or nothing.

    Raises:
        LunaInputError: it is anything else, or longer than any label.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | np.number):
        raise LunaInputError(f"{name}: label is {shown(value)}: text is needed")
    label = value if isinstance(value, str) else f"{real(value, f'{name}: label'):.10g}"
    if len(label) > LONGEST_TEXT:
        raise LunaInputError(f"{name}: label has {len(label)} characters: at most {LONGEST_TEXT} are read")
    return tidy(label)
