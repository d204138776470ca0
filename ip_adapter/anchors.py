"""How the rows of a batch are anchored: what a patch is given, and what a sampling call makes of it.

``Anchors`` travel with the model in ComfyUI's ``transformer_options``; a sampling call makes an ``AnchorRun`` of them,
and every call of the model takes an ``AnchorCall`` from that. All of them are frozen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from einops import repeat
from torch import Tensor

from ..errors import LunaRuntimeError
from ..values import fraction
from .attention import AnchorCall, LayerRows, Shared, Sigmas, Size, halvings, resized
from .embeds import RowEmbeds
from .layer_weights import LayerFactor

KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values [N,T,inner] of every layer."""

Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

ANCHORS = "luna_anchors"
"""Name in the options of a model; a tuple with the ``Anchors`` of each patch, in a sampling call its ``AnchorRun``."""

_Where = tuple[torch.device, torch.dtype]

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

    def run(self, sigmas: Sigmas = (float("inf"), 0.0), guider: object = None) -> "AnchorRun":
        """Makes keys and values for a sampling call; ``sigmas`` are the noise levels of start and end."""
        return AnchorRun(self, self.key_values_of(torch.cat((self.embeds.cond, self.embeds.uncond))), sigmas, guider)


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
    arranged: dict[tuple[tuple[bool, ...], _Where], dict[int, LayerRows]] = field(default_factory=dict)
    shrunk: dict[tuple[Size, _Where], dict[Size, Tensor]] = field(default_factory=dict)

    def release(self) -> None:
        """Drops all that was made for this sampling call."""
        for made in (self.key_values, self.arranged, self.shrunk):
            made.clear()

    def call(self, known: AnchorCall, x: Tensor, dtype: torch.dtype) -> AnchorCall:
        """What layers must know of a call: besides what is known already, what its rows attend to.

        Args:
            known: the call without layers and masks.
            x: [R,C,H,W], its latents.
            dtype: that the model computes in.

        Raises:
            LunaRuntimeError: rows do not go with embeds, or masks with the part of the picture that the call shows.
        """
        if self.sigmas in known.resting:
            return known
        count, shares = len(self.anchors.embeds), len(known.entries)
        if x.shape[0] != shares * count:
            raise LunaRuntimeError(
                f"ip_adapter: {count} image embeds for {x.shape[0] // shares} latents: every latent needs its own "
                "embed. Give as many images as the latent batch holds, and use no node that samples parts of the batch "
                "(context windows)"
            )
        where = (x.device, dtype)
        return replace(known, layers=self._layers(known.entries, where), masks=self._masks(known.size, where))

    def _layers(self, entries: tuple[int, ...], where: _Where) -> dict[int, LayerRows]:
        roles = tuple(entry == 0 if self.roles is None else self.roles[entry] for entry in entries)
        if (roles, where) not in self.arranged:
            used = [(layer, factor) for layer, factor in enumerate(self.anchors.factors) if factor.factor]
            self.arranged[roles, where] = {layer: self._layer(layer, factor, roles, where) for layer, factor in used}
        return self.arranged[roles, where]

    def _layer(self, layer: int, factor: LayerFactor, roles: tuple[bool, ...], where: _Where) -> LayerRows:
        pair, count = self.key_values[layer], len(self.anchors.embeds)
        cond = [x[:count] for x in pair]
        uncond = [x[count:].expand(count, -1, -1) for x in pair]
        if factor.swapped:
            cond, uncond = [torch.zeros_like(x) for x in cond], cond
        shares = zip(*(cond if role else uncond for role in roles), strict=True)
        k, v = (torch.cat(share).to(*where) for share in shares)
        weight = repeat(self.anchors.weights * factor.factor, "n -> (share n) 1 1", share=len(roles)).to(*where)
        return _scaled(k, v, weight, self.anchors.scaling)

    def _masks(self, size: Size, where: _Where) -> dict[Size, Tensor] | None:
        if (masks := self.anchors.masks) is None:
            return None
        if self.latent_size not in (None, size):
            raise LunaRuntimeError(
                "ip_adapter masks do not work together with conditioning for an area of the picture: "
                "use mask conditioning instead of area conditioning, or leave out the ip_adapter mask"
            )
        if (size, where) not in self.shrunk:
            self.shrunk[size, where] = {to: resized(masks[:, None], to).to(*where) for to in halvings(*size)}
        return self.shrunk[size, where]


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
