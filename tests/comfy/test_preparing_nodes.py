"""Refine Plan, Prep Upscale and Noise Scaffold as nodes, on real ComfyUI and a real (tiny) upscale model."""

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy_extras.nodes_upscale_model import UpscaleModelLoader
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.plan import LunaRefinePlan
from luna_refinement.nodes.upscale import LunaNoiseScaffold, LunaPrepUpscale
from safetensors.torch import save_file
from spandrel.architectures.ESRGAN import ESRGAN

from harness.anchored_sampling import run_node
from harness.refining import Studio, detections, photograph

PLAN = {
    "steps": 20, "crop_size": 64, "padding": 0.15, "feather": 8, "mask_mode": "mask", "overlap_mode": "together",
    "tile_size": 64, "min_overlap": 0.125, "tile_feather": 1.0, "tile_order": "chess", "chunk_size": 0,
}  # fmt: skip


def test_the_plan_of_tiles_names_passes_and_rows(sd15: Studio) -> None:
    image = photograph(height=256, width=256)
    drawing, summary = LunaRefinePlan.execute(image, sd15.model, sd15.vae, **PLAN).result
    assert drawing.shape == image.shape
    assert not torch.equal(drawing, image)
    assert "25" in summary
    assert "13" in summary
    assert "12" in summary


def test_the_plan_of_detections_is_drawn_without_sampling(sd15: Studio) -> None:
    image = photograph()
    output = LunaRefinePlan.execute(image, sd15.model, sd15.vae, detections=detections(image), **PLAN)
    drawing, summary = output.result
    assert (drawing != image).any()
    assert output.ui["text"] == (summary,)


@pytest.fixture
def upscale_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny ESRGAN as ComfyUI's own loader gives it; what it attaches differs from release to release."""
    torch.manual_seed(0)
    weights = ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=2).state_dict()
    save_file(weights, tmp_path / "tiny.safetensors")
    extensions = folder_paths.folder_names_and_paths["upscale_models"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "upscale_models", ([str(tmp_path)], extensions))
    return run_node(UpscaleModelLoader, "tiny.safetensors")


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("with_model", [False, True])
def test_prep_upscale_hits_the_size(channels: int, with_model: bool, upscale_model: Any) -> None:
    image = torch.rand(1, 60, 90, channels)
    with torch.inference_mode():
        model = upscale_model if with_model else None
        result = LunaPrepUpscale.execute(image, 256, "lanczos", 64, model).result[0]
    assert result.shape == (1, 192, 256, channels)
    assert torch.isfinite(result).all()


def test_a_scaffold_gives_the_same_place_the_same_noise(sd15: Studio) -> None:
    image = photograph(height=256, width=256)
    scaffold = LunaNoiseScaffold.execute(sd15.vae, 5, 1, 0, 0, image).result[0]
    noise = scaffold["samples"]
    assert noise.shape == (1, 4, 32, 32)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    first = sd15.chess(image, noise_scaffold=scaffold, steps=1, tile_size=64)[0]
    assert torch.equal(first, sd15.chess(image, noise_scaffold=scaffold, steps=1, tile_size=64)[0])
    other = LunaNoiseScaffold.execute(sd15.vae, 6, 1, 0, 0, image).result[0]
    assert not torch.equal(first, sd15.chess(image, noise_scaffold=other, steps=1, tile_size=64)[0])
    with pytest.raises(LunaInputError, match="noise_scaffold"):
        sd15.chess(photograph(height=128, width=256), noise_scaffold=scaffold, tile_size=64)
