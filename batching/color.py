"""Colour matching: takes a refined crop's colours back to those of the picture, measured inside the mask only."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ColorMatch = Literal["none", "mean_std", "wavelet"]
COLOR_MATCHES: tuple[ColorMatch, ...] = get_args(ColorMatch)

WAVELET_LEVELS = 5
"""Levels of the à trous decomposition; the coarsest blur spans 2^5 px on each side."""


def match_color(refined: Tensor, reference: Tensor, weights: Tensor, method: ColorMatch) -> Tensor:
    """Moves the colours of ``refined`` towards ``reference``.

    Args:
        refined, reference: [H,W,3] in 0..1.
        weights: [H,W] in 0..1, where colours are measured.
        method: "mean_std" matches mean and spread of each channel; "wavelet" takes the coarse colours of the
            reference and keeps the detail of the refined crop; "none" returns the crop as it is.

    Returns:
        [H,W,3] in 0..1.
    """
    if method == "none" or weights.max() <= 0:
        return refined
    matched = _mean_std(refined, reference, weights) if method == "mean_std" else _wavelet(refined, reference, weights)
    return matched.clamp(0, 1)


def _mean_std(refined: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    mean, std = _moments(refined, weights)
    wanted_mean, wanted_std = _moments(reference, weights)
    gain = torch.where(std > 1e-4, wanted_std / std.clamp(min=1e-4), torch.ones_like(std))
    return (refined - mean) * gain + wanted_mean


def _moments(image: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation per channel, [3] each."""
    share = (weights / weights.sum())[..., None]
    mean = (image * share).sum((0, 1))
    return mean, ((image - mean).square() * share).sum((0, 1)).sqrt()


def _wavelet(refined: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    return refined + _coarse(reference, weights) - _coarse(refined, weights)


def _coarse(image: Tensor, weights: Tensor) -> Tensor:
    """The low band [H,W,3] of an à trous decomposition with the [1,2,1]/4 kernel, by normalised convolution:

    every blur averages weighted px only, so colours from outside the mask do not leak in.
    """
    planes = torch.cat([image * weights[..., None], weights[..., None]], dim=-1).movedim(-1, 0)[None]
    for level in range(WAVELET_LEVELS):
        step = min(2**level, min(planes.shape[-2:]) - 1)
        if step < 1:
            break
        for dim, padding in ((-1, (step, step, 0, 0)), (-2, (0, 0, step, step))):
            # several times faster than conv2d, which is made for many channels
            wide, size = F.pad(planes, padding, mode="replicate"), planes.shape[dim]
            ends = wide.narrow(dim, 0, size) + wide.narrow(dim, 2 * step, size)
            planes = ends.mul_(0.25).add_(wide.narrow(dim, step, size), alpha=0.5)
    colours, total = planes[0, :3], planes[0, 3:]
    coarse = colours / total.clamp(min=1e-6)
    return torch.where(total > 1e-6, coarse, torch.zeros_like(coarse)).movedim(0, -1)
