import pytest
import torch
import torch.nn.functional as F
from luna_refinement.batching.blend import multiband
from luna_refinement.batching.color import WAVELET_LEVELS, match_color
from skimage.data import astronaut
from torch import Tensor


def photograph() -> torch.Tensor:
    return torch.from_numpy(astronaut()[64:192, 160:288]).float() / 255


def disc(size: int = 128) -> torch.Tensor:
    axis = torch.arange(size) - size / 2
    return ((axis[:, None] ** 2 + axis[None] ** 2) < (size / 3) ** 2).float()


def shifted(image: torch.Tensor) -> torch.Tensor:
    """The photograph with a colour cast and weaker contrast, and new detail."""
    detail = 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    return (image * 0.7 + torch.tensor([0.2, 0.05, 0.0]) + detail).clamp(0, 1)


def mean_difference(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> float:
    difference = ((a - b) * weights[..., None]).sum((0, 1)) / weights.sum()
    return float(difference.abs().max())


@pytest.mark.parametrize("method", ["mean_std", "wavelet"])
def test_color_match_removes_most_of_a_colour_shift(method: str) -> None:
    image, weights = photograph(), disc()
    cast = shifted(image)
    before = mean_difference(cast, image, weights)
    after = mean_difference(match_color(cast, image, weights, method), image, weights)
    print(f"{method}: colour shift inside the mask {before:.4f} -> {after:.4f}")
    assert before > 0.08
    assert after < before / 8


def test_mean_std_gives_back_the_contrast() -> None:
    image, weights = photograph(), disc()
    inside = weights > 0
    matched = match_color(shifted(image), image, weights, "mean_std")
    assert shifted(image)[inside].std(0).max() < 0.9 * image[inside].std(0).max()
    assert torch.allclose(matched[inside].std(0), image[inside].std(0), rtol=0.02)


@pytest.mark.parametrize("method", ["mean_std", "wavelet"])
def test_color_match_reads_nothing_outside_the_mask(method: str) -> None:
    image, weights = photograph(), disc()
    cast = shifted(image)
    other = torch.where(weights[..., None] > 0, image, 1 - image)
    inside = weights[..., None] > 0
    first = match_color(cast, image, weights, method)
    second = match_color(cast, other, weights, method)
    assert torch.allclose(first[inside.expand_as(first)], second[inside.expand_as(second)], atol=1e-5)


def test_color_match_keeps_detail_and_none_changes_nothing() -> None:
    image, weights = photograph(), torch.ones(128, 128)
    cast = shifted(image)
    assert match_color(cast, image, weights, "none") is cast
    kept = match_color(cast, image, weights, "wavelet")
    detail = (cast - image * 0.7).diff(dim=0).flatten()
    seen = (kept - image).diff(dim=0).flatten()
    assert torch.corrcoef(torch.stack([detail, seen]))[0, 1] > 0.5


def test_multiband_of_a_picture_with_itself_is_that_picture() -> None:
    image = photograph()
    assert (multiband(image, image, disc()) - image).abs().max() < 1e-5


def test_multiband_spreads_a_brightness_step_wider_than_the_mask_edge() -> None:
    dark, bright = torch.full((128, 128, 3), 0.3), torch.full((128, 128, 3), 0.6)
    weights = torch.zeros(128, 128)
    weights[:, 64:] = 1
    row = multiband(dark, bright, weights)[64, :, 0]
    assert row[:8].mean() == pytest.approx(0.3, abs=0.03)
    assert row[-8:].mean() == pytest.approx(0.6, abs=0.03)
    assert row.diff().max() < 0.05


def test_multiband_keeps_fine_detail_of_each_side() -> None:
    noise = 0.1 * torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(2))
    weights = torch.zeros(128, 128)
    weights[:, 64:] = 1
    blended = multiband(torch.full((128, 128, 3), 0.5), 0.5 + noise, weights)
    assert blended[:, :48].diff(dim=0).abs().mean() < 0.1 * blended[:, 80:].diff(dim=0).abs().mean()


def dilated(planes: Tensor) -> Tensor:
    """The low band of planes [C,H,W] by PyTorch's dilated convolution, in float64."""
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).view(1, 1, 1, 3)
    for level in range(WAVELET_LEVELS):
        step = 2**level
        for k, padding, dilation in (
            (kernel, (step, step, 0, 0), (1, step)),
            (kernel.transpose(-1, -2), (0, 0, step, step), (step, 1)),
        ):
            padded = F.pad(planes[:, None].double(), padding, mode="replicate")
            planes = F.conv2d(padded, k, dilation=dilation)[:, 0]
    return planes


@pytest.mark.parametrize("box", [None, (10, 70, 30, 90), (0, 40, 0, 128)])
def test_wavelet_is_the_normalised_dilated_convolution_of_both_pictures(box: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(4)
    refined, reference = (torch.rand(96, 128, 3, generator=generator) for _ in range(2))
    weights = torch.rand(96, 128, generator=generator)
    if box is not None:
        inside = torch.zeros_like(weights)
        inside[box[0] : box[1], box[2] : box[3]] = 1
        weights = weights * inside
    total = dilated(weights[None])
    low = [dilated(picture.movedim(-1, 0) * weights) / total.clamp(min=1e-6) for picture in (reference, refined)]
    wanted = refined + torch.where(total > 1e-6, low[0] - low[1], 0).movedim(0, -1)
    assert (match_color(refined, reference, weights, "wavelet") - wanted.clamp(0, 1)).abs().max() < 2e-6
