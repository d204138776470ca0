"""Luna's side of the comparison with other packs, which runs without them: jobs and measure stay alive."""

from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import case_peers
    import peer_jobs
    import peer_turns

    return SimpleNamespace(peers=case_peers, jobs=peer_jobs, turns=peer_turns)


@pytest.mark.parametrize("anchor", ["text only", "one adapter", "own adapter"])
def test_all_regions_share_the_calls_of_one(case: SimpleNamespace, anchor: str) -> None:
    kit, job = case.peers.small_kit(), case.jobs.RegionJob(2, anchor, side=512)
    sides = {"Luna": case.peers.luna_regions(kit, job)}
    measured = case.turns.take_turns(kit.models.model, sides, job.side, 1)["Luna"]
    assert measured.calls == ((4, 64),) * kit.steps  # cond and uncond of two regions, latents of 8x8
    assert len(measured.seconds) == 1


def test_the_tiles_of_each_colour_share_the_calls_of_one(case: SimpleNamespace) -> None:
    kit, job = case.peers.small_kit(), case.jobs.TileJob(2)
    measured = case.turns.take_turns(kit.models.model, {"Luna": case.peers.luna_tiles(kit, job)}, job.side, 1)["Luna"]
    assert measured.calls == ((4, 64),) * kit.steps * 2


def test_sides_that_do_other_work_are_refused(case: SimpleNamespace) -> None:
    kit = case.peers.small_kit()
    sides = {str(count): case.peers.luna_regions(kit, case.jobs.RegionJob(count, "text only", 512)) for count in (1, 2)}
    with pytest.raises(RuntimeError, match="not the same work"):
        case.turns.take_turns(kit.models.model, sides, 512, 1)


def test_the_picture_of_the_table_is_small(case: SimpleNamespace, tmp_path: Path) -> None:
    import peer_plot

    curve = [(n, case.turns.Measured((0.1 * n, 0.2 * n, 0.15 * n), ((2, 64),) * n)) for n in (1, 4, 9, 16)]
    panels = {(f"panel {k}", "regions"): {"Luna": curve, "Impact Pack": curve, "USDU": curve} for k in range(5)}
    peer_plot.draw(panels, tmp_path / "peers.png")
    assert 0 < (tmp_path / "peers.png").stat().st_size < 60_000
