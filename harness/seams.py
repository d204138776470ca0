"""How visible the borders of a tile grid are in a refined picture, and a made-up refinement that tests the measure.

A seam is a step across a tile's border, so the gradient there is larger than elsewhere:

    visibility of a border = 1 + (mean |gradient| across it - what it would be without tiles) / mean |gradient| off all

1 is no seam, 1.1 a border that adds a tenth of the picture's own mean gradient. "Without tiles" is a control: the same
refinement of the same picture as one single tile, which has no borders, scaled to the same gradient off the borders.

Why a control, and not the input picture? Because borders run along and through edges of the picture, which makes the
bare ratio 2 or 0.5 without any seam; and because a refinement adds detail, so that the same border's ratio in the
input picture is no fair measure either: it moves towards 1 with the added detail, which a quotient would call a seam.
Why a difference, and not the quotient of border and control? Because on a black sky, whose gradient is 0, every
quotient is infinite, also that of a ramp nobody sees.

Refinements are random, and so is the measure: the gradients of several runs are averaged, and the same measure of
further controls says how far from 1 it gets where there is no seam at all (its floor). Runs on several pictures
average out something else: where an edge of the picture runs along a border, refining it twice in the overlap makes it
softer or harder, which is no seam either, and lies elsewhere in the next picture.

Measured on the change alone (refined minus input) the picture's own gradient hides nothing; this stricter pair of
numbers is reported beside the first. Where a feather mixes the unlike detail of two tiles, both fall below 1: a mean
far below 1 is a soft band along the borders, which is a fault of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from luna_refinement.batching.plan import RefinePlan, Region
from luna_refinement.batching.weights import SharedWeights, TileWeights
from torch import Tensor

from harness.seeding import generator_for

_LINE_PX = 1
"""A border's gradient is taken at the line itself and this many px to each side."""

_GUARD_PX = 4
"""px off borders keep this distance from every border line."""


@dataclass(frozen=True)
class Border:
    """One line across which two tiles meet, or one tile ends on the other: gradients between px ``at - 1`` and ``at``.

    Attributes:
        axis: 0 for a horizontal border (the gradient runs down the picture), 1 for a vertical one.
        at: px along that axis.
        start, stop: px along the other axis.
    """

    axis: int
    at: int
    start: int
    stop: int


@dataclass(frozen=True)
class Seams:
    """Visibility of the borders of a grid, 1 = none.

    Attributes:
        mean: of all px on borders together.
        worst: of the single worst border.
        change_mean, change_worst: the same for refined minus input.
    """

    mean: float
    worst: float
    change_mean: float
    change_worst: float


def borders(plan: RefinePlan) -> list[Border]:
    """The lines where a tile's paste weight begins, is steepest and is full, on each side that lies in the picture.

    Without a feather the three are one. Sides of neighbouring tiles that continue each other stay separate borders:
    a seam between two tiles must not be averaged away by the rest of the row.
    """
    return list(dict.fromkeys(border for region in plan.regions for border in _sides(region, plan.width, plan.height)))


def measure_seams(image: Tensor, refined: Tensor, control: Tensor, plan: RefinePlan) -> Seams:
    """Measures the borders of a plan.

    Args:
        image: the input of all runs [H,W,C], or that of each [R,H,W,C].
        refined: [R,H,W,C], results of R runs that differ in their noise, or also in their picture.
        control: [R,H,W,C], the same as one tile each.
        plan: of the tiles.
    """
    lines = borders(plan)
    before, after, whole = image.double(), refined.double(), control.double()
    mean, worst = _visibility(after, whole, lines)
    change_mean, change_worst = _visibility(after - before, whole - before, lines)
    return Seams(mean, worst, change_mean, change_worst)


