"""The one rasteriser: what a mask or a box covers of each px, for previews, mask outputs and paste weights alike."""

import math

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .boxes import Box, BoxPx, outward_px
from .detections import Detection, Detections

BLOCK_PX = 2**16
"""px of a mask that are read at a time: few enough to stay in the processor's cache."""

Array = np.ndarray


def rasterise(box: BoxPx, mask: Tensor | None, window: Box) -> Tensor:
    """Draws a mask, or a whole box, over a window of its picture.

    Each px reads the mask through a triangle as wide as the px or the mask's own texel, whichever is wider, so masks
    finer and coarser than the picture are both resampled without shift. At its own resolution a mask is unchanged.
    A px comes out the same, to the bit, whatever window it is drawn in.

    Args:
        box: the px of the picture that the mask spans.
        mask: [h,w] in 0..1 at any resolution; None for the whole box.
        window: where to draw.

    Returns:
        [window.height, window.width] float32 in 0..1, zero outside the box; a px the box covers in part gets its share.
    """
    drawn = torch.zeros(window.height, window.width)
    inside = Box.around(box).intersect(window)
    if inside.is_empty:
        return drawn
    x1, y1, x2, y2 = inside.relative_to(window)
    part = drawn[y1:y2, x1:x2].numpy()
    part[:] = _covered(box[1], box[3], inside.y1, inside.y2)[:, None]
    part *= _covered(box[0], box[2], inside.x1, inside.x2)
    if mask is not None:
        rows, top = _readers(box[1], box[3], mask.shape[0], inside.y1, inside.y2)
        columns, left = _readers(box[0], box[2], mask.shape[1], inside.x1, inside.x2)
        read = mask[top : top + rows.shape[1], left : left + columns.shape[1]]
        texels = np.ascontiguousarray(read.detach().to(device="cpu", dtype=torch.float32).numpy())
        step = max(1, BLOCK_PX // max(texels.shape[1], part.shape[1]))
        for first in range(0, len(part), step):
            block = slice(first, first + step)
            part[block] *= (columns @ (rows[block] @ texels).T).T.clip(0, 1)
    return drawn


def union_masks(detections: Detections) -> Tensor:
    """What all detections of each picture cover together: [B,H,W] float32 in 0..1."""
    masks = torch.zeros(detections.image_count, detections.height, detections.width)
    for item in detections:
        _add(masks[item.image_index], item)
    return masks


def single_masks(detections: Detections) -> Tensor:
    """What each detection covers: [N,H,W] float32 in 0..1, in order."""
    masks = torch.zeros(len(detections), detections.height, detections.width)
    for mask, item in zip(masks, detections, strict=True):
        _add(mask, item)
    return masks


def _add(canvas: Tensor, item: Detection) -> None:
    """Draws one detection over a mask [H,W] in place; the larger value stays where others are."""
    window = outward_px(item.box, canvas.shape[1], canvas.shape[0])
    part = canvas[window.y1 : window.y2, window.x1 : window.x2]
    torch.maximum(part, rasterise(item.box, item.mask, window), out=part)


def _covered(start: float, stop: float, first: int, last: int) -> Array:
    """[last-first] float32: the share of each px ``first..last-1`` inside the span."""
    px = np.arange(first, last, dtype=np.float64)
    return (np.minimum(px + 1, stop) - np.maximum(px, start)).clip(0, 1).astype(np.float32)


def _readers(start: float, stop: float, texels: int, first: int, last: int) -> tuple[sparse.csr_array, int]:
    """How px ``first..last-1`` read the texels that span ``start..stop``, and the first texel that is read.

    Returns:
        [last-first, texels read] float32, rows that add up to 1, and the place of the first column.
    """
    per_px = texels / (stop - start)
    reach = max(1.0, per_px)
    centres = ((np.arange(first, last) + 0.5 - start) * per_px - 0.5).clip(0, texels - 1)
    taps = np.floor(centres - reach).astype(np.int64)[:, None] + np.arange(1, math.ceil(2 * reach) + 1)
    shares = (1 - np.abs(centres[:, None] - taps) / reach).clip(min=0) * ((taps >= 0) & (taps < texels))
    shares = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    px, tap = np.nonzero(shares)
    read = taps[px, tap]
    low = int(read.min())
    return sparse.csr_array((shares[px, tap], (px, read - low)), shape=(last - first, int(read.max()) + 1 - low)), low
