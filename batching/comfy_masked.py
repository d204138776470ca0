"""Models made for inpainting: what they read of a row besides its latent."""

from collections.abc import Sequence
from typing import Any, Literal

import comfy.model_base
import torch
from torch import Tensor

from .comfy_latents import encode_pictures
from .rows import Conditioning, EncodedRow, MaskedPicture

Reads = Literal["always", "unless given", None]
"""Whether a model reads each crop with its mask greyed out; "unless given" prefers what its conditioning carries."""


def reads_masked_picture(model: Any) -> Reads:
    """Told from the network of a ModelPatcher: inpainting models, and Flux Fill."""
    if "masked_image" in getattr(model.model, "concat_keys", ()):
        return "always"
    if not isinstance(model.model, comfy.model_base.Flux):
        return None
    channels = model.model.model_config.unet_config
    return "unless given" if channels["in_channels"] > 2 * channels["out_channels"] else None


def encode_masked(vae: Any, crops: Tensor, masks: Tensor) -> list[MaskedPicture]:
    """The crops [N,H,W,3] with their masks [N,H,W] greyed out, encoded."""
    masks = masks.round().to(crops.device)
    latents = encode_pictures(vae, torch.lerp(crops, torch.full_like(crops, 0.5), masks[..., None]))
    return [MaskedPicture(latent, mask[None]) for latent, mask in zip(latents, masks.cpu(), strict=True)]


def add_masked(conditioning: Conditioning, rows: Sequence[EncodedRow], reads: Reads) -> None:
    """Gives the rows' masked pictures to their conditioning, in place."""
    masked = [row.masked for row in rows if row.masked is not None]
    if not masked:
        return
    pictures, masks = torch.stack([own.latent for own in masked]), torch.stack([own.mask for own in masked])
    for conds in conditioning.values():
        for _, fields in conds:
            if reads == "always" or "concat_latent_image" not in fields:
                fields |= {"concat_latent_image": pictures, "concat_mask": masks}
