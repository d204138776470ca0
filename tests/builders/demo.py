"""The demo's graphs: as they are queued, and as workflows in the side bar of the web page."""

import json
import shutil
from pathlib import Path

from builders.graphs import Graph

from training.scenes import CROWD, FACES, FOLDER, Scene

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
