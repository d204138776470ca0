"""Colour matching: takes a refined crop's colours back to those of the picture, measured inside the mask only."""

from typing import Literal, get_args

import torch
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
    """Coarse colours of the reference, fine ones of the refined crop: as blurs are linear, one of the difference."""
    matched = refined.clone()
    rows, columns = (_span(weights.amax(dim) > 0) for dim in (1, 0))
    shift = _coarse((reference - refined)[rows, columns], weights[rows, columns])
    matched[rows, columns] += shift
    return matched


def _span(found: Tensor) -> slice:
    """The part of one side [n] that the blur of what is ``found`` reaches."""
    places = found.nonzero()
    reach = 2**WAVELET_LEVELS
    return slice(max(0, int(places.min()) - reach), int(places.max()) + reach + 1)


def _coarse(image: Tensor, weights: Tensor) -> Tensor:
    """The low band [H,W,3] of an à trous decomposition with the [1,2,1]/4 kernel, by normalised convolution:

    every blur averages weighted px only, so colours from outside the mask do not leak in.
    """
    planes = torch.cat([image * weights[..., None], weights[..., None]], dim=-1).movedim(-1, 0).contiguous()
    for level in range(WAVELET_LEVELS):
        for dim in (-1, -2):
            planes = _blurred(planes, min(2**level, planes.shape[dim] - 1), dim)
    colours, total = planes[:3], planes[3:]
    return torch.where(total > 1e-6, colours / total.clamp(min=1e-6), 0).movedim(0, -1)


def _blurred(planes: Tensor, step: int, dim: int) -> Tensor:
    """Planes [C,H,W] times [1,2,1]/4 along one dimension, ``step`` px apart; the border goes on.

    Sums of shifted planes: several times faster on the CPU than a dilated convolution.
    """
    if step < 1:
        return planes
    size = planes.shape[dim]
    blurred = planes / 2
    for to, since, edge in ((step, 0, 0), (0, step, size - step)):
        blurred.narrow(dim, to, size - step).add_(planes.narrow(dim, since, size - step), alpha=0.25)
        blurred.narrow(dim, edge, step).add_(planes.narrow(dim, 0 if edge == 0 else size - 1, 1), alpha=0.25)
    return blurred
