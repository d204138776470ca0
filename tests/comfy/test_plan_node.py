"""Refine Plan and the refiners on the sizes of the VAE, on regions larger than crop_size, and on batches."""

from typing import Any

import comfy.sd
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from luna_refinement.nodes.plan import LunaRefinePlan
from luna_refinement.nodes.upscale import LunaNoiseScaffold

from harness.refining import Studio, detections, photograph
from harness.tiny import seed_weights


@pytest.fixture(scope="module")
def coarse_vae() -> Any:
    """ComfyUI's own VAE of the Flux.2 layout, which has 16 px per latent px, with as many channels as SD1.5."""
    config = {
        "double_z": True, "z_channels": 1, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    model = AutoencoderKL(ddconfig=config | {"batch_norm_latent": True}, embed_dim=1)
    seed_weights(model, "coarse vae")
    vae = comfy.sd.VAE(sd=model.state_dict())
    assert vae.spacial_compression_encode() == 16
    return vae


def summary(sd15: Studio, image: torch.Tensor, **given: Any) -> list[str]:
    settings = {
        "model": sd15.model, "vae": sd15.vae, "steps": 4, "crop_size": 512, "padding": 0.15, "feather": 8,
        "mask_mode": "mask", "overlap_mode": "together", "tile_size": 512, "min_overlap": 0.125, "tile_feather": 1.0,
        "tile_order": "chess", "chunk_size": 4,
    }  # fmt: skip
    output = LunaRefinePlan.execute(image, **(settings | given))
    assert output.ui == {"text": (output.result[1],)}
    return str(output.result[1]).split("\n")


@pytest.mark.parametrize(("ratio", "size"), [(8, 264), (16, 272)])
def test_a_tile_is_whole_latent_px_of_the_vae(sd15: Studio, coarse_vae: Any, ratio: int, size: int) -> None:
    lines = summary(sd15, photograph(height=264, width=264), vae=sd15.vae if ratio == 8 else coarse_vae)
    assert f"refined at {size}x{size} px" in lines[-1]


def test_a_strip_is_whole_latent_px_of_the_vae(sd15: Studio, coarse_vae: Any) -> None:
    image = photograph(height=60, width=500)
    found = detections(image, [(0.0, 0.0, 500.0, 60.0)])
    assert "refined at 512x64 px" in summary(sd15, image, detections=found, crop_size=512)[-1]
    assert "refined at 640x80 px" in summary(sd15, image, detections=found, crop_size=640)[-1]
    assert "refined at 672x96 px" in summary(sd15, image, detections=found, crop_size=672, vae=coarse_vae)[-1]


def test_a_picture_refined_on_a_coarse_vae_keeps_its_size(sd15: Studio, coarse_vae: Any) -> None:
    image = photograph(height=72, width=88)
    assert sd15.chess(image, vae=coarse_vae, steps=1, tile_size=128)[0].shape == image.shape


def test_refine_plan_names_regions_that_come_back_softer(sd15: Studio) -> None:
    image = photograph()
    found = detections(image, [(0.0, 0.0, 420.0, 420.0), (10.0, 10.0, 60.0, 60.0)])
    first = summary(sd15, image, detections=found, crop_size=128)[0]
    assert first.startswith("row 0:")
    assert "0.25 of its size" in first
    assert "picture(s) of" in summary(sd15, image, detections=found, crop_size=1024)[0]


def test_the_detailer_says_which_regions_come_back_softer(sd15: Studio, caplog: pytest.LogCaptureFixture) -> None:
    image = photograph()
    sd15.detail(image, detections(image, [(0.0, 0.0, 420.0, 420.0)]), crop_size=64, steps=1)
    assert "row 0: the crop is larger than the 64 px" in caplog.text


def test_automatic_sizes_go_beyond_1024_px_and_say_so(sd15: Studio) -> None:
    image = torch.rand(1, 1600, 1600, 3)
    found = detections(image, [(0.0, 0.0, 1500.0, 1500.0)])
    lines = summary(sd15, image, detections=found, crop_size=0, padding=0.0)
    assert lines[0] == "crop_size 0 chose 1536 px for row 0, larger than 1024 px"
    assert "refined at 1536x1536 px" in lines[-1]


@pytest.mark.parametrize("with_scaffold", [False, True])
def test_a_picture_comes_out_the_same_alone_and_in_a_batch(sd15: Studio, with_scaffold: bool) -> None:
    batch = photograph(3, height=128, width=128)
    boxes = [(20.0, 20.0, 70.0, 80.0)]

    def settings(images: torch.Tensor) -> dict[str, Any]:
        scaffold = LunaNoiseScaffold.execute(sd15.vae, 5, 1, 0, 0, images).result[0]
        return {"steps": 2, "noise_scaffold": scaffold if with_scaffold else None}

    detailed = sd15.detail(batch, detections(batch, boxes * 3, on=[0, 1, 2]), **settings(batch))[0]
    tiled = sd15.chess(batch, tile_size=64, **settings(batch))[0]
    for index in range(3):
        alone = batch[index : index + 1]
        once = sd15.detail(alone, detections(alone, boxes), **settings(alone))[0]
        assert float((detailed[index] - once[0]).abs().max()) <= 1e-4
        assert (once != alone).any()
        assert float((tiled[index] - sd15.chess(alone, tile_size=64, **settings(alone))[0][0]).abs().max()) <= 1e-4


@pytest.mark.parametrize(("height", "width"), [(32, 700), (700, 20)])
def test_strips_are_refined_without_a_square_of_mirrored_picture(sd15: Studio, height: int, width: int) -> None:
    image = photograph(height=512, width=512)[:, : min(height, 512), : min(width, 512)].repeat(1, 2, 2, 1)
    image = image[:, :height, :width]
    found = detections(image, [(0.0, 0.0, float(width), float(height))])
    refined, mask, before, _ = sd15.detail(image, found, crop_size=256, steps=1)
    assert refined.shape == image.shape
    assert mask.min() > 0.99
    assert sorted(before.shape[1:3]) == [64, 256]
