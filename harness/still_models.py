"""Small models of the families that draw still pictures without a UNet, and their VAEs.

Of each family ComfyUI's own network is laid out at its published width, on no device: ComfyUI's detection must know it
by its keys and shapes. The model is then made by the family's own class, with the few sizes replaced that make it small,
and holds seeded weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.sd
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from harness.seeding import generator_for
from harness.tiny import seed_weights
from harness.vae import build_vae

Sizes = Mapping[str, Any]
TEXT = 16
"""Width of a text token of the small models."""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        detected: its class in ``comfy.supported_models``.
        network: its network, by module and name.
        layout: sizes of the network at its published width, few blocks deep.
        small: what replaces them.
        vae: makes a VAE that belongs to it.
        text: width of its text tokens, small.
        fields: of a conditioning beside the text.
    """

    detected: str
    network: str
    layout: Sizes
    small: Sizes
    vae: Callable[[], Any]
    text: int = TEXT
    fields: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether this ComfyUI has the family."""
        return hasattr(comfy.supported_models, self.detected)

    def model(self) -> ModelPatcher:
        """A MODEL of the family."""
        module, name = self.network.rsplit(".", 1)
        network = getattr(import_module(module), name)
        operations = comfy.ops.disable_weight_init
        layout = network(**self.layout, device="meta", dtype=torch.float32, operations=operations).state_dict()
        settings = comfy.model_detection.model_config_from_unet(layout, "")
        if type(settings).__name__ != self.detected:
            raise ValueError(f"ComfyUI takes {self.network} for {type(settings).__name__}, not {self.detected}")
        settings.unet_config |= self.small
        settings.set_inference_dtype(torch.float32, None)
        model = settings.get_model(layout, "", device="cpu")
        seed_weights(model.diffusion_model, "still", self.detected)
        return ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))

    def conditioning(self, name: str, tokens: int = 8) -> list[list[Any]]:
        """A CONDITIONING with made-up text embeddings."""
        text = torch.randn((1, tokens, self.text), generator=generator_for("still text", self.detected, name))
        return [[text, {key: make() for key, make in self.fields.items()}]]


def wan_vae() -> Any:
    """The VAE of Qwen-Image, Krea2, Anima, Cosmos-Predict2 and Wan, 8 channels wide: one for videos."""
    vae = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    seed_weights(vae, "wan vae")
    with torch.no_grad():
        vae.decoder.head[2].weight *= 0.3  # colours within what is not clipped
    return comfy.sd.VAE(sd=vae.state_dict())


def flux_vae() -> Any:
    """16 channels at a ratio of 8."""
    return comfy.sd.VAE(sd=build_vae(0.3611, latent_channels=16))


QWEN_IMAGE = Family(
    "QwenImage",
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
    {"num_layers": 1},
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": TEXT,
    },
    wan_vae,
)
