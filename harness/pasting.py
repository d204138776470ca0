"""What a plan must make of a picture, worked out apart from the pack in float64: resampling, weights, pastes."""

import numpy as np
import torch
from luna_refinement.batching.plan import RefinePlan, Region
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def bicubic_matrix(size: int, into: int) -> Array:
    """[into,size]: Keys' cubic (a = -0.5) over ``size`` samples, as wide as a sample of the coarser side.

    A value of the result is the mean of the samples weighted by the cubic at their distance; beyond the ends there
    are no samples.
    """
    scale = size / into
    reach = max(1.0, scale)
    centres = (np.arange(into) + 0.5) * scale
    distance = np.abs(np.arange(size)[None] + 0.5 - centres[:, None]) / reach
    cubic = np.where(
        distance < 1,
        1.5 * distance**3 - 2.5 * distance**2 + 1,
        np.where(distance < 2, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2, 0),
    )
    return np.asarray(cubic / cubic.sum(1, keepdims=True))


def resampled(picture: Array, height: int, width: int) -> Array:
    """[H,W,C] at another size, clipped to 0..1."""
    if picture.shape[:2] == (height, width):
        return picture
    rows = np.tensordot(bicubic_matrix(picture.shape[0], height), picture, (1, 0))
    both = np.tensordot(bicubic_matrix(picture.shape[1], width), rows, (1, 1)).swapaxes(0, 1)
    return np.asarray(both.clip(0, 1))


def smoothstep(t: Array) -> Array:
    t = t.clip(0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def fade(start: int, stop: int, fade_in: int, fade_out: int, limit: int) -> Array:
    """[limit]: a tile's own weight along one side of the picture."""
    centres = np.arange(limit) + 0.5
    rising = smoothstep((centres - start) / fade_in) if fade_in else np.ones(limit)
    falling = smoothstep((stop - centres) / fade_out) if fade_out else np.ones(limit)
    return np.where((centres > start) & (centres < stop), np.minimum(rising, falling), 0)


def pasted(image: Tensor, refined: dict[int, Tensor], weights: dict[int, Array], plan: RefinePlan) -> Array:
    """[H,W,3] of one picture after every paste of a plan: w·new + (1 - w)·old at every px, one region after another.

    Args:
        image: [1,H,W,3].
        refined: each row's refined crop [h,w,3].
        weights: each row's weight over the whole picture [H,W].
        plan: in whose order is pasted: pass by pass, the lowest score first, equal ones by row.
    """
    canvas = image[0].double().numpy().copy()
    for rows in plan.passes:
        for row in sorted(rows, key=lambda row: (plan.regions[row].score, row)):
            share = weights[row][..., None]
            canvas = share * laid_out(refined[row], plan.regions[row], canvas.shape) + (1 - share) * canvas
    return canvas


def laid_out(refined: Tensor, region: Region, shape: tuple[int, ...]) -> Array:
    """The refined crop at its place on an otherwise black picture."""
    crop = region.crop
    full = resampled(refined.double().numpy(), crop.height, crop.width)
    top, left, bottom, right = max(0, crop.y1), max(0, crop.x1), min(shape[0], crop.y2), min(shape[1], crop.x2)
    laid = np.zeros(shape)
    laid[top:bottom, left:right] = full[top - crop.y1 : bottom - crop.y1, left - crop.x1 : right - crop.x1]
    return laid


def mask_weights(mask: Tensor, feather_px: int, outward_px: int) -> Array:
    """[H,W]: a mask over the whole picture, its edge moved out and softened, with the picture going on past its ends.

    The edge moves by the largest (or smallest) of the neighbours, and is softened by a parabola: written as loops over
    shifts of the padded picture.
    """
    wide = np.pad(mask.double().numpy(), feather_px + 1, mode="edge")
    shift = int(np.floor(outward_px - feather_px / 2))
    half = feather_px / 2
    taps = np.arange(-int(half), int(half) + 1)
    kernel = np.clip(1 - (taps / (half + 0.5)) ** 2, 0, None)
    kernel /= kernel.sum()
    for axis in (0, 1):
        moved = [np.roll(wide, step, axis) for step in range(-abs(shift), abs(shift) + 1)]
        wide = np.maximum.reduce(moved) if shift >= 0 else np.minimum.reduce(moved)
    for axis in (0, 1):
        wide = np.sum([share * np.roll(wide, int(tap), axis) for share, tap in zip(kernel, taps, strict=True)], axis=0)
    inner = slice(feather_px + 1, -(feather_px + 1))
    return np.asarray(wide[inner, inner].clip(0, 1))


def noise_crop(region: Region, seed: int) -> Tensor:
    """A refined crop [h,w,3] that no two rows share."""
    generator = torch.Generator().manual_seed(1000 * seed + region.row)
    return torch.rand(*region.working_size, 3, generator=generator)


def multiband(background: Array, foreground: Array, weights: Array, bands: int) -> Array:
    """[H,W,3]: a Laplacian pyramid of each picture, mixed band by band by the weights at the band's own size."""
    if bands == 0:
        return np.asarray(weights[..., None] * foreground + (1 - weights[..., None]) * background)
    size = [(side + 1) // 2 for side in weights.shape]
    smaller = [_triangle(picture, size) for picture in (background, foreground, weights[..., None])]
    detail_back = background - _linear(smaller[0], weights.shape)
    detail_fore = foreground - _linear(smaller[1], weights.shape)
    below = multiband(smaller[0], smaller[1], smaller[2][..., 0], bands - 1)
    share = weights[..., None]
    return np.asarray(share * detail_fore + (1 - share) * detail_back + _linear(below, weights.shape))


def _triangle(picture: Array, size: list[int]) -> Array:
    """Smaller: each px is the mean of the px below it, weighted by a triangle twice as wide as itself."""
    for axis, into in enumerate(size):
        scale = picture.shape[axis] / into
        centres = (np.arange(into) + 0.5) * scale
        matrix = np.clip(1 - np.abs(np.arange(picture.shape[axis])[None] + 0.5 - centres[:, None]) / scale, 0, None)
        picture = np.moveaxis(np.tensordot(matrix / matrix.sum(1, keepdims=True), picture, (1, axis)), 0, axis)
    return picture


def _linear(picture: Array, size: tuple[int, ...]) -> Array:
    """Larger: straight lines between the centres of px, level beyond the first and the last."""
    for axis, into in enumerate(size):
        count = picture.shape[axis]
        places = (np.arange(into) + 0.5) * count / into - 0.5
        hats = np.stack([np.interp(places, np.arange(count), np.eye(count)[k]) for k in range(count)], axis=1)
        picture = np.moveaxis(np.tensordot(hats, picture, (1, axis)), 0, axis)
    return picture
