"""Which IP-Adapter files are recognised by keys and shapes, and what is said about the others."""

import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter import comfy_adapter
from luna_refinement.ip_adapter.comfy_adapter import as_ip_adapter, load_ip_adapter
from luna_refinement.ip_adapter.files import AdapterLayout, read_layout, split_weights
from luna_refinement.ip_adapter.projection import AdapterNetwork
from safetensors.torch import save_file
from torch import Tensor

from harness import tiny
from harness.ip_adapter_reference import keys

SD15_WIDTHS = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280]
SDXL_WIDTHS = [640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10

# The published files: name, projection, family, width of the CLIP output, tokens per picture.
PUBLISHED = [
    ("ip-adapter_sd15", "plain", "sd15", 1024, 4),
    ("ip-adapter_sd15_light_v11", "plain", "sd15", 1024, 4),
    ("ip-adapter_sd15_vit-G", "plain", "sd15", 1280, 4),
    ("ip-adapter-plus_sd15", "plus", "sd15", 1280, 16),
    ("ip-adapter-plus-face_sd15", "plus", "sd15", 1280, 16),
    ("ip_plus_composition_sd15", "plus", "sd15", 1280, 16),
    ("ip-adapter-full-face_sd15", "full_face", "sd15", 1280, 257),
    ("ip-adapter_sdxl", "plain", "sdxl", 1280, 4),
    ("ip-adapter_sdxl_vit-h", "plain", "sdxl", 1024, 4),
    ("ip-adapter-plus_sdxl_vit-h", "plus", "sdxl", 1280, 16),
    ("ip-adapter-plus-face_sdxl_vit-h", "plus", "sdxl", 1280, 16),
    ("ip_plus_composition_sdxl", "plus", "sdxl", 1280, 16),
    ("a plus adapter of ViT-G", "plus", "sdxl", 1664, 16),
    ("a plus adapter of ViT-L with 32 queries", "plus", "sd15", 1024, 32),
]


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def attention_shapes(family: str) -> dict[str, Tensor]:
    widths, cross = (SD15_WIDTHS, 768) if family == "sd15" else (SDXL_WIDTHS, 2048)
    return {
        f"{2 * pair + 1}.to_{kind}_ip.weight": empty(width, cross) for pair, width in enumerate(widths) for kind in "kv"
    }


def resampler_shapes(dim: int, clip: int, cross: int, queries: int) -> dict[str, Tensor]:
    shapes = {
        "latents": empty(1, queries, dim),
        "proj_in.weight": empty(dim, clip),
        "proj_in.bias": empty(dim),
        "proj_out.weight": empty(cross, dim),
        "proj_out.bias": empty(cross),
        "norm_out.weight": empty(cross),
        "norm_out.bias": empty(cross),
    }
    for layer in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{norm}.{part}": empty(dim) for part in ("weight", "bias")}
        shapes |= {
            f"layers.{layer}.0.to_q.weight": empty(dim, dim),
            f"layers.{layer}.0.to_kv.weight": empty(2 * dim, dim),
            f"layers.{layer}.0.to_out.weight": empty(dim, dim),
            f"layers.{layer}.1.1.weight": empty(4 * dim, dim),
            f"layers.{layer}.1.3.weight": empty(dim, 4 * dim),
        }
    return shapes


def projection_shapes(variant: str, family: str, clip: int, tokens: int) -> dict[str, Tensor]:
    cross = 768 if family == "sd15" else 2048
    if variant == "plus":
        return resampler_shapes(768 if family == "sd15" else 1280, clip, cross, tokens)
    if variant == "full_face":
        mlp = {"proj.0.weight": empty(clip, clip), "proj.0.bias": empty(clip), "proj.2.weight": empty(cross, clip)}
        return mlp | {"proj.2.bias": empty(cross), "proj.3.weight": empty(cross), "proj.3.bias": empty(cross)}
    linear = {"proj.weight": empty(tokens * cross, clip), "proj.bias": empty(tokens * cross)}
    return linear | {"norm.weight": empty(cross), "norm.bias": empty(cross)}


@pytest.mark.parametrize(("name", "variant", "family", "clip", "tokens"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
@pytest.mark.parametrize("form", ["flat", "nested", "adapter_modules"])
def test_published_layouts_are_recognised(
    form: str, name: str, variant: str, family: str, clip: int, tokens: int
) -> None:
    image_proj, pairs = projection_shapes(variant, family, clip, tokens), attention_shapes(family)
    prefix = "adapter_modules" if form == "adapter_modules" else "ip_adapter"
    state_dict: dict[str, Any] = {"image_proj": image_proj, prefix: pairs}
    if form != "nested":
        state_dict = {f"{half}.{key}": x for half, weights in state_dict.items() for key, x in weights.items()}
    weights = split_weights(state_dict, name)
    layout = read_layout(weights)
    widths = SD15_WIDTHS if family == "sd15" else SDXL_WIDTHS
    assert layout == AdapterLayout(
        variant,
        clip,
        768 if family == "sd15" else 2048,
        tokens,
        tuple(range(1, 2 * len(widths), 2)),
        tuple(widths),
    )
    assert layout.reads_pooled == (variant == "plain")
    # every weight of the file has its place in the network, and none is missing
    network = AdapterNetwork(weights, layout)
    assert sum(1 for _ in network.parameters()) == len(image_proj) + len(pairs)
    resampler_heads = {"sd15": 12, "sdxl": 20}[family]
    if variant == "plus":
        resampler: Any = network.image_proj
        assert {layer[0].heads for layer in resampler.layers} == {resampler_heads}


def halves_of(state_dict: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in state_dict.items():
        half, name = key.split(".", 1)
        halves[half][name] = value
    return halves


def saved(folder: Path, name: str, state_dict: dict[str, Any]) -> str:
    path = str(folder / name)
    if name.endswith(".safetensors"):
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_files_load_in_the_dtype_they_are_stored_in(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    weights = {key: x.to(dtype) for key, x in tiny.ip_adapter_weights("sd15", "plain").items()}
    path = saved(tmp_path, name, weights if name.endswith("safetensors") else halves_of(weights))
    adapter = load_ip_adapter(path)
    assert adapter.name == name
    assert {parameter.dtype for parameter in adapter.network.parameters()} == {dtype}
    stored = adapter.network.key_values.to_v[15].weight
    assert torch.equal(stored, weights["ip_adapter.31.to_v_ip.weight"])
    assert len(adapter.network.key_values.to_k) == len(keys("sd15"))


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize("protocol", [2, "torch"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, protocol: Any) -> None:
    target, path = tmp_path / "ran", tmp_path / "evil.bin"
    state_dict = {"image_proj": {"x": Bomb(target)}, "ip_adapter": {}}
    if protocol == "torch":
        torch.save(state_dict, path)
    else:
        path.write_bytes(pickle.dumps(state_dict, protocol=protocol))
    with pytest.raises(LunaInputError, match=r"'evil.bin' was not opened.*code.*safetensors"):
        load_ip_adapter(str(path))
    assert not target.exists()


def test_truncated_files_are_named_damaged(tmp_path: Path) -> None:
    weights = tiny.ip_adapter_weights("sd15", "plain")
    for name in ("cut.safetensors", "cut.bin"):
        path = Path(saved(tmp_path, name, weights if name.endswith("safetensors") else halves_of(weights)))
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(LunaInputError, match=rf"'{name}' cannot be read.*download it again"):
            load_ip_adapter(str(path))


def test_a_missing_file_is_said_to_be_gone(tmp_path: Path) -> None:
    for name in ("gone.safetensors", "gone.bin"):
        with pytest.raises(LunaInputError, match=rf"'{name}' is gone"):
            load_ip_adapter(str(tmp_path / name))


def test_a_file_that_is_no_adapter_says_what_it_found(tmp_path: Path) -> None:
    path = saved(tmp_path, "vae.safetensors", {"decoder.conv_in.weight": torch.zeros(2, 2)})
    with pytest.raises(LunaInputError, match=r"'vae.safetensors' is no IP-Adapter.*decoder.conv_in.weight"):
        load_ip_adapter(path)
    path = saved(tmp_path, "list.bin", {"image_proj": {"latents": torch.zeros(1)}, "ip_adapter": torch.zeros(3)})
    with pytest.raises(LunaInputError, match=r"'list.bin' is no IP-Adapter: it has no ip_adapter weights"):
        load_ip_adapter(path)
    torch.save(torch.zeros(3), tmp_path / "tensor.bin")
    with pytest.raises(LunaInputError, match=r"tensor\.bin"):
        load_ip_adapter(str(tmp_path / "tensor.bin"))


FACE_ID = {"proj.0.weight": empty(1024, 512), "proj.2.weight": empty(3072, 1024), "norm.weight": empty(768)}
LORA = {"0.to_q_lora.down.weight": empty(128, 320), "0.to_q_lora.up.weight": empty(320, 128)}
KOLORS = resampler_shapes(2048, 1024, 2048, 16)
REFUSED = [
    ("ip-adapter-faceid_sd15.bin", FACE_ID, attention_shapes("sd15") | LORA, "FaceID adapter.*identity network"),
    (
        "ip-adapter-faceid-plusv2_sdxl.bin",
        FACE_ID | {"perceiver_resampler.proj_in.weight": empty(2048, 1280)},
        attention_shapes("sdxl") | LORA,
        "FaceID adapter.*identity network",
    ),
    (
        "ip-adapter-faceid-portrait_sd15.bin",
        FACE_ID | {"proj.2.weight": empty(12288, 1024)},
        attention_shapes("sd15"),
        "FaceID portrait adapter.*identity embeds",
    ),
    (
        "sd3.5-ip-adapter.bin",
        resampler_shapes(2432, 1152, 768, 64) | {"time_embedding.linear_1.weight": empty(1, 1)},
        attention_shapes("sd15"),
        "n adapter of Stable Diffusion 3.5.*every step",
    ),
    (
        "kolors-faceid.bin",
        {"perceiver_resampler.layers.0.0.to_out.weight": empty(4096, 1)},
        attention_shapes("sdxl"),
        "FaceID",
    ),
]


@pytest.mark.parametrize(("name", "image_proj", "pairs", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_unsupported_variants_are_refused_with_the_reason(
    name: str, image_proj: dict[str, Tensor], pairs: dict[str, Tensor], reason: str
) -> None:
    weights = split_weights({"image_proj": image_proj, "ip_adapter": pairs}, name)
    with pytest.raises(LunaInputError, match=f"'{name}' is a ?{reason}"):
        read_layout(weights)


XLABS_PAIR = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj.{}"


def xlabs_shapes(tokens: int) -> dict[str, Tensor]:
    shapes = {f"ip_adapter_proj_model.proj.{x}": empty(tokens * 4096, *w) for x, w in (("weight", [768]), ("bias", []))}
    shapes |= {f"ip_adapter_proj_model.norm.{part}": empty(4096) for part in ("weight", "bias")}
    for block in range(19):
        for kind in "kv":
            shapes[XLABS_PAIR.format(block, kind, "weight")] = empty(3072, 4096)
            shapes[XLABS_PAIR.format(block, kind, "bias")] = empty(3072)
    return shapes


def instantx_shapes() -> dict[str, dict[str, Tensor]]:
    """Nested, as the published .bin."""
    projection = {
        "proj.0.weight": empty(2304, 1152),
        "proj.0.bias": empty(2304),
        "proj.2.weight": empty(128 * 4096, 2304),
        "proj.2.bias": empty(128 * 4096),
        "norm.weight": empty(4096),
        "norm.bias": empty(4096),
    }
    pairs = {f"{number}.to_{kind}_ip.weight": empty(3072, 4096) for number in range(57) for kind in "kv"}
    return {"image_proj": projection, "ip_adapter": pairs}


@pytest.mark.parametrize("tokens", [4, 16])
def test_xlabs_files_are_recognised(tokens: int) -> None:
    weights = split_weights(xlabs_shapes(tokens), "flux-ip-adapter.safetensors")
    layout = read_layout(weights)
    assert layout == AdapterLayout("plain", 768, 4096, tokens, tuple(range(19)), (3072,) * 19, "xlabs")
    assert (layout.is_flux, layout.reads_pooled, layout.family) == (True, True, "Flux")
    assert sum(1 for _ in AdapterNetwork(weights, layout).parameters()) == len(xlabs_shapes(tokens))


def test_instantx_files_are_recognised() -> None:
    nested = instantx_shapes()
    flat = {f"{half}.{key}": x for half, part in nested.items() for key, x in part.items()}
    for state_dict in (nested, flat):
        weights = split_weights(state_dict, "ip-adapter.bin")
        layout = read_layout(weights)
        assert layout == AdapterLayout("mlp", 1152, 4096, 128, tuple(range(57)), (3072,) * 57, "instantx")
        assert (layout.is_flux, layout.reads_pooled, layout.family) == (True, True, "Flux")
        assert sum(1 for _ in AdapterNetwork(weights, layout).parameters()) == len(flat)


def test_kolors_plus_is_recognised() -> None:
    weights = split_weights(
        {"image_proj": KOLORS, "ip_adapter": attention_shapes("sdxl")}, "ip_adapter_plus_general.bin"
    )
    layout = read_layout(weights)
    numbers = tuple(range(1, 140, 2))
    assert layout == AdapterLayout("plus", 1024, 2048, 16, numbers, tuple(SDXL_WIDTHS), "kolors")
    assert (layout.is_flux, layout.reads_pooled, layout.family) == (False, False, "Kolors")


def test_damaged_flux_files_are_refused() -> None:
    xlabs, nested = xlabs_shapes(4), instantx_shapes()

    def without(state_dict: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {key: value for key, value in state_dict.items() if key not in keys}

    pairs, projection = nested["ip_adapter"], nested["image_proj"]
    linear = {"proj.weight": empty(4 * 4096, 768), "proj.bias": empty(4 * 4096)}
    norm = {key: projection[key] for key in ("norm.weight", "norm.bias")}
    first = [XLABS_PAIR.format(0, kind, part) for kind in "kv" for part in ("weight", "bias")]
    cases = [
        (without(xlabs, first[1]), "37 biases for 38 key and value layers"),
        (without(xlabs, first[0]), "18 key and 19 value layers"),
        (without(xlabs, *first), "numbers its 18 layers from 1 to 18"),
        ({"image_proj": linear | norm, "ip_adapter": pairs}, "neither XLabs' nor InstantX's"),
        ({"image_proj": without(projection, "proj.0.weight"), "ip_adapter": pairs}, "neither XLabs' nor InstantX's"),
        ({"image_proj": projection | {"proj.2.weight": empty(4097, 2304)}, "ip_adapter": pairs}, "to 4097 numbers"),
        ({"image_proj": projection | {"proj.0.weight": empty(8)}, "ip_adapter": pairs}, "proj.0.weight has shape"),
        (
            {"image_proj": projection_shapes("plain", "sd15", 1024, 4), "ip_adapter": attention_shapes("sd15")}
            | {"ip_adapter.1.to_k_ip.bias": empty(320)},
            "1 biases for 32",
        ),
    ]
    for state_dict, reason in cases:
        with pytest.raises(LunaInputError, match=f"'odd.bin'.*{reason}"):
            comfy_adapter._from_weights(split_weights(state_dict, "odd.bin"))


def test_unknown_and_damaged_weights_are_refused() -> None:
    pairs = attention_shapes("sd15")
    plain = projection_shapes("plain", "sd15", 1024, 4)
    without_value = {key: x for key, x in pairs.items() if key != "31.to_v_ip.weight"}
    cases = [
        ({"mystery.weight": empty(3)}, pairs, "does not know.*mystery.weight"),
        (plain, without_value, "16 key and 15 value layers"),
        (plain, pairs | {"31.to_v_ip.weight": empty(1280, 2048)}, "different widths"),
        (plain, pairs | {"31.to_v_ip.weight": empty(640, 768)}, "different widths"),
        (
            {"latents": empty(1, 16, 768), "layers.0.0.to_q.weight": empty(768, 768)},
            pairs,
            "lacks image_proj.proj_in.weight",
        ),
        (
            {
                "latents": empty(1, 64, 768),
                "proj_in.weight": empty(768, 1152),
                "layers.0.attn.to_q.weight": empty(8, 8),
            },
            pairs,
            "adapter for SD1.5 or SDXL",
        ),
        ({"latents": empty(1, 16, 768), "proj_in.weight": empty(768, 512)}, pairs, "face identity embeds 512 wide"),
        (plain | {"proj.weight": empty(3000, 1024)}, pairs, "3000"),
        (plain | {"proj.bias": empty(7)}, pairs, "do not fit"),
        (projection_shapes("plus", "sdxl", 1280, 16), pairs, "2048.*768"),
        (projection_shapes("full_face", "sdxl", 1280, 257), pairs, "2048.*768"),
    ]
    for image_proj, ip_adapter, reason in cases:
        with pytest.raises(LunaInputError, match=f"'odd.bin'.*{reason}"):
            comfy_adapter._from_weights(split_weights({"image_proj": image_proj, "ip_adapter": ip_adapter}, "odd.bin"))


def test_adapters_of_other_packs_are_converted_once() -> None:
    foreign = halves_of(tiny.ip_adapter_weights("sd15", "plain"))
    adapter = as_ip_adapter(foreign)
    assert as_ip_adapter(foreign) is adapter
    pipeline = {"clipvision": {"file": None, "model": None}, "ipadapter": {"file": "x.bin", "model": foreign}}
    assert as_ip_adapter(pipeline) is adapter
    assert as_ip_adapter(adapter) is adapter
    assert as_ip_adapter(halves_of(tiny.ip_adapter_weights("sd15", "plus"))) is not adapter


def test_two_adapters_that_share_their_attention_are_told_apart() -> None:
    plain, plus = (halves_of(tiny.ip_adapter_weights("sd15", variant)) for variant in ("plain", "plus"))
    plus["ip_adapter"] = plain["ip_adapter"]
    assert as_ip_adapter(plain).layout.variant == "plain"
    assert as_ip_adapter(plus).layout.variant == "plus"


def test_a_converted_adapter_goes_with_its_source() -> None:
    gc.collect()
    before = len(comfy_adapter._converted)
    foreign = halves_of(tiny.ip_adapter_weights("sd15", "plain"))
    as_ip_adapter(foreign)
    assert len(comfy_adapter._converted) == before + 1
    del foreign
    gc.collect()
    assert len(comfy_adapter._converted) == before


def test_face_id_of_another_loader_is_refused_too() -> None:
    with pytest.raises(LunaInputError, match=r"connected loader.*FaceID"):
        as_ip_adapter({"image_proj": FACE_ID, "ip_adapter": attention_shapes("sd15") | LORA, "faceidplusv2": True})


@pytest.mark.parametrize("given", [None, 3, {"insightface": 1}, {"ipadapter": {"file": None, "model": None}}])
def test_what_is_no_adapter_is_refused_by_its_kind(given: Any) -> None:
    with pytest.raises(LunaInputError, match="unknown layout"):
        as_ip_adapter(given)
