"""Rows with LoRAs of their own in one call: each is what ComfyUI's own loader gives it in a run by itself."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_hypertile
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from luna_refinement.batching.comfy_row_loras import LoraStack, RowLoras
from luna_refinement.batching.concepts import Lora
from luna_refinement.errors import LunaInputError, LunaRuntimeError
from torch import Tensor

from harness import tiny
from harness.anchored_sampling import change, plain_guider, run_node
from harness.lora_files import EVERYTHING, SD_CONVOLUTIONS, SD_LINEAR, Kind, Style, lora_file
from harness.seeding import generator_for

BOUND = 1e-4
"""Of float32 sums in another order; the tiny models do not amplify it."""
SIDE = 16
FLUX_LAYERS = ("*img_attn*", "*txt_attn*", "*linear?", "*mlp*", "*mod*", "*img_in", "*final_layer.linear")


def build(family: str, **settings: Any) -> Any:
    return tiny.flux() if family == "flux" else tiny.unet(family, **settings)


def prompts(family: str) -> dict[str, Any]:
    if family != "flux":
        return {name: tiny.conditioning(family, name, tokens=8) for name in ("positive", "negative")}
    return {
        name: [[
            torch.randn(1, 8, 16, generator=generator_for("flux text", name)),
            {"pooled_output": torch.randn(1, 16, generator=generator_for("flux vector", name)), "guidance": 3.5},
        ]]
        for name in ("positive", "negative")
    }  # fmt: skip


def run(
    model: Any, rows: Sequence[int], family: str = "sd15", callback: Callable[..., None] | None = None, side: int = SIDE
) -> Tensor:
    """[len(rows),c,side,side]: the rows of an endless batch, two steps with two prompts."""
    channels = 16 if family == "flux" else 4
    noise = torch.stack([torch.randn(channels, side, side, generator=generator_for("row", row)) for row in rows])
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
    guider = plain_guider(model, prompts(family))
    with torch.inference_mode():
        return guider.sample(
            noise,
            torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            sigmas,
            callback=callback,
            disable_pbar=True,
            seed=1,
        )


def merged(model: Any, stack: LoraStack) -> Any:
    """As a chain of ComfyUI's own LoRA loaders."""
    for lora in stack:
        model = comfy.sd.load_lora_for_models(model, None, lora.weights, lora.strength, 0)[0]
    return model


def together(model: Any, stacks: Sequence[LoraStack], family: str = "sd15", **settings: Any) -> Tensor:
    patched = RowLoras(model, stacks).patched(model, stacks)
    return run(patched, range(len(stacks)), family, **settings)


def assert_rows_are_those_of_merged_models(
    model: Any, stacks: Sequence[LoraStack], family: str = "sd15", bound: float = BOUND
) -> Tensor:
    found = together(model, stacks, family)
    plain = run(model, range(len(stacks)), family)
    for row, stack in enumerate(stacks):
        alone = run(merged(model, stack), [row], family)[0]
        assert change(found[row], alone) <= bound, row
        if stack:
            assert change(found[row], plain[row]) > 100 * bound, row
        else:
            assert torch.equal(found[row], plain[row])
    return found


def forwards(model: Any) -> list[str]:
    """Modules whose forward is not that of their class."""
    return [name for name, module in model.model.named_modules() if "forward" in module.__dict__]


def eight_stacks(model: Any, layers: Sequence[str], convolutions: Sequence[str]) -> list[LoraStack]:
    """Rows with none, one and three LoRAs of ranks 4 to 128, linear and convolution, two of them alike."""
    linear = Lora("linear", lora_file(model, "linear", layers, (4, 128, 16)), 0.8)
    wide = Lora("wide", lora_file(model, "wide", layers, (128, 32), alpha=False), 0.6)
    conv = Lora("conv", lora_file(model, "conv", convolutions, (8, 64)), 1.0)
    weaker = Lora("linear", linear.weights, -0.4)
    three = (linear, conv, wide)
    return [(linear,), (), three, (conv,), (linear,), (weaker, conv, wide), (), (wide,)]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_eight_rows_of_different_stacks_are_those_of_runs_by_themselves(family: str) -> None:
    model = build(family)
    layers = FLUX_LAYERS if family == "flux" else EVERYTHING
    stacks = eight_stacks(model, layers, FLUX_LAYERS if family == "flux" else SD_CONVOLUTIONS)
    assert_rows_are_those_of_merged_models(model, stacks, family)


