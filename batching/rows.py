"""The row: everything a region has of its own, resolved in one place before a model is loaded.

A new setting per row is a field of ``Row`` and a line of ``resolve_rows``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..ip_adapter import LayerWeights, RowEmbeds
from .concepts import Concept, Lora
from .plan import RefinePlan, Region

Conditioning = dict[str, list[Any]]
"""ComfyUI conditioning by the guider's own names: lists of [text, fields]."""

_KEEPS_ALL = Concept("*")
_EVEN = LayerWeights()


@dataclass(frozen=True, eq=False)
class RowAnchor:
    """What a row is anchored by, and how strongly.

    Attributes:
        weight: of the row's image embedding.
        picture: [H,W,C] instead of the row's own crop, or None for the crop.
    """

    weight: float
    picture: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """A region and all that is its own.

    Attributes:
        region: what is cut, at which size, with which seed, and how it is pasted.
        conditioning: of the whole picture; rows may share one.
        denoise: share of the schedule, 0..1; None where the noise levels were given as sigmas.
        loras: added to the model for this row, in this order.
        anchor: None where text alone guides the row.
    """

    region: Region
    conditioning: Conditioning
    denoise: float | None = None
    loras: tuple[Lora, ...] = ()
    anchor: RowAnchor | None = None

    @property
    def seed(self) -> int:
        return self.region.seed

    def encoded(
        self, latent: Tensor, masked: "MaskedPicture | None" = None, view: Tensor | None = None
    ) -> "EncodedRow":
        """The row with what the VAE made of its crop."""
        own = {field.name: getattr(self, field.name) for field in fields(Row)}
        return EncodedRow(latent=latent, masked=masked, view=view, **own)


@dataclass(frozen=True, eq=False)
class MaskedPicture:
    """What models made for inpainting read of a row besides its latent.

    Attributes:
        latent: [c,h,w] or [c,1,h,w] of the crop with its mask greyed out.
        mask: [1,H,W] px of the crop, 1 where the row may change.
    """

    latent: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedRow(Row):
    """A row whose crop has been read by the models.

    Attributes:
        latent: [c,h,w], or [c,1,h,w] of models whose latents have frames.
        masked: for models that read it.
        view: [s,s,3], what the image encoder sees, for a row with an anchor.
        embed: one image embedding, made of the view before the row is sampled.
        style: [T,D], tokens of the view that stand behind the row's text, made likewise.
    """

    latent: Tensor
    masked: MaskedPicture | None = None
    view: Tensor | None = None
    embed: RowEmbeds | None = None
    style: Tensor | None = None


def resolve_rows(
    plan: RefinePlan,
    conditioning: Conditioning,
    denoise: float | None = None,
    concepts: Sequence[Concept] = (),
    anchor_weight: float | None = None,
    layer_weights: LayerWeights = _EVEN,
) -> tuple[Row, ...]:
    """One row for each region of a plan, in their order.

    Args:
        plan: the regions, also those in no pass.
        conditioning: of rows without prompts of their own.
        denoise: of rows without one of their own; None where the noise levels were given as sigmas.
        concepts: settings by label; the first that matches counts.
        anchor_weight: of rows without one of their own; None where rows are not anchored.
        layer_weights: whose curve runs over the rows of each picture.
    """
    conditionings = {concept: conditioning | _prompts(concept) for concept in (*concepts, _KEEPS_ALL)}
    rows = []
    for region, factor in zip(plan.regions, _row_factors(plan, layer_weights), strict=True):
        own = next((concept for concept in concepts if concept.matches(region.label)), _KEEPS_ALL)
        anchor = None
        if anchor_weight is not None:
            weight = anchor_weight if own.ip_adapter_weight is None else own.ip_adapter_weight
            anchor = RowAnchor(weight * factor, None if own.image is None else own.image[0, ..., :3])
        own_denoise = denoise if own.denoise is None else own.denoise
        rows.append(Row(region, conditionings[own], own_denoise, own.loras, anchor))
    return tuple(rows)


def _prompts(concept: Concept) -> Conditioning:
    own = {"positive": concept.positive, "negative": concept.negative}
    return {name: conds for name, conds in own.items() if conds is not None}


def _row_factors(plan: RefinePlan, layer_weights: LayerWeights) -> list[float]:
    """What the row curve makes of each row's weight; it runs over the rows of one picture, whatever batch it is in."""
    places: dict[int, list[int]] = {}
    for place, region in enumerate(plan.regions):
        places.setdefault(region.image_index, []).append(place)
    factors = [1.0] * len(plan.regions)
    for on_picture in places.values():
        for place, factor in zip(on_picture, layer_weights.row_factors(len(on_picture)).tolist(), strict=True):
            factors[place] = factor
    return factors
