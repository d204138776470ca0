"""Seams of the orders of tiles, by the made-up refinement and by real sampling, with pictures."""

from pathlib import Path

import torch
from bench_models import sd15_files
from builders.engines import ExactEngine
from builders.refining import photograph
from builders.seams import Seams, disturbance, measure_seams
from luna_refinement.batching.comfy_engine import ComfyEngine
from luna_refinement.batching.comfy_sampling import SamplingSettings, ksampler_recipe
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.refine import refine
from PIL import Image
from report import Report, Table
from torch import Tensor

SIDE, TILE, STEPS = 512, 128, 2
RUNS_MADE_UP, RUNS_SAMPLED = 4, 2
WHOLE = TileSettings(SIDE)
GRIDS = {
    "chess": TileSettings(TILE, 0.125),
    "linear": TileSettings(TILE, 0.125, order="linear"),
    "single pass": TileSettings(TILE, 0.125, order="single"),
    "no overlap": TileSettings(TILE, 0, feather=0, order="single"),
}
_AMPLIFIED = 4.0


def made_up(image: Tensor, tiles: TileSettings, noise: str) -> Tensor:
    """[runs,H,W,3]"""
    plan = _plan(tiles, 0)
    runs = [refine(image, plan, ExactEngine(disturbance(f"{noise} {run}"))).image for run in range(RUNS_MADE_UP)]
    return torch.cat(runs)


def sampled(image: Tensor, tiles: TileSettings, noise: str) -> Tensor:
    """[runs,H,W,3] of the small SD1.5 model, text only."""
    models = sd15_files()
    first = {"run": 0, "control": 100, "floor": 200}[noise]
    runs = []
    for seed in range(first, first + RUNS_SAMPLED):
        plan = _plan(tiles, seed)
        settings = SamplingSettings(seed, STEPS, 3.0, "euler", "normal", 0.3)
        recipe = ksampler_recipe(models.model, models.positive, models.negative, settings)
        runs.append(refine(image, plan, ComfyEngine(recipe, models.vae, 0, None, plan)).image)
    return torch.cat(runs)


def run(results: Path) -> Report:
    image = photograph()
    tables, pictures = [], []
    for title, engine in (("Made-up refinement", made_up), ("Sampled", sampled)):
        control = engine(image, WHOLE, "control")
        rows = []
        for name, tiles in GRIDS.items():
            refined = engine(image, tiles, "run")
            rows.append((name, *_numbers(measure_seams(image[0], refined, control, _plan(tiles, 0)))))
            pictures.append(_save(image[0], refined[0], results, f"seams_{title.split('-')[0]}_{name}".lower()))
        floor = measure_seams(image[0], engine(image, WHOLE, "floor"), control, _plan(GRIDS["chess"], 0))
        rows.append(("no tiles (floor)", *_numbers(floor)))
        columns = ("order", "mean", "worst", "mean of change", "worst of change")
        tables.append(Table(f"{title}: gradient on tile borders, 1 = no seam", columns, tuple(rows)))
    about = (
        f"{SIDE}x{SIDE} px photograph, {TILE} px tiles (the plan of 4096 px with 1024 px tiles), all orders with the "
        "same measure: see tests/builders/seams.py. The made-up refinement gives every tile a white balance, clouds "
        f"and detail of its own ({RUNS_MADE_UP} runs); the sampled one is the small SD1.5 model, {STEPS} steps of "
        f"euler at denoise 0.3 ({RUNS_SAMPLED} runs). Pictures: refined, and its change amplified {_AMPLIFIED:g} fold. "
        "Target for chess: mean 1.03, worst 1.10."
    )
    return Report("seams", about, tuple(tables), tuple(pictures))


def _plan(tiles: TileSettings, seed: int) -> RefinePlan:
    return plan_tiles(SIDE, SIDE, 1, tiles, seed)


def _numbers(seams: Seams) -> tuple[str, ...]:
    return tuple(f"{value:.3f}" for value in (seams.mean, seams.worst, seams.change_mean, seams.change_worst))


def _save(before: Tensor, after: Tensor, folder: Path, name: str) -> str:
    """Refined picture and amplified change side by side, at half size."""
    change = (after - before) * _AMPLIFIED + 0.5
    pixels = (torch.cat([after, change], dim=1).clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(pixels.numpy())
    path = folder / f"{name.replace(' ', '_')}.png"
    picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX).save(path, optimize=True)
    return path.name