def test_one_call_serves_all_stacks() -> None:
    model = build("sd15")
    stacks = eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)
    calls: list[int] = []

    def count(apply_model: Any, given: Any) -> Tensor:
        calls.append(len(given["input"]))
        return apply_model(given["input"], given["timestep"], **given["c"])

    counted = model.clone()
    counted.set_model_unet_function_wrapper(count)
    together(counted, stacks)
    assert calls == [16, 16]


@pytest.mark.parametrize(
    ("family", "style"),
    [("sd15", "kohya"), ("sd15", "diffusers"), ("sd15", "peft"), ("sdxl", "generic"), ("flux", "kohya"),
     ("flux", "diffusers"), ("flux", "peft")],
)  # fmt: skip
def test_keys_of_every_trainer_are_understood(family: str, style: Style) -> None:
    """Flux by diffusers names q, k, v and mlp of weights that the model fuses, and a modulation that it swaps."""
    model = build(family)
    layers = FLUX_LAYERS if family == "flux" else SD_LINEAR
    stacks = [(Lora(style, lora_file(model, style, layers, (4, 16), style), 1.0),), ()]
    assert_rows_are_those_of_merged_models(model, stacks, family)


@pytest.mark.parametrize("kind", ["tucker", "loha", "lokr", "diff", "bias"])
def test_kinds_that_do_not_depend_on_the_weight_go_per_row(kind: Kind) -> None:
    model = build("sd15")
    layers = SD_CONVOLUTIONS[:2] if kind == "tucker" else (*SD_LINEAR, "*out_layers.3")
    given = Lora(kind, lora_file(model, kind, layers, (4, 8), kind=kind), 0.7)
    other = Lora("lora", lora_file(model, "other", SD_LINEAR), 1.0)
    stacks: list[LoraStack] = [(given,), (), (other, given)]
    loras = RowLoras(model, stacks)
    assert not any(map(loras.needs_own_call, stacks))
    assert loras.notices == []
    assert_rows_are_those_of_merged_models(model, stacks)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("glora", "GLORA"), ("oft", "OFT"), ("boft", "BOFT"), ("dora", "DoRA"), ("set", "replaces"), ("reshape", "wider")],
)
def test_kinds_that_need_the_weight_take_a_call_of_their_own(kind: Kind, why: str) -> None:
    model = build("sd15")
    stack = (Lora(kind, lora_file(model, kind, SD_LINEAR[:4], (4,), kind=kind), 1.0),)
    loras = RowLoras(model, [stack, ()])
    assert loras.needs_own_call(stack)
    assert not loras.needs_own_call(())
    (notice,) = loras.notices
    assert kind in notice
    assert why in notice
    with pytest.raises(LunaRuntimeError):
        loras.patched(model, [stack, ()])
    assert torch.equal(run(loras.merged(model, stack), [0]), run(merged(model, stack), [0]))


def test_a_norm_takes_a_call_of_its_own() -> None:
    model = build("sd15")
    file = lora_file(model, "norms", SD_LINEAR)
    file["lora_unet_out_0.w_norm"] = torch.full((tiny.CHANNELS,), 0.2)
    stack = (Lora("norms", file, 1.0),)
    loras = RowLoras(model, [stack])
    assert loras.needs_own_call(stack)
    assert "out.0" in loras.notices[0]


def test_merged_models_are_made_once() -> None:
    model = build("sd15")
    stack = (Lora("linear", lora_file(model, "linear"), 1.0),)
    loras = RowLoras(model, [stack])
    assert loras.merged(model, stack) is loras.merged(model, stack)


