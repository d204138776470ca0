"""LoRAs of single rows in one forward pass, without merging: y_row = W x_row + sum of s * dW_l x_row over its LoRAs l.

Rows with the same stack of LoRAs are computed together, their factors joined along the rank: two products for each layer
and stack, over those rows alone. W is not read, so it may be quantised or elsewhere; rows without LoRA keep their bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LunaRuntimeError

Apply = Callable[[Tensor, Tensor], Tensor]
"""A layer's own operation on rows with another weight, without bias."""

Offset = tuple[int, int, int]
"""(dimension, start, length) of the part of a weight that is meant, such as q in a fused qkv."""

Make = Callable[[Sequence[Tensor], Tensor], Tensor]
"""Adds what tensors stand for to a difference of zeros [out,in,*kernel], and returns it."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A difference of a layer's weight as a product.

    Attributes:
        up: [out,rank], strength and alpha included.
        down: [rank,in,*kernel].
    """

    up: Tensor
    down: Tensor


def low_rank(
    up: Tensor, down: Tensor, core: Tensor | None, scale: float, shape: Sequence[int], offset: Offset | None = None
) -> LowRank | None:
    """The factors of one LoRA for a layer, or None where they do not fit it.

    Args:
        up: [out,rank] or with a kernel of 1.
        down: [rank,in,*kernel], its kernel may be flattened.
        core: [rank,rank,*kernel] between the two (Tucker), or None.
        scale: strength * alpha / rank.
        shape: (out, in, *kernel) of the whole weight.
        offset: the part of the weight that is meant; zeros stand for the others.
    """
    part = list(shape)
    if offset is not None:
        part[offset[0]] = offset[2]
    up, down = up.float().flatten(1), down.float().flatten(1)
    if core is not None:
        down = torch.einsum("or...,ri->oi...", core.float(), down).flatten(1)
    if up.shape != (part[0], down.shape[0]) or down.shape[1] != math.prod(part[1:]):
        return None
    up, down = up * scale, down.reshape(-1, *part[1:])
    if offset is not None:
        dim, start, length = offset
        whole = up.new_zeros(shape[0], up.shape[1]) if dim == 0 else down.new_zeros(down.shape[0], *shape[1:])
        whole.narrow(dim, start, length).copy_(up if dim == 0 else down)
        up, down = (whole, down) if dim == 0 else (up, whole)
    return LowRank(up, down)


class RowPart(nn.Module):
    """What a stack of LoRAs adds to the output of one layer.

    Args:
        shape: (out, in, *kernel) of the layer's weight.
        products: joined along the rank.
        difference: [out,in,*kernel], differences that are given in full.
        bias: [out].
        made: differences that are made from tensors anew each time, since in full they would be as large as the model.
        dtype: of all weights.
    """

    def __init__(
        self,
        shape: Sequence[int],
        products: Sequence[LowRank] = (),
        difference: Tensor | None = None,
        bias: Tensor | None = None,
        made: Sequence[tuple[Make, Sequence[Tensor]]] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._shape = tuple(shape)
        self._kernel_dims = len(self._shape) - 2
        self._make = [make for make, _ in made]
        self.up = _fixed(torch.cat([p.up for p in products], 1) if products else None, dtype)
        self.down = _fixed(torch.cat([p.down for p in products]) if products else None, dtype)
        self.difference = _fixed(difference, dtype)
        self.bias = _fixed(bias, dtype)
        self.made = nn.ModuleList(nn.ParameterList(_fixed(t, dtype) for t in tensors) for _, tensors in made)

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        """What is added for the rows ``x`` of the layer's input; as the output, or broadcast to it."""
        added = [apply(x, difference) for difference in self._differences(x)]
        bias = None if self.bias is None else self.bias.to(x)
        if self.up is not None and self.down is not None:
            added.append(_widened(apply(x, self.down.to(x)), self.up.to(x), bias, self._kernel_dims))
        elif bias is not None:
            added.append(bias.reshape(-1, *(1,) * self._kernel_dims))
        return sum(added[1:], added[0])

    def _differences(self, x: Tensor) -> list[Tensor]:
        given = [] if self.difference is None else [self.difference.to(x)]
        if not self._make:
            return given
        whole = x.new_zeros(self._shape)
        for make, tensors in zip(self._make, self.made, strict=True):
            whole = make([tensor.to(x) for tensor in tensors], whole)  # type: ignore[union-attr]
        return [*given, whole]


def _fixed(tensor: Tensor | None, dtype: torch.dtype) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().to(dtype).contiguous(), requires_grad=False)


