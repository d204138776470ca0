"""Seeds and noise of rows: the same for the same place, another for every other."""

from itertools import combinations

import torch
from luna_refinement.batching.noise import RowStepNoise, region_seed, row_noise
from luna_refinement.picture.boxes import Box


def test_crops_that_differ_in_any_side_have_seeds_of_their_own() -> None:
    crops = [Box(0, 0, 64, 64), Box(0, 0, 128, 64), Box(0, 0, 64, 128), Box(8, 0, 64, 64), Box(0, 8, 64, 64)]
    seeds = [region_seed(1, crop) for crop in crops] + [region_seed(2, crops[0])]
    assert len(set(seeds)) == len(seeds)
    assert region_seed(1, Box(0, 0, 64, 64)) == seeds[0]


def test_start_and_steps_of_a_row_draw_other_noise() -> None:
    start = row_noise([7], (4, 8, 8))
    steps = RowStepNoise(torch.zeros_like(start), [7])
    level = torch.tensor(1.0)
    drawn = [start, steps(level, level), steps(level, level)]
    for one, other in combinations(drawn, 2):
        assert (one - other).abs().mean() > 0.5


def test_a_row_draws_the_same_noise_in_any_batch() -> None:
    assert torch.equal(row_noise([3, 5], (4, 8, 8))[1:], row_noise([5], (4, 8, 8)))
    level = torch.tensor(1.0)
    together, alone = (RowStepNoise(torch.zeros(len(seeds), 4, 8, 8), seeds) for seeds in ([3, 5], [5]))
    for _ in range(2):
        assert torch.equal(together(level, level)[1:], alone(level, level))
