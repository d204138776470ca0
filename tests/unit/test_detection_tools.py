"""Filter, combine, draw: what passes, in which order, and that the drawing shows it."""

import math
import time
from typing import Any

import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.detection_tools import (
    PER_DETECTION,
    PER_PICTURE,
    LunaDetectionsCombine,
    LunaDetectionsFilter,
    LunaDetectionsPreview,
    LunaDetectionsToMask,
)
from luna_refinement.picture.boxes import Box
from luna_refinement.picture.detections import Detection, Detections
from luna_refinement.picture.drawing import colour_of, draw_detections
from luna_refinement.picture.masks import rasterise
from luna_refinement.sam3_bridge.overlaps import box_iou, mask_iou, without_overlaps
from luna_refinement.sam3_bridge.select import (
    LabelPatterns,
    Selection,
    parse_labels,
    select,
)

SMALL_FACE = Detection(0, (10, 10, 20, 20), score=0.9, label="face")
LARGE_FACE = Detection(0, (30, 30, 90, 90), score=0.6, label="Face")
HAND = Detection(0, (150, 80, 170, 95), score=0.8, label="left hand")
MIDDLE_EYE = Detection(0, (95, 45, 105, 55), score=0.3, label="eye")
FOUND = Detections((SMALL_FACE, LARGE_FACE, HAND, MIDDLE_EYE), 200, 100)

FILTER = {
    "labels": "",
    "min_score": 0.0,
    "min_size": 0.0,
    "max_size": 1.0,
    "keep": "all",
    "max_count": 0,
    "order": "as found",
    "nms_iou": 1.0,
}


def filtered(detections: Detections = FOUND, **inputs: Any) -> list[Detection]:
    return list(LunaDetectionsFilter.execute(detections=detections, **(FILTER | inputs)).args[0])


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({}, [SMALL_FACE, LARGE_FACE, HAND, MIDDLE_EYE]),
        ({"labels": "face"}, [SMALL_FACE, LARGE_FACE]),
        ({"labels": "*hand, eye"}, [HAND, MIDDLE_EYE]),
        ({"labels": "-*hand"}, [SMALL_FACE, LARGE_FACE, MIDDLE_EYE]),
        ({"labels": "*\n-face; -eye"}, [HAND]),
        ({"labels": "hand"}, []),
        ({"min_score": 0.6}, [SMALL_FACE, LARGE_FACE, HAND]),
        ({"min_size": 0.01}, [LARGE_FACE, HAND]),
        ({"max_size": 0.01}, [SMALL_FACE, MIDDLE_EYE]),
        ({"order": "score"}, [SMALL_FACE, HAND, LARGE_FACE, MIDDLE_EYE]),
        ({"order": "area"}, [LARGE_FACE, HAND, SMALL_FACE, MIDDLE_EYE]),
        ({"order": "left to right"}, [SMALL_FACE, LARGE_FACE, MIDDLE_EYE, HAND]),
        ({"order": "top to bottom"}, [SMALL_FACE, MIDDLE_EYE, LARGE_FACE, HAND]),
        ({"order": "area", "max_count": 2}, [LARGE_FACE, HAND]),
        ({"max_count": 1}, [SMALL_FACE]),
    ],
)
def test_filter(inputs: dict[str, Any], wanted: list[Detection]) -> None:
    assert filtered(**inputs) == wanted


@pytest.mark.parametrize(
    ("keep", "wanted"), [("largest", LARGE_FACE), ("best", SMALL_FACE), ("most central", LARGE_FACE)]
)
def test_keep_chooses_one_of_each_label(keep: str, wanted: Detection) -> None:
    same = Detections((SMALL_FACE, Detection(0, LARGE_FACE.box, score=0.6, label="face"), HAND), 200, 100)
    kept = filtered(same, keep=keep)
    assert [item.box for item in kept] == [wanted.box, HAND.box]


def test_each_picture_is_chosen_from_on_its_own() -> None:
    items = [Detection(index, (x, 0, x + 10 + index, 10)) for index in (1, 0) for x in (0, 40, 80)]
    found = Detections(tuple(items), 200, 100, image_count=2)
    kept = filtered(found, max_count=1, order="left to right")
    assert [(item.image_index, item.box[0]) for item in kept] == [(0, 0), (1, 0)]


