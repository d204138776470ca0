"""The plan as a picture: crops, paste regions, row numbers and passes, drawn over the dimmed input."""

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..lettering import letter
from ..texts import readable
from .crops import resample
from .plan import RefinePlan, Region, even_chunk

LONGEST_SIDE = 1536
"""px of the longer side of the drawing; larger pictures are scaled down to it."""

LEAST_LABELLED = 12
"""px of the drawing: smaller crops get no number, which would cover their neighbours too."""


def draw_plan(image: Tensor, plan: RefinePlan) -> Tensor:
    """Draws every region of a plan over its picture, one colour per pass.

    Args:
        image: [B,H,W,C] in 0..1.
        plan: made for this batch.

    Returns:
        [B,h,w,3] in 0..1.
    """
    scale = min(1.0, LONGEST_SIDE / max(plan.width, plan.height))
    size = (max(1, round(plan.height * scale)), max(1, round(plan.width * scale)))
    pass_of = {row: number for number, rows in enumerate(plan.passes) for row in rows}
    on_picture: list[list[Region]] = [[] for _ in range(plan.image_count)]
    for region in plan.regions:
        on_picture[region.image_index].append(region)
    drawn = [
        _draw_one(resample(picture.float(), *size), regions, pass_of, scale)
        for picture, regions in zip(image[..., :3].cpu(), on_picture, strict=True)
    ]
    return torch.stack(drawn).to(image.device)


def _draw_one(picture: Tensor, regions: list[Region], pass_of: dict[int, int], scale: float) -> Tensor:
    dimmed = Image.fromarray((picture * 0.55 * 255).round().to(torch.uint8).numpy()).convert("RGBA")
    fills = Image.new("RGBA", dimmed.size)
    lines = Image.new("RGBA", dimmed.size)
    fill, line = ImageDraw.Draw(fills), ImageDraw.Draw(lines)
    stroke = max(1, round(max(dimmed.size) / 500))
    size = max(10, max(dimmed.size) / 45)
    for region in regions:
        _draw_region(fill, line, region, pass_of[region.row], scale, stroke, size)
    drawn = Image.alpha_composite(Image.alpha_composite(dimmed, fills), lines).convert("RGB")
    return torch.from_numpy(np.asarray(drawn).astype(np.float32) / 255)


def _draw_region(
    fill: ImageDraw.ImageDraw,
    line: ImageDraw.ImageDraw,
    region: Region,
    turn: int,
    scale: float,
    stroke: int,
    size: float,
) -> None:
    colour = pass_colour(turn)
    crop = tuple(value * scale for value in (region.crop.x1, region.crop.y1, region.crop.x2, region.crop.y2))
    paste = tuple(value * scale for value in (region.paste.x1, region.paste.y1, region.paste.x2, region.paste.y2))
    fill.rectangle(paste, fill=(*colour, 70))
    line.rectangle(crop, outline=(*colour, 255), width=stroke)
    if max(crop[2] - crop[0], crop[3] - crop[1]) < LEAST_LABELLED:
        return
    text = letter(f"{region.row} {region.label}".strip(), size)
    left, top = max(crop[0], 0) + 3 * stroke, max(crop[1], 0) + 2 * stroke
    box = tuple(value + start for value, start in zip(text.box, (left, top) * 2, strict=True))
    line.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), fill=(0, 0, 0, 170))
    text.draw(line, (left, top), fill=(255, 255, 255, 255))


def pass_colour(turn: int) -> tuple[int, int, int]:
    """RGB of a pass: hues a golden ratio apart, so that neighbouring passes are easy to tell apart."""
    red, green, blue = colorsys.hsv_to_rgb((0.55 + 0.618034 * turn) % 1, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


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
