"""SEGS come in by their fields alone, and go back with everything they carried."""

import math
from collections import namedtuple
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.checks import fitted
from luna_refinement.nodes.detection_tools import PER_PICTURE, LunaDetectionsFilter, LunaDetectionsToMask
from luna_refinement.nodes.segs import LunaDetectionsFromSEGS, LunaDetectionsToSEGS
from luna_refinement.picture.boxes import Box
from luna_refinement.picture.detections import Detection, Detections
from luna_refinement.picture.masks import rasterise
from luna_refinement.sam3_bridge.segs import crop_region, from_segs, to_segs
from luna_refinement.sam3_bridge.select import combine

ForeignSEG = namedtuple(
    "ForeignSEG",
    ["cropped_image", "cropped_mask", "confidence", "crop_region", "bbox", "label", "control_net_wrapper"],
    defaults=[None],
)


def seg(**fields: Any) -> Any:
    """A face at 40..80 x 30..60 px in a crop of 20..100 x 10..80 px, its mask an inner rectangle."""
    mask = np.zeros((70, 80), dtype=np.float32)
    mask[25:45, 25:55] = 1
    values = {
        "cropped_image": torch.rand(1, 70, 80, 3),
        "cropped_mask": mask,
        "confidence": np.array(0.8, dtype=np.float32),
        "crop_region": [20, 10, 100, 80],
        "bbox": np.array([40.0, 30.0, 80.0, 60.0]),
        "label": "face",
        "control_net_wrapper": object(),
    }
    return ForeignSEG(**(values | fields))


SIZE = (100, 200)


def test_round_trip_hands_back_the_very_segments() -> None:
    given = [seg(), seg(label="hand", confidence=0.5), seg(cropped_mask=None, cropped_image=None)]
    (height, width), back = to_segs(from_segs((SIZE, given))[0])
    assert (height, width) == SIZE
    assert len(back) == 3
    assert all(one is other for one, other in zip(back, given, strict=True))


def test_round_trip_keeps_the_segments_of_those_that_passed_a_filter() -> None:
    given = [seg(), seg(label="hand"), seg()]
    found, _ = from_segs((SIZE, given))
    kept = found.with_items([found.items[2], found.items[0]])
    assert [item is wanted for item, wanted in zip(to_segs(kept)[1], (given[2], given[0]), strict=True)] == [True, True]


def test_a_segment_becomes_its_box_and_mask() -> None:
    (item,) = from_segs((SIZE, [seg()]))[0]
    assert item.box == (40, 30, 80, 60)
    assert (item.label, item.score) == ("face", pytest.approx(0.8))
    drawn = rasterise(item.box, item.mask, Box(0, 0, 200, 100))
    wanted = torch.zeros(100, 200)
    wanted[35:55, 45:75] = 1
    assert torch.equal(drawn, wanted)


def test_a_mask_beyond_the_box_is_kept() -> None:
    mask = np.ones((70, 80), dtype=np.float32)
    (item,) = from_segs((SIZE, [seg(cropped_mask=mask)]))[0]
    assert item.box == (20, 10, 100, 80)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(1, 70, 80), torch.ones(70, 80, dtype=torch.bool), np.full((70, 80), 255, dtype=np.uint8)],
)
def test_masks_of_every_kind_are_read(mask: Any) -> None:
    (item,) = from_segs((SIZE, [seg(cropped_mask=mask)]))[0]
    assert item.mask is not None
    assert bool((item.mask == 1).all())


@pytest.mark.parametrize("overshoot", [2e-6, 9e-4])
def test_what_a_blur_overshoots_is_clamped(overshoot: float) -> None:
    mask = torch.full((70, 80), 1 + overshoot)
    mask[:, :40] = -overshoot
    (item,) = from_segs((SIZE, [seg(cropped_mask=mask)]))[0]
    assert item.mask is not None
    assert set(item.mask.unique().tolist()) <= {0.0, 1.0}


def test_at_another_size_the_place_is_scaled_and_the_rest_kept() -> None:
    given = seg()
    (back,) = to_segs(from_segs((SIZE, [given]))[0].scaled_to(400, 200), crop_factor=2.0)[1]
    assert tuple(back.bbox) == (80, 60, 160, 120)
    assert back.label == "face"
    assert back.confidence == pytest.approx(0.8)
    assert back.control_net_wrapper is given.control_net_wrapper
    x1, y1, x2, y2 = back.crop_region
    assert back.cropped_mask.shape == (y2 - y1, x2 - x1)


def test_a_changed_mask_makes_a_new_segment() -> None:
    found, _ = from_segs((SIZE, [seg()]))
    changed = replace(found.items[0], mask=torch.ones(3, 3))
    (back,) = to_segs(found.with_items([changed]))[1]
    assert back.cropped_mask.sum() == pytest.approx(40 * 30)


