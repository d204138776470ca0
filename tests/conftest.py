"""Puts a real ComfyUI on the path and imports the pack by its folder, the way ComfyUI itself does."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from harness.comfyui import make_importable

make_importable()
