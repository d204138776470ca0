"""UNet weights in the SD1.5 and SDXL layouts that denoise by construction: pictures survive sampling without training.

The noise estimate travels one short way: the first convolution takes the high frequencies of every latent channel, the
outermost skip connection carries them to the last residual block, and the last layers divide them by sigma and clip
them, which keeps edges (noise is small, edges are not). Everything else (residual blocks, self-attention, attention to
text and to image prompts) holds seeded random weights on the other channels and adds a bounded, mostly smooth change of
colour that depends on text and image prompt.

The last normalisation has 32 groups of 10 channels. Group c < 4 belongs to latent channel c, in this order:

    f, f, -f, -f   high frequencies of latent channel c, as the UNet sees it: x / sqrt(sigma^2 + 1)
    K, K, K, -K, -K, -K   K = LEVEL * sigma / sqrt(sigma^2 + 1), the same everywhere

K is far larger than f, so dividing by the group's deviation is dividing by K: what remains is f / sigma, up to a
constant. Inside the last residual block, group 4 holds cos, -cos, sin, -sin of an angle whose cosine is
sigma / sqrt(sigma^2 + 1), made from the time embedding. Its deviation never changes, so normalisation only scales it;
K is read from it.
"""

from collections.abc import Mapping

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.model_sampling import ModelSamplingDiscrete

from harness.seeding import StateDict, fan_in_scaled, generator_for, shapes_of, smooth_conv

CHANNELS = 320
LATENT_CHANNELS = 4
_COMMON = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": CHANNELS,
    "use_spatial_transformer": True,
    "legacy": False,
}
# channel_mult is free in ComfyUI's detection: with ones the full depth stays small.
SD15_CONFIG: dict[str, object] = _COMMON | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 1, 1, 1],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
}
SDXL_CONFIG: dict[str, object] = _COMMON | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}

_GROUP = 10  # channels in one of the 32 groups
_TIME_GROUP = LATENT_CHANNELS * _GROUP  # first channel of the cos/sin group
_FREE = _TIME_GROUP + _GROUP  # first channel without a duty
_LEVEL = 30.0  # K over f
_GAIN = 6.0  # sharpness of the SiLU used as a ramp
_CLIP = 1.5  # of sigma: what lies beyond is an edge
_CHANGE = 0.3  # deviation of what the random part adds to the noise estimate, in sigma
_CROSS_ATTENTION = 3.0  # gain of attention to text and image prompt over the rest of the random part


def build_unet(config: Mapping[str, object], seed: str) -> StateDict:
    """The UNet's state dict, float32, keys without prefix. ``config`` is SD15_CONFIG or SDXL_CONFIG."""
    generator = generator_for("unet", seed)
    state_dict = {
        name: _random(name, shape, generator) for name, shape in shapes_of(UNetModel(**config, device="meta")).items()
    }
    last = sum(name.endswith("0.in_layers.0.weight") and name.startswith("output_blocks") for name in state_dict) - 1
    _set_first_convolution(state_dict)
    _set_last_block(state_dict, f"output_blocks.{last}.")
    _set_clock(state_dict, f"output_blocks.{last}.0.emb_layers.1")
    _set_output(state_dict, generator)
    return state_dict


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if len(shape) == 4 and shape[-1] == 3:
        return smooth_conv(shape, generator)
    return fan_in_scaled(shape, generator, _CROSS_ATTENTION if ".attn2.to_out." in name else 1.0)


def _set_first_convolution(state_dict: StateDict) -> None:
    weight = state_dict["input_blocks.0.0.weight"]
    weight[:_FREE] = 0.0
    high = torch.full((3, 3), -1 / 9)
    high[1, 1] += 1.0
    for latent in range(LATENT_CHANNELS):
        for place, sign in enumerate((1, 1, -1, -1)):
            weight[latent * _GROUP + place, latent] = sign * high


