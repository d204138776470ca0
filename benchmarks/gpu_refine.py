"""Whole runs of the refiners: nine faces and 25 tiles in every way, with fewer steps and px, on smaller cards."""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import comfy.sample
import comfy.utils
import torch
from flops import unet_tflop
from gpu_clock import HAS_CUDA, NEEDS_CUDA, Budget, card_of, gib, in_turns, now, peak_bytes, spread, timed
from gpu_models import Models
from luna_refinement.batching.comfy_chunks import rows_that_fit
from luna_refinement.batching.plan import even_chunk
from luna_refinement.nodes.chess import LunaChessRefiner
from luna_refinement.nodes.detailer import LunaSemanticDetailer
from luna_refinement.picture.detections import Detection, Detections
from report import Table
from torch import Tensor

CFG, DENOISE, OVERLAP = 3.0, 0.4, 0.125
CARDS_GIB = (8, 12, 24)
_pictures = count()


def picture(side: int) -> Tensor:
    """[1,side,side,3]: soft random colours, others in every call, as what was encoded once is remembered."""
    generator = torch.Generator().manual_seed(next(_pictures))
    small = torch.rand(1, 3, 16, 16, generator=generator)
    return torch.nn.functional.interpolate(small, size=(side, side), mode="bilinear").movedim(1, -1).contiguous()


def faces(models: Models) -> list[Detection]:
    """In a square, each a quarter of its cell."""
    box, cell, aside = models.box_px, 2 * models.box_px, range(models.aside[0])
    places = [(x * cell + box / 2, y * cell + box / 2) for y in aside for x in aside]
    return [Detection(0, (x, y, x + box, y + box)) for x, y in places]


def faces_picture(models: Models) -> Tensor:
    return picture(2 * models.box_px * models.aside[0])


def detail(
    models: Models,
    image: Tensor,
    found: list[Detection],
    side: int,
    steps: int,
    cfg: float = CFG,
    chunk: int = 0,
    anchored: bool = True,
    color_match: Any = "none",
) -> Tensor:
    """The picture after one run of the Semantic Detailer."""
    return LunaSemanticDetailer.execute(
        image, Detections(tuple(found), image.shape[2], image.shape[1], 1), models.model, models.vae,
        models.positive, models.negative, seed=1, steps=steps, cfg=cfg, sampler_name="euler", scheduler="normal",
        denoise=DENOISE, crop_size=side, padding=0.15, feather=8, mask_mode="mask", chunk_size=chunk,
        ip_adapter=models.adapter if anchored else None, clip_vision=models.clip_vision if anchored else None,
        color_match=color_match,
    ).result[0]  # fmt: skip


def detail_one_by_one(
    models: Models, image: Tensor, found: list[Detection], side: int, steps: int, **settings: Any
) -> Tensor:
    """A run of the node for every face, on the picture that the one before left."""
    for face in found:
        image = detail(models, image, [face], side, steps, **settings)
    return image


def chess(models: Models, image: Tensor, side: int, chunk: int = 0) -> Tensor:
    """The picture after one run of the Chess Refiner, anchored."""
    return LunaChessRefiner.execute(
        image, models.model, models.vae, models.positive, models.negative, seed=1, steps=models.steps[1], cfg=CFG,
        sampler_name="euler", scheduler="normal", denoise=DENOISE, tile_size=side, min_overlap=OVERLAP, feather=1.0,
        chunk_size=chunk, ip_adapter=models.adapter, clip_vision=models.clip_vision,
    ).result[0]  # fmt: skip


