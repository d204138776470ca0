"""Plans of regions: what is cut at extreme shapes, what users are told of sizes, seeds, passes of overlapping ones."""

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.crop_plan import (
    AUTO_SIZES,
    LARGER_AUTO_SIZES,
    CropSettings,
    plan_detections,
    size_notices,
)
from luna_refinement.batching.crops import cut, uncut
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.plan import RefinePlan, Region, name_rows
from luna_refinement.batching.weights import MaskWeights
from luna_refinement.picture.boxes import Box, picture_box
from luna_refinement.picture.detections import Detection

from harness.engines import ExactEngine, refine

BoxPx = tuple[float, float, float, float]


def plan(boxes: list[BoxPx], width: int, height: int, crops: CropSettings | None = None) -> RefinePlan:
    found = [Detection(0, box) for box in boxes]
    return plan_detections(found, width, height, 1, crops or CropSettings(), seed=0)


class TestExtremeShapes:
    @pytest.mark.parametrize(
        ("width", "height", "box", "padding"),
        [
            (1024, 32, (400.0, 0.0, 500.0, 32.0), 0.15),
            (1024, 32, (0.0, 0.0, 1024.0, 32.0), 0.15),
            (20000, 50, (0.0, 0.0, 20000.0, 50.0), 0.15),
            (50, 20000, (0.0, 9000.0, 50.0, 9900.0), 1.0),
            (2048, 2048, (500.0, 600.0, 1500.0, 1600.0), 8.0),
            (4096, 1024, (900.0, 300.0, 1200.0, 600.0), 4.0),
        ],
    )
    def test_no_more_is_cut_than_the_picture_has_and_the_model_needs(
        self, width: int, height: int, box: BoxPx, padding: float
    ) -> None:
        (region,) = plan([box], width, height, CropSettings(1024, padding)).regions
        inside = region.crop.intersect(picture_box(width, height))
        shorter = min(region.working_size)
        mirrored = 1 - inside.width * inside.height / (region.crop.width * region.crop.height)
        # mirrored px only fill up the shorter side: to whole latent px, or to the least a model can read
        assert mirrored <= (8 / shorter if shorter > 64 else 1)
        assert max(region.working_size) == 1024
        assert region.crop.contains(Box.around(box))

    def test_a_strip_is_refined_as_a_strip(self) -> None:
        (region,) = plan([(400.0, 0.0, 500.0, 32.0)], 1024, 32).regions
        assert region.crop == Box(385, 0, 515, 32)
        assert region.working_size == (256, 1024)

    def test_squares_inside_a_picture_are_what_they_were(self) -> None:
        (region,) = plan([(100.0, 200.0, 300.0, 260.0)], 640, 480).regions
        assert region.crop == Box(70, 100, 330, 360)
        assert region.working_size == (1024, 1024)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 200), st.integers(1, 200), st.floats(0, 8), st.sampled_from([64, 128]), st.data())
    def test_what_is_cut_at_any_shape_is_the_picture_at_its_place(
        self, width: int, height: int, padding: float, size: int, data: st.DataObject
    ) -> None:
        """A linear ramp comes back as itself wherever nothing is mirrored beside it."""
        x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
        (region,) = plan([(x1, y1, x2, y2)], width, height, CropSettings(size, padding)).regions
        ramp = torch.linspace(0.2, 0.8, width)[None, :, None] * torch.ones(height, 1, 3)
        crop = cut(ramp, region.crop, *region.working_size)
        assert tuple(crop.shape) == (*region.working_size, 3)
        back = uncut(crop, region.crop, region.paste)
        assert back.shape[:2] == (region.paste.height, region.paste.width)
        # a px of the working size, and the bend at the borders of crop and picture, is what a place can be off by
        per_px = 0.6 / max(1, width - 1)
        off = (back - ramp[region.paste.y1 : region.paste.y2, region.paste.x1 : region.paste.x2]).abs().max()
        assert off <= per_px * (1 + 2 / min(1.0, region.scale))

    def test_rows_of_many_shapes_are_one_batch_per_shape_and_come_out_whole(self) -> None:
        image = torch.rand(1, 40, 300, 3)
        boxes: list[BoxPx] = [(0.0, 0.0, 300.0, 40.0), (10.0, 5.0, 30.0, 25.0), (100.0, 0.0, 160.0, 40.0)]
        shapes = plan(boxes, 300, 40, CropSettings(128, 0.0, 4))
        engine = ExactEngine(lambda row, latent: latent * 0 + (row + 1) / 10)
        refined = refine(image, shapes, engine, keep_crops=True)
        assert [region.working_size for region in shapes.regions] == [(64, 128), (128, 128), (88, 128)]
        assert sorted(map(tuple, engine.calls)) == [(0,), (1,), (2,)]
        assert refined.crops_after is not None
        assert refined.crops_after.shape == (3, 128, 128, 3)
        # a strip lies in the middle of its frame, with nothing above and below
        assert refined.crops_after[0, 32:96].mean() == pytest.approx(0.1)
        assert refined.crops_after[0, :32].max() == 0
        assert refined.crops_after[1].mean() == pytest.approx(0.2)


