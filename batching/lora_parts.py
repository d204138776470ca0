"""What LoRAs add to the output of one layer: y = W x + sum of s * dW_l x, without W.

LoRAs of a stack are joined along the rank, so that they take two products together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
            whole = make([tensor.to(x) for tensor in tensors.parameters()], whole)
        return [*given, whole]


def _fixed(tensor: Tensor | None, dtype: torch.dtype) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().to(dtype).contiguous(), requires_grad=False)


def _widened(hidden: Tensor, up: Tensor, bias: Tensor | None, kernel_dims: int) -> Tensor:
    """[n,...,out] of a linear layer or [n,out,...] of a convolution: the product with ``up`` [out,rank]."""
    if kernel_dims == 0:
        return F.linear(hidden, up, bias)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[kernel_dims - 1]
    return convolve(hidden, up.reshape(*up.shape, *(1,) * kernel_dims), bias)
