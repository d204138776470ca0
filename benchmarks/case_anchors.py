"""What the anchors do: own for every row, the average of all, one for all, none; measured on faces never learnt."""

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from report import Report, Table
from torch import Tensor
from tqdm import tqdm

from harness import anchor_trials
from harness.anchor_trials import MODES, Group, Mode, Score, Trials, interval, make_group, scores
from harness.comfyui import start_worker
from harness.workspace import ROOT

DENOISES = (0.4, 0.6, 0.8)
WEIGHTS = (0.25, 0.5)
GROUPS, GROUPS_WEIGHTS = 23, 5  # of nine faces
SHOWN_DENOISE, LABEL = 0.6, 120  # px
_Way = tuple[Mode, float, float]
_Found = dict[_Way, list[Score]]
INPUT: _Way = ("none", 0.0, 0.0)


def run(results: Path) -> Report:
    full = [(mode, denoise, 1.0) for denoise in DENOISES for mode in MODES]
    less = [(mode, denoise, weight) for denoise in DENOISES for weight in WEIGHTS for mode in MODES[:3]]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), start_worker) as workers:
        found = _measure(workers, [_Task(number, False, full) for number in range(GROUPS)])
        found_alike = _measure(workers, [_Task(number, True, full) for number in range(GROUPS)])
        weights = _measure(workers, [_Task(number, False, less) for number in range(GROUPS_WEIGHTS)])
    trials, first, first_alike = _trials(), make_group(0), make_group(0, alike=True)
    tables = (
        _table("Full weight, every face on a background of its own", found),
        _table("Full weight, all nine at one place on one background: only the face tells them apart", found_alike),
        _weight_table(weights),
        _equality_table(trials, first),
    )
    _draw(trials, first, ROOT / "docs" / "anchors.jpg")
    _draw(trials, first_alike, ROOT / "docs" / "anchors_alike.jpg")
    return Report("anchors", _ABOUT, tables, ("anchors.jpg", "anchors_alike.jpg"), folder=ROOT / "docs")


@dataclass(frozen=True)
class _Task:
    """A group of faces and the ways to refine it: (mode, denoise, weight)."""

    number: int
    alike: bool
    ways: Sequence[_Way]


def _measure(workers: ProcessPoolExecutor, tasks: Sequence[_Task]) -> _Found:
    """Scores of all groups by way; ``INPUT`` is that of the degraded pictures themselves."""
    found: _Found = defaultdict(list)
    for scores_of_group in tqdm(workers.map(_refine, tasks), total=len(tasks), desc="groups of nine"):
        for way, values in scores_of_group.items():
            found[way] += values
    return found


@cache
def _trials() -> Trials:
    return Trials()


def _refine(task: _Task) -> dict[_Way, list[Score]]:
    group = make_group(task.number, task.alike)
    found = {INPUT: scores(group.degraded, group.truth)}
    for mode, denoise, weight in task.ways:
        refined = _trials().refine(group, mode, weight, denoise)
        found[mode, denoise, weight] = scores(refined, group.truth)
    return found


def _table(title: str, found: _Found) -> Table:
    rows = [("-", "degraded input", *_cells(found[INPUT]))]
    rows += [(f"{denoise}", mode, *_cells(found[mode, denoise, 1.0])) for denoise in DENOISES for mode in MODES]
    columns = ("denoise", "anchor", "PSNR dB", "SSIM", "edges", "itself among nine")
    return Table(f"{title}: {len(found[INPUT])} crops, mean [95 % interval]", columns, tuple(rows))


def _weight_table(found: _Found) -> Table:
    rows = [
        (f"{denoise}", f"{weight}", mode, *_cells(found[mode, denoise, weight]))
        for denoise in DENOISES
        for weight in WEIGHTS
        for mode in MODES[:3]
    ]
    columns = ("denoise", "weight", "anchor", "PSNR dB", "SSIM", "edges", "itself among nine")
    return Table(f"Less weight: {GROUPS_WEIGHTS * anchor_trials.FACES} crops", columns, tuple(rows))


def _cells(values: Sequence[Score]) -> tuple[str, ...]:
    cells = []
    for field in fields(Score):
        mean, low, high = interval([getattr(score, field.name) for score in values])
        digits = 1 if field.name == "psnr" else 3
        cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    return tuple(cells)


def _equality_table(trials: Trials, group: Group) -> Table:
    """One call for nine rows against nine calls."""
    rows = []
    for denoise in DENOISES:
        together, alone = (trials.refine(group, mode, 1.0, denoise) for mode in ("own", "one by one"))
        rows.append((f"{denoise}", f"{(together - alone).abs().max():.1e}"))
    return Table("Own anchors in one call and face by face", ("denoise", "largest difference, 0..1"), tuple(rows))


def _draw(trials: Trials, group: Group, path: Path) -> None:
    """Truth, input and the four ways below one another."""
    modes: tuple[Mode, ...] = MODES
    rows = {"original": group.truth, "input": group.degraded}
    rows |= {mode: trials.refine(group, mode, 1.0, SHOWN_DENOISE) for mode in modes}
    side = group.truth.shape[1] * 2 // 3
    sheet = Image.new("RGB", (LABEL + side * anchor_trials.FACES, side * len(rows)), "white")
    for line, (name, crops) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((8, line * side + side // 2 - 8), name, fill="black", font_size=18)
        for place, crop in enumerate(crops):
            sheet.paste(
                _picture(crop).resize((side, side), Image.Resampling.LANCZOS), (LABEL + place * side, line * side)
            )
    sheet.save(path, quality=88)


def _picture(crop: Tensor) -> Image.Image:
    return Image.fromarray((crop.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


_ABOUT = """\
Faces of the Noto Color Emoji font that were kept out of training (22 kinds), on photographs, made small, noisy and
JPEG-compressed. Nine at a time are the rows of one batch of the Semantic Detailer; the noise of a row is the same in
every way of anchoring. The models are those of `training`, in their narrow form (the files ComfyUI loads compute the
same, see `tests/comfy/test_trained_models.py`), 6 steps of euler, cfg 1, 192 px.

- **own**: every row attends to the embedding of its own degraded crop, in one call.
- **average**: all rows attend to the mean of the nine embeddings.
- **broadcast**: all rows attend to the first row's embedding.
- **none**: text only.

What it shows: in one sampling call every row can keep its own picture's content, and what is lost when all rows
share one embedding. What it does not show: how much an anchor helps a large model on real photographs, which keeps more
of its input by itself and was not trained to restore. The models are small, have learnt from 148 kinds of drawn faces,
and were taught to follow their anchor; *none* is weak here because their text encoder tells them nothing. Kinds unlike
all they have learnt (robot, dragon) come back worst.

PSNR and SSIM against the sharp original; *edges* is the correlation of the gradients with the original's; *itself* is
the share of results whose nearest original among the nine is their own."""
