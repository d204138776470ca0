"""Masks become detections that span exactly what was painted."""

import math
import time

import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.detections import LunaDetectionsFromMasks
from luna_refinement.picture.boxes import Box
from luna_refinement.picture.detections import MOST_DETECTIONS
from luna_refinement.picture.masks import rasterise
from luna_refinement.sam3_bridge.from_masks import SOFT_EDGE, Picture, from_masks

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
    drawn = sum(rasterise(item.box, item.mask, Box(0, 0, 96, 64)) for item in found)
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


def with_background(value: float, width: int = 512, height: int = 256) -> torch.Tensor:
    """Two painted squares on a mask that is nowhere empty."""
    mask = painted((100, 60, 160, 120), (300, 100, 360, 160), width=width, height=height)
    return torch.where(mask > 0, mask, torch.tensor(value))


@pytest.mark.parametrize("background", [1 / 255, 8 / 255, 0.09])
def test_a_faint_background_is_no_region(background: float) -> None:
    (item,) = from_masks(with_background(background), Picture(512, 256, 1))[0]
    assert item.box == (100, 60, 360, 160)
    assert torch.equal(rasterise(item.box, item.mask, Box(0, 0, 512, 256)), (with_background(0) > 0).float())


def test_islands_are_told_apart_on_a_faint_background() -> None:
    found, notices = from_masks(with_background(1 / 255), Picture(512, 256, 1), split_islands=True)
    assert [item.box for item in found] == [(100, 60, 160, 120), (300, 100, 360, 160)]
    assert "mask_threshold" in notices[0]


def test_a_heat_map_is_cut_where_the_threshold_says() -> None:
    x = torch.linspace(-1, 1, 512)[None, :]
    y = torch.linspace(-0.5, 0.5, 256)[:, None]
    heat = torch.exp(-(x**2 + y**2) / 0.02)  # above one half within 0.118 of the centre: 30 px
    (item,) = from_masks(heat, Picture(512, 256, 1), mask_threshold=0.5)[0]
    assert item.box == pytest.approx((256 - 30, 128 - 30, 256 + 30, 128 + 30), abs=2 + 512 / SOFT_EDGE)


def test_a_noisy_background_is_no_region() -> None:
    noise = torch.rand(256, 512, generator=torch.Generator().manual_seed(1)) * 0.04
    (item,) = from_masks(
        torch.maximum(painted((100, 60, 160, 120), width=512, height=256), noise), Picture(512, 256, 1)
    )[0]
    assert item.box == (100, 60, 160, 120)


@pytest.mark.parametrize("split", [False, True])
def test_the_soft_edge_of_a_real_mask_is_kept_as_it_is(split: bool) -> None:
    mask = torch.nn.functional.avg_pool2d(painted((40, 30, 120, 90), width=256, height=128)[None], 7, 1, 3)[0]
    (item,) = from_masks(mask, Picture(256, 128, 1), split_islands=split)[0]
    assert item.box == (37, 27, 123, 93)
    assert torch.equal(rasterise(item.box, item.mask, Box(0, 0, 256, 128)), mask)


def test_the_threshold_does_not_make_soft_values_hard() -> None:
    mask = painted((100, 60, 160, 120), width=512, height=256)
    mask[60:120, 100:130] = torch.linspace(0, 1, 30)
    (item,) = from_masks(mask, Picture(512, 256, 1), mask_threshold=0.5)[0]
    drawn = rasterise(item.box, item.mask, Box(0, 0, 512, 256))
    assert torch.equal(drawn[drawn > 0], mask[drawn > 0])
    assert ((drawn > 0.3) & (drawn < 0.5)).any()
    assert item.box[0] == pytest.approx(115 - 512 / SOFT_EDGE, abs=1)


def test_a_mask_that_is_mostly_below_the_threshold_is_named() -> None:
    _, notices = from_masks(with_background(0.05), Picture(512, 256, 1))
    assert "masks: most of number 0 is not above mask_threshold 0.1" in notices[0]
    assert from_masks(painted((3, 3, 60, 5)), PICTURE)[1] == ()


def test_a_mask_wholly_below_the_threshold_is_left_out_and_named() -> None:
    found, notices = from_masks(torch.full((64, 96), 0.05), PICTURE)
    assert len(found) == 0
    assert "nothing of number 0 is above mask_threshold 0.1" in notices[0]
    assert len(from_masks(torch.full((64, 96), 0.05), PICTURE, mask_threshold=0.0)[0]) == 1


def test_one_mask_is_spread_over_a_batch() -> None:
    found, notices = from_masks(painted((10, 20, 30, 50)), Picture(96, 64, 3), split_islands=True)
    assert [(item.image_index, item.box) for item in found] == [(k, (10, 20, 30, 50)) for k in range(3)]
    assert notices == ()


def test_no_mask_at_all_is_nothing() -> None:
    """What a detector gives that found nothing, with one mask per thing."""
    found, notices = from_masks(torch.zeros(0, 64, 96), Picture(96, 64, 2))
    assert len(found) == 0
    assert "holds none" in notices[0]


@pytest.mark.parametrize(
    "mask",
    [
        painted((10, 20, 30, 50)).bool(),
        (painted((10, 20, 30, 50)) * 255).to(torch.uint8),
        painted((10, 20, 30, 50)).to(torch.uint8),
        painted((10, 20, 30, 50)).to(torch.float64).requires_grad_(),
        painted((10, 20, 30, 50)).to(torch.bfloat16),
    ],
)
def test_masks_of_every_kind_of_number_are_read(mask: torch.Tensor) -> None:
    (item,) = from_masks(mask, PICTURE, split_islands=True)[0]
    assert item.mask is not None
    assert item.mask.dtype == torch.float32
    assert not item.mask.requires_grad
    assert bool((item.mask == 1).all())


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (torch.ones(64, 96, dtype=torch.complex64), "complex64"),
        (torch.ones(64, 96).to(torch.float8_e4m3fn), "float8"),
        (torch.full((64, 96), 300, dtype=torch.int32), "values from 300 to 300"),
        (torch.full((64, 96), -1, dtype=torch.int32), "values from -1"),
        (torch.full((64, 96), math.inf), "mask 0 holds values"),
        (torch.ones(64, 96).to_sparse(), "sparse"),
        (None, "masks is None"),
        ([[1.0]], "masks is"),
    ],
)
def test_what_is_no_mask_is_named(mask: torch.Tensor, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted):
        from_masks(mask, PICTURE)


def test_thousands_of_islands_take_seconds_and_the_largest_are_kept() -> None:
    mask = torch.zeros(2048, 2048)
    mask[::16, ::16] = 1  # 16384 specks
    mask[8:14, 8:14] = 1
    start = time.process_time()
    found, notices = from_masks(mask, Picture(2048, 2048, 1), split_islands=True)
    assert time.process_time() - start < 5
    assert len(found) == MOST_DETECTIONS
    assert max(item.area for item in found) == 36
    assert f"16385 islands, the {MOST_DETECTIONS} largest were kept" in notices[0]


def test_islands_around_each_other_are_refused_before_they_fill_the_memory() -> None:
    inward = torch.minimum(torch.arange(4096), torch.arange(4096).flip(0))
    mask = (torch.minimum(inward[:, None], inward[None, :]) % 8 < 4).float()
    with pytest.raises(LunaInputError, match=r"256 islands lie around each other.*5.4 GiB"):
        from_masks(mask, Picture(4096, 4096, 1), split_islands=True)
