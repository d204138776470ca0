"""Files: adapters, LoRAs and SAM3 folders as safetensors, pickles and JSON; whole, damaged and absurd."""

import json
import pickle
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from fuzz.strategies import FLOATS, json_texts, tensors, texts, values
from fuzz.target import target
from hypothesis import strategies as st
from luna_refinement.ip_adapter.comfy_adapter import as_ip_adapter, load_ip_adapter
from luna_refinement.nodes.concepts import LunaConcept
from luna_refinement.sam3_bridge.sam3_files import check_folder, find_model
from safetensors.torch import save
from torch import Tensor

from harness import tiny
from harness.ip_adapter_files import build_instantx, build_pooling_head, build_xlabs

FOLDER = Path(tempfile.mkdtemp(prefix="luna fuzz "))
KEEP = -1.0
PLAIN: dict[str, Tensor] = {
    "image_proj.proj.weight": torch.zeros(4 * 768, 8),
    "image_proj.proj.bias": torch.zeros(4 * 768),
    "image_proj.norm.weight": torch.ones(768),
    "image_proj.norm.bias": torch.zeros(768),
    "ip_adapter.1.to_k_ip.weight": torch.zeros(8, 768),
    "ip_adapter.1.to_v_ip.weight": torch.zeros(8, 768),
}
PLUS: dict[str, Tensor] = {
    "image_proj.latents": torch.zeros(1, 4, 64),
    "image_proj.proj_in.weight": torch.zeros(64, 8),
    "image_proj.proj_in.bias": torch.zeros(64),
    "image_proj.proj_out.weight": torch.zeros(768, 64),
    "image_proj.proj_out.bias": torch.zeros(768),
    "image_proj.norm_out.weight": torch.ones(768),
    "image_proj.norm_out.bias": torch.zeros(768),
    "image_proj.layers.0.0.norm1.weight": torch.ones(64),
    "image_proj.layers.0.0.norm1.bias": torch.zeros(64),
    "image_proj.layers.0.0.norm2.weight": torch.ones(64),
    "image_proj.layers.0.0.norm2.bias": torch.zeros(64),
    "image_proj.layers.0.0.to_q.weight": torch.zeros(64, 64),
    "image_proj.layers.0.0.to_kv.weight": torch.zeros(128, 64),
    "image_proj.layers.0.0.to_out.weight": torch.zeros(64, 64),
    "image_proj.layers.0.1.0.weight": torch.ones(64),
    "image_proj.layers.0.1.0.bias": torch.zeros(64),
    "image_proj.layers.0.1.1.weight": torch.zeros(256, 64),
    "image_proj.layers.0.1.3.weight": torch.zeros(64, 256),
    "ip_adapter.1.to_k_ip.weight": torch.zeros(8, 768),
    "ip_adapter.1.to_v_ip.weight": torch.zeros(8, 768),
}
XLABS, INSTANTX = build_xlabs(8, 8, 1, tokens=1), build_instantx(8, 8, 2, tokens=1)
POOLING = build_pooling_head(8) | {"vision_model.post_layernorm.weight": torch.ones(8)}
_LAYER = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
LORA: dict[str, Tensor] = {
    f"{_LAYER}.lora_up.weight": torch.zeros(32, 2),
    f"{_LAYER}.lora_down.weight": torch.zeros(2, 768),
    f"{_LAYER}.alpha": torch.tensor(2.0),
}
_PARTS = ("image_proj", "ip_adapter", "layers", "latents", "to_k_ip", "proj", "norm", "0", "1", "01", "20000", "9" * 30)


@st.composite
def weights(draw: st.DrawFn, wholes: tuple[Mapping[str, Tensor], ...]) -> dict[str, Tensor]:
    """A whole file's weights with some taken out, renamed, or replaced by others."""
    state = dict(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(state))) if state else "key"
        value = state.pop(key, torch.zeros(2))
        change = draw(st.sampled_from(("drop", "rename", "replace")))
        if change == "rename":
            pieces = key.split(".")
            pieces[draw(st.integers(0, len(pieces) - 1))] = draw(st.sampled_from(_PARTS) | st.text(max_size=3))
            key = ".".join(pieces)
        if change != "drop":
            state[key] = draw(tensors()) if change == "replace" else value
    return state


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors can hold of it."""
    kinds = (*FLOATS, torch.int64, torch.uint8, torch.bool)
    return {
        key.encode("utf-8", "replace").decode(): tensor.detach().contiguous().clone()
        for key, tensor in state.items()
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in kinds
    }


@st.composite
def safetensors_files(draw: st.DrawFn, wholes: tuple[Mapping[str, Tensor], ...]) -> bytes:
    """A file of weights, at times cut off or with some of its bytes changed."""
    content = bytearray(save(_storable(draw(weights(wholes)))))
    if draw(st.integers(0, 3)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 8)))):
        if content:
            content[draw(st.integers(0, min(len(content), 2000) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@st.composite
def nested(draw: st.DrawFn, wholes: tuple[Mapping[str, Tensor], ...]) -> dict[str, Any]:
    """Weights in halves, as pickles and other packs' loaders hold them, with odd entries among them."""
    halves: dict[str, Any] = {}
    for key, tensor in draw(weights(wholes)).items():
        half, _, name = key.partition(".")
        halves.setdefault(half, {})[name] = tensor
    if draw(st.booleans()):
        halves[draw(st.sampled_from(_PARTS))] = draw(values(_PARTS, arrays_too=True))
    return halves