class TestSizes:
    def test_rows_larger_than_crop_size_are_named_with_their_factor(self) -> None:
        crops = CropSettings(512, 0.15)
        found = plan([(0.0, 0.0, 420.0, 420.0), (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 1500.0, 900.0)], 2048, 2048, crops)
        (text,) = size_notices(found, crops)
        assert text.startswith("rows 0, 2:")
        assert "512 px" in text
        assert f"{512 / 1950:.2f}" in text
        assert size_notices(plan([(0.0, 0.0, 100.0, 100.0)], 2048, 2048, crops), crops) == []

    def test_automatic_sizes_grow_with_the_region_where_the_model_takes_them(self) -> None:
        boxes: list[BoxPx] = [(0.0, 0.0, side, side) for side in (300.0, 700.0, 1000.0, 1200.0, 1900.0)]
        usual = CropSettings(0, 0.0)
        grown = CropSettings(0, 0.0, auto_sizes=AUTO_SIZES + LARGER_AUTO_SIZES)
        sizes = [[r.working_width for r in plan(boxes, 3000, 3000, crops).regions] for crops in (usual, grown)]
        assert sizes == [[512, 768, 1024, 1024, 1024], [512, 768, 1024, 1280, 2048]]
        texts = size_notices(plan(boxes, 3000, 3000, grown), grown)
        assert texts == [
            "crop_size 0 chose 1280 px for row 3, larger than 1024 px",
            "crop_size 0 chose 2048 px for row 4, larger than 1024 px",
        ]
        (text,) = size_notices(plan(boxes, 3000, 3000, usual), usual)
        assert text.startswith("rows 3, 4:")

    def test_runs_of_rows_are_named_short(self) -> None:
        assert name_rows([3]) == "row 3"
        assert name_rows([0, 1, 4, 5, 6, 9]) == "rows 0, 1, 4-6, 9"

    @pytest.mark.parametrize("cell", [8, 16, 32])
    def test_every_working_size_is_whole_latent_px(self, cell: int) -> None:
        boxes: list[BoxPx] = [(0.0, 0.0, 1900.0, 77.0), (5.0, 5.0, 60.0, 70.0)]
        for region in plan(boxes, 1900, 77, CropSettings(512, cell_px=cell)).regions:
            assert region.working_height % cell == region.working_width % cell == 0


class TestSeeds:
    def test_a_row_has_the_same_seed_on_any_picture_of_any_batch(self) -> None:
        alone = plan([(10.0, 10.0, 50.0, 60.0)], 200, 160).regions[0].seed
        found = [Detection(index, (10, 10, 50, 60)) for index in (2, 0, 1)]
        batch = plan_detections(found, 200, 160, 3, CropSettings(), seed=0)
        assert [region.seed for region in batch.regions] == [alone] * 3

    def test_a_tile_has_the_same_seed_on_any_picture_of_any_batch(self) -> None:
        alone = plan_tiles(200, 160, 1, TileSettings(64), seed=3)
        batch = plan_tiles(200, 160, 3, TileSettings(64), seed=3)
        assert [region.seed for region in batch.regions] == 3 * [region.seed for region in alone.regions]
        assert len({region.seed for region in alone.regions}) == len(alone.regions)


