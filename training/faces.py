"""The faces the small models learn: pictures of the Noto Color Emoji font, some kept out of training for the evidence.

Debian's package ``fonts-noto-color-emoji`` carries the font (SIL Open Font License 1.1). A kind is one drawing; people
come in six skin tones, which Pillow's shaping layout (raqm) puts together, and are kept out with all of their tones.
"""

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)
FONT_PX = 109  # the only size of the font's bitmaps
BITMAP = (136, 128)

_SMILEYS = (
    *range(0x1F600, 0x1F645),
    *range(0x1F910, 0x1F918),
    *range(0x1F920, 0x1F926),
    *range(0x1F927, 0x1F930),
    *range(0x1F970, 0x1F977),
    0x1F97A,
    0x1F9D0,
    *range(0x1F479, 0x1F47C),
    *range(0x1F47D, 0x1F481),
    0x1F383,
    0x1F31A,
    *range(0x1F31C, 0x1F31F),
)
_ANIMALS = (*range(0x1F42D, 0x1F43E), 0x1F981, 0x1F984, 0x1F98A, 0x1F98C, 0x1F992, 0x1F993, 0x1F994, 0x1F98D)
_PEOPLE = (
    *range(0x1F466, 0x1F46A),
    *range(0x1F470, 0x1F479),
    0x1F47C,
    0x1F482,
    *range(0x1F934, 0x1F937),
    *range(0x1F9D1, 0x1F9D7),
)
_HAIR = range(0x1F9B0, 0x1F9B4)
_TONES = range(0x1F3FB, 0x1F400)

KEPT_OUT = {"drawn": 18, "people": 4}
"""Kinds that no training step sees: about a tenth."""


@dataclass(frozen=True)
class Kind:
    """One drawing.

    Attributes:
        group: "drawn" (smileys and animals) or "people".
        texts: the character sequences that show it; people have one for each skin tone.
    """

    group: str
    texts: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join(f"{ord(c):X}" for c in self.texts[0])


def training_kinds() -> list[Kind]:
    """The kinds that may be learnt from."""
    return _split()[0]


def kept_out_kinds() -> list[Kind]:
    """The kinds for the evidence and the demo."""
    return _split()[1]


@lru_cache
def draw(text: str) -> Image.Image | None:
    """The font's own bitmap, RGBA about 136x128 px; None where the font has no single drawing for the sequence."""
    picture = Image.new("RGBA", (2 * BITMAP[0], BITMAP[1]), (0, 0, 0, 0))
    ImageDraw.Draw(picture).text((0, 0), text, font=_font(), embedded_color=True)
    box = picture.getbbox()
    if box is None or not 60 < box[2] - box[0] <= BITMAP[0]:
        return None
    return picture.crop(box)


def font_file() -> str | None:
    """Path of the font, None where it is not installed."""
    return next((path for path in (os.environ.get("LUNA_EMOJI_FONT"), *FONTS) if path and Path(path).is_file()), None)


@lru_cache
def _split() -> tuple[list[Kind], list[Kind]]:
    learnt: list[Kind] = []
    kept_out: list[Kind] = []
    for group, kinds in (("drawn", _drawn()), ("people", _people())):
        chosen = set(random.Random(f"kept out {group}").sample(range(len(kinds)), KEPT_OUT[group]))
        learnt += [kind for place, kind in enumerate(kinds) if place not in chosen]
        kept_out += [kinds[place] for place in sorted(chosen)]
    return learnt, kept_out


def _drawn() -> list[Kind]:
    return _kinds("drawn", ((chr(code),) for code in (*_SMILEYS, *_ANIMALS)))


def _people() -> list[Kind]:
    tones = [chr(tone) for tone in _TONES]
    bases = [(chr(code), "") for code in _PEOPLE]
    bases += [(chr(code), "‍" + chr(hair)) for code in (0x1F468, 0x1F469) for hair in _HAIR]
    return _kinds("people", ((base + rest, *(base + tone + rest for tone in tones)) for base, rest in bases))


def _kinds(group: str, sequences: Iterable[tuple[str, ...]]) -> list[Kind]:
    drawn = (tuple(text for text in texts if draw(text) is not None) for texts in sequences)
    return [Kind(group, texts) for texts in drawn if texts]


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    path = font_file()
    if path is None:
        raise FileNotFoundError(
            "the font NotoColorEmoji.ttf is missing: install the package fonts-noto-color-emoji, "
            "or set LUNA_EMOJI_FONT to the file"
        )
    return ImageFont.truetype(path, FONT_PX, layout_engine=ImageFont.Layout.RAQM)