def test_what_does_nothing_is_said() -> None:
    model = build("sd15")
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2)}
    text["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(2, 8)
    flux = build("flux")
    foreign = lora_file(flux, "flux", FLUX_LAYERS)
    wide = lora_file(model, "wide") | {"lora_unet_time_embed_0.lora_up.weight": torch.ones(9, 4)}
    wide["lora_unet_time_embed_0.lora_down.weight"] = torch.ones(4, 9)
    stacks = [(Lora(name, file, 1.0),) for name, file in (("text", text), ("foreign", foreign), ("wide", wide))]
    loras = RowLoras(model, stacks)
    for name, words in (("text", "text encoder"), ("foreign", "fits no layer"), ("wide", "1 of its")):
        assert [words in notice for notice in loras.notices if f"'{name}'" in notice] == [True]
    assert torch.equal(together(model, stacks[:2]), run(model, range(2)))
    assert_rows_are_those_of_merged_models(model, [stacks[2], ()])


def test_a_core_of_another_size_is_named_before_sampling() -> None:
    model = build("sd15")
    file = lora_file(model, "core", SD_CONVOLUTIONS[:1], (4,), kind="tucker")
    broken = next(key for key in file if key.endswith(".lora_mid.weight"))
    stack = (Lora("odd", file | {broken: torch.ones(4, 5, 3, 3)}, 1.0),)
    with pytest.raises(LunaInputError, match=r"'odd'.*in_layers\.2"):
        RowLoras(model, [stack])


def test_strength_zero_is_no_lora() -> None:
    model = build("sd15")
    stack = (Lora("linear", lora_file(model, "linear"), 0.0),)
    loras = RowLoras(model, [stack, ()])
    assert loras.patched(model, [stack, ()]) is model


def test_rows_do_not_depend_on_the_batch_they_are_in() -> None:
    model = build("sd15")
    stacks = eight_stacks(model, EVERYTHING, SD_CONVOLUTIONS)
    loras = RowLoras(model, stacks)
    whole = run(loras.patched(model, stacks), range(8))
    for rows in ([0, 1, 2], [3, 4], [7], [6, 5, 2, 0]):
        part = run(loras.patched(model, [stacks[row] for row in rows]), rows)
        for place, row in enumerate(rows):
            assert change(part[place], whole[row]) <= BOUND


def test_the_same_inputs_give_the_same_bits() -> None:
    model = build("sd15")
    stacks = eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)
    assert torch.equal(together(model, stacks), together(model, stacks))


def test_loras_already_on_the_model_stay() -> None:
    model = build("sd15")
    on_model = comfy.sd.load_lora_for_models(model, None, lora_file(model, "on the model"), 0.9, 0)[0]
    stacks = eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)[:4]
    found = assert_rows_are_those_of_merged_models(on_model, stacks)
    assert change(found, together(model, stacks)) > 0.01


def hypertiled(model: Any) -> Any:
    return run_node(comfy_extras.nodes_hypertile.HyperTile, model, 32, 2, 3, False)


@pytest.mark.parametrize("side", [16, 24])
def test_tiles_folded_into_the_batch_keep_to_their_rows(side: int) -> None:
    model = hypertiled(build("sd15"))
    stacks = eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)
    found = together(model, stacks, side=side)
    plain = run(model, range(8), side=side)
    assert change(plain, run(build("sd15"), range(8), side=side)) > 1e-3  # tiles were folded
    for row in (0, 1, 2, 7):
        alone = run(merged(model, stacks[row]), [row], side=side)[0]
        assert change(found[row], alone) <= BOUND


def coupled(model: Any, times: int) -> Any:
    """As nodes of the Attention Couple kind: the positive rows are repeated in blocks inside cross-attention."""
    clone = model.clone()
    before: list[tuple[int, int]] = []

    def repeat(q: Tensor, k: Tensor, v: Tensor, extra_options: Any) -> Any:
        entries = len(extra_options["cond_or_uncond"])
        rows = q.shape[0] // entries
        before.append((entries, rows))

        def blocks(x: Tensor) -> Tensor:
            shares = x.chunk(entries)
            return torch.cat([s.repeat(times, 1, 1) if e == 0 else s
                              for s, e in zip(shares, extra_options["cond_or_uncond"], strict=True)])  # fmt: skip

        return blocks(q), blocks(k) * 0.9, blocks(v)

    def average(out: Tensor, extra_options: Any) -> Tensor:
        _, rows = before.pop()
        shares = []
        for entry in extra_options["cond_or_uncond"]:
            taken = out[: rows * (times if entry == 0 else 1)]
            out = out[len(taken) :]
            shares.append(taken.reshape(-1, rows, *taken.shape[1:]).mean(0))
        return torch.cat(shares)

    clone.set_model_attn2_patch(repeat)
    clone.set_model_attn2_output_patch(average)
    return clone


@pytest.mark.parametrize("times", [2, 3])
def test_rows_repeated_inside_the_attention_keep_their_loras(times: int) -> None:
    model = coupled(build("sd15"), times)
    assert_rows_are_those_of_merged_models(model, eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)[:4])


