"""Row i of a batch is anchored by embedding i, positive prompts by the picture and negative ones by none, always."""

from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy_extras.nodes_pag
import comfy_extras.nodes_perpneg
import comfy_extras.nodes_sag
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from luna_refinement.errors import LunaInputError, LunaRuntimeError
from luna_refinement.ip_adapter.anchors import ANCHORS
from luna_refinement.ip_adapter.attention import CALLS, AnchorCall, token_grid
from luna_refinement.ip_adapter.comfy_patch import patch_model
from luna_refinement.ip_adapter.embeds import RowEmbeds
from torch import Tensor

from harness import tiny
from harness.anchored_sampling import (
    ROWS,
    SIDE,
    adapter,
    anchored,
    change,
    content_adapter,
    embeds,
    node_defaults,
    plain_guider,
    prompts,
    run_node,
    sample,
)
from harness.ip_adapter_reference import MARKS

BOUND = 2e-5  # float32 rounding of two implementations over two steps
ACTS = 1e-3  # a change no rounding makes

Prompts = dict[str, Any]
MakeGuider = Callable[[Any, Prompts], Any]


def with_area(prompt: Any, **settings: Any) -> Any:
    return [[text, {**extra, **settings}] for text, extra in prompt]


def area(model: Any, given: Prompts) -> Any:
    """Two positive prompts for the halves of the picture, and one for all of it."""
    half = SIDE // 2
    top = with_area(given["positive"], area=(half, SIDE, 0, 0), strength=1.0)
    bottom = with_area(given["positive"], area=(half, SIDE, half, 0), strength=0.7)
    return plain_guider(model, {"positive": [*given["positive"], *top, *bottom], "negative": given["negative"]})


def mask(model: Any, given: Prompts) -> Any:
    where = torch.zeros(1, SIDE, SIDE)
    where[:, :, 5:] = 1
    masked = with_area(given["positive"], mask=where, mask_strength=1.0, set_area_to_bounds=False)
    return plain_guider(model, {"positive": [*given["positive"], *masked], "negative": given["negative"]})


def low_memory(model: Any, given: Prompts) -> Any:
    """ComfyUI evaluates prompts one by one where it thinks they do not fit together."""
    model.model.memory_usage_factor = 1e12
    return plain_guider(model, given)


def dual(cfg1: float, cfg2: float, nested: bool) -> MakeGuider:
    def make(model: Any, given: Prompts) -> Any:
        guider = Guider_DualCFG(model)
        guider.set_conds(given["positive"], given["middle"], given["negative"])
        guider.set_cfg(cfg1, cfg2, nested=nested)
        return guider

    return make


def self_attention_guidance(model: Any, given: Prompts) -> Any:
    return plain_guider(run_node(comfy_extras.nodes_sag.SelfAttentionGuidance, model, 0.5, 2.0), given)


def perturbed_attention_guidance(model: Any, given: Prompts) -> Any:
    return plain_guider(run_node(comfy_extras.nodes_pag.PerturbedAttentionGuidance, model, 3.0), given)


def perp_neg(model: Any, given: Prompts) -> Any:
    guider = comfy_extras.nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(given["positive"], given["negative"], given["empty"])
    guider.set_cfg(4.0, 1.0)
    return guider


def old_perp_neg(model: Any, given: Prompts) -> Any:
    """The node on the model, which evaluates a prompt of its own that no guider knows."""
    return plain_guider(run_node(comfy_extras.nodes_perpneg.PerpNeg, model, given["empty"], 1.0), given)


