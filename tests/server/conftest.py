import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.pictures import write_pictures
from builders.server import ComfyServer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import workspace


@pytest.fixture(scope="session")
def base() -> Path:
    """The base directory of both servers, with the pictures that the workflows load."""
    write_pictures(workspace.BASE / "input")
    return workspace.BASE


@pytest.fixture(scope="session")
def server(base: Path) -> Iterator[ComfyServer]:
    """The newest ComfyUI, or the user's own, with the pack and the small models."""
    with ComfyServer(workspace.comfyui_path(), base) as running:
        yield running


@pytest.fixture(scope="session")
def older_server(base: Path) -> Iterator[ComfyServer]:
    """The oldest supported ComfyUI with the front end it pins."""
    release = workspace.RELEASES[1]
    if os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is set: only that ComfyUI is tested")
    packages = workspace.front_end_path(release)
    with ComfyServer(workspace.release_path(release), base, packages=packages) as running:
        yield running
