"""Seeds and noise of rows: the same for the same place, another for every other."""

import time
from itertools import combinations, pairwise

import pytest
import torch
from luna_refinement.batching.noise import RowBrownianNoise, RowStepNoise, region_seed, row_noise
from luna_refinement.picture.boxes import Box
from torch import Tensor


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


LEVELS = (14.6, 7.0, 3.1, 1.4, 0.6, 0.03)


def asked(noise: RowBrownianNoise, start: float, stop: float) -> Tensor:
    return noise(torch.tensor(start), torch.tensor(stop))


def test_brownian_increments_are_white_and_of_unit_variance_at_every_step() -> None:
    noise = RowBrownianNoise(torch.empty(3, 4, 64, 64), [1, 2, 3])
    steps = [asked(noise, a, b).flatten(1) for a, b in pairwise(LEVELS)]
    for step in steps:
        assert step.mean(1).abs().max() < 0.04
        assert (step.var(1) - 1).abs().max() < 0.06
    for one, other in combinations([row for step in steps for row in step], 2):
        assert (one * other).mean().abs() < 0.04


@pytest.mark.parametrize("first", ["part", "whole"])
def test_brownian_increments_over_a_part_and_over_the_whole_step_add_up(first: str) -> None:
    start, middle, stop = 9.0, 4.0, 1.0
    noise = RowBrownianNoise(torch.empty(2, 4, 64, 64), [1, 2])
    spans = [(start, middle), (start, stop)]
    found = {span: asked(noise, *span) for span in (spans if first == "part" else spans[::-1])}
    part, whole = (found[span] for span in spans)
    rest = asked(noise, middle, stop)
    total = part * (start - middle) ** 0.5 + rest * (middle - stop) ** 0.5
    assert torch.allclose(total, whole * (start - stop) ** 0.5, atol=1e-5)
    for increment in (part, whole, rest):
        assert abs(float(increment.var()) - 1) < 0.06
    assert float((part * rest).mean()) == pytest.approx(0, abs=0.04)


def test_brownian_noise_of_a_row_is_its_own() -> None:
    alone = RowBrownianNoise(torch.empty(1, 4, 8, 8), [5])
    beside = RowBrownianNoise(torch.empty(3, 4, 8, 8), [4, 5, 6])
    for a, b in pairwise(LEVELS):
        assert torch.equal(asked(alone, a, b)[0], asked(beside, a, b)[1])
        middle = (a + b) / 2
        assert torch.equal(asked(alone, a, middle)[0], asked(beside, a, middle)[1])


def test_brownian_noise_takes_no_longer_than_drawing_it_and_forgets_what_lies_behind() -> None:
    rows = 4
    noise = RowBrownianNoise(torch.empty(rows, 4, 128, 128), list(range(rows)))
    start = time.process_time()
    levels = torch.linspace(14, 0.03, 21).tolist()
    for a, b in pairwise(levels):
        asked(noise, a, b)
    assert (time.process_time() - start) / (20 * rows) < 0.006  # a tree: 18 ms and more
    assert len(noise._path) <= 2


def test_a_step_of_no_length_has_no_noise() -> None:
    noise = RowBrownianNoise(torch.empty(1, 4, 8, 8), [1])
    assert not asked(noise, 2.0, 2.0).any()
