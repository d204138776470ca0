"""The demo's workflows in the Workflows side bar of ComfyUI's own web page."""

from pathlib import Path

import numpy as np
import pytest

from harness.demo import WORKFLOW_NAMES, demo_graph, place_workflows
from harness.graphs import change, node_id
from harness.page import ComfyPage
from harness.server import ComfyServer
from training.scenes import FACES, SCENES, Scene

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


@pytest.fixture(autouse=True)
def placed(server: ComfyServer) -> None:
    place_workflows(server.base)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_side_bar_opens_the_graph_of_the_demo(scene: Scene, page: ComfyPage, tmp_path: Path) -> None:
    page.reload()
    page.open_saved(WORKFLOW_NAMES[scene])
    page.browser.screenshot().save(tmp_path / f"{scene.name}.png")
    assert page.missing_types() == []
    assert page.errors == []
    assert page.prompt() == demo_graph(scene)
    assert page.overlapping() == []


def test_the_page_makes_the_same_picture_as_the_demo(server: ComfyServer, page: ComfyPage, tmp_path: Path) -> None:
    graph = demo_graph(FACES)
    save = node_id(graph, "SaveImage")
    page.reload()
    page.open_saved(WORKFLOW_NAMES[FACES])
    (shown,) = page.queue()[save]["images"]
    assert page.shown_pictures(save) == [FACES.size]
    page.browser.screenshot().save(tmp_path / "after_the_run.png")
    again = change(graph, "SaveImage", filename_prefix="luna/queued")
    (queued,) = server.run(again).outputs[save]["images"]
    assert queued["filename"] != shown["filename"]
    assert np.array_equal(np.asarray(server.image(queued)), np.asarray(server.image(shown)))