def test_new_segments_have_the_fields_in_the_usual_order() -> None:
    found = Detections((Detection(0, (10, 10, 30, 20), label="eye"), Detection(1, (0, 0, 5, 5))), 64, 48, image_count=2)
    header, (one,) = to_segs(found, image_index=0)
    assert header == (48, 64)
    assert one._fields == ForeignSEG._fields
    assert one.crop_region == (0, 0, 61, 31)
    assert one.cropped_mask.dtype == np.float32
    assert one.cropped_mask.sum() == pytest.approx(200)
    assert len(to_segs(found, image_index=1)[1]) == 1


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 190), st.floats(0, 90), st.floats(1, 200), st.floats(1, 100), st.floats(1, 10), st.integers(0, 1))
def test_crop_regions_hold_their_box_and_stay_inside(
    x: float, y: float, wide: float, high: float, factor: float, whole: int
) -> None:
    box = (x, y, min(x + wide, 200), min(y + high, 100))
    if whole:
        box = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
    x1, y1, x2, y2 = crop_region(box, factor, 200, 100)
    assert 0 <= x1 <= box[0] < box[2] <= x2 <= 200
    assert 0 <= y1 <= box[1] < box[3] <= y2 <= 100


def test_no_segment_is_no_detection_and_a_notice() -> None:
    found, notices = from_segs((SIZE, []))
    assert (len(found), found.width, found.height) == (0, 200, 100)
    assert "no segment" in notices[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, "segs is a NoneType"),
        ([seg()], "no SEGS"),
        ((SIZE, [object()]), "segment 0 is a object without"),
        ((SIZE, [seg(), seg(bbox=[1, 2, 3])]), "segment 1: bbox"),
        ((SIZE, [seg(bbox=[80, 30, 40, 60])]), "segment 0: bbox.*reversed"),
        ((SIZE, [seg(confidence=math.nan)]), "segment 0: confidence: score nan"),
        ((SIZE, [seg(confidence=None)]), "confidence"),
        ((SIZE, [seg(confidence="high")]), "confidence"),
        ((SIZE, [seg(crop_region=[20, 10, 300, 80])]), "crop_region.*outside"),
        ((SIZE, [seg(cropped_mask=np.zeros((3, 3)))]), r"cropped_mask has shape \[3, 3\]"),
        ((SIZE, [seg(cropped_mask=np.full((70, 80), np.nan))]), "outside 0..1"),
    ],
)
def test_what_is_no_segs_is_named(given: Any, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted) as caught:
        from_segs(given)
    assert str(caught.value).startswith("segs")


def test_pictures_that_do_not_exist_are_named() -> None:
    with pytest.raises(LunaInputError, match="image_index is 1"):
        to_segs(Detections((), 10, 10), image_index=1)
    with pytest.raises(LunaInputError, match="crop_factor"):
        to_segs(Detections((), 10, 10), crop_factor=0.5)


def test_the_nodes_go_both_ways() -> None:
    given = (SIZE, [seg(), seg()])
    found = LunaDetectionsFromSEGS.execute(segs=given).args[0]
    output = LunaDetectionsToSEGS.execute(detections=found, image_index=0, crop_factor=3.0)
    assert output.args[0][1][0] is given[1][0]
    assert output.ui is None
    assert "empty SEGS" in LunaDetectionsToSEGS.execute(Detections((), 10, 10), 0, 3.0).ui["text"][0]


@pytest.mark.parametrize("header", [(0, 0), [0, 0], (0, 0, 3), np.array([0, 0])])
def test_the_empty_segs_of_the_impact_pack_are_nothing_on_any_picture(header: Any) -> None:
    found, notices = from_segs((header, []))
    assert len(found) == 0
    assert "no segment" in notices[0]
    assert fitted(found, torch.zeros(2, 30, 70, 3)).image_count == 2
    assert (fitted(found, torch.zeros(1, 30, 70, 3)).width, len(fitted(found, torch.zeros(1, 30, 70, 3)))) == (70, 0)
    assert to_segs(found) == ((0, 0), [])
    mask = LunaDetectionsToMask.execute(found, PER_PICTURE).args[0]
    assert mask.shape == (1, 64, 64)
    assert not mask.any()
    known = from_segs((SIZE, [seg()]))[0]
    for parts in ({1: found, 2: known}, {1: known, 2: found}):
        assert (combine(parts).width, len(combine(parts))) == (200, 1)
    assert len(LunaDetectionsFilter.execute(found, "", 0.0, 0.0, 1.0, "all", 0, "as found", 0.5).args[0]) == 0


