"""Files of weights from anywhere: what every tensor in one must be, whatever its format makes of it."""

import torch
from torch import Tensor


def weight_fault(value: object) -> str | None:
    """What is wrong with an entry of a file of weights, None where nothing is.

    A weight is a dense tensor of floating-point numbers that really holds as many as its shape claims: pickles can
    carry anything under a key, sparse tensors, and views that repeat one number a billion times.
    """
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__} instead of a tensor"
    if value.layout is not torch.strided or value.is_quantized:
        return "is a sparse or quantised tensor"
    if not value.is_floating_point():
        return f"holds {str(value.dtype).removeprefix('torch.')} instead of floating-point numbers"
    if value.ndim == 0 or value.numel() == 0:
        return f"has shape {list(value.shape)}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has shape {list(value.shape)}, more than the file holds numbers for"
    return None
