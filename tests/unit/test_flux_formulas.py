"""What Flux' image prompts are made of, against formulas written apart in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter.attention import AnchorCall
from luna_refinement.ip_adapter.comfy_adapter import _from_weights, load_ip_adapter
from luna_refinement.ip_adapter.comfy_encode import check_clip_vision, encode_rows
from luna_refinement.ip_adapter.files import split_weights
from luna_refinement.ip_adapter.flux import normed_keys, token_grid, unrotated
from luna_refinement.ip_adapter.pooling import PoolingHead
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import tiny
from harness.flux_reference import linear, rms, rotate, split
from harness.ip_adapter_files import build_instantx, build_pooling_head, build_xlabs
from harness.ip_adapter_reference import attention, gelu, layer_norm
from harness.seeding import generator_for

BOUND = 1e-5


def picture(count: int = 3) -> Tensor:
    return torch.rand(count, 56, 56, 3, generator=generator_for("flux pictures"))


def saved(folder: Path, kind: str) -> str:
    width = tiny.CLIP_POOLED
    weights = build_xlabs(width, 32, 2) if kind == "xlabs" else build_instantx(width, 32, 4)
    path = str(folder / f"{kind}.safetensors")
    save_file(weights, path)
    return path


def test_positions_are_taken_back() -> None:
    q = torch.randn(2, 2, 15, 16, generator=generator_for("q"), dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(1.0), torch.arange(3.0), torch.arange(5.0)).double()
    angles = torch.cat(
        [places[:, a, None] * 10000.0 ** (-torch.arange(0, n, 2) / n) for a, n in enumerate((4, 6, 6))], -1
    )
    pe = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))[None, None]
    turned = rotate(q, places)
    assert float((turned - q).abs().max()) > 0.1
    assert float((unrotated(turned.float(), pe.float()) - q).abs().max()) < 1e-5
    half = unrotated(turned.bfloat16(), pe.float())
    assert half.dtype == torch.bfloat16
    assert float((half.double() - q).abs().max()) < 0.05
    assert unrotated(turned, None) is turned


def test_keys_are_normed_head_by_head() -> None:
    k = torch.randn(3, 4, 32, generator=generator_for("k"), dtype=torch.float64) * 7
    expected = torch.cat(rms(split(k, 2), 1e-5).unbind(1), dim=-1)
    assert torch.allclose(normed_keys(k, 2), expected, atol=1e-12)
    assert not torch.allclose(normed_keys(k, 4), expected, atol=1e-3)


def test_odd_latents_have_a_last_row_of_tokens() -> None:
    assert token_grid((9, 16)) == (5, 8)
    masks = {(9, 16): torch.ones(2, 1, 9, 16), (5, 8): torch.full((2, 1, 5, 8), 0.5)}
    mask = AnchorCall((0, 1), (9, 16), masks=masks).mask_at((5, 8), torch.zeros(4, 40, 3))
    assert mask is not None
    assert mask.shape == (4, 40, 1)


class TestEncoding:
    def test_xlabs_reads_the_pooled_embed_and_no_picture_is_a_black_one(self, tmp_path: Path) -> None:
        adapter, clip_vision = load_ip_adapter(saved(tmp_path, "xlabs")), tiny.clip_vision(tmp_path)
        check_clip_vision(adapter, clip_vision)
        weights = build_xlabs(tiny.CLIP_POOLED, 32, 2)
        found = encode_rows(adapter, clip_vision, picture())
        for tokens, images in ((found.cond, picture()), (found.uncond, torch.zeros(1, 56, 56, 3))):
            embed = clip_vision.encode_image(images)["image_embeds"].detach()
            flat = linear(weights, "ip_adapter_proj_model.proj", embed).reshape(len(images), 4, -1)
            norm = [weights[f"ip_adapter_proj_model.norm.{part}"].double() for part in ("weight", "bias")]
            assert float((tokens - layer_norm(flat, *norm)).abs().max()) < BOUND
        k, v = adapter.key_values(found.cond)[1]
        stem = "double_blocks.1.processor.ip_adapter_double_stream_"
        assert float((k - linear(weights, f"{stem}k_proj", found.cond)).abs().max()) < BOUND
        assert float((v - linear(weights, f"{stem}v_proj", found.cond)).abs().max()) < BOUND

    def test_instantx_reads_what_the_pooling_head_gives(self, tmp_path: Path) -> None:
        clip_vision, file = tiny.siglip_file(tmp_path)
        adapter = load_ip_adapter(saved(tmp_path, "instantx"), str(file))
        check_clip_vision(adapter, clip_vision)
        weights = build_instantx(tiny.CLIP_POOLED, 32, 4)
        hidden = clip_vision.encode_image(picture())["last_hidden_state"].detach().double()
        found = encode_rows(adapter, clip_vision, picture())
        for tokens, embed in ((found.cond, pooled(hidden)), (found.uncond, torch.zeros(1, tiny.CLIP_POOLED))):
            flat = linear(weights, "image_proj.proj.2", gelu(linear(weights, "image_proj.proj.0", embed)))
            norm = [weights[f"image_proj.norm.{part}"].double() for part in ("weight", "bias")]
            assert float((tokens - layer_norm(flat.reshape(len(embed), 4, -1), *norm)).abs().max()) < BOUND

    def test_the_pooling_head_is_that_of_transformers(self) -> None:
        siglip = pytest.importorskip("transformers.models.siglip.modeling_siglip")
        config = siglip.SiglipVisionConfig(
            hidden_size=48, intermediate_size=96, num_attention_heads=4, hidden_act="gelu_pytorch_tanh"
        )
        theirs = siglip.SiglipMultiheadAttentionPoolingHead(config)
        weights = build_pooling_head(48)
        theirs.load_state_dict({key.removeprefix("vision_model.head."): x for key, x in weights.items()})
        ours = PoolingHead(weights | {"vision_model.post_layernorm.weight": torch.ones(48)}, "x")
        hidden = torch.randn(3, 16, 48, generator=generator_for("hidden"))
        with torch.no_grad():
            assert float((ours(hidden, 4) - theirs(hidden)).abs().max()) < BOUND


def pooled(hidden: Tensor) -> Tensor:
    """SigLIP's pooling head by the formula, of 4 heads."""
    head = {key.removeprefix("vision_model.head."): x.double() for key, x in build_pooling_head(48).items()}
    wq, wk, wv = head["attention.in_proj_weight"].chunk(3)
    bq, bk, bv = head["attention.in_proj_bias"].chunk(3)
    q = (head["probe"] @ wq.T + bq).expand(len(hidden), -1, -1)
    out = linear(head, "attention.out_proj", attention(q, hidden @ wk.T + bk, hidden @ wv.T + bv, 4))
    centred = out - out.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    inner = linear(head, "mlp.fc1", normed * head["layernorm.weight"] + head["layernorm.bias"])
    tanh = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    return (out + linear(head, "mlp.fc2", tanh))[:, 0]


