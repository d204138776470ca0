"""Seams of the orders of tiles, by the made-up refinement and by real sampling, with pictures."""

from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import torch
from bench_models import sd15_files
from luna_refinement.batching.comfy_anchor import rows_for
from luna_refinement.batching.comfy_engine import ComfyEngine
from luna_refinement.batching.comfy_recipe import SamplingSettings, ksampler_recipe
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.refine import refine
from luna_refinement.batching.row_start import RowStart
from PIL import Image
from report import Report, Table
from torch import Tensor

from harness.engines import ExactEngine
from harness.engines import refine as refine_bare
from harness.photographs import PHOTOGRAPHS, square_photograph
from harness.seams import Seams, disturbance, measure_seams

SIDE, TILE, STEPS = 512, 128, 2
WHOLE = TileSettings(SIDE)
GRIDS = {
    "chess": TileSettings(TILE, 0.125),
    "linear": TileSettings(TILE, 0.125, order="linear"),
    "single pass": TileSettings(TILE, 0.125, order="single"),
    "no overlap": TileSettings(TILE, 0, feather=0, order="single"),
}
_AMPLIFIED = 4.0

Refinement = Callable[[Tensor, TileSettings, str], Tensor]


def pictures() -> Tensor:
    """[R,H,W,3]: every photograph as it is and mirrored."""
    photographs = torch.stack([square_photograph(name, SIDE) for name in PHOTOGRAPHS])
    return torch.cat([photographs, photographs.flip(2)])


def made_up(image: Tensor, tiles: TileSettings, noise: str) -> Tensor:
    """[1,H,W,3] of one picture [1,H,W,3]."""
    return refine_bare(image, _plan(tiles, 0), ExactEngine(disturbance(noise))).image


def sampled(image: Tensor, tiles: TileSettings, noise: str) -> Tensor:
    """The same by the small SD1.5 model, text only."""
    models = sd15_files()
    seed = crc32(noise.encode())
    plan = _plan(tiles, seed)
    recipe = ksampler_recipe(
        models.model, models.positive, models.negative, SamplingSettings(seed, STEPS, 1.0, "euler", "normal", 0.3)
    )
    rows = rows_for(plan, recipe, None)
    engine = ComfyEngine(recipe, models.vae, plan, rows, RowStart(models.vae.spacial_compression_encode()))
    return refine(image, plan, rows, engine).image


def run(results: Path) -> Report:
    images = pictures()
    tables, drawn = [], []
    for title, engine in (("Made-up refinement", made_up), ("Sampled", sampled)):

        def all_of(tiles: TileSettings, noise: str, engine: Refinement = engine) -> Tensor:
            return torch.cat([engine(image[None], tiles, f"{noise} {k}") for k, image in enumerate(images)])

        control = all_of(WHOLE, "control")
        rows = []
        for name, tiles in GRIDS.items():
            refined = all_of(tiles, "run")
            rows.append((name, *_numbers(measure_seams(images, refined, control, _plan(tiles, 0)))))
            drawn.append(_save(images[0], refined[0], results, f"seams_{title.split('-')[0]}_{name}".lower()))
        floor = measure_seams(images, all_of(WHOLE, "floor"), control, _plan(GRIDS["chess"], 0))
        rows.append(("no tiles (floor)", *_numbers(floor)))
        columns = ("order", "mean", "worst", "mean of change", "worst of change")
        tables.append(Table(f"{title}: gradient on tile borders, 1 = no seam", columns, tuple(rows)))
    about = (
        f"{len(PHOTOGRAPHS)} photographs of {SIDE}x{SIDE} px, each as it is and mirrored, {TILE} px tiles (the plan of "
        "4096 px with 1024 px tiles), all orders with the same measure: see harness/seams.py. The made-up "
        "refinement gives every tile a white balance, clouds and detail of its own; the sampled one is the small SD1.5 "
        f"model, {STEPS} steps of euler at denoise 0.3. Worst: the worst of all borders of the grid, over all "
        f"pictures. Drawn: refined, and its change amplified {_AMPLIFIED:g} fold. Target for chess: mean 1.03, worst "
        "1.10."
    )
    return Report("seams", about, tuple(tables), tuple(drawn))


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
