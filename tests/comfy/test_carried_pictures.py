"""Pictures that a conditioning carries reach the model cut per row, for every kind of model that reads one."""

from collections.abc import Callable
from typing import Any

import comfy.samplers
import comfy.sd
import pytest
import torch
from luna_refinement.batching.fields import KINDS
from luna_refinement.batching.planes import cut_planes
from luna_refinement.errors import LunaInputError
from torch import Tensor

from harness import tiny
from harness.engines import groups
from harness.refining import Studio, detections, photograph
from harness.seeding import generator_for
from harness.vae import build_vae

LEFT, RIGHT = (16.0, 176.0, 112.0, 272.0), (384.0, 64.0, 448.0, 128.0)
WHOLE = (0.0, 0.0, 128.0, 128.0)


def flux_text(name: str = "a") -> list[Any]:
    generator = generator_for("flux text", name)
    return [[torch.randn(1, 8, 16, generator=generator), {"pooled_output": torch.randn(1, 16, generator=generator)}]]


def flux_settings(in_channels: int) -> dict[str, Any]:
    model = tiny.flux(in_channels)
    vae = comfy.sd.VAE(sd=build_vae(model.model.latent_format.scale_factor, latent_channels=16))
    return {"model": model, "vae": vae, "positive": flux_text("p"), "negative": flux_text("n")}


def pix2pix_settings(family: tiny.Family) -> dict[str, Any]:
    return {
        "model": tiny.unet(family, extra_channels=4, edits=True),
        "vae": tiny.vae(family),
        "positive": tiny.conditioning(family, "positive"),
        "negative": tiny.conditioning(family, "negative"),
    }


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "flux depth": lambda: flux_settings(32),
    "flux fill": lambda: flux_settings(96),
    "pix2pix sd15": lambda: pix2pix_settings("sd15"),
    "pix2pix sdxl": lambda: pix2pix_settings("sdxl"),
}


