"""Between the picture and the working size: cut crops out, resample them, paste them back in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Box


def reflected(start: int, stop: int, limit: int) -> Tensor:
    """Indices ``start..stop-1`` folded back into ``0..limit-1`` by mirroring at the ends without repeating the edge."""
    index = torch.arange(start, stop)
    if limit == 1:
        return torch.zeros_like(index)
    period = 2 * (limit - 1)
    index = index.remainder(period)
    return torch.where(index < limit, index, period - index)


def resample(image: Tensor, height: int, width: int) -> Tensor:
    """Resamples one image [H,W,C] in 0..1 to [height,width,C]: antialiased bicubic, clamped to 0..1."""
    if tuple(image.shape[:2]) == (height, width):
        return image
    planes = image.movedim(-1, 0)[None].contiguous()  # planes are resampled twice as fast as interleaved colours
    planes = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return planes[0].movedim(0, -1).clamp_(0, 1)


def cut(image: Tensor, crop: Box, height: int, width: int) -> Tensor:
    """Cuts ``crop`` out of one image [H,W,C] and resamples it to [height,width,C]; px past the border are mirrored."""
    rows, columns = image.shape[:2]
    if crop.x1 >= 0 and crop.y1 >= 0 and crop.x2 <= columns and crop.y2 <= rows:
        window = image[crop.y1 : crop.y2, crop.x1 : crop.x2]
    else:
        window = image[reflected(crop.y1, crop.y2, rows)][:, reflected(crop.x1, crop.x2, columns)]
    return resample(window, height, width)


def paste(canvas: Tensor, refined: Tensor, crop: Box, region: Box, weights: Tensor) -> None:
    """Blends a refined crop into the canvas, in place and only inside ``region``.

    Args:
        canvas: [H,W,C] float32, written in place.
        refined: [h,w,C], the whole crop at its working size.
        crop: where the crop lies on the picture, px.
        region: the part of the crop to write, inside the picture, px.
        weights: [region.height, region.width] in 0..1; where it is 0 the canvas keeps its bits.
    """
    window = region.relative_to(crop)
    full = resample(refined, crop.height, crop.width)[window.y1 : window.y2, window.x1 : window.x2]
    target = canvas[region.y1 : region.y2, region.x1 : region.x2]
    target.lerp_(full.to(target), weights.to(target)[..., None])