def test_ties_keep_the_order_they_were_found_in() -> None:
    same = Detections(tuple(Detection(0, (k, 0, k + 5, 5)) for k in range(20)), 200, 100)
    assert [item.box[0] for item in filtered(same, order="score")] == list(range(20))
    assert filtered(same, keep="best")[0].box[0] == 0


def test_nms_keeps_the_better_of_two_boxes_and_the_given_order() -> None:
    weak = Detection(0, (0, 0, 10, 10), score=0.4, label="person")
    strong = Detection(0, (0, 0, 10, 11), score=0.9, label="woman")
    apart = Detection(0, (50, 50, 60, 60), score=0.1)
    found = Detections((apart, weak, strong), 100, 100)
    assert filtered(found, nms_iou=0.5) == [apart, strong]
    assert filtered(found, nms_iou=0.95) == [apart, weak, strong]


def test_nms_spares_masks_that_share_only_their_box() -> None:
    left, right = torch.zeros(10, 10), torch.zeros(10, 10)
    left[:, :5], right[:, 5:] = 1, 1
    hair, face = (Detection(0, (0, 0, 40, 40), mask, score=0.5) for mask in (left, right))
    assert len(without_overlaps([hair, face], 0.5)) == 2
    assert len(without_overlaps([hair, Detection(0, (0, 0, 40, 40), left.clone())], 0.5)) == 1


def test_nms_sees_through_a_stray_px_of_a_mask() -> None:
    block = Detection(0, (0, 0, 40, 40), torch.ones(40, 40), score=0.9)
    speck = torch.zeros(200, 200)
    speck[:40, :40], speck[199, 199] = 1, 1
    assert without_overlaps([Detection(0, (0, 0, 200, 200), speck, score=0.5), block], 0.7) == [block]


def test_iou_of_known_rectangles() -> None:
    one, other = Detection(0, (0, 0, 10, 10)), Detection(0, (5, 0, 15, 10))
    assert float(box_iou([one, other])[0, 1]) == pytest.approx(1 / 3)
    assert mask_iou(one, other) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({"labels": "face, -"}, "labels: '-'"),
        ({"min_score": math.nan}, "min_score"),
        ({"nms_iou": 1.5}, "nms_iou"),
        ({"min_size": 0.5, "max_size": 0.2}, "min_size 0.5 is above max_size 0.2"),
        ({"keep": "smallest"}, "keep"),
        ({"order": "random"}, "order"),
        ({"max_count": -1}, "max_count"),
    ],
)
def test_filter_settings_that_cannot_be_used_are_named(inputs: dict[str, Any], wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted):
        filtered(**inputs)


def test_a_filter_that_lets_nothing_pass_says_what_there_was() -> None:
    output = LunaDetectionsFilter.execute(detections=FOUND, **(FILTER | {"labels": "foot"}))
    assert "Face, eye, face, left hand" in output.ui["text"][0]
    assert LunaDetectionsFilter.execute(detections=Detections((), 4, 4), **FILTER).ui is None


def test_label_patterns() -> None:
    assert "" in LabelPatterns()
    assert "Face" in parse_labels("face")
    assert "left hand" not in parse_labels("*, -*hand")


def test_selection_needs_no_node() -> None:
    assert len(select(FOUND, Selection(min_score=0.85))) == 1


def test_combine_puts_inputs_one_after_the_other_at_the_first_size() -> None:
    larger = Detections((Detection(0, (100, 100, 200, 200), label="dog"),), 400, 200)
    combined = LunaDetectionsCombine.execute(detections_1=FOUND, detections_3=larger).args[0]
    assert len(combined) == 5
    assert (combined.width, combined.height) == (200, 100)
    assert combined.items[:4] == FOUND.items
    assert combined.items[4].box == (50, 50, 100, 100)


@pytest.mark.parametrize("other", [Detections((), 100, 100), Detections((), 200, 100, image_count=2)])
def test_other_pictures_cannot_be_combined(other: Detections) -> None:
    with pytest.raises(LunaInputError, match=r"detections_4 was made on .*detections_1 on 1 picture\(s\) of 200x100"):
        LunaDetectionsCombine.execute(detections_1=FOUND, detections_4=other)


