"""How the rows of a batch are anchored: what a patch is given, and what a sampling call makes of it.

``Anchors`` travel with the model in ComfyUI's ``transformer_options``; a sampling call makes an ``AnchorRun`` of them,
and every call of the model takes an ``AnchorCall`` from that. All of them are frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from einops import repeat
from torch import Tensor

from ..errors import LunaRuntimeError
from ..values import fraction
from .attention import AnchorCall, Attention, LayerRows, Shared, Sigmas, Size, halvings, resized
from .embeds import RowEmbeds
from .layer_weights import LayerFactor

KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values [N,T,inner] of every layer."""

Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

ANCHORS = "luna_anchors"
"""Name in the options of a model; a tuple with the ``Anchors`` of each patch, in a sampling call its ``AnchorRun``."""

ALWAYS: Sigmas = (float("inf"), 0.0)

_PENALTY_WIDTH = 1280.0
"""Width of the attention layer at which the channel penalty is 1."""


@dataclass(frozen=True, eq=False)
class Anchors(Shared):
    """What one patch of a model is given.

    Attributes:
        embeds: one per row.
        weights: [N], strength of each row's anchor.
        factors: what becomes of the weight in each layer.
        key_values_of: keys and values of every layer for image tokens [n,T,D].
        scaling: what the weight multiplies.
        start_percent, end_percent: part of the model's whole schedule in which anchors act, 0..1.
        masks: [N,H,W] in 0..1, where in each row's picture the anchor acts, or None for everywhere.

    Raises:
        LunaInputError: start or end is no fraction.
    """

    embeds: RowEmbeds
    weights: Tensor
    factors: Sequence[LayerFactor]
    key_values_of: Callable[[Tensor], KeyValues]
    scaling: Scaling = "V only"
    start_percent: float = 0.0
    end_percent: float = 1.0
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        fraction(self.start_percent, "start of the anchors")
        fraction(self.end_percent, "end of the anchors")

    def run(self, sigmas: Sigmas = ALWAYS, guider: object = None) -> "AnchorRun":
        """Makes keys and values for a sampling call; ``sigmas`` are the noise levels of start and end."""
        return AnchorRun(self, self.key_values_of(torch.cat((self.embeds.cond, self.embeds.uncond))), sigmas, guider)

    def refusal(self, latents: int) -> LunaRuntimeError:
        """That there are as many latents, but not as many embeds."""
        return LunaRuntimeError(
            f"ip_adapter: {len(self.embeds)} image embeds for {latents} latents: every latent "
            "needs its own embed. Give as many images as the latent batch holds, and use no node that samples "
            "parts of the batch (context windows)"
        )


@dataclass(frozen=True, eq=False)
class AnchorRun(Shared):
    """Anchors in one sampling call.

    Attributes:
        anchors: what the patch was given.
        key_values: of every layer for the pictures, followed by those of no picture; emptied by ``release``.
        sigmas: noise levels in which anchors act.
        guider: ComfyUI's, which knows the prompts by name.
        roles: which entries of ``cond_or_uncond`` pictures anchor; None is ComfyUI's convention, entry 0 alone.
        latent_size: of all the picture, where known; masks span all of it.
        arranged: layers for the rows of a call, by their roles, dtype and device; calls that are alike share them.
        shrunk: masks at the sizes of layers, likewise.
    """

    anchors: Anchors
    key_values: KeyValues
    sigmas: Sigmas
    guider: object = None
    roles: tuple[bool, ...] | None = None
    latent_size: Size | None = None
    arranged: dict[tuple[object, ...], list[LayerRows | None]] = field(default_factory=dict)
    shrunk: dict[tuple[object, ...], dict[Size, Tensor]] = field(default_factory=dict)

    def release(self) -> None:
        """Drops all that was made for this sampling call."""
        self.key_values.clear()
        self.arranged.clear()
        self.shrunk.clear()

    def call(
        self,
        entries: Sequence[int],
        x: Tensor,
        dtype: torch.dtype,
        resting: tuple[Sigmas, ...] = (),
        block_replacements: Mapping[tuple[str, int], Attention] | None = None,
    ) -> AnchorCall:
        """What layers must know of a call.

        Args:
            entries: ComfyUI's ``cond_or_uncond``.
            x: [R,C,H,W], the latents of the call.
            dtype: that the model computes in.
            resting, block_replacements: see ``AnchorCall``.

        Raises:
            LunaRuntimeError: rows do not go with embeds, or masks with the part of the picture that the call shows.
        """
        size, acts = (x.shape[-2], x.shape[-1]), self.sigmas not in resting
        if acts and x.shape[0] != len(entries) * len(self.anchors.embeds):
            raise self.anchors.refusal(x.shape[0] // len(entries))
        return AnchorCall(
            entries=tuple(entries),
            size=size,
            layers=self._layers(entries, x.device, dtype) if acts else (),
            masks=self._masks(size, x.device, dtype) if acts else None,
            resting=resting,
            block_replacements=block_replacements or {},
        )

    def _layers(self, entries: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[LayerRows | None]:
        roles = tuple(entry == 0 if self.roles is None else self.roles[entry] for entry in entries)
        place = (roles, device, dtype)
        if place not in self.arranged:
            pairs = zip(self.key_values, self.anchors.factors, strict=True)
            self.arranged[place] = [self._layer(pair, factor, *place) for pair, factor in pairs]
        return self.arranged[place]

    def _layer(
        self,
        pair: tuple[Tensor, Tensor],
        factor: LayerFactor,
        roles: tuple[bool, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> LayerRows | None:
        if not factor.factor:
            return None
        count = len(self.anchors.embeds)
        cond = [x[:count] for x in pair]
        uncond = [x[count:].expand(count, -1, -1) for x in pair]
        if factor.swapped:
            cond, uncond = [torch.zeros_like(x) for x in cond], cond
        shares = zip(*(cond if role else uncond for role in roles), strict=True)
        k, v = (torch.cat(share).to(device, dtype) for share in shares)
        weight = repeat(self.anchors.weights * factor.factor, "n -> (share n) 1 1", share=len(roles)).to(k)
        return _scaled(k, v, weight, self.anchors.scaling)

    def _masks(self, size: Size, device: torch.device, dtype: torch.dtype) -> dict[Size, Tensor] | None:
        masks, place = self.anchors.masks, (size, device, dtype)
        if masks is None:
            return None
        if self.latent_size not in (None, size):
            raise LunaRuntimeError(
                "ip_adapter masks do not work together with conditioning for an area of the picture: "
                "use mask conditioning instead of area conditioning, or leave out the ip_adapter mask"
            )
        if place not in self.shrunk:
            self.shrunk[place] = {to: resized(masks[:, None], to).to(device, dtype) for to in halvings(*size)}
        return self.shrunk[place]


def _scaled(k: Tensor, v: Tensor, weight: Tensor, scaling: Scaling) -> LayerRows:
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
