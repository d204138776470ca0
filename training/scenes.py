"""The demo's scenes: faces that no training step has seen, on a free photograph.

``demo/*.jpg`` are the scenes as they should look; ``python -m training.scenes`` draws them anew, which needs the font.
What the demo starts from is made of these files: a small, noisy JPEG brought back to size.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import skimage.data
from PIL import Image, ImageFilter

FOLDER = Path(__file__).resolve().parent.parent / "demo"
FACE_PX = 112  # refined at 192 px with some room around it, which is what the models have learnt
SHRINK = 5.3  # how many times smaller the degraded picture once was
QUALITY = 93  # of the shipped JPEG files

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Face:
    """A drawn face and the square it fills.

    Attributes:
        name: what the demo calls it.
        text: the character sequence that shows it.
        centre: x, y px.
    """

    name: str
    text: str
    centre: tuple[int, int]

    @property
    def box(self) -> Box:
        """x1, y1, x2, y2 px."""
        return self.around(0)

    def around(self, px: int) -> Box:
        """The square with so many px on each side of it."""
        (x, y), reach = self.centre, FACE_PX // 2 + px
        return x - reach, y - reach, x + reach, y + reach


@dataclass(frozen=True)
class Scene:
    """Faces on a part of a photograph.

    Attributes:
        name: of its files.
        photograph: function of ``skimage.data``.
        part: x1, y1, x2, y2 px of the photograph.
        size: width and height of the scene.
        blur: px, of the photograph, as a lens leaves what is far behind.
        faces: in the order of the detections.
    """

    name: str
    photograph: str
    part: Box
    size: tuple[int, int]
    blur: float
    faces: tuple[Face, ...]

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.jpg"

    @property
    def input_name(self) -> str:
        """Of the degraded picture in ComfyUI's input folder."""
        return f"luna_{self.name}.png"

    def boxes_json(self) -> str:
        """The faces as the node for boxes reads them."""
        boxes, labels = [face.box for face in self.faces], [face.name for face in self.faces]
        return json.dumps({"boxes": boxes, "labels": labels})

    def truth(self) -> Image.Image:
        """The shipped picture, RGB."""
        return Image.open(self.file).convert("RGB")

    def degraded(self) -> Image.Image:
        """What is left of the shipped picture after it was made small, noisy and JPEG."""
        from training import pictures

        return pictures.degrade(self.truth(), random.Random(self.name), SHRINK, SHRINK)

    def draw(self) -> Image.Image:
        """The scene anew, RGB."""
        from training import faces

        photograph = Image.fromarray(getattr(skimage.data, self.photograph)()).convert("RGB")
        picture = photograph.crop(self.part).resize(self.size, Image.Resampling.LANCZOS)
        picture = picture.filter(ImageFilter.GaussianBlur(self.blur))
        for face in self.faces:
            drawn = faces.draw(face.text)
            if drawn is None:
                raise ValueError(f"the font has no single drawing of {face.name}")
            scale = FACE_PX / max(drawn.size)
            drawn = drawn.resize((round(drawn.width * scale), round(drawn.height * scale)), Image.Resampling.LANCZOS)
            x, y = (place - extent // 2 for place, extent in zip(face.centre, drawn.size, strict=True))
            picture.paste(drawn, (x, y), drawn)
        return picture


def _placed(named: dict[str, str], place: Callable[[int], tuple[float, float]]) -> tuple[Face, ...]:
    spots = (place(number) for number in range(len(named)))
    return tuple(
        Face(name, text, (round(x), round(y))) for (name, text), (x, y) in zip(named.items(), spots, strict=True)
    )


_RING = {
    "star-struck": "\U0001f929",
    "tiger": "\U0001f42f",
    "sunglasses": "\U0001f60e",
    "person": "\U0001f9d1\U0001f3fe",
    "eyebrow": "\U0001f928",
    "tears of joy": "\U0001f602",
    "hamster": "\U0001f439",
    "baby": "\U0001f476\U0001f3fd",
    "angry": "\U0001f621",
}
_CROWD = {
    "moon": "\U0001f31a",
    "red hair": "\U0001f468\U0001f3fb\u200d\U0001f9b0",
    "confused": "\U0001f615",
    "hamster": "\U0001f439",
    "tuxedo": "\U0001f935\U0001f3ff",
    "yum": "\U0001f60b",
    "astonished": "\U0001f632",
    "person": "\U0001f9d1\U0001f3fc",
    "rolling": "\U0001f923",
    "robot": "\U0001f916",
    "smile": "\U0001f642",
    "baby": "\U0001f476\U0001f3fb",
    "eyebrow": "\U0001f928",
    "tiger": "\U0001f42f",
    "persevering": "\U0001f623",
    "sunglasses": "\U0001f60e",
    "dark person": "\U0001f9d1\U0001f3ff",
    "dragon": "\U0001f432",
    "sweat": "\U0001f613",
    "star-struck": "\U0001f929",
    "angry": "\U0001f621",
    "tears of joy": "\U0001f602",
}


def _around_the_rocket(number: int) -> tuple[float, float]:
    angle = 2 * math.pi * number / len(_RING)
    return 288 + 217 * math.sin(angle), 288 - 217 * math.cos(angle)


def _in_rows(number: int) -> tuple[float, float]:
    """Rows of six and five in turn, 144 px apart."""
    row, place = 2 * (number // 11), number % 11
    if place >= 6:
        row, place = row + 1, place - 6
    return 72 + 144 * place + 72 * (row % 2), 72 + 144 * row


FACES = Scene("faces", "rocket", (108, 0, 535, 427), (576, 576), 0, _placed(_RING, _around_the_rocket))
CROWD = Scene("crowd", "coffee", (0, 0, 600, 400), (864, 576), 4, _placed(_CROWD, _in_rows))
SCENES = (FACES, CROWD)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for scene in SCENES:
        scene.draw().save(scene.file, quality=QUALITY, subsampling=0)
        print(f"{scene.file}: {scene.file.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