def touches(a: Region, b: Region) -> bool:
    return a.image_index == b.image_index and (a.crop.overlaps(b.paste) or b.crop.overlaps(a.paste))


class TestWaves:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_each_region_goes_into_the_first_pass_it_touches_nothing_of(self, data: st.DataObject) -> None:
        found = []
        for _ in range(data.draw(st.integers(1, 25))):
            x1, y1 = data.draw(st.integers(0, 380)), data.draw(st.integers(0, 280))
            x2, y2 = x1 + data.draw(st.integers(1, 120)), y1 + data.draw(st.integers(1, 120))
            found.append(Detection(data.draw(st.integers(0, 1)), (x1, y1, min(x2, 400), min(y2, 300))))
        crops = CropSettings(64, data.draw(st.floats(0, 0.5)), data.draw(st.integers(0, 30)), overlap_mode="waves")
        planned = plan_detections(found, 400, 300, 2, crops, seed=0)
        passes: list[list[Region]] = []
        for region in planned.regions:
            home = next((rows for rows in passes if not any(touches(region, other) for other in rows)), None)
            if home is None:
                passes.append(home := [])
            home.append(region)
        assert planned.passes == tuple(tuple(region.row for region in rows) for rows in passes)

    @pytest.mark.parametrize("crowded", [False, True])
    def test_thousands_of_regions_are_planned_in_a_second_or_two(self, crowded: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        side = 200 if crowded else 8000
        places = torch.randint(0, side, (3000, 2), generator=generator).tolist()
        found = [Detection(0, (x, y, x + 60, y + 60)) for x, y in places]
        start = time.process_time()
        planned = plan_detections(found, 8192, 8192, 1, CropSettings(overlap_mode="waves"), seed=0)
        assert sum(map(len, planned.passes)) == 3000
        assert time.process_time() - start < 3

    def test_a_feather_of_a_thousand_px_is_drawn_in_seconds(self) -> None:
        found = [Detection(0, (300, 300, 1700, 1700), mask=torch.rand(64, 64))]
        (region,) = plan_detections(found, 2048, 2048, 1, CropSettings(1024, 0.3, 1024), seed=0).regions
        assert isinstance(region.weights, MaskWeights)
        assert region.weights.feather_px > 500
        start = time.process_time()
        drawn = region.weights.draw(region.paste)
        assert 0 < float(drawn.max()) <= 1
        assert time.process_time() - start < 4


def moved(width: int, height: int, ratio: int, cell_px: int) -> float:
    """How far a tile moves, px, on a VAE that takes whole latent px only and cuts the rest off on all sides.

    That is what ComfyUI's VAE does to a picture whose sides are no multiples of its ratio.
    """

    class CoarseEngine(ExactEngine):
        def latents(self, crops: torch.Tensor) -> torch.Tensor:
            for dim in (1, 2):
                rest = crops.shape[dim] % ratio
                crops = crops.narrow(dim, rest // 2, crops.shape[dim] - rest)
            return F.pixel_unshuffle(crops.movedim(-1, 1), ratio)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return F.pixel_shuffle(latents, ratio).movedim(1, -1)

    slope = 1 / max(width, height)
    ramp = (torch.arange(height)[:, None] * slope)[None, :, :, None].expand(1, height, width, 3)
    tiles = plan_tiles(width, height, 1, TileSettings(512, cell_px=cell_px), seed=0)
    return float((refine(ramp, tiles, CoarseEngine()).image - ramp).abs().max()) / slope


@pytest.mark.parametrize(("ratio", "side"), [(16, 264), (32, 280), (16, 1080 // 5)])
def test_a_tile_stays_in_its_place_on_any_vae(ratio: int, side: int) -> None:
    assert moved(side, side, ratio, cell_px=ratio) < 1e-3
    assert moved(side, side, ratio, cell_px=8) > 2  # what grids of 8 px do to it
