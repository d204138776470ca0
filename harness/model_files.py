"""The small models as files, in the folders where ComfyUI looks for them.

File layouts are the published ones, so that every loader works unchanged. Most weights are seeded and synthetic; those
of the faces family are trained and only made wide here.
"""

from collections.abc import Callable
from pathlib import Path

import comfy.latent_formats
import comfy.sd
from safetensors.torch import save_file

from harness import clip_files, denoiser, ip_adapter_files
from harness.assets import (
    CLIP_VISION,
    FACES_CHECKPOINT,
    FACES_CLIP_VISION,
    FACES_PLUS,
    SD15_CHECKPOINT,
    SD15_LORA,
    SD15_PLAIN,
    SD15_PLUS,
    SDXL_PLAIN,
    SDXL_PLUS,
    SDXL_UNET,
    SDXL_VAE,
)
from harness.lora_files import lora_file
from harness.seeding import StateDict, to_half
from harness.vae import build_vae
from training import family as faces_family

CLIP_VISION_HIDDEN, CLIP_VISION_EMBED = 1024, 768  # ViT-L: width of the hidden states, width of the image embeds


def _sd15_checkpoint() -> StateDict:
    parts = {
        "model.diffusion_model.": denoiser.build_unet(denoiser.SD15_CONFIG, "sd15"),
        "first_stage_model.": build_vae(comfy.latent_formats.SD15().scale_factor),
        "cond_stage_model.transformer.": clip_files.build_clip_text(),
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def _sd15_lora() -> StateDict:
    """Changes the attention a little; it stands in for a few-step LoRA and teaches the model nothing."""
    unet = comfy.sd.load_diffusion_model_state_dict(denoiser.build_unet(denoiser.SD15_CONFIG, "sd15"))
    return lora_file(unet, "few steps")


Builders = dict[str, Callable[[], StateDict]]

_SYNTHETIC: Builders = {
    SD15_CHECKPOINT: _sd15_checkpoint,
    SDXL_UNET: lambda: denoiser.build_unet(denoiser.SDXL_CONFIG, "sdxl"),
    SDXL_VAE: lambda: build_vae(comfy.latent_formats.SDXL.scale_factor),
    CLIP_VISION: clip_files.build_clip_vision,
    SD15_PLUS: lambda: ip_adapter_files.build_plus("sd15", CLIP_VISION_HIDDEN, denoiser.CHANNELS),
    SD15_PLAIN: lambda: ip_adapter_files.build_plain("sd15", CLIP_VISION_EMBED, denoiser.CHANNELS),
    SD15_LORA: _sd15_lora,
    SDXL_PLUS: lambda: ip_adapter_files.build_plus("sdxl", CLIP_VISION_HIDDEN, denoiser.CHANNELS),
    SDXL_PLAIN: lambda: ip_adapter_files.build_plain("sdxl", CLIP_VISION_EMBED, denoiser.CHANNELS),
}
_FACES: Builders = {
    FACES_CHECKPOINT: faces_family.checkpoint,
    FACES_CLIP_VISION: faces_family.clip_vision,
    FACES_PLUS: faces_family.ip_adapter,
}


FAMILIES = {"faces": _FACES, "synthetic": _SYNTHETIC}


def write_models(models_dir: Path, family: str) -> None:
    """Writes a family's files anew, float16, below ComfyUI's ``models`` folder; each appears whole or not at all."""
    for relative, build in FAMILIES[family].items():
        path = models_dir / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(to_half(build()), partial, metadata={"format": "pt"})
        partial.replace(path)
