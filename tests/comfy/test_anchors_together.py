"""Everything that can anchor a row of Flux at once: an IP-Adapter, Redux tokens and a reference latent."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from luna_refinement.batching.concepts import Concept
from luna_refinement.ip_adapter.comfy_adapter import load_ip_adapter
from luna_refinement.ip_adapter.comfy_patch import CARRIES_FLUX_ADAPTERS
from luna_refinement.picture.detections import Detections
from safetensors.torch import save_file
from torch import Tensor

from harness import tiny
from harness.flux_sampling import PROMPTS, file_of, network
from harness.refining import BOXES, Studio, counting, detections, photograph
from harness.vae import build_vae

BOUND = 1e-4
EFFECT = 1e-3
CARRIERS: dict[str, dict[str, Any]] = {
    "adapter": {"ip_adapter": None},
    "redux": {"style_model": None},
    "reference": {"anchor_mode": "ip_adapter"},
}
"""What leaves each of them out."""

pytestmark = pytest.mark.skipif(
    not CARRIES_FLUX_ADAPTERS, reason="this ComfyUI cannot replace the attention of a block"
)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A refiner's inputs with all of them; InstantX' adapter and Redux share their SigLIP."""
    model = network()
    save_file(file_of("instantx"), tmp_path / "instantx.safetensors")
    clip_vision, file = tiny.siglip_file(tmp_path)
    return {
        "model": model,
        "vae": comfy.sd.VAE(sd=build_vae(model.model.latent_format.scale_factor, latent_channels=16)),
        "positive": PROMPTS["positive"],
        "negative": PROMPTS["negative"],
        "clip_vision": clip_vision,
        "ip_adapter": load_ip_adapter(str(tmp_path / "instantx.safetensors"), str(file)),
        "ip_adapter_weight": 0.7,
        "style_model": tiny.style_model(hidden=48),
        "anchor_mode": "both",
        "denoise": 0.7,
    }


def three(image: Tensor) -> Detections:
    found = detections(image, BOXES[:3])
    return replace(found, items=tuple(replace(item, label=name) for item, name in zip(found.items, "abc", strict=True)))


def rows(studio: Studio, settings: dict[str, Any], *concepts: Concept, **changes: Any) -> Tensor:
    """[3,64,64,3]: the three refined crops."""
    image = photograph()
    return studio.detail(image, three(image), concepts=concepts, mask_latent=False, **(settings | changes))[3]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_all_of_them_act_in_one_call(sd15: Studio, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, calls = counting(settings["model"])
    together = rows(sd15, settings, model=model)
    assert set(calls) == {3}
    assert "text only" not in caplog.text
    assert "does not act" not in caplog.text
    for name, without in CARRIERS.items():
        assert difference(together, rows(sd15, settings, **without)) > EFFECT, name


def test_a_picture_reaches_its_own_row_alone(sd15: Studio, settings: dict[str, Any]) -> None:
    own = rows(sd15, settings)
    changed = rows(sd15, settings, Concept("b", image=photograph(1, 96, 96)))
    assert torch.equal(own[[0, 2]], changed[[0, 2]])
    assert difference(own[1], changed[1]) > EFFECT


def test_chunks_change_nothing_and_the_model_stays(sd15: Studio, settings: dict[str, Any]) -> None:
    plain = {"ip_adapter": None, "style_model": None, "anchor_mode": "ip_adapter"}
    before = rows(sd15, settings, **plain)
    together = rows(sd15, settings)
    assert difference(together, rows(sd15, settings, chunk_size=1)) <= BOUND
    assert torch.equal(rows(sd15, settings), together)
    assert torch.equal(rows(sd15, settings, **plain), before)


def test_tiles_are_anchored_by_all_of_them_too(sd15: Studio, settings: dict[str, Any]) -> None:
    image = photograph(height=96, width=160)
    together = sd15.chess(image, tile_size=64, **settings)[0]
    assert difference(together, sd15.chess(image, tile_size=64, chunk_size=1, **settings)[0]) <= BOUND
    for name, without in CARRIERS.items():
        assert difference(together, sd15.chess(image, tile_size=64, **(settings | without))[0]) > EFFECT, name
