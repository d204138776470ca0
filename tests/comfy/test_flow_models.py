"""Models that are no UNet with cross-attention work from text alone, say so, and keep rows apart all the same."""

from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch

from harness import tiny
from harness.refining import Studio, detections, photograph
from harness.seeding import generator_for
from harness.vae import build_vae


def conditioning(name: str) -> list[Any]:
    generator = generator_for("flux text", name)
    fields = {"pooled_output": torch.randn(1, 16, generator=generator), "guidance": 3.5}
    return [[torch.randn(1, 8, 16, generator=generator), fields]]


@pytest.fixture
def flux(tmp_path: Path) -> dict[str, Any]:
    """Settings that put Flux in the place of a UNet."""
    model = tiny.flux()
    scale = model.model.latent_format.scale_factor
    return {
        "model": model,
        "vae": comfy.sd.VAE(sd=build_vae(scale, latent_channels=16)),
        "positive": conditioning("positive"),
        "negative": conditioning("negative"),
    }


@pytest.mark.parametrize("sampler_name", ["euler", "dpmpp_2m_sde"])
def test_flux_refines_from_text_with_rows_apart(
    sd15: Studio, flux: dict[str, Any], sampler_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = photograph()
    settings = flux | {"sampler_name": sampler_name}
    anchored = sd15.detail(image, detections(image), **settings)
    assert "text only" in caplog.text
    assert torch.equal(anchored[0], sd15.detail(image, detections(image), ip_adapter=None, **settings)[0])
    assert (anchored[0] != image).any()
    alone = sd15.detail(image, detections(image), chunk_size=1, **settings)[3]
    assert float((anchored[3] - alone).abs().max()) <= 1e-4


def test_flux_runs_in_the_chess_refiner(sd15: Studio, flux: dict[str, Any]) -> None:
    image = photograph(height=96, width=120)
    refined = sd15.chess(image, tile_size=64, **flux)[0]
    assert torch.isfinite(refined).all()
    assert (refined != image).any()
