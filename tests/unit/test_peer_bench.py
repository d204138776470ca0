"""The comparison with other packs, without them: what it asks for, and that its jobs are the same for all sides."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.picture.detections import Detection

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
REPOSITORIES = ("ltdrdata/ComfyUI-Impact-Pack", "cubiq/ComfyUI_IPAdapter_plus", "ssitu/ComfyUI_UltimateSDUpscale")


def run_peers(packs: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LUNA_BENCH_PEERS"}
    if packs is not None:
        environment["LUNA_BENCH_PEERS"] = packs
    command = [sys.executable, str(BENCHMARKS / "run.py"), "peers"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_jobs

    module: ModuleType = peer_jobs
    return module


def test_without_the_packs_it_says_what_to_check_out_and_runs_nothing() -> None:
    finished = run_peers(None)
    assert finished.returncode == 1
    assert "LUNA_BENCH_PEERS" in finished.stderr
    assert all(repository in finished.stderr for repository in REPOSITORIES)
    assert finished.stdout == ""


def test_a_pack_that_is_missing_is_named(tmp_path: Path) -> None:
    for repository in REPOSITORIES[1:]:
        folder = tmp_path / repository.split("/")[1]
        folder.mkdir()
        (folder / "__init__.py").touch()
    finished = run_peers(str(tmp_path))
    assert finished.returncode == 1
    assert REPOSITORIES[0] in finished.stderr
    assert REPOSITORIES[1] not in finished.stderr


def test_the_default_run_leaves_the_peers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    assert "peers" not in run.CASES
    assert "peers" in run.ON_REQUEST


def test_every_case_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    found = {path.stem.removeprefix("case_") for path in BENCHMARKS.glob("case_*.py")}
    assert found == {*run.CASES, *run.ON_REQUEST}


def test_every_count_of_regions_meets_every_kind_of_anchor(jobs: ModuleType) -> None:
    found = {(job.regions, job.anchor) for job in jobs.COUNT_JOBS}
    assert found == {(n, anchor) for n in (1, 4, 9, 16) for anchor in ("text only", "one adapter", "own adapter")}


def test_luna_refines_the_px_of_each_region_that_the_job_names(jobs: ModuleType) -> None:
    for job in (*jobs.COUNT_JOBS, *jobs.LARGE_JOBS, *jobs.PICTURE_JOBS):
        found = [Detection(0, tuple(map(float, box))) for box in job.boxes]
        settings = CropSettings(jobs.WORKING, jobs.PADDING, jobs.FEATHER)
        plan = plan_detections(found, job.side, job.side, 1, settings, 0)
        margin = (jobs.CROP - jobs.BOX) // 2
        crops = [(region.crop.x1, region.crop.y1, region.crop.x2, region.crop.y2) for region in plan.regions]
        assert crops == [(x1 - margin, y1 - margin, x2 + margin, y2 + margin) for x1, y1, x2, y2 in job.boxes]
        assert {region.working_size for region in plan.regions} == {(jobs.WORKING, jobs.WORKING)}


def test_luna_makes_the_tiles_that_the_job_names(jobs: ModuleType) -> None:
    for job in jobs.TILE_JOBS:
        plan = plan_tiles(job.side, job.side, 1, TileSettings(jobs.TILE, jobs.OVERLAP), 0)
        assert len(plan.regions) == job.grid**2
        assert {region.working_size for region in plan.regions} == {(jobs.TILE, jobs.TILE)}
        assert len(plan.passes) == 2
