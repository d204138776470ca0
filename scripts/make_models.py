"""Writes the small models and the demo's picture: make_models.py <ComfyUI folder> <ComfyUI base directory>."""

import sys
import time
from pathlib import Path


def main() -> None:
    comfyui, base = (Path(argument).resolve() for argument in sys.argv[1:3])
    sys.argv = sys.argv[:1]
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests"), str(comfyui)]
    from comfy.cli_args import args

    args.cpu = True
    from builders.model_files import write_models
    from builders.pictures import write_pictures

    start = time.perf_counter()
    write_models(base / "models")
    write_pictures(base / "input")
    print(f"[set-up] models made in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
