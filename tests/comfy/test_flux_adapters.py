"""IP-Adapters on Flux: row i is anchored by embedding i, as XLabs and InstantX publish it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from luna_refinement.errors import LunaInputError, LunaRuntimeError
from luna_refinement.ip_adapter import LayerWeights
from luna_refinement.ip_adapter.anchors import ANCHORS
from luna_refinement.ip_adapter.comfy_flux import CARRIES_FLUX_ADAPTERS
from luna_refinement.ip_adapter.comfy_patch import layers_for, patch_model, unanchored
from luna_refinement.ip_adapter.embeds import RowEmbeds
from luna_refinement.ip_adapter.layer_weights import parse_layer_weights
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import interpolate

from harness import tiny
from harness.anchored_sampling import adapter as unet_adapter
from harness.anchored_sampling import change
from harness.flux_reference import FluxReference, ImagePrompts, euler
from harness.flux_sampling import (
    DOUBLE,
    HEIGHT,
    KINDS,
    NOISE,
    PROMPTS,
    ROWS,
    SINGLE,
    WIDTH,
    adapter,
    embeds,
    file_of,
    load,
    network,
    sample,
    sigmas_of,
)
from harness.ip_adapter_files import build_xlabs
from harness.seeding import generator_for

BOUND = 2e-5  # float32 rounding of two implementations over three steps
ACTS = 1e-3  # a change no rounding makes
WEIGHT = torch.tensor([1.0, 0.4, 1.6])
NEEDS_ATTENTION_PATCHES = pytest.mark.skipif(
    "attn1_output_patch" not in DoubleStreamBlock.forward.__code__.co_consts,
    reason="Flux' blocks take attention patches of other packs since ComfyUI of March 2026",
)
NEEDS_BLOCKS = pytest.mark.skipif(
    not CARRIES_FLUX_ADAPTERS, reason="this ComfyUI cannot replace a block's attention: 0.3.75 and newer can"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return network()


def by_formula(
    model: Any,
    kinds: Sequence[str] = (),
    row_embeds: RowEmbeds | None = None,
    cfg: float = 3.0,
    acts: Callable[[float], bool] = lambda sigma: True,
    mask: Tensor | None = None,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """The whole sampling in float64."""
    row_embeds = row_embeds or embeds()
    reference = FluxReference(model.model.diffusion_model, tiny.FLUX_HEADS)
    tokens = {"positive": row_embeds.cond, "negative": row_embeds.uncond.expand(ROWS, -1, -1)}

    def velocity(x: Tensor, sigma: float, name: str) -> Tensor:
        prompts = [
            ImagePrompts(kind, file_of(kind), tokens[name], WEIGHT, tiny.FLUX_HEADS, DOUBLE, mask) for kind in kinds
        ]
        return reference.velocity(x, sigma, PROMPTS[name], prompts if acts(sigma) else (), references)

    sampled = euler(velocity, NOISE, sigmas_of(model).double().tolist(), cfg)
    return model.model.latent_format.process_out(sampled)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_reference_is_this_network(model: Any, cfg: float) -> None:
    assert change(sample(model, cfg), by_formula(model, cfg=cfg)) <= BOUND


@NEEDS_BLOCKS
@pytest.mark.parametrize("kind", KINDS)
class TestFormula:
    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    def test_rows_are_anchored_as_published(self, model: Any, kind: str, cfg: float) -> None:
        """The negative prompt's rows see no picture, which is an embedding of its own."""
        result = sample(patch_model(model, adapter(kind), embeds(), WEIGHT), cfg)
        assert change(result, by_formula(model, [kind], cfg=cfg)) <= BOUND
        assert change(result, sample(model, cfg)) > ACTS
        if cfg != 1:
            exchanged = RowEmbeds(embeds().uncond.expand(ROWS, -1, -1), embeds().cond)
            assert change(result, sample(patch_model(model, adapter(kind), exchanged, WEIGHT), cfg)) > ACTS

    def test_start_and_end_are_shares_of_the_schedule(self, model: Any, kind: str) -> None:
        sampling, sigmas = model.get_model_object("model_sampling"), sigmas_of(model)
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in (0.2, 0.6))
        assert [end <= float(sigma) <= start for sigma in sigmas[:-1]].count(True) == 1
        patched = patch_model(model, adapter(kind), embeds(), WEIGHT, start_percent=0.2, end_percent=0.6)
        expected = by_formula(model, [kind], acts=lambda sigma: end <= sigma <= start)
        assert change(sample(patched), expected) <= BOUND

    def test_masks_say_where_in_its_picture_a_row_is_anchored(self, model: Any, kind: str) -> None:
        masks = torch.rand(ROWS, 64, 96, generator=generator_for("flux masks"))
        tokens = interpolate(masks[:, None], (HEIGHT // 2, WIDTH // 2), mode="bilinear", antialias=True)
        tokens = tokens.flatten(1)[..., None]
        patched = patch_model(model, adapter(kind), embeds(), WEIGHT, row_masks=masks)
        assert change(sample(patched), by_formula(model, [kind], mask=tokens)) <= BOUND
        nowhere = patch_model(model, adapter(kind), embeds(), WEIGHT, row_masks=torch.zeros_like(masks))
        assert torch.equal(sample(nowhere), sample(model))

    def test_reference_latents_are_left_as_they_are(self, model: Any, kind: str) -> None:
        """Kontext: their tokens stand behind those of the latent."""
        references = torch.randn(ROWS, 16, 6, 10, generator=generator_for("reference"))
        given = {
            name: [[text, fields | {"reference_latents": [references]}] for text, fields in prompt]
            for name, prompt in PROMPTS.items()
        }
        seen = [model.model.process_latent_in(references)]
        result = sample(patch_model(model, adapter(kind), embeds(), WEIGHT), prompts=given)
        assert change(result, by_formula(model, [kind], references=seen)) <= BOUND
        assert change(result, by_formula(model, [kind])) > ACTS

    def test_layer_weights_name_blocks(self, model: Any, kind: str) -> None:
        def weighted(text: str) -> Tensor:
            layers = LayerWeights("linear", parse_layer_weights(text))
            return sample(patch_model(model, adapter(kind), embeds(), WEIGHT, layer_weights=layers))

        assert torch.equal(weighted("double:0, single:0" if kind == "instantx" else "double:0"), sample(model))
        halves = [weighted("double.0:0"), weighted("double.1:0")]
        assert change(halves[0], halves[1]) > ACTS
        if kind == "instantx":  # single blocks act where double ones do not
            assert change(weighted("double:0"), sample(model)) > ACTS
        layers = layers_for(model, adapter(kind))
        with pytest.raises(LunaInputError, match="names parts of a UNet, but model is Flux"):
            LayerWeights("weak input").resolve(layers)
        with pytest.raises(LunaInputError, match=r"no block 'middle'.*double.0"):
            weighted("middle:0")


@NEEDS_BLOCKS
@pytest.mark.parametrize("kind", KINDS)
class TestRows:
    def test_another_embed_changes_its_row_and_leaves_every_other_bit_alone(self, model: Any, kind: str) -> None:
        before = sample(patch_model(model, adapter(kind), embeds()))
        for row in range(ROWS):
            cond = embeds().cond.clone()
            cond[row] = embeds(name="another picture").cond[row]
            after = sample(patch_model(model, adapter(kind), RowEmbeds(cond, embeds().uncond)))
            moved = [change(a, b) for a, b in zip(after, before, strict=True)]
            assert moved[row] > ACTS
            assert [moved[other] for other in range(ROWS) if other != row] == [0.0] * (ROWS - 1)

    def test_own_embeds_are_not_one_for_all(self, model: Any, kind: str) -> None:
        own = sample(patch_model(model, adapter(kind), embeds()))
        mean = embeds().cond.mean(0, keepdim=True).expand(ROWS, -1, -1)
        assert change(sample(patch_model(model, adapter(kind), RowEmbeds(mean, embeds().uncond))), own) > ACTS

    def test_a_row_comes_out_the_same_alone(self, model: Any, kind: str) -> None:
        together = sample(patch_model(model, adapter(kind), embeds(), WEIGHT))
        for row in range(ROWS):
            alone = patch_model(model, adapter(kind), embeds().take([row]), WEIGHT[[row]])
            assert float((sample(alone, noise=NOISE[[row]]) - together[[row]]).abs().max()) <= 1e-4

    def test_weight_zero_is_no_adapter(self, model: Any, kind: str) -> None:
        assert torch.equal(sample(patch_model(model, adapter(kind), embeds(), 0.0)), sample(model))

    def test_keys_and_values_are_made_once_per_sampling_call(self, model: Any, kind: str) -> None:
        ip_adapter, calls = adapter(kind), []
        patched = patch_model(model, ip_adapter, embeds())
        ip_adapter.network.key_values.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
        sample(patched.clone())
        assert calls == [ROWS + 1]

    def test_the_model_given_in_is_left_as_it_was(self, model: Any, kind: str) -> None:
        before, weights = sample(model), {k: v.clone() for k, v in model.model.state_dict().items()}
        patched = patch_model(model, adapter(kind), embeds())
        options = patched.model_options["transformer_options"]
        given, replacements = options[ANCHORS], dict(options["patches_replace"]["dit"])
        sample(patched)
        with pytest.raises(LunaRuntimeError, match="3 image embeds for a batch of 2"):
            sample(patched, noise=NOISE[:2])
        assert options[ANCHORS] == given
        assert options["patches_replace"]["dit"] == replacements
        assert not model.model_options["transformer_options"]
        assert not any(module._forward_hooks for module in model.model.modules())
        assert all(torch.equal(v, weights[k]) for k, v in model.model.state_dict().items())
        assert torch.equal(sample(model), before)


@NEEDS_BLOCKS
@pytest.mark.parametrize("kind", KINDS)
class TestCalls:
    def test_prompts_in_threads_on_clones_give_the_same_bits(self, model: Any, kind: str) -> None:
        """As ComfyUI evaluates them on several GPUs; the threads go from block to block in step."""
        met: list[int] = []
        in_step = threading.Barrier(2, action=lambda: met.append(1), timeout=60)

        def wait(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Tensor]:
            in_step.wait()
            return extra["original_block"](args)

        def parallel(_: Any, __: Any, conds: list[Any], *args: Any) -> list[Tensor]:
            def one(place: int) -> Tensor:
                own = [cond if other == place else None for other, cond in enumerate(conds)]
                with torch.inference_mode():
                    return comfy.samplers._calc_cond_batch(networks[place], own, *args)[place]

            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(one, range(2)))

        before = model.clone()
        for part, count in (("double_block", DOUBLE), ("single_block", SINGLE)):
            for number in range(count):
                before.set_model_patch_replace(wait, "dit", part, number)
        patched = patch_model(before, adapter(kind), embeds(), WEIGHT)
        networks = []
        for _ in range(2):
            clone = patched.clone()
            clone.model = network().model
            clone.model.current_patcher = clone
            networks.append(clone.model)
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "in threads", parallel)
        result = sample(patched)
        assert len(met) == 3 * (DOUBLE + SINGLE)
        assert change(result, sample(patch_model(model, adapter(kind), embeds(), WEIGHT))) <= BOUND

    @pytest.mark.parametrize("keys", [["diffusion_model"], ["diffusion_model.double_blocks.0"]])
    def test_what_is_compiled_is_one_graph_and_stays_it(self, kind: str, keys: list[str]) -> None:
        torch._dynamo.reset()
        model, compiler = network(), CompileCounter()
        plain = patch_model(model, adapter(kind), embeds(), WEIGHT)
        compiled = plain.clone()
        set_torch_compile_wrapper(compiled, backend=compiler, keys=keys, fullgraph=True)  # a break is an error
        assert change(sample(compiled), sample(plain)) <= BOUND
        count = compiler.frame_count
        assert count == 1
        sample(compiled)
        assert compiler.frame_count == count


