"""Small models of the families that draw pictures without a UNet, and their VAEs.

Of each family ComfyUI's own network is laid out at its published width, on no device: ComfyUI's detection must know it
by its keys and shapes. The model is then made by the family's own class, with the few sizes replaced that make it
small, and holds seeded weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan.vae import WanVAE
from comfy.model_patcher import ModelPatcher
from torch import nn

from harness.seeding import StateDict, generator_for
from harness.tiny import seed_weights
from harness.vae import build_vae

Sizes = Mapping[str, Any]

_TEXT = 16
"""Width of a text token of the small models."""

_TOKENS = 8

_CPU = torch.device("cpu")


# -- VAEs ------------------------------------------------------------------------------------------


def flux_vae() -> Any:
    """16 channels at a ratio of 8."""
    return comfy.sd.VAE(sd=build_vae(0.3611, latent_channels=16))


def wan_vae() -> Any:
    """16 channels at a ratio of 8, for videos: Wan's, and that of Qwen-Image, Krea2, Anima and Cosmos-Predict2."""
    network = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    seed_weights(network, "wan vae")
    with torch.no_grad():
        network.decoder.head[2].weight *= 0.3  # colours that are not clipped
    try:
        return comfy.sd.VAE(sd=network.state_dict())
    except RuntimeError:  # ComfyUI 0.3.52 makes the published width alone
        return _narrowed({"decoder.middle.0.residual.0.gamma": torch.empty(384, 1, 1, 1)}, network)


def flux2_vae() -> Any:
    """128 channels at a ratio of 16."""
    sizes = {"double_z": True, "z_channels": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 4, 4]}
    more = {"resolution": 256, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "batch_norm_latent": True}
    network = AutoencoderKL(ddconfig=sizes | more, embed_dim=32)
    seed_weights(network, "flux2 vae")
    with torch.no_grad():
        network.get_parameter("decoder.conv_out.weight").mul_(0.3)
    told_by = {
        "decoder.conv_in.weight": torch.zeros(512, 32, 3, 3),
        "encoder.down.2.downsample.conv.weight": torch.zeros(512, 512, 3, 3),
        "post_quant_conv.weight": torch.zeros(32, 32, 1, 1),
        "bn.running_mean": torch.zeros(128),
    }
    return _narrowed(told_by, network)


def _narrowed(told_by: StateDict, network: nn.Module) -> Any:
    """The VAE that ComfyUI's loader makes of the keys it tells it by, with a narrower network in it."""
    vae = comfy.sd.VAE(sd=told_by)
    vae.first_stage_model = network.eval().to(vae.vae_dtype)
    vae.patcher = ModelPatcher(network, vae.device, _CPU)
    return vae


# -- models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StillFamily:
    """A family of models.

    Attributes:
        detected: its class in ``comfy.supported_models``.
        network: its network, by module and name.
        layout: sizes of the network at its published width, few blocks deep.
        small: what replaces them.
        vae: makes a VAE that belongs to it.
        text: width of its text tokens, small.
        pooled: width of its pooled text, 0 where ComfyUI gives it none, or None where it gives it an empty one.
        counts_tokens: it reads which tokens a text has.
    """

    detected: str
    network: str
    layout: Sizes
    small: Sizes
    vae: Callable[[], Any]
    text: int = _TEXT
    pooled: int | None = 0
    counts_tokens: bool = False

    @property
    def is_known(self) -> bool:
        """Whether this ComfyUI has the family."""
        return hasattr(comfy.supported_models, self.detected)

    def model(self) -> ModelPatcher:
        """A MODEL of the family.

        Raises:
            ValueError: ComfyUI takes the network for one of another family.
        """
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
        return ModelPatcher(model.eval(), _CPU, _CPU)

    def conditioning(self, name: str) -> list[list[Any]]:
        """A CONDITIONING with made-up text embeddings."""
        generator = generator_for("still text", self.detected, name)
        fields: dict[str, Any] = {}
        if self.pooled != 0:
            pooled = self.pooled and torch.randn((1, self.pooled), generator=generator)
            fields = {"pooled_output": pooled, "guidance": 3.5}
        if self.counts_tokens:
            fields["attention_mask"] = torch.ones(1, _TOKENS, dtype=torch.long)
        return [[torch.randn((1, _TOKENS, self.text), generator=generator), fields]]


def _flux_sizes(**sizes: Any) -> Sizes:
    """Sizes of a Flux network; newer ComfyUI wants to be told where texts are numbered."""
    numbered = {field.name for field in dataclasses.fields(FluxParams)} & {"txt_ids_dims"}
    return {name: value for name, value in sizes.items() if name != "txt_ids_dims" or numbered}


