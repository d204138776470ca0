"""How strongly a refined crop is pasted at each px: masks and tiles with smoothstep edges."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..picture.boxes import Box, BoxPx
from ..picture.masks import rasterise

WIDEST_SUM = 129
"""Taps up to which a feather is summed up by products; wider ones are faster, and as exact, by running sums."""

BAND = 32
"""px of a feather that are summed up at a time."""


def smoothstep(t: Tensor) -> Tensor:
    """Hermite step 3t² - 2t³ of ``t`` clamped to 0..1."""
    t = t.clamp(0, 1)
    return t * t * (3 - 2 * t)


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

    target: BoxPx
    mask: Tensor | None
    feather_px: int
    outward_px: int
    width: int
    height: int

    def draw(self, window: Box) -> Tensor:
        if self.feather_px <= 0:
            return rasterise(self.target, self.mask, window)
        kernel = _parabola(self.feather_px)
        shift = math.floor(self.outward_px - self.feather_px / 2)  # never further out than asked
        wide = window.grown(abs(shift) + len(kernel) // 2)
        # px past the picture, which a window may hold alone, are those at its border
        columns = torch.arange(wide.x1, wide.x2).clamp(0, self.width - 1)
        rows = torch.arange(wide.y1, wide.y2).clamp(0, self.height - 1)
        x1, x2, y1, y2 = (int(at) for at in (columns[0], columns[-1], rows[0], rows[-1]))
        drawn = rasterise(self.target, self.mask, Box(x1, y1, x2 + 1, y2 + 1))
        if len(rows) > len(drawn):
            drawn = drawn.index_select(0, rows - y1)
        if len(columns) > drawn.shape[1]:
            drawn = drawn.index_select(1, columns - x1)
        for dim in (-1, -2):
            drawn = _shift_edge(drawn, shift, dim)
        for dim in (-1, -2):
            drawn = _convolve(drawn, kernel, dim)
        return drawn.clamp(0, 1)


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


def _shift_edge(drawn: Tensor, px: int, dim: int) -> Tensor:
    """Grows (px > 0) or shrinks (px < 0) a soft mask [h,w] along one dimension, which loses ``abs(px)`` at each end.

    Grey values stay what they are: each px becomes the largest or smallest of its neighbours.
    """
    if px < 0:
        return -_running_max(-drawn, -px, dim)
    return _running_max(drawn, px, dim)


def _running_max(x: Tensor, radius: int, dim: int) -> Tensor:
    """Maximum over ``2*radius+1`` neighbours along one dimension, by doubling: log2(radius) passes."""
    reach, size = 1, 2 * radius + 1
    while reach < size:
        step = min(reach, size - reach)
        left = x.shape[dim] - step
        x = torch.maximum(x.narrow(dim, 0, left), x.narrow(dim, step, left))
        reach += step
    return x


def _parabola(width_px: int) -> Tensor:
    """The kernel of a feather: [taps] float32 with a sum of 1, ``width_px`` wide.

    Smoothstep's derivative is the parabola 6t(1-t), so a straight hard edge becomes exactly a smoothstep, and soft
    masks stay proportional instead of being thresholded.
    """
    half = width_px / 2
    taps = torch.arange(-math.floor(half), math.floor(half) + 1, dtype=torch.float32)
    kernel = (1 - (taps / (half + 0.5)) ** 2).clamp(min=0)
    return kernel / kernel.sum()


def _convolve(drawn: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Convolves [h,w] with a parabola along one dimension, which loses half of the kernel at each end."""
    if len(kernel) > WIDEST_SUM:
        lines = drawn.movedim(dim, -1)
        per_block = max(1, 2**18 // lines.shape[-1])
        return torch.cat([_moments(block, kernel) for block in lines.split(per_block)]).movedim(-1, dim)
    # Every 32 px are one product with the px they read, several times faster than conv2d, made for many channels.
    reach, size = len(kernel) - 1, drawn.shape[dim] - len(kernel) + 1
    band = F.pad(kernel, (0, BAND)).repeat(BAND)[: BAND * (BAND + reach)].unflatten(0, (BAND, -1))  # shifted row by row
    lines = drawn if dim == -2 else drawn.T
    whole = size - size % BAND
    parts = []
    if whole:
        read = lines[: whole + reach].unfold(0, BAND + reach, BAND).mT  # [bands,BAND+reach,other side], a view
        parts.append((band.expand(len(read), -1, -1) @ read).flatten(0, 1))
    if whole < size:
        parts.append(band[: size - whole, : size - whole + reach] @ lines[whole:])
    convolved = torch.cat(parts)
    return convolved if dim == -2 else convolved.T


def _moments(lines: Tensor, kernel: Tensor) -> Tensor:
    """Convolves [n,l] with a parabola of any width in the same time: [n, l - len(kernel) + 1].

    A parabola over a window is made of the window's sum, and its sums weighted by place and by place squared, which
    are differences of running sums. In float64, and exactly 0 where the window holds only zeros.
    """
    taps, size = len(kernel), lines.shape[-1] - len(kernel) + 1
    places = torch.arange(lines.shape[-1], dtype=torch.float64) - lines.shape[-1] / 2
    centres = places[taps // 2 : taps // 2 + size]

    def window_sum(values: Tensor) -> Tensor:
        sums = F.pad(values.cumsum(-1), (1, 0))
        return sums[..., taps:] - sums[..., :size]

    plain = window_sum(lines.double())
    first, second = window_sum(lines * places), window_sum(lines * places.square())
    spread = second - 2 * centres * first + centres.square() * plain  # the sum weighted by (distance to the centre)²
    top = float(kernel[taps // 2])
    bend = (top - float(kernel[0])) / (taps // 2) ** 2
    return (top * plain - bend * spread).float()
