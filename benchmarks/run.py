"""Runs benchmarks, prints their tables and saves them to benchmarks/results.

run.py                       all cases
run.py crop_paste memory     only these
run.py peers                 beside other packs, whose folder LUNA_BENCH_PEERS names
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from peer_packs import packs_folder

from harness.comfyui import make_importable, use_cores

RESULTS = Path(__file__).resolve().parent / "results"
CASES = ("crop_paste", "memory", "ip_adapter", "overhead", "seams", "anchors", "lora")
ON_REQUEST = ("peers",)
"""Cases that need what the repository does not bring: only when they are named."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Luna Refinement; results go to benchmarks/results.")
    names = ", ".join((*CASES, *ON_REQUEST))
    parser.add_argument("cases", nargs="*", metavar="case", help=f"any of {names}; default: {', '.join(CASES)}")
    chosen = parser.parse_args().cases or CASES
    unknown = set(chosen) - {*CASES, *ON_REQUEST}
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}: choose from {names}")
    if "peers" in chosen:
        packs_folder(os.environ)  # stops here without them, not after the other cases
    use_cores(os.cpu_count() or 1)
    make_importable()
    RESULTS.mkdir(exist_ok=True)
    for name in chosen:
        _run(importlib.import_module(f"case_{name}"), name)


def _run(case: ModuleType, name: str) -> None:
    print(f"\n{name} …", flush=True)
    start = time.perf_counter()
    import torch

    with torch.inference_mode():  # as ComfyUI runs its nodes
        report = case.run(RESULTS)
    for table in report.tables:
        print(f"\n{table.markdown()}")
    path = report.save(RESULTS, time.perf_counter() - start)
    print(f"\nsaved to {path}", flush=True)


if __name__ == "__main__":
    main()
