"""Damaged and malicious files of weights: only declared errors come out, quickly, whatever a file claims."""

import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.lora_files import read_lora
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter.comfy_adapter import as_ip_adapter, load_ip_adapter
from luna_refinement.nodes.concepts import LunaConcept
from safetensors.torch import save_file
from torch import Tensor

from harness import tiny

PLAIN = tiny.ip_adapter_weights("sd15", "plain")
PLUS = tiny.ip_adapter_weights("sd15", "plus")


def renamed(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in weights.items()}


def with_layer(number: str) -> dict[str, Tensor]:
    """A plus adapter that names a further layer."""
    return PLUS | {f"image_proj.layers.{number}.0.norm1.weight": torch.ones(8)}


def without_last_pair() -> dict[str, Tensor]:
    return {key: value for key, value in PLAIN.items() if not key.startswith("ip_adapter.31.to_v")}


ADAPTERS: dict[str, dict[str, Any]] = {
    "number with a leading zero": renamed(PLAIN, "ip_adapter.1.", "ip_adapter.01."),
    "number of 5000 digits": renamed(PLAIN, "ip_adapter.1.", f"ip_adapter.{'1' * 5000}."),
    "number in other digits": renamed(PLAIN, "ip_adapter.1.to_k", "ip_adapter.\u0661.to_k"),
    "single numbers": {key: torch.tensor(1.0) for key in PLAIN},
    "single number in the projection": PLAIN | {"image_proj.proj.weight": torch.tensor(1.0)},
    "a row in place of a matrix": PLAIN | {"image_proj.proj.weight": torch.ones(768)},
    "a block in place of a matrix": PLAIN | {"image_proj.proj.weight": torch.ones(768, 2, 2)},
    "pairs without text width": PLAIN | {k: torch.zeros(320, 0) for k in PLAIN if k.startswith("ip_adapter.")},
    "pairs as rows": PLAIN | {k: torch.zeros(768) for k in PLAIN if k.startswith("ip_adapter.")},
    "ragged pairs": PLAIN | {"ip_adapter.5.to_k_ip.weight": torch.zeros(320, 700)},
    "one value missing": without_last_pair(),
    "integers": {key: value.to(torch.int32) for key, value in PLAIN.items()},
    "booleans": PLAIN | {"image_proj.norm.bias": torch.zeros(768, dtype=torch.bool)},
    "complex numbers": PLAIN | {"image_proj.norm.bias": torch.zeros(768, dtype=torch.complex64)},
    "layer 20000": with_layer("20000"),
    "layer 9 of 5": with_layer("9"),
    "layer of 5000 digits": with_layer("9" * 5000),
    "layer by name": with_layer("x"),
    "a hundred layers": PLUS | {f"image_proj.layers.{n}.0.norm1.weight": torch.ones(8) for n in range(100)},
    "heads that do not divide": PLUS | {"image_proj.layers.0.0.to_q.weight": torch.zeros(70, 8)},
    "no head": PLUS | {"image_proj.layers.0.0.to_q.weight": torch.zeros(8, 8)},
    "queries without batch": PLUS | {"image_proj.latents": torch.zeros(16, 8)},
    "queries as a number": PLUS | {"image_proj.latents": torch.tensor(1.0)},
    "nothing at all": {},
}
NESTED: dict[str, Any] = {
    "a list": [1, 2],
    "a number": 7,
    "a tensor": torch.zeros(3),
    "halves as lists": {"image_proj": [1], "ip_adapter": [2]},
    "halves of numbers": {"image_proj": {"a": 1}, "ip_adapter": {"b": 2}},
    "halves in halves": {"image_proj": {"a": {"b": torch.zeros(1)}}, "ip_adapter": {"b": {}}},
    "keys that are numbers": {"image_proj": {1: torch.zeros(1)}, "ip_adapter": {2: torch.zeros(1)}, 3: 4},
    "a sparse weight": {
        "image_proj": {"proj.weight": torch.eye(3).to_sparse()},
        "ip_adapter": {"1.to_k_ip.weight": torch.eye(3)},
    },
    "a view of one number": {
        "image_proj": {"proj.weight": torch.zeros(1).expand(10**6, 10**6)},
        "ip_adapter": {"1.to_k_ip.weight": torch.eye(3)},
    },
    "nothing": {},
}


