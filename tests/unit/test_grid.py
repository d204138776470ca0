import itertools
import math

import pytest
import torch
from builders.engines import ExactEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.geometry import picture_box
from luna_refinement.batching.grid import TileSettings, plan_tiles, spans
from luna_refinement.batching.plan import even_chunk
from luna_refinement.batching.refine import refine
from luna_refinement.errors import LunaInputError

tile_settings = st.builds(
    TileSettings,
    tile_size=st.integers(8, 160).map(lambda n: n * 8),
    min_overlap=st.floats(0, 0.5),
    feather=st.floats(0, 1),
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
def test_spans_cover_a_side_without_gaps(length: int, tiles: TileSettings) -> None:
    found = spans(length, tiles)
    assert found[0].start == 0
    assert found[-1].stop == (length if length > tiles.tile_size else -(-length // 8) * 8)
    for left, right in itertools.pairwise(found):
        assert right.start <= left.stop
        assert right.start > left.start
        # a fade never reaches past the neighbour's own half of the overlap
        assert left.fade_out + right.fade_in <= left.stop - right.start + 1
    assert all(span.start % 8 == 0 for span in found[:-1])
    assert all((span.stop - span.start) % 8 == 0 for span in found)


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.sampled_from(["chess", "linear", "single"]), st.data())
def test_weights_leave_nothing_unrefined(width: int, height: int, order: str, data: st.DataObject) -> None:
    """Pasting white tiles over black in plan order gives white everywhere, whatever the order and the feather."""
    tiles = TileSettings(
        data.draw(st.sampled_from([64, 96, 128])), data.draw(st.floats(0, 0.5)), data.draw(st.floats(0, 1)), order
    )
    plan = plan_tiles(width, height, 1, tiles, seed=0)
    covered = torch.zeros(height, width)
    for rows in plan.passes:
        for region in plan.paste_order(rows):
            box = region.paste
            covered[box.y1 : box.y2, box.x1 : box.x2].lerp_(torch.ones(()), region.weights.draw(box))
    assert covered.min() > 0.99


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
    ],
)
def test_settings_that_cannot_work_are_named(given_settings: dict[str, object], word: str) -> None:
    with pytest.raises(LunaInputError, match=word):
        TileSettings(**given_settings)