def test_an_unknown_repetition_is_refused_by_the_name_of_the_layer() -> None:
    model = build("sd15").clone()
    model.set_model_attn1_patch(
        lambda q, k, v, _: (torch.cat([q, q[:1]]), torch.cat([k, k[:1]]), torch.cat([v, v[:1]]))
    )
    model.set_model_attn1_output_patch(lambda out, _: out[:-1])
    stack = (Lora("linear", lora_file(model, "linear"), 1.0),)
    with pytest.raises(LunaRuntimeError, match=r"input_blocks\.1\.1\.transformer_blocks\.0\.attn1\.to_q"):
        together(model, [stack, ()])


def test_parts_of_the_batch_are_refused() -> None:
    model = build("sd15")
    stack = (Lora("linear", lora_file(model, "linear"), 1.0),)
    patched = RowLoras(model, [stack]).patched(model, [stack, ()])
    with pytest.raises(LunaRuntimeError, match="2 rows, but the model is shown 4 latents"):
        run(patched, range(4))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_weights_in_eight_bits_or_cast_at_use_stay_as_they_are(stored: torch.dtype, streamed: bool) -> None:
    """Against merging into the same values in float32: ComfyUI's own merge would round again."""
    manual = torch.float32 if stored != torch.float32 else None
    model = tiny.unet("sd15", dtype=stored, manual_cast=manual)
    model.force_cast_weights = streamed
    exact = tiny.unet("sd15")
    exact.model.load_state_dict({k: v.float() for k, v in model.model.state_dict().items()}, strict=False)
    stacks = eight_stacks(exact, EVERYTHING, SD_CONVOLUTIONS)[:4]
    found = together(model, stacks)
    for row, stack in enumerate(stacks):
        assert change(found[row], run(merged(exact, stack), [row])[0]) <= BOUND
    assert model.model.diffusion_model.input_blocks[0][0].weight.dtype == stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_merging(dtype: torch.dtype) -> None:
    model, exact = tiny.unet("sd15", dtype=dtype), tiny.unet("sd15")
    stacks = eight_stacks(exact, SD_LINEAR, SD_CONVOLUTIONS)[:4]
    found = together(model, stacks)
    for row, stack in enumerate(stacks):
        truth = run(merged(exact, stack), [row])[0]
        alone = change(run(merged(model, stack), [row])[0], truth)
        assert change(found[row], truth) <= 1.5 * alone


class TestModelIsLeftAlone:
    @pytest.fixture
    def model(self) -> Any:
        return build("sd15")

    def stacks(self, model: Any) -> list[LoraStack]:
        return eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)[:3]

    def assert_untouched(self, model: Any, before: Tensor, weights: dict[str, Tensor]) -> None:
        assert torch.equal(run(model, range(3)), before)
        gc.collect()
        assert forwards(model) == []
        assert model.injections == {}
        assert model.additional_models == {}
        after = model.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in weights.items())
        assert torch.equal(run(model, range(3)), before)

    def state(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return run(model, range(3)), {key: value.clone() for key, value in model.model.state_dict().items()}

    @pytest.mark.parametrize("kept", [True, False])
    def test_after_success(self, model: Any, kept: bool) -> None:
        before, weights = self.state(model)
        stacks = self.stacks(model)
        patched = RowLoras(model, stacks).patched(model, stacks)
        assert change(run(patched, range(3)), before) > 0.01
        if not kept:
            del patched
        self.assert_untouched(model, before, weights)

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("broken"), comfy.model_management.InterruptProcessingException()],
        ids=["error", "cancel"],
    )
    def test_after_it_ends_in_mid_sampling(self, model: Any, error: Exception) -> None:
        before, weights = self.state(model)
        stacks = self.stacks(model)

        def fail(step: int, *_: Any) -> None:
            raise error

        def inside(apply_model: Any, given: Any) -> Tensor:
            assert forwards(model)  # the layers do stand in while sampling
            return apply_model(given["input"], given["timestep"], **given["c"])

        watched = model.clone()
        watched.set_model_unet_function_wrapper(inside)
        patched = RowLoras(model, stacks).patched(watched, stacks)
        with pytest.raises(type(error)):
            run(patched, range(3), callback=fail)
        self.assert_untouched(model, before, weights)

    def test_after_an_error_inside_a_layer(self, model: Any) -> None:
        before, weights = self.state(model)
        stacks = self.stacks(model)
        patched = RowLoras(model, stacks).patched(model, stacks)
        with pytest.raises(LunaRuntimeError):
            run(patched, range(4))
        self.assert_untouched(model, before, weights)

    def test_a_forward_that_another_node_put_there_comes_back(self, model: Any) -> None:
        layer = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1.to_q
        own = layer.forward
        theirs = lambda *args, **kwargs: own(*args, **kwargs) + 0.5  # noqa: E731 (an object to recognise)
        layer.forward = theirs
        assert_rows_are_those_of_merged_models(model, [self.stacks(model)[0], ()])
        run(model, [0])
        assert layer.forward is theirs


