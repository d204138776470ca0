"""IP-Adapters of Flux and of Kolors through the nodes: loader, both refiners, Apply IP-Adapter per Row."""

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from luna_refinement.batching.comfy_prompts import check_prompts
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter
from luna_refinement.ip_adapter.comfy_patch import layers_for
from luna_refinement.ip_adapter.files import AdapterLayout
from luna_refinement.nodes.ip_adapter import LunaApplyIPAdapter, LunaIPAdapterEmbeds, LunaIPAdapterLoader
from safetensors.torch import save_file

from harness import denoiser, tiny
from harness.anchored_sampling import change
from harness.flux_sampling import KINDS, file_of, refiner_settings, sample
from harness.refining import Studio, detections, photograph

ACTS = 1e-3  # a change no rounding makes


@pytest.mark.parametrize("kind", KINDS)
class TestNodes:
    @pytest.fixture
    def settings(self, kind: str, tmp_path: Path) -> dict[str, Any]:
        """A refiner's inputs, with the adapter as the loader node gives it."""
        return refiner_settings(kind, tmp_path)

    def test_both_refiners_anchor_rows(
        self, sd15: Studio, settings: dict[str, Any], kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        image = photograph(height=160, width=200)
        found = detections(image, [(10, 10, 70, 70), (90, 20, 150, 80), (40, 90, 100, 150)])
        text = settings | {"ip_adapter": None}
        anchored = sd15.detail(image, found, **settings)
        assert "text only" not in caplog.text
        assert change(anchored[3], sd15.detail(image, found, **text)[3]) > ACTS
        one_by_one = sd15.detail(image, found, chunk_size=1, **settings)
        assert float((anchored[3] - one_by_one[3]).abs().max()) <= 1e-4
        assert torch.equal(sd15.detail(image, found, **settings)[0], anchored[0])
        weightless = sd15.detail(image, found, ip_adapter_weight=0.0, **settings)
        assert torch.equal(weightless[3], sd15.detail(image, found, **text)[3])
        tiles = sd15.chess(image, tile_size=64, **settings)[0]
        assert (tiles != sd15.chess(image, tile_size=64, **text)[0]).any()
        assert torch.equal(sd15.detail(image, found, denoise=0.0, **settings)[0], image)

    def test_apply_anchors_latent_i_by_image_i(self, settings: dict[str, Any], kind: str) -> None:
        images = torch.cat([photograph(height=64, width=64), photograph(2, 128, 96)[:, :64, :64]])
        rest = {"weight": 1.0, "start": 0.0, "end": 1.0, "scaling": "V only", "row_weights": ""}
        names = ("model", "ip_adapter", "clip_vision")
        given = {name: settings[name] for name in names} | rest
        with torch.inference_mode():
            (patched,) = LunaApplyIPAdapter.execute(images=images, **given).result
            (embedded,) = LunaIPAdapterEmbeds.execute(given["ip_adapter"], given["clip_vision"], images).result
            (again,) = LunaApplyIPAdapter.execute(embeds=embedded, **{**given, "clip_vision": None}).result
            (other,) = LunaApplyIPAdapter.execute(images=images[[0, 2, 2]], **given).result
        before = sample(patched)
        assert torch.equal(sample(again), before)
        moved = [change(a, b) for a, b in zip(sample(other), before, strict=True)]
        assert moved[1] > ACTS
        assert (moved[0], moved[2]) == (0.0, 0.0)


def test_the_loader_reads_adapter_and_pooling_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, siglip = tiny.siglip_file(tmp_path)
    save_file(file_of("instantx"), tmp_path / "instantx.safetensors")
    for folder in ("ipadapter", "clip_vision"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path)], {".safetensors"}))
    (loaded,) = LunaIPAdapterLoader.execute("instantx.safetensors", siglip.name).result
    assert loaded.pooling.model.name == siglip.name
    assert LunaIPAdapterLoader.execute("instantx.safetensors").result[0].pooling is None
    with pytest.raises(LunaInputError, match=r"pooling_file 'gone.safetensors' is not in models/clip_vision"):
        LunaIPAdapterLoader.execute("instantx.safetensors", "gone.safetensors")


class TestKolors:
    def kolors(self, adm_channels: int) -> Any:
        config = {**denoiser.SDXL_CONFIG, "model_channels": 32, "num_head_channels": 8, "adm_in_channels": adm_channels}
        network = UNetModel(**{**config, "num_heads": -1}, device="cpu")
        patcher = tiny.unet("sdxl")
        patcher.model.diffusion_model = network
        return patcher

    def test_its_adapter_fits_its_network_and_not_sdxl(self) -> None:
        layout = AdapterLayout("plus", 64, 2048, 16, tuple(range(1, 140, 2)), (32,) * 70, "kolors")
        adapter = IPAdapter("kolors.bin", layout, tiny.unet())
        assert len(layers_for(self.kolors(5632), adapter)) == 70
        with pytest.raises(LunaInputError, match=r"'kolors.bin' was made for Kolors .* but model is SDXL"):
            layers_for(self.kolors(2816), adapter)
        with pytest.raises(LunaInputError, match=r"'kolors.bin' was made for Kolors .* reads text tokens 768 wide"):
            layers_for(tiny.unet("sd15"), adapter)

    def test_its_text_is_as_wide_as_what_narrows_it(self) -> None:
        model = self.kolors(5632)
        model.model.diffusion_model.encoder_hid_proj = torch.nn.Linear(4096, 2048)
        fields = {"pooled_output": torch.zeros(1, 1280)}
        check_prompts(model, {"positive": [[torch.zeros(1, 8, 4096), fields]]})
        with pytest.raises(LunaInputError, match="positive holds text 2048 wide, model reads text 4096 wide"):
            check_prompts(model, {"positive": [[torch.zeros(1, 8, 2048), fields]]})
