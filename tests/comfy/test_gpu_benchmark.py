"""The benchmark for a CUDA machine runs at tiny size on any machine, and its tables hold what they name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.workspace import ROOT, comfyui_path

SCRIPT = ROOT / "benchmarks" / "gpu_sdxl.py"
QUICK = ("rows", "ways", "stages", "levers", "memory", "cards", "pixels", "noise", "loras")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--comfyui", str(comfyui_path()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=540, check=False)


def cells(report: str, first: str) -> list[str]:
    """Of the table's row that begins with this cell."""
    (line,) = re.findall(rf"^\| {re.escape(first)} +\|.*$", report, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = Path(tmp_path_factory.mktemp("report")) / "gpu.md"
    done = run("--tiny", "--repeats", "1", "--minutes", "30", "--out", str(out), "--only", *QUICK)
    assert done.returncode == 0, done.stderr
    return out.read_text(encoding="utf-8")


def test_the_report_says_on_what_it_was_made(report: str) -> None:
    assert report.startswith("# SDXL on ")
    assert "- command: `python benchmarks/gpu_sdxl.py --comfyui FOLDER --tiny" in report
    assert "driver" in report
    assert "left out" not in report.replace("LoRAs of rows: left out", "")


def test_every_way_of_sampling_is_timed(report: str) -> None:
    for name in ("4 faces, 1 steps, text", "4 faces, 1 steps, anchored"):
        _, *times, over_bare, gain = cells(report, name)
        assert len(times) == 4
        assert all(float(time.split()[0]) > 0 for time in times)
        assert float(over_bare) > 0
        assert float(gain) > 0


def test_the_stages_of_a_run_are_told_apart(report: str) -> None:
    """All of ComfyUI's models were seen at work: none is called past the entrance that is watched."""
    heads = next(line for line in report.splitlines() if line.startswith("| colour match | check, plan, cut"))
    names = [name.strip() for name in heads.strip("|").split("|")]
    (row,) = [line for line in report.splitlines() if re.match(r"^\| none +\|.*%", line)]
    found = dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    for name in ("VAE encode", "CLIP vision", "UNet", "VAE decode"):
        assert float(found[name]) > 0, name


def test_what_needs_a_gpu_says_so(report: str) -> None:
    assert cells(report, "8")[1] == "needs CUDA"


def test_a_run_without_time_names_what_it_leaves_out(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = run("--tiny", "--minutes", "0", "--out", str(out), "--only", "noise")
    assert done.returncode == 0, done.stderr
    assert "**noise**: left out" in out.read_text(encoding="utf-8")


def test_a_folder_without_comfyui_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--comfyui", str(tmp_path), "--tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "there is no folder comfy" in done.stderr