def hooked(model: Any, given: Prompts) -> Any:
    """A LoRA hook on the positive prompt only: ComfyUI then evaluates the prompts apart."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.weight"
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    model.add_hook_patches(hooks.hooks[0], {key: ("diff", (torch.full((32, 32), 0.02),))}, 1.0)
    positive = comfy.hooks.set_hooks_for_conditioning(given["positive"], hooks)
    return plain_guider(model, {"positive": positive, "negative": given["negative"]})


def flipped_roles(model: Any, given: Prompts) -> Any:
    """A guider that evaluates [negative, positive] where ComfyUI's own evaluates [positive, negative]."""

    class Flipped(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
            conds = [self.conds["negative"], self.conds["positive"]]
            negative, positive = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
            return negative + 4.0 * (positive - negative)

    guider = Flipped(model)
    guider.set_conds(given["positive"], given["negative"])
    return guider


GUIDANCE: dict[str, MakeGuider] = {
    "one call": plain_guider,
    "cfg 1": lambda model, given: plain_guider(model, given, cfg=1.0),
    "low memory": low_memory,
    "areas": area,
    "masks": mask,
    "hooks": hooked,
    "dual regular": dual(5.0, 2.0, nested=False),
    "dual nested": dual(5.0, 2.0, nested=True),
    "dual without negative": dual(5.0, 1.0, nested=False),
    "self-attention guidance": self_attention_guidance,
    "perturbed attention guidance": perturbed_attention_guidance,
    "perpendicular negative": perp_neg,
    "perpendicular negative as a node": old_perp_neg,
    "flipped order": flipped_roles,
}
EXPECTED_MARKS = {
    "cfg 1": {"positive"},
    "dual regular": {"positive", "middle", "negative"},
    "dual nested": {"positive", "middle", "negative"},
    "dual without negative": {"positive", "middle"},
    "perpendicular negative": {"positive", "negative", "empty"},
    "perpendicular negative as a node": {"positive", "negative", "empty"},
}
TOGETHER = {"one call", "dual regular", "dual nested", "perpendicular negative", "masks"}
APART = {"low memory", "hooks"}


@pytest.mark.parametrize("name", GUIDANCE)
def test_every_row_has_its_own_embed_under_every_guidance(name: str) -> None:
    model, row_embeds, given = tiny.unet("sd15"), embeds("sd15"), prompts("sd15")
    weight = torch.tensor([1.0, 0.3, 1.7])
    reference = content_adapter("sd15", row_embeds, weight)
    expected = sample(GUIDANCE[name](reference.patch(model), given))
    # the reference saw every prompt of this guidance, row by row
    seen = {mark for call in reference.rows for mark, _ in call}
    assert seen == {MARKS[role] for role in EXPECTED_MARKS.get(name, {"positive", "negative"})}
    prompts_of_calls = [{mark for mark, _ in call} for call in reference.rows]
    if name in TOGETHER:
        assert all(marks == seen for marks in prompts_of_calls)
    if name in APART:
        assert all(marks != seen for marks in prompts_of_calls)
    if name == "areas":
        assert {len(call) for call in reference.rows} == {2 * ROWS, 4 * ROWS}

    patched = patch_model(model, adapter("sd15"), row_embeds, weight=weight)
    result = sample(GUIDANCE[name](patched, given))
    assert change(result, expected) <= BOUND
    # and the check can tell: with the roles exchanged, the result is another
    exchanged = RowEmbeds(row_embeds.uncond.expand(ROWS, -1, -1), row_embeds.cond)
    other = sample(GUIDANCE[name](patch_model(model, adapter("sd15"), exchanged, weight=weight), given))
    assert change(other, expected) > ACTS


def test_sdxl_rows_have_their_own_embeds() -> None:
    model, row_embeds, given = tiny.unet("sdxl"), embeds("sdxl"), prompts("sdxl")
    expected = sample(plain_guider(content_adapter("sdxl", row_embeds).patch(model), given))
    result = sample(plain_guider(patch_model(model, adapter("sdxl"), row_embeds), given))
    assert change(result, expected) <= BOUND


def test_another_embed_changes_its_row_and_leaves_every_other_bit_alone() -> None:
    model, row_embeds, given = tiny.unet("sd15"), embeds("sd15"), prompts("sd15")
    before = sample(plain_guider(patch_model(model, adapter("sd15"), row_embeds), given))
    for row in range(ROWS):
        cond = row_embeds.cond.clone()
        cond[row] = embeds("sd15", name="another picture").cond[row]
        after = sample(plain_guider(patch_model(model, adapter("sd15"), RowEmbeds(cond, row_embeds.uncond)), given))
        moved = [change(a, b) for a, b in zip(after, before, strict=True)]
        assert moved[row] > ACTS
        assert [moved[other] for other in range(ROWS) if other != row] == [0.0] * (ROWS - 1)


def test_averaged_shuffled_or_shared_embeds_give_other_results() -> None:
    model, row_embeds, given = tiny.unet("sd15"), embeds("sd15"), prompts("sd15")
    own = sample(plain_guider(patch_model(model, adapter("sd15"), row_embeds), given))
    cond = row_embeds.cond
    wrong = {
        "average": cond.mean(0, keepdim=True).expand(ROWS, -1, -1),
        "first for all": cond[:1].expand(ROWS, -1, -1),
        "shifted by one": cond.roll(1, 0),
    }
    for name, other in wrong.items():
        result = sample(plain_guider(patch_model(model, adapter("sd15"), RowEmbeds(other, row_embeds.uncond)), given))
        affected = range(1, ROWS) if name == "first for all" else range(ROWS)
        assert all(change(result[row], own[row]) > ACTS for row in affected), name


def test_a_negative_picture_per_row_reaches_the_negative_rows() -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    row_embeds = RowEmbeds(embeds("sd15").cond, embeds("sd15", name="negative pictures").cond)
    expected = sample(plain_guider(content_adapter("sd15", row_embeds).patch(model), given))
    result = sample(plain_guider(patch_model(model, adapter("sd15"), row_embeds), given))
    assert change(result, expected) <= BOUND


# -- range, weights, masks ------------------------------------------------------------------------


def test_anchors_act_between_start_and_end_only() -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    bare = sample(plain_guider(model, given), steps=4)
    calls: list[str] = []

    def active_steps(start: float, end: float) -> list[bool]:
        """Whether the attention to pictures ran, step by step."""
        patched = anchored(model, start_percent=start, end_percent=end)
        layer = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["middle", 0, 0]
        calls.clear()
        attend: Any = layer.attention
        per_step: list[int] = []

        def count(*args: Any) -> Tensor:
            calls.append("attention")
            return attend(*args)

        layer.attention = count

        def after_step(*_: Any) -> None:
            per_step.append(len(calls))
            calls.clear()

        result = sample(plain_guider(patched, given), steps=4, callback=after_step)
        assert all(n in (1, 2) for n in per_step)  # text, or text and picture
        active = [n == 2 for n in per_step]
        assert torch.equal(result, bare) == (not any(active))
        return active

    sampling: Any = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 4)[:-1]
    for start, end in [(0.0, 1.0), (0.0, 0.4), (0.4, 1.0), (0.3, 0.7), (0.0, 0.0), (1.0, 1.0)]:
        low, high = (float(sampling.percent_to_sigma(percent)) for percent in (end, start))
        assert active_steps(start, end) == [low <= float(sigma) <= high for sigma in sigmas], (start, end)


