"""Models small enough to run in milliseconds, built on ComfyUI's own classes: UNet, VAE, CLIP vision, IP-Adapter.

Depth and text width are those of SD1.5 and SDXL, so that an IP-Adapter meets all of its 16 or 70 layers; the
channels are 32.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import comfy.clip_vision
import comfy.model_base
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.flux.redux import ReduxImageEncoder
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file
from torch import Tensor, nn

from harness import denoiser, ip_adapter_files
from harness.seeding import StateDict, fan_in_scaled, generator_for
from harness.vae import build_vae

Family = Literal["sd15", "sdxl"]

CHANNELS = 32
CONTEXT = {"sd15": 768, "sdxl": 2048}
LAYERS = {"sd15": 16, "sdxl": 70}
CLIP_HIDDEN, CLIP_POOLED = 64, 48
_SMALL = {"model_channels": CHANNELS, "num_head_channels": 8, "num_heads": -1}

_BRANCH_ENDS = ("to_out.0.weight", "proj_out.weight", "out_layers.3.weight", "ff.net.2.weight")
"""Residual branches add little, or 70 random layers would magnify rounding into chaos."""


def seed_weights(module: nn.Module, *name: object) -> None:
    """Fan-in-scaled weights, norms one, biases zero; the same on every machine."""
    generator = generator_for(*name)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.ndim > 1:
                gain = 0.3 if key.endswith(_BRANCH_ENDS) else 1.0
                parameter.copy_(fan_in_scaled(parameter.shape, generator, gain))
            elif key.endswith(("weight", "scale")):  # older releases name the weight of Flux' norms so
                parameter.fill_(1)
            else:
                parameter.zero_()


def unet(
    family: Family = "sd15",
    extra_channels: int = 0,
    prediction: str = "eps",
    dtype: torch.dtype = torch.float32,
    manual_cast: torch.dtype | None = None,
    edits: bool = False,
) -> ModelPatcher:
    """A MODEL: ComfyUI's own BaseModel and UNetModel in a ModelPatcher.

    Args:
        family: depth, text width and vector conditioning.
        extra_channels: 5 makes an inpaint model.
        prediction: "eps" or "v".
        dtype, manual_cast: of the weights, and of the computation where it is another.
        edits: InstructPix2Pix, which reads a picture beside its latent; takes 4 extra channels.
    """
    config: dict[str, Any] = {**(denoiser.SD15_CONFIG if family == "sd15" else denoiser.SDXL_CONFIG), **_SMALL}
    config |= {"in_channels": 4 + extra_channels, "use_temporal_attention": False}
    config.setdefault("adm_in_channels", None)
    settings = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](config)
    settings.unet_config |= _SMALL  # the families' own head sizes are too wide for these channels
    settings.set_inference_dtype(dtype, manual_cast)
    kind = comfy.model_base.ModelType.V_PREDICTION if prediction == "v" else comfy.model_base.ModelType.EPS
    base = {"sd15": comfy.model_base.BaseModel, "sdxl": comfy.model_base.SDXL}[family]
    if edits:
        base = getattr(comfy.model_base, f"{family.upper()}_instructpix2pix")
    model = base(settings, model_type=kind, device="cpu")
    if extra_channels and not edits:
        model.set_inpaint()
    seed_weights(model.diffusion_model, "tiny unet", family, extra_channels)
    model.eval()
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


FLUX_HIDDEN, FLUX_HEADS = 32, 2


def flux(in_channels: int = 16, text_width: int = 16, double: int = 1, single: int = 1) -> ModelPatcher:
    """A MODEL that is no UNet: ComfyUI's own Flux with one block of each kind.

    Args:
        in_channels: 32 makes a depth or canny model, 96 a fill model.
        text_width: of the tokens it reads; real ones are 4096 wide.
        double, single: blocks of each kind.
    """
    config: dict[str, Any] = {
        "image_model": "flux",
        "in_channels": in_channels,
        "out_channels": 16,
        "vec_in_dim": 16,
        "context_in_dim": text_width,
        "hidden_size": FLUX_HIDDEN,
        "mlp_ratio": 2.0,
        "num_heads": FLUX_HEADS,
        "depth": double,
        "depth_single_blocks": single,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    if "txt_ids_dims" in {field.name for field in dataclasses.fields(FluxParams)}:
        config["txt_ids_dims"] = []  # newer releases want to be told what model detection finds
    settings = comfy.supported_models.Flux(config)
    settings.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.Flux(settings, device="cpu")
    seed_weights(model.diffusion_model, "tiny flux", *([in_channels] if in_channels != 16 else []))
    return ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def svd() -> ModelPatcher:
    """A MODEL that takes the latents of a batch for the frames of a video: Stable Video Diffusion, without weights."""
    config: dict[str, Any] = {
        **denoiser.SD15_CONFIG,
        **_SMALL,
        "in_channels": 8,
        "context_dim": 1024,
        "adm_in_channels": 768,
    }
    config |= {"num_classes": "sequential", "use_temporal_attention": True, "use_temporal_resblock": True}
    config |= {"merge_factor": 0.0, "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1]}
    settings = comfy.supported_models.SVD_img2vid(config | {"extra_ff_mix_layer": True, "use_spatial_context": True})
    settings.unet_config |= _SMALL
    settings.set_inference_dtype(torch.float32, None)
    return ModelPatcher(comfy.model_base.SVD_img2vid(settings, device="cpu"), torch.device("cpu"), torch.device("cpu"))


def flux_conditioning(name: str, tokens: int = 8) -> list[list[Any]]:
    """A CONDITIONING for ``flux``, with made-up text embeddings."""
    generator = generator_for("flux text", name)
    fields = {"pooled_output": torch.randn(1, 16, generator=generator), "guidance": 3.5}
    return [[torch.randn(1, tokens, 16, generator=generator), fields]]


def vae(family: Family = "sd15") -> Any:
    """A VAE: the analytic TAESD, small anyway."""
    scale = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family].latent_format()
    return comfy.sd.VAE(sd=build_vae(scale.scale_factor))


def clip_vision(folder: Path, hidden: int = CLIP_HIDDEN, pooled: int = CLIP_POOLED, image_size: int = 56) -> Any:
    """A CLIP_VISION of two layers that sees ``image_size`` px squared in patches of 14."""
    config = {
        "hidden_size": hidden,
        "projection_dim": pooled,
        "image_size": image_size,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "hidden_act": "gelu",
        "num_channels": 3,
        "model_type": "clip_vision_model",
    }
    path = folder / f"tiny_clip_{hidden}_{pooled}_{image_size}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    model = comfy.clip_vision.ClipVisionModel(str(path))
    seed_weights(model.model, "tiny clip", hidden, pooled)
    return model


def siglip(folder: Path, hidden: int = 32, image_size: int = 56, layers: int = 2) -> Any:
    """A CLIP_VISION of the SigLIP kind: a token for each patch of 14 px, and no projection."""
    config = {
        "hidden_size": hidden,
        "image_size": image_size,
        "patch_size": 14,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "model_type": "siglip_vision_model",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    path = folder / f"tiny_siglip_{hidden}_{image_size}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    model = comfy.clip_vision.ClipVisionModel(str(path))
    seed_weights(model.model, "tiny siglip", hidden)
    generator = generator_for("tiny siglip norm", hidden)
    norm = model.model.vision_model.post_layernorm.weight
    with torch.no_grad():
        norm.copy_(1 + 0.1 * torch.randn(norm.shape, generator=generator))
    return model


def siglip_file(folder: Path, hidden: int = 48) -> tuple[Any, Path]:
    """``siglip``, and a file of its weights with the pooling head that ComfyUI leaves out."""
    model = siglip(folder, hidden)
    weights = model.get_sd() | ip_adapter_files.build_pooling_head(hidden)
    file = folder / f"tiny_siglip_{hidden}.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, file)
    return model, file


def style_model(hidden: int = 32, text_width: int = 16) -> Any:
    """A STYLE_MODEL: ComfyUI's Redux for the tiny SigLIP and the tiny Flux."""
    redux = ReduxImageEncoder(redux_dim=hidden, txt_in_features=text_width)
    seed_weights(redux, "tiny redux", hidden, text_width)
    return comfy.sd.StyleModel(redux)


def ip_adapter_weights(family: Family = "sd15", variant: str = "plus") -> StateDict:
    """Keys and values of an IP-Adapter file for the tiny UNet and the tiny CLIP vision."""
    if variant == "plain":
        return ip_adapter_files.build_plain(family, CLIP_POOLED, CHANNELS)
    if variant == "full_face":
        return ip_adapter_files.build_full_face(family, CLIP_HIDDEN, CHANNELS)
    return ip_adapter_files.build_plus(family, CLIP_HIDDEN, CHANNELS)


def conditioning(family: Family = "sd15", name: str = "positive", tokens: int = 77) -> list[list[Any]]:
    """A CONDITIONING with made-up text embeddings."""
    generator = generator_for("tiny text", family, name)
    text = torch.randn((1, tokens, CONTEXT[family]), generator=generator)
    extra: dict[str, Tensor] = {}
    if family == "sdxl":
        extra["pooled_output"] = torch.randn((1, 1280), generator=generator)
    return [[text, extra]]
