"""Words are read as concepts, and model outputs of known geometry land where they belong on the picture."""

import math

import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.picture.boxes import Box
from luna_refinement.picture.detections import Detection
from luna_refinement.picture.masks import rasterise
from luna_refinement.sam3_bridge.concepts import Concept, parse_concepts
from luna_refinement.sam3_bridge.from_masks import Picture
from luna_refinement.sam3_bridge.sam3_results import FINER, arrange, cut_px, read_outputs, without
from torch import Tensor

FACE, HAND = Concept("face"), Concept("hand")
GRID = 288
"""Side of SAM3's masks."""


def ellipse_logits(box: tuple[float, float, float, float], side: int = GRID) -> Tensor:
    """[side,side] logits of an ellipse in a box of fractions of the picture: 0 on its edge."""
    at = (torch.arange(side) + 0.5) / side
    x = (at[None, :] - (box[0] + box[2]) / 2) / ((box[2] - box[0]) / 2)
    y = (at[:, None] - (box[1] + box[3]) / 2) / ((box[3] - box[1]) / 2)
    return 20 * (1 - torch.sqrt(x**2 + y**2))


def outputs(*found: tuple[float, tuple[float, float, float, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [Q], presence [1], boxes [Q,4] and masks [Q,h,w] as the model gives them, for scores and boxes."""
    boxes = torch.tensor([box for _, box in found]).reshape(-1, 4)
    masks = torch.stack([ellipse_logits(box) for _, box in found])
    return torch.logit(torch.tensor([score for score, _ in found])), torch.tensor([50.0]), boxes, masks


@pytest.mark.parametrize("size", [(4096, 4096), (4096, 2304), (2304, 4096), (1008, 1008), (640, 480), (200, 100)])
def test_known_geometry_lands_on_the_picture(size: tuple[int, int]) -> None:
    """The picture is squashed to SAM3's square: an ellipse of fractions is an ellipse of the picture's own sides."""
    width, height = size
    picture = Picture(width, height, 1)
    box = (0.2, 0.35, 0.55, 0.8)
    ((item,), empty) = read_outputs(FACE, *outputs((0.9, box)), picture, 0, 0.5)
    assert empty == 0
    assert item.box == pytest.approx((0.2 * width, 0.35 * height, 0.55 * width, 0.8 * height), abs=0.5)
    drawn = rasterise(item.box, item.mask, Box(0, 0, width, height)) > 0.5
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    wanted = (((x[None, :] - 0.375) / 0.175) ** 2 + ((y[:, None] - 0.575) / 0.225) ** 2) < 1
    texel = max(width, height) / GRID / FINER  # what the mask's own grid can tell apart
    differing = float((drawn ^ wanted).sum())
    circumference = math.pi * (0.175 * width + 0.225 * height)
    assert differing / circumference < max(1.0, texel)
    rows, columns = wanted.any(dim=1).nonzero(), drawn.any(dim=0).nonzero()
    assert abs(int(columns[0]) - 0.2 * width) <= 2 * max(1.0, texel)
    assert abs(int(drawn.any(dim=1).nonzero()[-1]) - int(rows[-1])) <= 2 * max(1.0, texel)


def test_masks_px_for_px_lie_over_whole_px() -> None:
    """Where the logits' grid is the picture's they are read as they are, and the box is drawn out to whole px."""
    picture = Picture(GRID, GRID, 1)
    logits = ellipse_logits((0.2, 0.35, 0.55, 0.8))
    box, mask = cut_px(logits, (57.6, 100.8, 158.4, 230.4), picture) or ((), torch.empty(0))
    assert box == (57, 100, 159, 231)
    assert torch.equal(mask, (logits[100:231, 57:159] > 0).float())
    assert cut_px(logits, (0.0, 0.0, 20.0, 20.0), picture) is None
    items, empty = read_outputs(
        FACE, *outputs((0.9, (0.2005, 0.351, 0.5505, 0.799))), Picture(1000, 500, 1), 0, 0.5, cut_px
    )
    assert empty == 0
    assert items[0].box == (200, 175, 551, 400)
    assert items[0].mask is not None
    assert items[0].mask.shape == (225, 351)
    assert float(items[0].mask.mean()) == pytest.approx(math.pi / 4, abs=0.01)


def test_masks_of_the_post_processing_of_transformers_agree() -> None:
    from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor
    from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

    logits, presence, boxes, masks = outputs(
        (0.9, (0.1, 0.2, 0.4, 0.5)), (0.2, (0, 0, 1, 1)), (0.7, (0.5, 0.5, 0.9, 0.7))
    )
    presence = torch.tensor([1.5])
    raw = Sam3ImageSegmentationOutput(
        pred_masks=masks[None], pred_boxes=boxes[None], pred_logits=logits[None], presence_logits=presence[None]
    )
    width, height = 700, 500
    (theirs,) = Sam3ImageProcessor().post_process_instance_segmentation(
        raw, threshold=0.5, target_sizes=[(height, width)]
    )
    ours, _ = read_outputs(FACE, logits, presence, boxes, masks, Picture(width, height, 1), 0, 0.5)
    assert [item.score for item in ours] == pytest.approx(theirs["scores"].tolist())
    for item, box, mask in zip(ours, theirs["boxes"], theirs["masks"], strict=True):
        assert item.box == pytest.approx(box.tolist(), abs=1e-3)
        drawn, wanted = rasterise(item.box, item.mask, Box(0, 0, width, height)) > 0.5, mask > 0.5
        assert int((drawn & wanted).sum()) / int((drawn | wanted).sum()) > 0.98


def test_scores_are_sorted_and_cut_at_the_threshold() -> None:
    box = (0.1, 0.1, 0.3, 0.3)
    items, _ = read_outputs(
        FACE, *outputs((0.6, box), (0.9, box), (0.5, box), (0.1, box)), Picture(100, 100, 2), 1, 0.5
    )
    assert [round(item.score, 3) for item in items] == [0.9, 0.6]
    assert {(item.label, item.image_index) for item in items} == {("face", 1)}


def test_presence_scales_the_score() -> None:
    logits, _, boxes, masks = outputs((0.8, (0.1, 0.1, 0.3, 0.3)))
    (item,), _ = read_outputs(FACE, logits, torch.tensor([0.0]), boxes, masks, Picture(100, 100, 1), 0, 0.1)
    assert item.score == pytest.approx(0.4)
    (item,), _ = read_outputs(FACE, logits, None, boxes, masks, Picture(100, 100, 1), 0, 0.1)
    assert item.score == pytest.approx(0.8)


def test_boxes_over_the_edge_are_clipped_and_empty_ones_counted() -> None:
    logits, presence, boxes, masks = outputs(
        (0.9, (-0.1, 0.2, 0.3, 1.2)),
        (0.9, (1.1, 0.2, 1.3, 0.4)),
        (0.9, (0.5, 0.5, 0.4, 0.6)),
        (0.9, (0.1, 0.1, 0.2, 0.2)),
    )
    masks[3] = -10
    items, empty = read_outputs(FACE, logits, presence, boxes, masks, Picture(200, 100, 1), 0, 0.5)
    assert [item.box for item in items] == [pytest.approx((0, 20, 60, 100))]
    assert empty == 3


def test_nothing_above_the_threshold() -> None:
    assert read_outputs(FACE, *outputs((0.2, (0, 0, 1, 1))), Picture(10, 10, 1), 0, 0.5) == ([], 0)


def test_masks_of_a_full_picture_at_4k_stay_small() -> None:
    (item,), _ = read_outputs(FACE, *outputs((0.9, (0.0, 0.0, 1.0, 1.0))), Picture(4096, 4096, 1), 0, 0.5)
    assert item.mask is not None
    assert item.mask.shape == (GRID * FINER, GRID * FINER)


def box(x: float, score: float = 0.9, label: str = "face", mask: Tensor | None = None) -> Detection:
    return Detection(0, (x, 10.0, x + 40, 50.0), mask, score, label)


def test_limits_count_the_best_of_their_concept() -> None:
    faces = [box(50 * k, 0.9 - 0.1 * k) for k in range(4)]
    hands = [box(50 * k + 1000, 0.5, "hand") for k in range(3)]
    kept = arrange([(Concept("face", limit=2), faces), (HAND, hands)], 0.7, 0)
    assert kept == [*faces[:2], *hands]


def test_max_detections_keeps_the_best_in_the_order_of_the_concepts() -> None:
    faces, hands = [box(0, 0.6), box(50, 0.5)], [box(100, 0.9, "hand"), box(150, 0.4, "hand")]
    assert arrange([(FACE, faces), (HAND, hands)], 0.7, 2) == [faces[0], hands[0]]


def test_overlaps_are_resolved_across_concepts_before_limits() -> None:
    """A hand that is the same thing as the best face must not use up the limit of the faces."""
    face, same, second = box(0, 0.8), box(1, 0.9, "hand"), box(100, 0.7)
    kept = arrange([(Concept("face", limit=1), [face, second]), (HAND, [same])], 0.7, 0)
    assert kept == [second, same]
    assert len(arrange([(FACE, [face, second]), (HAND, [same])], 1.0, 0)) == 3


def test_exclusions_are_cut_out_and_their_own_kind_dropped() -> None:
    face = box(0, mask=torch.ones(40, 40))
    half = Detection(0, (0.0, 10.0, 20.0, 50.0), torch.ones(10, 10), 0.9, "glove")
    far = box(500, mask=torch.ones(40, 40))
    cut, untouched = arrange([(FACE, [face, far]), (Concept("glove", excluded=True), [half])], 0.7, 0)
    assert cut.box == (20, 10, 40, 50)
    assert cut.mask is not None
    assert bool((cut.mask == 1).all())
    assert untouched is far
    whole = box(0, label="glove", mask=torch.ones(10, 10))
    assert without(face, [whole]) is None
    assert without(box(0), [half]) is not None  # a box without a mask is cut as well


def test_the_mask_given_is_not_changed_by_an_exclusion() -> None:
    face = box(0, mask=torch.ones(40, 40))
    without(face, [Detection(0, (0.0, 10.0, 20.0, 50.0), label="glove")])
    assert face.mask is not None
    assert bool((face.mask == 1).all())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("face", [FACE]),
        ("face, hand", [FACE, HAND]),
        ("face\nhand\n", [FACE, HAND]),
        ("face:9; left  hand", [Concept("face", 9), Concept("left hand")]),
        (" face : 2 ,-glove", [Concept("face", 2), Concept("glove", excluded=True)]),
    ],
)
def test_concepts_are_read(text: str, wanted: list[Concept]) -> None:
    assert list(parse_concepts(text)) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "names nothing to look for"),
        (" ,\n ,", "names nothing to look for"),
        ("-hand", "names nothing to look for"),
        ("face, -", "holds no words"),
        ("face, :3", "holds no words"),
        ("face:0", "whole number above 0"),
        ("face:many", "whole number above 0"),
        ("face:", "whole number above 0"),
        ("face:-1", "whole number above 0"),
        ("face, Face", "named twice"),
        ("face, -hand:2", "can have no limit"),
    ],
)
def test_concepts_that_cannot_be_read_are_named(text: str, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted) as caught:
        parse_concepts(text)
    assert str(caught.value).startswith("concepts")
