"""Training pictures: a face on a part of a photograph, sharp and as real detailing meets it: small, noisy, JPEG."""

import io
import random
from functools import lru_cache

import matplotlib
import numpy as np
import skimage.data
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from training import faces

SIDE = 192
"""px of a training picture, which is the working size the models are made for."""


@lru_cache
def photographs() -> tuple[Image.Image, ...]:
    """Free photographs that ship in Python packages."""
    loaded = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    hopper = matplotlib.get_data_path() + "/sample_data/grace_hopper.jpg"
    return (*(picture.convert("RGB") for picture in loaded), Image.open(hopper).convert("RGB"))


def background(rng: random.Random, side: int = SIDE) -> Image.Image:
    """A random square of a random photograph."""
    photograph = rng.choice(photographs())
    part = rng.randint(48, min(photograph.size))
    x, y = rng.randint(0, photograph.width - part), rng.randint(0, photograph.height - part)
    picture = photograph.crop((x, y, x + part, y + part)).resize((side, side), Image.Resampling.BICUBIC)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))


def choose(kinds: list[faces.Kind], rng: random.Random, people: float = 0.35) -> str:
    """A face, people in the given share of cases."""
    group = "people" if rng.random() < people else "drawn"
    return rng.choice(rng.choice([kind for kind in kinds if kind.group == group]).texts)


def with_face(text: str, rng: random.Random, side: int = SIDE, vary: bool = True) -> Image.Image:
    """A face on a background, [side,side] RGB; ``vary`` changes its colours a little and may flip it."""
    face = faces.draw(text)
    assert face is not None
    if vary:
        face = _vary(face, rng)
    size = side * rng.uniform(0.72, 0.94)
    scale = size / max(face.size)
    face = face.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    face = face.resize((round(face.width * scale), round(face.height * scale)), Image.Resampling.LANCZOS)
    picture = background(rng, side)
    spare = [max(0, side - length) for length in face.size]
    centre = [extent // 2 + round(extent * rng.uniform(-0.4, 0.4)) for extent in spare]
    picture.paste(face, (centre[0], centre[1]), face)
    return picture


def _vary(face: Image.Image, rng: random.Random) -> Image.Image:
    alpha = face.getchannel("A")
    rgb = face.convert("RGB")
    if rng.random() < 0.3:
        bands = list(rgb.split())
        rng.shuffle(bands)
        rgb = Image.blend(rgb, Image.merge("RGB", bands), rng.uniform(0.2, 0.6))
    rgb = ImageEnhance.Brightness(rgb).enhance(rng.uniform(0.88, 1.1))
    rgb = ImageEnhance.Color(rgb).enhance(rng.uniform(0.8, 1.2))
    rgb.putalpha(alpha)
    return rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else rgb


def degrade(picture: Image.Image, rng: random.Random, least: float = 3.5, most: float = 8.0) -> Image.Image:
    """The picture made smaller by ``least`` to ``most``, with noise and JPEG blocks, and brought back to its size."""
    factor = rng.uniform(least, most)
    size = (max(8, round(picture.width / factor)), max(8, round(picture.height / factor)))
    small = np.asarray(picture.resize(size, Image.Resampling.BOX)).astype(np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 5), small.shape)
    noisy = Image.fromarray((small + noise).clip(0, 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    noisy.save(buffer, "JPEG", quality=rng.randint(50, 95))
    return Image.open(buffer).convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)


def pair(number: int) -> tuple[Image.Image, Image.Image]:
    """Training example ``number``: (sharp, degraded), the same every time."""
    rng = random.Random(f"pair {number}")
    sharp = with_face(choose(faces.training_kinds(), rng), rng)
    return sharp, degrade(sharp, rng)


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """[N,3,H,W] in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).movedim(-1, 1).float() / 255
