"""The plan of detections: which crop each one gets, at which size it is refined, and what is pasted of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import LunaInputError
from ..picture.boxes import Box, crop_around, inner_margin, picture_box, with_aspect, working_size
from ..picture.detections import Detection
from .noise import region_seed
from .plan import CELL_PX, RefinePlan, Region, name_rows
from .waves import together, waves
from .weights import MaskWeights

MaskMode = Literal["mask", "box"]
MASK_MODES: tuple[MaskMode, ...] = get_args(MaskMode)

OverlapMode = Literal["together", "waves"]
OVERLAP_MODES: tuple[OverlapMode, ...] = get_args(OverlapMode)

AUTO_SIZES = (512, 768, 1024)
"""Working sizes (px) that ``crop_size`` 0 chooses from: the sides common models were trained on."""

LARGER_AUTO_SIZES = (1280, 1536, 2048)
"""Working sizes (px) for regions that are larger still, on models that can take them."""

SMALLEST_CROP = 32
"""px of the picture: a smaller crop holds no context a model could read."""

SMALLEST_WORKING = 64
"""px: on fewer a model sees no more than a few latent px; the shorter side of a crop is mirrored up to it."""


@dataclass(frozen=True)
class CropSettings:
    """How regions become crops.

    Attributes:
        crop_size: working size of the crop's longer side, px, a multiple of ``cell_px``; 0 chooses from
            ``auto_sizes``.
        padding: context on each side, as a fraction of the box's longer side.
        feather_px: width of the paste edge, px of the picture.
        mask_mode: paste what the mask covers, or the whole box.
        overlap_mode: all regions in one pass, or overlapping ones in later passes that see the earlier results.
        cell_px: px per latent px of the VAE: sides of crops are multiples of it.
        auto_sizes: what ``crop_size`` 0 chooses from, px, rising.
    """

    crop_size: int = 1024
    padding: float = 0.15
    feather_px: int = 32
    mask_mode: MaskMode = "mask"
    overlap_mode: OverlapMode = "together"
    cell_px: int = CELL_PX
    auto_sizes: tuple[int, ...] = AUTO_SIZES

    def __post_init__(self) -> None:
        if self.crop_size and (self.crop_size < SMALLEST_WORKING or self.crop_size % self.cell_px):
            raise LunaInputError(
                f"crop_size is {self.crop_size}: use a multiple of {self.cell_px} from {SMALLEST_WORKING} on, "
                "or 0 for automatic sizes"
            )
        if not 0 <= self.padding <= 8:
            raise LunaInputError(f"padding is {self.padding}: use a fraction of the box's longer side from 0 to 8")
        if self.feather_px < 0:
            raise LunaInputError(f"feather is {self.feather_px}: use 0 px or more")
        if self.mask_mode not in MASK_MODES:
            raise LunaInputError(f"mask_mode is '{self.mask_mode}': use one of {', '.join(MASK_MODES)}")
        if self.overlap_mode not in OVERLAP_MODES:
            raise LunaInputError(f"overlap_mode is '{self.overlap_mode}': use one of {', '.join(OVERLAP_MODES)}")


def plan_detections(
    detections: Sequence[Detection], width: int, height: int, image_count: int, settings: CropSettings, seed: int
) -> RefinePlan:
    """Plans one crop per detection.

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
    passes = waves(regions) if settings.overlap_mode == "waves" else together(regions)
    return RefinePlan(width, height, image_count, regions, passes)


def _plan_region(
    row: int, detection: Detection, width: int, height: int, image_count: int, settings: CropSettings, seed: int
) -> Region:
    if detection.image_index >= image_count:
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
    crop = crop_around(target, settings.padding, SMALLEST_CROP, width, height)
    longer_px = settings.crop_size or _auto_size(max(crop.width, crop.height), settings.auto_sizes)
    working = working_size(crop, longer_px, SMALLEST_WORKING, settings.cell_px)
    crop = with_aspect(crop, working, width, height)
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
    return Region(
        row=row,
        image_index=detection.image_index,
        crop=crop,
        paste=target.grown(outward).intersect(crop).intersect(picture),
        weights=weights,
        working_height=working[0],
        working_width=working[1],
        seed=region_seed(seed, crop),
        score=detection.score,
        label=detection.label,
    )


def _auto_size(crop_px: int, sizes: Sequence[int]) -> int:
    """The smallest size that loses nothing of a crop, or the largest there is."""
    return next((size for size in sizes if size >= crop_px), sizes[-1])


def size_notices(plan: RefinePlan, settings: CropSettings) -> list[str]:
    """What a user should know of the sizes regions are refined at: where detail is lost, and what "automatic" chose."""
    shrunk = [region for region in plan.regions if region.scale < 1]
    notices = []
    if settings.crop_size == 0:
        for size in LARGER_AUTO_SIZES:
            rows = [region.row for region in plan.regions if max(region.working_size) == size]
            if rows:
                notices.append(f"crop_size 0 chose {size} px for {name_rows(rows)}, larger than {AUTO_SIZES[-1]} px")
    if shrunk:
        least = min(region.scale for region in shrunk)
        rows = [region.row for region in shrunk]
        largest = max(max(region.working_size) for region in shrunk)
        advice = "raise crop_size" if settings.crop_size else "set crop_size to a larger size"
        notices.append(
            f"{name_rows(rows)}: the crop is larger than the {largest} px it is refined at, so it is scaled down "
            f"to {least:.2f} of its size at the least, and comes back softer: {advice}, lower padding, "
            "or refine such regions with the Chess Refiner"
        )
    return notices
