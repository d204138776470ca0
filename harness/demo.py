"""The demo's graphs, as they are queued and as workflows in the side bar of the web page, and crops of its faces."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

from harness.graphs import Graph
from training.pictures import SIDE, to_tensor
from training.scenes import CROWD, FACES, FOLDER, Face, Scene

WORKFLOW_NAMES = {FACES: "Luna demo, nine faces", CROWD: "Luna demo, chess"}
"""What the side bar calls them."""


def demo_graph(scene: Scene) -> Graph:
    """In API form."""
    return dict(json.loads((FOLDER / "api" / f"{scene.name}.json").read_text(encoding="utf-8")))


def place_workflows(base: Path) -> None:
    """Puts the workflows where the page's side bar looks for the user's own; ``base`` is ComfyUI's base directory."""
    folder = base / "user" / "default" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    for scene, name in WORKFLOW_NAMES.items():
        shutil.copyfile(FOLDER / f"{scene.name}.json", folder / f"{name}.json")


def face_crops(picture: Image.Image, faces: Iterable[Face], around: int = 14) -> Tensor:
    """[N,192,192,3] in 0..1: faces of a scene's picture with px around them, at the size the models have learnt."""
    parts = [picture.crop(face.around(around)) for face in faces]
    return to_tensor([part.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for part in parts]).movedim(1, -1)
