"""Flux Redux per row: the tokens of a row's own picture stand behind its own text, as strong as its weight says."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, DualCFGGuider
from luna_refinement.batching.comfy_style import Style, StyleTokens
from luna_refinement.batching.concepts import Concept
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.noise import row_noise
from luna_refinement.batching.plan import Region
from luna_refinement.batching.rows import EncodedRow, RowAnchor
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter import LayerWeights
from safetensors.torch import save_file
from torch import Tensor

import nodes
from harness import tiny
from harness.refining import Studio, counting, difference, labelled, photograph
from harness.seeding import fan_in_scaled, generator_for
from harness.still_models import flux_vae

BOUND = 1e-4
LABELS = ("face", "hand", "eye")
TOKENS = 16
"""Of the tiny SigLIP: 56 px in patches of 14."""


def text(name: str, tokens: int = 8, width: int = 16, **fields: Any) -> list[Any]:
    generator = generator_for("flux text", name)
    pooled = torch.randn(1, 16, generator=generator)
    return [[torch.randn(1, tokens, width, generator=generator), {"pooled_output": pooled, "guidance": 3.5, **fields}]]


def redux_settings(folder: Path, width: int = 16) -> dict[str, Any]:
    """Settings of a refiner that is guided by Redux, its crops held back by no mask."""
    model = tiny.flux(text_width=width)
    return {
        "model": model,
        "vae": flux_vae(),
        "positive": text("positive", width=width),
        "negative": text("negative", width=width),
        "clip_vision": tiny.siglip(folder),
        "style_model": tiny.style_model(text_width=width),
        "ip_adapter": None,
        "ip_adapter_weight": 1.0,
    }


@pytest.fixture
def redux(tmp_path: Path) -> dict[str, Any]:
    return redux_settings(tmp_path)


def detail(studio: Studio, settings: dict[str, Any], count: int = 3, **more: Any) -> tuple[Tensor, Tensor]:
    """The crops of the rows before and after."""
    image = photograph()
    results = studio.detail(image, labelled(image, LABELS[:count]), mask_latent=False, **(settings | more))
    return results[2], results[3]


def regions(count: int = 3, size: int = 64) -> Sequence[Region]:
    image = photograph()
    return plan_detections(
        labelled(image, LABELS[:count]).items, 512, 512, 1, CropSettings(size, 0.15, 8), seed=7
    ).regions


def by_core(settings: dict[str, Any], crop: Tensor, region: Region, strength: float, kind: str = "attn_bias") -> Tensor:
    """[1,H,W,3]: a crop by ComfyUI's own nodes and KSampler, alone."""
    model, vae = settings["model"], settings["vae"]
    with torch.inference_mode():
        (seen,) = nodes.CLIPVisionEncode().encode(settings["clip_vision"], crop, "center")
        apply = nodes.StyleModelApply().apply_stylemodel
        (positive,) = apply(settings["positive"], settings["style_model"], seen, strength, kind)
        latent = vae.encode(crop)
        noise = row_noise([region.seed], latent.shape[1:])
        sampler = comfy.samplers.KSampler(
            model, 3, torch.device("cpu"), "euler", "normal", 0.4, model.model_options
        )  # fmt: skip
        sampled = sampler.sample(
            noise, positive, settings["negative"], cfg=3.0, latent_image=latent, disable_pbar=True, seed=7
        )
        return vae.decode(sampled)[..., :3]


