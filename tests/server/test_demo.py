"""The demo on a real server: faces come back, in as few sampling calls as promised."""

import sys
from pathlib import Path

import numpy as np
import pytest
from builders.demo import demo_graph
from builders.graphs import node_id
from builders.server import ComfyServer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import demo
from training.scenes import CROWD, FACES, Scene

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("server")]


@pytest.mark.parametrize(("scene", "passes", "gain"), [(FACES, 1, 0.05), (CROWD, 2, 0.02)], ids=["faces", "crowd"])
def test_faces_come_nearer_to_the_truth(
    scene: Scene, passes: int, gain: float, server: ComfyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.demonstrate(server, scene, tmp_path)
    printed = capsys.readouterr().out
    before, after, truth = (Image.open(tmp_path / f"{name}.png") for name in ("before", "after", "truth"))
    gains = [
        demo.likeness(after, truth, face.box).ssim - demo.likeness(before, truth, face.box).ssim for face in scene.faces
    ]
    assert np.mean(gains) > gain, printed
    assert f"  {passes} sampling call" in printed
    assert all(f"  {face.name} " in printed for face in scene.faces)
    assert Image.open(tmp_path / "side_by_side.png").width > 3 * truth.width


def test_nothing_but_the_nine_faces_changes(server: ComfyServer) -> None:
    graph = demo_graph(FACES)
    (saved,) = server.run(graph).outputs[node_id(graph, "SaveImage")]["images"]
    changed = (np.asarray(server.image(saved)) != np.asarray(FACES.degraded())).any(-1)
    for x1, y1, x2, y2 in (face.box for face in FACES.faces):
        assert changed[y1:y2, x1:x2].mean() > 0.5
        changed[max(0, y1 - 13) : y2 + 13, max(0, x1 - 13) : x2 + 13] = False
    assert not changed.any()
