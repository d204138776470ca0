"""Running out of memory: work goes on in smaller parts, remembers what fits, and changes no result."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.comfy_memory import MemoryLimit, is_out_of_memory
from luna_refinement.errors import LunaRuntimeError
from luna_refinement.ip_adapter.comfy_encode import encode_rows

from harness import tiny
from harness.anchored_sampling import adapter
from harness.refining import Studio, detections, difference, photograph

BOUND = 1e-4
needs_is_oom = pytest.mark.skipif(
    not hasattr(comfy.model_management, "is_oom"), reason="this ComfyUI does not tell torch.AcceleratorError apart"
)


def full() -> Exception:
    return comfy.model_management.OOM_EXCEPTION("out of memory")


def out_of_memory_above(model: Any, rows: int, error: Callable[[], Exception] = full) -> tuple[Any, list[int]]:
    """A clone on which larger calls fail as they do on a full GPU, and the sizes that were tried."""
    tried: list[int] = []

    def limited(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        tried.append(arguments["input"].shape[0])
        if tried[-1] > rows:
            raise error()
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    limited_model = model.clone()
    limited_model.set_model_unet_function_wrapper(limited)
    return limited_model, tried


def test_out_of_memory_halves_the_chunk_and_changes_nothing(sd15: Studio, caplog: pytest.LogCaptureFixture) -> None:
    image = photograph()
    model, tried = out_of_memory_above(sd15.model, rows=4)
    before = sd15.plain_sample()
    result = sd15.detail(image, detections(image), model=model)[3]
    assert tried[0] == 10
    assert "going on with" in caplog.text
    assert difference(result, sd15.detail(image, detections(image))[3]) <= BOUND
    assert torch.equal(sd15.plain_sample(), before)


def test_out_of_memory_with_one_row_gives_sizes_and_advice(sd15: Studio) -> None:
    image = photograph()
    model, _ = out_of_memory_above(sd15.model, rows=1)
    before = sd15.plain_sample()
    with pytest.raises(LunaRuntimeError, match="64x64 px crop"):
        sd15.detail(image, detections(image), model=model)
    assert torch.equal(sd15.plain_sample(), before)


@pytest.mark.parametrize("stage", ["encode", "decode", "clip_vision"])
def test_out_of_memory_outside_sampling_is_mended_too(sd15: Studio, stage: str) -> None:
    """Raised inside the networks themselves: ComfyUI's VAE goes on in tiles, pictures are encoded in halves."""
    image = photograph()
    usual = sd15.detail(image, detections(image))[3]
    network = {
        "encode": sd15.vae.first_stage_model.taesd_encoder,
        "decode": sd15.vae.first_stage_model.taesd_decoder,
        "clip_vision": sd15.clip_vision.model.vision_model.encoder,
    }[stage]
    failed: list[int] = []

    def limit(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].shape[0] > 1:
            failed.append(inputs[0].shape[0])
            raise comfy.model_management.OOM_EXCEPTION("out of memory")

    hook = network.register_forward_pre_hook(limit)
    try:
        # pictures never seen before, or the embeds would come from memory
        other = image.flip(2) if stage == "clip_vision" else image
        short_of_memory = sd15.detail(other, detections(other))[3]
    finally:
        hook.remove()
    assert failed
    if stage != "clip_vision":
        assert difference(short_of_memory, usual) <= BOUND
    else:
        unhurried = Studio("sd15", sd15.folder).detail(other, detections(other))[3]
        assert difference(short_of_memory, unhurried) <= BOUND


def test_what_did_not_fit_is_not_tried_again_in_the_same_run(sd15: Studio) -> None:
    """The Chess Refiner's two passes are two calls or more; the first teaches all others."""
    image = photograph(height=192, width=192)
    model, tried = out_of_memory_above(sd15.model, rows=4)
    result = sd15.chess(image, model=model, tile_size=64, steps=1)[0]
    failed = [rows for rows in tried if rows > 4]
    assert failed == [16, 8]  # eight tiles of the first pass with cond and uncond, then half of them
    assert len(tried) - len(failed) >= 8
    assert difference(result, sd15.chess(image, tile_size=64, steps=1)[0]) <= BOUND


def test_rows_of_another_size_are_measured_by_their_px() -> None:
    """Two rows of 64x64 px fit, so eight of 32x32 and no more, and one of 96x96 is tried."""
    limit = MemoryLimit("rows")

    def work(rows: list[int]) -> int:
        if len(rows) > 2:
            raise full()
        return len(rows)

    assert [done for _, done in limit.parts([*range(4)], 4, work, LunaRuntimeError("full"), 64 * 64)] == [2, 2]
    assert [limit.at_most(100, side * side) for side in (32, 64, 96)] == [8, 2, 1]
    assert limit.at_most(3, 32 * 32) == 3


