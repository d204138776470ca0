"""Runs benchmarks, prints their tables and saves them to benchmarks/results.

run.py                       all cases
run.py crop_paste memory     only these
"""

import argparse
import importlib
import os
import time
from types import ModuleType

import setup

CASES = ("crop_paste", "memory", "ip_adapter", "overhead", "seams", "anchors", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Luna Refinement; results go to benchmarks/results.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"any of {', '.join(CASES)}; default: all")
    chosen = parser.parse_args().cases or CASES
    unknown = set(chosen) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    setup.use_cores(os.cpu_count() or 1)
    setup.workspace.import_comfyui()
    setup.workspace.import_pack()
    setup.RESULTS.mkdir(exist_ok=True)
    for name in chosen:
        _run(importlib.import_module(f"case_{name}"), name)


def _run(case: ModuleType, name: str) -> None:
    print(f"\n{name} …", flush=True)
    start = time.perf_counter()
    import torch

    with torch.inference_mode():  # as ComfyUI runs its nodes
        report = case.run(setup.RESULTS)
    for table in report.tables:
        print(f"\n{table.markdown()}")
    path = report.save(setup.RESULTS, time.perf_counter() - start)
    print(f"\nsaved to {path}", flush=True)


if __name__ == "__main__":
    main()
