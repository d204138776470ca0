"""Image prompts in the blocks of Flux: the tokens of latent i attend to embed i and to no other.

With q the block's own queries after their norm and before rotary positions:

XLabs, double blocks:     img[i] = block(img, txt)[i] + weight[i] * attention(q[i], k_ip[i], v_ip[i])
InstantX, double blocks:  attention of image tokens + weight[i] * attention(q[i], rms_norm(k_ip[i]), v_ip[i])
InstantX, single blocks:  the same for text and image tokens alike

Sources: XLabs-AI/x-flux (``IPDoubleStreamBlockProcessor``) and diffusers (``FluxIPAdapterAttnProcessor``);
InstantX/FLUX.1-dev-IP-Adapter (``IPAFluxAttnProcessor2_0``). Neither knows reference latents (Kontext); their tokens
are left as they are.

A block replacement calls the block itself, with a replacement for its attention in that call's own options: nothing of
the block is copied or changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..errors import LunaRuntimeError
from .attention import CALLS, AnchorCall, Shared, Size

Arguments = Mapping[str, Any]
"""What ComfyUI gives a block: ``img``, ``txt`` (double blocks only), ``pe``, ``transformer_options`` and more."""

BlockReplacement = Callable[[Arguments, Arguments], dict[str, Tensor]]
HeadAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""attention(q, k, v) of [R,heads,tokens,d] → [R,tokens,heads * d]."""

_OVERRIDE = "optimized_attention_override"
"""ComfyUI's option that replaces the attention of whatever is given it."""

_TEXT_TOKENS = "luna_text_tokens"
"""Option of a call: how many there are, which double blocks know and single ones do not."""

_PATCH_SIZE = 2
_KEY_EPS = 1e-5
_PAST = (
    "ip_adapter: a node on model runs Flux' blocks in a way of its own, so it cannot be told which row is whose: use "
    "either that node or ip_adapter"
)


@dataclass(frozen=True, eq=False)
class AnchoredBlock(Shared):
    """Replaces one block; a replacement that was there before keeps working inside.

    Attributes:
        patch: place of the patch among all of Luna's on the model.
        layer: number of the block's key and value pair.
        attention: ComfyUI's.
        inside: whether the image's part is added to the block's attention (InstantX) or to what it gives (XLabs).
        previous: the replacement for this block that this one takes the place of.
    """

    patch: int
    layer: int
    attention: HeadAttention
    inside: bool
    previous: BlockReplacement | None = None

    def __call__(self, args: Arguments, extra: Arguments) -> dict[str, Tensor]:
        options = args["transformer_options"]
        if CALLS not in options:
            raise LunaRuntimeError(_PAST)
        call: AnchorCall = options[CALLS][self.patch]
        grid = token_grid(call.size)
        if "txt" in args:
            options[_TEXT_TOKENS] = args["txt"].shape[1]  # ComfyUI notes blocks in the call's own options likewise
        if self.layer not in call.layers:
            return self._inner(args, extra)
        text, own = options[_TEXT_TOKENS], grid[0] * grid[1]
        first = text if "txt" in args else 0
        seen: list[Tensor] = []

        def attend(function: Callable[..., Tensor], q: Tensor, *rest: Any, **more: Any) -> Tensor:
            before = options.get(_OVERRIDE)
            out = before(function, q, *rest, **more) if before else function(q, *rest, **more)
            image = self._image(call, grid, q[:, :, first : text + own], _part(args["pe"], first, text + own), options)
            seen.append(image)
            return _added(out, image, first) if self.inside else out

        out = self._inner({**args, "transformer_options": {**options, _OVERRIDE: attend}}, extra)
        if len(seen) != 1:
            raise LunaRuntimeError(_PAST)
        return out if self.inside else {**out, "img": _added(out["img"], seen[0], 0)}

    def _inner(self, args: Arguments, extra: Arguments) -> dict[str, Tensor]:
        if self.previous is not None:
            return self.previous(args, extra)
        block: Callable[[Arguments], dict[str, Tensor]] = extra["original_block"]
        return block(args)

    def _image(self, call: AnchorCall, grid: Size, q: Tensor, pe: Tensor | None, options: Arguments) -> Tensor:
        """What the pictures add to the tokens [R,tokens,inner] of these queries [R,heads,tokens,d]."""
        q = unrotated(q, pe)
        k, v, weight = call.rows(self.layer, q, options)
        k, v = (rearrange(x, "r t (heads d) -> r heads t d", heads=q.shape[1]) for x in (k, v))
        image = self.attention(q, k, v)
        mask = call.mask_at(grid, image)
        if mask is None:
            return image * weight
        if text := image.shape[1] - mask.shape[1]:  # text has no place in the picture: it goes by all of the mask
            mask = torch.cat((mask.mean(dim=1, keepdim=True).expand(-1, text, -1), mask), dim=1)
        return image * (weight * mask)


def token_grid(size: Size, patch_size: int = _PATCH_SIZE) -> Size:
    """Rows and columns of image tokens for a latent's size; each token is ``patch_size`` px squared of it."""
    rows, columns = (-(-side // patch_size) for side in size)
    return rows, columns


def unrotated(q: Tensor, pe: Tensor | None) -> Tensor:
    """Takes rotary positions back: each pair of numbers is turned by the transposed matrix.

    Args:
        q: [R,heads,tokens,d] with positions.
        pe: [1 or R,1,tokens,d/2,2,2], ComfyUI's matrices, or None where the block had none.
    """
    if pe is None:
        return q
    pairs = q.to(pe.dtype).unflatten(-1, (-1, 2))  # [R,heads,tokens,d/2,2]
    turned = pe[..., 0, :] * pairs[..., :1] + pe[..., 1, :] * pairs[..., 1:]
    return turned.flatten(-2).to(q.dtype)


def normed_keys(k: Tensor, heads: int) -> Tensor:
    """InstantX' keys [n,T,inner]: the numbers of every head at a root mean square of 1."""
    parts = rearrange(k, "n t (heads d) -> n t heads d", heads=heads)
    return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + _KEY_EPS)).flatten(-2)


def _part(pe: Tensor | None, first: int, end: int) -> Tensor | None:
    return None if pe is None else pe[:, :, first:end]


def _added(x: Tensor, image: Tensor, first: int) -> Tensor:
    """Adds to tokens [R,tokens,D] from the first on."""
    end = first + image.shape[1]
    if end > x.shape[1]:
        raise LunaRuntimeError(_PAST)
    return torch.cat((x[:, :first], x[:, first:end] + image, x[:, end:]), dim=1)
