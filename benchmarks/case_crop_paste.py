"""Cutting out and pasting back 30 regions of a 4096x4096 px picture."""

from dataclasses import dataclass
from pathlib import Path

import torch
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.crops import cut, paste
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.picture.detections import Detection
from report import Report, Table, best_times, median
from torch import Tensor

from harness.seeding import generator_for

SIDE, REGIONS, FEATHER, REPEATS = 4096, 30, 32, 5
SIZES = ((200, 1000), (100, 400))
"""px: smallest and largest side of the boxes."""


@dataclass(frozen=True)
class Work:
    """The picture, and the crops: planes in memory, as the refiner holds them and the VAE gives them back.

    Attributes:
        image: [H,W,3].
        plan: of the regions.
        crops: [N,h,w,3].
    """

    image: Tensor
    plan: RefinePlan
    crops: Tensor

    def cut(self) -> None:
        for region, crop in zip(self.plan.regions, self.crops, strict=True):
            crop.copy_(cut(self.image, region.crop, *region.working_size))

    def paste(self) -> None:
        for region, crop in zip(self.plan.regions, self.crops, strict=True):
            paste(self.image, crop, region.crop, region.paste, region.weights.draw(region.paste))


def plan_regions(crop_size: int, smallest: int, largest: int) -> RefinePlan:
    """Boxes of all sizes between the two all over the picture, each with a round mask of 256x256 px."""
    generator = generator_for("crop_paste", smallest, largest)
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    disc = ((xs**2 + ys**2) <= 1).float()
    found = []
    for _ in range(REGIONS):
        width, height = (int(n) for n in torch.randint(smallest, largest + 1, (2,), generator=generator))
        x, y = (int(torch.randint(0, SIDE - side, (), generator=generator)) for side in (width, height))
        found.append(Detection(0, (x, y, x + width, y + height), mask=disc))
    return plan_detections(found, SIDE, SIDE, 1, CropSettings(crop_size, feather_px=FEATHER), seed=0)


def run(results: Path) -> Report:
    rows = []
    image = torch.rand(SIDE, SIDE, 3, generator=generator_for("crop_paste", "picture"))
    for smallest, largest in SIZES:
        for crop_size in (512, 1024):
            crops = torch.zeros(REGIONS, 3, crop_size, crop_size).movedim(1, -1)
            work = Work(image, plan_regions(crop_size, smallest, largest), crops)
            cutting, pasting = (median(times) for times in best_times((work.cut, work.paste), REPEATS))
            rows.append(
                (
                    f"{smallest}-{largest}",
                    str(crop_size),
                    f"{cutting:.2f}",
                    f"{pasting:.2f}",
                    f"{cutting + pasting:.2f}",
                )
            )
    columns = ("boxes, px", "crop_size, px", "crop, s", "paste, s", "both, s")
    about = (
        f"{REGIONS} regions with masks on a {SIDE}x{SIDE} px picture, feather {FEATHER} px, float32. Crop: cut and "
        f"scale to the working size. Paste: scale back, draw mask and feather, blend. Median of {REPEATS}. Target: "
        "0.5 s on 2 cores."
    )
    return Report("crop_paste", about, (Table("Crop and paste of 30 regions", columns, tuple(rows)),))