def _set_last_block(state_dict: StateDict, block: str) -> None:
    skip = state_dict[
        f"{block}0.skip_connection.weight"
    ]  # [320, 640, 1, 1]: 320 from below, 320 from the first convolution
    skip.zero_()
    free = range(_FREE, CHANNELS)
    skip[free, free] = 1.0
    state_dict[f"{block}0.in_layers.2.weight"][:_FREE] = 0.0
    mix = state_dict[f"{block}0.out_layers.3.weight"]
    mix[:_FREE] = 0.0
    # The group's cos and sin have a mean square of 2 (cos^2 + sin^2) / 10, which the normalisation brings to 1.
    from_cosine = _LEVEL * 0.2**0.5
    for latent in range(LATENT_CHANNELS):
        first = latent * _GROUP
        skip[range(first, first + 4), range(CHANNELS + first, CHANNELS + first + 4)] = 1.0
        for place, sign in zip(range(4, 10), (1, 1, 1, -1, -1, -1), strict=True):
            mix[first + place, _TIME_GROUP, 1, 1] = sign * from_cosine  # silu(v) - silu(-v) = v
            mix[first + place, _TIME_GROUP + 1, 1, 1] = -sign * from_cosine
    if f"{block}1.proj_out.weight" in state_dict:
        state_dict[f"{block}1.proj_out.weight"][:_FREE] = 0.0
        state_dict[f"{block}1.proj_in.weight"][:, :_FREE] = 0.0


def _set_clock(state_dict: StateDict, layer: str) -> None:
    """Fits cos and sin of the sigma angle to the random time embedding by least squares over the 1000 timesteps."""
    sigmas = torch.as_tensor(ModelSamplingDiscrete().sigmas).double()
    embedding = timestep_embedding(torch.arange(len(sigmas)).float(), CHANNELS).double()
    for name in ("time_embed.0", "time_embed.2"):
        embedding = torch.nn.functional.silu(embedding @ state_dict[f"{name}.weight"].double().T)
    cosine, sine = sigmas / (sigmas**2 + 1).sqrt(), 1 / (sigmas**2 + 1).sqrt()
    importance = 1 / cosine[:, None]  # the relative error of the cosine is what counts
    wanted = torch.stack([cosine, sine], dim=1)
    ridge = 1e-3 * torch.eye(embedding.shape[1], dtype=torch.float64)
    weighted = embedding * importance
    solution = torch.linalg.solve(weighted.T @ weighted + ridge, weighted.T @ (wanted * importance))  # [1280, 2]
    weight = state_dict[f"{layer}.weight"]
    weight[:_FREE] = 0.0
    for place, column, sign in ((0, 0, 1), (1, 0, -1), (2, 1, 1), (3, 1, -1)):
        weight[_TIME_GROUP + place] = sign * solution[:, column].float()


def _set_output(state_dict: StateDict, generator: torch.Generator) -> None:
    norm, shift, conv = state_dict["out.0.weight"], state_dict["out.0.bias"], state_dict["out.2.weight"]
    conv[:, :_FREE] = 0.0
    free = torch.randn((LATENT_CHANNELS, CHANNELS - _FREE), generator=generator)
    free -= free.mean(dim=1, keepdim=True)  # SiLU's own mean must not tint the picture
    conv[:, _FREE:] = 0.0
    conv[:, _FREE:, 1, 1] = free * (_CHANGE / (0.36 * free.shape[1]) ** 0.5)  # 0.36: mean square of silu(normal)
    deviation = _LEVEL * 0.6**0.5  # of a group, in sigmas: six of its ten channels are K
    for latent in range(LATENT_CHANNELS):
        first = latent * _GROUP
        norm[first : first + 4] = _GAIN * deviation
        shift[first : first + 4] = _GAIN * _CLIP * torch.tensor([1.0, -1.0, 1.0, -1.0])
        norm[first + 4 : first + 10] = 0.0
        # Two ramps from above and two from below: ramp(f + c) - ramp(f - c) rises from 0 to 2c around f = 0.
        conv[latent, first : first + 4, 1, 1] = torch.tensor([0.5, -0.5, -0.5, 0.5]) / _GAIN
