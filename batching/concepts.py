"""What is different for detections of one kind: prompt, anchor, denoise or LoRA by the label of the detection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import LunaInputError
from ..values import fraction, shown, text
from ..words import fits, folded, split_list


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA's weights and how strongly it is applied."""

    name: str
    weights: dict[str, Tensor]
    strength: float


@dataclass(frozen=True, eq=False)
class Concept:
    """Settings for detections whose label matches; None keeps the refiner's own.

    Attributes:
        match: label patterns, separated by commas, with * and ? as wildcards; letter case does not count.
        positive, negative: ComfyUI conditioning.
        ip_adapter_weight: strength of the anchor.
        denoise: 0..1.
        loras: which act together on these rows.
        image: [1,H,W,C], the anchor instead of the crop itself.
    """

    match: str
    positive: list[Any] | None = None
    negative: list[Any] | None = None
    ip_adapter_weight: float | None = None
    denoise: float | None = None
    loras: tuple[Lora, ...] = ()
    image: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.patterns:
            raise LunaInputError("match is empty: write a label such as face, a pattern such as hand*, or * for all")
        if self.denoise is not None:
            fraction(self.denoise, f"denoise of concept {shown(self.match)}")

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(map(folded, split_list(text(self.match, "match"))))

    def matches(self, label: str) -> bool:
        return fits(label, self.patterns)


def denoise_of(label: str, concepts: Sequence[Concept], denoise: float | None) -> float | None:
    """The denoise of a detection: that of its concept, or else the refiner's ``denoise``."""
    concept = concept_for(label, concepts)
    return denoise if concept is None or concept.denoise is None else concept.denoise


def concept_for(label: str, concepts: Sequence[Concept]) -> Concept | None:
    """The first concept that matches a detection's label."""
    return next((concept for concept in concepts if concept.matches(label)), None)
