"""A prompt of another family of models is refused by its name before the model is called once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import tiny
from builders.refining import Studio, counting, detections, photograph
from luna_refinement.batching.comfy_prompts import check_prompts
from luna_refinement.batching.concepts import Concept
from luna_refinement.errors import LunaInputError

Prompt = list[list[Any]]


def without(prompt: Prompt, field: str) -> Prompt:
    return [[text, {key: value for key, value in fields.items() if key != field}] for text, fields in prompt]


def with_pooled(prompt: Prompt, width: int) -> Prompt:
    return [[text, fields | {"pooled_output": torch.zeros(1, width)}] for text, fields in prompt]


def wide(width: int) -> Prompt:
    return [[torch.zeros(1, 77, width), {"pooled_output": torch.zeros(1, 16)}]]


CASES: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    ("sdxl", lambda: {"positive": tiny.conditioning("sd15")}, "positive holds text 768 wide, model reads text 2048"),
    ("sdxl", lambda: {"negative": tiny.conditioning("sd15")}, "negative holds text 768 wide"),
    ("sd15", lambda: {"positive": tiny.conditioning("sdxl")}, "positive holds text 2048 wide, model reads text 768"),
    (
        "sdxl",
        lambda: {"negative": without(tiny.conditioning("sdxl"), "pooled_output")},
        "negative lacks pooled_output",
    ),
    ("sdxl", lambda: {"positive": with_pooled(tiny.conditioning("sdxl"), 768)}, r"positive makes a vector \d+ wide"),
]


@pytest.mark.parametrize(("family", "settings", "match"), CASES, ids=[row[2] for row in CASES])
def test_a_prompt_of_another_family_is_refused(
    studio: Studio, family: str, settings: Callable[[], dict[str, Any]], match: str
) -> None:
    if studio.family != family:
        pytest.skip("of the other family's case")
    model, calls = counting(studio.model)
    image = photograph()
    with pytest.raises(LunaInputError, match=match):
        studio.detail(image, detections(image), model=model, **settings())
    with pytest.raises(LunaInputError, match=match):
        studio.chess(image, model=model, **settings())
    assert not calls


def test_a_concepts_prompt_is_named_by_its_pattern(studio: Studio) -> None:
    other = tiny.conditioning("sd15" if studio.family == "sdxl" else "sdxl")
    model, calls = counting(studio.model)
    image = photograph()
    with pytest.raises(LunaInputError, match=r"negative of concept 'hand\*' holds text"):
        studio.detail(image, detections(image), model=model, concepts=(Concept("hand*", negative=other),))
    assert not calls


def test_models_that_are_no_unet_tell_their_width_too() -> None:
    check_prompts(tiny.flux(), {"positive": wide(16)})
    with pytest.raises(LunaInputError, match="positive holds text 768 wide, model reads text 16 wide"):
        check_prompts(tiny.flux(), {"positive": wide(768)})
    with pytest.raises(LunaInputError, match="positive lacks pooled_output"):
        check_prompts(tiny.flux(), {"positive": without(wide(16), "pooled_output")})
