"""Labels in pictures: a letter is drawn by a font that has it, or shown by its number; never a box, never nothing."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.drawing import describe, draw_plan
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.picture import lettering
from luna_refinement.picture.detections import Detection, Detections
from luna_refinement.picture.drawing import colour_of, draw_detections
from luna_refinement.picture.lettering import fonts, letter
from PIL import Image, ImageDraw

CJK = "人脸顔手얼굴かお"


def make_font(path: Path, letters: str) -> None:
    """A real TrueType font: every letter is a bar of a height of its own, what it lacks an empty frame."""
    names = [".notdef", *(f"glyph{number}" for number in range(len(letters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(sign): name for sign, name in zip(letters, names[1:], strict=True)})
    glyphs = {}
    for number, name in enumerate(names):
        pen = TTGlyphPen(None)
        corners = [(50, 0), (50, 300 + 60 * number), (800, 300 + 60 * number), (800, 0)]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 50)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, sTypoDescender=-200)
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


@pytest.fixture(autouse=True)
def fresh_fonts() -> Iterator[None]:
    fonts.cache_clear()
    yield
    fonts.cache_clear()


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ("no such font.ttf",))


@pytest.fixture
def cjk_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A font of a listed name in the user's own font folder, where Pillow looks on Linux."""
    if not sys.platform.startswith("linux"):
        pytest.skip("Pillow looks for fonts in other folders here")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "nothing"))
    make_font(tmp_path / "fonts" / "wqy-microhei.ttc", CJK)


def shown(text: str) -> str:
    """The letters that are drawn for a text."""
    return "".join(letters for _, letters in letter(text, 16).runs)


def tag(label: str) -> torch.Tensor:
    """The preview of a detection of this label."""
    return draw_detections(torch.zeros(1, 200, 300, 3), found(label))


def found(label: str) -> Detections:
    return Detections((Detection(0, (10, 60, 100, 100), label=label),), 300, 200)


def plan_of(label: str) -> RefinePlan:
    return plan_detections(found(label).items, 300, 200, 1, CropSettings(64, 0.1, 4, "mask", "together"), seed=0)


def planned(label: str) -> torch.Tensor:
    return draw_plan(torch.zeros(1, 200, 300, 3), plan_of(label))


@pytest.mark.usefixtures("no_system_fonts")
@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ("face", "face"),
        ("人脸", "\\u4eba\\u8138"),
        ("face 顔", "face \\u9854"),
        ("рука", "\\u0440\\u0443\\u043a\\u0430"),
        ("🙂", "\\U0001f642"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x00\x1b[31m", "\\x00\\x1b[31m"),
        ("\ud800x", "\\ud800x"),
        ("\u202eevil", "\\u202eevil"),
        ("", ""),
    ],
)
def test_what_no_font_has_is_shown_by_its_number(label: str, wanted: str) -> None:
    assert shown(label) == wanted


@pytest.mark.usefixtures("cjk_font")
def test_chinese_japanese_and_korean_are_drawn_by_a_font_that_has_them() -> None:
    assert shown("face 人脸 顔 얼굴 かお!") == "face 人脸 顔 얼굴 かお!"
    assert len({tag(sign).numpy().tobytes() for sign in CJK}) == len(CJK)
    assert len({planned(sign).numpy().tobytes() for sign in CJK}) == len(CJK)
    assert shown("嘴") == "\\u5634"  # not in that font


@pytest.mark.usefixtures("cjk_font")
def test_runs_of_several_fonts_stand_side_by_side() -> None:
    """Nothing is drawn outside the box that the text claims, and no run over another."""
    text = letter("ab人脸cd", 20)
    assert [letters for _, letters in text.runs] == ["ab", "人脸", "cd"]
    picture = Image.new("L", (300, 80))
    text.draw(ImageDraw.Draw(picture), (50, 20), fill=(255,))
    left, top, right, bottom = picture.getbbox()  # type: ignore[misc]
    assert 50 + text.box[0] - 1 <= left < right <= 50 + text.box[2] + 1
    assert 20 + text.box[1] - 1 <= top < bottom <= 20 + text.box[3] + 1
    widths = [font.getlength(letters) for font, letters in text.runs]
    assert right - left == pytest.approx(sum(widths), abs=4)


def test_a_letter_and_its_accent_are_one_sign() -> None:
    assert shown("e\u0301") == shown("é")


def test_a_long_label_keeps_its_start_and_its_end() -> None:
    text = shown("start" + "x" * 10_000 + "end")
    assert text.startswith("startx")
    assert text.endswith("xend")
    assert len(text) < 100


def test_the_text_of_a_plan_stays_on_its_line() -> None:
    text = describe(plan_of("a\nrow 7: nothing\x1b[2J"), 4, {(64, 64): 1}, {(64, 64): 2**20})
    assert [line for line in text.split("\n") if line.startswith("row")] == [
        line for line in text.split("\n") if "a row 7: nothing [2J" in line
    ]
    assert "\x1b" not in text


def plate_rows(drawn: torch.Tensor) -> list[int]:
    """The rows of a drawing [1,H,W,3] with px of a tag's plate or its frame."""
    plate = torch.isclose(drawn[0], torch.tensor(colour_of(0)) / 255, atol=0.01).all(dim=-1)
    return plate.any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("side", [300, 1200])
def test_plan_and_preview_letter_alike(side: int) -> None:
    """The same plate of the same colour and height on the same frame: a crop without padding is its detection."""
    box = (side * 0.25, side * 0.25, side * 0.75, side * 0.75)
    found = Detections((Detection(0, box, label="face"),), side, side)
    plan = plan_detections(found.items, side, side, 1, CropSettings(64, 0, 0), seed=0)
    image = torch.zeros(1, side, side, 3)
    preview, planned = plate_rows(draw_detections(image, found)), plate_rows(draw_plan(image, plan))
    above = [row for row in preview if row < box[1]]
    assert len(above) > 12
    assert above == [row for row in planned if row < box[1]]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec=None, categories=None), max_size=80))
def test_any_label_is_drawn_in_preview_and_plan(label: str) -> None:
    for drawn in (tag(label), planned(label)):
        assert drawn.shape == (1, 200, 300, 3)
        assert torch.isfinite(drawn).all()
    assert shown(label).strip() or not label.strip()
