"""The refinement itself: for each pass cut, anchor, encode, sample, decode and paste; the same for every refiner."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import LunaRuntimeError
from .crops import cut, fit_into
from .pasting import FEATHERED, PasteSettings, paste_back
from .plan import RefinePlan, Region
from .rows import EncodedRow, Row

Item = TypeVar("Item")


class Engine(Protocol):
    """What the refinement needs of the models; one implementation knows ComfyUI."""

    @property
    def device(self) -> torch.device:
        """Where pictures are cut, decoded and pasted."""
        ...

    @property
    def px_per_batch(self) -> int:
        """How many px of crops to hold at a time while encoding and decoding; one crop is held whatever its size."""
        ...

    def view(self, rows: Sequence[Row], crops: Tensor) -> list[Tensor | None]:
        """What the image encoder sees of each row with an anchor, [s,s,3], from the crops [n,H,W,3] of the input."""
        ...

    def encode(self, rows: Sequence[Row], crops: Tensor, views: Sequence[Tensor | None]) -> list[EncodedRow]:
        """The rows with their views, and with what the models read of their crops [n,H,W,3]."""
        ...

    def anchor(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """The rows of a pass, of any size, with the image embeddings of those that have an anchor."""
        ...

    def sample(self, rows: Sequence[EncodedRow]) -> list[Tensor]:
        """The refined latent [c,h,w] or [c,1,h,w] of each row; rows are of one working size."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [n,H,W,3] of latents [n,c,h,w] or [n,c,1,h,w]."""
        ...


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
    rows: Sequence[Row],
    engine: Engine,
    settings: PasteSettings = FEATHERED,
    keep_crops: bool = False,
    keep_mask: bool = True,
) -> Refined:
    """Carries out a plan on a picture batch.

    The picture moves to the engine's device once, and back once; crops that are kept wait in main memory.

    Args:
        image: [B,H,W,C] in 0..1, C 3 or 4 (alpha is kept as it is); not modified.
        plan: made for a batch of this size.
        rows: one for each region of the plan, in order.
        engine: the models.
        settings: how crops are pasted.
        keep_crops: also return every crop before and after.
        keep_mask: also return what was pasted where.

    Raises:
        LunaRuntimeError: the VAE or the model gave values that are not numbers.
    """
    canvas = image.to(engine.device, torch.float32, copy=True)
    colours, original = canvas[..., :3], image[..., :3].to(engine.device)
    mask = torch.zeros_like(canvas[..., 0]) if keep_mask else None
    before, after = (crop_batch(plan) if keep_crops else None for _ in range(2))
    for number, turn in enumerate(plan.passes):
        # nothing is pasted before the first pass: its crops are those of the input picture
        other = original if number else None
        batches = [[rows[region.row] for region in batch] for batch in plan.batches(turn)]
        encoded = [row for batch in batches for row in _encode(batch, colours, other, engine, before)]
        sampled: dict[int, Tensor] = {}
        for _, same_size in groupby(engine.anchor(encoded), key=lambda row: row.region.working_size):
            batch_rows = list(same_size)
            sampled.update(zip((row.region.row for row in batch_rows), engine.sample(batch_rows), strict=True))
        for region, picture in _decode(plan.paste_order(turn), sampled, engine):
            index = region.image_index
            paste_back(
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
    rows: Sequence[Row], canvas: Tensor, original: Tensor | None, engine: Engine, before: Tensor | None
) -> list[EncodedRow]:
    """Rows of one working size, a few crops at a time.

    Rows are anchored by the ``original``, and encoded from the canvas as earlier passes left it; the crops that are
    encoded go into ``before``.

    Args:
        rows: of one working size.
        canvas: [B,H,W,3].
        original: [B,H,W,3], the input picture; None where the canvas is still the same.
        engine: the models.
        before: [N,H,W,3], or None where crops are not kept.
    """
    encoded: list[EncodedRow] = []
    anchored = any(row.anchor is not None for row in rows)
    for part in _parts(rows, rows[0].region.working_size, engine.px_per_batch):
        views: list[Tensor | None] = [None] * len(part)
        if anchored and original is not None:
            views = engine.view(part, _crops(part, original))
        crops = _crops(part, canvas)
        if anchored and original is None:
            views = engine.view(part, crops)
        encoded += engine.encode(part, crops, views)
        if before is not None:
            _keep(before, part, crops)
        del crops  # or two batches of them would be held while the next is cut
    for row in encoded:
        _finite(row.latent, "encoding the crops with vae")
    return encoded


def _keep(frames: Tensor, rows: Sequence[Row], crops: Tensor) -> None:
    """Writes crops [n,h,w,3] to their rows of a batch [N,H,W,3]."""
    for row, crop in zip(rows, crops, strict=True):
        fit_into(frames[row.region.row], crop)


def _crops(rows: Sequence[Row], images: Tensor) -> Tensor:
    """[n,h,w,3] of rows of one working size, cut from [B,H,W,3]."""
    # planes in memory, as the resampling gives them and the VAE wants them
    shape = (len(rows), images.shape[-1], *rows[0].region.working_size)
    crops = images.new_empty(shape, dtype=torch.float32).movedim(1, -1)
    for crop, row in zip(crops, rows, strict=True):
        region = row.region
        crop.copy_(cut(images[region.image_index].float(), region.crop, *region.working_size))
    return crops


def _decode(regions: Sequence[Region], sampled: dict[int, Tensor], engine: Engine) -> Iterator[tuple[Region, Tensor]]:
    """Decodes in paste order, a few rows of one size at a time."""
    for size, same_size in groupby(regions, key=lambda region: region.working_size):
        for part in _parts(list(same_size), size, engine.px_per_batch):
            latents = _finite(torch.stack([sampled.pop(region.row) for region in part]), "sampling with model")
            yield from zip(part, _finite(engine.decode(latents), "decoding with vae"), strict=True)


def _parts(items: Sequence[Item], size: tuple[int, int], px: int) -> Iterator[Sequence[Item]]:
    """As many at a time of what is ``size`` (height, width) px as fit into ``px``."""
    most = max(1, px // (size[0] * size[1]))
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _finite(values: Tensor, stage: str) -> Tensor:
    # the extremes tell it without a temporary as large as the values
    if not torch.isfinite(torch.stack([values.amin(), values.amax()])).all():
        raise LunaRuntimeError(
            f"{stage} gave values that are not numbers (NaN or infinity), which would leave black regions: "
            "start ComfyUI with --fp32-vae or --force-upcast-attention, or use another model or vae"
        )
    return values
