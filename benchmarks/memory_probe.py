"""Peak memory of one refinement with a trivial model, in a process of its own; prints one line of JSON.

memory_probe.py tiles 4096      Chess order, 1024 px tiles, on a 4096x4096 px picture
memory_probe.py regions 4096    30 regions at 1024 px, crops before and after kept as the Semantic Detailer does

The picture and the plan are there before the measurement begins, and the models' part is left out: what remains is
canvas, mask, kept crops, and whatever the refinement holds while it works.
"""

# ruff: noqa: E402

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from harness.comfyui import make_importable

make_importable()

import torch
import torch.nn.functional as F
from luna_refinement.batching.comfy_engine import ComfyEngine
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.picture.detections import Detection
from torch import Tensor

from harness.engines import ExactEngine, refine
from harness.seeding import generator_for

REGIONS, CROP, CHUNK_ROWS = 30, 1024, 8


class BlockEngine(ExactEngine):
    """Latents are the means of 8x8 px blocks: 64 times smaller than the crops, as with a real VAE."""

    def __init__(self) -> None:
        super().__init__(px_per_batch=ComfyEngine.px_per_batch)

    def latents(self, crops: Tensor) -> Tensor:
        return torch.cat([F.avg_pool2d(crop.movedim(-1, 0)[None], 8) for crop in crops])  # one crop at a time

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=8, mode="nearest").movedim(1, -1)


def plan_for(kind: str, side: int) -> RefinePlan:
    if kind == "tiles":
        return plan_tiles(side, side, 1, TileSettings(CROP, 0.125), seed=0)
    generator = generator_for("memory", side)
    boxes = []
    for _ in range(REGIONS):
        size = int(torch.randint(200, 800, (), generator=generator))
        x, y = (int(n) for n in torch.randint(0, side - size, (2,), generator=generator))
        boxes.append(Detection(0, (x, y, x + size, y + size)))
    return plan_detections(boxes, side, side, 1, CropSettings(CROP), seed=0)


def status_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (largest resident size since the last ``forget_peak``) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(value) * 1024


def forget_peak() -> None:
    """Sets the kernel's record of this process' largest resident size back to the present one (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    kind, side = sys.argv[1], int(sys.argv[2])
    _warm_up(kind)
    image = torch.full((1, side, side, 3), 0.5)
    plan = plan_for(kind, side)
    forget_peak()
    before = status_bytes("VmRSS")
    refined = refine(image, plan, BlockEngine(), keep_crops=kind == "regions", keep_mask=kind == "regions")
    kept = sum(crops.nbytes for crops in (refined.crops_before, refined.crops_after) if crops is not None)
    report = {
        "peak": status_bytes("VmHWM") - before,
        "canvas": refined.image.nbytes,
        "mask": 0 if refined.mask is None else refined.mask.nbytes,
        "kept": kept,
        "chunk": CHUNK_ROWS * CROP * CROP * 3 * 4,
    }
    print(json.dumps(report))


def _warm_up(kind: str) -> None:
    """A small run first: libraries load and threads start before the measurement."""
    refine(torch.full((1, 1100, 1100, 3), 0.5), plan_for(kind, 1100), BlockEngine())


if __name__ == "__main__":
    main()
