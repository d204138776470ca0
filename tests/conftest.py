"""Puts a real ComfyUI on the path and imports the pack by its folder, the way ComfyUI itself does."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".cache" / "comfyui" / "0.3.75")


def _import_pack() -> None:
    """Makes the repository importable as ``luna_refinement`` whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(
        "luna_refinement", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["luna_refinement"] = module
    spec.loader.exec_module(module)


def _import_comfyui() -> None:
    if not (COMFYUI / "comfy").is_dir():
        raise pytest.UsageError(f"no ComfyUI at {COMFYUI}: run `nox -s tests`, or set COMFYUI_PATH")
    sys.path.insert(0, str(COMFYUI))
    sys.path.append(str(ROOT))  # for ``training``; last, because ComfyUI has a module ``nodes`` of its own
    # As main.py does, before nodes.py puts the comfy folder, which has a utils.py of its own, first on the path.
    import utils.extra_config  # noqa: F401
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True


_import_comfyui()
_import_pack()
