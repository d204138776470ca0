"""Luna beside the Impact Pack, IPAdapter_plus and Ultimate SD Upscale: the same jobs, in one process, in turns."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import comfy.utils
import peer_plot
from bench_models import model_file, sd15_files, tiny_models
from peer_jobs import (
    ANCHORS,
    BOX,
    COUNT_JOBS,
    COUNTS,
    CROP,
    LARGE_JOBS,
    OVERLAP,
    PICTURE_JOBS,
    STRIDE,
    TILE,
    TILE_JOBS,
    WORKING,
    RegionJob,
    TileJob,
)
from peer_packs import PACKS, load_packs, packs_folder
from peer_sides import ALL_TILES, Kit, Nodes, Run, impact_regions, luna_regions, luna_tiles, usdu_tiles
from peer_turns import Measured, take_turns
from report import Report, Table
from tqdm import tqdm

from harness import assets, tiny
from harness.refining import adapter_halves

TURNS, STEPS = 5, 2
LUNA, IMPACT, USDU, USDU_BATCH = "Luna", "Impact Pack", "USDU", "USDU, batch_size all"

Sides = Mapping[str, Measured]


def small_kit() -> Kit:
    """32 channels and an encoder of two layers: what is not UNet or CLIP shows."""
    # IPAdapter_plus shows every encoder 224 px
    models = replace(tiny_models("sd15"), clip_vision=tiny.clip_vision(Path(mkdtemp()), image_size=224))
    return Kit(models, adapter_halves(tiny.ip_adapter_weights("sd15")), STEPS)


def large_kit() -> Kit:
    """320 channels and ViT-L."""
    weights = comfy.utils.load_torch_file(model_file(assets.SD15_PLUS), safe_load=True)
    return Kit(sd15_files(), adapter_halves(weights), STEPS)


def run(results: Path) -> Report:
    packs = packs_folder(os.environ)
    nodes = load_packs(packs)
    small, large = small_kit(), large_kit()
    counted = _regions(small, COUNT_JOBS, nodes)
    heavy = _regions(large, LARGE_JOBS, nodes)
    pictures = _regions(small, PICTURE_JOBS, nodes)
    tiles = [
        (job, take_turns(small.models.model, _tile_sides(small, job, nodes), job.side, TURNS))
        for job in tqdm(TILE_JOBS, desc="tiles")
    ]
    tables = (
        _region_table(f"Regions: {small.models.name}, {STEPS} steps", counted),
        _growth_table(counted),
        _region_table(f"Regions: {large.models.name} and ViT-L, {STEPS} steps", heavy),
        _region_table(f"Larger pictures: {small.models.name}, {STEPS} steps", pictures),
        _tile_table(f"Tiles in chess order: {small.models.name}, {STEPS} steps", tiles),
    )
    _draw(counted, pictures, tiles, results / "peers.png")
    versions = ", ".join(f"{pack.name} {pack.version(packs)}" for pack in PACKS)
    return Report("peers", _ABOUT.format(versions=versions), tables, ("peers.png",))


def _regions(kit: Kit, jobs: Sequence[RegionJob], nodes: Nodes) -> list[tuple[RegionJob, Sides]]:
    found: list[tuple[RegionJob, Sides]] = []
    for job in tqdm(jobs, desc=f"regions, {kit.models.name}"):
        sides = {LUNA: luna_regions(kit, job), IMPACT: impact_regions(kit, job, nodes)}
        found.append((job, take_turns(kit.models.model, sides, job.side, TURNS)))
    return found


def _tile_sides(kit: Kit, job: TileJob, nodes: Nodes) -> dict[str, Run]:
    return {
        LUNA: luna_tiles(kit, job),
        USDU: usdu_tiles(kit, job, nodes, 1),
        USDU_BATCH: usdu_tiles(kit, job, nodes, ALL_TILES),
    }


def _region_table(title: str, found: Sequence[tuple[RegionJob, Sides]]) -> Table:
    columns = (
        "picture",
        "anchor",
        "regions",
        "Luna, s",
        "Impact Pack, s",
        "ratio",
        "Luna: calls × rows",
        "Impact Pack",
    )
    rows = tuple(
        (
            f"{job.side}²",
            job.anchor,
            str(job.regions),
            sides[LUNA].times(),
            sides[IMPACT].times(),
            f"{sides[LUNA].over(sides[IMPACT]):.2f}",
            sides[LUNA].calls_by_rows(),
            sides[IMPACT].calls_by_rows(),
        )
        for job, sides in found
    )
    return Table(title, columns, rows)


def _growth_table(found: Sequence[tuple[RegionJob, Sides]]) -> Table:
    """What one more region costs, from the fewest regions to the most."""
    at = {(job.anchor, job.regions): sides for job, sides in found}
    first, last = COUNTS[0], COUNTS[-1]
    rows = []
    for anchor in ANCHORS:
        few, many = at[anchor, first], at[anchor, last]
        each = [(many[name].median - few[name].median) / (last - first) for name in (LUNA, IMPACT)]
        rows.append((anchor, *(f"{seconds * 1000:.0f}" for seconds in each), f"{each[0] / each[1]:.2f}"))
    columns = ("anchor", "Luna, ms", "Impact Pack, ms", "ratio")
    return Table(f"One region more, from {first} to {last}", columns, tuple(rows))


def _tile_table(title: str, found: Sequence[tuple[TileJob, Sides]]) -> Table:
    columns = (
        "picture", "tiles", "Luna, s", "USDU, s", "ratio", "USDU in batches, s", "ratio ",
        "Luna: calls × rows", "USDU", "USDU in batches",
    )  # fmt: skip
    rows = tuple(
        (
            f"{job.side}²",
            str(job.grid**2),
            sides[LUNA].times(),
            sides[USDU].times(),
            f"{sides[LUNA].over(sides[USDU]):.2f}",
            sides[USDU_BATCH].times(),
            f"{sides[LUNA].over(sides[USDU_BATCH]):.2f}",
            *(sides[name].calls_by_rows() for name in (LUNA, USDU, USDU_BATCH)),
        )
        for job, sides in found
    )
    return Table(title, columns, rows)


def _draw(
    counted: Sequence[tuple[RegionJob, Sides]],
    pictures: Sequence[tuple[RegionJob, Sides]],
    tiles: Sequence[tuple[TileJob, Sides]],
    path: Path,
) -> None:
    panels: dict[tuple[str, str], dict[str, list[tuple[float, Measured]]]] = {}
    for anchor in ANCHORS:
        rows = [(job.regions, sides) for job, sides in counted if job.anchor == anchor]
        panels[anchor, "regions"] = {name: [(x, sides[name]) for x, sides in rows] for name in (LUNA, IMPACT)}
    panels["4 regions, text only", "side of the picture, px"] = {
        name: [(job.side, sides[name]) for job, sides in pictures] for name in (LUNA, IMPACT)
    }
    panels["chess", "tiles"] = {
        name: [(job.grid**2, sides[name]) for job, sides in tiles] for name in (LUNA, USDU, USDU_BATCH)
    }
    peer_plot.draw(panels, path)


_ABOUT = f"""\
{{versions}}, each loaded by ComfyUI's own loader and run through its own nodes, in one process with Luna. Sides take
turns (every other turn backwards) on the same picture, new px in every turn; {TURNS} turns after one to warm up.
Times are median (min–max); *ratio* is Luna's time over the other's, median over the turns. Calls × rows are the UNet
calls of one run and the rows in each, cond and uncond together; a run stops if the sides do not put the same px of
latent through the UNet.

