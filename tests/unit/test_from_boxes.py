"""Boxes are read in every form detectors give them, above all as ComfyUI's own SAM3 nodes do."""

import json
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.detections import LunaDetectionsFromBoxes
from luna_refinement.picture.detections import Detections
from luna_refinement.sam3_bridge.from_boxes import from_boxes
from luna_refinement.sam3_bridge.from_masks import Picture
from luna_refinement.sam3_bridge.read_boxes import MOST_BOXES, parse_boxes, with_scores

ONE = Picture(200, 100, 1)
TWO = Picture(200, 100, 2)

FACE = {"x": 10.5, "y": 20.0, "width": 40.0, "height": 50.25, "score": 0.93}
HAND = {"x": 100.0, "y": 5.0, "width": 30.0, "height": 20.0, "score": 0.71}
EYE = {"x": 150.0, "y": 60.0, "width": 20.0, "height": 10.0, "score": 0.5}


def found(given: Any, picture: Picture = ONE, masks: torch.Tensor | None = None, label: str = "") -> Detections:
    return from_boxes(parse_boxes(given, picture.image_count), picture, masks, label)[0]


def places(detections: Detections) -> list[tuple[int, tuple[float, ...], float]]:
    return [(item.image_index, item.box, item.score) for item in detections]


FACE_AT, HAND_AT, EYE_AT = (10.5, 20, 50.5, 70.25), (100, 5, 130, 25), (150, 60, 170, 70)


@pytest.mark.parametrize(
    ("given", "picture", "wanted"),
    [
        ([[FACE, HAND]], ONE, [(0, FACE_AT, 0.93), (0, HAND_AT, 0.71)]),
        ([[FACE, HAND], [EYE]], TWO, [(0, FACE_AT, 0.93), (0, HAND_AT, 0.71), (1, EYE_AT, 0.5)]),
        ([[], [EYE]], TWO, [(1, EYE_AT, 0.5)]),
        ([[FACE], []], TWO, [(0, FACE_AT, 0.93)]),
        ([[], []], TWO, []),
        ([], ONE, []),
        ([FACE, HAND], ONE, [(0, FACE_AT, 0.93), (0, HAND_AT, 0.71)]),
        (FACE, ONE, [(0, FACE_AT, 0.93)]),
        ([FACE, HAND], TWO, [(k, *rest) for k in (0, 1) for rest in ((FACE_AT, 0.93), (HAND_AT, 0.71))]),
        ([[FACE, HAND]], TWO, [(k, *rest) for k in (0, 1) for rest in ((FACE_AT, 0.93), (HAND_AT, 0.71))]),
        (FACE, TWO, [(0, FACE_AT, 0.93), (1, FACE_AT, 0.93)]),
        ([[]], TWO, []),
    ],
)
def test_core_sam3_boxes(given: Any, picture: Picture, wanted: list[Any]) -> None:
    """A list of dicts per frame; one list or one dict means every frame, as core's SAM3 and box nodes have it."""
    assert places(found(given, picture)) == wanted


@pytest.mark.parametrize(
    "given",
    [
        [[10, 20, 30, 40], [50, 60, 70, 80]],
        [[[10, 20, 30, 40], [50, 60, 70, 80]]],
        torch.tensor([[10, 20, 30, 40], [50, 60, 70, 80]]),
        np.array([[10, 20, 30, 40], [50, 60, 70, 80]], dtype=np.float32),
        ((10, 20, 30, 40), (50, 60, 70, 80)),
        "[[10, 20, 30, 40], [50, 60, 70, 80]]",
        '[{"x": 10, "y": 20, "width": 20, "height": 20}, {"x1": 50, "y1": 60, "x2": 70, "y2": 80}]',
        {"boxes": torch.tensor([[10, 20, 30, 40], [50, 60, 70, 80]])},
        [[np.float32(10), np.int64(20), 30, 40], [50, 60, 70, np.float64(80)]],
    ],
)
def test_arrays_and_text_say_the_same(given: Any) -> None:
    assert places(found(given)) == [(0, (10, 20, 30, 40), 1.0), (0, (50, 60, 70, 80), 1.0)]