@settings(deadline=None, max_examples=15)  # each failure collects garbage in the whole process
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=5), st.integers(1, 40))
def test_everything_is_done_once_and_in_order_whatever_fits(batches: list[tuple[int, int]], room: int) -> None:
    limit, failures = MemoryLimit("items"), list[int]()

    def work(items: list[int]) -> list[int]:
        if len(items) > room:
            failures.append(len(items))
            raise full()
        return items

    for count, most in batches:
        results = list(limit.parts([*range(count)], most, work, LunaRuntimeError("full")))
        assert all(part == result for part, result in results)
        assert [item for part, _ in results for item in part] == [*range(count)]
    assert failures == sorted(set(failures), reverse=True)  # each size at most once, over all batches
    assert len(failures) <= 6  # halvings of 60


def test_memory_is_freed_before_the_next_attempt(sd15: Studio) -> None:
    """What a failed call leaves in a reference cycle, as frames and closures do, is gone when the next one starts."""
    image = photograph()
    left_behind: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def limited(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        alive.extend(reference() is not None for reference in left_behind)
        if arguments["input"].shape[0] > 4:
            activations = torch.ones(1000)
            left_behind.append(weakref.ref(activations))
            cycle: list[Any] = [activations]
            cycle.append(cycle)
            raise full()
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = sd15.model.clone()
    model.set_model_unet_function_wrapper(limited)
    gc.disable()  # or chance would decide
    try:
        sd15.detail(image, detections(image), model=model, steps=1)
    finally:
        gc.enable()
    assert left_behind
    assert alive
    assert not any(alive)


@needs_is_oom
def test_out_of_memory_reported_late_by_the_device_is_mended_too(sd15: Studio) -> None:
    image = photograph()

    def late() -> Exception:
        return torch.AcceleratorError("CUDA error: out of memory")

    model, tried = out_of_memory_above(sd15.model, 4, late)
    result = sd15.detail(image, detections(image), model=model)[3]
    assert tried[0] == 10
    assert difference(result, sd15.detail(image, detections(image))[3]) <= BOUND


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch has no AcceleratorError")
def test_other_faults_of_a_device_are_not_taken_for_a_lack_of_memory(sd15: Studio) -> None:
    image = photograph()
    model, tried = out_of_memory_above(sd15.model, 0, lambda: torch.AcceleratorError("CUDA error: illegal access"))
    with pytest.raises(torch.AcceleratorError, match="illegal access"):
        sd15.detail(image, detections(image), model=model)
    assert len(tried) == 1
    assert not is_out_of_memory(RuntimeError("out of cheese"))


def encoding_at_most(clip_vision: Any, pictures: int) -> tuple[Any, list[int]]:
    """Makes the encoder fail on larger batches; the hook to remove, and the sizes that were tried."""
    tried: list[int] = []

    def limit(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        tried.append(inputs[0].shape[0])
        if tried[-1] > pictures:
            raise full()

    return clip_vision.model.vision_model.encoder.register_forward_pre_hook(limit), tried


def test_pictures_that_did_not_fit_at_once_are_not_tried_again(tmp_path: Path) -> None:
    ip_adapter, images = adapter("sd15", "plus"), torch.rand(36, 56, 56, 3)
    expected = encode_rows(ip_adapter, tiny.clip_vision(tmp_path), images)
    clip_vision = tiny.clip_vision(tmp_path)
    hook, tried = encoding_at_most(clip_vision, 4)
    with torch.inference_mode():
        found = encode_rows(ip_adapter, clip_vision, images[:20]), encode_rows(ip_adapter, clip_vision, images[20:])
    hook.remove()
    assert [count for count in tried if count > 4] == [16, 8]
    for part, rows in zip(found, (slice(20), slice(20, 36)), strict=True):
        assert difference(part.cond, expected.cond[rows]) <= BOUND


def test_one_picture_that_does_not_fit_is_named(tmp_path: Path) -> None:
    clip_vision = tiny.clip_vision(tmp_path)
    hook, tried = encoding_at_most(clip_vision, 0)
    with pytest.raises(LunaRuntimeError, match="clip_vision: there is not enough memory to encode even one picture"):
        encode_rows(adapter("sd15", "plus"), clip_vision, torch.rand(3, 56, 56, 3))
    hook.remove()
    assert tried == [3, 2, 1]
