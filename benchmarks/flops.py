"""Counts the work of SDXL's networks at full size, without weights or a device: every shape on PyTorch's meta device.

flops.py     prints the tables of docs/speed.md

Matrix products, convolutions and attention are counted by PyTorch's own counter (a multiplication and an addition are
two operations); norms and activations, which move memory and compute little, are not.
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

TERA = 1e12
TEXT_TOKENS, IMAGE_TOKENS = 77, 16
CELL_PX = 8  # px of the picture per latent px
SIZES = (1024, 768, 512)
TINY_UNET = {"model_channels": 32, "num_head_channels": 8}
TINY_DEPTH = {
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
TINY_VAE = {"ch": 32, "ch_mult": [1, 1, 1, 1]}


def unet_config(is_tiny: bool = False) -> dict[str, Any]:
    """SDXL's UNet; the tiny one has its levels and text width, 32 channels and one transformer block at each place."""
    from harness.denoiser import SDXL_CONFIG

    config = {**SDXL_CONFIG, "channel_mult": [1, 2, 4]}
    return config | TINY_UNET | TINY_DEPTH if is_tiny else config


def vae_config(is_tiny: bool = False) -> dict[str, Any]:
    """SDXL's AutoencoderKL, by the names of its own constructor."""
    config = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": config | (TINY_VAE if is_tiny else {}), "embed_dim": 4}


@cache
def unet_tflop(side: int, is_tiny: bool = False, image_tokens: int = 0) -> float:
    """Of one row of ``side`` px in one call, with image tokens that every cross-attention reads beside the text."""
    unet, x = _meta_unet(is_tiny), _meta(1, 4, side // CELL_PX, side // CELL_PX)
    context = _meta(1, TEXT_TOKENS, unet_config(is_tiny)["context_dim"])
    options = {"patches_replace": {"attn2": _with_image(unet, image_tokens)}} if image_tokens else {}
    return _count(lambda: unet(x, _meta(1), context, y=_meta(1, 2816), transformer_options=options))


@cache
def vae_tflop(side: int, is_tiny: bool = False) -> tuple[float, float]:
    """Of one crop of ``side`` px: encoding and decoding."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**vae_config(is_tiny)).eval()
    latent = side // CELL_PX
    return _count(lambda: vae.encode(_meta(1, 3, side, side))), _count(lambda: vae.decode(_meta(1, 4, latent, latent)))


@cache
def clip_tflop() -> float:
    """Of one picture in ViT-H."""
    import json

    import comfy.clip_model
    import comfy.clip_vision
    import comfy.ops

    path = Path(comfy.clip_vision.__file__).with_name("clip_vision_config_h.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = comfy.clip_model.CLIPVisionModelProjection(config, torch.float32, "meta", comfy.ops.disable_weight_init)
    return _count(lambda: model(pixel_values=_meta(1, 3, 224, 224), intermediate_output=-2))


def key_value_tflop() -> float:
    """Of one row's image tokens in ``to_k_ip`` and ``to_v_ip`` of every layer: once for a sampling call."""
    from luna_refinement.ip_adapter.layers import attention_layers

    layers = attention_layers(_meta_unet(False))
    return sum(2 * 2 * IMAGE_TOKENS * layer.context_dim * layer.inner_dim for layer in layers) / TERA


@cache
def _meta_unet(is_tiny: bool) -> Any:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**unet_config(is_tiny), device="meta").eval()


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _with_image(unet: Any, tokens: int) -> dict[Any, Callable[..., Tensor]]:
    """What an anchor adds to the attention, for every layer: the same queries read ``tokens`` keys and values more."""
    from comfy.ldm.modules.attention import optimized_attention
    from luna_refinement.ip_adapter.layers import attention_layers

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        image = k.new_empty(k.shape[0], tokens, k.shape[2])
        heads = options["n_heads"]
        return optimized_attention(q, k, v, heads) + optimized_attention(q, image, image, heads)

    return dict.fromkeys((layer.key for layer in attention_layers(unet)), attend)


def _count(work: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        work()
    return counter.get_total_flops() / TERA


def main() -> None:
    from report import Table

    rows = []
    for side in SIZES:
        unet, (encode, decode) = unet_tflop(side), vae_tflop(side)
        anchored = unet_tflop(side, image_tokens=IMAGE_TOKENS)
        share = unet_tflop(SIZES[0]) / unet
        rows.append((f"{side}", *(f"{x:.2f}" for x in (unet, share)), f"{anchored / unet - 1:.2%}",
                     *(f"{x:.2f}" for x in (encode, decode))))  # fmt: skip
    columns = ("crop, px", "UNet call, TFLOP", "less than 1024 px, times", "16 image tokens add", "VAE encode, TFLOP",
               "VAE decode, TFLOP")  # fmt: skip
    once = ((f"{clip_tflop():.2f}", f"{key_value_tflop():.3f}"),)
    for table in (
        Table("SDXL, one row", columns, tuple(rows)),
        Table("Once for a row and run", ("ViT-H, TFLOP", "keys and values of 16 tokens, TFLOP"), once),
    ):
        print(f"\n{table.markdown()}")


if __name__ == "__main__":
    from harness.comfyui import make_importable

    make_importable()
    main()