class TestEncodersThatDoNotFit:
    def test_xlabs_names_the_width(self, tmp_path: Path) -> None:
        adapter = load_ip_adapter(saved(tmp_path, "xlabs"))
        with pytest.raises(LunaInputError, match=r"clip_vision gives embeds 40 wide .*'xlabs.safetensors'.* on 48"):
            check_clip_vision(adapter, tiny.clip_vision(tmp_path, pooled=40))
        with pytest.raises(LunaInputError, match="no CLIP vision model with projection"):
            check_clip_vision(adapter, tiny.siglip_file(tmp_path)[0])

    def test_instantx_needs_siglip_and_the_head_of_the_same_file(self, tmp_path: Path) -> None:
        path, (siglip, file) = saved(tmp_path, "instantx"), tiny.siglip_file(tmp_path)
        with pytest.raises(LunaInputError, match="clip_vision is no SigLIP encoder"):
            check_clip_vision(load_ip_adapter(path, str(file)), tiny.clip_vision(tmp_path))
        with pytest.raises(LunaInputError, match="choose the file that clip_vision was loaded from as pooling_file"):
            check_clip_vision(load_ip_adapter(path), siglip)
        wide, wide_file = tiny.siglip_file(tmp_path, 64)
        with pytest.raises(LunaInputError, match=r"clip_vision is SigLIP 64 wide.*SigLIP 48 wide"):
            check_clip_vision(load_ip_adapter(path, str(file)), wide)
        with pytest.raises(LunaInputError, match=r"'tiny_siglip_64.safetensors'.* is not the file"):
            check_clip_vision(load_ip_adapter(path, str(wide_file)), siglip)

    def test_files_without_a_pooling_head_are_named(self, tmp_path: Path) -> None:
        path, (_, file) = saved(tmp_path, "instantx"), tiny.siglip_file(tmp_path)
        weights = load_file(file)

        def broken(name: str, change: dict[str, Any]) -> str:
            entries = {key: value for key, value in (weights | change).items() if value is not None}
            save_file(entries, tmp_path / name)
            return str(tmp_path / name)

        probe, bias = "vision_model.head.probe", "vision_model.head.mlp.fc1.bias"
        cases = [
            (saved(tmp_path, "xlabs"), "'xlabs.safetensors' lacks vision_model.post_layernorm.weight"),
            (broken("headless.safetensors", {probe: None}), "'headless.safetensors' lacks vision_model.head.probe"),
            (broken("ints.safetensors", {bias: torch.zeros(96, dtype=torch.int32)}), "fc1.bias holds int32"),
            (broken("short.safetensors", {bias: torch.zeros(5)}), "do not fit together"),
            (str(tmp_path / "gone.safetensors"), "'gone.safetensors' cannot be read"),
        ]
        for pooling, reason in cases:
            with pytest.raises(LunaInputError, match=f"pooling_file .*{reason}"):
                load_ip_adapter(path, pooling)

    def test_kolors_needs_its_own_encoder(self, tmp_path: Path) -> None:
        width = tiny.CLIP_HIDDEN
        weights = tiny.ip_adapter_weights("sdxl", "plus")
        adapter = _from_weights(split_weights(kolors(weights, width), "kolors.bin"))
        assert adapter.layout.kind == "kolors"
        with pytest.raises(
            LunaInputError, match=r"clip_vision sees pictures of 56 px, but ip_adapter 'kolors.bin'.* 336"
        ):
            check_clip_vision(adapter, tiny.clip_vision(tmp_path))
        check_clip_vision(adapter, tiny.clip_vision(tmp_path, image_size=336))


