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