def test_ultralytics_rows_bring_a_score_and_a_class() -> None:
    assert places(found(np.array([[10, 20, 30, 40, 0.75, 3]]))) == [(0, (10, 20, 30, 40), 0.75)]


def test_json_of_boxes_scores_and_labels() -> None:
    text = json.dumps({"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "scores": [0.9, 0.8], "labels": ["face", ""]})
    items = found(text, label="thing").items
    assert [(item.score, item.label) for item in items] == [(0.9, "face"), (0.8, "thing")]


def test_individual_masks_lie_in_frame_order() -> None:
    masks = torch.zeros(3, 50, 100)
    masks[0, 10:35, 5:25] = 1
    masks[1, 3:12, 50:65] = 1
    masks[2, 30:35, 75:85] = 0.5
    items = found([[FACE, HAND], [EYE]], TWO, masks).items
    assert [item.image_index for item in items] == [0, 0, 1]
    for item, mask in zip(items, masks, strict=True):
        assert item.mask is not None
        assert float(item.mask.sum()) == pytest.approx(float(mask.sum()))
        assert item.box[2] - item.box[0] == 2 * item.mask.shape[1]
    assert items[1].box == (100, 4, 130, 26)


def test_a_mask_that_reaches_over_its_box_is_kept_whole() -> None:
    mask = torch.zeros(1, 100, 200)
    mask[0, 10:40, 10:60] = 1
    (item,) = found([[20, 15, 50, 35]], ONE, mask)
    assert item.box == (10, 10, 60, 40)


def test_union_masks_are_cut_to_each_box() -> None:
    masks = torch.ones(2, 100, 200)
    items = found([[FACE, HAND, EYE], [EYE, HAND]], TWO, masks).items
    assert [item.box for item in items] == [(10, 20, 51, 71), HAND_AT, EYE_AT, EYE_AT, HAND_AT]
    assert all(item.mask is not None and bool((item.mask == 1).all()) for item in items)


@pytest.mark.parametrize(
    ("given", "picture"), [([[FACE, HAND], []], TWO), ([[FACE], [], [EYE, HAND]], Picture(200, 100, 3))]
)
def test_union_masks_are_told_from_own_ones_though_the_counts_agree(given: Any, picture: Picture) -> None:
    masks = torch.zeros(picture.image_count, 100, 200)
    for mask, boxes in zip(masks, given, strict=True):
        for box in boxes:
            x, y = round(box["x"]), round(box["y"])
            mask[y : y + round(box["height"]), x : x + round(box["width"])] = 1
    items = found(given, picture, masks).items
    assert len(items) == sum(map(len, given))
    for item in items:
        assert item.mask is not None
        assert float(item.mask.mean()) > 0.9


def test_the_mask_of_a_person_is_cut_to_the_one_face() -> None:
    masks = torch.zeros(1, 100, 200)
    masks[0, 5:95, 5:90] = 1
    (item,) = found([[30, 10, 50, 30]], ONE, masks)
    assert item.box == (30, 10, 50, 30)


def test_empty_boxes_are_left_out_with_a_notice_and_keep_the_others_in_step() -> None:
    boxes = parse_boxes([[0, 0, 0, 0], [10, 20, 30, 40], [5, 5, 5, 9]], 1)
    masks = torch.zeros(3, 100, 200)
    masks[1, 22:38, 12:28] = 1
    detections, notices = from_boxes(with_scores(boxes, "[0.1, 0.5, 0.9]"), ONE, masks)
    (item,) = detections.items
    assert (item.box, item.score) == ((10, 20, 30, 40), 0.5)
    assert item.mask is not None
    assert float(item.mask.sum()) == 256
    assert notices == ("bboxes: 2 of 3 boxes are empty and were left out",)


def test_rows_of_x_y_width_height_are_read_on_request() -> None:
    rows = [[10, 20, 30, 40], [1, 2, 3, 4, 0.5]]
    assert [box.xyxy for box in parse_boxes(rows, 1, box_format="x y width height")] == [(10, 20, 40, 60), (1, 2, 4, 6)]
    assert [box.xyxy for box in parse_boxes([FACE], 1, box_format="x y width height")] == [FACE_AT]


def test_boxes_over_the_edge_are_clipped_with_a_notice() -> None:
    boxes = parse_boxes([[-5, -5, 20, 20], [50, 50, 60, 60]], 1)
    detections, notices = from_boxes(boxes, ONE)
    assert detections.items[0].box == (0, 0, 20, 20)
    assert "1 of 2" in notices[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("[[1, 2, 3", "bboxes is no JSON.*line 1"),
        ("face", "bboxes is no JSON"),
        (7, "bboxes is a int"),
        ([[10, 20, 30, 40, math.nan]], "score nan"),
        ([{**FACE, "score": math.nan}], "box 0.*score nan"),
        ([{**FACE, "score": 93}], "score 93"),
        ([FACE, {**HAND, "width": -30}], "box 1.*reversed"),
        ([[30, 20, 10, 40]], "box 0.*reversed"),
        ([[10, 20, math.inf, 40]], "finite"),
        ([[1, 2, 3]], "box 0"),
        ([{"x": 1, "y": 2}], "box 0"),
        ([{"x": "left", "y": 2, "width": 3, "height": 4}], "box 0"),
        ([FACE, "face"], "box 1"),
        ({"boxes": [[1, 2, 3, 4]], "scores": [0.5, 0.6]}, "1 boxes but 2 scores"),
        ({"boxes": [[1, 2, 3, 4]], "labels": []}, "1 boxes but 0 labels"),
        ({"boxes": [[1, 2, 3, 4]], "scores": 0.5}, "scores"),
        ({"boxes": 5}, "boxes"),
        ([[FACE], [HAND]], "lists for 2 pictures, image holds 1"),
    ],
)
def test_what_cannot_be_read_is_named(given: Any, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted) as caught:
        found(given)
    assert str(caught.value).startswith("bboxes")


def test_a_box_outside_the_picture_is_left_out_and_named() -> None:
    boxes = parse_boxes([[10, 20, 30, 40], [300, 10, 320, 40], [-50, -50, -10, -10]], 1)
    masks = torch.zeros(3, 100, 200)
    masks[0, 20:40, 10:30] = 1
    detections, notices = from_boxes(boxes, ONE, masks)
    assert [item.box for item in detections] == [(10, 20, 30, 40)]
    assert (
        "2 of 3 boxes lie outside the 200x100 px picture and were left out, first number 1 [300, 10, 320, 40]"
        in (notices[0])
    )


def test_masks_must_fit_boxes_or_pictures() -> None:
    with pytest.raises(LunaInputError, match="masks holds 3, bboxes 2 boxes and image 1"):
        found([FACE, HAND], ONE, torch.ones(3, 100, 200))
    with pytest.raises(LunaInputError, match="aspect"):
        found([FACE], ONE, torch.ones(1, 100, 100))


def test_scores_that_come_apart_join_their_boxes() -> None:
    boxes = parse_boxes("[[1, 2, 3, 4], [5, 6, 7, 8]]", 1)
    assert [box.score for box in with_scores(boxes, "[0.25, 1]")] == [0.25, 1.0]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ("[0.5", "is no JSON"),
        ("[0.5]", "1 scores for 2 boxes"),
        ("[0.5, NaN]", "number 1: score nan"),
        ('[0.5, "high"]', "a list of numbers"),
        ("0.5", "a list of numbers"),
    ],
)
def test_scores_that_do_not_fit_are_named(scores: str, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=f"scores_json.*{wanted}"):
        with_scores(parse_boxes("[[1, 2, 3, 4], [5, 6, 7, 8]]", 1), scores)


