"""Multiband blending: coarse bands of a crop melt in over a wide edge, fine detail over a narrow one."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Blend = Literal["feather", "multiband"]
BLENDS: tuple[Blend, ...] = get_args(Blend)

MOST_BANDS = 6


def multiband(background: Tensor, foreground: Tensor, weights: Tensor) -> Tensor:
    """Blends two pictures band by band of a Laplacian pyramid (Burt & Adelson 1983).

    Args:
        background, foreground: [H,W,3] in 0..1.
        weights: [H,W] in 0..1, share of the foreground.

    Returns:
        [H,W,3] in 0..1. Where the weight is 0 the caller keeps the background itself: the blend of the coarse
        bands reaches past the mask's edge.
    """
    blended = background.new_empty(
        3, *weights.shape
    )  # one colour after the other: a pyramid takes several times its picture
    for colour, back, fore in zip(blended, background.unbind(-1), foreground.unbind(-1), strict=True):
        colour.copy_(_blend_plane(back, fore, weights))
    return blended.movedim(0, -1)


def _blend_plane(background: Tensor, foreground: Tensor, weights: Tensor) -> Tensor:
    """[H,W] in 0..1, of one colour."""
    bands = min(MOST_BANDS, max(1, min(weights.shape).bit_length() - 3))
    back, fore, share = (plane[None, None].float() for plane in (background, foreground, weights))
    blended: list[Tensor] = []
    for _ in range(bands):
        smaller_back, smaller_fore, smaller_share = _halve(back), _halve(fore), _halve(share)
        band_back, band_fore = back - _grow(smaller_back, back), fore - _grow(smaller_fore, fore)
        blended.append(torch.lerp(band_back, band_fore, share))
        back, fore, share = smaller_back, smaller_fore, smaller_share
    picture = torch.lerp(back, fore, share)
    for band in reversed(blended):
        picture = band + _grow(picture, band)
    return picture[0, 0].clamp(0, 1)


def _halve(planes: Tensor) -> Tensor:
    size = (max(1, (planes.shape[-2] + 1) // 2), max(1, (planes.shape[-1] + 1) // 2))
    return F.interpolate(planes, size=size, mode="bilinear", antialias=True, align_corners=False)


def _grow(planes: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(planes, size=like.shape[-2:], mode="bilinear", align_corners=False)
