"""Where sampling starts from: the noise of each row, and how far each of its px takes part."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .crops import cut
from .noise import row_generator, row_noise
from .plan import Region
from .rows import Row
from .scaffold import scaffold_slice


@dataclass(frozen=True, eq=False)
class RowStart:
    """What a picture gives to the start of its rows.

    Attributes:
        cell: px of a crop per latent px.
        mask_latent: hold the latent outside each region's paste weight while sampling.
        noise_scaffold: [1 or B,c,H,W] in latent px, noise of the whole picture, or None for noise of each row's own.
        denoise_share: [1 or B,H,W] in 0..1, which share of the denoise each px of the picture gets, or None for all.
    """

    cell: int
    mask_latent: bool = False
    noise_scaffold: Tensor | None = None
    denoise_share: Tensor | None = None

    def noise(self, rows: Sequence[Row], shape: Sequence[int]) -> Tensor:
        """[N, *shape] float32 on the CPU for rows whose latents have ``shape`` [c,h,w] or [c,1,h,w]."""
        scaffold = self.noise_scaffold
        if scaffold is None:
            return row_noise([row.seed for row in rows], shape)
        slices = torch.stack([self._slice(scaffold, row.region, (shape[-2], shape[-1])) for row in rows])
        return slices.reshape(len(rows), *shape)

    def mask(self, rows: Sequence[Row], size: tuple[int, int]) -> Tensor | None:
        """[N,1, *size] in 0..1 for latents of ``size`` (height, width), or None where all px take part in full."""
        if not self.mask_latent and self.denoise_share is None:
            return None
        masks = [self.may_change(row.region, size) * self._share(row.region, size) for row in rows]
        return torch.stack(masks)[:, None]

    def may_change(self, region: Region, size: tuple[int, int]) -> Tensor:
        """``size`` (height, width) in 0..1: where in its crop a region may change."""
        return region.weights_over_crop(*size) if self.mask_latent else torch.ones(size)

    def _share(self, region: Region, size: tuple[int, int]) -> Tensor | float:
        shares = self.denoise_share
        if shares is None:
            return 1.0
        return cut(region.of_picture(shares)[..., None], region.crop, *size)[..., 0]

    def _slice(self, scaffold: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
        crop, cell = region.crop, self.cell
        start, stop = (crop.y1 / cell, crop.x1 / cell), (crop.y2 / cell, crop.x2 / cell)
        return scaffold_slice(region.of_picture(scaffold), start, stop, size, row_generator(region.seed, "scaffold"))
