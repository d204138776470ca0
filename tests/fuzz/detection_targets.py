"""What makes and picks detections: boxes, scores, masks, SEGS, words, patterns, pictures."""

from typing import Any, NamedTuple

import torch
from fuzz.strategies import (
    arrays,
    damaged,
    json_texts,
    masks,
    numbers,
    pictures,
    tensors,
    texts,
    values,
    widget_numbers,
)
from fuzz.target import target
from hypothesis import strategies as st
from luna_refinement.batching.concepts import Concept
from luna_refinement.nodes.checks import check_image, fitted, range_notices
from luna_refinement.nodes.chess import _denoise_share
from luna_refinement.nodes.detection_tools import (
    PER_DETECTION,
    LunaDetectionsCombine,
    LunaDetectionsFilter,
    LunaDetectionsPreview,
    LunaDetectionsToMask,
)
from luna_refinement.nodes.detections import LunaDetectionsFromBoxes, LunaDetectionsFromMasks
from luna_refinement.nodes.segs import LunaDetectionsFromSEGS, LunaDetectionsToSEGS
from luna_refinement.picture.detections import Detection, Detections
from luna_refinement.sam3_bridge.concepts import parse_concepts
from luna_refinement.sam3_bridge.read_boxes import parse_boxes, with_scores

WIDTH, HEIGHT = 48, 32
ONE, TWO = torch.zeros(1, HEIGHT, WIDTH, 3), torch.zeros(2, HEIGHT, WIDTH, 3)
SMALL = 2**22
"""px of a claimed picture on which the tools are tried too; larger ones take the memory they are asked for."""

BOX_NAMES = ("x", "y", "width", "height", "x1", "y1", "x2", "y2", "box", "boxes", "score", "scores", "label", "labels")
BOX_TEXTS = (
    "[[1, 2, 30, 24], [5, 5, 9.5, 9]]",
    "[[[1, 2, 30, 24]], []]",
    '[{"x": 1, "y": 2, "width": 30, "height": 20, "score": 0.9, "label": "face"}]',
    '{"boxes": [[1, 2, 30, 24]], "scores": [0.5], "labels": ["hand"]}',
    '{"x1": "1", "y1": "2", "x2": "3", "y2": "4"}',
)


def tried_on_all(found: Detections) -> None:
    """Hands detections to every tool that takes them."""
    if found.width * found.height > SMALL:
        return
    LunaDetectionsFilter.execute(found, "*", 0.0, 0.0, 1.0, "largest", 0, "area", 0.5)
    LunaDetectionsCombine.execute(found, found)
    LunaDetectionsToMask.execute(found, PER_DETECTION)
    LunaDetectionsToSEGS.execute(found, 0, 2.0)


@target(json_texts(BOX_NAMES, BOX_TEXTS))
def boxes_as_text(text: str) -> None:
    output = LunaDetectionsFromBoxes.execute(TWO, "", text)
    tried_on_all(output.args[0])
    LunaDetectionsPreview.execute(TWO, output.args[0])


@target(st.tuples(values(BOX_NAMES, arrays_too=True), st.sampled_from((ONE, TWO)), st.none() | masks(WIDTH, HEIGHT)))
def boxes_of_other_nodes(given: tuple[Any, Any, Any]) -> None:
    bboxes, image, mask = given
    tried_on_all(LunaDetectionsFromBoxes.execute(image, "thing", "", bboxes, mask).args[0])


@target(st.tuples(st.lists(st.sampled_from(BOX_TEXTS), min_size=1), json_texts(("score",), ("[0.5, 0.25]", "[1]"))))
def scores_as_text(given: tuple[list[str], str]) -> None:
    with_scores(parse_boxes(given[0][0], 2), given[1])


@target(
    st.tuples(masks(WIDTH, HEIGHT), st.sampled_from((ONE, TWO)), texts(), st.booleans(), widget_numbers(0, 1)),
)
def masks_of_other_nodes(given: tuple[Any, ...]) -> None:
    mask, image, label, split, threshold = given
    tried_on_all(LunaDetectionsFromMasks.execute(mask, image, label, split, threshold).args[0])


