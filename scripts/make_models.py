"""Writes small models: make_models.py <ComfyUI folder> <ComfyUI base directory> <family of models>."""

import os
import sys
import time
from pathlib import Path

import workspace

sys.path.insert(0, str(workspace.ROOT / "tests"))
sys.path.append(str(workspace.ROOT))  # last: ComfyUI has a module ``nodes`` of its own


def main() -> None:
    comfyui, base = (Path(argument).resolve() for argument in sys.argv[1:3])
    family = sys.argv[3]
    sys.argv = sys.argv[:1]
    os.environ["COMFYUI_PATH"] = str(comfyui)
    workspace.import_comfyui()
    workspace.import_pack()
    from builders.model_files import write_models

    start = time.perf_counter()
    write_models(base / "models", family)
    print(f"[set-up] models made in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
