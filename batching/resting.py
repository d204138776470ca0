"""What a run leaves as it is: rows that are not sampled, and px that sampling does not reach, keep their bits.

An encoded and decoded px is not the px it was, so what is not sampled is not pasted either.
"""

from collections.abc import Container
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter
from torch import Tensor

from ..picture.boxes import Box
from .plan import RefinePlan
from .weights import PasteWeights


def without_rows(plan: RefinePlan, rows: Container[int]) -> RefinePlan:
    """The plan with ``rows`` in no pass: they keep their numbers and crops, and nothing happens to them."""
    passes = (tuple(row for row in turn if row not in rows) for turn in plan.passes)
    return replace(plan, passes=tuple(turn for turn in passes if turn))


@dataclass(frozen=True, eq=False)
class ScaledWeights:
    """Paste weights times a map over the picture.

    Attributes:
        weights: of the region.
        scale: [H,W] in 0..1, for the whole picture.
    """

    weights: PasteWeights
    scale: Tensor

    def draw(self, window: Box) -> Tensor:
        height, width = self.scale.shape
        inside = window.intersect(Box(0, 0, width, height))
        if inside.is_empty:
            return torch.zeros(window.height, window.width)
        part = self.scale[inside.y1 : inside.y2, inside.x1 : inside.x2]
        # nothing is pasted beyond the picture
        beyond = (inside.x1 - window.x1, window.x2 - inside.x2, inside.y1 - window.y1, window.y2 - inside.y2)
        return self.weights.draw(window) * F.pad(part, beyond)


def without_px(plan: RefinePlan, share: Tensor, least: float, cell: int) -> RefinePlan:
    """The plan with nothing pasted where a px takes part in too little of the schedule to be sampled at all.

    Args:
        plan: of any refiner.
        share: [1 or B,H,W] in 0..1, the share of the denoise each px of the picture gets.
        least: the smallest share that is sampled.
        cell: px of the picture per latent px.
    """
    scale = _pasted(share, least, cell)
    if bool((scale == 1).all()):
        return plan
    regions = tuple(
        replace(region, weights=ScaledWeights(region.weights, region.of_picture(scale))) for region in plan.regions
    )
    idle = {region.row for region in regions if not bool(region.weights.draw(region.paste).any())}
    return without_rows(replace(plan, regions=regions), idle)


def _pasted(share: Tensor, least: float, cell: int) -> Tensor:
    """[1 or B,H,W]: 0 where a px or a neighbour within a latent px is not sampled, rising to 1 over another one.

    A latent px is sampled or not as a whole, and holds ``cell`` px: next to what is left alone it mixes both.
    """
    size, reach = 2 * cell + 1, cell
    left = ((share < least) | (share == 0)).cpu().numpy()
    # several times faster than max_pool2d, whose cost grows with the size
    grown = maximum_filter(left.astype(np.uint8), size=(1, size, size), mode="nearest")
    skipped = torch.from_numpy(grown).to(share.device, torch.float32)[:, None]
    near = skipped
    for kernel, padding in (((size, 1), (reach, 0)), ((1, size), (0, reach))):
        near = F.avg_pool2d(near, kernel, stride=1, padding=padding, count_include_pad=False)
    return torch.where(skipped > 0, 0, (1 - 2 * near).clamp(0, 1))[:, 0]