def test_calls_of_a_run_share_the_weights_of_the_loras_and_load_them_once() -> None:
    model = build("sd15")
    stacks = eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)
    loras = RowLoras(model, stacks)
    used: list[Any] = []
    for rows in ([0, 1, 2], [3, 4]):
        patched = loras.patched(model, [stacks[row] for row in rows])
        run(patched, rows)
        (factors,) = patched.get_additional_models()
        loaded = [entry for entry in comfy.model_management.current_loaded_models if entry.model.model is factors.model]
        assert len(loaded) == 1
        assert factors.current_loaded_device() == factors.load_device
        used.append(factors.model)
    assert used[0] is used[1]
    sizes = [weight.numel() * weight.element_size() for weight in used[0].parameters()]
    assert factors.model_size() == sum(sizes) > 0


def test_the_weights_of_loras_leave_with_the_run() -> None:
    model = build("sd15")
    stacks = eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)[:2]
    loras = RowLoras(model, stacks)
    patched = loras.patched(model, stacks)
    run(patched, range(2))
    factors = weakref.ref(patched.get_additional_models()[0].model)
    del loras, patched
    gc.collect()
    run(model, [0])
    assert factors() is None
    assert all(entry.model is not None for entry in comfy.model_management.current_loaded_models)


def test_parts_of_fused_weights_stay_small() -> None:
    """q, k, v and mlp of one weight are joined along the rank; only a modulation that is swapped is given in full."""
    model = build("flux")
    stack = (Lora("fused", lora_file(model, "fused", FLUX_LAYERS, (4,), "diffusers"), 1.0),)
    (factors,) = RowLoras(model, [stack]).patched(model, [stack]).get_additional_models()
    ranks = [len(part.down) for part in factors.model if part.down is not None]
    assert 12 <= max(ranks) <= 16
    assert sum(part.difference is not None for part in factors.model) <= 1


@pytest.mark.skipif(not hasattr(ModelPatcher, "deepclone_multigpu"), reason="this ComfyUI computes on one GPU")
def test_copies_for_further_gpus_have_their_own_layers_and_loras() -> None:
    model = build("sd15")
    model.cached_patcher_init = (build, ("sd15",))
    stacks = eight_stacks(model, SD_LINEAR, SD_CONVOLUTIONS)[:3]
    patched = RowLoras(model, stacks).patched(model, stacks)
    copy = patched.deepclone_multigpu()
    assert copy.model is not patched.model
    assert copy.get_additional_models()[0].model is not patched.get_additional_models()[0].model
    expected = run(patched, range(3))
    assert torch.equal(run(copy, range(3)), expected)
    assert torch.equal(run(patched, range(3)), expected)
    assert forwards(copy)  # both are loaded
    assert forwards(patched)


def test_compiled_blocks_follow_the_rows() -> None:
    """Compiled once without LoRAs, then with two sets of rows."""
    torch._dynamo.reset()
    compiled, model = build("flux"), build("flux")
    compiled.model.diffusion_model.double_blocks[0].compile(backend="eager")
    plain = run(compiled, range(3), "flux")
    stacks = eight_stacks(model, FLUX_LAYERS, FLUX_LAYERS[2:3])[:3]
    for order in ([0, 1, 2], [2, 0, 1]):
        rows = [stacks[place] for place in order]
        expected = together(model, rows, "flux")
        assert change(together(compiled, rows, "flux"), expected) <= BOUND
        assert change(plain, expected) > 0.01
    assert change(run(compiled, range(3), "flux"), plain) <= BOUND
