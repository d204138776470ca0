"""Pictures to latents and back, one latent for each picture, whatever the VAE: one for videos too.

A VAE for videos makes latents with a dimension for frames, and takes a batch of pictures for the frames of one video.
Still-image models use it as well (Qwen-Image, Krea2, Anima, Cosmos-Predict2): their latents are videos of one frame.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .rows import Conditioning


def has_frames(vae: Any) -> bool:
    """Whether latents of this VAE have a dimension for frames: [N,c,1,h,w] instead of [N,c,h,w]."""
    return int(getattr(vae, "latent_dim", 2)) == 3


def latent_shape(vae: Any, height: int, width: int) -> tuple[int, ...]:
    """[c,h,w] or [c,1,h,w] of the latent of a picture of ``height`` and ``width`` px, rounded up to whole latent px."""
    ratio = vae.spacial_compression_encode()
    frames = (1,) if has_frames(vae) else ()
    return vae.latent_channels, *frames, math.ceil(height / ratio), math.ceil(width / ratio)


def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """A latent for each picture.

    Args:
        vae: ComfyUI VAE.
        pictures: [N,H,W,3] in 0..1, H and W multiples of the VAE's ratio.

    Returns:
        [N,c,h,w], or [N,c,1,h,w] of a VAE for videos.
    """
    if not has_frames(vae):
        return vae.encode(pictures)
    # One at a time: together they would be a video. As [N,1,H,W,3] ComfyUI would crop the frames like a side.
    return torch.cat([vae.encode(picture) for picture in pictures.split(1)])


def decode_pictures(vae: Any, latents: Tensor) -> Tensor:
    """[N,H,W,C] of latents [N,c,h,w] or [N,c,1,h,w]; a frame that a VAE for videos may add is left out."""
    pictures = vae.decode(latents)
    return pictures[:, 0] if pictures.ndim == 5 else pictures


def with_frames(planes: Tensor, latents: Tensor) -> Tensor:
    """Planes [N,k,h,w] in the dimensions of ``latents``: [N,k,1,h,w] where those have one for frames."""
    return planes.unsqueeze(2) if latents.ndim == 5 else planes


def encode_hints_apart(conditioning: Conditioning) -> None:
    """Lets ControlNets that read their hints through a VAE for videos encode each by itself, in place.

    Args:
        conditioning: of rows, whose ControlNets are copies made for them.
    """
    for conds in conditioning.values():
        for _, fields in conds:
            control = fields.get("control")
            while control is not None:
                vae = getattr(control, "vae", None)
                if vae is not None and has_frames(vae) and not isinstance(vae, PictureVAE):
                    control.vae = PictureVAE(vae)
                control = control.previous_controlnet


class PictureVAE:
    """Stands in for a VAE for videos where ComfyUI itself encodes a batch of pictures."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, pictures: Tensor) -> Tensor:
        """See ``encode_pictures``."""
        return encode_pictures(self._vae, pictures)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)
