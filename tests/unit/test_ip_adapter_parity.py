"""The engine's numbers against the published formulas in float64 and against the diffusers library."""

from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.utils import unet_to_diffusers
from diffusers import UNet2DConditionModel
from luna_refinement.ip_adapter.anchors import SCALINGS, Anchors
from luna_refinement.ip_adapter.attention import CALLS, AnchorCall, AnchoredAttention
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter, as_ip_adapter
from luna_refinement.ip_adapter.comfy_patch import patch_model
from luna_refinement.ip_adapter.embeds import RowEmbeds
from luna_refinement.ip_adapter.layer_weights import LayerFactor
from torch import Tensor

from harness import denoiser, tiny
from harness.ip_adapter_reference import decoupled, full_face, keys, linear_projection, resampler
from harness.seeding import generator_for

FLOAT64_BOUND = 1e-5
DIFFUSERS_BOUND = 1e-4
VARIANTS = ("plus", "plain", "full_face")
REFERENCE_PROJECTION = {
    "plus": lambda weights, x: resampler(weights, x, depth=4, heads=weights["layers.0.0.to_q.weight"].shape[0] // 64),
    "plain": linear_projection,
    "full_face": full_face,
}


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def halves_of(family: str, variant: str) -> dict[str, dict[str, Tensor]]:
    """A file's weights; norms and biases are made random, or a norm left out would go unseen."""
    generator = generator_for("parity", family, variant)
    halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tiny.ip_adapter_weights(family, variant).items():
        half, name = key.split(".", 1)
        spread = torch.randn(value.shape, generator=generator) * 0.2 if value.ndim == 1 else 0
        halves[half][name] = value + spread
    return halves


def encoded_pictures(variant: str, rows: int) -> Tensor:
    shape = (rows, tiny.CLIP_POOLED) if variant == "plain" else (rows, 257, tiny.CLIP_HIDDEN)
    return torch.randn(shape, generator=generator_for("pictures", variant))


def tokens_of(adapter: IPAdapter, encoded: Tensor) -> Tensor:
    adapter.load()
    return adapter.network.image_proj(encoded)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_projections_follow_the_published_formulas(family: str, variant: str) -> None:
    halves = halves_of(family, variant)
    encoded = encoded_pictures(variant, 2)
    in_float64 = {key: value.double() for key, value in halves["image_proj"].items()}
    expected = REFERENCE_PROJECTION[variant](in_float64, encoded.double())
    tokens = tokens_of(as_ip_adapter(halves), encoded)
    assert tokens.shape == expected.shape
    assert relative_error(tokens, expected) <= FLOAT64_BOUND


def options(heads: int, roles: list[int], **more: Any) -> dict[str, Any]:
    return {"n_heads": heads, "cond_or_uncond": roles, "block": ("input", 1), **more}


def torch_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: Any) -> Tensor:
    q, k, v = (x.unflatten(-1, (extra_options["n_heads"], -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("roles", [[1, 0], [0, 1], [0], [1], [0, 0, 1]])
def test_attention_follows_the_published_formula(scaling: str, roles: list[int]) -> None:
    generator = generator_for("attention", scaling)
    rows, inner, heads = 3, 32, 4
    cond, uncond = (torch.randn((n, 5, 24), generator=generator) for n in (rows, 1))
    to_k, to_v = (torch.randn((inner, 24), generator=generator) / 24**0.5 for _ in range(2))
    q = torch.randn((rows * len(roles), 9, inner), generator=generator)
    k, v = (torch.randn((rows * len(roles), 7, inner), generator=generator) for _ in range(2))
    weights = torch.tensor([0.4, 1.3, -0.7])
    anchors = Anchors(
        RowEmbeds(cond, uncond), weights, [LayerFactor(0.5)], lambda x: [(x @ to_k.T, x @ to_v.T)], scaling
    )
    call = anchors.run().call(AnchorCall(tuple(roles), (3, 3)), torch.empty(len(q), 4, 3, 3), q.dtype)
    layer = AnchoredAttention(0, 0, torch_attention)
    result = layer(q, k, v, options(heads, roles, **{CALLS: (call,)}))

    q64, k64, v64, cond64, uncond64, to_k64, to_v64 = (x.double() for x in (q, k, v, cond, uncond, to_k, to_v))
    pictures = torch.cat([cond64 if role == 0 else uncond64.expand(rows, -1, -1) for role in roles])
    weight = torch.cat([weights.double() * 0.5] * len(roles))[:, None, None]
    plain = decoupled(q64, k64, v64, heads, 1.0, "V only")
    expected = plain + decoupled(q64, pictures @ to_k64.T, pictures @ to_v64.T, heads, weight, scaling)
    assert relative_error(result, expected) <= FLOAT64_BOUND


# -- diffusers ------------------------------------------------------------------------------------


def diffusers_unet(family: str, model: Any) -> Any:
    """diffusers' own UNet with the weights of the tiny ComfyUI model."""
    heads = tiny.CHANNELS // 8
    if family == "sd15":
        config: dict[str, Any] = {
            "block_out_channels": (32,) * 4,
            "cross_attention_dim": 768,
            "attention_head_dim": heads,
        }
    else:
        config = {
            "block_out_channels": (32,) * 3,
            "cross_attention_dim": 2048,
            "attention_head_dim": heads,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    unet: Any = UNet2DConditionModel(**config)
    source = model.model.diffusion_model.state_dict()
    names = unet_to_diffusers(dict(denoiser.SD15_CONFIG if family == "sd15" else denoiser.SDXL_CONFIG))
    wanted = unet.state_dict()
    unet.load_state_dict({name: source[names[name]].reshape(wanted[name].shape) for name in wanted}, strict=True)
    return unet.eval()


def through_wrappers(patched: Any, latent: Tensor, timesteps: Tensor, text: Tensor, vector: Tensor | None) -> Tensor:
    """The UNet alone, called as ComfyUI calls it: by way of what the patches of the model wrapped around it."""

    def network(x: Tensor, t: Tensor, _: None, context: Tensor, control: None, to: dict[str, Any]) -> Tensor:
        return patched.model.diffusion_model(x, t, context, y=vector, control=control, transformer_options=to)

    to = {**patched.model_options["transformer_options"], "cond_or_uncond": [0]}
    wrappers = patched.get_all_wrappers(WrappersMP.APPLY_MODEL)
    executor = WrapperExecutor.new_class_executor(network, patched.model, wrappers)
    return executor.execute(latent, timesteps, None, text, None, to)


@pytest.mark.parametrize(
    ("family", "variant"), [("sd15", "plus"), ("sd15", "plain"), ("sd15", "full_face"), ("sdxl", "plus")]
)
def test_a_whole_unet_gives_the_numbers_of_diffusers(family: str, variant: str) -> None:
    model = tiny.unet(family)
    unet = diffusers_unet(family, model)
    halves = halves_of(family, variant)
    encoded = encoded_pictures(variant, 2)
    generator = generator_for("unet parity", family)
    latent = torch.randn((2, 4, 16, 16), generator=generator)
    text = torch.randn((2, 77, tiny.CONTEXT[family]), generator=generator)
    timesteps = torch.tensor([600.0, 600.0])
    vector, added = None, {}
    if family == "sdxl":
        pooled, time_ids = torch.randn((2, 1280), generator=generator), torch.zeros(2, 6)
        # diffusers embeds the size ids itself, ComfyUI takes them embedded
        vector = torch.cat([pooled, unet.add_time_proj(time_ids.flatten()).reshape(2, -1)], dim=1)
        added = {"text_embeds": pooled, "time_ids": time_ids}

    adapter = as_ip_adapter(halves)
    with torch.no_grad():
        bare = unet(latent, timesteps, text, added_cond_kwargs=added).sample
        unet._load_ip_adapter_weights([halves], low_cpu_mem_usage=False)
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.8]
        image_embeds = [encoded[:, None]]
        expected = unet(latent, timesteps, text, added_cond_kwargs=added | {"image_embeds": image_embeds}).sample

        tokens = tokens_of(adapter, encoded)
        patched = patch_model(model, adapter, RowEmbeds(tokens, torch.zeros_like(tokens[:1])), weight=0.8)
        diffusion_model = model.model.diffusion_model
        ours_bare = diffusion_model(latent, timesteps, text, y=vector, transformer_options={})
        ours = through_wrappers(patched, latent, timesteps, text, vector)
    assert relative_error(ours_bare, bare) <= DIFFUSERS_BOUND
    assert relative_error(ours, expected) <= DIFFUSERS_BOUND
    assert relative_error(ours, bare) > 30 * DIFFUSERS_BOUND  # the picture acts at all
    assert len(keys(family)) == sum(hasattr(processor, "scale") for processor in unet.attn_processors.values())
