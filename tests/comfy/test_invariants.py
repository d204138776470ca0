"""What both refiners promise, with real ComfyUI in process: row identity, anchors, untouched px and models."""

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_tomesd import TomePatchModel
from luna_refinement.errors import LunaRuntimeError

from harness.refining import BOXES, Studio, counting, detections, difference, photograph

BOUND = 1e-4  # of the picture's scale, which is that of the latents divided by the VAE's range


@pytest.mark.parametrize("sampler_name", ["euler", "dpmpp_2m_sde", "euler_ancestral"])
def test_a_row_is_the_same_alone_in_chunks_and_in_one_batch(studio: Studio, sampler_name: str) -> None:
    image = photograph()
    together = studio.detail(image, detections(image), sampler_name=sampler_name)[3]
    for chunk in (1, 2) if studio.family == "sdxl" else (1, 2, 3):
        chunked = studio.detail(image, detections(image), sampler_name=sampler_name, chunk_size=chunk)[3]
        assert difference(together, chunked) <= BOUND
    for row in (0, 4):
        alone = studio.detail(image, detections(image, BOXES[row : row + 1]), sampler_name=sampler_name)[3]
        assert difference(together[row], alone[0]) <= BOUND


def test_all_rows_of_three_pictures_share_the_batch(sd15: Studio) -> None:
    images = photograph(count=3)
    found = detections(images, BOXES * 3, on=[0] * 5 + [1] * 5 + [2] * 5)
    model, calls = counting(sd15.model)
    together = sd15.detail(images, found, model=model)
    assert calls == [2 * 15] * 3  # one call per step, for the positive and negative prompt of every row
    chunked = sd15.detail(images, found, chunk_size=4)
    assert difference(together[3], chunked[3]) <= BOUND
    refined, mask = together[:2]
    assert all((refined[picture] != images[picture]).any() for picture in range(3))
    assert not ((refined != images).any(-1) & (mask == 0)).any()


def test_steps_times_chunks_is_the_number_of_model_calls(studio: Studio) -> None:
    image = photograph()
    model, calls = counting(studio.model)
    studio.detail(image, detections(image), model=model, chunk_size=2, steps=4)
    assert calls == [4] * 8 + [2] * 4  # 5 rows in chunks of 2, each with two prompts


def test_the_anchor_of_one_row_changes_that_row_and_no_other(studio: Studio) -> None:
    image = photograph()
    before = studio.detail(image, detections(image), mask_latent=False)
    # what lies under row 1 only: its crop is its anchor, and so is its latent; the other rows must not move a bit
    x1, y1, x2, y2 = (int(x) for x in BOXES[1])
    changed = image.clone()
    changed[:, y1:y2, x1:x2] = 1 - changed[:, y1:y2, x1:x2]
    after = studio.detail(changed, detections(image), mask_latent=False)
    moved = [difference(a, b) for a, b in zip(before[3], after[3], strict=True)]
    assert moved[1] > 0.1
    assert [change for row, change in enumerate(moved) if row != 1] == [0.0] * 4


def test_anchors_act(studio: Studio) -> None:
    image = photograph()
    with_anchor = studio.detail(image, detections(image))[3]
    without = studio.detail(image, detections(image), ip_adapter=None)[3]
    weightless = studio.detail(image, detections(image), ip_adapter_weight=0.0)[3]
    assert all(difference(a, b) > 10 * BOUND for a, b in zip(with_anchor, without, strict=True))
    assert difference(without, weightless) == 0


def test_px_outside_the_mask_keep_their_bits(studio: Studio) -> None:
    image = torch.cat([photograph(), torch.rand(1, 512, 512, 1)], dim=-1)
    refined, mask, *_ = studio.detail(image, detections(image), feather=16)
    changed = (refined != image).any(-1)
    assert changed.any()
    assert not (changed & (mask == 0)).any()
    assert torch.equal(refined[..., 3], image[..., 3])


def test_denoise_zero_returns_the_input(studio: Studio) -> None:
    image = photograph()
    assert torch.equal(studio.detail(image, detections(image), denoise=0.0)[0], image)
    assert torch.equal(studio.chess(image, denoise=0.0)[0], image)


def test_the_same_seed_gives_the_same_bits(studio: Studio) -> None:
    image = photograph()
    first = studio.detail(image, detections(image), sampler_name="dpmpp_2m_sde")
    second = studio.detail(image, detections(image), sampler_name="dpmpp_2m_sde")
    other = studio.detail(image, detections(image), sampler_name="dpmpp_2m_sde", seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_given_model_is_as_before_after_success_failure_and_cancel(studio: Studio) -> None:
    image = photograph()
    options = str(studio.model.model_options)
    before = studio.plain_sample()
    studio.detail(image, detections(image))
    assert torch.equal(studio.plain_sample(), before)

    def fail(apply_model: object, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.full_like(arguments["input"], float("nan"))

    broken = studio.model.clone()
    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(LunaRuntimeError, match="not numbers"):
        studio.detail(image, detections(image), model=broken)
    assert torch.equal(studio.plain_sample(), before)

    def cancel(apply_model: object, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise AssertionError("not reached")

    stopped = studio.model.clone()
    stopped.set_model_unet_function_wrapper(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        studio.detail(image, detections(image), model=stopped)
    assert torch.equal(studio.plain_sample(), before)
    assert str(studio.model.model_options) == options


@pytest.mark.parametrize("count", [1, 2, 9, 33])
def test_any_number_of_rows(sd15: Studio, count: int) -> None:
    image = photograph()
    boxes = [(8.0 * n, 4.0 * n, 8.0 * n + 40 + n, 4.0 * n + 40 + n) for n in range(count)]
    together = sd15.detail(image, detections(image, boxes), steps=2)[3]
    chunked = sd15.detail(image, detections(image, boxes), steps=2, chunk_size=min(3, count))[3]
    assert len(together) == count
    assert difference(together, chunked) <= BOUND


def test_patches_that_draw_at_random_draw_the_same_for_every_run_and_chunk(sd15: Studio) -> None:
    image = photograph()
    model = TomePatchModel.execute(sd15.model, 0.3).args[0]
    torch.manual_seed(1)
    first = sd15.detail(image, detections(image), model=model)[3]
    torch.manual_seed(2)
    assert torch.equal(first, sd15.detail(image, detections(image), model=model)[3])
    assert difference(first, sd15.detail(image, detections(image), model=model, chunk_size=2)[3]) <= BOUND


def test_chess_tiles_do_not_depend_on_chunk_size(sd15: Studio) -> None:
    image = photograph(height=152, width=152)
    model, calls = counting(sd15.model)
    whole = sd15.chess(image, model=model, tile_size=64)[0]
    assert calls == [2 * 5] * 3 + [2 * 4] * 3  # 3x3 tiles: an even pass of 5 and an odd pass of 4
    chunked = sd15.chess(image, chunk_size=2, tile_size=64)[0]
    assert difference(whole, chunked) <= BOUND
