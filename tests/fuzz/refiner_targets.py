"""What steers the refiners and the adapter: settings, noise, noise levels, weights as text, embeds, masks."""

from functools import cache
from typing import Any

import torch
from fuzz.strategies import damaged, masks, numbers, schema_numbers, tensors, texts, values
from fuzz.target import target
from hypothesis import strategies as st
from luna_refinement.batching.comfy_recipe import SamplingSettings
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.upscale import fitted_size
from luna_refinement.ip_adapter import LayerWeights, RowEmbeds
from luna_refinement.ip_adapter.comfy_adapter import as_ip_adapter
from luna_refinement.ip_adapter.layer_weights import parse_layer_weights, parse_numbers
from luna_refinement.ip_adapter.layers import AttentionLayer
from luna_refinement.nodes.checks import check_scaffold
from luna_refinement.nodes.ip_adapter import LunaApplyIPAdapter
from luna_refinement.nodes.refiner_inputs import choose_recipe
from luna_refinement.picture.boxes import Box
from luna_refinement.picture.detections import Detection

from harness import tiny

LAYERS = [AttentionLayer((part, k, 0), k, 32, 768) for part in ("input", "output") for k in range(6)]


@target(st.one_of(damaged(("3:0.5, output.4:1.2, middle:0", "input.1.0:2")), texts()))
def layer_weights_as_text(text: str) -> None:
    LayerWeights("linear", parse_layer_weights(text)).resolve(LAYERS)


@target(st.one_of(damaged(("1, 0.5, 0.8", "1\n0")), texts()))
def numbers_as_text(text: str) -> None:
    LayerWeights(row_curve=parse_numbers(text, "row_curve")).row_factors(7)


@target(
    st.tuples(
        st.sampled_from([(64, 48), (1, 1), (1024, 32), (32, 1024), (20000, 50)]),
        st.sampled_from([0, 8, 64, 512, 1024, 4096]) | st.integers(0, 4096),
        schema_numbers(0, 8),
        st.integers(0, 1024),
        st.floats(0, 1),
    ),
    slow=True,
)
def settings_of_crops(given: tuple[Any, ...]) -> None:
    """Any the schema lets through, on pictures of any shape."""
    (width, height), size, padding, feather, place = given
    box = (width * place / 2, height * place / 2, width * (place + 1) / 2, height * (place + 1) / 2)
    plan = plan_detections([Detection(0, box)], width, height, 1, CropSettings(size, padding, feather), 7)
    for region in plan.regions:
        region.weights.draw(region.paste)


@target(
    st.tuples(
        st.sampled_from([(64, 48), (1, 1), (1024, 32), (4096, 4096), (20000, 50)]),
        st.integers(0, 64).map(lambda k: 8 * k) | st.integers(0, 4096),
        schema_numbers(0, 0.5),
        schema_numbers(0, 1),
    )
)
def settings_of_tiles(given: tuple[Any, ...]) -> None:
    (width, height), size, overlap, feather = given
    plan = plan_tiles(width, height, 1, TileSettings(size, overlap, feather), 7)
    plan.regions[0].weights.draw(Box(0, 0, min(64, width), min(64, height)))


@target(st.tuples(*[st.integers(1, 30000)] * 2, st.integers(64, 16384), st.integers(1, 512)))
def sizes_of_an_upscale(given: tuple[int, int, int, int]) -> None:
    fitted_size(*given)


@cache
def unet() -> Any:
    return tiny.unet()


@cache
def vae() -> Any:
    return tiny.vae()


@cache
def adapter() -> Any:
    halves: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tiny.ip_adapter_weights().items():
        half, name = key.split(".", 1)
        halves[half][name] = value
    return as_ip_adapter(halves)


_LATENTS = tensors(st.sampled_from([(1, 4, 4, 6), (2, 4, 4, 6), (1, 16, 4, 6), (4, 4, 6), (1, 4, 1, 4, 6)]))


@target(st.one_of(st.fixed_dictionaries({"samples": _LATENTS}), values(("samples",), arrays_too=True)))
def noise_scaffolds(latent: Any) -> None:
    check_scaffold(latent, vae(), torch.zeros(1, 32, 48, 3))


@target(st.one_of(tensors(), st.just(torch.tensor([5.0, 1.0, 0.0])), values((), arrays_too=True)))
def noise_levels(sigmas: Any) -> None:
    settings = SamplingSettings(7, 3, 3.0, "euler", "normal", 0.4)
    text = tiny.conditioning()
    choose_recipe(unet(), text, text, settings, None, None, sigmas)


_TOKENS = tensors(st.sampled_from([(2, 4, 768), (1, 4, 768), (2, 4, 64), (4, 768), (0, 4, 768)]))


@target(st.tuples(_TOKENS, _TOKENS))
def embeds(given: tuple[Any, Any]) -> None:
    RowEmbeds(*given)


@target(
    st.tuples(
        schema_numbers(-1, 5),
        schema_numbers(0, 1),
        schema_numbers(0, 1),
        st.one_of(damaged(("1, 0.5",)), texts()),
        st.none() | masks(16, 16),
        st.none() | numbers(),
    )
)
def settings_of_anchors(given: tuple[Any, ...]) -> None:
    weight, start, end, row_weights, mask, factor = given
    layers = None if factor is None else LayerWeights(row_curve=(factor,))
    tokens = RowEmbeds(torch.zeros(2, 16, 768), torch.zeros(1, 16, 768))
    LunaApplyIPAdapter.execute(
        unet(), adapter(), weight, start, end, "V only", row_weights, None, None, tokens, layers, mask
    )