def test_weight_zero_is_no_anchor_and_rows_have_their_own_weight() -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    bare = sample(plain_guider(model, given))
    assert torch.equal(sample(plain_guider(anchored(model, weight=0.0), given)), bare)
    some = sample(plain_guider(anchored(model, weight=torch.tensor([0.0, 1.0, 0.0])), given))
    assert torch.equal(some[0], bare[0])
    assert torch.equal(some[2], bare[2])
    assert change(some[1], bare[1]) > ACTS


def test_a_mask_of_zeros_is_no_anchor_and_of_ones_is_none_at_all() -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    bare = sample(plain_guider(model, given))
    everywhere = sample(plain_guider(anchored(model), given))
    masks = torch.stack([torch.zeros(64, 64), torch.zeros(64, 64), torch.ones(64, 64)])
    result = sample(plain_guider(anchored(model, row_masks=masks), given))
    assert torch.equal(result[:2], bare[:2])
    assert change(result[2], everywhere[2]) <= BOUND


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (9, 7)])
def test_a_mask_acts_on_its_tokens_only(height: int, width: int) -> None:
    """In one layer, outside the mask the output equals that without anchor, inside that with it."""
    model = tiny.unet("sd15")
    masks = torch.zeros(ROWS, 8 * height, 8 * width)
    masks[:, :, : 8 * (width // 2)] = 1
    patched = anchored(model, row_masks=masks)
    layer = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 1, 0]
    q = torch.randn(2 * ROWS, height * width, 32)
    text = torch.randn(2 * ROWS, 7, 32)
    options: dict[str, Any] = {"n_heads": 4, "cond_or_uncond": [1, 0], "original_shape": [2 * ROWS, 4, height, width]}
    options |= {"sigmas": torch.tensor([5.0]), "block": ("input", 1)}

    def with_call(patched: Any) -> dict[str, Any]:
        (given,) = patched.model_options["transformer_options"][ANCHORS]
        known = AnchorCall((1, 0), (height, width))
        call = given.run().call(known, torch.empty(2 * ROWS, 4, height, width), torch.float32)
        return options | {CALLS: (call,)}

    masked = layer(q, text, text, with_call(patched)).reshape(2 * ROWS, height, width, 32)
    without = layer.attention(q, text, text, options).reshape(masked.shape)
    whole = anchored(model)
    everywhere = whole.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 1, 0]
    anchored_everywhere = everywhere(q, text, text, with_call(whole)).reshape(masked.shape)
    middle = width // 2
    assert torch.equal(masked[:, :, middle + 1 :], without[:, :, middle + 1 :])
    assert torch.allclose(masked[:, :, : middle - 1], anchored_everywhere[:, :, : middle - 1], atol=1e-6)
    assert change(masked[:, :, :middle], without[:, :, :middle]) > ACTS