_FLUX_DEPTH = {"depth": 1, "depth_single_blocks": 1, "guidance_embed": True}
_HEADS = {"axes_dims": [4, 6, 6], "n_heads": 2, "n_kv_heads": 2}
_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "num_blocks": 1,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
}
_SMALL_COSMOS = {"model_channels": 32, "num_blocks": 1, "num_heads": 2, "adaln_lora_dim": 8}
_LUMINA = {"in_channels": 16, "n_layers": 1, "qk_norm": True}
_SMALL_LUMINA = {"dim": 32, "cap_feat_dim": _TEXT, "n_refiner_layers": 1, "multiple_of": 16, **_HEADS}

FAMILIES = {
    "flux": StillFamily(
        "Flux",
        "comfy.ldm.flux.model.Flux",
        _flux_sizes(
            in_channels=16,
            out_channels=16,
            vec_in_dim=768,
            context_in_dim=4096,
            hidden_size=3072,
            mlp_ratio=4.0,
            num_heads=24,
            axes_dim=[16, 56, 56],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            txt_ids_dims=[],
            **_FLUX_DEPTH,
        ),
        {"vec_in_dim": 16, "context_in_dim": _TEXT, "hidden_size": 32, "num_heads": 2, "axes_dim": [4, 6, 6]},
        flux_vae,
        pooled=16,
    ),
    "flux2": StillFamily(
        "Flux2",
        "comfy.ldm.flux.model.Flux",
        _flux_sizes(
            in_channels=128,
            out_channels=128,
            vec_in_dim=None,
            context_in_dim=15360,
            hidden_size=6144,
            mlp_ratio=3.0,
            num_heads=48,
            axes_dim=[32, 32, 32, 32],
            theta=2000,
            patch_size=1,
            qkv_bias=False,
            global_modulation=True,
            mlp_silu_act=True,
            ops_bias=False,
            txt_ids_dims=[3],
            **_FLUX_DEPTH,
        ),
        {"context_in_dim": _TEXT, "hidden_size": 32, "num_heads": 2, "axes_dim": [4, 4, 4, 4]},
        flux2_vae,
        pooled=None,
    ),
    "lumina2": StillFamily(
        "Lumina2",
        "comfy.ldm.lumina.model.NextDiT",
        {**_LUMINA, "dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "cap_feat_dim": 2304},
        _SMALL_LUMINA,
        flux_vae,
        counts_tokens=True,
    ),
    "z_image": StillFamily(
        "ZImage",
        "comfy.ldm.lumina.model.NextDiT",
        {
            **_LUMINA,
            "dim": 3840,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "cap_feat_dim": 2560,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "pad_tokens_multiple": 32,
        },
        _SMALL_LUMINA | {"dim": 256, "n_heads": 16, "n_kv_heads": 16},  # its time embedding is 256 wide
        flux_vae,
    ),
    "omnigen2": StillFamily(
        "Omnigen2",
        "comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",
        {"hidden_size": 2520, "num_layers": 1, "num_attention_heads": 21, "num_kv_heads": 7, "text_feat_dim": 2048}
        | {"axes_dim_rope": (40, 40, 40)},
        {"hidden_size": 32, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2}
        | {"axes_dim_rope": (4, 6, 6), "text_feat_dim": _TEXT, "multiple_of": 16},
        flux_vae,
        counts_tokens=True,
    ),
    "qwen_image": StillFamily(
        "QwenImage",
        "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        {"num_layers": 1},
        {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": _TEXT},
        wan_vae,
    ),
    "cosmos_predict2": StillFamily(
        "CosmosT2IPredict2",
        "comfy.ldm.cosmos.predict2.MiniTrainDIT",
        _COSMOS,
        _SMALL_COSMOS | {"crossattn_emb_channels": _TEXT},
        wan_vae,
    ),
    "wan": StillFamily(
        "WAN21_T2V",
        "comfy.ldm.wan.model.WanModel",
        {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 1},
        {"dim": 32, "ffn_dim": 64, "num_heads": 2, "text_dim": _TEXT},
        wan_vae,
    ),
    "anima": StillFamily(
        "Anima", "comfy.ldm.anima.model.Anima", _COSMOS, _SMALL_COSMOS | {"crossattn_emb_channels": 1024}, wan_vae, 1024
    ),
    "krea2": StillFamily(
        "Krea2",
        "comfy.ldm.krea2.model.SingleStreamDiT",
        {"layers": 1},
        {"features": 32, "heads": 2, "kvheads": 1, "txtlayers": 2, "txtdim": 16, "txtheads": 2, "txtkvheads": 2},
        wan_vae,
        2 * _TEXT,
    ),
}
"""By short names."""
