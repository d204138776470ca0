"""The maths of LoRAs per row: against layers with the difference merged."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.lora_parts import LowRank, RowPart, low_rank
from luna_refinement.batching.row_loras import Call, Live, RowLayer, RowPlaces, Site
from luna_refinement.errors import LunaRuntimeError
from torch import Tensor, nn

from harness.seeding import generator_for

BOUND = 1e-5


def normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator_for("row loras", name, shape))


def layer_of(kind: str) -> Any:
    return {
        "linear": lambda: nn.Linear(6, 10),
        "conv1d": lambda: nn.Conv1d(6, 10, 3, padding=1),
        "conv2d": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1),
        "circular": lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
        "dilated": lambda: nn.Conv2d(6, 10, 3, dilation=2),
        "conv3d": lambda: nn.Conv3d(6, 10, (1, 3, 3), padding=(0, 1, 1), bias=False),
    }[kind]()


KINDS = ["linear", "conv1d", "conv2d", "circular", "dilated", "conv3d"]


def input_of(layer: Any, rows: int) -> Tensor:
    if isinstance(layer, nn.Linear):
        return normal("x", rows, 5, 6)
    return normal("x", rows, 6, *(7,) * len(layer.kernel_size))


def apply_of(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return F.linear if isinstance(layer, nn.Linear) else lambda x, weight: layer._conv_forward(x, weight, None)


def factors(layer: Any, name: str, rank: int) -> LowRank:
    shape = layer.weight.shape
    made = low_rank(normal(f"{name} up", 10, rank), normal(f"{name} down", rank, *shape[1:]), None, 0.1, shape)
    assert made is not None
    return made


def difference(product: LowRank) -> Tensor:
    return torch.einsum("or,r...->o...", product.up, product.down)


def with_weight(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)


def run(
    layer: Any, parts: dict[int, RowPart], stacks: Sequence[int | None], x: Tensor, live: Live | None = None
) -> Any:
    live = live or Live(Call(len(x), 8, 8))
    stand_in = RowLayer(layer.forward, apply_of(layer), parts, RowPlaces(stacks), live, Site("layer"))
    with torch.no_grad():
        return stand_in(x)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_the_layer_with_its_difference_merged(kind: str) -> None:
    layer = layer_of(kind)
    one, two, three = (factors(layer, name, rank) for name, rank in (("a", 4), ("b", 1), ("c", 9)))
    full, bias = normal("full", *layer.weight.shape), normal("bias", 10)
    shape = layer.weight.shape
    parts = {
        0: RowPart(shape, [one]),
        1: RowPart(shape, [one, two, three], full, bias),
        2: RowPart(shape, bias=bias),
        3: RowPart(shape, difference=full),
    }
    extra: dict[int, tuple[Any, Any]] = {
        0: (difference(one), 0),
        1: (difference(one) + difference(two) + difference(three) + full, bias),
        2: (0, bias),
        3: (full, 0),
    }
    stacks = [1, None, 0, 2, 0, 3]
    x = input_of(layer, 2 * len(stacks))
    out = run(layer, parts, stacks, x)
    with torch.no_grad():
        plain = layer(x)
        for place in range(len(x)):
            stack = stacks[place % len(stacks)]
            if stack is None:
                assert torch.equal(out[place], plain[place])
                continue
            weight, shift = extra[stack]
            own = (0 if layer.bias is None else layer.bias) + shift
            own = own if isinstance(own, Tensor) else None
            assert off(out[place], with_weight(layer, layer.weight + weight, own, x[[place]])[0]) <= BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_all_rows_needs_no_places(kind: str) -> None:
    layer = layer_of(kind)
    product = factors(layer, "a", 4)
    x = input_of(layer, 7)  # no multiple of the rows
    out = run(layer, {5: RowPart(layer.weight.shape, [product])}, [5, 5], x)
    with torch.no_grad():
        expected = with_weight(layer, layer.weight + difference(product), layer.bias, x)
    assert off(out, expected) <= BOUND


def test_nothing_is_added_between_calls() -> None:
    layer = layer_of("linear")
    parts = {0: RowPart(layer.weight.shape, [factors(layer, "a", 4)])}
    x = input_of(layer, 4)
    with torch.no_grad():
        assert torch.equal(run(layer, parts, [0, None], x, Live()), layer(x))
        assert torch.equal(run(layer, parts, [0, 0], x, Live()), layer(x))


def test_differences_that_are_made_anew_are_added() -> None:
    layer = layer_of("linear")
    tensors = (normal("p", 10, 6), normal("q", 10, 6))

    def product(given: Sequence[Tensor], whole: Tensor) -> Tensor:
        return whole.add_(given[0] * given[1])

    part = RowPart(layer.weight.shape, made=[(product, tensors), (product, tensors[::-1])])
    assert sum(weight.numel() for weight in part.parameters()) == 4 * 60
    x = input_of(layer, 3)
    out = run(layer, {0: part}, [None, 0, None], x)
    with torch.no_grad():
        assert off(out[1], F.linear(x[1], layer.weight + 2 * tensors[0] * tensors[1], layer.bias)) <= BOUND


@given(
    out=st.integers(1, 9), inner=st.integers(1, 9), rank=st.integers(1, 6), dim=st.integers(0, 1),
    start=st.integers(0, 4), beyond=st.integers(0, 4), scale=st.floats(-2, 2),
    kernel=st.sampled_from([(), (3,), (2, 3)]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_factors_of_a_part_of_a_weight_reach_that_part_alone(
    out: int, inner: int, rank: int, dim: int, start: int, beyond: int, scale: float, kernel: tuple[int, ...]
) -> None:
    part = (out, inner, *kernel)
    shape = list(part)
    shape[dim] += start + beyond
    up, down = normal("up", out, rank), normal("down", rank, inner, *kernel)
    product = low_rank(up, down.flatten(1), None, scale, shape, (dim, start, part[dim]))
    assert product is not None
    expected = torch.zeros(shape)
    expected.narrow(dim, start, part[dim]).copy_(torch.einsum("or,r...->o...", up, down) * scale)
    assert torch.allclose(difference(product), expected, atol=1e-4)


def test_a_core_stands_between_the_factors() -> None:
    up, core, down = normal("up", 10, 4, 1, 1), normal("core", 4, 4, 3, 3), normal("down", 4, 6, 1, 1)
    product = low_rank(up, down, core, 0.5, (10, 6, 3, 3))
    assert product is not None
    expected = torch.einsum("om,mnhw,ni->oihw", up.flatten(1), core, down.flatten(1)) / 2
    assert torch.allclose(difference(product), expected, atol=1e-4)


@given(out=st.integers(1, 4), inner=st.integers(1, 4), left=st.integers(1, 4), right=st.integers(1, 4))
@settings(deadline=None)
def test_factors_of_another_size_do_not_fit(out: int, inner: int, left: int, right: int) -> None:
    product = low_rank(normal("u", out, left), normal("d", right, inner), None, 1.0, (2, 3))
    assert (product is not None) == (out == 2 and inner == 3 and left == right)


@given(
    stacks=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=6),
    entries=st.integers(1, 3),
    tiles=st.integers(1, 5),
)
@settings(deadline=None)
def test_every_position_belongs_to_the_stack_of_its_row(stacks: list[int | None], entries: int, tiles: int) -> None:
    rows = RowPlaces(stacks)
    length = entries * len(stacks) * tiles
    folded = torch.arange(entries * len(stacks)).repeat_interleave(tiles)
    repeated = torch.arange(len(stacks)).repeat(entries * tiles)
    for stack in (0, 1, 2):
        for times, owners in ((tiles, folded), (1, repeated)):
            found = rows.of(stack, length, times, torch.device("cpu")).tolist()
            assert found == [i for i, row in enumerate(owners.tolist()) if stacks[row % len(stacks)] == stack]


@given(height=st.integers(1, 200), width=st.integers(1, 200), level=st.integers(0, 5))
@settings(deadline=None)
def test_tokens_of_a_level_are_those_of_convolutions_that_halve(height: int, width: int, level: int) -> None:
    rows, columns = height, width
    for _ in range(level):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    assert Call(2, height, width).tokens(level) == rows * columns


CALL = Call(batch=6, height=16, width=12)
PICTURE, TEXT = Site("to_q", level=1), Site("to_k", level=1, reads_text=True)


@pytest.mark.parametrize(
    ("site", "shape", "tiles"),
    [
        (PICTURE, (6, 48, 4), 1),
        (PICTURE, (6, 30, 4), 1),  # tokens were merged
        (PICTURE, (12, 24, 4), 2),  # folded
        (PICTURE, (24, 12, 4), 4),
        (PICTURE, (12, 48, 4), 1),  # repeated in blocks of rows
        (PICTURE, (9, 48, 4), 1),
        (TEXT, (12, 24, 4), 1),  # a prompt that has as many tokens as a tile
        (TEXT, (9, 77, 4), 1),
        (Site("linear"), (6, 8), 1),
    ],
)
def test_the_number_of_tokens_tells_tiles_from_repeated_rows(site: Site, shape: tuple[int, ...], tiles: int) -> None:
    assert site.tiles(torch.empty(shape), CALL, 3) == tiles


@pytest.mark.parametrize(
    ("site", "shape"),
    [
        (PICTURE, (7, 48, 4)),
        (PICTURE, (12, 30, 4)),  # folded or repeated after tokens were merged
        (PICTURE, (12, 4)),
        (PICTURE, (12, 4, 16, 12)),
        (TEXT, (7, 77, 4)),
        (Site("a block of no UNet"), (12, 48, 4)),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(site: Site, shape: tuple[int, ...]) -> None:
    with pytest.raises(LunaRuntimeError, match=site.name):
        site.tiles(torch.empty(shape), CALL, 3)
