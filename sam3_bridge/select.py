"""Which detections to keep, and in which order: labels, scores, sizes, overlaps, the best of each kind."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import LunaInputError
from ..picture.detections import Detection, Detections, same_aspect
from ..values import fraction, shown, text
from ..words import fits, folded, split_list
from .overlaps import without_overlaps

Keep = Literal["all", "largest", "best", "most central"]
Order = Literal["as found", "score", "area", "left to right", "top to bottom"]
KEEPS: tuple[Keep, ...] = get_args(Keep)
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class LabelPatterns:
    """Label patterns: a label passes when one of ``wanted`` fits (or none is given) and none of ``unwanted`` does.

    ``*`` and ``?`` stand for any letters and any one letter, all other signs for themselves; upper and lower case are
    the same. As ``parse_labels`` gives them.
    """

    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()

    def __contains__(self, label: object) -> bool:
        name = str(label)
        return not fits(name, self.unwanted) and (not self.wanted or fits(name, self.wanted))


@dataclass(frozen=True)
class Selection:
    """What to keep.

    Attributes:
        labels: which labels.
        min_score: 0..1.
        min_size, max_size: area of the box as a fraction of the picture's area.
        nms_iou: of two that overlap more than this the lower score goes; 1 keeps both.
        keep: all, or one of each label in each picture.
        order: within each picture.
        max_count: the first so many of each picture in ``order``; 0 for all.

    Raises:
        LunaInputError: a limit lies outside 0..1, or the sizes contradict each other.
    """

    labels: LabelPatterns = LabelPatterns()
    min_score: float = 0.0
    min_size: float = 0.0
    max_size: float = 1.0
    nms_iou: float = 1.0
    keep: Keep = "all"
    order: Order = "as found"
    max_count: int = 0

    def __post_init__(self) -> None:
        for name in ("min_score", "min_size", "max_size", "nms_iou"):
            fraction(getattr(self, name), name)
        if self.min_size > self.max_size:
            raise LunaInputError(f"min_size {self.min_size} is above max_size {self.max_size}: nothing could pass")
        _check_choice("keep", self.keep, KEEPS)
        _check_choice("order", self.order, ORDERS)
        if not isinstance(self.max_count, int) or self.max_count < 0:
            raise LunaInputError(f"max_count is {shown(self.max_count)}: give a whole number, or 0 for all")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise LunaInputError(f"{name} is {shown(value)}: choose one of {', '.join(choices)}")


def parse_labels(given: str, name: str = "labels") -> LabelPatterns:
    """Reads ``face, *eye*, -hand``: patterns of labels, with a minus in front for those to leave out.

    Raises:
        LunaInputError: it is no text, or a minus stands alone.
    """
    wanted: list[str] = []
    unwanted: list[str] = []
    for entry in split_list(text(given, name)):
        pattern = folded(entry.lstrip("-"))
        if not pattern:
            raise LunaInputError(f"{name}: {shown(entry)} names no label: write for example face, -hand")
        (unwanted if entry.startswith("-") else wanted).append(pattern)
    return LabelPatterns(tuple(wanted), tuple(unwanted))


def select(detections: Detections, selection: Selection) -> Detections:
    """What passes: labels, score and size first, then overlaps, then the one of each label, then order and count."""
    picture_area = detections.width * detections.height
    kept: list[Detection] = []
    for on_picture in detections.by_image():
        items = [
            item
            for item in on_picture
            if item.label in selection.labels
            and item.score >= selection.min_score
            and selection.min_size <= item.area / picture_area <= selection.max_size
        ]
        if selection.nms_iou < 1:
            items = without_overlaps(items, selection.nms_iou)
        items = _one_of_each(items, selection.keep, detections)
        items = _ordered(items, selection.order)
        kept += items[: selection.max_count or None]
    return detections.with_items(kept)


def combine(parts: Mapping[int, Detections]) -> Detections:
    """All detections of the same pictures, part after part, at the size of the first part.

    Args:
        parts: by the number of their input, at least one.

    Raises:
        LunaInputError: the pictures differ in number or aspect, so they cannot be the same.
    """
    placed = {number: part for number, part in parts.items() if not part.is_unplaced}
    if not placed:
        return next(iter(parts.values()))
    (first_number, first), *_ = placed.items()
    items: list[Detection] = []
    for number, part in placed.items():
        if part.image_count != first.image_count or not same_aspect(first.width, first.height, part.width, part.height):
            raise LunaInputError(
                f"detections_{number} was made on {_pictures(part)}, detections_{first_number} on {_pictures(first)}: "
                "only detections of the same pictures can be combined"
            )
        items += part.scaled_to(first.width, first.height).items
    return first.with_items(items)


def _pictures(detections: Detections) -> str:
    return f"{detections.image_count} picture(s) of {detections.width}x{detections.height} px"


def _one_of_each(items: Sequence[Detection], keep: Keep, pictures: Detections) -> list[Detection]:
    if keep == "all":
        return list(items)
    rank = {
        "largest": lambda item: -item.area,
        "best": lambda item: -item.score,
        "most central": lambda item: (
            (item.centre[0] - pictures.width / 2) ** 2 + (item.centre[1] - pictures.height / 2) ** 2
        ),
    }[keep]
    winners: dict[str, Detection] = {}
    for item in items:
        if item.label not in winners or rank(item) < rank(winners[item.label]):
            winners[item.label] = item
    chosen = set(map(id, winners.values()))
    return [item for item in items if id(item) in chosen]


def _ordered(items: Iterable[Detection], order: Order) -> list[Detection]:
    """Stable: equals stay in the order they were found."""
    if order == "as found":
        return list(items)
    return sorted(
        items,
        key={
            "score": lambda item: -item.score,
            "area": lambda item: -item.area,
            "left to right": lambda item: item.centre[0],
            "top to bottom": lambda item: item.centre[1],
        }[order],
    )