def test_masks_refuse_area_prompts_with_the_reason() -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    patched = anchored(model, row_masks=torch.ones(ROWS, 64, 64))
    with pytest.raises(LunaRuntimeError, match="masks do not work together with conditioning for an area"):
        sample(area(patched, given))


# -- a batch of another size ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_a_batch_of_another_size_is_an_error_before_the_model_runs(rows: int) -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    calls: list[int] = []
    patched = anchored(model)
    patched.set_model_unet_function_wrapper(lambda *_: calls.append(1))
    with pytest.raises((LunaRuntimeError, LunaInputError), match=f"{ROWS} image embeds for a batch of {rows} latents"):
        sample(plain_guider(patched, given), rows=rows)
    assert not calls


def test_parts_of_the_batch_are_an_error_with_the_reason() -> None:
    """Context windows show the model some rows at a time, without saying which."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    model, given = tiny.unet("sd15"), prompts("sd15")
    settings = node_defaults(ContextWindowsManualNode) | {"context_length": 2, "context_overlap": 1}
    windowed = run_node(ContextWindowsManualNode, anchored(model), **settings)
    with pytest.raises(LunaRuntimeError, match=r"3 image embeds for 2 latents.*context windows"):
        sample(plain_guider(windowed, given))


@pytest.mark.parametrize("factor", [1.5, 2.0])
@pytest.mark.parametrize("side", [16, 18])
def test_masks_follow_layers_of_any_resolution(factor: float, side: int) -> None:
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    def shrunk(model: Any) -> Tensor:
        node = run_node(PatchModelAddDownscale, model, 3, factor, 0.0, 1.0, True, "bicubic", "bicubic")
        return sample(plain_guider(node, given), side=side)

    model, given = tiny.unet("sd15"), prompts("sd15")
    masks = torch.zeros(ROWS, 64, 64)
    masks[1, :, :32] = 1
    result, bare = shrunk(anchored(model, row_masks=masks)), shrunk(model)
    assert torch.equal(result[[0, 2]], bare[[0, 2]])
    assert change(result[1], bare[1]) > ACTS


def test_masks_follow_a_sampler_that_grows_the_latent() -> None:
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    model, given = tiny.unet("sd15"), prompts("sd15")
    sampler = run_node(SamplerLCMUpscale, 2.0, 2, "bislerp")
    noise = torch.randn(ROWS, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    masks = torch.zeros(ROWS, 64, 64)
    masks[1, :, :32] = 1
    results = []
    for patched in (anchored(model, row_masks=masks), model):
        guider, sigmas = plain_guider(patched, given), torch.tensor([10.0, 5.0, 2.0, 0.0])
        torch.manual_seed(3)
        with torch.inference_mode():
            results.append(guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1))
    result, bare = results
    assert result.shape[-1] == 16
    assert torch.equal(result[[0, 2]], bare[[0, 2]])
    assert change(result[1], bare[1]) > ACTS


def test_without_the_layers_resolution_halvings_are_tried() -> None:
    assert token_grid(17, 22, 9 * 11) == (9, 11)
    with pytest.raises(LunaRuntimeError, match=r"25 tokens, which is no halving of a 16x16 latent"):
        token_grid(16, 16, 25)


def test_a_network_run_past_comfyui_is_an_error_with_the_reason() -> None:
    """Only a call through apply_model tells whose rows it holds."""
    patched, text = anchored(tiny.unet("sd15")), torch.zeros(ROWS, 7, 768)
    options = {**patched.model_options["transformer_options"], "cond_or_uncond": [0]}
    with pytest.raises(LunaRuntimeError, match="runs its network past ComfyUI's apply_model"):
        patched.model.diffusion_model(torch.zeros(ROWS, 4, 16, 16), torch.ones(ROWS), text, transformer_options=options)


# -- nodes that repeat rows inside the attention --------------------------------------------------


def couple(model: Any, regions: int = 2, name: str | None = "cond_or_uncond_couple") -> Any:
    """Attention Couple as several packs do it, here with the same prompt in every region: nothing should change."""

    def before(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        entries = [entry for entry in options["cond_or_uncond"] for _ in range(1 if entry == 1 else regions)]
        place = options["cond_or_uncond"].index
        if name is not None:
            options[name] = entries
        parts = [x.chunk(len(options["cond_or_uncond"])) for x in (q, k, v)]
        grown = [torch.cat([part[place(entry)] for entry in entries]) for part in parts]
        return grown[0], grown[1], grown[2]

    def after(out: Tensor, options: dict[str, Any]) -> Tensor:
        counts = [1 if entry == 1 else regions for entry in options["cond_or_uncond"]]
        parts = out.split([count * ROWS for count in counts])
        return torch.cat([p.reshape(c, ROWS, *p.shape[1:]).mean(0) for p, c in zip(parts, counts, strict=True)])

    model = model.clone()
    model.set_model_attn2_patch(before)
    model.set_model_attn2_output_patch(after)
    return model


@pytest.mark.parametrize("masks", [None, torch.rand(ROWS, 32, 32)])
def test_rows_repeated_inside_the_attention_keep_their_embeds(masks: Tensor | None) -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    expected = sample(plain_guider(anchored(model, row_masks=masks), given))
    assert change(sample(plain_guider(couple(anchored(model, row_masks=masks)), given)), expected) <= BOUND
    assert change(sample(plain_guider(anchored(couple(model), row_masks=masks), given)), expected) <= BOUND


def test_rows_repeated_without_saying_which_are_an_error_with_the_reason() -> None:
    patched = couple(anchored(tiny.unet("sd15")), name=None)
    with pytest.raises(LunaRuntimeError, match="a node on model turns 6 rows into 9 inside the attention"):
        sample(plain_guider(patched, prompts("sd15")))


# -- the schedule ---------------------------------------------------------------------------------


def test_the_range_is_that_of_the_schedule_that_is_sampled() -> None:
    """Whatever the order of Luna's node and one that changes the schedule."""
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM

    model, given = tiny.unet("sd15"), prompts("sd15")

    def edm(model: Any) -> Any:
        return run_node(ModelSamplingContinuousEDM, model, "v_prediction", 500.0, 0.03)

    part = {"start_percent": 0.3, "end_percent": 0.7}
    first, last = edm(anchored(model, **part)), anchored(edm(model), **part)
    assert torch.equal(sample(plain_guider(first, given), steps=8), sample(plain_guider(last, given), steps=8))
    whole = anchored(edm(model))
    assert change(sample(plain_guider(first, given), steps=8), sample(plain_guider(whole, given), steps=8)) > ACTS
