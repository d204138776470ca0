"""Peak memory of whole refinements with a trivial model, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from report import Report, Table

from harness.workspace import ROOT

PROBES = (("tiles", 4096), ("tiles", 8192), ("regions", 4096), ("regions", 8192))
TITLES = {"tiles": "Chess order, 1024 px tiles", "regions": "30 regions at 1024 px, crops kept"}


def run(results: Path) -> Report:
    rows = []
    for kind, side in PROBES:
        command = [sys.executable, str(ROOT / "benchmarks" / "memory_probe.py"), kind, str(side)]
        # Freed blocks of any size go back to the system: what is measured is what is held, not what malloc keeps.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found = json.loads(finished.stdout)
        certain = found["canvas"] + found["mask"] + found["kept"]
        rows.append(
            (
                f"{TITLES[kind]}, {side}x{side}",
                *(_mebibytes(found[name]) for name in ("canvas", "mask", "kept", "chunk", "peak")),
                f"{(found['peak'] - certain) / found['chunk']:.2f}",
            )
        )
    columns = ("refinement", "canvas", "mask", "kept crops", "chunk of 8 crops", "peak", "chunks beyond the rest")
    about = (
        "Growth of the resident size, MiB, from when picture and plan exist to the peak. The model is trivial (means "
        "of 8x8 px), so the models' own memory is not in it. Last column: (peak - canvas - mask - kept crops) / "
        "one chunk. Target: at most 1."
    )
    return Report("memory", about, (Table("Peak memory, MiB", columns, tuple(rows)),))


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}"