class Segment(NamedTuple):
    """The fields of a SEG."""

    cropped_image: Any
    cropped_mask: Any
    confidence: Any
    crop_region: Any
    bbox: Any
    label: Any
    control_net_wrapper: Any


REGION = (4, 4, 28, 20)
_SHAPES = st.sampled_from([(16, 24), (1, 16, 24), (16, 24, 1), (3, 3)])
_FOUR = st.one_of(
    st.just(REGION),
    st.tuples(st.integers(-9, 20), st.integers(-9, 20), st.integers(20, 60), st.integers(20, 60)),
    arrays(st.just((4,))),
    values(("x",), arrays_too=True),
)
_SEGMENTS = st.builds(
    Segment,
    st.none(),
    st.one_of(st.none(), tensors(_SHAPES), arrays(_SHAPES), values((), arrays_too=True)),
    st.one_of(st.floats(0, 1), numbers(), arrays(st.just(())), values((), arrays_too=True)),
    st.one_of(st.just(REGION), st.just(REGION), _FOUR),
    _FOUR,
    st.one_of(st.just("face"), texts(), values((), arrays_too=True)),
    st.none(),
)
_HEADERS = st.one_of(st.just((HEIGHT, WIDTH)), st.just((0, 0)), st.tuples(numbers(), numbers()), values(()))


@target(st.one_of(st.tuples(_HEADERS, st.lists(_SEGMENTS, max_size=4)), values((), arrays_too=True)))
def segs(given: Any) -> None:
    found = LunaDetectionsFromSEGS.execute(given).args[0]
    tried_on_all(found)
    fitted(found, torch.zeros(1, 64, 96, 3))


FOUND = Detections(
    tuple(
        Detection(k % 2, (k, k, k + 9, k + 7), torch.ones(3, 4) if k % 3 else None, 0.1 * (k % 9), f"thing {k % 5}")
        for k in range(20)
    ),
    WIDTH,
    HEIGHT,
    2,
)


@target(
    st.tuples(
        st.one_of(damaged(("face, *eye*, -hand", "thing ?, -thing 3", "*")), texts(), values(())),
        *[widget_numbers(0, 1)] * 3,
        st.one_of(st.sampled_from(("all", "largest", "best", "most central")), values(())),
        st.one_of(st.integers(0, 9), numbers(), values(())),
        st.one_of(st.sampled_from(("as found", "score", "left to right")), values(())),
        widget_numbers(0, 1),
    )
)
def filter_settings(given: tuple[Any, ...]) -> None:
    LunaDetectionsFilter.execute(FOUND, *given)


@target(st.one_of(damaged(("face:9, left hand, -glove", "顔：3、手")), texts(), values(())))
def words_for_sam3(text: Any) -> None:
    parse_concepts(text)


@target(st.tuples(st.one_of(damaged(("face, hand*", "*")), texts(), values(())), texts(), widget_numbers(0, 1)))
def labels_of_a_concept(given: tuple[Any, str, Any]) -> None:
    match, label, denoise = given
    Concept(match, denoise=denoise).matches(label)


@target(texts())
def labels_in_a_drawing(label: str) -> None:
    item = Detection(0, (4, 4, 40, 30), torch.rand(5, 5), 0.5, label)
    LunaDetectionsPreview.execute(ONE, Detections((item,), WIDTH, HEIGHT))


@target(st.one_of(pictures(), pictures(), values((), arrays_too=True)))
def pictures_of_other_nodes(image: Any) -> None:
    check_image(image)
    range_notices(image)
    found = fitted(Detections((), 0, 0), image)
    LunaDetectionsPreview.execute(image, found)


@target(st.tuples(masks(WIDTH, HEIGHT), st.floats(0, 1), st.sampled_from((ONE, TWO))))
def masks_of_what_is_refined(given: tuple[Any, float, Any]) -> None:
    _denoise_share(*given)
