"""The trained small models as ComfyUI holds them: wide, as files for its loaders, and narrow, for many measurements."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import torch
from comfy.clip_model import CLIPVisionModelProjection
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.ops import disable_weight_init
from comfy.taesd.taesd import TAESD
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter, as_ip_adapter
from torch import Tensor, nn

from harness.clip_files import build_clip_text
from training import networks, widen
from training.weights import TrainedWeights, read

StateDict = dict[str, Tensor]
_SCALE = comfy.latent_formats.SD15().scale_factor


def checkpoint() -> StateDict:
    """SD1.5 layout: the trained UNet and VAE, and the seeded text encoder the UNet was trained beside."""
    trained = read()
    wide = UNetModel(**networks.UNET_CONFIG, model_channels=widen.WIDE_UNET, device="meta")
    parts = {
        "model.diffusion_model.": widen.unet(trained, _shapes(wide)),
        "first_stage_model.": widen.vae(trained, _shapes(TAESD()), _SCALE),
        "cond_stage_model.transformer.": build_clip_text(),
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def clip_vision() -> StateDict:
    """ViT-L/14 layout."""
    path = Path(comfy.clip_vision.__file__).parent / "clip_vision_config_vitl.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    return widen.vision(read(), _shapes(CLIPVisionModelProjection(config, torch.float32, "meta", disable_weight_init)))


def ip_adapter() -> StateDict:
    """IP-Adapter plus layout with 64 tokens."""
    return widen.adapter(read())


class NarrowVAE:
    """What the refiners ask of ComfyUI's VAE, by the network as it was trained: a quarter of the work of the file."""

    latent_channels, latent_dim = networks.LATENT_CHANNELS, 2

    def __init__(self, trained: TrainedWeights) -> None:
        self.network = networks.VAE().eval()
        self.network.load_state_dict(trained.vae)
        self.scale = trained.latent_deviation * _SCALE

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        """[N,H,W,3] in 0..1 to latents [N,4,h,w] in the VAE's scale."""
        return self.network.encode(pixels.movedim(-1, 1)) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents * self.scale).movedim(1, -1).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Narrow:
    """The networks as they were trained, in ComfyUI's own classes.

    Attributes:
        model, clip_vision: ComfyUI's.
        vae: see ``NarrowVAE``.
        adapter: as the loader node gives it.
    """

    model: Any
    vae: NarrowVAE
    clip_vision: Any
    adapter: IPAdapter


def narrow(folder: Path) -> Narrow:
    """Makes the narrow models; ``folder`` takes the image encoder's configuration."""
    trained = read()
    halves: dict[str, StateDict] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in widen.adapter(trained, widen.NARROW_UNET, widen.VISION_WIDTH).items():
        half, name = key.split(".", 1)
        halves[half][name] = tensor
    return Narrow(_model(trained), NarrowVAE(trained), _clip_vision(trained, folder), as_ip_adapter(halves))


def _model(trained: TrainedWeights) -> ModelPatcher:
    size = {"model_channels": widen.NARROW_UNET, "num_head_channels": -1}
    config: dict[str, Any] = {**networks.UNET_CONFIG, **size, "use_temporal_attention": False, "adm_in_channels": None}
    settings = comfy.supported_models.SD15(config)
    settings.unet_config |= size
    settings.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(settings, model_type=comfy.model_base.ModelType.EPS, device="cpu")
    model.diffusion_model.load_state_dict(trained.unet)
    return ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def _clip_vision(trained: TrainedWeights, folder: Path) -> Any:
    path = folder / "narrow_vision.json"
    # adapters read the last layer but one: one more that is not used
    path.write_text(json.dumps(networks.VISION_CONFIG | {"num_hidden_layers": networks.VISION_LAYERS + 1}), "utf-8")
    encoder = comfy.clip_vision.ClipVisionModel(str(path))
    known = {
        name.removeprefix("vision."): tensor for name, tensor in trained.prompt.items() if name.startswith("vision.")
    }
    made = {name: known.get(name, torch.zeros(shape)) for name, shape in _shapes(encoder.model).items()}
    encoder.model.load_state_dict(made)
    return encoder


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
