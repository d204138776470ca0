"""Measures Luna on a CUDA machine with SDXL at full size: one command, nothing to download, one Markdown file.

gpu_sdxl.py --comfyui FOLDER                  every table, at most 8 minutes
gpu_sdxl.py --comfyui FOLDER --only rows ways these tables
gpu_sdxl.py --comfyui FOLDER --tiny           the same at a size for any machine, where only some numbers mean something

Weights are random and made on the GPU: speed does not depend on them. Needs PyTorch, an unpacked ComfyUI, and of
ComfyUI's requirements those that its models import (av, einops, psutil, safetensors, scipy, torchsde, transformers).
The file is written anew after each table, so that a run that is stopped leaves what it has; what the time was too
short for is named in it.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

CASES = ("rows", "ways", "stages", "levers", "memory", "cards", "pixels", "noise", "loras", "compile")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Luna with SDXL at full size on a CUDA machine.")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of an unpacked ComfyUI")
    parser.add_argument("--tiny", action="store_true", help="at 32 channels, on any machine, in seconds")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/gpu_sdxl.md)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the variants of a comparison (default: 3)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="some of the tables")
    given = parser.parse_args()
    if not (given.comfyui / "comfy").is_dir():
        parser.error(f"--comfyui {given.comfyui}: there is no folder comfy in it")
    return given


def main() -> None:
    given = arguments()
    os.environ["COMFYUI_PATH"] = str(given.comfyui.resolve())
    from harness.comfyui import make_importable

    make_importable()
    import torch

    if not (given.tiny or torch.cuda.is_available()):
        sys.exit("PyTorch finds no CUDA device: use --tiny, or a machine with one")
    out = given.out or Path(__file__).resolve().parent / "results" / "gpu_sdxl.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        failed = measure(given, out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def measure(given: argparse.Namespace, out: Path) -> list[str]:
    """Takes the tables one after the other and writes the file after each.

    Time on a GPU is short: what fails is shown and named in the file, and the rest goes on.

    Returns:
        The names of what failed.
    """
    import gpu_models
    from gpu_clock import Budget, OutOfTime

    budget, start = Budget(given.minutes), time.perf_counter()
    models = gpu_models.build(given.tiny)
    about = f"{models.name}, random weights; made ready in {time.perf_counter() - start:.0f} s."
    failed: list[str] = []
    parts = [f"# SDXL on {device_name()}", circumstances(given), about]
    for name in given.only:
        print(f"{name} …", flush=True)
        try:
            tables = [table.markdown() for table in cases(models, budget, given.repeats)[name]()]
        except OutOfTime:
            tables = [f"**{name}**: left out, {given.minutes:g} minutes were over."]
        except Exception as error:
            traceback.print_exc()
            tables = [f"**{name}**: failed, {repr(error)[:300]}"]
            failed.append(name)
        for table in tables:
            print(f"\n{table}\n", flush=True)
        parts += tables
        out.write_text("\n\n".join([*parts, f"Took {time.perf_counter() - start:.0f} s."]) + "\n", encoding="utf-8")
    print(f"saved to {out}", flush=True)
    return failed


def cases(models: Any, budget: Any, repeats: int) -> dict[str, Callable[[], list[Any]]]:
    """What makes the tables, by name."""
    import gpu_parts
    import gpu_refine
    import gpu_stages
    import gpu_unet

    return {
        "rows": lambda: gpu_unet.rows(models, budget),
        "ways": lambda: gpu_refine.ways(models, budget, repeats),
        "stages": lambda: gpu_stages.stage_split(models, budget),
        "levers": lambda: gpu_refine.levers(models, budget),
        "memory": lambda: gpu_unet.memory(models, budget),
        "cards": lambda: gpu_refine.cards(models, budget),
        "pixels": lambda: gpu_parts.pixels(models, budget),
        "noise": lambda: gpu_parts.noise(models, budget),
        "loras": lambda: gpu_parts.row_loras(models, budget),
        "compile": lambda: gpu_unet.compiled(models, budget),
    }


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"the CPU ({platform.machine()})"


def circumstances(given: argparse.Namespace) -> str:
    import torch
    from comfy.ldm.modules.attention import optimized_attention
    from comfyui_version import __version__

    command = ["python", "benchmarks/gpu_sdxl.py", "--comfyui", "FOLDER", *(["--tiny"] if given.tiny else [])]
    command += ["--only", *given.only] if tuple(given.only) != CASES else []
    lines = [
        f"command: `{shlex.join(command)}`",
        f"GPU: {device_name()}, driver {_driver()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads; {platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, ComfyUI {__version__}, "
        f"attention: {optimized_attention.__name__}",
        time.strftime("%Y-%m-%d"),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _driver() -> str:
    """Of the GPU, as its own tool tells; that tool may be missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.splitlines()[0].strip() if told else "unknown"


if __name__ == "__main__":
    main()
