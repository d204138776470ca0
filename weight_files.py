"""Files of weights from anywhere: what every tensor in one must be, whatever its format makes of it."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

_SLACK_BYTES = 2**20


def inflated_bytes(path: str) -> int | None:
    """Bytes that a packed file would grow to when it is read; None for one that holds what it says.

    PyTorch's own files are zip archives whose parts lie unpacked. Packed parts would let a small file fill the memory.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        claimed = sum(part.file_size for part in archive.infolist())
    return claimed if claimed > Path(path).stat().st_size + _SLACK_BYTES else None


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
