"""What belongs to the whole picture, cut to rows: reference latents, planes, masks and areas, by where things lie."""

from typing import Any

import pytest
import torch
from luna_refinement.batching.conditioning import RowConditioning
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.plan import Region
from luna_refinement.batching.rows import Row
from luna_refinement.batching.spatial import PictureGuidance
from luna_refinement.errors import LunaInputError
from luna_refinement.picture.detections import Detection
from torch import Tensor

from harness.engines import groups

SIDE, CELL = 512, 8
LEFT, RIGHT = (16.0, 176.0, 112.0, 272.0), (384.0, 64.0, 448.0, 128.0)


def regions(*places: tuple[int, tuple[float, float, float, float]], count: int = 1) -> tuple[Region, ...]:
    found = [Detection(index, box) for index, box in places]
    return plan_detections(found, SIDE, SIDE, count, CropSettings(64, 0.0, 0), seed=0).regions


def columns_latent(width: int, height: int, pictures: int = 1, frames: int = 0) -> Tensor:
    """[B,4,(1,)h,w]: each latent px holds the px column of its centre on the picture, plus 1000 per picture."""
    column = (torch.arange(float(width)) + 0.5) * SIDE / width
    latent = torch.stack([column + 1000 * index for index in range(pictures)])[:, None, None]
    latent = latent.expand(pictures, 4, height, width).clone()
    return latent[:, :, None] if frames else latent


def cut_references(latents: list[Tensor], rows: tuple[Region, ...], count: int = 1) -> list[Tensor]:
    shared = {"positive": [[torch.zeros(1, 7, 8), {"reference_latents": latents}]]}
    conditioning = RowConditioning(SIDE, SIDE, count, cell=CELL)
    given = [Row(region, shared) for region in rows]
    assert groups(conditioning, given, (8, 8)) == [list(range(len(rows)))]
    (entry,) = conditioning.for_rows(given, (8, 8))["positive"]
    return entry[1]["reference_latents"]


def middles(cut: Tensor) -> list[float]:
    return [float(row.mean()) for row in cut]


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2, 3])
@pytest.mark.parametrize("frames", [0, 1])
def test_a_reference_of_the_picture_at_any_scale_is_cut_to_each_row(scale: float, frames: int) -> None:
    side = int(64 * scale)
    (cut,) = cut_references([columns_latent(side, side, frames=frames)], regions((0, LEFT), (0, RIGHT)))
    assert cut.shape == ((2, 4, 1, 8, 8) if frames else (2, 4, 8, 8))
    # the coarsest is mirrored at the picture's edge, half a latent px from the crop
    assert middles(cut) == pytest.approx([64, 416], abs=max(0.5, 0.25 / scale))
    # edge to edge: the first and last latent px lie half of theirs inside the crop
    assert float(cut[1, ..., 1].mean()) == pytest.approx(384 + 1.5 * 8, abs=0.5)
    assert float(cut[1, ..., 6].mean()) == pytest.approx(384 + 6.5 * 8, abs=0.5)


def test_each_row_reads_the_reference_of_its_own_picture() -> None:
    (cut,) = cut_references([columns_latent(64, 64, pictures=2)], regions((1, LEFT), (0, RIGHT), count=2), count=2)
    assert middles(cut) == pytest.approx([1064, 416], abs=0.5)


def test_a_gligen_box_keeps_its_place_and_shape_in_the_row() -> None:
    (region,) = regions((0, (128.0, 128.0, 256.0, 256.0)))
    gligen = ("position", object(), [(torch.zeros(1, 768), 2, 6, 20, 18)])  # 8 px units: 16 x 48 px at y 160, x 144
    (box,) = PictureGuidance(SIDE, SIDE, 1, CELL).boxes(gligen, region, (16, 16))[2]
    assert box[1:] == pytest.approx((2, 6, 4, 2))  # height, width, y, x in latent px of the crop


def test_references_of_other_pictures_stay_whole_and_go_to_their_rows() -> None:
    one, two = torch.rand(1, 4, 20, 30), torch.rand(2, 4, 20, 30)
    kept, picked = cut_references([one, two], regions((1, LEFT), (0, RIGHT), count=2), count=2)
    assert kept is one
    assert torch.equal(picked, two.flip(0))


@pytest.mark.parametrize(
    ("width", "height", "reference", "same"),
    [
        (1000, 600, (75, 125), True),  # exact
        (1000, 600, (37, 62), True),  # half, rounded down
        (1000, 600, (150, 250), True),
        (1920, 1080, (96, 170), True),  # 768 px high, 1360 wide: a multiple of 16
        (1024, 590, (72, 128), True),  # rounded down to 1024x576, multiples of 16
        (1024, 590, (71, 128), False),
        (1000, 600, (125, 75), False),
        (1000, 600, (64, 64), False),
        (512, 512, (64, 80), False),
        (512, 512, (60, 64), False),
    ],
)
def test_the_same_picture_is_told_by_its_aspect(
    width: int, height: int, reference: tuple[int, int], same: bool
) -> None:
    assert PictureGuidance(width, height, 1, CELL).is_this_picture(torch.zeros(1, 4, *reference)) is same


