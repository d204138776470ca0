"""Puts the test builders and the trained models on the path of a benchmark; import it before anything of theirs."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
sys.path.append(str(ROOT))  # last: ComfyUI has a module ``nodes`` of its own

import workspace  # noqa: E402


def use_cores(count: int) -> None:
    """Computes with this many threads, unless OMP_NUM_THREADS says otherwise; before PyTorch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(count))


def start_worker() -> None:
    """Makes a process of a pool ready. One thread each: small networks gain more from a process for every core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    workspace.import_comfyui()
    workspace.import_pack()


def model_file(relative: str) -> str:
    """Path of a small model below the workspace's ``models`` folder."""
    path = workspace.BASE / "models" / relative
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run `nox -s bench`, which makes the small models")
    return str(path)