def run(**inputs: Any) -> Any:
    return LunaDetectionsFromBoxes.execute(
        **{"image": torch.zeros(1, 100, 200, 3), "label": "", "boxes_json": ""} | inputs
    )


def test_the_node_takes_either_text_or_boxes() -> None:
    assert len(run(bboxes=[[FACE, HAND]], label="face").args[0]) == 2
    assert len(run(boxes_json="[[1, 2, 3, 4]]").args[0]) == 1
    scored = run(boxes_json="[[1, 2, 3, 4]]", scores_json="[0.5]", masks=torch.ones(1, 100, 200)).args[0].items[0]
    assert (scored.score, scored.mask is None) == (0.5, False)
    outside = run(boxes_json="[[300, 2, 303, 4]]")
    assert len(outside.args[0]) == 0
    assert "boxes_json: 1 of 1 boxes lie outside" in outside.ui["text"][0]
    assert run(boxes_json="[[10, 20, 30, 40]]", box_format="x y width height").args[0].items[0].box == (10, 20, 40, 60)
    with pytest.raises(LunaInputError, match="neither bboxes nor boxes_json"):
        run()
    with pytest.raises(LunaInputError, match="both bboxes and boxes_json"):
        run(bboxes=[FACE], boxes_json="[[1, 2, 3, 4]]")
    with pytest.raises(LunaInputError, match="boxes_json is no JSON"):
        run(boxes_json="{")


