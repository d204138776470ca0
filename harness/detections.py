"""Plain detections for tests of the core, which sees them only through its protocol."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PlainDetection:
    box: tuple[float, float, float, float]
    image_index: int = 0
    mask: Tensor | None = None
    score: float = 1.0
    label: str = ""
