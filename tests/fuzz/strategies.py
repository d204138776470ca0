"""Input of every kind as careless or hostile programs give it: text, JSON, numbers, arrays, tensors."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

NASTY_TEXT = (
    "",
    " ",
    "\n",
    "\r\n",
    "\ud800",
    "\x00",
    "\u202e",
    "\u2028",
    "e\u0301",
    "，、；：＊？－",
    "顔",
    "[",
    "]",
    "[!a-",
    "*" * 50,
    "*a" * 60,
    "?" * 60,
    "-",
    "--",
    ":",
    ".",
    "..",
    "/",
    "\\",
    "<img src=x onerror=alert(1)>",
    "9" * 5000,
    "-" + "9" * 400,
    "1e999",
    "1e-999",
    "nan",
    "inf",
    "-0",
    "0x10",
    "1_000",
    "٣",
    "null",
    "true",
    "[" * 3000,
    '{"a":' * 1500,
)

NASTY_NUMBERS = (
    0,
    -1,
    1,
    0.5,
    1e-320,
    1e300,
    -1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    2**31,
    2**63,
    2**64 + 1,
    10**400,
    10**4000,
    True,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
ARRAY_TYPES = ("f4", ">f4", "f8", "f2", "g", "u1", ">u2", "i8", "?", "c8", "O", "U3", "M8[s]")


def texts() -> st.SearchStrategy[str]:
    """Any text, with a liking for what breaks readers."""
    piece = st.one_of(
        st.text(max_size=12), st.sampled_from(NASTY_TEXT), st.sampled_from(list(",;:*?-.[]{}\"'0123456789"))
    )
    return st.lists(piece, max_size=6).map("".join)


@st.composite
def damaged(draw: st.DrawFn, examples: Sequence[str]) -> str:
    """Good text with pieces cut out, doubled or replaced."""
    text = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 3))):
        start, stop = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        text = text[:start] + draw(st.one_of(st.sampled_from(["", text[start:stop] * 2]), texts())) + text[stop:]
    return text


def numbers() -> st.SearchStrategy[Any]:
    """Of a reasonable size more often than not."""
    return st.one_of(
        st.integers(-5, 300), st.floats(-10, 300), st.floats(0, 1), st.floats(), st.sampled_from(NASTY_NUMBERS)
    )


def widget_numbers(least: float, most: float) -> st.SearchStrategy[Any]:
    """What a widget lets through, and what a careless program sends past it."""
    return st.one_of(st.floats(least, most), st.sampled_from((least, most)), numbers(), st.none(), st.just("1"))


def schema_numbers(least: float, most: float) -> st.SearchStrategy[float]:
    """What ComfyUI's check of a widget lets through, NaN among it."""
    return st.one_of(st.floats(least, most), st.sampled_from((least, most, float("nan"))))


def values(names: Sequence[str], arrays_too: bool = False) -> st.SearchStrategy[Any]:
    """Nested lists and dicts of the names a format knows, as JSON would hold them, or with arrays and tensors."""
    leaves: st.SearchStrategy[Any] = st.one_of(st.none(), st.booleans(), numbers(), texts(), numbers().map(str))
    if arrays_too:
        leaves = st.one_of(leaves, leaves, arrays(), tensors(), st.builds(object))
    keys = st.one_of(st.sampled_from([*names, ""]), st.text(max_size=3))
    rows = st.lists(numbers(), min_size=4, max_size=6)
    return st.recursive(
        st.one_of(leaves, rows),
        lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(keys, inner, max_size=5)),
        max_leaves=12,
    )


def json_texts(names: Sequence[str], examples: Sequence[str]) -> st.SearchStrategy[str]:
    """JSON of a format's own names, damaged good JSON, and any text."""
    return st.one_of(values(names).map(json.dumps), damaged(examples), texts())


def _shapes(most: int = 24) -> st.SearchStrategy[tuple[int, ...]]:
    sides = st.one_of(st.integers(0, 4), st.integers(1, most))
    return st.one_of(st.lists(sides, max_size=5).map(tuple), st.sampled_from([(1500, 1), (1, 1, 2000), (3, 700, 900)]))


@st.composite
def tensors(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] | None = None) -> Tensor:
    """Of any type, layout and value; more often than not floats in 0..1."""
    shape = draw(_shapes() if shapes is None else shapes)
    kind = draw(st.one_of(st.sampled_from(FLOATS), st.sampled_from(OTHERS), st.just(torch.float32)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 5)))
    values = torch.rand(shape, generator=generator)
    values = values * draw(st.sampled_from((0, 1, 1, 1, 1 / 255, 255, 1e30)))
    values = values + draw(st.sampled_from((0, 0, 0, -1, 0.05)))
    if values.numel() and draw(st.booleans()):
        values.view(-1)[0] = draw(st.sampled_from((float("nan"), float("inf"), -1e38, 2.0, 0.5)))
    tensor = values.to(kind)
    return draw(st.sampled_from(LAYOUTS))(tensor)


def _sparse(tensor: Tensor) -> Tensor:
    return tensor.to_sparse() if tensor.dtype in FLOATS and tensor.ndim else tensor


def _wanting_gradients(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_() if tensor.is_floating_point() and tensor.dtype in FLOATS else tensor


LAYOUTS = (
    lambda tensor: tensor,
    lambda tensor: tensor,
    lambda tensor: tensor.transpose(0, -1) if tensor.ndim > 1 else tensor,
    lambda tensor: tensor[..., ::2] if tensor.ndim else tensor,
    lambda tensor: tensor.expand(2, *tensor.shape),
    lambda tensor: tensor.to("meta"),
    _sparse,
    _wanting_gradients,
)


@st.composite
def arrays(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] | None = None) -> np.ndarray:
    """Of any type, byte order and stride."""
    shape = draw(_shapes() if shapes is None else shapes)
    kind = draw(st.one_of(st.just("f4"), st.sampled_from(ARRAY_TYPES)))
    values = np.asarray(np.random.default_rng(draw(st.integers(0, 5))).random(shape))
    values = np.asarray(values * draw(st.sampled_from((0, 1, 1, 255))))
    if values.size and kind in ("f4", ">f4", "f8") and draw(st.booleans()):
        values.flat[0] = draw(st.sampled_from((np.nan, np.inf, -5.0)))
    array = values.astype("i8").astype(kind) if kind == "M8[s]" else values.astype(kind)
    return array[tuple(slice(None, None, -1) for _ in array.shape)] if draw(st.booleans()) else array


def pictures() -> st.SearchStrategy[Tensor]:
    """Mostly [B,H,W,C]."""
    sides = st.integers(0, 20)
    return tensors(st.one_of(st.tuples(st.integers(0, 3), sides, sides, st.sampled_from((1, 3, 3, 4))), _shapes()))


def masks(width: int, height: int) -> st.SearchStrategy[Tensor]:
    """Mostly [N,H,W] of a picture's size or aspect."""
    own = st.sampled_from([(1, height, width), (height, width), (2, height, width), (3, height, width)])
    return tensors(st.one_of(own, own, st.just((1, 64, 64)), st.just((0, height, width)), _shapes()))