def test_masks_per_picture_and_per_detection() -> None:
    found = Detections((SMALL_FACE, Detection(1, (0, 0, 200, 50), torch.full((2, 2), 0.5)), SMALL_FACE), 200, 100, 2)
    union = LunaDetectionsToMask.execute(detections=found, masks=PER_PICTURE).args[0]
    assert union.shape == (2, 100, 200)
    assert float(union[0].sum()) == pytest.approx(100)
    assert float(union[1].sum()) == pytest.approx(0.5 * 200 * 50)
    single = LunaDetectionsToMask.execute(detections=found, masks=PER_DETECTION).args[0]
    assert single.shape == (3, 100, 200)
    assert torch.equal(single[0], union[0])
    assert torch.equal(single[1], union[1])


def test_masks_at_the_size_of_a_picture() -> None:
    mask = LunaDetectionsToMask.execute(FOUND, PER_PICTURE, torch.zeros(1, 200, 400, 3)).args[0]
    assert mask.shape == (1, 200, 400)
    assert float(mask[0, 20:40, 20:40].mean()) == 1
    with pytest.raises(LunaInputError, match="aspect"):
        LunaDetectionsToMask.execute(FOUND, PER_PICTURE, torch.zeros(1, 200, 200, 3))
    with pytest.raises(LunaInputError, match=r"on 1 picture\(s\), image holds 2"):
        LunaDetectionsToMask.execute(FOUND, PER_PICTURE, torch.zeros(2, 100, 200, 3))


@pytest.mark.parametrize("masks", [PER_PICTURE, PER_DETECTION])
def test_no_detection_is_a_black_mask_and_a_notice(masks: str) -> None:
    output = LunaDetectionsToMask.execute(Detections((), 20, 10, image_count=2), masks)
    assert output.args[0].shape == (2, 10, 20)
    assert not output.args[0].any()
    assert "black" in output.ui["text"][0]


def test_drawing_tints_masks_frames_boxes_and_leaves_the_rest() -> None:
    mask = torch.zeros(40, 40)
    mask[10:30, 10:30] = 1
    found = Detections((Detection(1, (100, 100, 200, 200), mask, score=0.5, label="face"),), 400, 300, image_count=2)
    image = torch.full((2, 300, 400, 4), 0.25)
    drawn = draw_detections(image, found)
    colour = torch.tensor(colour_of(0)) / 255
    assert drawn.shape == (2, 300, 400, 3)
    assert torch.allclose(drawn[0], image[0, ..., :3], atol=0.01)  # nothing on the first picture
    assert torch.allclose(drawn[1, 150, 150], 0.25 + 0.4 * (colour - 0.25), atol=0.01)  # inside the mask
    assert torch.allclose(drawn[1, 110, 150], image[1, 0, 0, :3], atol=0.01)  # in the box, outside the mask
    for y, x in ((100, 150), (199, 150), (150, 100), (150, 199)):
        assert torch.allclose(drawn[1, y, x], colour, atol=0.01)
    assert torch.allclose(drawn[1, 290, 390], image[1, 0, 0, :3], atol=0.01)


@pytest.mark.parametrize("side", [256, 1024, 4096])
def test_tags_grow_with_the_picture(side: int) -> None:
    """Dark text on a plate of the row's colour, a fiftieth of the picture high, above its box."""
    box = (side * 0.3, side * 0.3, side * 0.6, side * 0.6)
    drawn = draw_detections(torch.zeros(1, side, side, 3), Detections((Detection(0, box, label="face"),), side, side))
    above = drawn[0, : int(box[1])]
    plate = torch.isclose(above, torch.tensor(colour_of(0)) / 255, atol=0.01).all(dim=-1)
    rows = plate.any(dim=1).nonzero()
    assert 0.012 * side < len(rows) < 0.08 * side
    assert int(rows[-1]) == int(box[1]) - 1
    assert 0.005 * side < int(plate.any(dim=0).sum()) < 0.3 * side


