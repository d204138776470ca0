"""One progress bar and live preview for a whole run, over all of its sampling calls."""

from collections.abc import Callable
from typing import Any

import comfy.utils
import latent_preview
from PIL import Image
from torch import Tensor

MOST_PREVIEWED = 9
"""Rows shown in the preview strip; more would each be too small to see."""


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
        """The first rows side by side, as far as each has come."""
        if self._previewer is None:
            return None
        pictures = []
        kind, largest = "JPEG", 512
        for row in range(min(len(denoised), MOST_PREVIEWED)):
            kind, picture, largest = self._previewer.decode_latent_to_preview_image("JPEG", denoised[row : row + 1])
            pictures.append(picture)
        strip = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
        left = 0
        for picture in pictures:
            strip.paste(picture, (left, 0))
            left += picture.width
        return kind, strip, max(largest, strip.width)
