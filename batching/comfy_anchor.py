"""How rows are anchored, and the rows of a plan with all that ComfyUI's objects give them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ip_adapter import LayerWeights
from ..ip_adapter.comfy_adapter import IPAdapter
from .comfy_recipe import Recipe
from .comfy_style import Style
from .concepts import Concept
from .plan import RefinePlan
from .rows import Row, resolve_rows


@dataclass(frozen=True)
class Anchor:
    """How rows are anchored.

    Attributes:
        adapter: the IP-Adapter.
        clip_vision: ComfyUI's CLIP vision model.
        weight: strength of the anchor of rows without one of their own.
        start_percent, end_percent: part of the schedule, 0..1.
        layer_weights: strength over the depth of the model.
    """

    adapter: IPAdapter
    clip_vision: Any
    weight: float
    start_percent: float
    end_percent: float
    layer_weights: LayerWeights


def rows_for(
    plan: RefinePlan,
    recipe: Recipe,
    anchor: Anchor | None,
    concepts: Sequence[Concept] = (),
    style: Style | None = None,
    references: bool = False,
    words: Mapping[str, str] | None = None,
) -> tuple[Row, ...]:
    """The rows of a plan with what recipe, anchor, concepts, style and references give each of them.

    References and their words are those of ``resolve_rows``.
    """
    guide = anchor or style  # which have the weights in common
    weight, layers = (None, LayerWeights()) if guide is None else (guide.weight, guide.layer_weights)
    return resolve_rows(plan, recipe.conditioning, recipe.denoise, concepts, weight, layers, references, words)
