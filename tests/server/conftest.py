import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.server import ComfyServer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import workspace


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    """The newest ComfyUI, or the user's own, with the pack and the small models."""
    with ComfyServer(workspace.comfyui_path(), workspace.BASE) as running:
        yield running


@pytest.fixture(scope="session")
def older_server() -> Iterator[ComfyServer]:
    """The oldest supported ComfyUI with the front end it pins."""
    release = workspace.RELEASES[1]
    if os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is set: only that ComfyUI is tested")
    packages = workspace.front_end_path(release)
    with ComfyServer(workspace.release_path(release), workspace.BASE, packages=packages) as running:
        yield running