def _widened(hidden: Tensor, up: Tensor, bias: Tensor | None, kernel_dims: int) -> Tensor:
    """[n,...,out] of a linear layer or [n,out,...] of a convolution: the product with ``up`` [out,rank]."""
    if kernel_dims == 0:
        return F.linear(hidden, up, bias)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[kernel_dims - 1]
    return convolve(hidden, up.reshape(*up.shape, *(1,) * kernel_dims), bias)


@dataclass(frozen=True)
class Call:
    """A model call under way.

    Attributes:
        batch: rows at the entry of the model, those of cond and uncond after one another.
        height, width: of the latents.
    """

    batch: int
    height: int
    width: int

    def tokens(self, level: int) -> int:
        """Tokens of a picture after so many halvings, each of which rounds up."""
        return -(-self.height // 2**level) * -(-self.width // 2**level)


@dataclass
class Live:
    """What the layers of one model instance must know of its call under way; None between calls."""

    call: Call | None = None


class RowPlaces:
    """Where the rows of each stack lie in the first dimension of the layers.

    Args:
        stacks: number of each row's stack, None for rows without LoRA.
    """

    def __init__(self, stacks: Sequence[int | None]) -> None:
        self.stacks = tuple(stacks)
        self._places: dict[tuple[int, int, int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.stacks)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same stack, so that it does not matter which is whose."""
        return len(set(self.stacks)) == 1

    def of(self, stack: int, length: int, tiles: int, device: torch.device) -> Tensor:
        """The positions that belong to rows of a stack, where ``tiles`` neighbours make up one row."""
        key = (stack, length, tiles, device)
        if key not in self._places:
            places = [i for i in range(length) if self.stacks[i // tiles % len(self.stacks)] == stack]
            self._places[key] = torch.tensor(places, dtype=torch.long, device=device)
        return self._places[key]


@dataclass(frozen=True)
class Site:
    """Where a layer is.

    Attributes:
        name: for messages.
        level: how many halvings lie before it in a UNet, None where that is unknown.
        reads_text: its tokens are those of the prompt, not of the picture.
    """

    name: str
    level: int | None = None
    reads_text: bool = False

    def tiles(self, x: Tensor, call: Call, rows: int) -> int:
        """How many neighbours in the first dimension of ``x`` make up one row.

        One, as a rule. Nodes such as HyperTile fold tiles of the picture into it, next to each other; those of the
        Attention Couple kind repeat the rows in blocks. The number of tokens tells which.

        Raises:
            LunaRuntimeError: it cannot be told which row is whose.
        """
        length = x.shape[0]
        if length == call.batch:
            return 1
        if self.level is not None and x.ndim == 3:
            own = call.tokens(self.level)
            times, rest = divmod(length, call.batch)
            if not rest and not self.reads_text and times * x.shape[1] == own:
                return times
            if length % rows == 0 and (self.reads_text or x.shape[1] == own):
                return 1
        raise LunaRuntimeError(
            f"loras of concepts: the model turns {call.batch} rows into {length} inside {self.name}, so it cannot be "
            "told which row is whose: take the node that does it off the model, or give all rows the same LoRA by a "
            "LoRA loader on the model"
        )


class RowLayer:
    """Stands in for a layer's ``forward``: the same, and the parts of the rows that have any.

    Does nothing of its own between model calls.

    Args:
        forward: the layer's own.
        apply: the layer's operation with another weight.
        parts: by number of the stack.
        rows: of the sampling call.
        live: of the model instance.
        site: of the layer.
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        apply: Apply,
        parts: Mapping[int, RowPart],
        rows: RowPlaces,
        live: Live,
        site: Site,
    ) -> None:
        self.forward = forward
        self.apply = apply
        self.parts = dict(parts)
        self.rows = rows
        self.live = live
        self.site = site

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = self.forward(x, *args, **kwargs)
        call = self.live.call
        if call is None:
            return out
        if self.rows.is_uniform:
            (part,) = self.parts.values()
            return out.add_(part(x, self.apply))
        tiles = self.site.tiles(x, call, len(self.rows))
        for stack, part in self.parts.items():
            places = self.rows.of(stack, x.shape[0], tiles, x.device)
            added = part(x.index_select(0, places), self.apply).to(out.dtype)
            out.index_add_(0, places, added.expand(len(places), *out.shape[1:]))
        return out
