"""Decoupled cross-attention with one image embedding per row: ``latent[i]`` attends to ``embed[i]`` and to no other.

out = attention(q, k, v) + weight[i] * attention(q, k_ip[i], v_ip[i])      (Ye et al. 2023, equation 5)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LunaRuntimeError
from ..values import fraction
from .embeds import RowEmbeds

Options = Mapping[str, Any]
"""ComfyUI's ``extra_options`` of an attention patch."""

Attention = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
"""attention(q, k, v, options) over [R,tokens,inner]."""

KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values [N,T,inner] of every layer."""

Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
SCALINGS: tuple[Scaling, ...] = ("V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty")

_PENALTY_WIDTH = 1280.0
"""Width of the attention layer at which the channel penalty is 1."""


@dataclass(frozen=True, eq=False)
class AnchorOptions:
    """How rows are anchored.

    Attributes:
        weights: [N], strength of each row's anchor.
        scaling: what the weight multiplies.
        start_percent, end_percent: part of the model's whole schedule in which anchors act, 0..1.
        sigma_start, sigma_end: noise levels of that part (start is the larger), see ``for_schedule``.
        masks: [N,H,W] in 0..1, where in each row's picture the anchor acts, or None for everywhere.

    Raises:
        LunaInputError: start or end is no fraction.
    """

    weights: Tensor
    scaling: Scaling = "V only"
    start_percent: float = 0.0
    end_percent: float = 1.0
    sigma_start: float = float("inf")
    sigma_end: float = 0.0
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        fraction(self.start_percent, "start of the anchors")
        fraction(self.end_percent, "end of the anchors")

    def for_schedule(self, model_sampling: Any) -> "AnchorOptions":
        """With the noise levels that start and end are in ComfyUI's ``model_sampling``."""
        start, end = (float(model_sampling.percent_to_sigma(p)) for p in (self.start_percent, self.end_percent))
        return replace(self, sigma_start=start, sigma_end=end)

    @property
    def acts_always(self) -> bool:
        return self.sigma_end <= 0 and self.sigma_start >= 1e6


