import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import workspace
from harness.browser import find_chromium
from harness.page import ComfyPage, fresh_base
from harness.server import ComfyServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI that nobody has used yet, with the pack and the small models."""
    if find_chromium() is None:
        pytest.skip("Chromium is not installed")
    with ComfyServer(workspace.comfyui_path(), fresh_base(tmp_path_factory.mktemp("base"))) as running:
        yield running


@pytest.fixture
def older_page(tmp_path: Path) -> Iterator[ComfyPage]:
    """The web page of the oldest supported ComfyUI."""
    if find_chromium() is None:
        pytest.skip("Chromium is not installed")
    if os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is set: only that ComfyUI is tested")
    release = workspace.RELEASES[1]
    comfyui, packages = workspace.release_path(release), workspace.front_end_path(release)
    with (
        ComfyServer(comfyui, fresh_base(tmp_path / "base"), packages=packages) as running,
        ComfyPage(running) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[ComfyPage]:
    """ComfyUI's web page in one browser for all tests of a module."""
    with ComfyPage(server) as opened:
        yield opened
