import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import workspace
from harness.pictures import write_pictures
from harness.server import ComfyServer


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
