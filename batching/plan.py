"""What will be refined, as data: regions, crops, paste weights, row seeds and the order of the work; no pixels yet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LunaInputError
from .crops import WINDOW_PX
from .geometry import Box, crop_around, inner_margin, picture_box, with_aspect, working_size
from .noise import region_seed
from .weights import MaskWeights, PasteWeights

MaskMode = Literal["mask", "box"]
MASK_MODES: tuple[MaskMode, ...] = ("mask", "box")

OverlapMode = Literal["together", "waves"]
OVERLAP_MODES: tuple[OverlapMode, ...] = ("together", "waves")

AUTO_SIZES = (512, 768, 1024)
"""Working sizes (px) that ``crop_size`` 0 chooses from: the sides common models were trained on."""

LARGER_AUTO_SIZES = (1280, 1536, 2048)
"""Working sizes (px) for regions that are larger still, on models that can take them."""

SMALLEST_CROP = 32
"""px of the picture: a smaller crop holds no context a model could read."""

SMALLEST_WORKING = 64
"""px: on fewer a model sees no more than a few latent px; the shorter side of a crop is mirrored up to it."""

CELL_PX = 8
"""px per latent px of most VAEs."""


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
        drawn = torch.cat([_scaled(self.weights.draw(band), band.height, width) for band in self.crop.bands(WINDOW_PX)])
        return _scaled(drawn, height, width).clamp(0, 1)

    @property
    def scale(self) -> float:
        """px of the working size per px of the picture, along the longer side."""
        return max(self.working_size) / max(self.crop.width, self.crop.height)


def _scaled(weights: Tensor, height: int, width: int) -> Tensor:
    """[h,w] at another size, antialiased."""
    return F.interpolate(weights[None, None], size=(height, width), mode="bilinear", antialias=True)[0, 0]


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
    detections: Sequence[Detected], width: int, height: int, image_count: int, settings: CropSettings, seed: int
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
    passes = waves(regions) if settings.overlap_mode == "waves" else _together(regions)
    return RefinePlan(width, height, image_count, regions, passes)


def _together(regions: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(len(regions))),) if regions else ()


def waves(regions: Sequence[Region]) -> tuple[tuple[int, ...], ...]:
    """Passes in which no crop sees what another of the same pass writes.

    Greedy colouring of the overlap graph in row order: each region goes into the first pass that has room for it.
    """
    pictures: dict[int, list[Region]] = {}
    for region in regions:
        pictures.setdefault(region.image_index, []).append(region)
    turns: dict[int, int] = {}
    for on_picture in pictures.values():
        turns |= _turns(on_picture)
    passes: list[list[int]] = [[] for _ in range(max(turns.values(), default=-1) + 1)]
    for region in regions:
        passes[turns[region.row]].append(region.row)
    return tuple(tuple(rows) for rows in passes)


def _turns(regions: Sequence[Region]) -> dict[int, int]:
    """The pass of each region of one picture, by its row.

    Sorted by their left edges, only a short run of the regions can touch any one of them, and a run is compared at
    once: the work grows with the regions that lie beside each other, not with all pairs.
    """
    order = sorted(regions, key=lambda region: region.crop.x1)
    crops = np.array([_sides(region.crop) for region in order]).T
    pastes = np.array([_sides(region.paste) for region in order]).T
    left, widest = crops[0], (crops[2] - crops[0]).max()
    turns = np.full(len(order), -1)
    for place in sorted(range(len(order)), key=lambda place: order[place].row):
        near = slice(np.searchsorted(left, left[place] - widest), np.searchsorted(left, crops[2, place]))
        touches = _overlap(crops[:, place], pastes[:, near]) | _overlap(pastes[:, place], crops[:, near])
        taken = set(turns[near][touches].tolist())
        turns[place] = next(turn for turn in range(len(taken) + 1) if turn not in taken)
    return {region.row: int(turn) for region, turn in zip(order, turns, strict=True)}


def _sides(box: Box) -> tuple[int, int, int, int]:
    return box.x1, box.y1, box.x2, box.y2


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n] bool: which of ``others`` [4,n] (x1, y1, x2, y2 px) have px in common with ``box`` [4]."""
    return (others[0] < box[2]) & (others[2] > box[0]) & (others[1] < box[3]) & (others[3] > box[1])


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


def name_rows(rows: Sequence[int]) -> str:
    """Rising row numbers for messages: "row 3", "rows 0, 2-5"."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][-1] == row - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    names = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(names)}"
