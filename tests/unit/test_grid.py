import itertools
import math
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from luna_refinement.batching.drawing import describe
from luna_refinement.batching.grid import TILE_ORDERS, TileSettings, plan_tiles, spans
from luna_refinement.batching.plan import RefinePlan, Region, even_chunk
from luna_refinement.batching.weights import SharedWeights, TileWeights
from luna_refinement.errors import LunaInputError
from luna_refinement.picture.boxes import Box, picture_box

from harness.engines import ExactEngine, refine

tile_settings = st.builds(
    TileSettings,
    tile_size=st.integers(2, 40).map(lambda n: n * 32),
    min_overlap=st.floats(0, 0.5),
    feather=st.floats(0, 1),
    cell_px=st.sampled_from([8, 16, 32]),
)


def test_a_4k_picture_is_25_tiles_in_two_passes() -> None:
    plan = plan_tiles(4096, 4096, 1, TileSettings(1024, 0.125), seed=0)
    assert len(plan.regions) == 25
    assert [len(rows) for rows in plan.passes] == [13, 12]
    assert [region.crop.x1 for region in plan.regions[:5]] == [0, 768, 1536, 2304, 3072]


@given(st.integers(1, 500), st.integers(1, 500))
def test_even_chunks_take_no_more_calls(total: int, most: int) -> None:
    chunk = even_chunk(total, most)
    assert 1 <= chunk <= most
    assert math.ceil(total / chunk) == math.ceil(total / most)
    assert chunk == 1 or math.ceil(total / (chunk - 1)) > math.ceil(total / most)


