"""Detections as pictures: one mask for a picture or for each detection, and a drawing with boxes, labels and scores."""

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..lettering import letter
from .detections import Detection, Detections, outward_px, rasterise

FILL = 0.4
"""How much of its colour a mask puts over the picture."""


def union_masks(detections: Detections) -> Tensor:
    """What all detections of each picture cover together: [B,H,W] float32 in 0..1."""
    masks = torch.zeros(detections.image_count, detections.height, detections.width)
    for item in detections:
        _draw_mask(masks[item.image_index], item)
    return masks


def single_masks(detections: Detections) -> Tensor:
    """What each detection covers: [N,H,W] float32 in 0..1, in order."""
    masks = torch.zeros(len(detections), detections.height, detections.width)
    for mask, item in zip(masks, detections, strict=True):
        _draw_mask(mask, item)
    return masks


def draw_detections(image: Tensor, detections: Detections) -> Tensor:
    """Draws masks, boxes, row numbers, labels and scores over their pictures.

    Args:
        image: [B,H,W,C] in 0..1.
        detections: on these pictures, at this size.

    Returns:
        [B,H,W,3] float32 in 0..1.
    """
    numbered: list[list[tuple[int, Detection]]] = [[] for _ in range(detections.image_count)]
    for row, item in enumerate(detections):
        numbered[item.image_index].append((row, item))
    pictures = image[..., :3].detach().to(device="cpu", dtype=torch.float32).clamp(0, 1)
    return torch.stack([_draw_one(picture, items) for picture, items in zip(pictures, numbered, strict=True)])


def row_colour(row: int) -> tuple[int, int, int]:
    """RGB of a row: hues a golden ratio apart, so that neighbours are easy to tell apart."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + 0.618034 * row) % 1, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_mask(canvas: Tensor, item: Detection) -> None:
    """Adds one detection to a mask [H,W] in place; only the box is touched."""
    x1, y1, x2, y2 = window = outward_px(item.box, canvas.shape[1], canvas.shape[0])
    part = canvas[y1:y2, x1:x2]
    torch.maximum(part, rasterise(item, window), out=part)


def _draw_one(picture: Tensor, items: list[tuple[int, Detection]]) -> Tensor:
    height, width, _ = picture.shape
    longer = max(height, width)
    stroke = max(1, round(longer / 600))
    tinted = picture.clone()
    for row, item in items:
        _tint(tinted, item, torch.tensor(row_colour(row)) / 255, stroke)
    drawn = Image.fromarray((tinted * 255).round().to(torch.uint8).numpy())
    draw = ImageDraw.Draw(drawn)
    size = max(12.0, longer / 48)
    for row, item in items:
        draw.rectangle(_inside(item, width, height), outline=row_colour(row), width=stroke)
    for row, item in items:  # after all boxes, so that no box crosses a label
        _draw_tag(draw, row, item, size, stroke, width, height)
    return torch.from_numpy(np.asarray(drawn).astype(np.float32) / 255)


def _tint(picture: Tensor, item: Detection, colour: Tensor, stroke: int) -> None:
    """Lays a mask's colour over a picture [H,W,3] in place, with a bright rim along the mask's edge."""
    x1, y1, x2, y2 = window = outward_px(item.box, picture.shape[1], picture.shape[0])
    mask = rasterise(item, window)
    eroded = _eroded(mask, stroke)
    cover = torch.maximum(mask * FILL, mask - eroded) if item.mask is not None else mask * FILL
    part = picture[y1:y2, x1:x2]
    part.lerp_(colour.expand_as(part), cover[..., None])


def _eroded(mask: Tensor, px: int) -> Tensor:
    """A mask [h,w] drawn in by ``px`` on every side; beyond its box there is nothing."""
    outside = 1 - F.pad(mask[None, None], (px,) * 4)
    grown = F.max_pool2d(outside, (2 * px + 1, 1), stride=1)  # rows, then columns: a square in two passes
    return 1 - F.max_pool2d(grown, (1, 2 * px + 1), stride=1)[0, 0]


def _inside(item: Detection, width: int, height: int) -> tuple[int, int, int, int]:
    """A box as PIL draws it, its last px included."""
    x1, y1, x2, y2 = outward_px(item.box, width, height)
    return x1, y1, x2 - 1, y2 - 1


def _draw_tag(
    draw: ImageDraw.ImageDraw, row: int, item: Detection, size: float, stroke: int, width: int, height: int
) -> None:
    """Row number, label and score on a plate of the row's colour: on top of the box, or inside for lack of room."""
    text = letter(" ".join(part for part in (str(row), item.label, f"{item.score:.2f}") if part), size)
    left, top, right, bottom = text.box
    margin = 2 * stroke + 1
    plate_width, plate_height = right - left + 2 * margin, bottom - top + 2 * margin
    x1, y1, _, _ = _inside(item, width, height)
    x = max(0, min(x1, width - plate_width))
    y = y1 - plate_height if y1 >= plate_height else min(y1, max(0, height - plate_height))
    draw.rectangle((x, y, x + plate_width - 1, y + plate_height - 1), fill=row_colour(row))
    text.draw(draw, (x + margin - left, y + margin - top), fill=(16, 16, 20))
