"""The engine on ComfyUI: VAE, samplers, memory, progress and the patches for each chunk of rows."""

import copy
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..comfy_memory import MemoryLimit
from ..errors import LunaRuntimeError
from ..ip_adapter import RowEmbeds
from ..ip_adapter.comfy_encode import encode_rows
from ..ip_adapter.comfy_encode import views as views_of
from ..ip_adapter.comfy_patch import patch_model
from .comfy_anchor import Anchor
from .comfy_chunks import MAIN_MEMORY, rows_that_fit
from .comfy_latents import decode_pictures, encode_hints_apart, encode_pictures, has_frames, with_frames
from .comfy_masked import add_masked, encode_masked, reads_masked_picture
from .comfy_picture_text import shown_pictures, with_picture_text
from .comfy_progress import SamplingProgress
from .comfy_recipe import Recipe, with_denoise
from .comfy_reference import add_references, encode_references
from .comfy_row_loras import RowLoras
from .comfy_sampling import prepared_noise, sample_rows
from .comfy_style import Style, StyleTokens
from .conditioning import RowConditioning
from .crops import filling
from .plan import RefinePlan, even_chunk
from .row_start import RowStart
from .rows import Conditioning, EncodedRow, MaskedPicture, Row


class ComfyEngine:
    """Runs a refinement on ComfyUI's models; see ``refine.Engine``.

    Args:
        recipe: model and sampler; never modified.
        vae: ComfyUI's VAE.
        plan: what will be refined.
        rows: one for each region of the plan.
        start: noise, and what takes part.
        anchor: how rows are anchored, or None for text only.
        chunk_size: rows per sampling call; 0 = as many as fit.
        device: where pictures are cut, decoded and pasted.
        style: how rows' pictures guide them through their text, or None.
        clip: encodes the words of rows whose references have any.

    Raises:
        LunaInputError: a row's conditioning cannot be cut to it, its denoise contradicts the recipe, or its weight the
            style.
    """

    px_per_batch = 4 * 1024**2

    def __init__(
        self,
        recipe: Recipe,
        vae: Any,
        plan: RefinePlan,
        rows: Sequence[Row],
        start: RowStart,
        anchor: Anchor | None = None,
        chunk_size: int = 0,
        device: torch.device = MAIN_MEMORY,
        style: Style | None = None,
        clip: Any = None,
    ):
        self.device = device
        self._recipe = recipe
        self._vae, self._decoder = vae, copy.copy(vae)
        self._decoder.output_device = device  # what is decoded stays where it is pasted
        self._start = start
        self._anchor = anchor
        self._clip = clip
        self._chunk_size = chunk_size
        at_work = [rows[number] for turn in plan.passes for number in turn]
        self._conditioning = RowConditioning(plan.width, plan.height, plan.image_count, start.cell, has_frames(vae))
        for conditioning in {id(row.conditioning): row.conditioning for row in at_work}.values():
            self._conditioning.check(conditioning)
        self._recipes = {denoise: with_denoise(recipe, denoise) for denoise in {row.denoise for row in at_work}}
        self._style = StyleTokens(style, recipe.model, at_work) if style else None
        self._clip_vision = next((guide.clip_vision for guide in (anchor, style) if guide), None)
        self._loras = RowLoras(recipe.model, {row.loras for row in at_work})
        self._reads_masked = reads_masked_picture(recipe.model)
        self._progress = SamplingProgress(recipe.model, len(at_work), recipe.steps)
        self._limit = MemoryLimit("rows")

    @property
    def notices(self) -> list[str]:
        """What the user should know of what was given to rows; complete after the last call."""
        return [*self._loras.notices, *self._conditioning.notices]

    def view(self, rows: Sequence[Row], crops: Tensor) -> list[Tensor | None]:
        if self._clip_vision is None:
            return [None] * len(rows)
        pictures = [_anchor_picture(row, crop) for row, crop in zip(rows, crops, strict=True)]
        return list(views_of(self._clip_vision, torch.stack(pictures)))

    def encode(self, rows: Sequence[Row], crops: Tensor, views: Sequence[Tensor | None]) -> list[EncodedRow]:
        masked: Sequence[MaskedPicture | None] = [None] * len(rows)
        size = (crops.shape[1], crops.shape[2])
        if self._reads_masked:
            masks = torch.stack([self._start.may_change(row.region, size) for row in rows])
            masked = encode_masked(self._vae, crops, masks)
        latents = encode_pictures(self._vae, crops)
        references, shown = encode_references(self._vae, rows, latents, size), shown_pictures(rows, crops)
        return [row.encoded(*read) for row, *read in zip(rows, latents, masked, views, references, shown, strict=True)]

    def anchor(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        anchored = [with_picture_text(self._clip, self._recipe.model, row) for row in rows]
        if self._anchor is not None:
            seen = torch.stack([row.view for row in anchored if row.view is not None])
            embeds = encode_rows(self._anchor.adapter, self._anchor.clip_vision, seen)
            anchored = [replace(row, embed=embeds.take([place])) for place, row in enumerate(anchored)]
        return self._style.encode(anchored) if self._style else anchored

    def sample(self, rows: Sequence[EncodedRow]) -> list[Tensor]:
        """Samples rows of one size in as few calls as memory and what differs between them allow."""
        groups: dict[Hashable, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(self._call_of(row), []).append(place)
        sampled: dict[int, Tensor] = {}
        for places in groups.values():
            sampled.update(zip(places, self._sample_call([rows[place] for place in places]), strict=True))
        return [sampled[place] for place in range(len(rows))]

    def decode(self, latents: Tensor) -> Tensor:
        return decode_pictures(self._decoder, latents)[..., :3].to(self.device, torch.float32)

    def _call_of(self, row: EncodedRow) -> Hashable:
        """What rows that share a sampling call have in common."""
        stack = row.loras if self._loras.needs_own_call(row.loras) else None
        texts = self._style.structure(row) if self._style else None
        return row.denoise, stack, texts, row.reference is None, self._conditioning.structure(row, _size(row))

    def _sample_call(self, rows: list[EncodedRow]) -> list[Tensor]:
        """Samples the rows of a call, in chunks where they do not fit."""
        recipe, shape = self._recipes[rows[0].denoise], rows[0].latent.shape
        chunks = self._limit.parts(
            rows,
            self._chunk(recipe, rows),
            lambda chunk: self._sample_chunk(chunk, recipe),
            _no_room(rows[0]),
            units_per_item=math.prod(shape),
        )
        done: list[Tensor] = []
        for chunk, result in chunks:
            done.extend(result)
            self._progress.rows_done(len(chunk))
        return done

    def _chunk(self, recipe: Recipe, rows: list[EncodedRow]) -> int:
        """How many rows to sample at once."""
        if recipe.rows_alone:
            return 1
        shape = rows[0].latent.shape
        most = self._chunk_size
        if not most:
            conditioning = self._conditioning_of(rows[:1])
            more = self._style.bytes_per_row(conditioning, rows[0]) if self._style else 0
            most = rows_that_fit(recipe.model, shape, conditioning, more)
        return even_chunk(len(rows), self._limit.at_most(most, math.prod(shape)))

    def _sample_chunk(self, rows: list[EncodedRow], recipe: Recipe) -> Tensor:
        latents = torch.stack([row.latent for row in rows])
        mask = self._start.mask(rows, _size(rows[0]))
        return sample_rows(
            recipe,
            self._anchored(self._with_loras(recipe.model, rows), rows),
            self._conditioning_of(rows),
            latents,
            prepared_noise(self._start.noise(rows, latents.shape[1:])),
            [row.seed for row in rows],
            denoise_mask=None if mask is None else with_frames(mask, latents),
            callback=self._progress.callback(len(rows)),
        )

    def _conditioning_of(self, rows: Sequence[EncodedRow]) -> Conditioning:
        """All that the model reads of rows which share a call."""
        conditioning = self._conditioning.for_rows(rows, _size(rows[0]))
        encode_hints_apart(conditioning)
        add_masked(conditioning, rows, self._reads_masked)
        add_references(conditioning, rows)
        if self._style:
            self._style.add(conditioning, rows, _size(rows[0]))
        return conditioning

    def _with_loras(self, model: Any, rows: Sequence[EncodedRow]) -> Any:
        if self._loras.needs_own_call(rows[0].loras):
            return self._loras.merged(model, rows[0].loras)
        return self._loras.patched(model, [row.loras for row in rows])

    def _anchored(self, model: Any, rows: Sequence[EncodedRow]) -> Any:
        """A clone on which each row attends to its own embedding; the model itself where text alone guides."""
        if self._anchor is None:
            return model
        return patch_model(
            model,
            self._anchor.adapter,
            RowEmbeds.concat([row.embed for row in rows if row.embed is not None]),
            weight=torch.tensor([row.anchor.weight for row in rows if row.anchor is not None]),
            start_percent=self._anchor.start_percent,
            end_percent=self._anchor.end_percent,
            layer_weights=self._anchor.layer_weights,
        )


def _size(row: EncodedRow) -> tuple[int, int]:
    """(height, width) of the row's latent."""
    return row.latent.shape[-2], row.latent.shape[-1]


def _anchor_picture(row: Row, crop: Tensor) -> Tensor:
    """The crop, or the row's own picture, centre-cropped to the crop's aspect."""
    if row.anchor is None or row.anchor.picture is None:
        return crop
    return filling(row.anchor.picture.to(crop), crop.shape[0], crop.shape[1])


def _no_room(row: Row) -> LunaRuntimeError:
    height, width = row.region.working_size
    return LunaRuntimeError(
        f"there is not enough memory to sample even one {width}x{height} px crop: "
        "choose a smaller crop_size, close other programs that use the GPU, or start ComfyUI with --lowvram"
    )
