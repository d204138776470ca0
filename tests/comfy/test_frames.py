"""Models whose latents have a dimension for frames: what belongs to a row reaches its one frame, videos are refused."""

from typing import Any

import comfy.latent_formats
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.controlnet import ControlNet
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.plan import LunaRefinePlan
from luna_refinement.nodes.upscale import LunaNoiseScaffold
from torch import Tensor

from harness import tiny
from harness.refining import BOXES, Studio, counting, detections, photograph, watching
from harness.still_models import FAMILIES
from tests.comfy.test_still_families import BOUND, ROWS, Settings, difference, settings_of

LEFT, RIGHT = (16.0, 176.0, 112.0, 272.0), (384.0, 64.0, 448.0, 128.0)


@pytest.fixture
def qwen() -> Settings:
    return settings_of("qwen_image")


def carrying(conds: list[Any], **fields: Any) -> list[Any]:
    return [[text, {**old, **fields}] for text, old in conds]


def test_every_row_is_a_latent_of_one_frame(sd15: Studio, qwen: Settings) -> None:
    seen: list[tuple[int, ...]] = []
    model = watching(qwen["model"], lambda latents: seen.append(tuple(latents.shape)))
    image = photograph()
    sd15.detail(image, detections(image, ROWS), **(qwen | {"model": model, "steps": 1}))
    assert seen == [(2 * 3, 16, 1, 8, 8)]


def test_a_scaffold_of_one_frame_gives_each_row_the_noise_of_its_place(sd15: Studio, qwen: Settings) -> None:
    image = photograph()
    scaffold = LunaNoiseScaffold.execute(qwen["vae"], 5, 1, 0, 0, image).result[0]
    assert scaffold["samples"].shape == (1, 16, 1, 64, 64)

    def run(noise: dict[str, Tensor] | None, **more: Any) -> Tensor:
        return sd15.detail(image, detections(image, ROWS), **(qwen | more), noise_scaffold=noise)[3]

    together = run(scaffold)
    assert difference(together, run(scaffold, chunk_size=1)) <= BOUND
    assert difference(together, run(None)) > 0.01
    other = {"samples": scaffold["samples"].clone()}
    other["samples"][..., 41:56, 14:28] *= -1  # under row 1 alone
    moved = [difference(a, b) for a, b in zip(together, run(other), strict=True)]
    assert moved[1] > 0.01
    assert moved[0] == moved[2] == 0


def test_masks_of_prompts_act_on_the_rows_they_cover(sd15: Studio, qwen: Settings) -> None:
    image = photograph()
    first, second = (FAMILIES["qwen_image"].conditioning(name) for name in ("first", "second"))
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    split = carrying(first, mask=left) + carrying(second, mask=1 - left)
    found = detections(image, [LEFT, RIGHT])
    both = sd15.detail(image, found, **(qwen | {"positive": split}))[3]
    for row, text in ((0, first), (1, second)):
        assert difference(both[row], sd15.detail(image, found, **(qwen | {"positive": text}))[3][row]) <= BOUND
    assert difference(both, sd15.detail(image, found, **(qwen | {"positive": split, "chunk_size": 1}))[3]) <= BOUND


def test_the_latent_mask_holds_each_row_by_its_own_mask(sd15: Studio, qwen: Settings) -> None:
    """Rows of other masks: held px keep to the input, and no row's mask is taken for another's."""
    image = photograph()
    found = detections(image, [LEFT, (200.0, 200.0, 420.0, 260.0)])

    def run(**more: Any) -> Tensor:
        return sd15.detail(image, found, padding=1.0, feather=0, **(qwen | {"steps": 4} | more))[3]

    held, free = run(), run(mask_latent=False)
    assert difference(held, run(chunk_size=1)) <= BOUND
    assert all(difference(a, b) > 0.01 for a, b in zip(held, free, strict=True))


def test_references_of_the_picture_are_cut_to_rows(sd15: Studio, qwen: Settings) -> None:
    image = photograph()
    with torch.inference_mode():
        latent = qwen["vae"].encode(image)
    assert latent.shape == (1, 16, 1, 64, 64)

    def run(reference: Tensor, **more: Any) -> Tensor:
        given = {kind: carrying(qwen[kind], reference_latents=[reference]) for kind in ("positive", "negative")}
        return sd15.detail(image, detections(image, ROWS), **(qwen | given | more))[3]

    together = run(latent)
    assert difference(together, run(latent, chunk_size=1)) <= BOUND
    assert difference(together, sd15.detail(image, detections(image, ROWS), **qwen)[3]) > 1e-3
    changed = latent.clone()
    changed[..., 43:54, 16:26] += 1  # under row 1 alone
    moved = [difference(a, b) for a, b in zip(together, run(changed), strict=True)]
    assert moved[1] > 1e-3
    assert moved[0] == moved[2] == 0


