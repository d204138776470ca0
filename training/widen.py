"""Narrow trained networks as the wide files that ComfyUI recognises: the same functions, every channel repeated.

A network whose channels are each repeated R times computes the same, repeated, when its weights are repeated along
their outputs, and repeated and divided by R along their inputs: norms see the same mean and deviation, and
activations act on each channel alone. In attention each head becomes wider, which scales q·k by R and the softmax's
own divisor by sqrt(R), so queries are divided by sqrt(R). A TAESD has no norms, so its new channels stay zero.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from training.weights import TrainedWeights

StateDict = dict[str, Tensor]
Shapes = dict[str, torch.Size]

NARROW_UNET, WIDE_UNET = 64, 320
TOKEN_WIDTH, CROSS_WIDTH = 96, 768
VISION_WIDTH, WIDE_VISION, VISION_HEADS, WIDE_VISION_HEADS = 64, 1024, 4, 16


def unet(trained: TrainedWeights, wide: Shapes) -> StateDict:
    """The UNet with 320 channels; ``wide`` are the names and shapes ComfyUI's own class wants."""
    made = {}
    for name, shape in wide.items():
        weight = trained.unet[name]
        if name == "time_embed.0.weight":
            made[name] = _time_embedding(weight, shape)
            continue
        made[name] = _repeat(weight, shape)
        if name.endswith(("attn1.to_q.weight", "attn2.to_q.weight")):
            made[name] /= math.sqrt(WIDE_UNET // NARROW_UNET)
    return made


def vae(trained: TrainedWeights, wide: Shapes, scale_factor: float) -> StateDict:
    """The TAESD with 64 channels; ``scale_factor`` is the latent format's, after which latents have unit variance."""
    made = {}
    for name, shape in wide.items():
        if name in ("vae_scale", "vae_shift"):
            continue
        made[name] = torch.zeros(shape)
        weight = trained.vae[name]
        made[name][tuple(slice(0, extent) for extent in weight.shape)] = weight
    made["vae_scale"] = torch.tensor(trained.latent_deviation * scale_factor)
    made["vae_shift"] = torch.tensor(0.0)
    return made


def vision(trained: TrainedWeights, wide: Shapes) -> StateDict:
    """ViT-L/14: the layers that learnt first, then layers that add nothing to what they are given."""
    prefix = "vision."
    made = {}
    for name, shape in wide.items():
        weight = trained.prompt.get(prefix + name)
        if weight is None:
            made[name] = _passing_on(name, shape)
        elif ".self_attn." in name:
            made[name] = _vision_attention(name, weight)
        elif name.endswith("position_embedding.weight"):  # what is added, not what is multiplied
            made[name] = weight.repeat_interleave(WIDE_VISION // VISION_WIDTH, 1)
        else:
            made[name] = _repeat(weight, shape)
    return made


def adapter(trained: TrainedWeights, unet_width: int = WIDE_UNET, vision_width: int = WIDE_VISION) -> StateDict:
    """IP-Adapter plus for SD1.5: resampler 768 wide with 12 heads of 64, one pair of keys and values per layer.

    ``unet_width`` and ``vision_width`` are those of the networks it works with, which may be the narrow ones.
    """
    ratio = CROSS_WIDTH // TOKEN_WIDTH
    made = {}
    for name, weight in trained.prompt.items():
        if name.startswith("image_proj."):
            made[name] = _resampler(name, weight, ratio, vision_width // VISION_WIDTH)
        elif match := _pair(name):
            kind, pair = match
            wide = weight.repeat_interleave(unet_width // NARROW_UNET, 0)
            made[f"ip_adapter.{2 * pair + 1}.to_{kind}_ip.weight"] = wide.repeat_interleave(ratio, 1) / ratio
    return made


def _pair(name: str) -> tuple[str, int] | None:
    layer, _, rest = name.partition(".")
    return (layer[-1], int(rest.split(".")[0])) if layer in ("to_k", "to_v") else None


def _repeat(weight: Tensor, shape: torch.Size) -> Tensor:
    """Repeats outputs, repeats and divides inputs, until ``weight`` has this shape."""
    if weight.shape[0] != shape[0]:
        weight = weight.repeat_interleave(shape[0] // weight.shape[0], 0)
    if weight.ndim > 1 and weight.shape[1] != shape[1]:
        ratio = shape[1] // weight.shape[1]
        weight = weight.repeat_interleave(ratio, 1) / ratio
    return weight.clone()


def _time_embedding(weight: Tensor, shape: torch.Size) -> Tensor:
    """Frequency j of the narrow sinusoid is frequency R·j of the wide one; the others are not used."""
    weight = weight.repeat_interleave(shape[0] // weight.shape[0], 0)
    narrow, wide = weight.shape[1] // 2, shape[1] // 2
    made = torch.zeros(shape)
    places = torch.arange(narrow) * (wide // narrow)
    made[:, places], made[:, wide + places] = weight[:, :narrow], weight[:, narrow:]
    return made


def _vision_attention(name: str, weight: Tensor) -> Tensor:
    """Four heads of 16 become sixteen of 64: each head four times, its channels repeated four times."""
    copies, ratio = WIDE_VISION_HEADS // VISION_HEADS, WIDE_VISION // VISION_WIDTH
    inner = ratio // copies

    def spread(x: Tensor, dim: int) -> Tensor:
        heads = x.unflatten(dim, (VISION_HEADS, -1)).repeat_interleave(inner, dim + 1)
        return heads.repeat_interleave(copies, dim).flatten(dim, dim + 1)

    if "out_proj" in name:
        return _along_input(weight, spread, ratio) if weight.ndim > 1 else weight.repeat_interleave(ratio, 0)
    wide = spread(weight, 0)
    if "q_proj" in name:
        wide = wide / math.sqrt(inner)
    return wide.repeat_interleave(ratio, 1) / ratio if weight.ndim > 1 else wide


def _along_input(weight: Tensor, spread: Callable[[Tensor, int], Tensor], ratio: int) -> Tensor:
    return spread(weight, 1).repeat_interleave(ratio, 0) / ratio


def _passing_on(name: str, shape: torch.Size) -> Tensor:
    """Norms at one, everything else zero: a layer of the residual stream that adds nothing."""
    return torch.ones(shape) if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else torch.zeros(shape)


def _resampler(name: str, weight: Tensor, ratio: int, vision_ratio: int) -> Tensor:
    if name.endswith("latents"):
        return weight.repeat_interleave(ratio, 2)
    if name.endswith("to_kv.weight"):
        halves = [half.repeat_interleave(ratio, 0) for half in weight.chunk(2)]
        return torch.cat(halves).repeat_interleave(ratio, 1) / ratio
    if weight.ndim == 1:
        return weight.repeat_interleave(ratio, 0)
    inputs = vision_ratio if name.endswith("proj_in.weight") else ratio
    wide = weight.repeat_interleave(ratio, 0).repeat_interleave(inputs, 1) / inputs
    return wide / math.sqrt(ratio) if name.endswith("to_q.weight") else wide
