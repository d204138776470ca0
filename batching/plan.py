"""What will be refined, as data: regions, crops, paste weights, row seeds and the order of the work; no pixels yet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor

from ..errors import LunaInputError
from .geometry import Box, inner_margin, picture_box, square_around
from .noise import row_seed
from .weights import MaskWeights, PasteWeights

MaskMode = Literal["mask", "box"]
MASK_MODES: tuple[MaskMode, ...] = ("mask", "box")

OverlapMode = Literal["together", "waves"]
OVERLAP_MODES: tuple[OverlapMode, ...] = ("together", "waves")

AUTO_SIZES = (512, 768, 1024)
"""Working sizes (px) that ``crop_size`` 0 chooses from: the sides common models were trained on."""

SMALLEST_CROP = 32
"""px of the picture: a smaller square holds no context a model could read."""


class Detected(Protocol):
    """What the plan reads of a detection."""

    @property
    def image_index(self) -> int: ...

    @property
    def box(self) -> tuple[float, float, float, float]: ...

    @property
    def mask(self) -> Tensor | None: ...

    @property
    def score(self) -> float: ...

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Region:
    """One row of the batch.

    Attributes:
        row: position among all rows; outputs keep this order.
        image_index: which image of the batch.
        crop: what is cut out, px; may reach past the picture when it is larger.
        paste: the part of the picture that is written, px.
        weights: paste weight over the picture.
        working_height, working_width: size the crop is refined at, px.
        seed: seed of this row's noise.
        score, label: of the detection; "" and 1 for tiles.
    """

    row: int
    image_index: int
    crop: Box
    paste: Box
    weights: PasteWeights
    working_height: int
    working_width: int
    seed: int
    score: float = 1.0
    label: str = ""

    @property
    def working_size(self) -> tuple[int, int]:
        """(height, width) px."""
        return self.working_height, self.working_width

    def weights_over_crop(self, height: int, width: int) -> Tensor:
        """The paste weight over the crop, scaled to [height, width]; 0..1."""
        drawn = self.weights.draw(self.crop)[None, None]
        return F.interpolate(drawn, size=(height, width), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


@dataclass(frozen=True)
class RefinePlan:
    """Everything a refiner is about to do.

    Attributes:
        width, height, image_count: of the picture batch.
        regions: all rows.
        passes: rows per pass; the crops of a pass are cut before anything of that pass is pasted.
    """

    width: int
    height: int
    image_count: int
    regions: tuple[Region, ...]
    passes: tuple[tuple[int, ...], ...]

    def batches(self, rows: Iterable[int]) -> list[list[Region]]:
        """The regions of ``rows`` grouped by working size: what can share one sampling call."""
        groups: dict[tuple[int, int], list[Region]] = {}
        for row in rows:
            region = self.regions[row]
            groups.setdefault(region.working_size, []).append(region)
        return list(groups.values())

    def paste_order(self, rows: Iterable[int]) -> list[Region]:
        """Lowest score first, so that the surest detection lies on top where regions overlap."""
        return sorted((self.regions[row] for row in rows), key=lambda region: (region.score, region.row))


def even_chunk(total: int, most: int) -> int:
    """Rows per sampling call so that ``total`` rows take as few calls as with ``most`` in each, all of like size.

    13 rows where 12 fit become 7 and 6: the same number of calls at little more than half the memory.
    """
    return math.ceil(total / math.ceil(total / most))


@dataclass(frozen=True)
class CropSettings:
    """How regions become crops.

    Attributes:
        crop_size: working size of the square crop, px, a multiple of 8; 0 chooses from ``AUTO_SIZES``.
        padding: context on each side, as a fraction of the box's longer side.
        feather_px: width of the paste edge, px of the picture.
        mask_mode: paste what the mask covers, or the whole box.
        overlap_mode: all regions in one pass, or overlapping ones in later passes that see the earlier results.
    """

    crop_size: int = 1024
    padding: float = 0.15
    feather_px: int = 32
    mask_mode: MaskMode = "mask"
    overlap_mode: OverlapMode = "together"

    def __post_init__(self) -> None:
        if self.crop_size < 0 or self.crop_size % 8:
            raise LunaInputError(f"crop_size is {self.crop_size}: use a multiple of 8, or 0 for automatic sizes")
        if not 0 <= self.padding <= 8:
            raise LunaInputError(f"padding is {self.padding}: use a fraction of the box's longer side from 0 to 8")
        if self.feather_px < 0:
            raise LunaInputError(f"feather is {self.feather_px}: use 0 px or more")
        if self.mask_mode not in MASK_MODES:
            raise LunaInputError(f"mask_mode is '{self.mask_mode}': use one of {', '.join(MASK_MODES)}")
        if self.overlap_mode not in OVERLAP_MODES:
            raise LunaInputError(f"overlap_mode is '{self.overlap_mode}': use one of {', '.join(OVERLAP_MODES)}")


def plan_detections(
    detections: Sequence[Detected], width: int, height: int, image_count: int, settings: CropSettings, seed: int
) -> RefinePlan:
    """Plans one square crop per detection.

    Args:
        detections: in px of the picture, in the order the outputs will have.
        width, height, image_count: of the picture batch.
        settings: crop and paste settings.
        seed: the run's seed.

    Raises:
        LunaInputError: a detection lies on an image that does not exist, or off the picture.
    """
    regions = tuple(
        _plan_region(row, detection, width, height, image_count, settings, seed)
        for row, detection in enumerate(detections)
    )
    passes = waves(regions) if settings.overlap_mode == "waves" else _together(regions)
    return RefinePlan(width, height, image_count, regions, passes)


def _together(regions: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(len(regions))),) if regions else ()


def waves(regions: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    """Passes in which no crop sees what another of the same pass writes.

    Greedy colouring of the overlap graph in row order: each region goes into the first pass that has room for it.
    """
    passes: list[list[Region]] = []
    for region in regions:
        home = next((rows for rows in passes if not any(_touch(region, other) for other in rows)), None)
        if home is None:
            passes.append([region])
        else:
            home.append(region)
    return tuple(tuple(region.row for region in rows) for rows in passes)


def _touch(a: Region, b: Region) -> bool:
    return a.image_index == b.image_index and (a.crop.overlaps(b.paste) or b.crop.overlaps(a.paste))


def _plan_region(
    row: int, detection: Detected, width: int, height: int, image_count: int, settings: CropSettings, seed: int
) -> Region:
    if not 0 <= detection.image_index < image_count:
        raise LunaInputError(
            f"detections: number {row} is on image {detection.image_index}, but image holds {image_count} "
            f"(0 to {image_count - 1}): detect on the same batch that is refined"
        )
    picture = picture_box(width, height)
    target = Box.around(detection.box).intersect(picture)
    if target.is_empty:
        raise LunaInputError(
            f"detections: box {detection.box} of number {row} lies outside the {width}x{height} px picture"
        )
    crop = square_around(target, settings.padding, SMALLEST_CROP, width, height)
    outward = min(settings.feather_px, inner_margin(target, crop, width, height))
    # what does not fit outside goes inside, but never so far that a small region would vanish
    inward = min(settings.feather_px - outward, min(target.width, target.height) // 4)
    weights = MaskWeights(
        target=detection.box,
        mask=detection.mask if settings.mask_mode == "mask" else None,
        feather_px=outward + inward,
        outward_px=outward,
        width=width,
        height=height,
    )
    working = settings.crop_size or next((size for size in AUTO_SIZES if size >= crop.width), AUTO_SIZES[-1])
    return Region(
        row=row,
        image_index=detection.image_index,
        crop=crop,
        paste=target.grown(outward).intersect(crop).intersect(picture),
        weights=weights,
        working_height=working,
        working_width=working,
        seed=row_seed(seed, detection.image_index, crop.x1, crop.y1, crop.x2, crop.y2),
        score=detection.score,
        label=detection.label,
    )
