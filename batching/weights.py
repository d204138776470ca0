"""How strongly a refined crop is pasted at each px: masks drawn over the picture, and smoothstep feathers."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Box


def smoothstep(t: Tensor) -> Tensor:
    """Hermite step 3t² - 2t³ of ``t`` clamped to 0..1."""
    t = t.clamp(0, 1)
    return t * t * (3 - 2 * t)


def span_coverage(start: float, stop: float, first: int, last: int) -> Tensor:
    """How much of each px ``first..last-1`` lies in the span ``start..stop``: [last-first] in 0..1."""
    left = torch.arange(first, last, dtype=torch.float32)
    return ((left + 1).clamp(max=stop) - left.clamp(min=start)).clamp(0, 1)


def draw_mask(target: tuple[float, float, float, float], mask: Tensor | None, window: Box) -> Tensor:
    """Draws a region's mask over a window of the picture, antialiased.

    Args:
        target: the box the mask spans, xyxy px of the picture.
        mask: [h,w] in 0..1 at any resolution, or None for the whole box.
        window: where to draw.

    Returns:
        [window.height, window.width] float32 in 0..1, zero outside ``target``.
    """
    x1, y1, x2, y2 = target
    columns = span_coverage(x1, x2, window.x1, window.x2)
    rows = span_coverage(y1, y2, window.y1, window.y2)
    box = rows[:, None] * columns[None, :]
    if mask is None:
        return box
    source = mask.to(device="cpu", dtype=torch.float32)[None, None]
    # grid_sample reads single texels, so a mask finer than the picture is first averaged down to it
    size = (min(mask.shape[0], max(1, round(y2 - y1))), min(mask.shape[1], max(1, round(x2 - x1))))
    if size != tuple(mask.shape):
        source = F.interpolate(source, size=size, mode="bilinear", antialias=True)
    xs = (torch.arange(window.x1, window.x2) + 0.5 - x1) / (x2 - x1) * 2 - 1
    ys = (torch.arange(window.y1, window.y2) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(xs[None, :], ys[:, None]), dim=-1)[None]
    drawn = F.grid_sample(source, grid.float(), mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    return drawn.clamp(0, 1) * box


class PasteWeights(Protocol):
    """The paste weight of one region over the picture."""

    def draw(self, window: Box) -> Tensor:
        """[window.height, window.width] float32 in 0..1."""
        ...


@dataclass(frozen=True)
class MaskWeights:
    """A mask with a smoothstep edge.

    The edge is ``feather_px`` wide and reaches ``outward_px`` past the mask, the rest lies inside it, so that it
    always ends within the crop. At the picture's border the mask goes on and gets no edge.

    Attributes:
        target: the box the mask spans, xyxy px.
        mask: [h,w] in 0..1, or None for the whole box.
        feather_px: width of the edge.
        outward_px: how far the edge reaches out, 0..feather_px.
        width, height: picture size, px.
    """

    target: tuple[float, float, float, float]
    mask: Tensor | None
    feather_px: int
    outward_px: int
    width: int
    height: int

    def draw(self, window: Box) -> Tensor:
        if self.feather_px <= 0:
            return draw_mask(self.target, self.mask, window)
        reach = self.feather_px + 1
        wide = window.grown(reach)
        inside = wide.intersect(Box(0, 0, self.width, self.height))
        drawn = draw_mask(self.target, self.mask, inside)[None, None]
        edges = (inside.x1 - wide.x1, wide.x2 - inside.x2, inside.y1 - wide.y1, wide.y2 - inside.y2)
        drawn = F.pad(drawn, edges, mode="replicate")
        drawn = _shift_edge(drawn, self.outward_px - self.feather_px / 2)
        drawn = _soften(drawn, self.feather_px)
        return drawn[0, 0, reach:-reach, reach:-reach].clamp(0, 1)


@dataclass(frozen=True)
class TileWeights:
    """A rectangle whose edges fade by smoothstep, for the tiles of a grid.

    Attributes:
        tile: the tile, px.
        fade_px: width of the fade at the left, top, right and bottom edge; 0 at the picture's border.
    """

    tile: Box
    fade_px: tuple[int, int, int, int]

    def draw(self, window: Box) -> Tensor:
        left, top, right, bottom = self.fade_px
        columns = _fade(self.tile.x1, self.tile.x2, left, right, window.x1, window.x2)
        rows = _fade(self.tile.y1, self.tile.y2, top, bottom, window.y1, window.y2)
        return rows[:, None] * columns[None, :]


@dataclass(frozen=True)
class SharedWeights:
    """A tile's weights where tiles of the same pass overlap: together they add up to 1, never to more.

    Tiles are pasted one over the other, so a tile's own share s becomes s / (1 - shares of the tiles pasted later).

    Attributes:
        own: this tile.
        earlier, later: tiles of the same pass that overlap it, pasted before and after it.
    """

    own: TileWeights
    earlier: tuple[TileWeights, ...]
    later: tuple[TileWeights, ...]

    def draw(self, window: Box) -> Tensor:
        weights = self.own.draw(window)
        if not self.earlier and not self.later:
            return weights
        later = torch.zeros_like(weights)
        for tile in self.later:
            later += tile.draw(window)
        total = weights + later
        for tile in self.earlier:
            total += tile.draw(window)
        total.clamp_(min=1)
        left = 1 - later.div_(total)
        weights.div_(total).div_(left.clamp(min=1e-6))
        return weights.masked_fill_(left <= 0, 0).clamp_(0, 1)


def _fade(start: int, stop: int, fade_in: int, fade_out: int, first: int, last: int) -> Tensor:
    centres = torch.arange(first, last, dtype=torch.float32) + 0.5
    inside = ((centres > start) & (centres < stop)).float()
    rising = smoothstep((centres - start) / fade_in) if fade_in else torch.ones_like(centres)
    falling = smoothstep((stop - centres) / fade_out) if fade_out else torch.ones_like(centres)
    return inside * torch.minimum(rising, falling)


def _shift_edge(drawn: Tensor, offset: float) -> Tensor:
    """Grows (offset > 0) or shrinks (offset < 0) a soft mask [1,1,h,w] by whole px; grey values stay what they are."""
    px = math.floor(offset)  # never further out than asked
    if px == 0:
        return drawn
    signed = drawn if px > 0 else -drawn
    for dim in (-1, -2):
        signed = _running_max(signed, abs(px), dim)
    return signed if px > 0 else -signed


def _running_max(x: Tensor, radius: int, dim: int) -> Tensor:
    """Maximum over ``2*radius+1`` neighbours along one dimension of [1,1,h,w], by doubling: log2(radius) passes."""
    x = _repeat_edge(x, radius, dim)
    reach, size = 1, 2 * radius + 1
    while reach < size:
        step = min(reach, size - reach)
        left = x.shape[dim] - step
        x = torch.maximum(x.narrow(dim, 0, left), x.narrow(dim, step, left))
        reach += step
    return x


def _soften(drawn: Tensor, feather_px: int) -> Tensor:
    """Blurs [1,1,h,w] with a separable parabola ``feather_px`` wide.

    Smoothstep's derivative is the parabola 6t(1-t), so a straight hard edge becomes exactly a smoothstep, and soft
    masks stay proportional instead of being thresholded.
    """
    half = feather_px / 2
    taps = torch.arange(-math.floor(half), math.floor(half) + 1, dtype=torch.float32)
    kernel = (1 - (taps / (half + 0.5)) ** 2).clamp(min=0)
    kernel = kernel / kernel.sum()
    for dim in (-1, -2):
        drawn = _convolve(drawn, kernel.tolist(), dim)
    return drawn


def _convolve(drawn: Tensor, kernel: list[float], dim: int) -> Tensor:
    """Convolves [1,1,h,w] along one dimension; several times faster than conv2d, which is made for many channels."""
    radius, size = len(kernel) // 2, drawn.shape[dim]
    wide = _repeat_edge(drawn, radius, dim)
    convolved = torch.zeros_like(drawn)
    for shift, share in enumerate(kernel):
        convolved.add_(wide.narrow(dim, shift, size), alpha=share)
    return convolved


def _repeat_edge(x: Tensor, radius: int, dim: int) -> Tensor:
    return F.pad(x, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="replicate")