def test_references_of_concepts_share_a_call_when_they_are_alike() -> None:
    rows = regions((0, LEFT), (0, RIGHT))
    text = torch.zeros(1, 7, 8)

    def row(region: Region, latent: Tensor) -> Row:
        return Row(region, {"positive": [[text, {"reference_latents": [latent]}]]})

    conditioning = RowConditioning(SIDE, SIDE, 1, cell=CELL)
    given = [row(rows[0], columns_latent(64, 64)), row(rows[1], columns_latent(64, 64) + 5000)]
    assert groups(conditioning, given, (8, 8)) == [[0, 1]]
    (entry,) = conditioning.for_rows(given, (8, 8))["positive"]
    assert middles(entry[1]["reference_latents"][0]) == pytest.approx([64, 5416], abs=0.5)
    given[1] = row(rows[1], torch.rand(1, 4, 20, 30))
    assert groups(conditioning, given, (8, 8)) == [[0], [1]]


def test_masks_of_each_picture_weigh_their_rows() -> None:
    guidance = PictureGuidance(SIDE, SIDE, 2, CELL)
    masks = torch.stack([torch.zeros(64, 64), torch.ones(64, 64)])
    first, second = regions((0, LEFT), (1, LEFT), count=2)
    zero, one = (guidance.weight({"mask": masks}, region, (8, 8)) for region in (first, second))
    assert zero is not None
    assert one is not None
    assert float(zero.max()) == 0
    assert float(one.min()) == pytest.approx(1)


def test_hints_of_each_picture_go_to_their_rows() -> None:
    class Hints:
        cond_hint_original = torch.stack([torch.full((3, 64, 64), value) for value in (0.2, 0.7)])
        previous_controlnet = None

        def copy(self) -> Any:
            return Hints()

    rows = regions((1, LEFT), (0, RIGHT), count=2)
    made = PictureGuidance(SIDE, SIDE, 2, CELL).control(Hints(), rows)
    assert middles(made.cond_hint_original) == pytest.approx([0.7, 0.2], abs=1e-5)


def test_an_area_fades_over_eight_latent_px_and_not_at_the_pictures_edge() -> None:
    guidance = PictureGuidance(SIDE, SIDE, 1, CELL)
    (whole,) = regions((0, (0.0, 0.0, 512.0, 512.0)))
    weight = guidance.weight({"area": (64, 32, 0, 0)}, whole, (64, 64))  # the left half
    assert weight is not None
    row = weight[32]
    assert row[:24].tolist() == [1.0] * 24
    assert row[24:32].tolist() == pytest.approx([1.0 - k / 8 for k in range(8)], abs=1e-5)
    assert row[32:].tolist() == [0.0] * 32
    assert guidance.weight({"area": (64, 64, 0, 0)}, whole, (64, 64)) is None


def test_an_area_and_a_mask_act_where_both_are() -> None:
    (whole,) = regions((0, (0.0, 0.0, 512.0, 512.0)))
    guidance = PictureGuidance(SIDE, SIDE, 1, CELL)
    top = torch.zeros(1, 64, 64)
    top[:, :32] = 1
    weight = guidance.weight({"area": (64, 32, 0, 0), "mask": top}, whole, (64, 64))  # the left half, the upper half
    assert weight is not None
    assert weight[4, 4] == 1
    assert weight[4, 60] == weight[60, 4] == 0


@pytest.mark.parametrize("key", ["concat_latent_image", "concat_image", "noise_concat", "lq_latent"])
def test_planes_go_to_the_rows_of_their_pictures(key: str) -> None:
    rows = regions((1, LEFT), (0, RIGHT), count=2)
    shared = {"positive": [[torch.zeros(1, 7, 8), {key: columns_latent(128, 128, pictures=2)}]]}
    conditioning = RowConditioning(SIDE, SIDE, 2, cell=CELL)
    (entry,) = conditioning.for_rows([Row(region, shared) for region in rows], (8, 8))["positive"]
    assert middles(entry[1][key]) == pytest.approx([1064, 416], abs=0.5)


def test_masks_beside_planes_come_px_by_px_and_stay_in_range() -> None:
    rows = regions((0, (192.0, 192.0, 320.0, 320.0)))
    mask = torch.zeros(1, 512, 512)
    mask[:, :, 256:] = 1
    shared = {"positive": [[torch.zeros(1, 7, 8), {"concat_mask": mask}]]}
    (entry,) = RowConditioning(SIDE, SIDE, 1, cell=CELL).for_rows([Row(rows[0], shared)], (8, 8))["positive"]
    cut = entry[1]["concat_mask"]
    assert cut.shape == (1, 1, 64, 64)
    assert float(cut.min()) == 0
    assert float(cut.max()) == 1
    assert float(cut[0, 0, :, :31].max()) < 0.1
    assert float(cut[0, 0, :, 33:].min()) > 0.9


def test_a_batch_that_fits_no_pictures_is_named() -> None:
    with pytest.raises(LunaInputError, match="mask of a conditioning holds 3 pictures, image holds 1"):
        PictureGuidance(SIDE, SIDE, 1, CELL).weight({"mask": torch.zeros(3, 8, 8)}, regions((0, LEFT))[0], (8, 8))
