"""The row: everything a region has of its own, resolved in one place before a model is loaded.

A new setting per row is a field of ``Row`` and a line of ``resolve_rows``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from torch import Tensor

from ..ip_adapter import LayerWeights, RowEmbeds
from .concepts import Concept, Lora
from .plan import RefinePlan, Region

Conditioning = dict[str, list[Any]]
"""ComfyUI conditioning by the guider's own names: lists of [text, fields]."""

AnchorMode = Literal["ip_adapter", "reference", "both"]
"""What anchors rows: an image embedding, a reference latent of their own, or both."""

ANCHOR_MODES: tuple[AnchorMode, ...] = get_args(AnchorMode)

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
class RowReference:
    """That a row is given a reference latent of its own.

    Attributes:
        picture: [H,W,C] it is made of, or None for the row's own latent.
        words: of prompts that are encoded together with the picture, by the prompts' names.
    """

    picture: Tensor | None = None
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Row:
    """A region and all that is its own.

    Attributes:
        region: what is cut, at which size, with which seed, and how it is pasted.
        conditioning: of the whole picture; rows may share one.
        denoise: share of the schedule, 0..1; None where the noise levels were given as sigmas.
        loras: added to the model for this row, in this order.
        anchor: None where no image embedding guides the row.
        reference: None where no reference latent of its own guides it.
    """

    region: Region
    conditioning: Conditioning
    denoise: float | None = None
    loras: tuple[Lora, ...] = ()
    anchor: RowAnchor | None = None
    reference: RowReference | None = None

    @property
    def seed(self) -> int:
        return self.region.seed

    def encoded(
        self,
        latent: Tensor,
        masked: "MaskedPicture | None" = None,
        view: Tensor | None = None,
        reference_latent: Tensor | None = None,
        shown: Tensor | None = None,
    ) -> "EncodedRow":
        """The row with what the VAE made of its crop."""
        own = {each.name: getattr(self, each.name) for each in fields(Row)}
        return EncodedRow(
            latent=latent, masked=masked, view=view, reference_latent=reference_latent, shown=shown, **own
        )


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
        reference_latent: of the latent's shape, for a row with a reference.
        shown: [h,w,3], what the text encoder sees, for a row whose reference has words.
        embed: one image embedding, made of the view before the row is sampled.
        style: [T,D], tokens of the view that stand behind the row's text, made likewise.
    """

    latent: Tensor
    masked: MaskedPicture | None = None
    view: Tensor | None = None
    reference_latent: Tensor | None = None
    shown: Tensor | None = None
    embed: RowEmbeds | None = None
    style: Tensor | None = None


def resolve_rows(
    plan: RefinePlan,
    conditioning: Conditioning,
    denoise: float | None = None,
    concepts: Sequence[Concept] = (),
    anchor_weight: float | None = None,
    layer_weights: LayerWeights = _EVEN,
    references: bool = False,
    words: Mapping[str, str] | None = None,
) -> tuple[Row, ...]:
    """One row for each region of a plan, in their order.

    Args:
        plan: the regions, also those in no pass.
        conditioning: of rows without prompts of their own.
        denoise: of rows without one of their own; None where the noise levels were given as sigmas.
        concepts: settings by label; the first that matches counts.
        anchor_weight: of rows without one of their own; None where rows are not anchored.
        layer_weights: whose curve runs over the rows of each picture.
        references: give each row a reference latent, unless its concept sets the weight of its anchor to 0.
        words: of prompts that are encoded with each reference's picture; prompts of concepts keep their text.
    """
    conditionings = {concept: conditioning | _prompts(concept) for concept in (*concepts, _KEEPS_ALL)}
    pictures = {concept: concept.image[0, ..., :3] for concept in concepts if concept.image is not None}
    rows = []
    for region, factor in zip(plan.regions, _row_factors(plan, layer_weights), strict=True):
        own = next((concept for concept in concepts if concept.matches(region.label)), _KEEPS_ALL)
        picture = pictures.get(own)
        anchor = None
        if anchor_weight is not None:
            weight = anchor_weight if own.ip_adapter_weight is None else own.ip_adapter_weight
            anchor = RowAnchor(weight * factor, picture)
        reference = None
        if references and own.ip_adapter_weight != 0:
            given = _prompts(own)
            reference = RowReference(picture, {name: said for name, said in (words or {}).items() if name not in given})
        own_denoise = denoise if own.denoise is None else own.denoise
        rows.append(Row(region, conditionings[own], own_denoise, own.loras, anchor, reference))
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