class RowAnchors:
    """What the layers of one patch share: the embeddings' keys and values, and the state of the model call.

    Keys and values are made once per sampling call by ``key_values_of(tokens)`` and dropped by ``release``.

    Args:
        embeds: one per row.
        options: weights, range and masks.
        key_values_of: keys and values of every layer for image tokens [n,T,D].
    """

    def __init__(self, embeds: RowEmbeds, options: AnchorOptions, key_values_of: Callable[[Tensor], KeyValues]) -> None:
        self.embeds = embeds
        self.options = options
        self._key_values_of = key_values_of
        self._cond: KeyValues | None = None
        self._uncond: KeyValues | None = None
        self._arranged: dict[tuple[Any, ...], Any] = {}
        self.roles: tuple[bool, ...] | None = None
        """Which entries of ``cond_or_uncond`` pictures anchor; None is ComfyUI's convention, entry 0 alone."""
        self.guider: Any = None
        """ComfyUI's guider of the sampling call under way: knows the prompts by name."""
        self.latent_size: tuple[int, int] | None = None
        """(height, width) of the latents being sampled, where known; masks span all of it."""
        self.block_replacements: Mapping[Any, Callable[..., Tensor]] = {}
        """Replacements that other packs set for whole blocks, as they are in the call under way."""
        self._seen: tuple[Tensor | None, float] = (None, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowAnchors":
        """The same object: ComfyUI copies a model's options deeply with every clone, and all clones share anchors."""
        return self

    def prepare(self) -> None:
        """Makes keys and values; done by the first layer where nobody did it before."""
        if self._cond is None or self._uncond is None:
            both = self._key_values_of(torch.cat((self.embeds.cond, self.embeds.uncond)))
            count = len(self.embeds)
            self._cond = [(k[:count], v[:count]) for k, v in both]
            self._uncond = [(k[count:], v[count:]) for k, v in both]

    def release(self) -> None:
        """Drops keys and values; the next use makes them again."""
        self._cond = self._uncond = None
        self._arranged.clear()
        self._seen = (None, 0.0)

    def acts(self, options: Options) -> bool:
        """Whether anchors act at this call's noise level."""
        if self.options.acts_always:
            return True
        return self.within(self.options.sigma_start, self.options.sigma_end, options)

    def within(self, sigma_start: float, sigma_end: float, options: Options) -> bool:
        """Whether this call's noise level lies in a range; reads it back from the device once per model call."""
        sigmas = options.get("sigmas")
        if sigmas is None:
            return True
        seen = self._seen  # as a whole: ComfyUI may run the shares of a call in threads, one for each GPU
        if seen[0] is not sigmas:
            seen = self._seen = (sigmas, float(sigmas.max()))
        return sigma_end <= seen[1] <= sigma_start

    def arrange(self, layer: int, swapped: bool, factor: float, q: Tensor, options: Options) -> tuple[Tensor, ...]:
        """Keys, values [R,T,inner] and weight [R,1,1] for the rows of this call, kept for the calls to come.

        Raises:
            LunaRuntimeError: the call does not hold a whole number of times as many rows as there are embeddings.
        """
        roles = self._roles_of(self._entries(q, options))
        place = (layer, roles, q.dtype, q.device)
        if place not in self._arranged:
            self._arranged[place] = self._make(layer, roles, swapped, factor, q)
        return self._arranged[place]

    def mask(self, q: Tensor, options: Options) -> Tensor | None:
        """The rows' masks [R,tokens,1] at the resolution of this layer.

        Raises:
            LunaRuntimeError: the model is shown a part of the picture only, whose place the masks cannot know.
        """
        masks = self.options.masks
        if masks is None:
            return None
        height, width = options["original_shape"][-2:]
        if self.latent_size not in (None, (height, width)):
            raise LunaRuntimeError(
                "ip_adapter masks do not work together with conditioning for an area of the picture: "
                "use mask conditioning instead of area conditioning, or leave out the ip_adapter mask"
            )
        rows, columns = options["activations_shape"][-2:] if "activations_shape" in options else (0, 0)
        if rows * columns != q.shape[1]:
            rows, columns = token_grid(height, width, q.shape[1])
        entries = len(self._entries(q, options))
        place = ("mask", rows, columns, entries, q.dtype, q.device)
        if place not in self._arranged:
            small = F.interpolate(masks[:, None].float(), size=(rows, columns), mode="bilinear", antialias=True)
            small = small.flatten(1).repeat(entries, 1)[..., None]
            self._arranged[place] = small.to(device=q.device, dtype=q.dtype)
        return self._arranged[place]

    def _entries(self, q: Tensor, options: Options) -> list[int]:
        """Which list of prompts each share of the rows belongs to.

        Nodes of the Attention Couple kind repeat rows inside the attention, and leave the entries that result in a list
        of their own, under names such as "cond_or_uncond_couple".

        Raises:
            LunaRuntimeError: the call does not hold a whole number of times as many rows as there are embeddings.
        """
        given, count = options["cond_or_uncond"], len(self.embeds)
        if q.shape[0] == len(given) * count:
            return given
        for name, entries in options.items():
            is_map = isinstance(name, str) and "cond_or_uncond" in name and isinstance(entries, list)
            if is_map and q.shape[0] == len(entries) * count:
                return entries
        if options.get("original_shape", (0,))[0] == len(given) * count:
            raise LunaRuntimeError(
                f"ip_adapter: a node on model turns {len(given) * count} rows into {q.shape[0]} inside the attention, "
                "so it cannot be told which row is whose: use either that node or ip_adapter"
            )
        raise LunaRuntimeError(
            f"ip_adapter: {count} image embeds for {q.shape[0] // len(given)} latents: every latent "
            "needs its own embed. Give as many images as the latent batch holds, and use no node that samples "
            "parts of the batch (context windows)"
        )

    def _roles_of(self, cond_or_uncond: list[int]) -> tuple[bool, ...]:
        if self.roles is None:
            return tuple(entry == 0 for entry in cond_or_uncond)
        return tuple(self.roles[entry] for entry in cond_or_uncond)

    def _make(self, layer: int, roles: tuple[bool, ...], swapped: bool, factor: float, q: Tensor) -> tuple[Tensor, ...]:
        self.prepare()
        assert self._cond is not None
        assert self._uncond is not None
        count = len(self.embeds)
        cond = self._cond[layer]
        uncond = tuple(x.expand(count, -1, -1) for x in self._uncond[layer])
        if swapped:
            cond, uncond = (torch.zeros_like(cond[0]), torch.zeros_like(cond[1])), cond
        k, v = (torch.cat([(cond if role else uncond)[half] for role in roles]).to(q) for half in range(2))
        weight = (self.options.weights * factor).repeat(len(roles))[:, None, None].to(q)
        return _scaled(k, v, weight, self.options.scaling)


class AnchoredAttention:
    """Replaces the cross-attention of one layer; a replacement that was there before keeps working inside.

    Each model has its own; those of a model's clones are shallow copies, which is enough: only ``additions`` changes,
    and always as a whole.

    Args:
        anchors: shared by all layers.
        layer: number of the layer's key and value pair.
        factor, swapped: see ``LayerFactor``.
        attention: ComfyUI's attention.
        previous: the replacement for this transformer that this one takes the place of.
    """

    def __init__(
        self,
        anchors: RowAnchors,
        layer: int,
        factor: float,
        swapped: bool,
        attention: Attention,
        previous: Callable[..., Tensor] | None = None,
    ) -> None:
        self.anchors = anchors
        self.layer = layer
        self.factor = factor
        self.swapped = swapped
        self.attention = attention
        self.previous = previous
        self.additions: tuple[tuple[Callable[..., Any], dict[str, Any]], ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        # ComfyUI asks for a transformer's replacement first, so one for its whole block would go unheard.
        replaced = self.previous or self.anchors.block_replacements.get(extra_options.get("block")) or self.attention
        out = replaced(q, k, v, extra_options)
        if self.anchors.acts(extra_options):
            ip_k, ip_v, weight = self.anchors.arrange(self.layer, self.swapped, self.factor, q, extra_options)
            mask = self.anchors.mask(q, extra_options)
            image = self.attention(q, ip_k, ip_v, extra_options)
            out = torch.addcmul(out, image, weight if mask is None else weight * mask)
        for callback, arguments in self.additions:
            if self.anchors.within(arguments["sigma_start"], arguments["sigma_end"], extra_options):
                out = out + callback(out, q, k, v, extra_options, **arguments)
        return out

    def add(self, callback: Callable[..., Any], **arguments: Any) -> None:
        """Takes another pack's IP-Adapter on top: the widely used one calls this on whatever replacement it finds."""
        self.additions = (*self.additions, (callback, {"sigma_start": float("inf"), "sigma_end": 0.0} | arguments))


def token_grid(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of a layer's tokens, from the latent's size: each halving of the UNet rounds up."""
    rows, columns = height, width
    while rows * columns > tokens and max(rows, columns) > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise LunaRuntimeError(
            f"ip_adapter masks: a layer has {tokens} tokens, which is no halving of a {width}x{height} latent: "
            "leave out the mask, or the node that changes the layers' resolution"
        )
    return rows, columns


def _scaled(k: Tensor, v: Tensor, weight: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the weight to keys and values where the scaling asks for it; what is left multiplies the output."""
    one = torch.ones_like(weight)
    if scaling == "V only":
        return k, v, weight
    if scaling == "K+V":
        return k * weight, v * weight, one
    weight = weight * (k.shape[2] / _PENALTY_WIDTH)
    if scaling == "K+V w/ C penalty":
        return k * weight, v * weight, one
    mean = v.mean(dim=1, keepdim=True)
    return k * weight, (v - mean) + mean * weight, one
