"""Measures several ways to do the same job, in turns, and makes sure that it is the same work."""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.utils
import torch
from peer_sides import Run
from report import median, timed
from torch import Tensor

from harness.refining import photograph, watching


@dataclass(frozen=True)
class Measured:
    """One side of a job.

    Attributes:
        seconds: of every turn.
        calls: rows and px of latent of each UNet call of one run.
    """

    seconds: tuple[float, ...]
    calls: tuple[tuple[int, int], ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def work(self) -> int:
        """px of latent that went through the UNet."""
        return sum(rows * px for rows, px in self.calls)

    def times(self) -> str:
        digits = 2 if self.median >= 1 else 3
        low, high = (f"{value:.{digits}f}" for value in (min(self.seconds), max(self.seconds)))
        return f"{self.median:.{digits}f} ({low}–{high})"

    def calls_by_rows(self) -> str:
        counted = Counter(rows for rows, _ in self.calls)
        return ", ".join(f"{count} × {rows}" for rows, count in sorted(counted.items(), reverse=True))

    def over(self, other: "Measured") -> float:
        """How many times the other's time: the median over the turns, whose two runs lie side by side."""
        return median([mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)])


def picture(side: int, turn: int) -> Tensor:
    """[1,side,side,3]: new px in every turn, so that nothing which remembers by content is faster the second time."""
    astronaut = photograph()
    copies = -(-side // astronaut.shape[1])
    return (astronaut.repeat(1, copies, copies, 1)[:, :side, :side] * (1 - 0.01 * turn)).contiguous()


def take_turns(model: Any, sides: Mapping[str, Run], picture_side: int, turns: int) -> dict[str, Measured]:
    """Runs each way once to warm up and to watch its UNet calls, then ``turns`` times; every other turn backwards.

    Raises:
        RuntimeError: the sides do not put the same px through the UNet.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    comfy.utils.set_progress_bar_enabled(False)
    # as ComfyUI runs its nodes, and without what packs print about each segment
    with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()):
        calls = {name: _calls(model, run, picture(picture_side, 0)) for name, run in sides.items()}
        for turn in range(1, turns + 1):
            image = picture(picture_side, turn)
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                seconds[name].append(timed(partial(sides[name], model, image)))
    measured = {name: Measured(tuple(seconds[name]), calls[name]) for name in sides}
    work = {name: side.work for name, side in measured.items()}
    if len(set(work.values())) != 1:
        raise RuntimeError(f"peers: not the same work, px of latent through the UNet: {work}")
    return measured


def _calls(model: Any, run: Run, image: Tensor) -> tuple[tuple[int, int], ...]:
    calls: list[tuple[int, int]] = []
    run(watching(model, lambda latents: calls.append((latents.shape[0], latents[0, 0].numel()))), image)
    return tuple(calls)
