"""The demo's scenes, refined as its graphs say by the narrow networks: what the files do, at a part of the work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from luna_refinement.nodes.chess import LunaChessRefiner
from luna_refinement.nodes.detailer import LunaSemanticDetailer
from luna_refinement.nodes.detections import LunaDetectionsFromBoxes
from luna_refinement.nodes.upscale import LunaPrepUpscale
from PIL import Image
from torch import Tensor

from harness import demonstration
from harness.demo import demo_graph
from harness.graphs import node_id
from training.family import narrow
from training.pictures import to_tensor
from training.scenes import CROWD, FACES, Scene

TEXT = [[torch.zeros(1, 77, 768), {}]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    small = narrow(tmp_path_factory.mktemp("narrow"))
    return {
        "model": small.model,
        "vae": small.vae,
        "clip_vision": small.clip_vision,
        "ip_adapter": small.adapter,
        "positive": TEXT,
        "negative": TEXT,
    }


def plain(scene: Scene, node: str) -> dict[str, Any]:
    """The values that the demo's graph gives a node, without what is connected."""
    graph = demo_graph(scene)
    inputs = graph[node_id(graph, node)]["inputs"]
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


def start(scene: Scene) -> Tensor:
    """[1,H,W,3]"""
    return to_tensor([scene.degraded()]).movedim(1, -1)


def gain(scene: Scene, image: Tensor, score: Callable[[demonstration.Likeness], float]) -> float:
    """How much nearer to the truth the faces are on average than at the start."""
    after = Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8))
    ends, starts = demonstration.likenesses(after, scene), demonstration.likenesses(scene.degraded(), scene)
    return float(np.mean([score(end) - score(start) for end, start in zip(ends, starts, strict=True)]))


def refine_faces(models: dict[str, Any], **settings: Any) -> Tensor:
    image = start(FACES)
    found = LunaDetectionsFromBoxes.execute(image=image, **plain(FACES, "LunaDetectionsFromBoxes")).result[0]
    values = models | plain(FACES, "LunaSemanticDetailer") | settings
    with torch.inference_mode():
        return LunaSemanticDetailer.execute(image=image, detections=found, **values).result[0]


def test_nine_faces_come_nearer_to_the_truth(models: dict[str, Any]) -> None:
    assert gain(FACES, refine_faces(models), lambda found: found.ssim) > 0.05


def test_without_their_anchors_they_do_not(models: dict[str, Any]) -> None:
    anchored, plainly = refine_faces(models), refine_faces(models, ip_adapter_weight=0.0)
    assert gain(FACES, anchored, lambda found: found.psnr) > gain(FACES, plainly, lambda found: found.psnr) + 1


def test_a_crowd_in_tiles_comes_nearer_to_the_truth(models: dict[str, Any]) -> None:
    """At fewer steps than the demo takes, for time."""
    large = LunaPrepUpscale.execute(image=start(CROWD), **plain(CROWD, "LunaPrepUpscale")).result[0]
    values = models | plain(CROWD, "LunaChessRefiner") | {"steps": 3}
    with torch.inference_mode():
        image = LunaChessRefiner.execute(image=large, **values).result[0]
    assert image.shape == start(CROWD).shape
    assert gain(CROWD, image, lambda found: found.ssim) > 0.03
