"""Training pairs with their latents, made once: drawing and encoding them takes longer than learning from them."""

import os
import random
from pathlib import Path

import torch
from comfy.clip_vision import clip_preprocess
from torch import Tensor
from tqdm import tqdm

from training import pictures
from training.networks import VAE

SHARD = 128
FIRST, PER_STEP, MOST = 1024, 2, 6144
"""Pairs a step may choose from: ``FIRST`` + ``PER_STEP`` x step, ``MOST`` in the end."""


class Pool:
    """Latents of the sharp pictures and the degraded pictures, in shards on disk.

    Args:
        vae: the trained VAE.
        scale: latents times this have unit variance.
        folder: of the shards.
    """

    def __init__(self, vae: VAE, scale: float, folder: Path) -> None:
        self.vae = vae.eval()
        self.scale = scale
        self.folder = folder
        self.latents = torch.empty(0)
        self.degraded = torch.empty(0)

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """(latents [rows,4,24,24] of unit variance, pictures [rows,3,224,224] as the image encoder wants them)."""
        size = min(MOST, FIRST + PER_STEP * step)
        self._fill(size)
        rng = random.Random(f"batch {step}")
        places = [rng.randrange(size) for _ in range(rows)]
        return self.latents[places].float() * self.scale, clip_preprocess(self.degraded[places].float() / 255)

    def _fill(self, size: int) -> None:
        while len(self.latents) < size:
            latents, degraded = self.shard(len(self.latents) // SHARD)
            self.latents = torch.cat([self.latents, latents]) if len(self.latents) else latents
            self.degraded = torch.cat([self.degraded, degraded]) if len(self.degraded) else degraded

    @torch.no_grad()
    def shard(self, number: int) -> tuple[Tensor, Tensor]:
        """Pairs ``number * SHARD`` and following: latents float16, degraded pictures [SHARD,192,192,3] uint8."""
        path = self.folder / f"{number}.pt"
        if path.is_file():
            latents, degraded = torch.load(path, weights_only=True)
            return latents, degraded
        pairs = [pictures.pair(place) for place in range(number * SHARD, (number + 1) * SHARD)]
        sharp = pictures.to_tensor([sharp for sharp, _ in pairs])
        latents = torch.cat([self.vae.encode(part) for part in sharp.split(8)]).half()
        degraded = (pictures.to_tensor([bad for _, bad in pairs]).movedim(1, -1) * 255).round().to(torch.uint8)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save((latents, degraded), partial)
        os.replace(partial, path)
        return latents, degraded


def fill(pool: Pool) -> None:
    """Makes every shard that is missing."""
    for number in tqdm(range(MOST // SHARD), desc="pool", unit="shard"):
        pool.shard(number)
