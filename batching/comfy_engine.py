"""The engine on ComfyUI: VAE, samplers, memory, progress and the IP-Adapter patch for each chunk of rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LunaRuntimeError
from ..ip_adapter import LayerWeights, RowEmbeds
from ..ip_adapter.comfy_encode import encode_rows
from ..ip_adapter.comfy_patch import IPAdapter, patch_model
from .comfy_progress import SamplingProgress
from .comfy_sampling import Recipe, is_out_of_memory, prepared_noise, rows_that_fit, sample_rows
from .crops import cut
from .noise import row_generator, row_noise
from .plan import RefinePlan, Region
from .refine import EncodedRows
from .scaffold import scaffold_slice

log = logging.getLogger("luna")


@dataclass(frozen=True)
class Anchor:
    """How rows are anchored by their own pictures.

    Attributes:
        adapter: the IP-Adapter.
        clip_vision: ComfyUI's CLIP vision model.
        weight: strength of the anchor.
        start_percent, end_percent: part of the schedule, 0..1.
        layer_weights: strength over the depth of the model, or None for the same everywhere.
    """

    adapter: IPAdapter
    clip_vision: Any
    weight: float
    start_percent: float
    end_percent: float
    layer_weights: LayerWeights | None = None


class ComfyEngine:
    """Runs a refinement on ComfyUI's models; see ``refine.Engine``.

    Args:
        recipe: model, conditioning and sampler; never modified.
        vae: ComfyUI's VAE.
        chunk_size: rows per sampling call; 0 = as many as fit.
        anchor: image anchors, or None for text only.
        plan: what will be refined.
        mask_latent: also hold the latent outside each region's paste weight while sampling.
        noise_scaffold: [1 or B,c,H,W] in latent px, noise of the whole picture, or None for noise of each row's own.
        denoise_share: [1 or B,H,W] in 0..1, which share of the denoise each px of the picture gets, or None for all.
    """

    rows_per_batch = 8

    def __init__(
        self,
        recipe: Recipe,
        vae: Any,
        chunk_size: int,
        anchor: Anchor | None,
        plan: RefinePlan,
        mask_latent: bool = False,
        noise_scaffold: Tensor | None = None,
        denoise_share: Tensor | None = None,
    ):
        self.recipe = recipe
        self.vae = vae
        self.chunk_size = chunk_size
        self.anchor_settings = anchor
        self.mask_latent = mask_latent
        self.noise_scaffold = noise_scaffold
        self.denoise_share = denoise_share
        self._progress = SamplingProgress(recipe.model, len(plan.regions), recipe.steps)

    def anchor(self, crops: Tensor) -> RowEmbeds | None:
        if self.anchor_settings is None:
            return None
        return encode_rows(self.anchor_settings.adapter, self.anchor_settings.clip_vision, crops)

    def join_anchors(self, parts: Sequence[object | None]) -> RowEmbeds | None:
        embeds = [part for part in parts if isinstance(part, RowEmbeds)]
        return RowEmbeds.concat(embeds) if embeds else None

    def encode(self, crops: Tensor) -> Tensor:
        return self.vae.encode(crops)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)[..., :3].to(device="cpu", dtype=torch.float32)

    def sample(self, rows: EncodedRows) -> Tensor:
        """Samples all rows in as few calls as memory allows; after an out-of-memory the chunk is halved."""
        total = len(rows.regions)
        chunk = self._chunk(rows)
        done: list[Tensor] = []
        start = 0
        while start < total:
            stop = min(start + chunk, total)
            result = self._try_chunk(rows, start, stop)
            if result is None:
                if stop - start == 1:
                    raise self._no_room(rows)
                chunk = (stop - start + 1) // 2
                log.warning("not enough memory for %d rows at once, going on with %d", stop - start, chunk)
                continue
            done.append(result)
            self._progress.rows_done(stop - start)
            start = stop
        return torch.cat(done)

    def _chunk(self, rows: EncodedRows) -> int:
        if self.recipe.rows_alone:
            return 1
        return self.chunk_size or min(len(rows.regions), rows_that_fit(self.recipe.model, rows.latents.shape[1:]))

    def _try_chunk(self, rows: EncodedRows, start: int, stop: int) -> Tensor | None:
        """One sampling call for rows start..stop-1; None when it does not fit in memory."""
        try:
            return self._sample_chunk(rows, start, stop)
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
        # outside the except block, so that the traceback no longer holds the tensors of the failed call
        return None

    def _sample_chunk(self, rows: EncodedRows, start: int, stop: int) -> Tensor:
        latents = rows.latents[start:stop]
        regions = rows.regions[start:stop]
        model = self.recipe.model
        if self.anchor_settings is not None and isinstance(rows.anchors, RowEmbeds):
            model = patch_model(
                model,
                self.anchor_settings.adapter,
                rows.anchors.rows(start, stop),
                weight=self.anchor_settings.weight,
                start_percent=self.anchor_settings.start_percent,
                end_percent=self.anchor_settings.end_percent,
                layer_weights=self.anchor_settings.layer_weights,
            )
        return sample_rows(
            self.recipe,
            model,
            self.recipe.conditioning,
            latents,
            self._noise(regions, latents),
            [region.seed for region in regions],
            denoise_mask=self._latent_mask(regions, latents),
            callback=self._progress.callback(stop - start),
        )

    def _noise(self, regions: Sequence[Region], latents: Tensor) -> Tensor:
        if self.noise_scaffold is None:
            return prepared_noise(row_noise([region.seed for region in regions], latents.shape[1:]))
        slices = [self._scaffold_slice(self.noise_scaffold, region, latents) for region in regions]
        return prepared_noise(torch.stack(slices))

    def _scaffold_slice(self, scaffold: Tensor, region: Region, latents: Tensor) -> Tensor:
        cell = self.vae.spacial_compression_encode()
        return scaffold_slice(
            scaffold[region.image_index if scaffold.shape[0] > 1 else 0],
            (region.crop.y1 / cell, region.crop.x1 / cell),
            (region.crop.y2 / cell, region.crop.x2 / cell),
            (latents.shape[-2], latents.shape[-1]),
            row_generator(region.seed, "scaffold"),
        )

    def _latent_mask(self, regions: Sequence[Region], latents: Tensor) -> Tensor | None:
        if not self.mask_latent and self.denoise_share is None:
            return None
        height, width = latents.shape[-2:]
        masks = []
        for region in regions:
            mask = region.weights_over_crop(height, width) if self.mask_latent else torch.ones(height, width)
            if self.denoise_share is not None:
                share = self.denoise_share[region.image_index if self.denoise_share.shape[0] > 1 else 0]
                mask = mask * cut(share[..., None], region.crop, height, width)[..., 0]
            masks.append(mask[None])
        return torch.stack(masks)

    def _no_room(self, rows: EncodedRows) -> LunaRuntimeError:
        height, width = rows.regions[0].working_size
        return LunaRuntimeError(
            f"there is not enough memory to sample even one {width}x{height} px crop: "
            "choose a smaller crop_size, close other programs that use the GPU, or start ComfyUI with --lowvram"
        )
