"""The plan as a picture and as text: crops, paste regions, row numbers, passes and what they cost."""

import math

import torch
from torch import Tensor

from ..picture.boxes import rescaled
from ..picture.drawing import Mark, draw_marks
from ..texts import readable
from .crops import resample
from .plan import RefinePlan, even_chunk

LONGEST_SIDE = 1536
"""px of the longer side of the drawing; larger pictures are scaled down to it."""

LEAST_LABELLED = 12
"""px of the drawing: smaller crops get no number, which would cover their neighbours too."""

DIMMED = 0.55
"""Brightness of the picture under the plan."""


def draw_plan(image: Tensor, plan: RefinePlan) -> Tensor:
    """Draws every region of a plan over its picture, dimmed: a frame around the crop, a tint over what is pasted.

    Args:
        image: [B,H,W,C] in 0..1.
        plan: made for this batch.

    Returns:
        [B,h,w,3] in 0..1, one colour per pass.
    """
    scale = min(1.0, LONGEST_SIDE / max(plan.width, plan.height))
    width, height = (max(1, round(side * scale)) for side in (plan.width, plan.height))
    marks: list[list[Mark]] = [[] for _ in range(plan.image_count)]
    for number, rows in enumerate(plan.passes):
        for region in (plan.regions[row] for row in rows):
            frame, area = (
                rescaled(box, (plan.width, plan.height), (width, height)) for box in (region.crop, region.paste)
            )
            named = max(frame[2] - frame[0], frame[3] - frame[1]) >= LEAST_LABELLED
            text = f"{region.row} {region.label}".strip() if named else ""
            marks[region.image_index].append(Mark(number, frame, area, None, text))
    drawn = [
        draw_marks(resample(picture.float(), height, width) * DIMMED, each)
        for picture, each in zip(image[..., :3].cpu(), marks, strict=True)
    ]
    return torch.stack(drawn).to(image.device)


def describe(
    plan: RefinePlan, steps: int, chunk_rows: dict[tuple[int, int], int], row_bytes: dict[tuple[int, int], int]
) -> str:
    """The plan as text: regions, passes, sampling calls and what they cost.

    Args:
        plan: the plan.
        steps: sampling steps of each call.
        chunk_rows: most rows per sampling call for each working size (height, width).
        row_bytes: estimated bytes one row takes while sampling, for each working size.
    """
    lines = [
        f"{plan.image_count} picture(s) of {plan.width}x{plan.height} px, {len(plan.regions)} region(s), "
        f"{len(plan.passes)} pass(es)"
    ]
    calls = 0
    for number, rows in enumerate(plan.passes):
        for batch in plan.batches(rows):
            size = batch[0].working_size
            chunk = even_chunk(len(batch), chunk_rows[size])
            chunks = math.ceil(len(batch) / chunk)
            calls += chunks
            lines.append(
                f"pass {number + 1}: {len(batch)} row(s) at {size[1]}x{size[0]} px in {chunks} sampling call(s), "
                f"about {chunk * row_bytes[size] / 2**20:.0f} MiB each"
            )
    lines.append(f"{calls} sampling call(s), {calls * steps} steps in all")
    for region in plan.regions:
        crop = region.crop
        name = f" {readable(region.label)}" if region.label else ""
        lines.append(
            f"row {region.row}{name}: picture {region.image_index}, crop {crop.width}x{crop.height} px at "
            f"({crop.x1}, {crop.y1}), refined at {region.working_width}x{region.working_height} px "
            f"({region.scale:.2f} of its size), score {region.score:.2f}"
        )
    return "\n".join(lines)
