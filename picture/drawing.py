"""The one drawer: what a plan and a preview show lies over the picture as tints, frames and tags, in the same look."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from .boxes import Box, BoxPx, outward_px
from .detections import Detections
from .lettering import letter
from .masks import rasterise

FILL = 0.4
"""How much of its colour a tint puts over the picture."""


@dataclass(frozen=True, eq=False)
class Mark:
    """What is drawn of one region, all in one colour.

    Attributes:
        number: of the colour.
        frame: what is framed, px of the picture.
        area: what is tinted, px of the picture.
        mask: [h,w] in 0..1 that spans ``area``; None for all of it.
        text: of the tag; "" for none.
    """

    number: int
    frame: BoxPx
    area: BoxPx
    mask: Tensor | None
    text: str


def draw_detections(image: Tensor, detections: Detections) -> Tensor:
    """Draws masks, boxes, row numbers, labels and scores over their pictures.

    Args:
        image: [B,H,W,C] in 0..1.
        detections: on these pictures, at this size.

    Returns:
        [B,H,W,3] float32 in 0..1.
    """
    marks: list[list[Mark]] = [[] for _ in range(detections.image_count)]
    for row, item in enumerate(detections):
        text = " ".join(part for part in (str(row), item.label, f"{item.score:.2f}") if part)
        marks[item.image_index].append(Mark(row, item.box, item.box, item.mask, text))
    pictures = image[..., :3].detach().to(device="cpu", dtype=torch.float32).clamp(0, 1)
    return torch.stack([draw_marks(picture, each) for picture, each in zip(pictures, marks, strict=True)])


def draw_marks(picture: Tensor, marks: Sequence[Mark]) -> Tensor:
    """Draws marks over one picture [H,W,3] float32 in 0..1; lines and letters grow with its longer side.

    All tints come first, then all frames, then all tags, so that no frame crosses a tag.
    """
    height, width, _ = picture.shape
    stroke, size = max(1, round(max(height, width) / 600)), max(12.0, max(height, width) / 48)
    tinted = picture.clone()
    for mark in marks:
        _tint(tinted, mark, stroke)
    drawn = Image.fromarray((tinted * 255).round().to(torch.uint8).numpy())
    draw = ImageDraw.Draw(drawn)
    frames = [outward_px(mark.frame, width, height) for mark in marks]
    for mark, (x1, y1, x2, y2) in zip(marks, frames, strict=True):
        # Pillow draws the last px too
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour_of(mark.number), width=stroke)
    for mark, frame in zip(marks, frames, strict=True):
        if mark.text:
            _draw_tag(draw, mark, frame, size, stroke, drawn.size)
    return torch.from_numpy(np.asarray(drawn).astype(np.float32) / 255)


def colour_of(number: int) -> tuple[int, int, int]:
    """RGB of a row or pass: hues a golden ratio apart, so that neighbours are easy to tell apart."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + 0.618034 * number) % 1, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _tint(picture: Tensor, mark: Mark, stroke: int) -> None:
    """Lays a mark's colour over a picture [H,W,3] in place, with a bright rim along the edge of a mask."""
    window = outward_px(mark.area, picture.shape[1], picture.shape[0])
    mask = rasterise(mark.area, mark.mask, window)
    cover = mask * FILL
    if mark.mask is not None:
        inner = ndimage.minimum_filter(mask.numpy(), 2 * stroke + 1, mode="constant")  # nothing lies beyond the box
        cover = torch.maximum(cover, mask - torch.from_numpy(inner))
    part = picture[window.y1 : window.y2, window.x1 : window.x2]
    part.lerp_((torch.tensor(colour_of(mark.number)) / 255).expand_as(part), cover[..., None])


def _draw_tag(
    draw: ImageDraw.ImageDraw, mark: Mark, frame: Box, size: float, stroke: int, room: tuple[int, int]
) -> None:
    """A text on a plate of the mark's colour: on top of its frame, or inside for lack of room."""
    text = letter(mark.text, size)
    left, top, right, bottom = text.box
    margin = 2 * stroke + 1
    plate_width, plate_height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(frame.x1, room[0] - plate_width))
    y = frame.y1 - plate_height if frame.y1 >= plate_height else min(frame.y1, max(0, room[1] - plate_height))
    draw.rectangle((x, y, x + plate_width - 1, y + plate_height - 1), fill=colour_of(mark.number))
    text.draw(draw, (x + margin - left, y + margin - top), fill=(16, 16, 20))