def assert_refused_quickly(load: Any, *arguments: Any) -> str:
    start = time.monotonic()
    with pytest.raises(LunaInputError) as refusal:
        load(*arguments)
    assert time.monotonic() - start < 3
    assert len(str(refusal.value)) < 3000
    return str(refusal.value)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_damaged_adapter_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "odd.safetensors")
    save_file({key: value.contiguous() for key, value in ADAPTERS[name].items()}, path)
    assert "ip_adapter_file 'odd.safetensors'" in assert_refused_quickly(load_ip_adapter, path)


@pytest.mark.parametrize("name", NESTED)
def test_a_pickle_of_anything_else_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "odd.bin")
    torch.save(NESTED[name], path)
    assert "ip_adapter_file 'odd.bin'" in assert_refused_quickly(load_ip_adapter, path)


@pytest.mark.parametrize("name", NESTED)
def test_what_another_loader_gives_is_checked_alike(name: str) -> None:
    assert "ip_adapter" in assert_refused_quickly(as_ip_adapter, NESTED[name])


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["cut.safetensors", "cut.bin"])
def test_a_file_that_ends_early_is_named(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    save_file(PLAIN, path) if name.endswith("safetensors") else torch.save(PLAIN, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert f"'{name}'" in assert_refused_quickly(load_ip_adapter, str(path))


def packed(path: Path, state_dict: dict[str, Any]) -> None:
    """A PyTorch file whose parts are compressed."""
    torch.save(state_dict, path)
    with zipfile.ZipFile(path) as loose:
        parts = {name: loose.read(name) for name in loose.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as tight:
        for name, content in parts.items():
            tight.writestr(name, content)


def test_a_small_file_cannot_grow_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.bin"
    packed(path, {"image_proj": {"proj.weight": torch.zeros(2**22)}, "ip_adapter": {}})
    assert path.stat().st_size < 2**17
    assert "packed and would grow to 167" in assert_refused_quickly(load_ip_adapter, str(path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".bin"}))
    assert "lora 'bomb.bin' is packed" in assert_refused_quickly(
        LunaConcept.execute, "face", -1.0, -1.0, "bomb.bin", 1.0
    )


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
def test_a_lora_that_ends_early_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".pt", ".safetensors"}))
    path = tmp_path / name
    save_file(lora(), path) if name.endswith("safetensors") else torch.save(lora(), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert f"lora '{name}' cannot be read" in assert_refused_quickly(LunaConcept.execute, "face", -1.0, -1.0, name, 1.0)


def lora(**changes: Any) -> dict[str, Any]:
    base = "lora_unet_mid_block_attentions_0_proj_in"
    weights: dict[str, Any] = {
        f"{base}.lora_up.weight": torch.ones(8, 2),
        f"{base}.lora_down.weight": torch.ones(2, 8),
        f"{base}.alpha": torch.tensor(2.0),
    }
    for key, value in changes.items():
        weights[f"{base}.{key.replace('__', '.')}"] = value
    return {key: value for key, value in weights.items() if value is not None}


GOOD_LORAS = {
    "LoRA": lora(),
    "whole alpha": lora(alpha=torch.tensor(2)),
    "alpha as a row": lora(alpha=torch.tensor([2.0])),
    "LoCon": lora(lora_up__weight=torch.ones(8, 2, 1, 1), lora_down__weight=torch.ones(2, 8, 3, 3)),
    "LoCon with a core": lora(lora_mid__weight=torch.ones(2, 2, 3, 3)),
    "PEFT": {"x.lora_A.weight": torch.ones(2, 8), "x.lora_B.weight": torch.ones(8, 2)},
    "diffusers": {"x_lora.up.weight": torch.ones(8, 2), "x_lora.down.weight": torch.ones(2, 8)},
    "LoHa": {f"x.hada_w{n}_{p}": torch.ones(4, 4) for n in (1, 2) for p in "ab"},
    "LoKr": {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2_a": torch.ones(4, 1), "x.lokr_w2_b": torch.ones(1, 4)},
    "GLoRA": {f"x.{p}.weight": torch.ones(4, 4) for p in ("a1", "a2", "b1", "b2")},
    "difference": {"x.diff": torch.ones(4, 4), "x.diff_b": torch.ones(4)},
    "OFT": {"x.oft_blocks": torch.ones(2, 4, 4), "x.alpha": torch.tensor(1.0)},
    "growing layer": lora(reshape_weight=torch.tensor([8, 16])),
}
BAD_LORAS: dict[str, Any] = {
    "a list": [1, 2],
    "a number": 3,
    "a tensor": torch.zeros(3),
    "nothing": {},
    "another model": {"decoder.conv_in.weight": torch.zeros(2, 2)},
    "lists for weights": lora(lora_up__weight=[1, 2]),
    "numbers for weights": lora(lora_up__weight=3),
    "a number for alpha": lora(alpha=2),
    "a row for alpha": lora(alpha=torch.ones(3)),
    "no number for alpha": lora(alpha=torch.tensor(float("nan"))),
    "no right half": lora(lora_down__weight=None),
    "no left half": lora(lora_up__weight=None),
    "halves of other ranks": lora(lora_up__weight=torch.ones(8, 3)),
    "halves as rows": lora(lora_up__weight=torch.ones(8), lora_down__weight=torch.ones(8)),
    "empty halves": lora(lora_up__weight=torch.ones(8, 0), lora_down__weight=torch.ones(0, 8)),
    "whole numbers": lora(lora_up__weight=torch.ones(8, 2, dtype=torch.int32)),
    "a quarter of a LoHa": {"x.hada_w1_a": torch.ones(4, 4)},
    "half a LoHa": {f"x.hada_w1_{p}": torch.ones(4, 4) for p in "ab"},
    "half a LoKr": {"x.lokr_w1": torch.ones(4, 4)},
    "a quarter of a GLoRA": {"x.a1.weight": torch.ones(4, 4)},
    "a layer without end": lora(reshape_weight=torch.tensor([10**9, 10**9])),
    "a layer of no size": lora(reshape_weight=torch.tensor([], dtype=torch.int8)),
    "a layer of imaginary size": lora(reshape_weight=torch.tensor([8j, 8])),
    "a view of one number": lora(lora_up__weight=torch.zeros(1).expand(10**6, 2)),
}


@pytest.mark.parametrize("name", GOOD_LORAS)
def test_every_kind_of_lora_is_read(name: str) -> None:
    assert read_lora(GOOD_LORAS[name], name).keys() == GOOD_LORAS[name].keys()


@pytest.mark.parametrize("name", BAD_LORAS)
def test_a_damaged_lora_is_refused_when_the_concept_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".pt"}))
    torch.save(BAD_LORAS[name], tmp_path / "odd.pt")
    assert "lora 'odd.pt'" in assert_refused_quickly(LunaConcept.execute, "face", -1.0, -1.0, "odd.pt", 1.0)


