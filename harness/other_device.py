"""Tensors of another device where there is none: real values behind a device that PyTorch does not mix with the CPU.

As on a GPU, arithmetic with a CPU tensor of more than one value is refused, NumPy cannot read it, and ``.cpu()`` or
``.to("cpu")`` gives an ordinary tensor. What a GPU allows (single numbers of the CPU, indices, copying) is allowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

OTHER = torch.device("meta")
"""The one device every PyTorch knows beside the CPU; the tensors here have values all the same."""

_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default}


class OtherDeviceTensor(Tensor):
    """Says it lies on ``OTHER``; its values lie in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OtherDeviceTensor":
        tensor: Any = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=OTHER
        )
        tensor.held = held
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"OtherDeviceTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        if target == OTHER:
            kwargs["device"] = torch.device("cpu")
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        strangers = [tensor for tensor in tensors if not isinstance(tensor, cls) and tensor.ndim > 0]
        if strangers and func not in _COPIES | _INDEXED:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found another and cpu: {func}")
        result = func(*_unwrapped(args), **_unwrapped(kwargs))
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if func is torch.ops.aten._to_copy.default and target == torch.device("cpu"):
            return result
        return _wrapped(result)


class _Made(TorchDispatchMode):
    """Lets ordinary tensors move to ``OTHER``, and new ones be made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") != OTHER or any(issubclass(kind, OtherDeviceTensor) for kind in types):
            return func(*args, **kwargs)
        return _wrapped(func(*args, **kwargs | {"device": torch.device("cpu")}))


def _wrapped(tree: Any) -> Any:
    return tree_map(lambda leaf: OtherDeviceTensor(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _unwrapped(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, OtherDeviceTensor) else leaf, tree)


@contextmanager
def other_device() -> Iterator[None]:
    """While it lasts, ``.to(OTHER)`` and ``device=OTHER`` give tensors of the other device."""
    with _Made():
        yield


def on_other_device(tensor: Tensor) -> Tensor:
    """The same values on the other device."""
    return OtherDeviceTensor(tensor.clone())


def values(tensor: Tensor) -> Tensor:
    """The values of a tensor that lies on the other device.

    Raises:
        AssertionError: it lies on the CPU.
    """
    assert isinstance(tensor, OtherDeviceTensor), f"on {tensor.device}"
    return tensor.held
