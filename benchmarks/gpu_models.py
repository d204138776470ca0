"""SDXL at full size in ComfyUI's own classes, with random weights that are made on the GPU: nothing is downloaded.

The tiny form, for a machine without a GPU, has the same levels and text width at 32 channels, and less to do.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_base
import comfy.model_management as management
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_patcher import ModelPatcher
from flops import TINY_UNET, unet_config, vae_config
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter, as_ip_adapter
from luna_refinement.ip_adapter.layers import attention_layers
from torch import Tensor, nn

from harness import tiny
from harness.ip_adapter_files import build_plus

CLIP_HIDDEN = 1280
_WITHOUT_LAYERS = 1  # keys and values of every layer come from the UNet's own widths instead


@dataclass(frozen=True, eq=False)
class Models:
    """Everything a refiner needs, and the sizes that suit it.

    Attributes:
        name: for tables.
        is_tiny: for a machine without a GPU.
        model, vae, clip_vision: ComfyUI's.
        adapter: a plus adapter with 16 tokens for each of the UNet's layers, 70 at full size.
        positive, negative: CONDITIONING.
        sides: px of the crops, the largest first.
        box_px: side of a region in the picture.
        aside: faces in a row of faces, and tiles in a row of tiles.
        steps: on faces and on tiles, and of a usual and a few-step recipe.
    """

    name: str
    is_tiny: bool
    model: ModelPatcher
    vae: Any
    clip_vision: Any
    adapter: IPAdapter
    positive: list[Any]
    negative: list[Any]
    sides: tuple[int, ...]
    box_px: int
    aside: tuple[int, int] = (3, 5)
    steps: tuple[int, int, int, int] = (8, 4, 20, 8)


def build(is_tiny: bool) -> Models:
    """All models, on the devices where ComfyUI's loaders leave them."""
    model = _unet(is_tiny)
    clip_vision = tiny.clip_vision(Path(tempfile.mkdtemp())) if is_tiny else _vit_h()
    parts = {
        "model": model,
        "vae": _vae(is_tiny),
        "clip_vision": clip_vision,
        "adapter": _adapter(model, tiny.CLIP_HIDDEN if is_tiny else CLIP_HIDDEN),
        "positive": tiny.conditioning("sdxl", "positive"),
        "negative": tiny.conditioning("sdxl", "negative"),
    }
    if is_tiny:
        return Models("SDXL's levels at 32 channels", True, **parts, sides=(64,), box_px=32, aside=(2, 2),
                      steps=(1, 1, 2, 1))  # fmt: skip
    return Models("SDXL at full size", False, **parts, sides=(1024, 768, 512), box_px=320)


def random_weights(shape: torch.Size, gain: float = 1.0) -> Tensor:
    """Scaled by the fan-in, made where ComfyUI computes."""
    return torch.randn(shape, device=management.get_torch_device()) * (gain / shape[1:].numel() ** 0.5)


def fill(module: nn.Module) -> None:
    """Random weights, norms one, biases zero; residual branches add little, or half precision would overflow."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(random_weights(parameter.shape, 0.3 if key.endswith(_BRANCH_ENDS) else 1.0))
            else:
                parameter.fill_(1.0 if key.endswith("weight") else 0.0)


_BRANCH_ENDS = (
    *("to_out.0.weight", "proj_out.weight", "out_layers.3.weight", "ff.net.2.weight"),  # UNet
    *("conv2.weight", "out_proj.weight", "fc2.weight"),  # VAE, CLIP vision
)


def _unet(is_tiny: bool) -> ModelPatcher:
    load, offload = management.get_torch_device(), management.unet_offload_device()
    settings = comfy.supported_models.SDXL(unet_config(is_tiny) | {"use_temporal_attention": False})
    if is_tiny:
        settings.unet_config |= TINY_UNET  # the family's own head size is too wide for these channels
    offered = settings.supported_inference_dtypes
    dtype = management.unet_dtype(model_params=2_600_000_000, supported_dtypes=offered)
    settings.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load, offered))
    model = comfy.model_base.SDXL(settings, device=offload)
    fill(model.diffusion_model)
    return ModelPatcher(model.eval(), load, offload)


def _vae(is_tiny: bool) -> Any:
    config = vae_config(is_tiny)
    network = AutoencoderKL(**config)
    fill(network)
    return comfy.sd.VAE(sd=network.state_dict(), config={"params": config})


def _vit_h() -> Any:
    path = Path(comfy.clip_vision.__file__).with_name("clip_vision_config_h.json")
    assert json.loads(path.read_text(encoding="utf-8"))["hidden_size"] == CLIP_HIDDEN
    clip_vision = comfy.clip_vision.ClipVisionModel(str(path))
    fill(clip_vision.model)
    return clip_vision


def _adapter(model: ModelPatcher, clip_hidden: int) -> IPAdapter:
    """In the layout of the published files, in half precision as they are, through the pack's own reader."""
    halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in build_plus("sdxl", clip_hidden, _WITHOUT_LAYERS).items():
        half, name = key.split(".", 1)
        if half == "image_proj":
            halves[half][name] = value.half()
    for pair, layer in enumerate(attention_layers(model.get_model_object("diffusion_model"))):
        for kind in "kv":
            weights = random_weights(torch.Size((layer.inner_dim, layer.context_dim)))
            halves["ip_adapter"][f"{2 * pair + 1}.to_{kind}_ip.weight"] = weights.half().cpu()
    return as_ip_adapter(halves)