All sides: same models, prompts, {STEPS} steps of euler, normal, cfg 3, denoise 0.4, no preview, no progress bar.

- **Regions** are boxes of {BOX} px whose crops of {CROP} px are refined at {WORKING} px. Luna: Semantic Detailer,
  `crop_size` {WORKING}. Impact Pack: MaskToSEGS with `crop_factor` {CROP / BOX:g} (not timed, as detection is not),
  DetailerForEach with `guide_size` {WORKING} for the crop region, noise mask, no differential diffusion.
- **one adapter**: one picture for all regions. Luna: a concept for `*` with that picture. Others: IPAdapterAdvanced
  on the model, once, then DetailerForEach.
- **own adapter**: each region anchored by its own px. Luna: what the Semantic Detailer does with an adapter. Others:
  Impact's IPAdapterApplySEGS, with which DetailerForEach has IPAdapter_plus encode each region and patch the model.
- **Tiles**: {TILE} px for the UNet in steps of {STRIDE} px, even tiles before odd ones. Luna: Chess Refiner,
  `min_overlap` {OVERLAP:g}. USDU (Ultimate SD Upscale): Chess, tiles of {STRIDE} px, padding {TILE - STRIDE}, no seam
  fix; once with `batch_size` 1, once with as many as it allows."""
