"""Trains the VAE on parts of the training pictures: it must keep edges, small features and rare colours."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training import faces, pictures
from training.loop import Schedule, Trainer
from training.networks import VAE

PART = 64
"""px of a part; the network is local, small parts of many pictures teach it as much as whole ones."""
PICTURES, PARTS = 2, 4  # pictures in a step, parts of each
SCHEDULE = Schedule(steps=1800, learning_rate=1.5e-3)


def train(folder: Path) -> Trainer:
    torch.manual_seed(0)
    vae = VAE()
    trainer = Trainer("vae", {"vae": vae}, SCHEDULE, folder)
    trainer.run(lambda step: _loss(vae, step))
    return trainer


def _loss(vae: VAE, step: int) -> Tensor:
    pixels = parts_at(step)
    latents = vae.encode(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
    decoded = vae.decode(latents + 0.05 * noise)
    # the sampler's noise has unit variance: so should every channel of the latents
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    spread = mean.square().mean() + (deviation - 1).square().mean()
    edges = sum(F.l1_loss(a, b) for a, b in zip(_gradients(decoded), _gradients(pixels), strict=True))
    colours = F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(pixels, 4))
    return F.l1_loss(decoded, pixels) + edges + colours + 0.002 * spread


def parts_at(step: int) -> Tensor:
    """[8,3,64,64]: parts of two pictures, one in four of them degraded."""
    rng = random.Random(f"vae {step}")
    parts = []
    for _ in range(PICTURES):
        picture = pictures.with_face(pictures.choose(faces.training_kinds(), rng), rng)
        if rng.random() < 0.25:
            picture = pictures.degrade(picture, rng)
        if rng.random() < 0.3:
            picture = _turn_hue(picture, rng.randrange(256))
        for _ in range(PARTS):
            x, y = (round(rng.triangular(0, pictures.SIDE - PART, (pictures.SIDE - PART) / 2)) for _ in range(2))
            parts.append(picture.crop((x, y, x + PART, y + PART)))
    return pictures.to_tensor(parts)


def _turn_hue(picture: Image.Image, by: int) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([(level + by) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