def test_hints_of_a_controlnet_are_encoded_row_by_row(sd15: Studio, qwen: Settings) -> None:
    sizes = FAMILIES["qwen_image"].small
    operations = comfy.ops.disable_weight_init
    network = QwenImageControlNetModel(num_layers=1, **sizes, dtype=torch.float32, operations=operations)
    tiny.seed_weights(network, "qwen controlnet")
    control = ControlNet(
        network.eval(),
        compression_ratio=1,
        latent_format=comfy.latent_formats.Wan21(),
        load_device=torch.device("cpu"),
        extra_conds=[],
    )

    def hinted(hint: Tensor) -> Settings:
        own = control.copy().set_cond_hint(hint.movedim(-1, 1), 1.0, (0.0, 1.0), vae=qwen["vae"])
        fields = {"control": own, "control_apply_to_uncond": False}
        return {kind: carrying(qwen[kind], **fields) for kind in ("positive", "negative")}

    def run(hint: Tensor, **more: Any) -> Tensor:
        return sd15.detail(image, detections(image, ROWS), **(qwen | hinted(hint) | more))[3]

    image = photograph()
    together = run(image)
    assert difference(together, run(image, chunk_size=1)) <= BOUND
    assert difference(together, sd15.detail(image, detections(image, ROWS), **qwen)[3]) > 1e-3
    other = image.clone()
    x1, y1, x2, y2 = (int(x) for x in BOXES[1])
    other[:, y1:y2, x1:x2] = 0
    moved = [difference(a, b) for a, b in zip(together, run(other), strict=True)]
    assert moved[1] > 1e-3
    assert moved[0] == moved[2] == 0


def test_the_plan_counts_rows_of_one_frame(sd15: Studio, qwen: Settings) -> None:
    image = photograph()
    summary = LunaRefinePlan.execute(
        image, qwen["model"], qwen["vae"], steps=2, crop_size=0, padding=0.15, feather=8, mask_mode="mask",
        overlap_mode="together", tile_size=512, min_overlap=0.125, tile_feather=1.0, tile_order="chess", chunk_size=0,
        detections=detections(image, ROWS),
    ).result[1]  # fmt: skip
    assert "refined at 512x512 px" in summary


def test_videos_are_refused_before_anything_is_sampled(sd15: Studio, qwen: Settings) -> None:
    image = photograph()
    video = torch.zeros(1, 16, 3, 64, 64)
    carried: dict[str, dict[str, Any]] = {
        "reference_latents of positive holds a video of 3": {"reference_latents": [video]},
        "concat_latent_image of positive holds a video of 3": {"concat_latent_image": video},
    }
    given: dict[str, dict[str, Any]] = {
        words: {"positive": carrying(qwen["positive"], **fields)} for words, fields in carried.items()
    }
    given[r"noise_scaffold has shape \[1, 16, 3, 64, 64\]"] = {"noise_scaffold": {"samples": video}}
    model, calls = counting(qwen["model"])
    for words, settings in given.items():
        with pytest.raises(LunaInputError, match=words):
            sd15.detail(image, detections(image, ROWS), **(qwen | {"model": model} | settings))
    assert not calls


def test_models_that_take_a_batch_for_a_video_are_refused(sd15: Studio) -> None:
    image = photograph()
    with pytest.raises(LunaInputError, match="model takes a batch for the frames"):
        sd15.detail(image, detections(image), model=tiny.svd(), ip_adapter=None)
    vae = comfy.sd.VAE(sd={"decoder.mid.block_1.mix_factor": torch.zeros(1)})
    with pytest.raises(LunaInputError, match="vae takes a batch for the frames"):
        sd15.detail(image, detections(image), vae=vae)


def test_a_model_that_reads_masks_as_frames_is_named(sd15: Studio, caplog: pytest.LogCaptureFixture) -> None:
    cosmos, image = settings_of("cosmos_predict2") | {"steps": 1}, photograph()
    sd15.detail(image, detections(image, ROWS[:1]), mask_latent=False, **cosmos)
    assert "latent mask" not in caplog.text
    sd15.detail(image, detections(image, ROWS[:1]), **cosmos)
    assert "reads a latent mask as frames" in caplog.text