def kolors(weights: dict[str, Tensor], clip_dim: int) -> dict[str, Tensor]:
    """An SDXL adapter's attention behind a resampler as wide as its tokens, of two heads and no layer but one."""
    dim, inner = 2048, 128
    head = {
        "latents": torch.zeros(1, 16, dim),
        "proj_in.weight": torch.zeros(dim, clip_dim),
        "proj_in.bias": torch.zeros(dim),
        "proj_out.weight": torch.zeros(dim, dim),
        "proj_out.bias": torch.zeros(dim),
        "norm_out.weight": torch.ones(dim),
        "norm_out.bias": torch.zeros(dim),
        "layers.0.0.to_q.weight": torch.zeros(inner, dim),
        "layers.0.0.to_kv.weight": torch.zeros(2 * inner, dim),
        "layers.0.0.to_out.weight": torch.zeros(dim, inner),
        "layers.0.1.1.weight": torch.zeros(4 * dim, dim),
        "layers.0.1.3.weight": torch.zeros(dim, 4 * dim),
    }
    for norm in ("layers.0.0.norm1", "layers.0.0.norm2", "layers.0.1.0"):
        head |= {f"{norm}.weight": torch.ones(dim), f"{norm}.bias": torch.zeros(dim)}
    attention_part = {key: value for key, value in weights.items() if key.startswith("ip_adapter.")}
    return {f"image_proj.{key}": value for key, value in head.items()} | attention_part