def strips(*boxes: dict[str, float], height: int = 100, width: int = 200) -> torch.Tensor:
    """One mask [n,H,W] for each box, filled."""
    masks = torch.zeros(len(boxes), height, width)
    for mask, box in zip(masks, boxes, strict=True):
        x, y = round(box["x"]), round(box["y"])
        mask[y : y + round(box["height"]), x : x + round(box["width"])] = 1
    return masks


def test_numbers_written_as_text_are_numbers() -> None:
    given = {"x": "1", "y": "2", "width": "3", "height": "4", "score": "0.5"}
    assert places(found(given)) == [(0, (1, 2, 4, 6), 0.5)]
    assert places(found([["1", "2", "3", "4"]])) == [(0, (1, 2, 3, 4), 1.0)]
    assert places(found({"x1": "1", "y1": 2, "x2": "3.5", "y2": 4})) == [(0, (1, 2, 3.5, 4), 1.0)]


def test_point_prompts_alone_give_masks_which_become_detections() -> None:
    """Core SAM3 with points gives one mask per picture and no box."""
    masks = strips(FACE, HAND)
    detections, notices = from_boxes(parse_boxes([[], []], 2), TWO, masks)
    assert [(item.image_index, item.box) for item in detections] == [(0, (10, 20, 50, 70)), (1, HAND_AT)]
    assert "bboxes holds no box" in notices[0]


def test_box_prompts_give_a_mask_for_each_which_become_detections() -> None:
    detections, notices = from_boxes(parse_boxes([[]], 1), ONE, strips(FACE, HAND, EYE))
    assert [item.box for item in detections] == [(10, 20, 50, 70), HAND_AT, EYE_AT]
    assert "3 detections were made of masks alone" in notices[0]


def test_masks_without_boxes_that_fit_no_picture_name_the_way_out() -> None:
    with pytest.raises(LunaInputError, match=r"masks holds 3, bboxes no box and image 2 pictures.*individual_masks"):
        from_boxes(parse_boxes([[], []], 2), TWO, strips(FACE, HAND, EYE))


def test_points_and_words_give_a_mask_more_than_boxes_in_each_picture() -> None:
    """Core SAM3 puts the mask of the points before those of the words."""
    boxes = parse_boxes([[FACE], [HAND, EYE]], 2)
    masks = strips(EYE, FACE, FACE, HAND, EYE)
    detections, notices = from_boxes(boxes, TWO, masks)
    assert [(item.image_index, item.box) for item in detections] == [
        (0, EYE_AT),
        (0, (10, 20, 51, 71)),
        (1, (10, 20, 50, 70)),
        (1, HAND_AT),
        (1, EYE_AT),
    ]
    assert [item.score for item in detections] == [1.0, 0.93, 1.0, 0.71, 0.5]
    assert "2 detections were made of masks alone" in notices[0]


def test_a_mask_too_many_that_lies_elsewhere_is_not_guessed_at() -> None:
    with pytest.raises(LunaInputError, match="masks holds 3, bboxes 2 boxes"):
        from_boxes(parse_boxes([[FACE, HAND]], 1), ONE, strips(FACE, HAND, EYE).flip(0))


def test_what_of_a_shared_mask_no_box_touches_is_named() -> None:
    shared = strips(FACE, EYE).amax(dim=0, keepdim=True)
    detections, notices = from_boxes(parse_boxes([[FACE]], 1), ONE, shared)
    assert len(detections) == 1
    assert "masks: 1 area(s) that no box touches were left out" in notices[0]
    assert from_boxes(parse_boxes([[FACE, EYE]], 1), ONE, shared)[1] == ()