@NEEDS_BLOCKS
class TestNeighbours:
    def test_two_adapters_add_up(self, model: Any) -> None:
        expected = by_formula(model, KINDS)
        for first, second in (KINDS, KINDS[::-1]):
            once = patch_model(model, adapter(first), embeds(), WEIGHT)
            assert change(sample(patch_model(once, adapter(second), embeds(), WEIGHT)), expected) <= BOUND

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_block_replacement_set_before_runs_inside(self, model: Any, kind: str) -> None:
        numbers = []

        def replacement(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Tensor]:
            numbers.append(args["transformer_options"]["block_index"])
            return extra["original_block"](args)

        before = model.clone()
        for part, number in (("double_block", 1), ("single_block", 0)):
            before.set_model_patch_replace(replacement, "dit", part, number)
        result = sample(patch_model(before, adapter(kind), embeds(), WEIGHT))
        assert numbers == [1, 0] * 3
        assert torch.equal(result, sample(patch_model(model, adapter(kind), embeds(), WEIGHT)))

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_attention_of_another_pack_keeps_working(self, model: Any, kind: str) -> None:
        calls = []

        def attention(function: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
            calls.append(1)
            return function(*args, **more)

        before = model.clone()
        before.model_options["transformer_options"]["optimized_attention_override"] = attention
        result = sample(patch_model(before, adapter(kind), embeds(), WEIGHT))
        assert len(calls) == 3 * (DOUBLE + SINGLE)
        assert torch.equal(result, sample(patch_model(model, adapter(kind), embeds(), WEIGHT)))

    @NEEDS_ATTENTION_PATCHES
    @pytest.mark.parametrize("kind", KINDS)
    def test_attention_patches_of_other_packs_keep_working(self, model: Any, kind: str) -> None:
        def patched(model: Any) -> Any:
            clone = model.clone()
            clone.set_model_patch(lambda q, k, v, **_: {"v": 0.8 * v}, "attn1_patch")
            clone.set_model_patch(lambda out, options: 0.9 * out, "attn1_output_patch")
            return clone

        before = sample(patch_model(patched(model), adapter(kind), embeds(), WEIGHT))
        after = sample(patched(patch_model(model, adapter(kind), embeds(), WEIGHT)))
        assert torch.equal(before, after)
        assert change(before, sample(patch_model(model, adapter(kind), embeds(), WEIGHT))) > ACTS
        assert change(before, sample(patched(model))) > ACTS

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_node_that_skips_the_block_is_named(self, model: Any, kind: str) -> None:
        before = model.clone()
        skips = {"double_block": lambda args, _: {"img": args["img"], "txt": args["txt"]}}
        before.set_model_patch_replace(skips["double_block"], "dit", "double_block", 0)
        with pytest.raises(LunaRuntimeError, match="a node on model runs Flux' blocks in a way of its own"):
            sample(patch_model(before, adapter(kind), embeds()))


class TestWhatDoesNotFit:
    def test_flux_adapters_on_a_unet_are_refused(self) -> None:
        for kind in KINDS:
            assert unanchored(tiny.unet(), adapter(kind)) is None
            with pytest.raises(LunaInputError, match=rf"'{kind}\.\w+' was made for Flux.*reads text tokens 768 wide"):
                layers_for(tiny.unet(), adapter(kind))

    def test_unet_adapters_on_flux_are_named(self, model: Any) -> None:
        reason = unanchored(model, unet_adapter("sd15"))
        assert reason is not None
        assert "SD1.5" in reason
        assert "XLabs and InstantX" in reason

    def test_other_depths_and_widths_are_refused(self, model: Any) -> None:
        for single, double, kind in ((SINGLE, 1, "xlabs"), (1, DOUBLE, "instantx")):
            with pytest.raises(LunaInputError, match=r"layers 32 wide for Flux' blocks, model has .* of 32"):
                layers_for(tiny.flux(double=double, single=single), adapter(kind))
        wide = load(build_xlabs(8, 64, DOUBLE), "wide")
        with pytest.raises(LunaInputError, match="2 layers 64 wide for Flux' blocks, model has 2 of 32"):
            layers_for(model, wide)

    @pytest.mark.skipif(CARRIES_FLUX_ADAPTERS, reason="this ComfyUI carries adapters on Flux")
    def test_a_comfyui_too_old_for_them_says_so(self, model: Any) -> None:
        reason = unanchored(model, adapter("xlabs"))
        assert reason is not None
        assert "too old to carry ip_adapter on Flux; 0.3.75 and newer do" in reason
