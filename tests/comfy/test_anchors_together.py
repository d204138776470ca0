"""Everything that can anchor a row of Flux at once: an IP-Adapter, Redux tokens and a reference latent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from luna_refinement.batching.concepts import Concept
from luna_refinement.ip_adapter.comfy_patch import CARRIES_FLUX_ADAPTERS
from torch import Tensor

from harness import tiny
from harness.flux_sampling import refiner_settings
from harness.refining import Studio, counting, difference, labelled, photograph

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
    return refiner_settings("instantx", tmp_path) | {
        "ip_adapter_weight": 0.7,
        "style_model": tiny.style_model(hidden=48),
        "anchor_mode": "both",
        "denoise": 0.7,
    }


def rows(studio: Studio, settings: dict[str, Any], *concepts: Concept, **changes: Any) -> Tensor:
    """[3,64,64,3]: the three refined crops."""
    image = photograph()
    return studio.detail(image, labelled(image, "abc"), concepts=concepts, mask_latent=False, **(settings | changes))[3]


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