def test_one_mask_is_spread_over_the_pictures() -> None:
    detections, _ = from_boxes(parse_boxes([[FACE, HAND]], 3), Picture(200, 100, 3), torch.ones(1, 100, 200))
    assert [item.image_index for item in detections] == [0, 0, 1, 1, 2, 2]
    assert all(item.mask is not None for item in detections)


def test_a_faint_mask_does_not_widen_its_box() -> None:
    mask = strips(FACE).clamp(min=1 / 255)
    (item,) = from_boxes(parse_boxes([[FACE]], 1), ONE, mask)[0]
    assert item.box == (10, 20, 51, 71)


DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (DEEP, "nested"),
        ("[" * 900 + "]" * 900, "are needed"),
        (f"[[1, 2, 3, {LONG}]]", "number"),
        (f"[[1, 2, 3, 1{'0' * 400}]]", "number"),
        (f'[["1", "2", "3", "{LONG}"]]', "number"),
        ('{"boxes": null}', "boxes is None: a list"),
        ('{"boxes": {}}', "boxes is"),
        ('{"boxes": [[1, 2, 3, 4]], "scores": {}}', "scores is"),
        ('{"boxes": [[1, 2, 3, 4]], "labels": "face"}', "labels is"),
        ('[[1, 2, 3, 4, "high"]]', "'high'"),
        ("[[true, 2, 3, 4]]", "number"),
        ("[[Infinity, 2, 3, 4]]", "finite"),
        ("[[1, 2, 3, 1e999]]", "finite"),
        ("[[1, 2, 3, 1e300]]", "finite"),
        ('[{"x": 1, "y": 2, "width": null, "height": 4}]', "box 0"),
        ('[{"x": 1, "y": 2, "width": [3, 4], "height": 4}]', "box 0"),
        ('[{"x": 1, "y": 2, "width": 3, "height": 4, "label": {"a": 1}}]', "label"),
        ("null", "bboxes is"),
        ("[null]", "None"),
        ("[[null]]", "None"),
        ("[[[[[[1, 2, 3, 4]]]]]]", "bboxes"),
        ("1", "bboxes is a int"),
        ('"face"', "bboxes is"),
        ([[1, 2, 3, 10**400]], "number"),
        ([[1, 2, 3, 4j]], "number"),
        ([{1: 2}], "box 0"),
        ([[1, 2, 3, object()]], "are needed"),
        (torch.ones(4, dtype=torch.complex64), "number"),
        (torch.ones(1, 500, 500, 3), "750000"),
        (np.array([["a", "b", "c", "d"]]), "number"),
        (np.array([None, {}], dtype=object), "bboxes"),
        ({"boxes": torch.zeros(2, 4), "scores": torch.zeros(3)}, "2 boxes but 3 scores"),
        ([[1, 2, 3, 4]] * (MOST_BOXES + 1), f"{MOST_BOXES + 1} boxes"),
    ],
)
def test_only_declared_errors_come_out_and_they_are_short(given: Any, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted) as caught:
        found(given)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "scores", [DEEP, f"[{LONG}]", f"[1{'0' * 400}]", "[1e999]", "[null]", "{}", '[{"a": 1}]', "[true]", "[[0.5]]"]
)
def test_scores_that_are_none_raise_declared_errors(scores: str) -> None:
    with pytest.raises(LunaInputError, match="scores_json") as caught:
        with_scores(parse_boxes("[[1, 2, 3, 4]]", 1), scores)
    assert len(str(caught.value)) < 600


def test_labels_keep_to_one_line_and_one_spelling() -> None:
    given = [{**FACE, "label": "le\u0301o\n\ud800  und\tich"}, {**HAND, "label": None}, {**EYE, "label": 7}]
    assert [item.label for item in found(given, label="thing")] == ["l\u00e9o und ich", "thing", "7"]


def test_thousands_of_boxes_on_hundreds_of_pictures_take_seconds() -> None:
    per_picture = [[{**FACE, "score": 0.5} for _ in range(30)] for _ in range(300)]
    start = time.process_time()
    assert len(found(per_picture, Picture(200, 100, 300))) == 9000
    assert time.process_time() - start < 3
