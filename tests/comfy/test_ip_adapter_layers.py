"""Which layer of a model gets which pair of an adapter, and how strongly."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from luna_refinement.errors import LunaInputError
from luna_refinement.ip_adapter import LayerWeights
from luna_refinement.ip_adapter.comfy_adapter import as_ip_adapter
from luna_refinement.ip_adapter.comfy_patch import layers_for, patch_model
from luna_refinement.ip_adapter.layer_weights import LAYER_PRESETS, LayerFactor, parse_layer_weights
from luna_refinement.ip_adapter.layers import AttentionLayer, attention_layers
from luna_refinement.nodes.ip_adapter import LunaLayerWeights

from harness import denoiser, tiny
from harness.anchored_sampling import adapter, anchored, change, embeds, plain_guider, prompts, sample
from harness.ip_adapter_reference import keys


@pytest.fixture(scope="module")
def layers() -> Mapping[str, list[AttentionLayer]]:
    return {family: attention_layers(network(family)) for family in ("sd15", "sdxl")}


def network(family: str, **changes: Any) -> UNetModel:
    """A UNet without weights, of the real depth or changed."""
    config = dict(denoiser.SD15_CONFIG if family == "sd15" else denoiser.SDXL_CONFIG) | changes
    return UNetModel(**config, device="meta")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pairs_go_to_layers_in_the_order_of_the_files(layers: Any, family: str) -> None:
    assert [layer.key for layer in layers[family]] == keys(family)
    assert len(layers[family]) == {"sd15": 16, "sdxl": 70}[family]


def test_blocks_are_counted_in_the_order_they_run(layers: Any) -> None:
    by_index = {layer.index: layer.key[:2] for layer in layers["sdxl"]}
    running = [("input", n) for n in (4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(6)]
    assert [by_index[index] for index in range(11)] == running
    by_index = {layer.index: layer.key[:2] for layer in layers["sd15"]}
    running = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
    assert [by_index[index] for index in range(16)] == running


def test_comfyui_counts_blocks_the_same_way() -> None:
    """Its own transformer_index, which the field's layer weights go by, is our index."""
    model, seen = tiny.unet("sd15"), {}

    def note(n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> Any:
        part, number = options["block"]
        seen[part, number, options["block_index"]] = options["transformer_index"]
        return n, context, value

    model.set_model_attn2_patch(note)
    sample(plain_guider(model, prompts("sd15"), cfg=1.0), steps=1, rows=1)
    assert seen == {layer.key: layer.index for layer in attention_layers(model.model.diffusion_model)}


@pytest.mark.parametrize(
    "changes",
    [
        {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_output": [0, 0, 0, 1, 1, 2, 4, 4, 10]},  # SSD-1B
        {"transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2]},  # Vega
    ],
)
def test_pruned_models_fail_with_both_counts(changes: dict[str, Any]) -> None:
    model = tiny.unet("sdxl")
    model.model.diffusion_model = network("sdxl", model_channels=32, num_head_channels=8, **changes)
    count = len(attention_layers(model.model.diffusion_model))
    assert 0 < count < 70
    with pytest.raises(LunaInputError, match=rf"70 attention layers, model has {count}\b.*pruned"):
        layers_for(model, adapter("sdxl"))


def test_a_pruned_model_takes_an_adapter_of_its_own_size() -> None:
    """The map comes from the model's own blocks, so a file of the same pruned depth fits."""
    weights = tiny.ip_adapter_weights("sd15", "plain")
    model = tiny.unet("sd15")
    model.model.diffusion_model.middle_block[1] = torch.nn.Identity()
    fewer = {key: value for key, value in weights.items() if not key.startswith("ip_adapter.31.")}
    halves: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in fewer.items():
        half, name = key.split(".", 1)
        halves[half][name] = value
    assert [layer.key for layer in layers_for(model, as_ip_adapter(halves))] == keys("sd15")[:15]


def test_an_adapter_of_the_other_family_names_both() -> None:
    with pytest.raises(LunaInputError, match=r"made for SDXL \(text tokens 2048 wide\), but model reads .* 768 wide"):
        layers_for(tiny.unet("sd15"), adapter("sdxl"))
    with pytest.raises(LunaInputError, match=r"made for SD1\.5 \(text tokens 768 wide\), but model reads .* 2048 wide"):
        layers_for(tiny.unet("sdxl"), adapter("sd15"))


def test_another_width_of_layers_is_refused() -> None:
    model = tiny.unet("sd15")
    model.model.diffusion_model = network("sd15", model_channels=64, num_head_channels=8, num_heads=-1)
    with pytest.raises(LunaInputError, match="of other widths"):
        layers_for(model, adapter("sd15"))


@pytest.mark.parametrize("kind", ["inpaint", "v"])
def test_variants_of_a_family_share_its_layers(kind: str) -> None:
    model = tiny.unet("sd15", extra_channels=5) if kind == "inpaint" else tiny.unet("sd15", prediction="v")
    assert [layer.key for layer in layers_for(model, adapter("sd15"))] == keys("sd15")


# -- layer weights --------------------------------------------------------------------------------

EVEN = dict.fromkeys(range(16), 1.0)
STYLE_SD15 = dict.fromkeys((0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15), 1.0)

# Preset → (SD1.5, SDXL): weight of each block by number; blocks left out have none. By hand from the field's tables.
TABLES: dict[str, tuple[dict[int, float], dict[int, float]]] = {
    "style transfer": (STYLE_SD15, {6: 1.0}),
    "composition": ({4: 0.25, 5: 1.0}, {3: 1.0}),
    "strong style transfer": (
        {block: 1.0 for block in range(16) if block not in (4, 5)},
        {block: 1.0 for block in range(11) if block != 3},
    ),
    "style and composition": (STYLE_SD15 | {4: 0.25, 5: 1.0}, {3: 1.0, 6: 1.0}),
    "strong style and composition": (EVEN, dict.fromkeys(range(11), 1.0)),
    "style transfer precise": (STYLE_SD15 | {4: 0.25, 5: 1.0}, {3: 1.0, 6: 1.0}),
    "composition precise": (
        STYLE_SD15 | {4: 0.25, 5: 1.0, 6: 0.1, 7: 0.1, 8: 0.1},
        {0: 0.1, 1: 0.1, 2: 0.1, 3: 1.0, 4: 0.1, 5: 0.1, 6: 1.0, 7: 0.1, 8: 0.1, 9: 0.1, 10: 0.1},
    ),
    "linear": (EVEN, dict.fromkeys(range(11), 1.0)),
    "none": ({}, {}),
    "ease in": (
        {0: 1.0, 4: 0.7625, 8: 0.525, 12: 0.2875, 15: 0.109375},
        {0: 1.0, 1: 0.913636, 5: 0.568182, 10: 0.136364},
    ),
    "ease out": (
        {0: 0.05, 4: 0.2875, 8: 0.525, 12: 0.7625, 15: 0.940625},
        {0: 0.05, 1: 0.136364, 5: 0.481818, 10: 0.913636},
    ),
    "ease in-out": (
        {0: 0.05, 4: 0.525, 8: 1.0, 12: 0.525, 15: 0.16875},
        {0: 0.05, 1: 0.222727, 5: 0.913636, 10: 0.222727},
    ),
    "reverse in-out": (
        {0: 1.0, 4: 0.525, 8: 0.05, 12: 0.525, 15: 0.88125},
        {0: 1.0, 1: 0.827273, 5: 0.136364, 10: 0.827273},
    ),
}
SWAPPED = {
    "style transfer precise": ({4, 5}, {3}),
    "composition precise": (set(range(16)) - {4, 5}, set(range(11)) - {3}),
}
PARTS = {
    "weak input": {"input": 0.2, "middle": 1.0, "output": 1.0},
    "weak middle": {"input": 1.0, "middle": 0.2, "output": 1.0},
    "weak output": {"input": 1.0, "middle": 1.0, "output": 0.2},
    "strong middle": {"input": 0.2, "middle": 1.0, "output": 0.2},
}


def test_every_preset_has_a_table_here() -> None:
    assert set(TABLES) | set(PARTS) == set(LAYER_PRESETS)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("preset", TABLES)
def test_presets_weigh_blocks_by_the_tables_of_the_field(layers: Any, preset: str, family: str) -> None:
    place = ("sd15", "sdxl").index(family)
    table, swapped = TABLES[preset][place], SWAPPED.get(preset, (set(), set()))[place]
    factors = LayerWeights(preset).resolve(layers[family])
    is_curve = preset.startswith(("ease", "reverse"))
    for layer, factor in zip(layers[family], factors, strict=True):
        if layer.index in table or not is_curve:
            assert factor.factor == pytest.approx(table.get(layer.index, 0.0), abs=1e-6), layer
        if factor.factor:
            assert factor.swapped == (layer.index in swapped), layer


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("preset", PARTS)
def test_part_presets_weigh_parts(layers: Any, preset: str, family: str) -> None:
    factors = LayerWeights(preset).resolve(layers[family])
    assert factors == [LayerFactor(PARTS[preset][layer.key[0]]) for layer in layers[family]]


def test_block_text_replaces_the_preset() -> None:
    layers = attention_layers(network("sdxl"))
    text = "6:0.5, input.4:1.2\nmiddle:0; output.3.1:-0.25, input:0.1, input.5.0:2"
    factors = LayerWeights("composition", parse_layer_weights(text)).resolve(layers)
    by_name = {layer.name: factor.factor for layer, factor in zip(layers, factors, strict=True)}
    assert {by_name[f"output.1.{t}"] for t in range(10)} == {0.5}  # block 6 counts input 4, 5, 7, 8, middle, output 0
    assert by_name["input.4.0"] == by_name["input.4.1"] == by_name["input.8.9"] == 0.1  # later entries win
    assert by_name["input.5.0"] == 2
    assert by_name["input.5.1"] == 0.1
    assert by_name["output.3.1"] == -0.25
    assert by_name["output.3.0"] == 0
    assert by_name["middle.0.3"] == 0


@pytest.mark.parametrize("text", ["3", "3:", ":1", "3:x", "left:1", "3:nan", "3:inf", "input.4.0.1:1", "3 0.5", "-1:1"])
def test_text_that_is_no_pair_is_shown(text: str) -> None:
    with pytest.raises(LunaInputError, match="is no block:weight pair") as caught:
        LunaLayerWeights.execute("linear", f"0:1, {text}")
    assert f"'{text}'" in str(caught.value)


@pytest.mark.parametrize("block", ["16", "input.3", "output.3.1", "middle.1"])
def test_a_block_the_model_lacks_gives_the_list_of_blocks(block: str) -> None:
    weights = LunaLayerWeights.execute("linear", f"{block}:1").result[0]
    with pytest.raises(LunaInputError) as caught:
        anchored(tiny.unet("sd15"), layer_weights=weights)
    message = str(caught.value)
    assert f"no block '{block}'" in message
    for known in ("0 = input.1", "5 = input.8", "6 = middle.0", "7 = output.3", "15 = output.11"):
        assert known in message


def test_block_presets_are_refused_on_other_depths() -> None:
    layers = attention_layers(network("sd15"))[:8]
    with pytest.raises(LunaInputError, match=r"names blocks of SD1\.5 and SDXL, but this model has 9 blocks"):
        LayerWeights("style transfer").resolve(layers)


@pytest.mark.parametrize(
    ("text", "count", "factors"),
    [
        ("", 3, [1, 1, 1]),
        ("0.5", 2, [0.5, 0.5]),
        ("1, 0.3", 5, [1, 0.825, 0.65, 0.475, 0.3]),
        ("0.2\n1, 0.2", 5, [0.2, 0.6, 1, 0.6, 0.2]),
        ("1, 1; 0, 1, 1", 5, [1, 1, 0, 1, 1]),
        ("1, 0, 0.5", 2, [1, 0.5]),
        ("0.7, 0", 1, [0.7]),
        ("1, 0", 0, []),
    ],
)
def test_the_row_curve_is_spread_over_the_rows(text: str, count: int, factors: list[float]) -> None:
    weights = LunaLayerWeights.execute("linear", "", text).result[0]
    assert weights.row_factors(count).tolist() == pytest.approx(factors)


@pytest.mark.parametrize("entry", ["much", "nan", "inf", "1:2"])
def test_a_row_curve_of_words_is_refused(entry: str) -> None:
    with pytest.raises(LunaInputError, match=f"row_curve holds '{entry}', which is no number"):
        LunaLayerWeights.execute("linear", "", f"1, {entry}")


def test_layer_weights_reach_the_layers() -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    none = LayerWeights("none")
    bare = sample(plain_guider(model, given))
    assert torch.equal(sample(plain_guider(anchored(model, layer_weights=none), given)), bare)
    one = LayerWeights("none", (("output.9", 0.7),))
    patched = anchored(model, layer_weights=one)
    replacements = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert list(replacements) == [("output", 9, 0)]
    assert change(sample(plain_guider(patched, given)), bare) > 1e-4


def test_a_swapped_layer_anchors_the_negative_prompt() -> None:
    """With cfg 1 there is none, so the picture's part is that of no text: keys and values of zeros add nothing."""
    model, given = tiny.unet("sd15"), prompts("sd15")
    precise = LayerWeights("composition precise", tuple((str(block), 0.0) for block in (4, 5)))
    patched = patch_model(model, adapter("sd15"), embeds("sd15"), layer_weights=precise)
    bare, guided = (sample(plain_guider(model, given, cfg=cfg)) for cfg in (1.0, 4.0))
    assert torch.equal(sample(plain_guider(patched, given, cfg=1.0)), bare)
    assert change(sample(plain_guider(patched, given, cfg=4.0)), guided) > 1e-4
