"""The demo's scenes: what is shipped is what the code draws, of faces that were never learnt, and boxes fit them."""

import json
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from harness.demo import demo_graph
from harness.graphs import node_id
from training import faces
from training.scenes import FACES, SCENES, Scene

needs_font = pytest.mark.skipif(
    faces.font_file() is None, reason="the font of the package fonts-noto-color-emoji is not installed"
)


def ssim(a: Image.Image, b: Image.Image) -> float:
    return float(structural_similarity(np.asarray(a), np.asarray(b), channel_axis=-1))


@needs_font
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_no_face_was_learnt_from(scene: Scene) -> None:
    kept_out = {text for kind in faces.kept_out_kinds() for text in kind.texts}
    assert {face.text for face in scene.faces} <= kept_out


@needs_font
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_shipped_picture_is_what_the_code_draws(scene: Scene) -> None:
    """As near as JPEG of this quality is to its original."""
    shipped, drawn = (np.asarray(picture).astype(np.float32) for picture in (scene.truth(), scene.draw()))
    assert shipped.shape == drawn.shape
    off = np.abs(shipped - drawn)
    assert off.mean() < 2
    assert max(off[y1:y2, x1:x2].mean() for x1, y1, x2, y2 in (face.box for face in scene.faces)) < 3


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_every_face_has_a_name_and_a_box_of_its_own_in_the_picture(scene: Scene) -> None:
    width, height = scene.truth().size
    assert (width, height) == scene.size
    assert len({face.name for face in scene.faces}) == len({face.text for face in scene.faces}) == len(scene.faces)
    for x1, y1, x2, y2 in (face.box for face in scene.faces):
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
    for a, b in combinations([face.box for face in scene.faces], 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_there_are_nine_and_the_graph_names_them_and_their_boxes() -> None:
    graph = demo_graph(FACES)
    given = json.loads(graph[node_id(graph, "LunaDetectionsFromBoxes")]["inputs"]["boxes_json"])
    assert len(given["boxes"]) == 9
    assert given == json.loads(FACES.boxes_json())


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_demo_starts_from_much_less(scene: Scene) -> None:
    truth, start = scene.truth(), scene.degraded()
    assert start.size == truth.size
    assert max(ssim(start.crop(face.box), truth.crop(face.box)) for face in scene.faces) < 0.85
    assert np.array_equal(np.asarray(start), np.asarray(scene.degraded()))  # the same every time


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_graph_loads_what_set_up_makes(scene: Scene) -> None:
    graph = demo_graph(scene)
    assert graph[node_id(graph, "LoadImage")]["inputs"]["image"] == scene.input_name
