"""Whole-picture resampling in floating point, for upscaling before and supersampling after a refinement."""

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

UpscaleMethod = Literal["lanczos", "area", "bicubic"]
UPSCALE_METHODS: tuple[UpscaleMethod, ...] = get_args(UpscaleMethod)


def scale_image(image: Tensor, height: int, width: int, method: UpscaleMethod) -> Tensor:
    """Scales a batch [B,H,W,C] in 0..1 to [B,height,width,C] without passing through 8 bits."""
    if tuple(image.shape[1:3]) == (height, width):
        return image
    if method == "lanczos":
        return torch.stack([_lanczos(picture, height, width) for picture in image])
    planes = image.movedim(-1, 1)
    if method == "area":
        scaled = F.interpolate(planes, size=(height, width), mode="area")
    else:
        scaled = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return scaled.movedim(1, -1).clamp(0, 1)


def _lanczos(picture: Tensor, height: int, width: int) -> Tensor:
    """Pillow's Lanczos on float32 planes: one image [H,W,C] to [height,width,C]."""
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
        for plane in picture.movedim(-1, 0).contiguous().cpu().float().numpy()
    ]
    return torch.from_numpy(np.stack(planes, axis=-1)).clamp(0, 1).to(picture.device)


def fitted_size(width: int, height: int, longer_side: int, multiple_of: int) -> tuple[int, int]:
    """(width, height) px whose longer side is ``longer_side``, both rounded to ``multiple_of``, at least one of it."""
    scale = longer_side / max(width, height)

    def fitted(side: int) -> int:
        # half up, not to even: both sides must round the same way
        return max(multiple_of, math.floor(side * scale / multiple_of + 0.5) * multiple_of)

    return fitted(width), fitted(height)