def test_the_small_plan_is_the_4k_plan_at_an_eighth() -> None:
    large = plan_tiles(4096, 4096, 1, TileSettings(1024, 0.125), seed=0)
    small = plan_tiles(512, 512, 1, TileSettings(128, 0.125), seed=0)
    assert large.passes == small.passes
    assert [r.crop.x1 // 8 for r in large.regions] == [r.crop.x1 for r in small.regions]


@given(st.integers(1, 8192), tile_settings)
@example(1080, TileSettings(1088, cell_px=16))
@example(125, TileSettings(64, 0.0))
def test_spans_cover_a_side_without_gaps(length: int, tiles: TileSettings) -> None:
    found = spans(length, tiles)
    cell = tiles.cell_px
    assert found[0].start == 0
    assert found[-1].stop == (length if length > tiles.tile_size else -(-length // cell) * cell)
    for left, right in itertools.pairwise(found):
        assert right.start <= left.stop
        assert right.start > left.start
        # a fade never reaches past the neighbour's own half of the overlap
        assert left.fade_out + right.fade_in <= left.stop - right.start
    assert all(span.start % cell == 0 for span in found[:-1])
    assert all((span.stop - span.start) % cell == 0 for span in found)


def shares(plan: RefinePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """What each tile makes of the picture once all are pasted [N,H,W], and what is left of the input [H,W]; float64."""
    left = torch.ones(plan.height, plan.width, dtype=torch.float64)
    share = torch.zeros(len(plan.regions), plan.height, plan.width, dtype=torch.float64)
    for rows in plan.passes:
        for region in plan.paste_order(rows):
            box = region.paste
            place = slice(box.y1, box.y2), slice(box.x1, box.x2)
            weights = region.weights.draw(box).double()
            share[(slice(None), place[0], place[1])] *= 1 - weights
            share[(region.row, place[0], place[1])] += weights
            left[place] *= 1 - weights
    return share, left


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.sampled_from(TILE_ORDERS), st.data())
def test_the_shares_of_all_tiles_add_up_to_one_at_every_px(
    width: int, height: int, order: str, data: st.DataObject
) -> None:
    tiles = TileSettings(
        data.draw(st.sampled_from([64, 96, 128])),
        data.draw(st.floats(0, 0.5)),
        data.draw(st.floats(0, 1)),
        order,
        data.draw(st.sampled_from([8, 16, 32])),
    )
    share, left = shares(plan_tiles(width, height, 1, tiles, seed=0))
    assert left.max() < 2e-6
    assert (share.sum(0) - 1).abs().max() < 2e-6
    assert share.min() >= 0


@pytest.mark.parametrize("length", [125, 127, 187, 189])
@pytest.mark.parametrize("order", TILE_ORDERS)
def test_an_odd_overlap_shows_nothing_of_the_unrefined_picture(length: int, order: str) -> None:
    plan = plan_tiles(length, length, 1, TileSettings(64, 0.0, order=order), seed=0)
    assert any((a.stop - b.start) % 2 for a, b in itertools.pairwise(spans(length, TileSettings(64, 0.0))))
    assert shares(plan)[1].max() < 2e-6
    white = refine(torch.zeros(1, length, length, 3), plan, ExactEngine(lambda row, latent: torch.ones_like(latent)))
    assert white.image.min() > 1 - 2e-6


def test_the_weights_of_neighbours_of_two_passes_add_up_to_one_or_more_at_every_px() -> None:
    """Before anything is pasted: some tile is at full weight at every px, so that nothing depends on the order."""
    for length in range(65, 400):
        for cell in (8, 16, 32):
            tiles = spans(length, TileSettings(64, 0.125, cell_px=cell))
            line = Box(0, 0, length, 1)
            drawn = [TileWeights(Box(s.start, 0, s.stop, 1), (s.fade_in, 0, s.fade_out, 0)).draw(line) for s in tiles]
            assert torch.stack(drawn).amax(0).min() == 1


def shared(region: Region) -> SharedWeights:
    assert isinstance(region.weights, SharedWeights)
    return region.weights


def brute_rivals(plan: RefinePlan, region: Region) -> tuple[list[TileWeights], list[TileWeights]]:
    turn = next(rows for rows in plan.passes if region.row in rows)
    met = [
        plan.regions[row]
        for row in turn
        if plan.regions[row].image_index == region.image_index and plan.regions[row].crop.overlaps(region.crop)
    ]
    return [shared(r).own for r in met if r.row < region.row], [shared(r).own for r in met if r.row > region.row]


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.integers(1, 3), st.sampled_from(TILE_ORDERS), st.floats(0, 0.5))
def test_tiles_know_every_tile_of_their_pass_that_they_meet(
    width: int, height: int, count: int, order: str, overlap: float
) -> None:
    plan = plan_tiles(width, height, count, TileSettings(64, overlap, order=order), seed=0)
    assert [region.row for region in plan.regions] == list(range(len(plan.regions)))
    assert sorted(row for rows in plan.passes for row in rows) == list(range(len(plan.regions)))
    for region in plan.regions:
        earlier, later = brute_rivals(plan, region)
        assert list(shared(region).earlier) == earlier
        assert list(shared(region).later) == later


def test_a_hundred_thousand_tiles_are_planned_drawn_and_described_in_seconds() -> None:
    """Their own time on one core, so that a busy machine does not fail it; all pairs would take hours."""
    start = time.process_time()
    plan = plan_tiles(316 * 64, 316 * 64, 1, TileSettings(64, 0.0), seed=0)
    assert len(plan.regions) == 316**2
    assert [len(rows) for rows in plan.passes] == [316**2 // 2] * 2
    assert describe(plan, 20, {(64, 64): 8}, {(64, 64): 2**20}).count("\n") > 316**2
    assert time.process_time() - start < 20


def test_a_tile_of_a_coarser_vae_lies_on_whole_latent_px() -> None:
    """A picture 264 px high is a tile of 272 px at ratio 16: 264 px would lose 4 px above and below."""
    (region,) = plan_tiles(264, 264, 1, TileSettings(512, cell_px=16), seed=0).regions
    assert region.working_size == (272, 272)
    (region,) = plan_tiles(280, 280, 1, TileSettings(512, cell_px=32), seed=0).regions
    assert region.working_size == (288, 288)


def test_tiles_of_one_pass_share_corners_in_equal_parts() -> None:
    """At a corner where two even tiles meet, each has the same say whichever is pasted last."""
    plan = plan_tiles(224, 224, 1, TileSettings(128, 0.25), seed=0)
    first, last = plan.regions[0], plan.regions[3]
    corner = first.crop.intersect(last.crop)
    drawn = [region.weights.draw(corner) for region in (first, last)]
    share_of_first = drawn[0] * (1 - drawn[1])
    middle = share_of_first.shape[0] // 2
    assert share_of_first[middle, middle] == pytest.approx(float(drawn[1][middle, middle]), abs=0.05)
    assert torch.allclose(share_of_first, drawn[1].flip(0, 1), atol=1e-4)


@pytest.mark.parametrize("size", [(512, 512), (500, 333), (100, 60), (129, 128)])
def test_an_engine_that_changes_nothing_returns_the_picture_bit_for_bit(size: tuple[int, int]) -> None:
    image = torch.rand(1, *size, 3)
    plan = plan_tiles(size[1], size[0], 1, TileSettings(128, 0.125), seed=0)
    refined = refine(image, plan, ExactEngine())
    assert torch.equal(refined.image, image)


def test_two_passes_are_two_calls_for_all_images() -> None:
    image = torch.rand(2, 256, 256, 3)
    engine = ExactEngine()
    refine(image, plan_tiles(256, 256, 2, TileSettings(128, 0.125), seed=0), engine)
    assert [len(call) for call in engine.calls] == [10, 8]


def test_odd_tiles_see_the_even_ones() -> None:
    image = torch.zeros(1, 224, 128, 3)
    seen: dict[int, float] = {}

    def add(row: int, latent: torch.Tensor) -> torch.Tensor:
        seen[row] = float(latent.max())
        return latent + 0.25

    refine(image, plan_tiles(128, 224, 1, TileSettings(128, 0.25), seed=0), ExactEngine(add))
    assert seen[0] == 0
    assert seen[1] == pytest.approx(0.25, abs=1e-4)


def test_a_picture_smaller_than_a_tile_is_one_tile() -> None:
    plan = plan_tiles(100, 60, 1, TileSettings(128), seed=0)
    assert len(plan.regions) == 1
    assert plan.regions[0].working_size == (64, 104)
    assert plan.regions[0].paste == picture_box(100, 60)


@pytest.mark.parametrize(
    ("given_settings", "word"),
    [
        ({"tile_size": 100}, "tile_size"),
        ({"min_overlap": 0.9}, "min_overlap"),
        ({"feather": 2.0}, "feather"),
        ({"order": "x"}, "order"),
        ({"tile_size": 264, "cell_px": 16}, "tile_size"),
    ],
)
def test_settings_that_cannot_work_are_named(given_settings: dict[str, object], word: str) -> None:
    with pytest.raises(LunaInputError, match=word):
        TileSettings(**given_settings)
