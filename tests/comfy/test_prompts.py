"""A prompt of another family of models, or a size too small for the model, is refused before the model is called."""

from typing import Any

import pytest
import torch
from luna_refinement.batching.comfy_prompts import check_prompts
from luna_refinement.batching.concepts import Concept
from luna_refinement.batching.crop_plan import SMALLEST_WORKING
from luna_refinement.errors import LunaInputError

from harness import tiny
from harness.refining import Studio, counting, detections, photograph

Prompt = list[list[Any]]


def without(prompt: Prompt, field: str) -> Prompt:
    return [[text, {key: value for key, value in fields.items() if key != field}] for text, fields in prompt]


def with_pooled(prompt: Prompt, width: int) -> Prompt:
    return [[text, fields | {"pooled_output": torch.zeros(1, width)}] for text, fields in prompt]


def wide(width: int) -> Prompt:
    return [[torch.zeros(1, 77, width), {"pooled_output": torch.zeros(1, 16)}]]


def cases(family: tiny.Family) -> list[tuple[str, Prompt, str]]:
    """Input, prompt and what is said about it."""
    if family == "sd15":
        return [("positive", tiny.conditioning("sdxl"), "positive holds text 2048 wide, model reads text 768 wide")]
    own = tiny.conditioning("sdxl")
    return [
        ("positive", tiny.conditioning("sd15"), "positive holds text 768 wide, model reads text 2048 wide"),
        ("negative", tiny.conditioning("sd15"), "negative holds text 768 wide"),
        ("negative", without(own, "pooled_output"), "negative lacks pooled_output"),
        ("positive", with_pooled(own, 768), r"positive makes a vector \d+ wide"),
    ]


def test_a_prompt_of_another_family_is_refused(studio: Studio) -> None:
    model, calls = counting(studio.model)
    image = photograph()
    for name, prompt, match in cases(studio.family):
        with pytest.raises(LunaInputError, match=match):
            studio.detail(image, detections(image), model=model, **{name: prompt})
        with pytest.raises(LunaInputError, match=match):
            studio.chess(image, model=model, **{name: prompt})
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


def test_a_missing_vector_is_told_where_this_comfyui_needs_it() -> None:
    """Newer releases give Flux zeros instead of a vector that is missing."""
    flux, incomplete = tiny.flux(), {"positive": without(wide(16), "pooled_output")}
    try:
        flux.model.encode_adm()
    except KeyError:
        with pytest.raises(LunaInputError, match="positive lacks pooled_output"):
            check_prompts(flux, incomplete)
    else:
        check_prompts(flux, incomplete)


SMALLEST = {"sd15": 64, "sdxl": 32}
"""px whose latent is a single px on the UNet's innermost level; the small models have one channel in each group."""


@pytest.mark.parametrize("crop_size", [8, 16, 24, 32, 40, 64, 72])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_every_crop_size_works_or_is_refused_by_its_name(studio: Studio, crop_size: int, cfg: float) -> None:
    model, calls = counting(studio.model)
    image = photograph(1, 96, 96)
    found = detections(image, [(30.0, 30.0, 70.0, 80.0)])
    settings: dict[str, Any] = {"model": model, "cfg": cfg, "crop_size": crop_size, "steps": 1}
    if crop_size < SMALLEST_WORKING:
        refusal = f"crop_size is {crop_size}: use a multiple of 8 from {SMALLEST_WORKING} on"
    elif cfg == 1 and crop_size <= SMALLEST[studio.family]:
        refusal = f"crop_size is {crop_size}: .* more than {SMALLEST[studio.family]}"
    else:
        refusal = None
    if refusal:
        with pytest.raises(LunaInputError, match=refusal):
            studio.detail(image, found, **settings)
        assert not calls
    else:
        assert torch.isfinite(studio.detail(image, found, **settings)[0]).all()
        assert calls


def test_a_tile_too_small_for_the_model_is_refused_by_its_name(sd15: Studio) -> None:
    with pytest.raises(LunaInputError, match=r"tile_size is 64: .* more than 64"):
        sd15.chess(photograph(1, 96, 96), tile_size=64, cfg=1.0, steps=1)
