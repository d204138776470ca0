"""A TAESD-layout VAE with hand-set weights: latents are block means, decoding is bilinear interpolation.

Encoder: three 2x2 means give the mean colour of every 8x8 px block; a fourth channel repeats the luminance.
Decoder: a sharpening block, then three times nearest upsampling by 2 followed by the [1,2,1] blur, which together
interpolate linearly. The convolutions pad with zeros, which darkens the rim of the picture; residual blocks add back
what is missing there. Colours stay positive on their way, so the ReLUs of the layout change nothing.
"""

import torch
from comfy.taesd.taesd import TAESD

from harness.seeding import StateDict

LATENT_PER_COLOR = 20.0  # width, in model-space latent units, of the colour range 0..1
INNER_PER_COLOR = 0.6  # the same range before the decoder's tanh(x / 3) * 3, small enough for it to be linear
_LIFT = 0.5  # added to the decoder's channels to keep overshooting colours above zero
_SHARPEN = 0.7  # of the detail that block means lose; measured on photographs, more only gains noise
_RIM = 4.0  # any number above the largest value the gates let through
_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])


def build_vae(scale_factor: float, latent_channels: int = 4) -> StateDict:
    """The state dict (keys ``taesd_encoder.*``, ``taesd_decoder.*``, ``vae_scale``, ``vae_shift``).

    ``scale_factor`` is the latent format's own factor between VAE latents and model-space latents; of the latent
    channels only the first four are used.
    """
    vae = TAESD(latent_channels=latent_channels)
    state_dict = {name: torch.zeros_like(tensor) for name, tensor in vae.state_dict().items()}
    _set_encoder(state_dict)
    _set_decoder(state_dict)
    state_dict["vae_scale"] = torch.tensor(INNER_PER_COLOR * scale_factor / LATENT_PER_COLOR)
    state_dict["vae_shift"] = torch.tensor(0.0)
    return state_dict


def _set_encoder(state_dict: StateDict) -> None:
    prefix = "taesd_encoder."
    state_dict[f"{prefix}0.weight"][range(3), range(3), 1, 1] = 1.0
    for layer in (2, 6, 10):  # stride 2: the window's centre and the tap after it are one 2x2 block
        state_dict[f"{prefix}{layer}.weight"][range(3), range(3), 1:, 1:] = 0.25
    last, bias = state_dict[f"{prefix}14.weight"], state_dict[f"{prefix}14.bias"]
    last[range(3), range(3), 1, 1] = INNER_PER_COLOR
    last[3, :3, 1, 1] = INNER_PER_COLOR * _LUMINANCE
    bias[:] = -0.5 * INNER_PER_COLOR


def _set_decoder(state_dict: StateDict) -> None:
    prefix = "taesd_decoder."
    first, bias = state_dict[f"{prefix}1.weight"], state_dict[f"{prefix}1.bias"]
    for channel in range(
        3
    ):  # half of the luminance comes from the fourth channel, which averages its noise with the others'
        first[channel, channel, 1, 1] = 1.0 / INNER_PER_COLOR
        first[channel, :3, 1, 1] -= 0.5 * _LUMINANCE / INNER_PER_COLOR
        first[channel, 3, 1, 1] = 0.5 / INNER_PER_COLOR
    bias[:3] = 0.5 + _LIFT
    bias[3] = 1.0  # a channel of ones: the only way to tell the rim of the picture

    blur = _blur()
    _set_block(state_dict, f"{prefix}3.", detail=_SHARPEN, rim=-0.25 * _SHARPEN, corner=0.0625 * _SHARPEN)
    for layer in (7, 12, 17):
        # A side keeps 3/4 of a colour x, a corner 9/16: v + v/3 + v/3 + v/9 is x again everywhere.
        state_dict[f"{prefix}{layer}.weight"][range(3), range(3)] = blur
        state_dict[f"{prefix}{layer}.weight"][3, 3, 1, 1] = 1.0  # the ones stay ones
        _set_block(state_dict, f"{prefix}{layer + 1}.", detail=0.0, rim=1 / 3, corner=1 / 9)
    last, bias = state_dict[f"{prefix}19.weight"], state_dict[f"{prefix}19.bias"]
    last[range(3), range(3), 1, 1] = 1.0
    bias[:] = -_LIFT


def _blur() -> torch.Tensor:
    taps = torch.tensor([0.25, 0.5, 0.25])
    return torch.outer(taps, taps)


def _set_block(state_dict: StateDict, block: str, detail: float, rim: float, corner: float) -> None:
    """A residual block that adds to each colour v: detail * (v - blurred v), rim * v per side, corner * v in corners.

    The sides are told by the channel of ones: three gates pass v at the left and right rim, at the top and bottom rim,
    and in corners.
    """
    first, bias = state_dict[f"{block}conv.0.weight"], state_dict[f"{block}conv.0.bias"]
    keep, add = state_dict[f"{block}conv.2.weight"], state_dict[f"{block}conv.4.weight"]
    for color in range(3):
        left_right, top_bottom, both, above, below = rows = range(5 * color, 5 * color + 5)
        for row in rows:
            keep[row, row, 1, 1] = 1.0
        for row in (left_right, top_bottom, both):
            first[row, color, 1, 1] = 1.0
        for row in (left_right, both):  # a missing one beside the pixel lifts the gate by _RIM
            first[row, 3, 1, 0] = first[row, 3, 1, 2] = -_RIM
        for row in (top_bottom, both):
            first[row, 3, 0, 1] = first[row, 3, 2, 1] = -_RIM
        bias[left_right] = bias[top_bottom] = _RIM
        bias[both] = 2 * _RIM
        first[above, color] = -_blur()
        first[above, color, 1, 1] += 1.0
        first[below] = -first[above]
        add[color, [left_right, top_bottom, both, above, below], 1, 1] = torch.tensor(
            [rim, rim, corner, detail, -detail]
        )
