"""Antialiased bicubic resampling along one side at a time, and only of the part that is asked for.

On the processor every 16 px are one product of a small matrix with the px they read, which takes less time than
``F.interpolate``, which works out each px alone. The weights are those of ``F.interpolate``, so both agree to rounding.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

BAND = 16
"""px of the result per product: fewer make more calls, more multiply with more zeros."""


def resampled(planes: Tensor, dim: int, size: int, first: int = 0, last: int | None = None) -> Tensor:
    """Px ``first..last-1`` of planes [C,h,w] resampled to ``size`` px along ``dim``, -2 or -1; all without ``last``."""
    last = size if last is None else last
    limit = planes.shape[dim]
    if limit == size:
        return planes.narrow(dim, first, last - first)
    if planes.device.type != "cpu" or planes.dtype != torch.float32:
        sides = (size, planes.shape[-1]) if dim == -2 else (planes.shape[-2], size)
        whole = F.interpolate(planes[None], size=sides, mode="bicubic", antialias=True, align_corners=False)[0]
        return whole.narrow(dim, first, last - first)
    starts, weights = _bands(limit, size)
    begin, end = first // BAND, -(-last // BAND)
    bands, reach = weights[begin:end], weights.shape[-1]
    read = torch.stack([planes.narrow(dim, start, reach) for start in starts[begin:end]], 1 if dim == -2 else 0)
    if dim == -2:
        drawn = (bands @ read).flatten(1, 2)  # [C,bands,BAND,w]
    else:
        drawn = (read.flatten(1, 2) @ bands.mT).unflatten(1, planes.shape[:2])  # [bands,C,h,BAND]
        drawn = rearrange(drawn, "bands c h px -> c h (bands px)")
    return drawn.narrow(dim, first - BAND * begin, last - first)


@lru_cache(maxsize=16)
def _bands(limit: int, size: int) -> tuple[list[int], Tensor]:
    """The matrices that resample ``limit`` px to ``size``, and the first px that each reads.

    Returns:
        as many starts as bands, and [bands,BAND,px read]; rows past ``size`` are 0.
    """
    first, weights = _weights(limit, size)
    taps = np.arange(weights.shape[1])
    heads = np.repeat(first[::BAND], BAND)[:size]
    reach = min(limit, int((first - heads).max()) + len(taps))
    starts = np.minimum(first[::BAND], limit - reach)
    places = first - np.repeat(starts, BAND)[:size]
    matrix = np.zeros((len(starts) * BAND, reach + len(taps)), np.float32)  # taps of weight 0 may lie past the end
    np.put_along_axis(matrix[:size], places[:, None] + taps, weights, axis=1)
    return starts.tolist(), torch.from_numpy(np.ascontiguousarray(matrix[:, :reach])).unflatten(0, (-1, BAND))


def _weights(limit: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """[size] the first px that each px reads, and [size,taps] how much it takes of it and those that follow.

    Keys' cubic kernel with a = -0.5, widened where px are lost; in float32 throughout, as ``F.interpolate`` does it.
    """
    half, scale = np.float32(0.5), np.float32(limit) / np.float32(size)
    support, sharpness = 2 * max(scale, np.float32(1)), np.float32(1) / max(scale, np.float32(1))
    centres = scale * (np.arange(size, dtype=np.float32) + half)
    first = (centres - support + half).astype(np.int64).clip(min=0)
    last = (centres + support + half).astype(np.int64).clip(max=limit)
    taps = np.arange(int((last - first).max()))
    places = (taps + first[:, None]).astype(np.float32)
    x = np.abs(places - centres[:, None] + half) * sharpness
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (taps < (last - first)[:, None])
    return first, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
