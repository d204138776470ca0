"""A real ComfyUI, and the pack, for a process that imports them."""

import importlib.util
import os
import sys

from harness.workspace import PACK, ROOT, comfyui_path


def use_cores(count: int) -> None:
    """Computes with this many threads, unless OMP_NUM_THREADS says otherwise; before PyTorch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(count))


def start_worker() -> None:
    """Makes a process of a pool ready. One thread each: small networks gain more from a process for every core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    make_importable()


def make_importable() -> None:
    """Makes ComfyUI importable, on the CPU where there is no CUDA device, and the repository as ``luna_refinement``.

    Raises:
        SystemExit: there is no ComfyUI.
    """
    _import_comfyui()
    _import_pack()


def _import_comfyui() -> None:
    comfyui = comfyui_path()
    if not (comfyui / "comfy").is_dir():
        raise SystemExit(f"no ComfyUI at {comfyui}: run `nox -s tests`, or set COMFYUI_PATH")
    sys.path.insert(0, str(comfyui))
    # As main.py does, before nodes.py puts the comfy folder, which has a utils.py of its own, first on the path.
    import torch
    import utils.extra_config  # noqa: F401
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True


def _import_pack() -> None:
    """By its folder, as ComfyUI itself does, whatever the folder is called."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