def bare(models: Models, rows: int, side: int, steps: int, anchored: bool) -> None:
    """ComfyUI's model calls for so many crops and nothing else: no crops are cut, no patch, nothing is pasted."""
    crops = torch.rand(rows, side, side, 3)
    if anchored:
        models.clip_vision.encode_image(crops)
    at_once = max(1, 4 * 1024**2 // side**2)  # as many as a refiner encodes at a time
    latents = torch.cat([models.vae.encode(part) for part in crops.split(at_once)])
    chunk = even_chunk(rows, rows_that_fit(models.model, latents.shape[1:]))
    sampled = [
        comfy.sample.sample(
            models.model, torch.randn_like(part), steps, CFG, "euler", "normal", models.positive, models.negative, part,
            denoise=DENOISE, disable_pbar=True, seed=1,
        )
        for part in latents.split(chunk)
    ]  # fmt: skip
    for part in torch.cat(sampled).split(at_once):
        models.vae.decode(part)


def ways(models: Models, budget: Budget, repeats: int) -> list[Table]:
    """Faces and tiles one by one, in calls of one row, in as few calls as fit, and their bare model calls."""
    side, found, (steps, tile_steps, *_) = models.sides[0], faces(models), models.steps
    tiles = models.aside[1]
    whole = tiles * side - (tiles - 1) * int(side * OVERLAP)
    columns = ("work", "one run each, s", "rows in calls of 1, s", "all rows, s", "bare calls, s", "all / bare",
               "one run each / all")  # fmt: skip
    table = Table(f"Median (least–most) of up to {repeats} runs in turns, crops of {side} px", columns, ())
    for anchored in (False, True):
        name = f"{len(found)} faces, {steps} steps, {'anchored' if anchored else 'text'}"
        table = _with_row(table, name, in_turns(_on_faces(models, found, side, steps, anchored), repeats, budget))
    variants = {
        "1": lambda: chess(models, picture(whole), side, chunk=1),
        "all": lambda: chess(models, picture(whole), side),
        "bare": lambda: bare(models, tiles**2, side, tile_steps, anchored=True),
    }
    table = _with_row(table, f"{tiles**2} tiles, {tile_steps} steps, anchored", in_turns(variants, repeats, budget))
    return [table]


def _on_faces(
    models: Models, found: list[Detection], side: int, steps: int, anchored: bool
) -> dict[str, Callable[[], object]]:
    return {
        "each": lambda: detail_one_by_one(models, faces_picture(models), found, side, steps, anchored=anchored),
        "1": lambda: detail(models, faces_picture(models), found, side, steps, chunk=1, anchored=anchored),
        "all": lambda: detail(models, faces_picture(models), found, side, steps, anchored=anchored),
        "bare": lambda: bare(models, len(found), side, steps, anchored),
    }


def _with_row(table: Table, name: str, times: dict[str, list[float]]) -> Table:
    mean = {key: sum(found) / len(found) for key, found in times.items()}
    cells = [spread(times[key]) if key in times else "–" for key in ("each", "1", "all", "bare")]
    gain = f"{mean['each'] / mean['all']:.2f}" if "each" in mean else "–"
    return Table(table.title, table.columns, (*table.rows, (name, *cells, f"{mean['all'] / mean['bare']:.3f}", gain)))


def levers(models: Models, budget: Budget) -> list[Table]:
    """What each lever gives on anchored faces, from the usual loop on: one run each, after one to warm up."""
    found, (*_, steps, few) = faces(models), models.steps
    settings = [("one run each", models.sides[0], steps, CFG), ("all rows", models.sides[0], steps, CFG)]
    settings += [("all rows", side, steps, CFG) for side in models.sides[1:]]
    settings += [("all rows, few-step LoRA", side, few, 1.0) for side in models.sides]
    rows: list[tuple[str, ...]] = []
    first = 0.0
    for name, side, at, cfg in settings:
        run = detail_one_by_one if name == "one run each" else detail
        warm = found[:1] if name == "one run each" else found
        run(models, faces_picture(models), warm, side, steps=1, cfg=cfg)
        budget.need()
        image = faces_picture(models)
        seconds = timed(lambda: run(models, image, found, side, steps=at, cfg=cfg))  # noqa: B023 (called at once)
        first = first or seconds
        work = len(found) * at * (1 if cfg == 1 else 2) * unet_tflop(side, models.is_tiny)
        rows.append((name, str(side), str(at), f"{cfg:g}", f"{work:.4g}", f"{seconds:.2f}", f"{first / seconds:.1f}"))
    columns = ("how", "crop, px", "steps", "cfg", "UNet work counted, TFLOP", "whole run, s", "times the first")
    about = (
        f"What each lever gives: {len(found)} anchored faces (the LoRA itself, merged into the weights, costs nothing)"
    )
    return [Table(about, columns, tuple(rows))]


def cards(models: Models, budget: Budget) -> list[Table]:
    """Anchored faces on smaller cards: how many rows share a call, and at what price."""
    rows: list[tuple[str, ...]] = []
    columns = ("card, GiB", "model calls of 2 steps", "most rows in a call", "weights and work at most, GiB", "s")
    if not HAS_CUDA:
        return [Table("Smaller cards", columns, tuple((f"{size}", *[NEEDS_CUDA] * 4) for size in CARDS_GIB))]
    for size in CARDS_GIB:
        budget.need(20)
        try:
            with card_of(size):
                calls: list[int] = []
                counted = Models(**{**vars(models), "model": _counting(models.model, calls)})
                start = now()
                side, image = models.sides[0], faces_picture(models)
                peak = peak_bytes(partial(detail, counted, image, faces(models), side, steps=2))
                rows.append((f"{size}", str(len(calls)), str(max(calls)), gib(peak), f"{now() - start:.1f}"))
        except (ValueError, RuntimeError) as error:  # out of memory on so small a card is a result too
            rows.append((f"{size}", str(error).splitlines()[0], "–", "–", "–"))
    return [
        Table("Smaller cards: what is beyond is held by one tensor; models are loaded in the run", columns, tuple(rows))
    ]


def _counting(model: Any, calls: list[int]) -> Any:
    """A clone that notes the rows of every call."""

    def note(apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        calls.append(given["input"].shape[0])
        return apply(given["input"], given["timestep"], **given["c"])

    counted = model.clone()
    counted.set_model_unet_function_wrapper(note)
    return counted