@pytest.mark.parametrize(
    "box", [(0, 0, 3, 3), (397, 0, 400, 3), (0, 297, 3, 300), (397, 297, 400, 300), (0, 0, 400, 300)]
)
def test_tags_of_boxes_at_the_edge_stay_on_the_picture(box: tuple[int, int, int, int]) -> None:
    item = Detection(0, box, label="face")
    drawn = draw_detections(torch.zeros(1, 300, 400, 3), Detections((item,), 400, 300))
    plate = torch.isclose(drawn[0], torch.tensor(colour_of(0)) / 255, atol=0.01).all(dim=-1)
    assert int(plate.any(dim=0).sum()) > 50


def test_the_preview_node_shows_and_returns_the_drawing(tmp_path: Any) -> None:
    import folder_paths

    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path))
    try:
        output = LunaDetectionsPreview.execute(image=torch.zeros(1, 200, 400, 3), detections=FOUND)
    finally:
        folder_paths.set_temp_directory(before)
    assert output.args[0].shape == (1, 200, 400, 3)
    assert (tmp_path / output.ui.as_dict()["images"][0]["filename"]).is_file()


def scattered(count: int, with_masks: bool, side: float = 400) -> list[Detection]:
    generator = torch.Generator().manual_seed(5)
    places = torch.rand(count, 2, generator=generator) * 3000
    scores = torch.rand(count, generator=generator)
    ellipse = torch.linspace(-1, 1, 48)[:, None] ** 2 + torch.linspace(-1, 1, 48)[None, :] ** 2 < 1
    mask = ellipse.float() if with_masks else None
    return [
        Detection(0, (float(x), float(y), float(x) + side, float(y) + side), mask, float(score), "thing")
        for (x, y), score in zip(places, scores, strict=True)
    ]


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("iou", [0.05, 0.5])
def test_overlaps_of_3000_take_seconds(with_masks: bool, iou: float) -> None:
    """A generous bound, for machines under load: comparing every two takes minutes."""
    found = Detections(tuple(scattered(3000, with_masks)), 4096, 4096)
    start = time.process_time()
    kept = filtered(found, nms_iou=iou)
    assert time.process_time() - start < 20
    assert 20 < len(kept) < 1500


def test_overlaps_are_told_as_by_comparing_every_two() -> None:
    items = scattered(60, with_masks=True, side=900)
    ranking = sorted(range(len(items)), key=lambda place: -items[place].score)
    kept: list[int] = []
    for place in ranking:
        if all(fine_iou(items[place], items[better]) <= 0.4 for better in kept):
            kept.append(place)
    assert without_overlaps(items, 0.4) == [items[place] for place in sorted(kept)]


def fine_iou(one: Detection, other: Detection) -> float:
    """Of the masks drawn px by px."""
    drawn = [
        rasterise(tuple(value / 10 for value in item.box), item.mask, Box(0, 0, 400, 400)) for item in (one, other)
    ]
    return float(torch.minimum(*drawn).sum() / torch.maximum(*drawn).sum())


def test_a_filter_over_thousands_of_pictures_takes_seconds() -> None:
    items = [Detection(k, (0, 0, 10, 10), label="face") for k in range(4000)]
    start = time.process_time()
    assert len(filtered(Detections(tuple(items), 20, 20, 4000), keep="best", nms_iou=0.5, max_count=1)) == 4000
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({"labels": None}, "labels is None"),
        ({"min_score": "0.5"}, "min_score is '0.5'"),
        ({"min_score": None}, "min_score is None"),
        ({"max_size": 10**400}, "max_size is"),
        ({"max_count": 1.5}, "max_count is 1.5"),
        ({"max_count": math.nan}, "max_count is nan"),
        ({"max_count": "3"}, "max_count is '3'"),
        ({"keep": []}, "keep is"),
        ({"order": {}}, "order is"),
    ],
)
def test_filter_settings_of_another_kind_are_named(inputs: dict[str, Any], wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted):
        filtered(**inputs)


def test_a_mask_for_each_of_thousands_is_refused_before_it_fills_the_memory() -> None:
    found = Detections(tuple(scattered(3000, with_masks=False)), 4096, 4096)
    with pytest.raises(LunaInputError, match=r"3000 masks.*187.5 GiB"):
        LunaDetectionsToMask.execute(found, PER_DETECTION)
