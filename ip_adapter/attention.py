"""Decoupled cross-attention with one image embedding per row: ``latent[i]`` attends to ``embed[i]`` and to no other.

out = attention(q, k, v) + weight[i] * attention(q, k_ip[i], v_ip[i])      (Ye et al. 2023, equation 5)

What a layer knows of the call under way is an ``AnchorCall`` in the options of that call, arranged before the forward:
the attention itself only computes, so that it can be compiled and run in threads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LunaRuntimeError

Options = Mapping[str, Any]
"""ComfyUI's ``extra_options`` of an attention patch."""

Attention = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
"""attention(q, k, v, options) over [R,tokens,inner]; also the form of a replacement."""

LayerRows = tuple[Tensor, Tensor, Tensor]
"""Image keys and values [R,T,inner] of a layer for the rows of a call, and the weight [R,1,1] of its output."""

Sigmas = tuple[float, float]
"""Noise levels from start to end, the larger first."""

Size = tuple[int, int]
"""(height, width) of a latent, or (rows, columns) of a layer's tokens."""

CALLS = "luna_anchor_calls"
"""Name in the options of a call; holds a tuple with the ``AnchorCall`` of each of Luna's patches on the model."""


class Shared:
    """A value that never changes: deep copies of a model's options, which ComfyUI makes at will, hold it itself."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Shared":
        return self


@dataclass(frozen=True, eq=False)
class AnchorCall(Shared):
    """What the layers of one patch must know of one call of the model.

    Attributes:
        entries: the list of prompts that each share of the rows belongs to; every share holds as many latents.
        size: of the latents in this call.
        layers: what the rows attend to in each layer; empty where anchors do not act at this noise level.
        masks: where they do, [N,1,rows,columns] at the sizes layers usually have; None for everywhere.
        resting: ranges of noise levels, of all that a layer may ask about, in which this call is not.
        block_replacements: replacements that other packs set for whole blocks.
    """

    entries: tuple[int, ...]
    size: Size
    layers: Mapping[int, LayerRows] = field(default_factory=dict)
    masks: Mapping[Size, Tensor] | None = None
    resting: tuple[Sigmas, ...] = ()
    block_replacements: Mapping[tuple[str, int], Attention] = field(default_factory=dict)

    def rows(self, layer: int, q: Tensor, options: Options) -> LayerRows:
        """Keys, values and weight for the rows of a layer, which are those of the call or repeated ones."""
        k, v, weight = found = self.layers[layer]
        if q.shape[0] != k.shape[0]:
            shares = [x.chunk(len(self.entries)) for x in found]
            places = [self.entries.index(entry) for entry in self._repeated(q, k.shape[0], options)]
            k, v, weight = (torch.cat([share[place] for place in places]) for share in shares)
        return k.to(q), v.to(q), weight.to(q)

    def mask(self, q: Tensor, options: Options) -> Tensor | None:
        """The rows' masks [R,tokens,1] at the resolution of this layer."""
        if self.masks is None:
            return None
        rows, columns = options.get("activations_shape", self.size)[-2:]
        if rows * columns != q.shape[1]:
            rows, columns = token_grid(*self.size, q.shape[1])
        return self.mask_at((rows, columns), q)

    def mask_at(self, grid: Size, like: Tensor) -> Tensor | None:
        """The rows' masks [R,tokens,1] on a grid of tokens, for as many rows as ``like`` [R,…] has."""
        if self.masks is None:
            return None
        masks = self.masks.get(grid)
        if masks is None:  # a node on the model changes the layers' resolution
            masks = resized(self.masks[self.size], grid)
        return masks.flatten(1)[..., None].repeat(like.shape[0] // masks.shape[0], 1, 1).to(like)

    def _repeated(self, q: Tensor, rows: int, options: Options) -> list[int]:
        """The entries of rows that were repeated inside the attention.

        Nodes of the Attention Couple kind do so, and leave the entries that result in a list of their own, under names
        such as "cond_or_uncond_couple".
        """
        given = [x for name, x in options.items() if "cond_or_uncond" in str(name) and isinstance(x, list)]
        for entries in given:
            if q.shape[0] * len(self.entries) == len(entries) * rows and set(entries) <= set(self.entries):
                return entries
        raise LunaRuntimeError(
            f"ip_adapter: a node on model turns {rows} rows into {q.shape[0]} inside the attention, "
            "so it cannot be told which row is whose: use either that node or ip_adapter"
        )


class AnchoredAttention:
    """Replaces the cross-attention of one layer; a replacement that was there before keeps working inside.

    Each model has its own; those of a model's clones are shallow copies, which is enough: only ``additions`` changes,
    and always as a whole.

    Args:
        patch: place of the patch among all of Luna's on the model.
        layer: number of the layer's key and value pair.
        attention: ComfyUI's attention.
        previous: the replacement for this transformer that this one takes the place of.
    """

    def __init__(self, patch: int, layer: int, attention: Attention, previous: Attention | None = None) -> None:
        self.patch = patch
        self.layer = layer
        self.attention = attention
        self.previous = previous
        self.additions: tuple[tuple[Callable[..., Tensor], Sigmas, dict[str, Any]], ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        if CALLS not in extra_options:
            raise LunaRuntimeError(
                "ip_adapter: a node on model runs its network past ComfyUI's apply_model, so it cannot be told which "
                "row is whose: use either that node or ip_adapter"
            )
        call: AnchorCall = extra_options[CALLS][self.patch]
        # ComfyUI asks for a transformer's replacement first, so one for its whole block would go unheard.
        replaced = self.previous or call.block_replacements.get(extra_options["block"]) or self.attention
        out = replaced(q, k, v, extra_options)
        if call.layers:
            ip_k, ip_v, weight = call.rows(self.layer, q, extra_options)
            mask = call.mask(q, extra_options)
            image = self.attention(q, ip_k, ip_v, extra_options)
            out = torch.addcmul(out, image, weight if mask is None else weight * mask)
        for callback, sigmas, arguments in self.additions:
            if sigmas not in call.resting:
                out = out + callback(out, q, k, v, extra_options, **arguments)
        return out

    def add(self, callback: Callable[..., Tensor], **arguments: Any) -> None:
        """Takes another pack's IP-Adapter on top: the widely used one calls this on whatever replacement it finds."""
        arguments = {"sigma_start": float("inf"), "sigma_end": 0.0} | arguments
        sigmas = (arguments["sigma_start"], arguments["sigma_end"])
        self.additions = (*self.additions, (callback, sigmas, arguments))

    def ranges(self) -> Iterator[Sigmas]:
        """Noise levels in which what was added here acts, and what was added to Luna's patches inside."""
        yield from (sigmas for _, sigmas, _ in self.additions)
        if isinstance(self.previous, AnchoredAttention):
            yield from self.previous.ranges()


def resized(masks: Tensor, size: Size) -> Tensor:
    """[N,1,H,W] as [N,1,rows,columns]."""
    return F.interpolate(masks.float(), size=size, mode="bilinear", antialias=True).to(masks)


def token_grid(height: int, width: int, tokens: int) -> Size:
    """Rows and columns of a layer's tokens, from the latent's size: each halving of the UNet rounds up."""
    for rows, columns in halvings(height, width):
        if rows * columns == tokens:
            return rows, columns
    raise LunaRuntimeError(
        f"ip_adapter masks: a layer has {tokens} tokens, which is no halving of a {width}x{height} latent: "
        "leave out the mask, or the node that changes the layers' resolution"
    )


def halvings(rows: int, columns: int) -> list[Size]:
    """A size and all its halvings down to 1 x 1."""
    sizes = [(rows, columns)]
    while max(sizes[-1]) > 1:
        rows, columns = sizes[-1]
        sizes.append((-(-rows // 2), -(-columns // 2)))
    return sizes
