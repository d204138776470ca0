import pytest
import torch
from luna_refinement.batching.scaffold import scaffold_slice

SAMPLES = 6000


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_a_crop_on_whole_cells_is_the_plain_slice() -> None:
    scaffold = torch.randn(4, 40, 50, generator=generator())
    part = scaffold_slice(scaffold, (8, 16), (24, 40), (16, 24), generator())
    assert torch.equal(part, scaffold[:, 8:24, 16:40])


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (24, 5), (40, 40)])
@pytest.mark.parametrize("start", [(3.0, 2.0), (2.4, 3.7)])
def test_resampled_noise_stays_white_with_unit_variance(size: tuple[int, int], start: tuple[float, float]) -> None:
    """Covariance of all cells of a slice, over 6000 independent channels, against the identity.

    The standard error of one entry is 1/sqrt(6000) = 0.013; 5 of them bound the worst off-diagonal entry.
    """
    scaffold = torch.randn(SAMPLES, 20, 20, generator=generator())
    part = scaffold_slice(scaffold, start, (start[0] + 12.3, start[1] + 12.0), size, generator())
    cells = part.reshape(SAMPLES, -1)[:, :300]
    covariance = (cells.T @ cells) / SAMPLES
    assert (covariance.diagonal() - 1).abs().max() < 6 * (2 / SAMPLES) ** 0.5
    assert (covariance - covariance.diagonal().diag()).abs().max() < 6 / SAMPLES**0.5


def test_a_finer_slice_keeps_the_places_of_the_scaffold() -> None:
    scaffold = torch.randn(1, 16, 16, generator=generator())
    part = scaffold_slice(scaffold, (0, 0), (16, 16), (64, 64), generator())
    means = part.unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))
    assert torch.allclose(means, scaffold / 4, atol=1e-5)


def test_two_crops_read_the_same_noise_where_they_overlap() -> None:
    scaffold = torch.randn(4, 32, 32, generator=generator())
    left = scaffold_slice(scaffold, (0, 0), (16, 16), (16, 16), generator())
    right = scaffold_slice(scaffold, (0, 8), (16, 24), (16, 16), torch.Generator().manual_seed(9))
    assert torch.equal(left[:, :, 8:], right[:, :, :8])


def test_what_lies_outside_the_picture_is_fresh_noise() -> None:
    scaffold = torch.zeros(4, 10, 10)
    part = scaffold_slice(scaffold, (-3, -2), (13, 12), (16, 14), generator())
    assert part[:, 3:13, 2:12].abs().max() == 0
    assert part[:, :3].std() > 0.5
    assert part[:, :, 12:].std() > 0.5
