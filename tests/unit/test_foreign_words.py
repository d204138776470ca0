"""Words from graphs and files in messages, notices and settings: readable, inert, and never a raw error."""

import logging
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.concepts import Concept
from luna_refinement.errors import LunaInputError, LunaRuntimeError
from luna_refinement.ip_adapter.layer_weights import parse_layer_weights, parse_numbers
from luna_refinement.nodes.concepts import LunaConcept
from luna_refinement.nodes.schema import notice
from luna_refinement.sam3_bridge.concepts import parse_concepts
from luna_refinement.texts import inert, readable

JOINER = "\u2060"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("face", "face"),
        ("人脸 é 🙂", "人脸 é 🙂"),
        ("a\nb\r\tc\x1b[31m\x00", "a\\nb\\r\\tc\\x1b[31m\\x00"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud83d half", "\\ud83d half"),
        ("x" * 3000, "x" * 1000 + " … " + "x" * 1000),
    ],
)
def test_readable_text_stays_on_its_line(text: str, wanted: str) -> None:
    assert readable(text) == wanted
    readable(text).encode()  # halves of pairs cannot be sent to the page


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("face < 3 & more", "face <_ 3 &_ more"),
        ("<img src=x>", "<_img src=x>"),
        ("&lt;", "&_lt;"),
        ("[[a|https://x.y]]", "[_[_a|https:_//x.y]]"),
        ("WWW.x.y www", "WWW_.x.y www"),
        ("face:9", "face:9"),
    ],
)
def test_inert_text_starts_no_tag_entity_or_link(text: str, wanted: str) -> None:
    assert inert(text) == wanted.replace("_", JOINER)


@settings(deadline=None)
@given(st.text(st.characters(codec=None, categories=None)))
def test_inert_text_reads_as_it_was(text: str) -> None:
    assert inert(text).replace(JOINER, "") == text.replace(JOINER, "")
    assert "<i" not in inert(text + "<i")


@pytest.mark.parametrize("kind", [LunaInputError, LunaRuntimeError])
def test_an_error_keeps_its_own_lines_and_writes_controls_as_escapes(kind: type[Exception]) -> None:
    assert str(kind("boxes: '\x1b[2J\x00'\nsecond line")) == "boxes: '\\x1b[2J\\x00'\nsecond line"
    assert len(str(kind("a" * 10**6))) < 3000


def test_a_notice_cannot_write_a_line_of_its_own_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="luna"):
        shown = notice("labels: a\nERROR %s all is lost\x1b[31m", "second")
    assert shown == {"text": ("labels: a\\nERROR %s all is lost\\x1b[31m", "second")}
    assert [record.getMessage() for record in caplog.records] == list(shown["text"])


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000 + ":1", "3:" + "9" * 5000, "3:1e400", "3:1e38", "3:nan", "3:-inf",
        "output." + "9" * 5000 + ":1", "²:1",
        "٣:1", "3:1_0_", "3", ":", "3:", ":1", "output.1.2.3:1", "3:0x10", "\x00:1", "3:1:1", "1-999999999:1",
    ],
)  # fmt: skip
def test_layer_weights_that_cannot_be_are_refused(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(LunaInputError, match="layer_weights"):
        parse_layer_weights(text)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", ["9" * 5000, "1e39", "nan", "1, x", "1 2", "\x00", "1e-400, 101", "--1"])
def test_numbers_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(LunaInputError, match="row_weights holds"):
        parse_numbers(text, "row_weights")


def test_weights_within_reason_are_read() -> None:
    assert parse_layer_weights("3:0.5, output.4:1.2; middle:-100\n0:1e2") == (
        ("3", 0.5),
        ("output.4", 1.2),
        ("middle", -100.0),
        ("0", 100.0),
    )
    assert parse_numbers("1, .5\n-2e0", "row_curve") == (1.0, 0.5, -2.0)


@pytest.mark.parametrize("text", ["0:1，1：0.5；2:-1", "0:1、1:0.5\r2:-1", " ;0:1;; 1:0.5\n\n2:-1,"])
def test_lists_of_weights_are_split_as_all_lists_are(text: str) -> None:
    """With the marks of other keyboards too."""
    assert parse_layer_weights(text) == (("0", 1.0), ("1", 0.5), ("2", -1.0))
    assert parse_numbers("1，0.5、; -1", "row_weights") == (1.0, 0.5, -1.0)


@pytest.mark.parametrize(
    "text", ["face:" + "9" * 5000, "face:0", "face:-1", "face:1.5", "face:٣", "face:²", "-face:3", "", ","]
)
def test_concepts_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(LunaInputError, match="concepts"):
        parse_concepts(text)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec=None, categories=None)) | st.from_regex(r"[0-9:.,;a-z*?\[\]+-]{0,40}", fullmatch=True)
)
def test_only_declared_errors_come_out_of_any_text(text: str) -> None:
    for read in (parse_layer_weights, lambda given: parse_numbers(given, "row_curve"), parse_concepts, Concept):
        with suppress(LunaInputError):
            assert read(text) is not None


def concept(**settings: Any) -> Concept:
    given = {"match": "face", "ip_adapter_weight": -1.0, "denoise": -1.0, "lora": "none", "strength": 1.0}
    return LunaConcept.execute(**(given | settings)).args[0][0]


@pytest.mark.parametrize(("given_weight", "wanted"), [(-1.0, None), (-0.95, -0.95), (0.0, 0.0), (0.8, 0.8), (5.0, 5.0)])
def test_minus_one_alone_keeps_the_refiners_anchor_weight(given_weight: float, wanted: float | None) -> None:
    assert concept(ip_adapter_weight=given_weight).ip_adapter_weight == wanted


def test_the_concept_says_which_weights_are_its_own() -> None:
    (weight,) = (entry for entry in LunaConcept.GET_SCHEMA().inputs if entry.id == "ip_adapter_weight")
    assert weight.default == weight.min == -1.0
    assert "-1 keeps the refiner's" in weight.tooltip
    assert "above -1" in weight.tooltip
