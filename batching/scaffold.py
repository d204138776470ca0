"""A noise scaffold: noise laid out over the whole picture, of which each crop takes the part at its own place."""

import math

import torch
from torch import Tensor


def scaffold_slice(
    scaffold: Tensor,
    start: tuple[float, float],
    stop: tuple[float, float],
    size: tuple[int, int],
    fresh: torch.Generator,
) -> Tensor:
    """The scaffold's noise under a crop, at the crop's working size, still white and of unit variance.

    Each axis is resampled by the area each cell covers, made orthonormal: with D [small, large], D·Dᵀ = 1, a finer
    noise n becomes D·n, and a coarser one Dᵀ·n + (1 - Dᵀ·D)·w with fresh white w. Both keep the covariance 1 exactly
    (to float rounding) when n is white. A crop on whole cells at the scaffold's own scale is the plain slice.

    Args:
        scaffold: [c,H,W], noise of the whole picture.
        start, stop: top-left and bottom-right of the crop as (y, x) in cells of the scaffold; parts outside the
            picture are filled with fresh noise.
        size: (height, width) of the result.
        fresh: generator for what the scaffold does not hold.

    Returns:
        [c, *size] float32.
    """
    noise = scaffold.to(device="cpu", dtype=torch.float32)
    noise = _resample_axis(noise, 1, start[0], stop[0], size[0], fresh)
    return _resample_axis(noise, 2, start[1], stop[1], size[1], fresh)


def _resample_axis(noise: Tensor, axis: int, start: float, stop: float, size: int, fresh: torch.Generator) -> Tensor:
    first, last = math.floor(start + 1e-6), math.ceil(stop - 1e-6)
    cells = _cells(noise, axis, first, last, fresh)
    if last - first == size and abs(stop - start - size) < 1e-6:
        return cells
    cells = cells.movedim(axis, -1)
    edges = torch.linspace(start - first, stop - first, size + 1, dtype=torch.float64)
    overlap = _overlap(edges, last - first)
    if size <= last - first:
        result = cells @ _orthonormal(overlap).T.float()
    else:
        down = _orthonormal(overlap.T).float()
        white = torch.randn(*cells.shape[:-1], size, generator=fresh)
        result = cells @ down + white - (white @ down.T) @ down
    return result.movedim(-1, axis)


def _cells(noise: Tensor, axis: int, first: int, last: int, fresh: torch.Generator) -> Tensor:
    """Cells first..last-1 along ``axis``; those the scaffold does not have are drawn anew."""
    limit = noise.shape[axis]
    inside = noise.narrow(axis, max(first, 0), max(0, min(last, limit) - max(first, 0)))
    before, after = max(0, min(-first, last - first)), max(0, min(last - limit, last - first))
    if not before and not after:
        return inside
    shape = list(noise.shape)
    pads = []
    for count in (before, after):
        shape[axis] = count
        pads.append(torch.randn(*shape, generator=fresh))
    return torch.cat([pads[0], inside, pads[1]], dim=axis)


def _overlap(edges: Tensor, cells: int) -> Tensor:
    """[len(edges)-1, cells]: the length that each span between two edges has in common with each unit cell."""
    left = torch.arange(cells, dtype=torch.float64)[None]
    common = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return common.clamp(min=0)


def _orthonormal(rows: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows, (R·Rᵀ)^(-1/2)·R."""
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T @ rows


def pyramid_noise(shape: tuple[int, int, int], octaves: int, generator: torch.Generator) -> Tensor:
    """Unit-variance noise [c,H,W]: white with one octave, with coarser noise added by each further one.

    Octave k is white noise on a grid 2^k coarser, interpolated up and brought to unit variance; each weighs half as
    much as the one before, and the sum is divided by the root of the summed squares.
    """
    channels, height, width = shape
    noise = torch.randn(shape, generator=generator)
    power = 1.0
    for octave in range(1, octaves):
        size = (max(2, height >> octave), max(2, width >> octave))
        coarse = torch.randn(1, channels, *size, generator=generator)
        grown = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
        weight = 0.5**octave
        noise = noise + weight * grown / grown.std().clamp(min=1e-6)
        power += weight**2
    return noise / power**0.5
