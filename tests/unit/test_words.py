"""Words as people type them, whatever their keyboard: lists, labels, and the patterns that pick labels."""

import time

import pytest
from luna_refinement.batching.concepts import Concept as RefineConcept
from luna_refinement.errors import LunaInputError
from luna_refinement.picture.detections import Detection
from luna_refinement.sam3_bridge.concepts import MOST_CONCEPTS, parse_concepts
from luna_refinement.sam3_bridge.select import parse_labels

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("comma", [",", ";", "\n", "，", "、", "；", "､"])
def test_every_comma_separates(comma: str) -> None:
    assert [concept.text for concept in parse_concepts(f"顔{comma}手")] == ["顔", "手"]
    assert parse_labels(f"顔{comma}手").wanted == ("顔", "手")
    assert RefineConcept(f"顔{comma}手").patterns == ("顔", "手")


def test_full_width_marks_are_read_as_what_they_mean() -> None:
    assert [(c.text, c.limit, c.excluded) for c in parse_concepts("顔：9，－眼鏡")] == [
        ("顔", 9, False),
        ("眼鏡", 0, True),
    ]
    assert "左手" in parse_labels("＊手")
    assert "左手" not in parse_labels("＊，－？手")


@pytest.mark.parametrize(("typed", "label"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED), ("CAFÉ", DECOMPOSED)])
def test_accents_are_the_same_however_they_are_stored(typed: str, label: str) -> None:
    assert label in parse_labels(typed)
    assert label in parse_labels("caf?")
    assert RefineConcept(typed).matches(label)
    assert RefineConcept("caf?").matches(label)
    assert Detection(0, (0, 0, 1, 1), label=label).label == COMPOSED
    assert parse_concepts(typed)[0].text.lower() == COMPOSED
    with pytest.raises(LunaInputError, match="twice"):
        parse_concepts(f"{typed}, {label}")


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("face[0]", "face[0]", "face0"),
        ("[abc]", "[abc]", "a"),
        ("[!a]*", "[!a]b", "b"),
        ("face [left*", "face [left]", "face left"),
        ("a.b", "a.b", "axb"),
        ("a\\d", "a\\d", "a1"),
    ],
)
def test_only_star_and_question_mark_are_wildcards(pattern: str, fits: str, fits_not: str) -> None:
    assert fits in parse_labels(pattern)
    assert fits_not not in parse_labels(pattern)
    assert RefineConcept(pattern).matches(fits)
    assert not RefineConcept(pattern).matches(fits_not)


def test_blanks_do_not_tell_labels_apart() -> None:
    assert "left  hand" in parse_labels(" left hand ")
    assert RefineConcept("left\thand").matches(" left hand")


def test_no_pattern_takes_long() -> None:
    start = time.process_time()
    assert "a" * 2000 not in parse_labels("*a" * 200 + "b")
    assert not RefineConcept("*?" * 300 + "b").matches("a" * 5000)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"face:{'9' * 5000}", "number above 0"),
        ("face:٣", "number above 0"),
        (", ".join(f"thing {k}" for k in range(MOST_CONCEPTS + 1)), f"{MOST_CONCEPTS + 1} concepts"),
        ("a" * 5000, "characters"),
        (None, "concepts is None"),
        (7, "concepts is 7"),
    ],
)
def test_what_is_no_concept_is_named_in_short(text: str, wanted: str) -> None:
    with pytest.raises(LunaInputError, match=wanted) as caught:
        parse_concepts(text)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", [None, 7, ["face"]])
def test_patterns_that_are_no_text_are_named(text: str) -> None:
    with pytest.raises(LunaInputError, match="labels is"):
        parse_labels(text)
    with pytest.raises(LunaInputError, match="match is"):
        RefineConcept(text)
