"""Puts ComfyUI, the pack and the test builders on the path of a benchmark; import it before anything of theirs."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import workspace  # noqa: E402


def use_cores(count: int) -> None:
    """Computes with this many threads, unless OMP_NUM_THREADS says otherwise; before PyTorch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(count))


def import_comfyui() -> None:
    """Puts ComfyUI on the path, on the CPU where there is no CUDA device.

    Raises:
        SystemExit: there is no ComfyUI.
    """
    comfyui = workspace.comfyui_path()
    if not (comfyui / "comfy").is_dir():
        raise SystemExit(f"no ComfyUI at {comfyui}: run `nox -s bench`, or set COMFYUI_PATH")
    sys.path.insert(0, str(comfyui))
    # As main.py does, before nodes.py puts the comfy folder, which has a utils.py of its own, first on the path.
    import torch
    import utils.extra_config  # noqa: F401
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True


def import_pack() -> None:
    """Makes the repository importable as ``luna_refinement`` whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(
        workspace.PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[workspace.PACK] = module
    spec.loader.exec_module(module)


def model_file(relative: str) -> str:
    """Path of a small model below the workspace's ``models`` folder."""
    path = workspace.BASE / "models" / relative
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run `nox -s bench`, which makes the small models")
    return str(path)
