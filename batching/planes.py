"""Planes of a whole picture at any scale, such as latents, cut to a box, exact to parts of a px."""

import math

import torch
from torch import Tensor

from .crops import reflected


def cut_planes(planes: Tensor, box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """The part of ``planes`` under ``box``, resampled by an antialiased bicubic kernel; parts outside are mirrored.

    A box on whole px at the same scale gives the plain slice.

    Args:
        planes: [...,H,W].
        box: top, left, bottom, right in px of the planes, fractional.
        size: (height, width) of the result.

    Returns:
        [..., *size], of the planes' type and device.
    """
    top, left, bottom, right = box
    height, width = planes.shape[-2:]
    rows = _weights(top, bottom, height, size[0]).to(planes.device)
    columns = _weights(left, right, width, size[1]).to(planes.device)
    return (rows @ planes.float() @ columns.T).to(planes.dtype)


def _weights(start: float, stop: float, limit: int, size: int) -> Tensor:
    """[size,limit]: how much each px along one side of ``limit`` px gives to each of ``size`` px of ``start..stop``."""
    scale = (stop - start) / size
    reach = max(1.0, scale)
    first, last = math.floor(start - 2 * reach), math.ceil(stop + 2 * reach)
    centres = start + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    taps = torch.arange(first, last, dtype=torch.float64) + 0.5
    kernel = _cubic((taps[None] - centres[:, None]) / reach)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    weights = torch.zeros(size, limit, dtype=torch.float64)
    return weights.index_add_(1, reflected(first, last, limit), kernel).float()


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5: 1 at 0, and 0 at all other whole numbers."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
