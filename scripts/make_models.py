"""Writes small models: make_models.py <ComfyUI folder> <ComfyUI base directory> <family of models>."""

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from harness.comfyui import make_importable


def main() -> None:
    comfyui, base = (Path(argument).resolve() for argument in sys.argv[1:3])
    family = sys.argv[3]
    sys.argv = sys.argv[:1]
    os.environ["COMFYUI_PATH"] = str(comfyui)
    make_importable()
    from harness.model_files import write_models

    start = time.perf_counter()
    write_models(base / "models", family)
    print(f"[set-up] models made in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
