"""Pictures for ComfyUI's input folder: photographs that ship inside Python packages, and what the demo starts from."""

from collections.abc import Iterable
from pathlib import Path

import skimage.data
from PIL import Image, ImageDraw

from harness.assets import ASTRONAUT, PAINTED_ASTRONAUT, PAINTED_FACES
from training.scenes import FACES, SCENES, Box

REGIONS = {
    "face": (180, 68, 272, 194),
    "mission patch": (134, 348, 208, 424),
    "name tag": (278, 340, 330, 380),
    "shuttle": (360, 60, 448, 256),
    "helmet": (300, 372, 500, 508),
}
"""x1, y1, x2, y2 px of things on the astronaut's photograph."""


def astronaut() -> Image.Image:
    """512x512 px, RGB, public domain."""
    return Image.fromarray(skimage.data.astronaut())


def painted_astronaut() -> Image.Image:
    """The photograph with an ellipse over each region erased from its alpha, as ComfyUI's mask editor saves a mask."""
    return _painted(astronaut(), REGIONS.values())


def painted_faces() -> Image.Image:
    """What the demo starts from, with its nine faces painted in the same way."""
    return _painted(FACES.degraded(), [face.box for face in FACES.faces])


def _painted(picture: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    alpha = Image.new("L", picture.size, 255)
    for box in boxes:
        ImageDraw.Draw(alpha).ellipse(box, fill=0)
    painted = picture.convert("RGBA")
    painted.putalpha(alpha)
    return painted


def write_pictures(input_dir: Path) -> None:
    input_dir.mkdir(parents=True, exist_ok=True)
    astronaut().save(input_dir / ASTRONAUT)
    painted_astronaut().save(input_dir / PAINTED_ASTRONAUT)
    painted_faces().save(input_dir / PAINTED_FACES)
    for scene in SCENES:
        scene.degraded().save(input_dir / scene.input_name)
