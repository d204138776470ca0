"""Between the picture and the working size: cut crops out, resample them, paste them back in place."""

import torch
from einops import rearrange
from torch import Tensor

from ..picture.boxes import Box, picture_box
from .resampling import resampled

WINDOW_PX = 4 * 1024**2
"""px of the picture that are pasted, or drawn as a weight, at a time: what a large region needs beside the canvas."""

MIXED_PX = 2**15
"""px that are mixed at a time: few enough to stay in the processor's cache."""


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
    if height < image.shape[0]:
        # Rows of interleaved colours are rows like any other: what is lost here need not be sorted into planes.
        planes = _planes(resampled(image.flatten(1)[None], -2, height)[0].unflatten(1, image.shape[1:]))
        planes = resampled(planes, -1, width)
    else:
        planes = resampled(resampled(_planes(image), -1, width), -2, height)
    return rearrange(planes, "c h w -> h w c").clamp_(0, 1)


def filling(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of one image [H,W,C] that has the aspect of ``height`` x ``width``, resampled to them."""
    rows = max(1, min(image.shape[0], round(image.shape[1] * height / width)))
    columns = max(1, min(image.shape[1], round(image.shape[0] * width / height)))
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    return resample(image[top : top + rows, left : left + columns], height, width)


def cut(image: Tensor, crop: Box, height: int, width: int) -> Tensor:
    """Cuts ``crop`` out of one image [H,W,C] and resamples it to [height,width,C]; px past the border are mirrored."""
    rows, columns = image.shape[:2]
    inside = crop.intersect(picture_box(columns, rows))
    window = image[inside.y1 : inside.y2, inside.x1 : inside.x2]
    if inside == crop:
        return resample(window, height, width)
    # A side that lies in the picture is scaled first, so that mirroring the other one never makes a picture larger
    # than this one and the crop together.
    if inside.width == crop.width:
        window = resample(window, inside.height, width)
    elif inside.height == crop.height:
        window = resample(window, height, inside.width)
    if inside.height < crop.height:
        window = window[reflected(crop.y1, crop.y2, rows)]
    if inside.width < crop.width:
        window = window[:, reflected(crop.x1, crop.x2, columns)]
    return resample(window, height, width)


def uncut(refined: Tensor, crop: Box, window: Box) -> Tensor:
    """The part of a refined crop that lies on ``window``, at the picture's own size.

    Args:
        refined: [h,w,C], the whole crop at its working size.
        crop: where the crop lies on the picture, px.
        window: inside the crop, px of the picture.

    Returns:
        [window.height, window.width, C].
    """
    part = window.relative_to(crop)
    if tuple(refined.shape[:2]) == (crop.height, crop.width):
        return refined[part.y1 : part.y2, part.x1 : part.x2]
    planes = _planes(refined)
    # the side that is mirrored past the picture first: what is cut off of it is not scaled along the other one
    if crop.x1 < 0:
        planes = resampled(planes, -1, crop.width, part.x1, part.x2)
        planes = resampled(planes, -2, crop.height, part.y1, part.y2)
    else:
        planes = resampled(planes, -2, crop.height, part.y1, part.y2)
        planes = resampled(planes, -1, crop.width, part.x1, part.x2)
    return rearrange(planes, "c h w -> h w c").contiguous().clamp_(0, 1)


def paste(canvas: Tensor, refined: Tensor, crop: Box, region: Box, weights: Tensor) -> None:
    """Blends a refined crop into the canvas, in place and only inside ``region``.

    Args:
        canvas: [H,W,C] float32, written in place.
        refined: [h,w,C], the whole crop at its working size.
        crop: where the crop lies on the picture, px.
        region: the part of the crop to write, inside the picture, px.
        weights: [region.height, region.width] in 0..1; where it is 0 the canvas keeps its bits.
    """
    target = canvas[region.y1 : region.y2, region.x1 : region.x2]
    mix(target, uncut(refined, crop, region).to(target), weights.to(target))


def mix(below: Tensor, above: Tensor, weights: Tensor) -> None:
    """Lays ``above`` [h,w,C] over ``below`` [h,w,C], in place, as far as ``weights`` [h,w] say."""
    rows = max(1, MIXED_PX // max(1, below.shape[1]))
    for part, new, share in zip(below.split(rows), above.split(rows), weights.split(rows), strict=True):
        # a weight for every colour: numbers side by side are mixed several times faster than one weight for three
        part.lerp_(new, share[..., None].expand_as(part).contiguous())


def fit_into(frame: Tensor, crop: Tensor) -> None:
    """Writes a crop [h,w,C] into the middle of a frame [H,W,C], as large as its aspect allows."""
    height, width = frame.shape[:2]
    scale = min(height / crop.shape[0], width / crop.shape[1])
    rows, columns = (min(round(side * scale), room) for side, room in zip(crop.shape, (height, width), strict=False))
    top, left = (height - rows) // 2, (width - columns) // 2
    frame[top : top + rows, left : left + columns] = resample(crop, rows, columns)


def _planes(image: Tensor) -> Tensor:
    """[H,W,C] as [C,H,W]; planes are resampled faster than interleaved colours."""
    return rearrange(image, "h w c -> c h w").contiguous()
