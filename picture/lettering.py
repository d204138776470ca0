"""Text in pictures: the one way in which plans and previews write labels, in whatever language they are."""

import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from PIL import ImageDraw, ImageFont

from ..texts import escaped, is_hidden

SYSTEM_FONTS = (
    # Linux: wide coverage first, then what distributions ship for Chinese, Japanese and Korean
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJK-VF.otf.ttc",
    "NotoSansCJKsc-Regular.otf", "NotoSansCJKjp-Regular.otf", "NotoSansCJKkr-Regular.otf", "NotoSansSC-Regular.ttf",
    "NotoSansJP-Regular.ttf", "NotoSansKR-Regular.ttf", "SourceHanSans-Regular.ttc", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "uming.ttc", "ipag.ttf", "ipagp.ttf",
    "fonts-japanese-gothic.ttf", "TakaoGothic.ttf", "VL-Gothic-Regular.ttf", "NanumGothic.ttf", "UnDotum.ttf",
    "unifont.otf", "unifont.ttf",
    # Windows
    "arial.ttf", "msyh.ttc", "simsun.ttc", "simhei.ttf", "YuGothM.ttc", "msgothic.ttc", "meiryo.ttc", "malgun.ttf",
    "gulim.ttc", "seguisym.ttf",
    # macOS
    "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "ヒラギノ角ゴシック W3.ttc",
    "AppleSDGothicNeo.ttc", "AppleGothic.ttf",
)  # fmt: skip
"""Looked for by Pillow in the system's font folders; those not installed are skipped."""

MOST_LETTERS = 64
"""Of a label in a picture: longer ones lose their middle."""

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Lettering:
    """A text ready to be drawn: runs of letters, each in the first font that has them.

    Attributes:
        runs: (font, letters), from left to right.
        box: left, top, right, bottom of the whole in px, drawn at (0, 0).
    """

    runs: tuple[tuple[Font, str], ...]
    box: tuple[float, float, float, float]

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], fill: tuple[int, ...]) -> None:
        """Draws the text with its (0, 0) at ``place``."""
        x, y = place
        for font, letters in self.runs:
            draw.text((x, y), letters, fill=fill, font=font)
            x += font.getlength(letters)


def letter(text: str, size: float) -> Lettering:
    """Finds fonts for a text; letters that no font has, and those without a look of their own, become their numbers.

    Args:
        text: of any origin.
        size: px.
    """
    runs = tuple(_runs(_shortened(text), fonts(size)))
    left, top, right, bottom, x = 0.0, 0.0, 0.0, 0.0, 0.0
    for place, (font, letters) in enumerate(runs):
        box = font.getbbox(letters)
        left = x + box[0] if place == 0 else min(left, x + box[0])
        top = box[1] if place == 0 else min(top, box[1])
        right, bottom = max(right, x + box[2]), max(bottom, box[3])
        x += font.getlength(letters)
    return Lettering(runs, (left, top, right, bottom))


@lru_cache(maxsize=8)
def fonts(size: float) -> tuple[Font, ...]:
    """Pillow's own font, then those of ``SYSTEM_FONTS`` that are installed."""
    found: list[Font] = [ImageFont.load_default(size=size)]
    for name in SYSTEM_FONTS:
        with suppress(OSError):  # not installed here
            found.append(ImageFont.truetype(name, size))
    return tuple(found)


def _shortened(text: str) -> str:
    text = unicodedata.normalize("NFC", text)  # a letter and its accent are one sign where there is one
    if len(text) <= MOST_LETTERS:
        return text
    half = MOST_LETTERS // 2
    return f"{text[:half]}…{text[-half:]}"


def _runs(text: str, known: tuple[Font, ...]) -> Iterator[tuple[Font, str]]:
    """The text as runs of one font each; a run goes on for as long as its font has the letters."""
    font, run = known[0], ""
    for sign in text:
        # of one font where it can be, so that words do not change their look in the middle
        owner = font if _has(font, sign) else next((other for other in known if _has(other, sign)), None)
        shown = sign if owner is not None else escaped(sign)
        if (owner or known[0]) is not font:
            if run:
                yield font, run
            font, run = owner or known[0], ""
        run += shown
    if run:
        yield font, run


@lru_cache(maxsize=4096)
def _has(font: Font, sign: str) -> bool:
    """Whether a font draws a letter otherwise than one that no font has."""
    if is_hidden(sign):
        return False
    if sign.isspace():
        return True
    try:
        return bytes(font.getmask(sign)) != bytes(font.getmask("\uffff"))
    except (OSError, ValueError, UnicodeError):  # of bitmap fonts: a letter beyond their table
        return False