def _pickled(value: Any) -> bytes:
    path = FOLDER / "pickled.bin"
    try:
        torch.save(value, path)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, pickle.PicklingError, OverflowError):
        return b"not a file"
    return path.read_bytes()


def _written(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@target(st.one_of(safetensors_files((PLAIN, PLUS)), safetensors_files((PLAIN, PLUS)), st.binary(max_size=200)))
def adapter_files(content: bytes) -> None:
    load_ip_adapter(str(_written("adapter.safetensors", content)))


@target(st.one_of(nested((PLAIN, PLUS)).map(_pickled), values(_PARTS, arrays_too=True).map(_pickled), st.binary()))
def adapter_pickles(content: bytes) -> None:
    load_ip_adapter(str(_written("adapter.bin", content)))


@target(st.one_of(nested((PLAIN, PLUS)), values(("image_proj", "ip_adapter", "ipadapter", "model"), arrays_too=True)))
def adapters_of_other_loaders(given: Any) -> None:
    as_ip_adapter(given)


@target(safetensors_files((XLABS, INSTANTX)))
def flux_adapter_files(content: bytes) -> None:
    load_ip_adapter(str(_written("flux.safetensors", content)))


@target(st.one_of(safetensors_files((POOLING,)), safetensors_files((POOLING,)), st.binary(max_size=200)))
def pooling_files(content: bytes) -> None:
    load_ip_adapter(str(_whole_instantx()), str(_written("siglip.safetensors", content)))


@cache
def _whole_instantx() -> Path:
    return _written("instantx.safetensors", save(INSTANTX))


@cache
def unet() -> Any:
    folder_paths.add_model_folder_path("loras", str(FOLDER))
    return tiny.unet()


@target(
    st.one_of(
        safetensors_files((LORA,)).map(lambda content: ("lora.safetensors", content)),
        values((*LORA, "state_dict"), arrays_too=True).map(lambda value: ("lora.pt", _pickled(value))),
    )
)
def lora_files(given: tuple[str, bytes]) -> None:
    name, content = given
    _written(name, content)
    model = unet()
    (concept,) = LunaConcept.execute("face", KEEP, KEEP, name, 1.0).args[0]
    comfy.sd.load_lora_for_models(model, None, concept.loras[0].weights, 1.0, 0)


CONFIG_NAMES = ("model_type", "detector_config", "auto_map", "attn_implementation", "weight_map", "architectures")
CONFIGS = ('{"model_type": "sam3"}', '{"model_type": "sam3_video", "detector_config": {"model_type": "sam3"}}')


@target(json_texts(CONFIG_NAMES, CONFIGS))
def sam3_configs(text: str) -> None:
    folder = FOLDER / "sam3" / "whole"
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        _written(f"sam3/whole/{name}", b"{}")
    _written("sam3/whole/config.json", text.encode("utf-8", "surrogatepass"))
    check_folder(folder)


@target(st.one_of(st.just("whole"), texts()))
def sam3_names(name: str) -> None:
    _written("sam3/whole/config.json", b"{}")
    find_model(name, [str(FOLDER / "sam3")])


@cache
def tiny_sam3() -> tuple[Any, dict[str, Tensor]]:
    from harness.sam3 import tiny_config, tiny_model

    return tiny_config(512), {name: tensor.clone() for name, tensor in tiny_model(512).state_dict().items()}


@target(st.tuples(st.integers(0, 4), st.integers(0, 2**31), st.integers(0, 255)), slow=True)
def sam3_weights(given: tuple[int, int, int]) -> None:
    """A loose file of weights: one dropped, one of another shape, one renamed, cut off, or a byte changed."""
    from luna_refinement.sam3_bridge.comfy_sam3 import load_sam3

    kind, number, byte = given
    config, whole = tiny_sam3()
    state = dict(whole)
    key = sorted(state)[number % len(state)]
    if kind in (0, 1, 2):
        value = state.pop(key)
        state |= {0: {}, 1: {key: value.flatten()[:1].clone()}, 2: {f"{key}.other": value}}[kind]
    content = bytearray(save({name: tensor.contiguous().clone() for name, tensor in state.items()}))
    if kind == 3:
        del content[number % len(content) :]
    elif kind == 4:
        content[number % 4000] = byte
    load_sam3(_written("sam3_loose.safetensors", bytes(content)), config)


@target(st.one_of(json_texts(("weight_map",), (json.dumps({"weight_map": {"a": "part.safetensors"}}),)), texts()))
def sam3_indexes(text: str) -> None:
    from luna_refinement.sam3_bridge.sam3_files import INDEX

    folder = FOLDER / "sam3" / "sharded"
    for name in ("processor_config.json", "tokenizer.json", "part.safetensors"):
        _written(f"sam3/sharded/{name}", b"{}")
    _written("sam3/sharded/config.json", CONFIGS[0].encode())
    _written(f"sam3/sharded/{INDEX}", text.encode("utf-8", "surrogatepass"))
    check_folder(folder)
