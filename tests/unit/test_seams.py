"""Seams of the tile grid on real photographs, with a made-up refinement whose tiles do not agree at all.

512 px with 128 px tiles is the plan of 4096 px with 1024 px tiles.
"""

from functools import cache

import pytest
import torch
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.plan import RefinePlan
from torch import Tensor

from harness.engines import ExactEngine, refine
from harness.photographs import PHOTOGRAPHS, square_photograph
from harness.seams import Seams, borders, disturbance, measure_seams

SIDE, TILE = 512, 128
RUNS = 4

GRIDS = {
    "chess": TileSettings(TILE, 0.125),
    "single": TileSettings(TILE, 0.125, order="single"),
    "hard chess": TileSettings(TILE, 0.125, feather=0),
    "no overlap": TileSettings(TILE, 0, feather=0, order="single"),
    "whole": TileSettings(SIDE),
}


def plan(grid: str) -> RefinePlan:
    return plan_tiles(SIDE, SIDE, 1, GRIDS[grid], seed=0)


@cache
def refined(name: str, grid: str, noise: str = "run") -> Tensor:
    """[RUNS,512,512,3]"""
    pictures = [
        refine(square_photograph(name)[None], plan(grid), ExactEngine(disturbance(f"{noise} {run}")))
        for run in range(RUNS)
    ]
    return torch.cat([result.image for result in pictures])


def seams(name: str, grid: str) -> Seams:
    return measure_seams(square_photograph(name), refined(name, grid), refined(name, "whole", "control"), plan(grid))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
class TestPhotographs:
    def test_chess_order_leaves_no_seam(self, name: str) -> None:
        found = seams(name, "chess")
        assert 0.9 <= found.mean <= 1.03
        assert found.worst <= 1.10

    def test_tiles_side_by_side_leave_seams(self, name: str) -> None:
        found = seams(name, "no overlap")
        assert found.mean > 1.03
        assert found.worst > 1.15

    def test_hard_edges_leave_seams_in_chess_order_too(self, name: str) -> None:
        assert seams(name, "hard chess").worst > 1.10

    def test_chess_order_keeps_more_detail_at_borders_than_one_pass(self, name: str) -> None:
        assert seams(name, "chess").mean > seams(name, "single").mean + 0.03

    def test_no_tiles_measure_as_no_seams(self, name: str) -> None:
        control = refined(name, "whole", "control")
        floor = measure_seams(square_photograph(name), refined(name, "whole"), control, plan("chess"))
        assert floor.mean == pytest.approx(1, abs=0.01)
        assert floor.worst <= 1.10


def test_one_visible_border_is_found_among_all() -> None:
    control = refined("coffee", "whole", "control")
    stepped = refined("coffee", "whole").clone()
    stepped[:, 96:224, 192:] += 0.03  # one side of one tile, and what lies right of it
    found = measure_seams(square_photograph("coffee"), stepped, control, plan("chess"))
    assert found.worst > 1.15


def test_borders_are_where_tiles_begin_fade_and_end() -> None:
    columns = {border.at for border in borders(plan("chess")) if border.axis == 1}
    assert columns == {start + step for start in (96, 192, 288, 384) for step in (0, 8, 16, 24, 32)}
    assert {border.at for border in borders(plan("no overlap"))} == {128, 256, 384}


def test_an_engine_that_changes_nothing_keeps_every_bit() -> None:
    image = square_photograph("astronaut")[None]
    assert torch.equal(refine(image, plan("chess"), ExactEngine()).image, image)


@pytest.mark.parametrize(
    ("side", "tiles", "even", "odd"), [(4096, 25, 13, 12), (8192, 81, 41, 40), (2048, 9, 5, 4), (1024, 1, 1, 0)]
)
def test_passes_of_large_pictures(side: int, tiles: int, even: int, odd: int) -> None:
    grid = plan_tiles(side, side, 1, TileSettings(1024, 0.125), seed=0)
    assert len(grid.regions) == tiles
    assert [len(rows) for rows in grid.passes] == [count for count in (even, odd) if count]
