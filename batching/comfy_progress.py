"""One progress bar and live preview for a whole run, over all of its sampling calls."""

import time
from collections.abc import Callable
from typing import Any

import comfy.utils
import latent_preview
from PIL import Image
from torch import Tensor

MOST_PREVIEWED = 9
"""Rows shown in the preview strip; more would each be too small to see."""

PREVIEW_PX = 256
"""Longer side of a row in the preview strip."""

PREVIEW_SHARE = 0.05
"""Of a run's time that may go into making previews: with a slow previewer, steps in between show none."""


class SamplingProgress:
    """Counts row-steps: a run of N rows and S steps ends at N*S, however the rows are split into calls.

    Args:
        model: ModelPatcher, for the preview's latent format.
        total_rows: rows of the whole run.
        steps: steps of each sampling call.
    """

    def __init__(self, model: Any, total_rows: int, steps: int):
        self._bar = comfy.utils.ProgressBar(max(1, total_rows * steps))
        self._steps = steps
        self._total = max(1, total_rows * steps)
        self._done = 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._next_preview = 0.0

    def callback(self, rows: int) -> Callable[[int, Tensor, Tensor, int], None]:
        """A sampler callback for one call over ``rows`` rows."""

        def on_step(step: int, denoised: Tensor, x: Tensor, total_steps: int) -> None:
            share = min(step + 1, total_steps) / max(1, total_steps)
            value = self._done + round(rows * self._steps * share)
            self._bar.update_absolute(value, self._total, self._preview(denoised))

        return on_step

    def rows_done(self, rows: int) -> None:
        self._done += rows * self._steps
        self._bar.update_absolute(self._done, self._total)

    def _preview(self, denoised: Tensor) -> tuple[str, Image.Image, int] | None:
        """The first rows side by side, as far as each has come; None where the last preview was too short ago."""
        start = time.monotonic()
        if self._previewer is None or start < self._next_preview:
            return None
        pictures = []
        for latent in denoised[:MOST_PREVIEWED].split(1):
            kind, picture, _ = self._previewer.decode_latent_to_preview_image("JPEG", latent)
            picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
            pictures.append(picture)
        strip = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
        left = 0
        for picture in pictures:
            strip.paste(picture, (left, 0))
            left += picture.width
        end = time.monotonic()
        self._next_preview = end + (end - start) * (1 / PREVIEW_SHARE - 1)
        return kind, strip, strip.width