def _sides(region: Region, width: int, height: int) -> Iterator[Border]:
    weights = region.weights.own if isinstance(region.weights, SharedWeights) else region.weights
    assert isinstance(weights, TileWeights)
    tile, (left, top, right, bottom) = weights.tile, weights.fade_px
    for axis, limit, first, last, fade_in, fade_out in (
        (1, width, tile.x1, tile.x2, left, right),
        (0, height, tile.y1, tile.y2, top, bottom),
    ):
        span = (tile.y1, min(tile.y2, height)) if axis else (tile.x1, min(tile.x2, width))
        for edge, inward in ((first, fade_in), (last, -fade_out)):
            if 0 < edge < limit:
                for at in sorted({edge, edge + round(inward / 2), edge + inward}):
                    yield Border(axis, at, *span)


def _visibility(refined: Tensor, control: Tensor, lines: list[Border]) -> tuple[float, float]:
    """Of all borders together, weighted by length, and of the worst."""
    excess, lengths = [], []
    off_sum = off_count = 0.0
    for axis in (0, 1):
        mine = [line for line in lines if line.axis == axis]
        found, wanted = _gradient(refined, axis), _gradient(control, axis)
        off = _off_borders(found.shape[axis], mine)
        away, away_control = (gradient.movedim(axis, 0)[off].mean() for gradient in (found, wanted))
        off_sum, off_count = off_sum + float(away), off_count + 1
        difference = found - wanted * (away / away_control)
        excess += [float(_across(difference, line).mean()) for line in mine]
        lengths += [line.stop - line.start for line in mine]
    scale = off_sum / off_count
    mean = sum(value * length for value, length in zip(excess, lengths, strict=True)) / sum(lengths)
    return 1 + mean / scale, 1 + max(excess) / scale


def _gradient(pictures: Tensor, axis: int) -> Tensor:
    """|difference| to the px before, mean over runs and channels: [H,W], 0 in the first row or column."""
    steps = pictures.diff(dim=axis + 1).abs().mean(dim=(0, -1))
    return F.pad(steps, (1, 0, 0, 0) if axis else (0, 0, 1, 0))


def _off_borders(length: int, lines: list[Border]) -> Tensor:
    """[length] bool: which px along an axis are off all borders."""
    off = torch.ones(length, dtype=torch.bool)
    off[0] = False
    for line in lines:
        off[max(0, line.at - _GUARD_PX) : line.at + _GUARD_PX + 1] = False
    return off


def _across(gradient: Tensor, line: Border) -> Tensor:
    on = slice(max(1, line.at - _LINE_PX), line.at + _LINE_PX + 1)
    return gradient.movedim(line.axis, 0)[on, line.start : line.stop]


def disturbance(seed: str, shift: float = 0.03) -> Callable[[int, Tensor], Tensor]:
    """What a diffusion model does to a tile, made up: each row gets its own white balance, clouds and fine detail.

    For ``ExactEngine``, whose latents are the px themselves. The finest detail (of 2x2 px blocks) is replaced, not
    added to: what is refined twice in an overlap has no more of it than what is refined once, as with a real model.
    Nothing makes neighbours agree, which is the hardest case for the paste.

    Args:
        seed: names the noise.
        shift: deviation of each row's colours, as a share of themselves; of clouds half, as a share of the range 0..1.
    """

    def change(row: int, latent: Tensor) -> Tensor:
        generator = generator_for("disturbance", seed, row)
        picture = F.pixel_shuffle(latent, 8)[None]
        size = picture.shape[-2:]
        balance = 1 + torch.randn(1, 3, 1, 1, generator=generator) * shift
        clouds = F.interpolate(torch.randn(1, 3, 4, 4, generator=generator) * shift / 2, size=size, mode="bicubic")
        base = _blocks(picture)
        grain = torch.randn(1, 3, *size, generator=generator)
        contrast = _blur((base - _blur(base)).abs())
        refined = base * balance + clouds * base.mean() + (grain - _blocks(grain)) * contrast
        return F.pixel_unshuffle(refined, 8)[0]

    return change


def _blocks(picture: Tensor) -> Tensor:
    """Every 2x2 px block at its mean."""
    return F.interpolate(F.avg_pool2d(picture, 2), scale_factor=2, mode="nearest")


def _blur(picture: Tensor) -> Tensor:
    return F.avg_pool2d(picture, 9, stride=1, padding=4, count_include_pad=False)
