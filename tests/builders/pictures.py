"""Real photographs that ship inside Python packages, as files for ComfyUI's input folder."""

from pathlib import Path

import skimage.data
from builders.assets import ASTRONAUT
from PIL import Image


def write_pictures(input_dir: Path) -> None:
    input_dir.mkdir(parents=True, exist_ok=True)
    Image.fromarray(skimage.data.astronaut()).save(input_dir / ASTRONAUT)
