"""Progress and previews of a run: what ComfyUI's progress bar is told, and how little of the time it takes."""

import time
from collections.abc import Iterator

import comfy.utils
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from luna_refinement.batching.comfy_progress import PREVIEW_PX, PREVIEW_SHARE, SamplingProgress
from PIL import Image

from harness import tiny

Told = list[tuple[int, int, Image.Image | None]]


@pytest.fixture
def told() -> Iterator[Told]:
    """(value, total, preview) of everything the progress bar is told, with previews switched on."""
    messages: Told = []

    def hook(value: int, total: int, preview: tuple[str, Image.Image, int] | None, **_: object) -> None:
        messages.append((value, total, None if preview is None else preview[1]))

    before, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    comfy.utils.set_progress_bar_global_hook(hook)
    yield messages
    comfy.utils.set_progress_bar_global_hook(None)
    args.preview_method = before


def run(rows: int, side: int, steps: int, pause: float) -> float:
    """One call of ``steps`` steps that take ``pause`` seconds each; returns the share of the time in callbacks."""
    progress = SamplingProgress(tiny.unet("sd15"), rows, steps)
    callback = progress.callback(rows)
    latents = torch.rand(rows, 4, side, side)
    told_s, start = 0.0, time.perf_counter()
    for step in range(steps):
        time.sleep(pause)
        before = time.perf_counter()
        callback(step, latents, latents, steps)
        told_s += time.perf_counter() - before
    return told_s / (time.perf_counter() - start)


def test_previews_are_a_strip_of_small_pictures(told: Told) -> None:
    run(9, 640, 1, 0)
    (picture,) = [preview for _, _, preview in told if preview is not None]
    assert picture.size == (9 * PREVIEW_PX, PREVIEW_PX)


def test_previews_take_a_small_share_of_the_time_and_every_step_is_counted(told: Told) -> None:
    steps = 40
    share = run(4, 64, steps, 0.03)
    shown = [preview for _, _, preview in told if preview is not None]
    assert told[0][2] is not None
    assert 2 <= len(shown) < steps
    assert share < 3 * PREVIEW_SHARE  # the first one, and those that a busy machine makes longer, may take more
    values, counted = [value for value, _, _ in told], [4 * (step + 1) for step in range(steps)]
    if hasattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL"):  # newer releases leave some out
        assert values[-1] == counted[-1]
        assert set(values) <= set(counted)
        assert values == sorted(values)
    else:
        assert values == counted
