"""Whole-picture guidance cut to a row's crop: areas, masks, hints, boxes, latents and attention masks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LunaInputError
from .crops import cut
from .plan import Region
from .planes import cut_planes

AREA_PX = 8
"""px of the picture per unit of an area or GLIGEN box: ComfyUI's nodes divide px by it."""

_FUZZ = 8
"""Latent px over which an area fades at its edges, as in ComfyUI's own sampler."""


class PictureGuidance:
    """Cuts what belongs to the whole picture to the rows of a batch; remembers what it scaled to the picture's size.

    Args:
        width, height, image_count: of the picture batch.
        cell: px of a crop per latent px.
        has_frames: latents have a dimension for frames, of which there is one.
    """

    def __init__(self, width: int, height: int, image_count: int, cell: int, has_frames: bool = False) -> None:
        self.width = width
        self.height = height
        self.image_count = image_count
        self.cell = cell
        self.has_frames = has_frames
        self._scaled: dict[int, tuple[Tensor, Tensor]] = {}
        self._even: dict[int, tuple[Tensor, bool]] = {}

    def check_batch(self, given: Tensor, name: str) -> None:
        """Raises LunaInputError where planes [H,W] or [k,...,H,W] are neither for all pictures nor one for each."""
        if given.ndim > 2 and given.shape[0] not in (1, self.image_count):
            raise LunaInputError(
                f"{name} holds {given.shape[0]} pictures, image holds {self.image_count}: "
                "give one for all, or one for each"
            )

    def weight(self, fields: dict[str, Any], region: Region, size: tuple[int, int]) -> Tensor | None:
        """How far a conditioning with an area or a mask acts over a row's latent.

        Args:
            fields: the conditioning's fields.
            region: the row.
            size: (height, width) of the row's latent.

        Returns:
            [h,w] in 0..1, or None where it acts everywhere.
        """
        weight = None
        if "area" in fields:
            weight = self._area_weight(fields["area"], region, size)
        if "mask" in fields:
            mask = self._crop(self._picture(fields["mask"], "mask of a conditioning"), region, size)[..., 0]
            weight = mask if weight is None else weight * mask
        return weight

    def control(self, control: Any, regions: Sequence[Region]) -> Any:
        """A copy of a ControlNet chain whose hints are the rows' crops, [N,C,h,w] at the working size."""
        rows = control.copy()
        if getattr(control, "cond_hint_original", None) is not None:
            rows.cond_hint_original = self._hints(control.cond_hint_original, regions)
        extra = getattr(control, "extra_concat_orig", None) or []
        rows.extra_concat_orig = [self._hints(hint, regions) if hint[0, 0].numel() > 1 else hint for hint in extra]
        if control.previous_controlnet is not None:
            rows.set_previous_controlnet(self.control(control.previous_controlnet, regions))
        return rows

    def boxes(self, gligen: tuple[Any, ...], region: Region, size: tuple[int, int]) -> tuple[Any, ...]:
        """GLIGEN's boxes (text, height, width, y, x) in px of the row's latent; those that miss the crop are gone."""
        down, across = size[0] / region.crop.height, size[1] / region.crop.width
        kept = []
        for text, height, width, y, x in gligen[2]:
            top, bottom = ((v * AREA_PX - region.crop.y1) * down for v in (y, y + height))
            left, right = ((v * AREA_PX - region.crop.x1) * across for v in (x, x + width))
            top, bottom = max(0.0, top), min(float(size[0]), bottom)
            left, right = max(0.0, left), min(float(size[1]), right)
            if bottom - top > 0.5 and right - left > 0.5:
                kept.append((text, bottom - top, right - left, top, left))
        return (*gligen[:2], kept, *gligen[3:])

    def is_this_picture(self, latent: Tensor) -> bool:
        """Whether a latent [...,h,w] has the picture's aspect, so that it can be the picture at some scale.

        Its sides count as rounded to whole latent px, or to two where both are even (nodes round px to 16).
        """
        height, width = latent.shape[-2:]
        slack = math.gcd(height, width, 2)
        across, down = self.width / self.cell, self.height / self.cell
        smallest = max((width - slack) / across, (height - slack) / down)
        return smallest < min((width + slack) / across, (height + slack) / down)

    def reference(self, latents: Sequence[Tensor], regions: Sequence[Region], size: tuple[int, int]) -> Tensor:
        """A reference latent for each row: a crop where it is of this very picture, the whole latent where it is not.

        Args:
            latents: the row's latents, each [1 or B,c,...,h,w], of any scale.
            regions: the rows.
            size: (height, width) of the rows' latents.
        """
        if self.is_this_picture(latents[0]):
            return self.planes(latents, regions, size)
        if latents[0].shape[0] == 1 and all(latent is latents[0] for latent in latents):
            return latents[0]
        return torch.stack([r.of_picture(latent) for latent, r in zip(latents, regions, strict=True)])

    def planes(self, given: Sequence[Tensor], regions: Sequence[Region], size: tuple[int, int]) -> Tensor:
        """Latents, pictures or masks of the whole picture [1 or B,...,h,w] or [h,w] as one crop per row [N,...,*size].

        They may have any scale; where their aspect is another, ComfyUI takes their middle, and so does this.
        """
        crops = []
        for planes, region in zip(given, regions, strict=True):
            own = region.of_picture(planes) if planes.ndim > 2 else planes
            own = own if self.is_this_picture(own) else self._middle(own)
            crops.append(cut_planes(own, self._box_on(own, region), size))
        stacked = torch.stack(crops)
        return stacked[:, None] if stacked.ndim == 3 else stacked

    def is_even(self, mask: Tensor, grid: tuple[int, int]) -> bool:
        """Whether an attention mask [...,L,L] whose last tokens are a picture's ``grid`` treats all of these alike."""
        known = self._even.get(id(mask))
        if known is None:
            first = mask.shape[-1] - grid[0] * grid[1]
            rows, columns = mask[..., first:, :], mask[..., first:]
            known = mask, bool((rows == rows[..., :1, :]).all() and (columns == columns[..., :1]).all())
            self._even[id(mask)] = known
        return known[1]

    def attention(self, masks: Sequence[Tensor], grid: tuple[int, int], regions: Sequence[Region]) -> Tensor:
        """Attention masks [1 or B,L,L] over text and the picture's ``grid`` of tokens, cut for each row to [N,L,L]."""

        def cut_last(mask: Tensor, region: Region) -> Tensor:
            first = mask.shape[-1] - grid[0] * grid[1]
            planes = mask[..., first:].unflatten(-1, grid)
            return torch.cat(
                [mask[..., :first], cut_planes(planes, self._box_on(planes, region), grid).flatten(-2)], -1
            )

        rows = []
        for mask, region in zip(masks, regions, strict=True):
            own = cut_last(region.of_picture(mask), region)
            rows.append(cut_last(own.T, region).T)
        return torch.stack(rows)

    def _box_on(self, planes: Tensor, region: Region) -> tuple[float, float, float, float]:
        """Top, left, bottom, right of a row's crop on planes [...,h,w] of the whole picture."""
        down, across = planes.shape[-2] / self.height, planes.shape[-1] / self.width
        crop = region.crop
        return crop.y1 * down, crop.x1 * across, crop.y2 * down, crop.x2 * across

    def _middle(self, planes: Tensor) -> Tensor:
        """The middle of planes [...,h,w] that has the picture's aspect, as ComfyUI crops a picture of another."""
        height, width = planes.shape[-2:]
        scale = min(width / self.width, height / self.height)
        y = min(round((height - self.height * scale) / 2), (height - 1) // 2)
        x = min(round((width - self.width * scale) / 2), (width - 1) // 2)
        return planes[..., y : height - y, x : width - x]

    def _area_weight(self, area: Sequence[Any], region: Region, size: tuple[int, int]) -> Tensor | None:
        if area[0] == "percentage":
            height, width, y, x = (
                v * side for v, side in zip(area[1:5], (self.height, self.width) * 2, strict=True)
            )  # fmt: skip
        else:
            height, width, y, x = (v * AREA_PX for v in area[:4])
        rows = _span_weight((y, y + height), (region.crop.y1, region.crop.y2), self.height, size[0])
        columns = _span_weight((x, x + width), (region.crop.x1, region.crop.x2), self.width, size[1])
        weight = rows[:, None] * columns[None, :]
        return None if bool((weight == 1).all()) else weight

    def _hints(self, hint: Tensor, regions: Sequence[Region]) -> Tensor:
        picture = self._picture(hint, "hint of a ControlNet", middle=True)
        crops = [self._crop(picture, region, region.working_size) for region in regions]
        return torch.stack(crops).movedim(-1, 1)

    def _picture(self, given: Tensor, name: str, middle: bool = False) -> Tensor:
        """A mask [H,W] or [B,H,W], or a hint [B,C,H,W], as [B,H,W,C] at the picture's size, kept for the other rows.

        Where its aspect is not the picture's it is stretched, or its ``middle`` taken, as ComfyUI does with each.
        """
        known = self._scaled.get(id(given))
        if known is not None:
            return known[1]
        self.check_batch(given, name)
        planes = given.reshape(-1, 1, *given.shape[-2:]) if given.ndim < 4 else given
        if middle:
            planes = self._middle(planes)
        if tuple(planes.shape[-2:]) != (self.height, self.width):
            planes = F.interpolate(planes.float(), (self.height, self.width), mode="bilinear", antialias=True)
        picture = planes.movedim(1, -1).cpu()
        self._scaled[id(given)] = (given, picture)
        return picture

    def _crop(self, picture: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
        return cut(region.of_picture(picture).float(), region.crop, *size)


def _span_weight(area: tuple[float, float], crop: tuple[int, int], limit: int, size: int) -> Tensor:
    """Weight of ``size`` latent px across ``crop`` (px) for an area (px) along one side of the picture.

    Inside the area it is 1, fading to its edges over ``_FUZZ`` latent px except where the area ends with the picture.
    """
    per_px = (crop[1] - crop[0]) / size
    centres = crop[0] + (torch.arange(size, dtype=torch.float64) + 0.5) * per_px
    inside = ((centres > area[0]) & (centres < area[1])).double()
    fuzz = max(1.0, min(_FUZZ, (area[1] - area[0]) / per_px / 4))
    if area[0] > 0:
        inside = inside * (((centres - area[0]) / per_px + 0.5) / fuzz).clamp(0, 1)
    if area[1] < limit:
        inside = inside * (((area[1] - centres) / per_px + 0.5) / fuzz).clamp(0, 1)
    return inside.float()
