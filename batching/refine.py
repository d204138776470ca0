"""The refinement itself: for each pass cut, anchor, encode, sample, decode and paste; the same for every refiner."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import LunaRuntimeError
from ..picture.boxes import Box
from .blend import Blend, multiband
from .color import ColorMatch, match_color
from .crops import WINDOW_PX, cut, fit_into, paste, uncut
from .plan import RefinePlan, Region

log = logging.getLogger("luna")


@dataclass(frozen=True)
class EncodedRows:
    """Regions of one working size, ready to be sampled.

    Attributes:
        regions: the rows.
        latents: [N,c,h,w].
        anchors: what the engine made of the crops to anchor the rows (image embeddings), or None.
    """

    regions: tuple[Region, ...]
    latents: Tensor
    anchors: object | None


class Engine(Protocol):
    """What the refinement needs of the models; one implementation knows ComfyUI."""

    @property
    def px_per_batch(self) -> int:
        """How many px of crops to hold at a time while encoding and decoding; one crop is held whatever its size."""
        ...

    def anchor(self, crops: Tensor, regions: Sequence[Region]) -> object | None:
        """Image embeddings of the regions' crops [n,H,W,3]; None when rows are not anchored."""
        ...

    def join_anchors(self, parts: Sequence[object | None]) -> object | None:
        """The anchors of several batches of crops as one."""
        ...

    def encode(self, crops: Tensor, regions: Sequence[Region]) -> Tensor:
        """Latents [n,c,h,w] of the regions' crops [n,H,W,3]."""
        ...

    def sample(self, rows: EncodedRows) -> Tensor:
        """Refined latents [N,c,h,w]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n,H,W,3] of latents [n,c,h,w]."""
        ...


@dataclass(frozen=True)
class PasteSettings:
    """How refined crops go back onto the picture.

    Attributes:
        blend: a weighted paste, or a multiband blend inside the same region.
        color_match: how colours are taken back to those of the input picture.
    """

    blend: Blend = "feather"
    color_match: ColorMatch = "none"


@dataclass(frozen=True)
class Refined:
    """The outcome of a refinement, on the device of the input picture.

    Attributes:
        image: [B,H,W,C] float32.
        mask: [B,H,W] float32, the paste weight of all regions together; None when not kept.
        crops_before, crops_after: [N,H,W,3], every row's crop at the largest working size; None when not kept.
    """

    image: Tensor
    mask: Tensor | None
    crops_before: Tensor | None
    crops_after: Tensor | None


def refine(
    image: Tensor,
    plan: RefinePlan,
    engine: Engine,
    settings: PasteSettings = PasteSettings(),
    keep_crops: bool = False,
    keep_mask: bool = True,
) -> Refined:
    """Carries out a plan on a picture batch.

    Pictures, masks and crops are worked on in main memory, wherever they come from (with --gpu-only ComfyUI keeps
    them on the GPU); the results go back to the device of the picture.

    Args:
        image: [B,H,W,C] in 0..1, C 3 or 4 (alpha is kept as it is); not modified.
        plan: made for a batch of this size.
        engine: the models.
        settings: how crops are pasted.
        keep_crops: also return every crop before and after.
        keep_mask: also return what was pasted where.

    Raises:
        LunaRuntimeError: the VAE or the model gave values that are not numbers.
    """
    canvas = image.to("cpu", torch.float32, copy=True)
    colours, original = canvas[..., :3], image[..., :3].cpu()
    mask = torch.zeros(canvas.shape[:3]) if keep_mask else None
    before, after = (crop_batch(plan) if keep_crops else None for _ in range(2))
    for rows in plan.passes:
        encoded = [_encode(batch, colours, original, engine, before) for batch in plan.batches(rows)]
        sampled: dict[int, Tensor] = {}
        for batch in encoded:
            latents = engine.sample(batch)
            sampled.update((region.row, latent) for region, latent in zip(batch.regions, latents, strict=True))
        for region, picture in _decode(plan.paste_order(rows), sampled, engine):
            index = region.image_index
            _paste_back(
                colours[index], original[index], None if mask is None else mask[index], picture, region, settings
            )
            if after is not None:
                fit_into(after[region.row], picture)
            del picture  # or its whole batch would be held while the next is decoded
    if before is not None and after is not None:
        _show_resting(plan, original, (before, after))
    results = (None if result is None else result.to(image.device) for result in (mask, before, after))
    return Refined(canvas.to(image.device), *results)


def _show_resting(plan: RefinePlan, original: Tensor, batches: Sequence[Tensor]) -> None:
    """Rows in no pass stay as they are: their crops of the input picture go into every batch."""
    at_work = {row for rows in plan.passes for row in rows}
    for region in plan.regions:
        if region.row not in at_work:
            crop = cut(original[region.image_index].float(), region.crop, *region.working_size)
            for crops in batches:
                fit_into(crops[region.row], crop)


