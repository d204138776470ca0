"""Noise that belongs to a row: it depends on the seed and on the region's place, never on the batch around it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..picture.boxes import Box


def row_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for one row, hashed from the run's seed and whatever names the row."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def region_seed(seed: int, crop: Box) -> int:
    """The seed of a region: the run's seed and where the crop lies in its own picture, px.

    Which picture of the batch that is does not count: a picture gives the same result alone and in any batch. The 0
    stands for it: it is what the only picture of a batch always had there.
    """
    return row_seed(seed, 0, crop.x1, crop.y1, crop.x2, crop.y2)


def row_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator for one row; streams (start noise, step noise) of the same row are independent."""
    return torch.Generator(device="cpu").manual_seed(row_seed(seed, stream))


def row_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Start noise [N, *shape] float32 on the CPU, one generator per row.

    Args:
        seeds: one seed per row.
        shape: shape of one latent, without the batch.
    """
    return torch.stack([torch.randn(*shape, generator=row_generator(seed, "start")) for seed in seeds])


class RowStepNoise:
    """The noise a stochastic sampler asks for at each step, drawn row by row.

    Takes the place of k-diffusion's default ``noise_sampler``, which draws for the whole batch at once.
    """

    def __init__(self, x: Tensor, seeds: Sequence[int]):
        if len(seeds) != x.shape[0]:
            raise ValueError(f"{x.shape[0]} rows need {x.shape[0]} seeds, got {len(seeds)}")
        self._like = x
        self._generators = [row_generator(seed, "step") for seed in seeds]

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        shape = self._like.shape[1:]
        noise = torch.stack([torch.randn(*shape, generator=generator) for generator in self._generators])
        return noise.to(self._like)


class RowBrownianNoise:
    """The noise of the DPM++ SDE family, whose queries overlap in time: increments of a Brownian motion for each row.

    Every noise level asked for is a point of the row's path W: beyond the known ones it is drawn as an independent
    increment, between two of them from the bridge, N(lerp(a, b), (t-a)(b-t)/(b-a)). A tree that could be asked in any
    order, such as torchsde's, takes many times as long; samplers only ever walk down. Points behind are forgotten.
    """

    def __init__(self, x: Tensor, seeds: Sequence[int]):
        self._like = x
        self._generators = [row_generator(seed, "brownian") for seed in seeds]
        self._path: dict[float, Tensor] = {}

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        start, stop = float(sigma), float(sigma_next)
        for level in (start, stop):
            if level not in self._path:
                self._path[level] = self._point(level)
        noise = (self._path[stop] - self._path[start]) / (abs(stop - start) ** 0.5 or 1.0)
        self._path = {level: point for level, point in self._path.items() if level <= max(start, stop)}
        return noise.to(self._like)

    def _point(self, level: float) -> Tensor:
        """W at a new noise level: [N,...] float32 on the CPU."""
        known = self._path
        if not known:
            return torch.zeros(self._like.shape)
        shape = self._like.shape[1:]
        white = torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])
        lower, higher = [k for k in known if k < level], [k for k in known if k > level]
        if not lower or not higher:
            nearest = min(higher) if higher else max(lower)
            return known[nearest] + white * abs(level - nearest) ** 0.5
        below, above = max(lower), min(higher)
        share = (level - below) / (above - below)
        spread = ((level - below) * (above - level) / (above - below)) ** 0.5
        return torch.lerp(known[below], known[above], share) + white * spread
