"""How refined crops go back onto the picture: colours matched, blended by their weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..picture.boxes import Box
from .blend import Blend, multiband
from .color import ColorMatch, match_color
from .crops import WINDOW_PX, cut, mix, paste, uncut
from .plan import Region


@dataclass(frozen=True)
class PasteSettings:
    """How refined crops go back onto the picture.

    Attributes:
        blend: a weighted paste, or a multiband blend inside the same region.
        color_match: how colours are taken back to those of the input picture.
    """

    blend: Blend = "feather"
    color_match: ColorMatch = "none"


FEATHERED = PasteSettings()
"""Refined crops as they are, with soft edges."""


def paste_back(
    canvas: Tensor, reference: Tensor, mask: Tensor | None, picture: Tensor, region: Region, settings: PasteSettings
) -> None:
    """Pastes one refined crop onto its image [H,W,3], and what was pasted where onto its mask [H,W].

    ``reference`` is the input picture, so that colours do not drift from pass to pass.
    """
    if settings.color_match != "none":
        before = cut(reference.to(torch.float32), region.crop, *region.working_size)
        weights = region.weights_over_crop(*region.working_size).to(canvas.device)
        picture = match_color(picture, before, weights, settings.color_match)
    # a multiband blend reaches from one end of the region to the other, a feather takes any part for itself
    windows = [region.paste] if settings.blend == "multiband" else region.paste.strips(WINDOW_PX)
    for window in windows:
        weights = region.weights.draw(window).to(canvas.device)
        if settings.blend == "multiband":
            below = canvas[window.y1 : window.y2, window.x1 : window.x2]
            blended = multiband(below, uncut(picture, region.crop, window), weights)
            # the coarse bands reach past the mask: they fade out where the paste weight does
            mix(below, blended, (4 * weights).clamp(max=1))
        else:
            paste(canvas, picture, region.crop, window, weights)
        if mask is not None:
            _mark(mask, window, weights)


def _mark(mask: Tensor, window: Box, weights: Tensor) -> None:
    """Adds a paste to the refined mask [H,W] the way pastes add up: what is left over of 1 shrinks by each weight."""
    part = mask[window.y1 : window.y2, window.x1 : window.x2]
    part.add_((1 - part) * weights)