def recording(model: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A clone of the model, and a list that gets what every call to it is conditioned by."""
    seen: list[dict[str, Any]] = []

    def record(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        seen.append(arguments["c"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    recorded = model.clone()
    recorded.set_model_unet_function_wrapper(record)
    return recorded, seen


def carrying(conds: list[Any], **fields: Any) -> list[Any]:
    return [[text, {**old, **fields}] for text, old in conds]


def by_core(settings: dict[str, Any], side: int) -> dict[str, Any]:
    """What the model sees in ComfyUI's own KSampler for a picture of side x side latent px."""
    model, seen = recording(settings["model"])
    latent = torch.zeros(1, model.model.latent_format.latent_channels, side, side)
    sampler = comfy.samplers.KSampler(model, 1, torch.device("cpu"), "euler", "normal", 1.0, model.model_options)
    with torch.inference_mode():
        sampler.sample(
            latent, settings["positive"], settings["negative"], cfg=3.0, latent_image=latent, disable_pbar=True
        )
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_picture_as_one_region_sees_what_a_ksampler_sees(sd15: Studio, name: str) -> None:
    settings = MODELS[name]()
    channels = settings["model"].model.latent_format.latent_channels
    picture = 5 * torch.randn(1, channels, 16, 16, generator=generator_for("carried"))
    mask = (torch.rand(1, 1, 128, 128, generator=generator_for("mask")) > 0.5).float()
    for role in ("positive", "negative"):
        settings[role] = carrying(settings[role], concat_latent_image=picture, concat_mask=mask)
    model, seen = recording(settings["model"])
    image = photograph(height=128, width=128)
    options = {"steps": 1, "crop_size": 128, "padding": 0.0, "ip_adapter": None, "mask_latent": False}
    sd15.detail(image, detections(image, [WHOLE]), **(settings | options | {"model": model}))
    wanted = by_core(settings, 16)["c_concat"]
    assert float(wanted.std()) > 0.3
    assert float((seen[0]["c_concat"] - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1, 2])
def test_each_row_sees_its_own_place_of_the_carried_picture(sd15: Studio, name: str, scale: int) -> None:
    """Two pictures of which each latent px holds its own column, the second's plus 1000; at two scales."""
    settings = MODELS[name]()
    format_ = settings["model"].model.latent_format
    side = 64 * scale
    column = (torch.arange(float(side)) + 0.5) * 8 / scale
    picture = torch.stack([column + 1000 * k for k in range(2)])[:, None, None]
    picture = picture.expand(2, format_.latent_channels, side, side).clone()
    for role in ("positive", "negative"):
        settings[role] = carrying(settings[role], concat_latent_image=picture)
    model, seen = recording(settings["model"])
    images = photograph(2)
    options = {"steps": 1, "padding": 0.0, "ip_adapter": None}
    found = detections(images, [LEFT, RIGHT], on=[1, 0])
    sd15.detail(images, found, **(settings | options | {"model": model}))
    shown = seen[0]["c_concat"][:2, 0].mean(dim=(1, 2))
    if "flux" in name:  # their latent format shifts and scales, so here it is undone
        shown = format_.process_out(shown)
    # middles of the crops, in px of the picture
    assert shown.tolist() == pytest.approx([1000 + 64, 416], abs=0.5)


def test_flux_fill_without_a_carried_picture_sees_each_crop_with_its_mask_greyed_out(sd15: Studio) -> None:
    settings = flux_settings(96)
    model, seen = recording(settings["model"])
    image = photograph()
    sd15.detail(image, detections(image, [LEFT, RIGHT]), **(settings | {"model": model, "steps": 1, "padding": 0.5}))
    shown = seen[0]["c_concat"][:2]
    pictures, masks = shown[:, :16], shown[:, 16:]
    assert float(pictures[0].std()) > 0.01
    assert float((pictures[0] - pictures[1]).abs().max()) > 0.1
    assert masks[:, :, 3, 3].min() == 1
    assert masks[:, :, 0, 0].max() == 0


def test_pictures_of_another_aspect_give_their_middle(sd15: Studio) -> None:
    """A carried picture twice as wide as the picture: ComfyUI takes its middle half."""
    settings = pix2pix_settings("sd15")
    column = torch.arange(128.0).expand(1, 4, 64, 128).clone()
    settings["positive"] = carrying(settings["positive"], concat_latent_image=column)
    settings["negative"] = carrying(settings["negative"], concat_latent_image=column)
    model, seen = recording(settings["model"])
    image = photograph()
    whole = detections(image, [(0.0, 0.0, 512.0, 512.0)])
    sd15.detail(image, whole, **(settings | {"model": model, "steps": 1, "ip_adapter": None}))
    shown = seen[0]["c_concat"][0, 0, 4]
    assert shown[2:6].tolist() == pytest.approx([32 + 3.5 + 8 * k for k in range(2, 6)], abs=0.5)


def test_rows_of_a_noised_picture_are_sampled_one_by_one(sd15: Studio) -> None:
    """ComfyUI draws that noise for the whole batch at once, so a row's share of it would depend on its batch."""
    settings = pix2pix_settings("sd15")
    picture = torch.zeros(1, 4, 64, 64)
    fields = {"concat_latent_image": picture, "noise_augmentation": 0.1}
    settings["positive"] = carrying(settings["positive"], **fields)
    settings["negative"] = carrying(settings["negative"], **fields)
    model, seen = recording(settings["model"])
    image = photograph()
    sd15.detail(image, detections(image, [LEFT, RIGHT]), **(settings | {"model": model, "steps": 1}))
    assert [len(call["c_concat"]) for call in seen] == [2, 2]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"concat_latent_image": torch.zeros(3, 4, 64, 64)}, "concat_latent_image of positive holds 3 pictures"),
        ({"concat_mask": torch.zeros(3, 64, 64)}, "concat_mask of positive holds 3 pictures"),
        ({"mask": torch.zeros(3, 64, 64)}, "mask of positive holds 3 pictures"),
        ({"reference_latents": [torch.zeros(3, 4, 9, 64)]}, "reference_latents of positive holds 3 pictures"),
        ({"reference_latents": [torch.zeros(1, 64, 64, 3)]}, "reference_latents of positive are no latents"),
        ({"pooled_output": torch.zeros(3, 8)}, "pooled_output of positive holds 3 texts"),
        ({"vace_frames": [torch.zeros(1, 16, 1, 8, 8)]}, "'vace_frames'"),
        ({"time_dim_concat": torch.zeros(1, 16, 1, 8, 8)}, "'time_dim_concat'"),
        ({"area": ("percentage", 1.0, 0.5, 0.5, 0.0, 0.0, 0.0)}, "areas of still pictures"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_is_sampled(
    sd15: Studio, fields: dict[str, Any], words: str
) -> None:
    image = photograph(2)
    model, seen = recording(sd15.model)
    with pytest.raises(LunaInputError, match=words):
        sd15.detail(image, detections(image, [LEFT]), model=model, positive=carrying(tiny.conditioning(), **fields))
    assert not seen


def test_a_concepts_conditioning_is_checked_before_anything_is_sampled(sd15: Studio) -> None:
    from luna_refinement.batching.concepts import Concept

    image = photograph(2)
    model, seen = recording(sd15.model)
    own = carrying(tiny.conditioning(), mask=torch.zeros(3, 64, 64))
    with pytest.raises(LunaInputError, match="mask of negative holds 3 pictures"):
        sd15.detail(image, detections(image, [LEFT, RIGHT]), model=model, concepts=(Concept("*", negative=own),))
    assert not seen


def test_one_mask_without_a_batch_counts_for_all_pictures(sd15: Studio) -> None:
    images = photograph(2)
    found = detections(images, [LEFT, RIGHT], on=[0, 1])
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    flat, batch = (
        sd15.detail(
            images, found, steps=1, positive=tiny.conditioning() + carrying(tiny.conditioning(name="b"), mask=given)
        )[3]
        for given in (mask, mask[None])
    )
    assert torch.equal(flat, batch)


def test_texts_whose_tokens_count_differently_do_not_share_a_call(sd15: Studio) -> None:
    """Some models add up the attention mask of the batch; masks that are equal are passed once."""
    from luna_refinement.batching.conditioning import RowConditioning
    from luna_refinement.batching.crop_plan import CropSettings, plan_detections
    from luna_refinement.batching.rows import Row

    image = photograph()
    plan = plan_detections(detections(image, [LEFT, RIGHT]).items, 512, 512, 1, CropSettings(64, 0.0, 0), seed=0)

    def row(place: int, tokens: int) -> Row:
        mask = (torch.arange(12) < tokens).long()[None]
        return Row(plan.regions[place], {"positive": [[torch.randn(1, 12, 8), {"attention_mask": mask}]]})

    conditioning = RowConditioning(512, 512, 1, cell=8)
    assert groups(conditioning, [row(0, 5), row(1, 7)], (8, 8)) == [[0], [1]]
    rows = [row(0, 5), row(1, 5)]
    assert groups(conditioning, rows, (8, 8)) == [[0, 1]]
    (entry,) = conditioning.for_rows(rows, (8, 8))["positive"]
    assert entry[0].shape[0] == 2
    assert entry[1]["attention_mask"].tolist() == rows[0].conditioning["positive"][0][1]["attention_mask"].tolist()


def attention_over(columns: Tensor, tokens: int) -> Tensor:
    """[1,L,L]: how strongly all tokens see each image token: by its column; image tokens see texts by their own."""
    side = len(columns)
    picture = columns.repeat(side)
    mask = torch.zeros(1, tokens + side**2, tokens + side**2)
    mask[:, :, tokens:] += picture
    mask[:, tokens:, :tokens] = picture[:, None]
    return mask


def test_attention_masks_over_the_picture_are_cut_to_rows(sd15: Studio) -> None:
    from luna_refinement.batching.conditioning import RowConditioning
    from luna_refinement.batching.crop_plan import CropSettings, plan_detections
    from luna_refinement.batching.rows import Row

    image = photograph()
    plan = plan_detections(detections(image, [LEFT, RIGHT]).items, 512, 512, 1, CropSettings(64, 0.0, 0), seed=0)
    mask = attention_over((torch.arange(16.0) + 0.5) * 32, tokens=3)
    fields = {"attention_mask": mask, "attention_mask_img_shape": (16, 16)}
    shared = {"positive": [[torch.randn(1, 3, 8), fields]]}
    rows = [Row(region, shared) for region in plan.regions]
    (entry,) = RowConditioning(512, 512, 1, cell=8).for_rows(rows, (8, 8))["positive"]
    cut = entry[1]["attention_mask"]
    assert cut.shape == (2, *mask.shape[1:])
    assert cut[:, 0, 3:].mean(-1).tolist() == pytest.approx([64, 416], abs=1)
    assert cut[:, 3:, 0].mean(-1).tolist() == pytest.approx([64, 416], abs=1)
    assert cut[:, 3 + 8, 3:].mean(-1).tolist() == pytest.approx([64, 416], abs=1)
    even = {"attention_mask": torch.full((1, 19, 19), 0.5), "attention_mask_img_shape": (4, 4)}
    alike = [Row(region, {"positive": [[torch.randn(1, 3, 8), even]]}) for region in plan.regions]
    (entry,) = RowConditioning(512, 512, 1, cell=8).for_rows(alike, (8, 8))["positive"]
    assert entry[1]["attention_mask"] is even["attention_mask"]


def test_planes_are_cut_exactly() -> None:
    planes = torch.randn(2, 3, 20, 30)
    assert torch.equal(cut_planes(planes, (4, 5, 12, 25), (8, 20)), planes[..., 4:12, 5:25])
    columns = torch.tensor([0.0, 1.0]).repeat(20).expand(40, 40)
    coarse = cut_planes(columns, (0.0, 0.0, 40.0, 40.0), (10, 10))
    assert float((coarse - 0.5).abs().max()) < 0.1  # what is finer than a px is averaged
    line = torch.arange(40.0).expand(1, 40, 40)
    part = cut_planes(line, (4.0, 10.25, 12.0, 18.25), (16, 16))[0, 0]
    wanted = 10.25 + (torch.arange(16) + 0.5) / 2 - 0.5
    assert float((part - wanted).abs().max()) < 1e-4
    mirrored = cut_planes(line, (-4.0, -4.0, 4.0, 4.0), (8, 8))[0, 0]
    assert mirrored.tolist() == [4, 3, 2, 1, 0, 1, 2, 3]


_OTHERS = """
audio_codes audio_embed audio_inject_scale augmentation_level azimuth camera_conditions clip_vision_output_pose
clip_vision_output_ref condition conditioning_lyrics conditioning_scale context_latents control_video cross_attn_pose
driving_mask_28ch elevation embeds face_video_pixels fps frame_rate generated_keyframes guide_attention_entries
keyframe_idxs latent_shapes lyrics_strength minimax_audio_cond_noise_aug minimax_keyframes minimax_refs
minimax_token_tags minimax_visual_cond_noise_aug motion_bucket_id ofs pose_strength pose_video_latent ref_audio
ref_latent ref_mask_28ch ref_mask_flag reference_audio_timbre_latents reference_motion reference_strength
seconds_start seconds_total time_conditioning time_dim_concat time_dim_replace unprocessed_ltxav_embeds vace_frames
vace_mask vace_strength
"""
NOT_FOR_STILL_PICTURES = frozenset(_OTHERS.split())
"""Read by models for video, sound and solids alone, up to ComfyUI 0.33."""

SET_BY_THE_SAMPLER = {"noise", "device", "denoise_mask", "latent_image", "cross_attn"}


def test_the_table_names_every_field_that_this_comfyui_reads() -> None:
    """What models read, from their source: a new ComfyUI that reads a new field turns this red."""
    import inspect
    import re

    import comfy.model_base

    source = inspect.getsource(comfy.model_base)
    read = set(re.findall(r"kwargs(?:\.get\(|\[)[\"'](\w+)[\"']", source)) | set(
        re.findall(r"args\.get\([\"'](\w+)[\"']", source)
    )
    unknown = read - set(KINDS) - SET_BY_THE_SAMPLER - NOT_FOR_STILL_PICTURES
    assert not unknown
