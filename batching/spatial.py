"""Whole-picture guidance cut to a row's crop: areas, masks, ControlNet hints, GLIGEN boxes and reference latents."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LunaInputError
from .crops import cut
from .plan import Region

AREA_PX = 8
"""px of the picture per unit of an area or GLIGEN box: ComfyUI's nodes divide px by it."""

_FUZZ = 8
"""Latent px over which an area fades at its edges, as in ComfyUI's own sampler."""


class PictureGuidance:
    """Cuts what belongs to the whole picture to the rows of a batch; remembers what it scaled to the picture's size.

    Args:
        width, height, image_count: of the picture batch.
    """

    def __init__(self, width: int, height: int, image_count: int) -> None:
        self.width = width
        self.height = height
        self.image_count = image_count
        self._scaled: dict[int, tuple[Tensor, Tensor]] = {}

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

    def reference(self, latent: Tensor, regions: Sequence[Region], size: tuple[int, int], cell: int) -> Tensor:
        """Reference latents [1 or B,c,H,W] of this very picture as one crop per row; those of other pictures as given.

        Args:
            latent: in latent px.
            regions: the rows.
            size: (height, width) of the rows' latents.
            cell: px of the picture per latent px.
        """
        grid = (-(-self.height // cell), -(-self.width // cell))
        if latent.ndim != 4 or tuple(latent.shape[-2:]) not in (grid, (self.height // cell, self.width // cell)):
            return latent
        crops = []
        for region in regions:
            box = region.crop
            rows, columns = latent.shape[-2:]
            y1, x1 = max(0, round(box.y1 / cell)), max(0, round(box.x1 / cell))
            y2, x2 = min(rows, max(y1 + 1, round(box.y2 / cell))), min(columns, max(x1 + 1, round(box.x2 / cell)))
            part = latent[self._image_of(latent, region), :, y1:y2, x1:x2]
            crops.append(F.interpolate(part[None].float(), size=size, mode="bicubic", antialias=True)[0].to(latent))
        return torch.stack(crops)

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
        picture = self._picture(hint, "hint of a ControlNet")
        crops = [self._crop(picture, region, region.working_size) for region in regions]
        return torch.stack(crops).movedim(-1, 1)

    def _picture(self, given: Tensor, name: str) -> Tensor:
        """A mask [B,H,W] or hint [B,C,H,W] as [B,H,W,C] at the picture's size, kept for the other rows."""
        known = self._scaled.get(id(given))
        if known is not None:
            return known[1]
        planes = given[:, None] if given.ndim == 3 else given
        if planes.shape[0] not in (1, self.image_count):
            raise LunaInputError(
                f"{name} holds {planes.shape[0]} pictures, image holds {self.image_count}: "
                "give one for all, or one for each"
            )
        if tuple(planes.shape[-2:]) != (self.height, self.width):
            planes = F.interpolate(planes.float(), (self.height, self.width), mode="bilinear", antialias=True)
        picture = planes.movedim(1, -1).cpu()
        self._scaled[id(given)] = (given, picture)
        return picture

    def _crop(self, picture: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
        return cut(picture[self._image_of(picture, region)].float(), region.crop, *size)

    @staticmethod
    def _image_of(batch: Tensor, region: Region) -> int:
        return region.image_index if batch.shape[0] > 1 else 0


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