TENSORS: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        torch.zeros,
        st.lists(st.integers(0, 70), max_size=4),
        dtype=st.sampled_from([torch.float16, torch.float32, torch.int8, torch.bool, torch.complex64]),
    ),
    st.sampled_from([None, 3, "x", [1], {}]),
)
ADAPTER_KEYS = st.sampled_from(sorted({*PLAIN, *PLUS, "ip_adapter.01.to_k_ip.weight", "image_proj.layers.99.0.x"}))
LORA_KEYS = st.sampled_from(sorted({key for weights in GOOD_LORAS.values() for key in weights}))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([PLAIN, PLUS, {}]), st.dictionaries(ADAPTER_KEYS, TENSORS, max_size=4))
def test_only_declared_errors_come_out_of_any_adapter(base: dict[str, Any], changes: dict[str, Any]) -> None:
    halves: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in (base | changes).items():
        half, name = key.split(".", 1)
        halves[half][name] = value
    with suppress(LunaInputError):
        assert as_ip_adapter(halves).layout.numbers


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(LORA_KEYS, TENSORS, max_size=6))
def test_only_declared_errors_come_out_of_any_lora(weights: dict[str, Any]) -> None:
    with suppress(LunaInputError):
        assert read_lora(weights, "any").keys() == weights.keys()
