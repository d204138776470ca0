"""What the trained family does on faces it has never seen, anchored by their own pictures and otherwise.

The faces are those of the demo's scenes; ``nox -s bench -- anchors`` measures hundreds.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.ip_adapter import RowEmbeds
from luna_refinement.ip_adapter.comfy_encode import encode_rows
from luna_refinement.nodes.chess import LunaChessRefiner
from torch import Tensor

from harness.anchor_trials import FACES, Group, Mode, Score, Trials, distances, scores
from harness.demo import face_crops
from harness.photographs import PHOTOGRAPHS, square_photograph
from harness.seams import Seams, measure_seams
from training.pictures import SIDE
from training.scenes import SCENES

TIGER, TEARS = 1, 5  # rows of the first scene
LARGE = 3 * SIDE
SHOWN = PHOTOGRAPHS[:2]
STRONG = 0.8
"""Denoise at which little is left of what a row starts from."""


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    """The first nine faces of each scene."""
    return [
        Group(face_crops(scene.truth(), scene.faces[:FACES]), face_crops(scene.degraded(), scene.faces[:FACES]), number)
        for number, scene in enumerate(SCENES)
    ]


@pytest.fixture(scope="module")
def trials() -> Trials:
    return Trials()


@pytest.fixture(scope="module")
def refined(trials: Trials, groups: list[Group]) -> dict[Mode, list[Score]]:
    """Scores of every face, by what anchored it, at denoise 0.6."""
    modes: tuple[Mode, ...] = ("own", "average", "broadcast", "none")
    return {
        mode: [score for group in groups for score in scores(trials.refine(group, mode, 1.0, 0.6), group.truth)]
        for mode in modes
    }


def _mean(found: Sequence[Score], name: str) -> float:
    return sum(getattr(score, name) for score in found) / len(found)


def test_faces_come_nearer_to_the_truth_and_become_sharper(trials: Trials, groups: list[Group]) -> None:
    before = [score for group in groups for score in scores(group.degraded, group.truth)]
    after = [score for group in groups for score in scores(trials.refine(group, "own", 1.0, 0.4), group.truth)]
    assert _mean(after, "ssim") > _mean(before, "ssim") + 0.02
    assert _mean(after, "edges") > _mean(before, "edges") + 0.01
    assert _mean(after, "itself") == 1


@pytest.mark.parametrize(("other", "margin"), [("average", 3.0), ("broadcast", 4.0), ("none", 3.0)])
def test_an_own_anchor_beats_every_other(refined: dict[Mode, list[Score]], other: Mode, margin: float) -> None:
    """By so many dB."""
    assert _mean(refined["own"], "psnr") > _mean(refined[other], "psnr") + margin
    assert _mean(refined["own"], "ssim") > _mean(refined[other], "ssim") + 0.08


def test_swapping_two_embeddings_swaps_identities_and_nothing_else(trials: Trials, groups: list[Group]) -> None:
    """All rows start from the same mean of all faces, so that only the anchors tell them apart."""
    group, models = groups[0], trials.models
    own = encode_rows(models.adapter, models.clip_vision, group.degraded)
    same = Group(group.truth, group.degraded.mean(0, keepdim=True).expand_as(group.degraded), group.number)
    order = list(range(FACES))
    order[TIGER], order[TEARS] = TEARS, TIGER
    swapped = RowEmbeds(own.cond[order], own.uncond, own.projection)
    before, after = (trials.refine(same, embeds, 1.0, STRONG) for embeds in (own, swapped))
    swap = [TIGER, TEARS]
    assert distances(before, group.truth)[swap].argmin(1).tolist() == [TIGER, TEARS]
    assert distances(after, group.truth)[swap].argmin(1).tolist() == [TEARS, TIGER]
    others = [row for row in range(FACES) if row not in (TIGER, TEARS)]
    assert torch.equal(before[others], after[others])


@pytest.fixture(scope="module")
def chess(trials: Trials) -> Callable[[TileSettings, int], Tensor]:
    """The photographs in tiles, by the Chess Refiner with the tiles' own anchors: [R,576,576,3]."""
    models, prompt = trials.models, [[trials.contexts[0][None], {}]]

    def refine(tiles: TileSettings, seed: int) -> Tensor:
        with torch.inference_mode():
            results = [
                LunaChessRefiner.execute(
                    image=square_photograph(name, LARGE)[None],
                    model=models.model,
                    vae=models.vae,
                    positive=prompt,
                    negative=prompt,
                    seed=seed + place,
                    steps=2,
                    cfg=1.0,
                    sampler_name="euler",
                    scheduler="normal",
                    denoise=0.3,
                    tile_size=tiles.tile_size,
                    min_overlap=tiles.min_overlap,
                    feather=tiles.feather,
                    chunk_size=0,
                    ip_adapter=models.adapter,
                    clip_vision=models.clip_vision,
                ).result[0]
                for place, name in enumerate(SHOWN)
            ]
        return torch.cat(results)

    return refine


def test_sampled_tiles_in_chess_order_show_no_seams(chess: Callable[[TileSettings, int], Tensor]) -> None:
    """By ``harness.seams``; the worst of all borders varies by about 0.1 even where there are no tiles."""
    images = torch.stack([square_photograph(name, LARGE) for name in SHOWN])
    overlapping, apart, whole = TileSettings(SIDE, 0.125), TileSettings(SIDE, 0, feather=0), TileSettings(LARGE)
    control = chess(whole, 100)

    def seams(tiles: TileSettings, lines: TileSettings) -> Seams:
        return measure_seams(images, chess(tiles, 0), control, plan_tiles(LARGE, LARGE, 1, lines, seed=0))

    found, none, side_by_side = seams(overlapping, overlapping), seams(whole, overlapping), seams(apart, apart)
    assert 0.9 <= found.mean <= 1.03
    assert found.worst <= none.worst + 0.2
    assert side_by_side.mean > 1.5
    assert side_by_side.worst > none.worst + 0.5
