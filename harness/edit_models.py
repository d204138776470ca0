"""Models that read reference latents, small enough to run in milliseconds, of ComfyUI's own classes.

Widths and depths are small; what tells one family from another is as in its files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.lumina.model
import comfy.model_base
import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

from harness import tiny
from harness.seeding import generator_for
from harness.still_models import flux_vae, wan_vae
from harness.vae import build_vae

TEXT, VECTOR = 16, 16


def flux2() -> ModelPatcher:
    """Flux.2: latents of 128 channels, modulation shared by the blocks, references told apart by their index."""
    config = tiny.flux().model.model_config.unet_config | {
        "image_model": "flux2",
        "in_channels": 128,
        "out_channels": 128,
        "vec_in_dim": None,
        "axes_dim": [4, 4, 4, 4],
        "theta": 2000,
        "patch_size": 1,
        "qkv_bias": False,
        "global_modulation": True,
        "mlp_silu_act": True,
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
    }
    if "txt_ids_dims" in config:
        config["txt_ids_dims"] = [3]
    return _patcher(comfy.model_base.Flux2, comfy.supported_models.Flux2, config)


def omnigen2() -> ModelPatcher:
    """OmniGen2: references have an embedder and a refiner of their own."""
    config = {
        "image_model": "omnigen2",
        "axes_dim_rope": [8, 8, 8],
        "axes_lens": [256, 64, 64],
        "hidden_size": 48,
        "in_channels": 16,
        "multiple_of": 8,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "text_feat_dim": TEXT,
        "timestep_scale": 1000.0,
    }
    return _patcher(comfy.model_base.Omnigen2, comfy.supported_models.Omnigen2, config)


def lumina(z_image: bool) -> ModelPatcher:
    """Z-Image, whose Omni reads references, or Lumina 2, which shares its class and reads none."""
    config = {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 256,
        "cap_feat_dim": TEXT,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "multiple_of": 8,
        "ffn_dim_multiplier": 2.0,
        "qk_norm": True,
        "axes_dims": [32, 48, 48],
        "axes_lens": [256, 64, 64],
    }
    if z_image:
        config |= {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32, "rope_theta": 256.0}
    settings = comfy.supported_models.ZImage if z_image else comfy.supported_models.Lumina2
    return _patcher(comfy.model_base.Lumina2, settings, config)


def qwen_image() -> ModelPatcher:
    """Qwen-Image, of which Qwen-Image-Edit is one: latents of one frame."""
    config = {
        "image_model": "qwen_image",
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": TEXT,
    }
    return _patcher(comfy.model_base.QwenImage, comfy.supported_models.QwenImage, config)


def _patcher(kind: type[Any], settings: type[Any], config: dict[str, Any]) -> ModelPatcher:
    chosen = settings(config)
    chosen.set_inference_dtype(torch.float32, None)
    model = kind(chosen, device="cpu")
    tiny.seed_weights(model.diffusion_model, "tiny", config["image_model"])
    return ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def flux2_vae() -> Any:
    """128 channels; those of published files lie at a ratio of 16, these at 8."""
    return comfy.sd.VAE(sd=build_vae(1.0, latent_channels=128))


@dataclass(frozen=True)
class Family:
    """How a family's model, its VAE and its text are made."""

    model: Callable[[], ModelPatcher]
    vae: Callable[[], Any]
    masked_text: bool = False

    def settings(self) -> dict[str, Any]:
        """A refiner's model, vae and prompts."""
        return {
            "model": self.model(),
            "vae": self.vae(),
            "positive": self.text("positive"),
            "negative": self.text("negative"),
        }

    def text(self, name: str) -> list[Any]:
        generator = generator_for("text of edit models", name)
        fields: dict[str, Any] = {"pooled_output": torch.randn(1, VECTOR, generator=generator), "guidance": 3.5}
        if self.masked_text:
            fields["attention_mask"] = torch.ones(1, 8, dtype=torch.long)
        return [[torch.randn(1, 8, TEXT, generator=generator), fields]]


FAMILIES: dict[str, Family] = {
    "flux": Family(tiny.flux, flux_vae),
    "flux2": Family(flux2, flux2_vae),
    "omnigen2": Family(omnigen2, flux_vae, masked_text=True),
    "qwen_image": Family(qwen_image, wan_vae),
    "z_image": Family(lambda: lumina(z_image=True), flux_vae),
}
