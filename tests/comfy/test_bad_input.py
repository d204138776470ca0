"""Bad input: a clear error that names the input, before anything is sampled; or a notice where nothing is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from luna_refinement.batching.concepts import Concept
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter import LayerWeights
from luna_refinement.nodes.detections import LunaDetectionsFromBoxes, LunaDetectionsFromMasks
from luna_refinement.picture.detections import Detections

from harness import still_models, tiny
from harness.refining import Studio, counting, detections, photograph


def refused(studio: Studio, match: str, image: torch.Tensor | None = None, found: Any = None, **settings: Any) -> None:
    """The detailer refuses these inputs without a single call to the model."""
    image = photograph() if image is None else image
    model, calls = counting(studio.model)
    with pytest.raises(LunaInputError, match=match):
        studio.detail(image, found or detections(photograph()), **({"model": model} | settings))
    assert not calls


def test_no_detections_pass_the_picture_through(sd15: Studio) -> None:
    image = photograph()
    model, calls = counting(sd15.model)
    refined, mask, before, after = sd15.detail(image, Detections((), 512, 512), model=model)
    assert torch.equal(refined, image)
    assert not mask.any()
    assert not calls
    assert len(before) == len(after) == 1  # previews of an empty batch would fail


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("crop_size is 100", {"crop_size": 100}),
        ("denoise is 2", {"denoise": 2.0}),
        ("steps is 0", {"steps": 0}),
        ("padding is -1", {"padding": -1.0}),
        ("sampler_name 'x'", {"sampler_name": "x"}),
        ("clip_vision is not", {"clip_vision": None}),
        ("the end must not come first", {"ip_adapter_start": 0.8, "ip_adapter_end": 0.2}),
        ("no block 'output.99'", {"layer_weights": LayerWeights("none", (("output.99", 1.0),))}),
        ("sigmas has shape", {"sigmas": torch.tensor([1.0])}),
        ("sigmas has shape", {"sigmas": torch.tensor([1.0, 5.0])}),
        (r"sigmas is tensor\(", {"sigmas": torch.tensor([1.0, 0.0]).to_sparse()}),
        (r"sigmas is tensor\(", {"sigmas": torch.zeros(2, device="meta")}),
        (r"sigmas is tensor\(", {"sigmas": torch.tensor([1.0 + 1.0j, 0.0])}),
        ("noise_scaffold has shape", {"noise_scaffold": {"samples": torch.zeros(1, 4, 8, 8)}}),
        ("ip_adapter is a str", {"ip_adapter": "file"}),
    ],
)
def test_wrong_settings_are_refused(sd15: Studio, match: str, settings: dict[str, Any]) -> None:
    refused(sd15, match, **settings)


@pytest.mark.parametrize(("made_on", "given"), [(1, 2), (3, 1)])
def test_detections_of_another_number_of_pictures_are_refused(sd15: Studio, made_on: int, given: int) -> None:
    found = detections(photograph(made_on))
    refused(sd15, rf"detections were made on {made_on} picture\(s\), image holds {given}", photograph(given), found)


def test_pictures_that_are_none_are_refused(sd15: Studio) -> None:
    nan = photograph()
    nan[0, 5, 5, 1] = float("nan")
    refused(sd15, "not numbers", nan)
    refused(sd15, "has shape", torch.rand(1, 512, 512, 2))
    refused(sd15, "another size of the same aspect", torch.rand(1, 512, 300, 3))


def test_pictures_of_0_to_255_are_refused(sd15: Studio) -> None:
    refused(sd15, "uint8", (photograph() * 255).to(torch.uint8))
    refused(sd15, "divide this one by 255", photograph() * 255)


def test_highlights_are_clipped_where_they_are_refined_with_one_notice(
    sd15: Studio, caplog: pytest.LogCaptureFixture
) -> None:
    image = photograph()
    image[:, :40, :40] = 3.5
    refined, mask, *_ = sd15.detail(image, detections(image, [(20.0, 20.0, 90.0, 90.0)]), steps=1, feather=0)
    said = [record.message for record in caplog.records if "image holds values from 0 to 3.5" in record.message]
    assert len(said) == 1
    assert refined[mask == 1].max() <= 1
    assert torch.equal(refined[mask == 0], image[mask == 0])
    caplog.clear()
    sd15.chess(image, steps=1, tile_size=512)
    assert sum("image holds values from" in record.message for record in caplog.records) == 1


def test_models_that_do_not_belong_together_are_refused(sd15: Studio, tmp_path: Path) -> None:
    sdxl = Studio("sdxl", tmp_path)
    refused(sd15, "made for SDXL", ip_adapter=sdxl.plus)
    refused(sd15, "clip_vision gives embeds 96 wide", clip_vision=tiny.clip_vision(tmp_path, hidden=96))
    refused(sd15, "clip_vision is no CLIP", clip_vision=object())


def test_a_concepts_denoise_cannot_act_on_sigmas(sd15: Studio) -> None:
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    refused(sd15, "denoise of a concept", sigmas=sigmas, concepts=(Concept("*", denoise=0.5),))


def test_boxes_of_one_px_and_at_the_edge_are_refined(sd15: Studio) -> None:
    image = photograph()
    boxes = [(100.0, 100.0, 101.0, 101.0), (0.0, 0.0, 512.0, 512.0), (500.0, 500.0, 512.0, 512.0)]
    refined, mask, *_ = sd15.detail(image, detections(image, boxes), steps=1, feather=0)
    assert torch.isfinite(refined).all()
    assert mask[0, 100, 100] > 0


@pytest.mark.parametrize(("height", "width"), [(505, 333), (40, 300), (9, 9), (1, 1)])
def test_any_picture_size_keeps_its_size(sd15: Studio, height: int, width: int) -> None:
    image = torch.rand(1, height, width, 3)
    found = detections(image, [(0.0, 0.0, width * 0.7, height * 0.7)])
    assert sd15.detail(image, found, steps=1)[0].shape == image.shape
    assert sd15.chess(image, steps=1, tile_size=64)[0].shape == image.shape


def test_masks_that_fit_nothing_are_refused_or_skipped() -> None:
    image = photograph()
    with pytest.raises(LunaInputError, match="masks has 100x300"):
        LunaDetectionsFromMasks.execute(torch.ones(1, 300, 100), image, "", False)
    with pytest.raises(LunaInputError, match="masks: mask 0 holds values"):
        LunaDetectionsFromMasks.execute(torch.full((1, 512, 512), float("nan")), image, "", False)
    output = LunaDetectionsFromMasks.execute(torch.zeros(2, 512, 512), image, "", False)
    assert len(output.result[0]) == 0
    assert "empty" in output.ui["text"][0]
    unpainted = LunaDetectionsFromMasks.execute(torch.zeros(1, 64, 64), torch.rand(1, 100, 300, 3), "", True)
    assert len(unpainted.result[0]) == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[[1, 2", "boxes_json is no JSON"),
        ("[[50, 50, 20, 90]]", "reversed"),
        ("[[1, 2, 3]]", "are needed"),
        ("", "neither bboxes nor boxes_json"),
    ],
)
def test_boxes_that_cannot_be_read_are_refused(text: str, match: str) -> None:
    with pytest.raises(LunaInputError, match=match):
        LunaDetectionsFromBoxes.execute(photograph(), "", text)


def test_a_vae_for_other_latents_than_the_models_is_refused(sd15: Studio) -> None:
    refused(sd15, "vae makes latents of 3 dimensions, model takes 2", vae=still_models.wan_vae())
    refused(sd15, "vae makes latents of 16 channels, model takes 4", vae=still_models.flux_vae())
