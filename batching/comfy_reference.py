"""Reference latents: models that read clean latents beside their own are anchored by a latent of each row's own.

No patch is needed: the sampler keeps a reference latent [N,...] as it is, so that row i attends to reference i alone.
"""

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .comfy_latents import encode_pictures
from .crops import filling
from .rows import Conditioning, EncodedRow, Row

FIELD = "reference_latents"
"""Of a conditioning: a list of latents [1 or N,...]."""


def reads_references(model: Any) -> bool:
    """Whether a ModelPatcher's model reads reference latents of still pictures.

    What it was trained on cannot be told: Flux dev and Flux Kontext are one architecture. Chroma is handed references
    as Flux is, but its network takes none.
    """
    base, network = model.model, model.model.diffusion_model
    handed = "ref_latents" in getattr(base, "memory_usage_factor_conds", ())
    taken = any("ref_latents" in _parameters(network, name) for name in ("forward", "_forward"))
    # of the family of Lumina 2 only Z-Image can: the others have nothing to put in place of a reference's text
    return handed and taken and getattr(network, "pad_tokens_multiple", 0) is not None


def _parameters(network: Any, method: str) -> Collection[str]:
    function = getattr(network, method, None)
    return () if function is None else inspect.signature(function).parameters


def encode_references(vae: Any, rows: Sequence[Row], latents: Tensor, size: tuple[int, int]) -> list[Tensor | None]:
    """The reference latent of each row, of the shape of its latent; None for rows without a reference.

    Args:
        vae: ComfyUI's VAE.
        rows: of one working size.
        latents: [N,c,h,w] or [N,c,1,h,w], clean.
        size: (height, width) px of their crops. Pictures of another aspect are cropped at the centre.
    """
    pictures = {id(own.picture): own.picture for row in rows if (own := row.reference) and own.picture is not None}
    made = {key: encode_pictures(vae, filling(picture.float(), *size)[None])[0] for key, picture in pictures.items()}
    return [
        None if row.reference is None else made.get(id(row.reference.picture), latent)
        for row, latent in zip(rows, latents, strict=True)
    ]


def add_references(conditioning: Conditioning, rows: Sequence[EncodedRow]) -> None:
    """Appends the rows' own reference latents to those their conditioning carries, in place.

    Positive and negative both get them, so that guidance amplifies the text alone. Where a guider has a prompt in the
    middle, what lies between that and the negative is its picture's part, so the negative stays without.
    """
    own = [row.reference_latent for row in rows if row.reference_latent is not None]
    if not own:
        return
    latents = torch.stack(own)
    without = {"negative"} if "middle" in conditioning else set()
    for name in conditioning.keys() - without:
        for _, fields in conditioning[name]:
            fields[FIELD] = [*(fields.get(FIELD) or ()), latents]