def recording(model: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A clone of the model, and a list that gets what every call to it is conditioned by."""
    seen: list[dict[str, Any]] = []

    def record(apply_model: Any, arguments: dict[str, Any]) -> Tensor:
        seen.append(arguments["c"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    recorded = model.clone()
    recorded.set_model_unet_function_wrapper(record)
    return recorded, seen


@pytest.mark.parametrize(("weight", "kind"), [(1.0, "multiply"), (0.5, "attn_bias"), (2.5, "attn_bias")])
def test_every_row_is_what_core_makes_of_its_crop_alone(
    sd15: Studio, redux: dict[str, Any], weight: float, kind: str
) -> None:
    model, calls = counting(redux["model"])
    before, after = detail(sd15, redux, model=model, ip_adapter_weight=weight)
    assert set(calls) == {3}
    text_only = detail(sd15, redux, style_model=None)[1]
    for row, region in enumerate(regions()):
        assert difference(after[row], by_core(redux, before[row : row + 1], region, weight, kind)[0]) <= BOUND
        assert difference(after[row], text_only[row]) > 10 * BOUND


def test_a_tile_is_what_core_makes_of_it(sd15: Studio, redux: dict[str, Any]) -> None:
    image = photograph(height=64, width=64)
    (result,) = sd15.chess(image, tile_size=64, **(redux | {"ip_adapter_weight": 0.7}))[0]
    (region,) = plan_tiles(64, 64, 1, TileSettings(64, 0.125, 1.0), seed=7).regions
    assert difference(result, by_core(redux, image, region, 0.7)[0]) <= BOUND


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_picture_reaches_its_own_row_alone(sd15: Studio, redux: dict[str, Any], weight: float) -> None:
    pictures = photograph(2)
    changed = []
    for picture in pictures:
        concepts = (Concept("hand", image=picture[None]),)
        changed.append(detail(sd15, redux, concepts=concepts, ip_adapter_weight=weight)[1])
    own = detail(sd15, redux, ip_adapter_weight=weight)[1]
    assert difference(changed[0][1], changed[1][1]) > BOUND
    for row in (0, 2):
        assert torch.equal(changed[0][row], changed[1][row])
        assert torch.equal(changed[0][row], own[row])


def test_a_crop_that_changes_changes_its_own_row_alone(sd15: Studio, redux: dict[str, Any]) -> None:
    image = photograph()
    dark = image.clone()
    crop = regions()[0].crop
    dark[:, crop.y1 : crop.y2, crop.x1 : crop.x2] *= 0.5
    first, second = (sd15.detail(picture, labelled(image, LABELS), **redux)[3] for picture in (image, dark))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1:], second[1:])


def test_tiles_that_change_change_alone(sd15: Studio, redux: dict[str, Any]) -> None:
    image = photograph(height=64, width=224)
    dark = image.clone()
    dark[:, :, :32] *= 0.5
    settings = redux | {"tile_size": 64, "min_overlap": 0.0, "ip_adapter_weight": 0.6}
    first, second = (sd15.chess(picture, **settings)[0] for picture in (image, dark))
    assert not torch.equal(first[:, :, :32], second[:, :, :32])
    assert torch.equal(first[:, :, 128:], second[:, :, 128:])  # the third tile shares the first one's call


def test_rows_have_pictures_of_their_own_and_share_none(sd15: Studio, redux: dict[str, Any]) -> None:
    model, seen = recording(redux["model"])
    before, after = detail(sd15, redux, model=model)
    positive = max((call["c_crossattn"] for call in seen), key=lambda context: context.shape[1])
    assert positive.shape == (3, 8 + TOKENS, 16)
    for row in range(3):
        encoded = redux["clip_vision"].encode_image(before[row : row + 1])
        tokens = redux["style_model"].get_cond(encoded)[0].detach()
        assert difference(positive[row, 8:], tokens) <= 1e-5
        assert torch.equal(positive[row, :8], redux["positive"][0][0][0])
    shared = detail(sd15, redux, concepts=(Concept("*", image=before[:1]),))[1]
    assert difference(after[0], shared[0]) <= BOUND
    assert all(difference(after[row], shared[row]) > 10 * BOUND for row in (1, 2))


def test_the_negative_prompt_sees_no_picture(sd15: Studio, redux: dict[str, Any]) -> None:
    model, seen = recording(redux["model"])
    detail(sd15, redux, model=model, ip_adapter_weight=0.5)
    lengths = [(call["c_crossattn"].shape[1], "attention_mask" in call) for call in seen]
    assert sorted(set(lengths)) == [(8, False), (8 + TOKENS, True)]


STRENGTHS = (Concept("face", ip_adapter_weight=0.25), Concept("hand", ip_adapter_weight=1.0))


def test_rows_of_different_strengths_share_a_call(sd15: Studio, redux: dict[str, Any]) -> None:
    model, calls = counting(redux["model"])
    # 72 px are 9 latent px, which the model fills up to 5 rows of tokens
    before, after = detail(sd15, redux, model=model, concepts=STRENGTHS, ip_adapter_weight=3.0, crop_size=72)
    assert set(calls) == {3}
    for row, (region, weight) in enumerate(zip(regions(size=72), (0.25, 1.0, 3.0), strict=True)):
        assert difference(after[row], by_core(redux, before[row : row + 1], region, weight)[0]) <= BOUND


def test_the_chunk_changes_nothing(sd15: Studio, redux: dict[str, Any]) -> None:
    concepts = (*STRENGTHS, Concept("eye", positive=text("eye", tokens=12)))
    together, alone = (
        detail(sd15, redux, concepts=concepts, ip_adapter_weight=0.5, chunk_size=chunk)[1] for chunk in (0, 1)
    )
    assert difference(together, alone) <= BOUND


def test_texts_of_other_lengths_are_not_repeated(sd15: Studio, redux: dict[str, Any]) -> None:
    """Text of 77 and 154 tokens could be brought to one length: in joint attention each row would tell."""
    positive = {name: text(name, tokens) for name, tokens in (("face", 77), ("hand", 154))}
    concepts = tuple(Concept(name, positive=conds) for name, conds in positive.items())
    before, after = detail(sd15, redux, 2, concepts=concepts)
    for row, (name, region) in enumerate(zip(positive, regions(2), strict=True)):
        own = redux | {"positive": positive[name]}
        assert difference(after[row], by_core(own, before[row : row + 1], region, 1.0)[0]) <= BOUND


def test_weight_0_leaves_the_tokens_unseen(sd15: Studio, redux: dict[str, Any]) -> None:
    concepts = (Concept("hand", ip_adapter_weight=0.0),)
    text_only = detail(sd15, redux, style_model=None)[1]
    for weight in (0.0, 1.0):
        after = detail(sd15, redux, concepts=concepts, ip_adapter_weight=weight)[1]
        assert difference(after[1], text_only[1]) <= BOUND
        assert (difference(after[0], text_only[0]) <= BOUND) == (weight == 0)


def test_the_row_curve_weighs_the_rows(sd15: Studio, redux: dict[str, Any]) -> None:
    curve = LayerWeights(row_curve=(1.0, 0.25, 0.5))
    before, after = detail(sd15, redux, layer_weights=curve)
    for row, (region, weight) in enumerate(zip(regions(), curve.row_curve, strict=True)):
        assert difference(after[row], by_core(redux, before[row : row + 1], region, weight)[0]) <= BOUND


def test_an_attention_mask_that_is_there_stays(sd15: Studio, redux: dict[str, Any]) -> None:
    """A Redux of the whole picture by core's node, and the rows' own after it."""
    encoded = redux["clip_vision"].encode_image(photograph(2)[1:])
    with torch.inference_mode():
        apply = nodes.StyleModelApply().apply_stylemodel
        (styled,) = apply(redux["positive"], redux["style_model"], encoded, 0.3, "attn_bias")
    settings = redux | {"positive": styled}
    for weight in (1.0, 0.6):
        before, after = detail(sd15, settings, ip_adapter_weight=weight)
        for row, region in enumerate(regions()):
            assert difference(after[row], by_core(settings, before[row : row + 1], region, weight)[0]) <= BOUND
    unmasked = [[styled[0][0], {**redux["positive"][0][1]}]]
    without = detail(sd15, settings, positive=unmasked, ip_adapter_weight=0.6)[1]
    assert difference(without, after) > 10 * BOUND


def test_a_mask_that_shuts_tokens_out_still_does(sd15: Studio, redux: dict[str, Any]) -> None:
    """Masks of yes and no; style tokens see all of the text, so the picture must not see these either."""
    open_ = torch.ones(1, 8 + 4, 8 + 4, dtype=torch.bool)
    open_[:, :, 4:8] = False  # nobody sees the last four tokens of the text
    masked = text("positive", attention_mask=open_, attention_mask_img_shape=(2, 2))
    other = [[masked[0][0].clone(), masked[0][1]]]
    other[0][0][:, 4:] = 5.0
    shut, shut_too = (detail(sd15, redux, positive=conds, ip_adapter_weight=0.0)[1] for conds in (masked, other))
    assert difference(shut, shut_too) <= BOUND
    assert difference(shut, detail(sd15, redux, ip_adapter_weight=0.0)[1]) > 10 * BOUND
    half = detail(sd15, redux, positive=masked, ip_adapter_weight=0.5)[1]
    assert difference(half, shut) > BOUND


def test_masks_have_room_for_reference_latents(sd15: Studio, redux: dict[str, Any]) -> None:
    latent = redux["vae"].encode(photograph(2)[1:, :64, :96])
    settings = redux | {"positive": text("positive", reference_latents=[latent])}
    text_only = detail(sd15, settings, style_model=None)[1]
    unseen = detail(sd15, settings, ip_adapter_weight=0.0)[1]
    assert difference(unseen, text_only) <= BOUND
    half, alone = (detail(sd15, settings, ip_adapter_weight=0.5, chunk_size=chunk)[1] for chunk in (0, 1))
    assert difference(half, alone) <= BOUND
    assert difference(half, text_only) > 10 * BOUND
    assert difference(half, detail(sd15, redux, ip_adapter_weight=0.5)[1]) > 10 * BOUND


def test_every_entry_with_a_mask_or_an_area_reads_the_picture(sd15: Studio, redux: dict[str, Any]) -> None:
    left = torch.zeros(1, 512, 512)
    left[..., :180] = 1
    positive = text("left", mask=left, mask_strength=1.0) + text("all", area=("percentage", 1.0, 1.0, 0.0, 0.0))
    model, seen = recording(redux["model"])
    after = detail(sd15, redux, model=model, positive=positive, ip_adapter_weight=0.5)[1]
    contexts = torch.cat([call["c_crossattn"] for call in seen if "attention_mask" in call])
    assert contexts.shape[1] == 8 + TOKENS
    kinds = {tuple(row[0, :2].tolist()) for row in contexts}
    assert kinds == {tuple(conds[0][0, 0, :2].tolist()) for conds in positive}
    alone = detail(sd15, redux, positive=positive, ip_adapter_weight=0.5, chunk_size=1)[1]
    assert difference(after, alone) <= BOUND


def test_guiders_of_custom_sampling(sd15: Studio, redux: dict[str, Any]) -> None:
    """Every prompt but the negative one sees the pictures, whatever its guider calls it."""
    model, seen = recording(redux["model"])
    basic = BasicGuider.execute(model, redux["positive"]) if hasattr(BasicGuider, "execute") else None
    basic = basic.result[0] if basic else BasicGuider().get_guider(model, redux["positive"])[0]
    detail(sd15, redux, guider=basic)
    assert {call["c_crossattn"].shape[1] for call in seen} == {8 + TOKENS}
    seen.clear()
    given = (model, text("one"), text("two"), text("negative"), 3.0, 2.0, "regular")
    dual = DualCFGGuider.execute(*given).result[0] if hasattr(DualCFGGuider, "execute") else None
    dual = dual or DualCFGGuider().get_guider(*given)[0]
    detail(sd15, redux, guider=dual)
    lengths = {}
    for call in seen:
        for row in call["c_crossattn"]:
            lengths[float(row[0, 0])] = row.shape[0]
    names = {float(text(name)[0][0][0, 0, 0]): name for name in ("one", "two", "negative")}
    assert {names[first]: length for first, length in lengths.items()} == {
        "one": 8 + TOKENS,
        "two": 8 + TOKENS,
        "negative": 8,
    }


def refused(studio: Studio, settings: dict[str, Any], match: str, **more: Any) -> None:
    model, calls = counting(settings["model"])
    with pytest.raises(LunaInputError, match=match):
        detail(studio, settings, **({"model": model} | more))
    with pytest.raises(LunaInputError, match=match):
        studio.chess(photograph(), **(settings | {k: v for k, v in more.items() if k != "concepts"} | {"model": model}))
    assert not calls


def test_what_does_not_go_together_is_refused(sd15: Studio, redux: dict[str, Any], tmp_path: Path) -> None:
    refused(sd15, redux, "style_model is connected but clip_vision is not", clip_vision=None)
    refused(sd15, redux, "tokens 64 wide, style_model was trained on tokens 32", clip_vision=sd15.clip_vision)
    refused(sd15, redux, r"tokens \? wide, style_model", clip_vision="file")
    wide = tiny.style_model(text_width=24)
    refused(sd15, redux, "style_model makes tokens 24 wide, model reads text 16 wide", style_model=wide)
    refused(sd15, redux, "style_model holds a str", style_model="file")
    refused(sd15, redux, "holds a Linear: a Redux", style_model=comfy.sd.StyleModel(torch.nn.Linear(1, 1)))
    refused(sd15, redux, r"ip_adapter_weight is -0.5 for rows 0", ip_adapter_weight=-0.5)
    model, calls = counting(redux["model"])
    with pytest.raises(LunaInputError, match=r"ip_adapter_weight is -0.25 for row 1: .* also in concepts"):
        detail(sd15, redux, model=model, concepts=(Concept("hand", ip_adapter_weight=-0.25),))
    assert not calls


def test_what_cannot_act_is_said(sd15: Studio, redux: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    image = photograph()
    plain = sd15.detail(image, labelled(image, LABELS))
    caplog.clear()
    styled = sd15.detail(image, labelled(image, LABELS), style_model=redux["style_model"])
    assert "model is no Flux, so style_model cannot act on it" in caplog.text
    assert torch.equal(plain[0], styled[0])

    caplog.clear()
    usual = detail(sd15, redux)[1]
    assert not [record for record in caplog.records if "anchor" in record.message or "style" in record.message]
    halved = detail(sd15, redux, ip_adapter_start=0.5)[1]
    assert "ip_adapter_start, ip_adapter_end and the depth" in caplog.text
    assert torch.equal(usual, halved)

    caplog.clear()
    assert torch.equal(detail(sd15, redux, ip_adapter=sd15.plus)[1], usual)
    assert "to act on; those of XLabs and InstantX do: style_model alone anchors the regions" in caplog.text


def test_models_are_left_as_they_were(sd15: Studio, redux: dict[str, Any]) -> None:
    def weights() -> list[Tensor]:
        parts = (redux["model"].model, redux["clip_vision"].model, redux["style_model"].model)
        return [value.clone() for part in parts for value in part.state_dict().values()]

    before, options = weights(), str(redux["model"].model_options)
    given = [[conds[0].clone(), dict(conds[1])] for conds in redux["positive"]]
    first = detail(sd15, redux, ip_adapter_weight=0.5)[1]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
    assert str(redux["model"].model_options) == options
    assert torch.equal(redux["positive"][0][0], given[0][0])
    assert redux["positive"][0][1].keys() == given[0][1].keys()
    assert torch.equal(detail(sd15, redux, ip_adapter_weight=0.5)[1], first)


def test_chunks_count_the_longer_text_and_the_mask(redux: dict[str, Any]) -> None:
    style = Style(redux["style_model"], redux["clip_vision"], 0.5, LayerWeights())
    region = regions(1)[0]
    row = EncodedRow(region, {"positive": redux["positive"], "negative": redux["negative"]}, 0.4, (), RowAnchor(0.5),
                     latent=torch.zeros(16, 8, 8), style=torch.zeros(TOKENS, 16))  # fmt: skip
    counted = []
    for weight in (1.0, 0.5):
        own = replace(row, anchor=RowAnchor(weight))
        tokens = StyleTokens(style, redux["model"], [own])
        conditioning = {
            name: [[text, dict(fields)] for text, fields in conds] for name, conds in row.conditioning.items()
        }
        tokens.add(conditioning, [own], (8, 8))
        counted.append(tokens.bytes_per_row(conditioning, own))
    base = redux["model"].model
    longer = base.memory_required([1, 16, 8 * 8 + TOKENS * 4]) - base.memory_required([1, 16, 8, 8])
    assert counted[0] == pytest.approx(1.5 * longer, rel=1e-6)
    assert counted[1] - counted[0] == (8 + TOKENS + 16) ** 2 * (2 + 2 + 4)


def test_files_in_the_real_layout(sd15: Studio, tmp_path: Path) -> None:
    """A Redux file through ComfyUI's loader, 729 tokens of a SigLIP of the real width, and text 4096 wide."""
    generator = generator_for("redux file")
    shapes = {"redux_up": (12288, 1152), "redux_down": (4096, 12288)}
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = fan_in_scaled(torch.Size(shape), generator).half()
        weights[f"{name}.bias"] = torch.zeros(shape[0]).half()
    save_file(weights, tmp_path / "redux.safetensors")
    settings = redux_settings(tmp_path, width=4096) | {
        "style_model": comfy.sd.load_style_model(str(tmp_path / "redux.safetensors")),
        "clip_vision": tiny.siglip(tmp_path, hidden=1152, image_size=384),
        "ip_adapter_weight": 0.5,
    }
    model, seen = recording(settings["model"])
    before, after = detail(sd15, settings, 1, model=model)
    assert {call["c_crossattn"].shape for call in seen} == {(1, 8, 4096), (1, 8 + 729, 4096)}
    assert difference(after[0], by_core(settings, before, regions(1)[0], 0.5)[0]) <= BOUND