def test_a_segment_outside_the_picture_is_left_out_and_named() -> None:
    found, notices = from_segs((SIZE, [seg(), seg(bbox=[280, 30, 340, 60])]))
    assert len(found) == 1
    assert "1 of 2 segments lie outside the 200x100 px picture and were left out, first number 1" in notices[0]


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((70, 80), dtype=np.float32)[::-1, ::-1],
        np.ones((70, 80), dtype=">f4"),
        np.ones((70, 80), dtype=np.float16),
        np.ones((70, 80), dtype=np.longdouble),
        np.ones((70, 80), dtype=np.int64),
        np.full((70, 80), 255, dtype=">u2"),
        np.ones((140, 160), dtype=np.float32)[::2, ::2],
        [[1.0] * 80] * 70,
        torch.ones(70, 80).requires_grad_(),
        torch.ones(80, 70).T,
        np.ones((70, 80, 1), dtype=np.float32),
    ],
)
def test_masks_of_every_layout_are_read(mask: Any) -> None:
    (item,) = from_segs((SIZE, [seg(cropped_mask=mask)]))[0]
    assert item.mask is not None
    assert bool((item.mask == 1).all())
    assert not item.mask.requires_grad


def test_a_faint_mask_does_not_make_its_crop_the_region() -> None:
    mask = np.full((70, 80), 1 / 255, dtype=np.float32)
    mask[25:45, 25:55] = 1
    (item,) = from_segs((SIZE, [seg(cropped_mask=mask)]))[0]
    assert item.box == (40, 30, 80, 60)


def test_numbers_as_text_tensors_or_lists_are_numbers() -> None:
    given = seg(bbox=("40", 30, torch.tensor(80.0), np.float32(60)), confidence=[0.25])
    (item,) = from_segs((SIZE, [given]))[0]
    assert (item.box, item.score) == ((40, 30, 80, 60), 0.25)


class Claims:
    """A segment list that says it is longer than it is willing to be."""

    def __iter__(self) -> Any:
        while True:
            yield seg()


BIG = 10**400


@pytest.mark.parametrize(
    "given",
    [
        ((math.inf, 200), []),
        ((math.nan, 200), []),
        ((BIG, 200), []),
        ((10**30, 10**30), []),
        ((200_000, 200_000), []),
        ((0, 200), []),
        ((-5, -5), []),
        ((0, 0), [seg()]),
        ((1.5, 200), []),
        (("h", "w"), []),
        ((SIZE,), []),
        (SIZE, "face"),
        (SIZE, {"a": 1}),
        (SIZE, torch.zeros(5)),
        (SIZE, Claims()),
        (SIZE, 5),
        5,
        "segs",
        (SIZE, [seg(bbox="1234")]),
        (SIZE, [seg(bbox=[1, 2, BIG, 4])]),
        (SIZE, [seg(bbox=[1, 2, math.inf, 4])]),
        (SIZE, [seg(bbox=None)]),
        (SIZE, [seg(bbox=[[1, 2], [3, 4]])]),
        (SIZE, [seg(bbox=np.array([None] * 4))]),
        (SIZE, [seg(confidence=BIG)]),
        (SIZE, [seg(confidence={})]),
        (SIZE, [seg(confidence=[0.5, 0.5])]),
        (SIZE, [seg(confidence=torch.tensor([0.5, 0.5]))]),
        (SIZE, [seg(crop_region=[20, 10, math.inf, 80])]),
        (SIZE, [seg(crop_region=[20, 10, BIG, 80])]),
        (SIZE, [seg(crop_region=None)]),
        (SIZE, [seg(crop_region=[20.4, 10.4, 20.45, 10.45])]),
        (SIZE, [seg(cropped_mask=[[1.0], [1.0, 2.0]])]),
        (SIZE, [seg(cropped_mask="mask")]),
        (SIZE, [seg(cropped_mask=np.array("mask"))]),
        (SIZE, [seg(cropped_mask=np.full((70, 80), None))]),
        (SIZE, [seg(cropped_mask=np.full((70, 80), "1"))]),
        (SIZE, [seg(cropped_mask=np.full((70, 80), 1 + 1j))]),
        (SIZE, [seg(cropped_mask=np.zeros((70, 80), dtype="datetime64[s]"))]),
        (SIZE, [seg(cropped_mask=np.full((70, 80), np.inf))]),
        (SIZE, [seg(cropped_mask=np.full((70, 80), 1e300))]),
        (SIZE, [seg(cropped_mask=torch.ones(70, 80).to_sparse())]),
        (SIZE, [seg(cropped_mask=torch.ones(70, 80, dtype=torch.complex64))]),
        (SIZE, [seg(cropped_mask=5)]),
        (SIZE, [seg(cropped_mask={})]),
        (SIZE, [seg(label=np.array(["a", "b"]))]),
        (SIZE, [seg(label={})]),
    ],
)
def test_only_declared_errors_come_out_and_they_are_short(given: Any) -> None:
    with pytest.raises(LunaInputError, match="segs") as caught:
        from_segs(given)
    assert len(str(caught.value)) < 600


def test_segs_of_thousands_are_refused_where_their_crops_would_fill_the_memory() -> None:
    found = Detections(tuple(Detection(0, (k, 0, k + 9, 9)) for k in range(3000)), 4096, 4096)
    with pytest.raises(LunaInputError, match=r"crop_factor is 1000.*187.5 GiB"):
        to_segs(found, crop_factor=1000)
