"""Photographs that come with the test packages."""

from functools import cache

import matplotlib.cbook
import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "grace_hopper")


@cache
def square_photograph(name: str, side: int = 512) -> Tensor:
    """[side,side,3] in 0..1: the middle of the photograph."""
    if name == "grace_hopper":
        pixels = np.array(Image.open(str(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))))
    else:
        pixels = getattr(skimage.data, name)()
    picture = Image.fromarray(pixels)
    length = min(picture.size)
    left, top = (picture.width - length) // 2, (picture.height - length) // 2
    square = picture.crop((left, top, left + length, top + length)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).float() / 255