def crop_batch(plan: RefinePlan) -> Tensor:
    """Room for one crop per row, at the largest working size of all: [N,H,W,3], black."""
    height = max((region.working_height for region in plan.regions), default=1)
    width = max((region.working_width for region in plan.regions), default=1)
    return torch.zeros(len(plan.regions), height, width, 3)


def _encode(
    regions: Sequence[Region], canvas: Tensor, original: Tensor, engine: Engine, before: Tensor | None
) -> EncodedRows:
    """Anchors all crops first and encodes them after, so that each model is loaded once.

    Rows are anchored by the input picture, and encoded from the canvas as earlier passes left it; the crops that are
    encoded go into ``before``.
    """

    def crops_of(part: Sequence[Region], images: Tensor) -> Tensor:
        # planes in memory, as the resampling gives them and the VAE wants them
        crops = torch.empty(len(part), images.shape[-1], *part[0].working_size).movedim(1, -1)
        for crop, r in zip(crops, part, strict=True):
            crop.copy_(cut(images[r.image_index].float(), r.crop, *r.working_size))
        return crops

    parts = list(_parts(regions, engine.px_per_batch))
    anchors = engine.join_anchors([engine.anchor(crops_of(part, original), part) for part in parts])
    latents = []
    for part in parts:
        crops = crops_of(part, canvas)
        latents.append(engine.encode(crops, part))
        if before is not None:
            _keep(before, part, crops)
        del crops  # or two batches of them would be held while the next is cut
    return EncodedRows(tuple(regions), _finite(torch.cat(latents), "encoding the crops with vae"), anchors)


def _keep(frames: Tensor, regions: Sequence[Region], crops: Tensor) -> None:
    """Writes crops [n,h,w,3] to their rows of a batch [N,H,W,3]."""
    for region, crop in zip(regions, crops, strict=True):
        fit_into(frames[region.row], crop)


def _decode(regions: Sequence[Region], sampled: dict[int, Tensor], engine: Engine) -> Iterator[tuple[Region, Tensor]]:
    """Decodes in paste order, a few rows of one size at a time."""
    for same_size in _runs(regions):
        for part in _parts(same_size, engine.px_per_batch):
            latents = _finite(torch.stack([sampled.pop(region.row) for region in part]), "sampling with model")
            yield from zip(part, _finite(engine.decode(latents), "decoding with vae"), strict=True)


def _paste_back(
    canvas: Tensor, reference: Tensor, mask: Tensor | None, picture: Tensor, region: Region, settings: PasteSettings
) -> None:
    """Pastes one refined crop onto its image [H,W,3], and what was pasted where onto its mask [H,W].

    ``reference`` is the input picture, so that colours do not drift from pass to pass.
    """
    if settings.color_match != "none":
        before = cut(reference.to(torch.float32), region.crop, *region.working_size)
        weights = region.weights_over_crop(*region.working_size)
        picture = match_color(picture, before, weights, settings.color_match)
    # a multiband blend reaches from one end of the region to the other, a feather takes any part for itself
    windows = [region.paste] if settings.blend == "multiband" else region.paste.strips(WINDOW_PX)
    for window in windows:
        weights = region.weights.draw(window)
        if settings.blend == "multiband":
            below = canvas[window.y1 : window.y2, window.x1 : window.x2]
            blended = multiband(below, uncut(picture, region.crop, window), weights)
            # the coarse bands reach past the mask: they fade out where the paste weight does
            below.lerp_(blended, (4 * weights).clamp(max=1)[..., None])
        else:
            paste(canvas, picture, region.crop, window, weights)
        if mask is not None:
            _mark(mask, window, weights)


def _runs(regions: Sequence[Region]) -> Iterator[list[Region]]:
    run: list[Region] = []
    for region in regions:
        if run and run[-1].working_size != region.working_size:
            yield run
            run = []
        run.append(region)
    if run:
        yield run


def _parts(regions: Sequence[Region], px: int) -> Iterator[Sequence[Region]]:
    """Regions of one working size, as many at a time as fit into ``px``."""
    height, width = regions[0].working_size
    size = max(1, px // (height * width))
    for start in range(0, len(regions), size):
        yield regions[start : start + size]


def _mark(mask: Tensor, window: Box, weights: Tensor) -> None:
    """Adds a paste to the refined mask [H,W] the way pastes add up: what is left over of 1 shrinks by each weight."""
    part = mask[window.y1 : window.y2, window.x1 : window.x2]
    part.add_((1 - part) * weights)


def _finite(values: Tensor, stage: str) -> Tensor:
    # the extremes tell it without a temporary as large as the values
    if not torch.isfinite(torch.stack([values.amin(), values.amax()])).all():
        raise LunaRuntimeError(
            f"{stage} gave values that are not numbers (NaN or infinity), which would leave black regions: "
            "start ComfyUI with --fp32-vae or --force-upcast-attention, or use another model or vae"
        )
    return values
