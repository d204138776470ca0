"""IP-Adapters on ComfyUI: files and other packs' weights as models that it loads and unloads."""

import hashlib
import pickle
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import LunaInputError
from ..weight_files import inflated_bytes
from .anchors import KeyValues
from .files import AdapterLayout, AdapterWeights, read_layout, split_weights
from .pooling import POOLING_KEYS, PoolingHead
from .projection import AdapterNetwork


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """An IP-Adapter whose weights ComfyUI loads and unloads like any model's.

    Attributes:
        name: of the file.
        layout: variant and sizes.
        patcher: ModelPatcher around an ``AdapterNetwork``.
        projection: digest of the image projection, which tells the embeds of one adapter from those of another.
        pooling: ModelPatcher around the ``PoolingHead`` of the encoder, for adapters that read what it gives.
    """

    name: str
    layout: AdapterLayout
    patcher: ModelPatcher
    projection: bytes = b""
    pooling: ModelPatcher | None = None

    @property
    def network(self) -> AdapterNetwork:
        return self.patcher.model

    def load(self) -> torch.device:
        """Brings the weights to where they compute."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.load_device

    def pooled(self, tokens: Tensor, heads: int) -> Tensor:
        """SigLIP's pooled embed [n,D] of the last layer's tokens [n,T,D], in float32 on the CPU."""
        assert self.pooling is not None
        comfy.model_management.load_models_gpu([self.pooling])
        head: PoolingHead = self.pooling.model
        return head(tokens.to(self.pooling.load_device, torch.float32), heads).to("cpu")

    def key_values(self, tokens: Tensor) -> KeyValues:
        """Keys and values [n,T,inner] of every layer for image tokens [n,T,D], in float32."""
        with torch.no_grad():
            return self.network.key_values(tokens.to(self.load(), torch.float32))


def load_ip_adapter(path: str, pooling_path: str | None = None) -> IPAdapter:
    """Reads a .safetensors file, or a .bin file through PyTorch's weights-only unpickler.

    Args:
        path: of the adapter.
        pooling_path: of the SigLIP encoder whose pooling head an InstantX adapter reads, a .safetensors file.

    Raises:
        LunaInputError: a file is damaged, unsafe, or not what it should be.
    """
    adapter = _from_weights(split_weights(_read(path), Path(path).name))
    if pooling_path is None or adapter.layout.kind != "instantx":
        return adapter
    return replace(adapter, pooling=_load_pooling(pooling_path))


def _load_pooling(path: str) -> ModelPatcher:
    """The pooling head alone, which is a thirtieth of its encoder's file."""
    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in POOLING_KEYS if key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LunaInputError(
            f"pooling_file '{name}' cannot be read, a complete .safetensors file is needed: download it again ({error})"
        ) from error
    return _patcher(PoolingHead(weights, name, comfy.ops.manual_cast))


def _patcher(network: nn.Module) -> ModelPatcher:
    load, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return ModelPatcher(network, load, offload)


def _read(path: str) -> object:
    name = Path(path).name
    try:
        claimed = inflated_bytes(path)
        state_dict = {} if claimed else comfy.utils.load_torch_file(path, safe_load=True)
    except Exception as error:
        # The loaders raise many kinds of error; the reason is passed on in full.
        why = f"cannot be read, the file is incomplete or damaged: download it again ({error})"
        if isinstance(error, FileNotFoundError):
            why = "is gone: press R to refresh the list and choose again"
        elif isinstance(error, pickle.UnpicklingError):
            why = (
                "was not opened: it is damaged, or it carries code or objects besides weights, which could harm this "
                "machine. Get the adapter as .safetensors, or from its author again"
            )
        raise LunaInputError(f"ip_adapter_file '{name}' {why}") from error
    if claimed:
        raise LunaInputError(
            f"ip_adapter_file '{name}' is packed and would grow to {claimed} bytes: get the adapter as .safetensors"
        )
    return state_dict


_converted: dict[tuple[int, int], IPAdapter] = {}
"""Adapters of other packs' weights by the identity of a tensor of either half, for as long as both live."""


def as_ip_adapter(given: object) -> IPAdapter:
    """Our own adapter as it is; those of the widely used loader packs, plain or inside their pipeline, converted once.

    Raises:
        LunaInputError: it is neither.
    """
    if isinstance(given, IPAdapter):
        return given
    weights: Any = given
    if isinstance(weights, dict) and isinstance(weights.get("ipadapter"), dict):
        weights = weights["ipadapter"].get("model")
    if not isinstance(weights, dict) or not {"image_proj", "ip_adapter"} <= weights.keys():
        raise LunaInputError(
            f"ip_adapter is a {type(given).__name__} of unknown layout: "
            "connect Luna's IP-Adapter Loader, or an IPAdapter loader that gives image_proj and ip_adapter weights"
        )
    split = split_weights(weights, "of the connected loader")
    marks = [next(iter(half.values())) for half in (split.image_proj, split.ip_adapter)]
    place = (id(marks[0]), id(marks[1]))
    if place not in _converted:
        _converted[place] = _from_weights(split)
        for mark in marks:
            weakref.finalize(mark, _converted.pop, place, None)
    return _converted[place]


def _from_weights(weights: AdapterWeights) -> IPAdapter:
    layout = read_layout(weights)
    try:
        network = AdapterNetwork(weights, layout, comfy.ops.manual_cast)
    except RuntimeError as error:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' looks like a {layout.variant} adapter but its weights do not fit one: "
            f"the file is damaged or of a variant Luna does not know ({error})"
        ) from error
    return IPAdapter(weights.name, layout, _patcher(network), _projection_digest(weights))


def _projection_digest(weights: AdapterWeights) -> bytes:
    """From the names and the small weights (norms and biases), which no two trainings share."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(weights.image_proj.items()):
        digest.update(f"{key}{tuple(value.shape)}".encode())
        if value.ndim == 1:
            digest.update(value.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().tobytes())
    return digest.digest()
