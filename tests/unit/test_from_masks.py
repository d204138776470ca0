"""Masks become detections that span exactly what was painted."""

import math

import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.detections import LunaDetectionsFromMasks
from luna_refinement.sam3_bridge.detections import rasterise
from luna_refinement.sam3_bridge.from_masks import Picture, from_masks

PICTURE = Picture(96, 64, 1)


def painted(*boxes: tuple[int, int, int, int], width: int = 96, height: int = 64) -> torch.Tensor:
    mask = torch.zeros(height, width)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = 1
    return mask


def test_a_mask_becomes_its_box() -> None:
    found, notices = from_masks(painted((10, 20, 30, 50)), PICTURE, "face")
    (item,) = found
    assert item.box == (10, 20, 30, 50)
    assert item.mask is not None
    assert item.mask.shape == (30, 20)
    assert (item.label, item.score, item.image_index) == ("face", 1.0, 0)
    assert notices == ()


def test_islands_are_split_and_keep_soft_values() -> None:
    mask = painted((4, 4, 12, 12), (60, 30, 90, 60))
    mask[8, 12] = 0.25  # touches the first island
    found, _ = from_masks(mask, PICTURE, split_islands=True)
    assert [item.box for item in found] == [(4, 4, 13, 12), (60, 30, 90, 60)]
    assert found.items[0].mask is not None
    assert float(found.items[0].mask[4, 8]) == 0.25


def test_islands_whose_boxes_overlap_do_not_share_px() -> None:
    mask = painted((0, 0, 40, 4), (0, 0, 4, 40), (10, 10, 40, 40))  # an L around a square
    found, _ = from_masks(mask, PICTURE, split_islands=True)
    assert [item.box for item in found] == [(0, 0, 40, 40), (10, 10, 40, 40)]
    drawn = sum(rasterise(item, (0, 0, 96, 64)) for item in found)
    assert torch.allclose(drawn, mask)


def test_diagonal_px_are_one_island() -> None:
    assert len(from_masks(painted((4, 4, 8, 8), (8, 8, 12, 12)), PICTURE, split_islands=True)[0]) == 1


def test_masks_of_another_size_are_placed_in_px_of_the_picture() -> None:
    found, _ = from_masks(painted((10, 20, 30, 50)), Picture(960, 640, 1))
    assert found.items[0].box == (100, 200, 300, 500)
    assert found.items[0].mask is not None
    assert found.items[0].mask.shape == (30, 20)


def test_one_mask_per_picture_of_a_batch() -> None:
    masks = torch.stack([painted((0, 0, 5, 5)), painted(), painted((7, 7, 9, 9))])
    found, notices = from_masks(masks, Picture(96, 64, 3))
    assert [item.image_index for item in found] == [0, 2]
    assert "number 1 of 3 empty" in notices[0]


def test_many_masks_of_one_picture() -> None:
    found, _ = from_masks(torch.stack([painted((k, 0, k + 5, 5)) for k in range(7)]), PICTURE)
    assert [item.box[0] for item in found] == list(range(7))


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_nothing_drawn_is_no_detection_and_a_notice(size: tuple[int, int]) -> None:
    """Load Image gives 64x64 zeros for a picture without alpha, whatever its aspect."""
    found, notices = from_masks(torch.zeros(1, *size), PICTURE)
    assert len(found) == 0
    assert "empty" in notices[0]


def test_a_cropped_mask_does_not_keep_the_whole_one_alive() -> None:
    found, _ = from_masks(painted((10, 20, 30, 50)), PICTURE)
    assert found.items[0].mask is not None
    assert found.items[0].mask.untyped_storage().nbytes() == 20 * 30 * 4


@pytest.mark.parametrize(
    ("masks", "picture", "wanted"),
    [
        (torch.ones(64, 64), PICTURE, "masks has 64x64 px, image has 96x64 px"),
        (torch.full((64, 96), math.nan), PICTURE, "mask 0 holds values"),
        (torch.full((64, 96), 255.0), PICTURE, "0 to 1"),
        (torch.ones(2, 64, 96), Picture(96, 64, 3), "masks holds 2 and image 3"),
        (torch.ones(96), PICTURE, r"masks has shape \[96\]"),
        (torch.ones(1, 0, 96), PICTURE, r"masks has shape \[1, 0, 96\]"),
    ],
)
def test_masks_that_cannot_be_used_are_named(masks: torch.Tensor, picture: Picture, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted):
        from_masks(masks, picture)


def test_the_node_hands_on_what_the_core_finds() -> None:
    output = LunaDetectionsFromMasks.execute(
        masks=painted((1, 2, 3, 4))[None], image=torch.zeros(1, 64, 96, 3), label=" face ", split_islands=False
    )
    assert [(item.box, item.label) for item in output.args[0]] == [((1, 2, 3, 4), "face")]
    assert output.ui is None
    empty = LunaDetectionsFromMasks.execute(torch.zeros(1, 64, 64), torch.zeros(1, 64, 96, 3), "", True)
    assert len(empty.args[0]) == 0
    assert "empty" in empty.ui["text"][0]
