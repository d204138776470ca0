"""LoRAs of single rows in one forward pass, without merging: y_row = W x_row + sum of s * dW_l x_row over its LoRAs l.

Rows with the same stack of LoRAs are computed together, in two products for each layer and stack, over those rows
alone. W is not read, so it may be quantised or elsewhere; rows without LoRA keep their bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LunaRuntimeError
from .lora_parts import Apply, RowPart


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
