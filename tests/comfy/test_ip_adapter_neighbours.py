"""What others put on the same model keeps working, before the anchors and after them."""

from collections.abc import Callable
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.latent_formats
import comfy.ops
import comfy_extras.nodes_freelunch
import comfy_extras.nodes_hypertile
import comfy_extras.nodes_model_downscale
import comfy_extras.nodes_model_merging
import comfy_extras.nodes_tomesd
import pytest
import torch
from luna_refinement.ip_adapter.comfy_patch import patch_model
from luna_refinement.ip_adapter.embeds import RowEmbeds
from torch import Tensor

from harness import denoiser, tiny
from harness.anchored_sampling import (
    ROWS,
    SIDE,
    adapter,
    anchored,
    change,
    content_adapter,
    embeds,
    plain_guider,
    prompts,
    run_node,
    sample,
)
from harness.seeding import fan_in_scaled, generator_for

BOUND = 2e-5  # float32 rounding of two implementations over two steps
ACTS = 2e-4  # a change no rounding makes
Neighbour = Callable[[Any], Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.unet("sd15")


def seeded_sample(model: Any, given: dict[str, Any] | None = None, side: int = SIDE) -> Tensor:
    """Some neighbours draw from torch's global generator."""
    torch.manual_seed(5)
    return sample(plain_guider(model, given or prompts("sd15")), side=side)


def lora(model: Any) -> Any:
    """Random low-rank weights on every text attention's output and on a value layer, as a loaded LoRA adds them."""
    generator = generator_for("lora")
    patches = {}
    for key, weight in model.model.state_dict().items():
        if key.endswith(("attn2.to_out.0.weight", "attn2.to_v.weight")):
            up, down = torch.randn((len(weight), 2), generator=generator), torch.randn((2, weight.shape[1]))
            patches[key] = ("diff", (up @ down * 0.02,))
    patched = model.clone()
    assert len(patched.add_patches(patches, 1.0)) == 32
    return patched


def function_wrapper(model: Any) -> Any:
    """As step caches and profilers do: one call for each prompt, half of the answer taken."""

    def wrap(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        return 0.5 * apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrap)
    return patched


def attention_patches(model: Any) -> Any:
    def before(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return n * 1.1, context, value * 0.8

    def after(n: Tensor, options: dict[str, Any]) -> Tensor:
        return n * 1.2

    patched = model.clone()
    patched.set_model_attn2_patch(before)
    patched.set_model_attn2_output_patch(after)
    return patched


class StepCache:
    """Reuses the model's answer on every other call, like the DeepCache family of wrappers."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def __call__(self, apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        kept, self.kept = self.kept, None
        if kept is None or kept.shape != arguments["input"].shape:
            kept = self.kept = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        return kept


def step_cache(model: Any) -> Any:
    patched = model.clone()
    patched.set_model_unet_function_wrapper(StepCache())
    return patched


def free_u(model: Any) -> Any:
    model.model.model_config.unet_config["model_channels"] = 8  # it looks for blocks 4 times as wide: here all are
    return run_node(comfy_extras.nodes_freelunch.FreeU_V2, model, 1.3, 1.4, 0.9, 0.2)


def deep_shrink(model: Any) -> Any:
    settings = (3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")
    return run_node(comfy_extras.nodes_model_downscale.PatchModelAddDownscale, model, *settings)


def dynamo(model: Any) -> Any:
    """The torch.compile node's own wrapper on some blocks; its "eager" backend traces but generates no code."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = model.clone()
    blocks = [f"diffusion_model.{part}.1.transformer_blocks.0" for part in ("middle_block", "output_blocks.4")]
    set_torch_compile_wrapper(compiled, backend="eager", keys=blocks)
    return compiled


def clone_of_a_clone(model: Any) -> Any:
    return model.clone().clone()


NEIGHBOURS: dict[str, Neighbour] = {
    "clone": clone_of_a_clone,
    "LoRA": lora,
    "FreeU": free_u,
    "HyperTile": lambda model: run_node(comfy_extras.nodes_hypertile.HyperTile, model, 64, 2, 0, False),
    "ToMe": lambda model: run_node(comfy_extras.nodes_tomesd.TomePatchModel, model, 0.3),
    "Deep Shrink": deep_shrink,
    "function wrapper": function_wrapper,
    "step cache": step_cache,
    "attention patches": attention_patches,
    "torch.compile": dynamo,
}
INVISIBLE = {"clone", "torch.compile"}  # must not change the result


SIDES = {"Deep Shrink": 24}  # a level of one px, normalised by itself, would magnify rounding


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_and_anchors_act_together(model: Any, name: str) -> None:
    neighbour, side = NEIGHBOURS[name], SIDES.get(name, SIDE)
    reference = content_adapter("sd15", embeds("sd15")).patch(model)
    expected = seeded_sample(reference if name in INVISIBLE else neighbour(reference), side=side)
    set_before = seeded_sample(anchored(neighbour(model)), side=side)
    set_after = seeded_sample(neighbour(anchored(model)), side=side)
    assert change(set_before, expected) <= BOUND
    assert change(set_after, expected) <= BOUND
    if name not in INVISIBLE:
        assert change(seeded_sample(anchored(model), side=side), expected) > ACTS  # the neighbour acts
    assert change(seeded_sample(neighbour(model), side=side), expected) > ACTS  # the anchors act


def test_merged_models_are_anchored(model: Any) -> None:
    """One order only: patching every weight of the model is slow."""
    other = tiny.unet("sd15")
    for key, weight in other.model.diffusion_model.named_parameters():
        if weight.ndim > 1:
            weight.data = fan_in_scaled(weight.shape, generator_for("merged", key), 0.5)
    node, row_embeds = comfy_extras.nodes_model_merging.ModelMergeSimple, embeds("sd15")
    expected = seeded_sample(content_adapter("sd15", row_embeds).patch(run_node(node, model, other, 0.6)))
    assert change(seeded_sample(run_node(node, anchored(model), other, 0.6)), expected) <= BOUND
    assert change(seeded_sample(anchored(model)), expected) > ACTS


def control_net() -> comfy.controlnet.ControlNet:
    config = {key: value for key, value in denoiser.SD15_CONFIG.items() if key != "out_channels"}
    config |= {
        "model_channels": 32,
        "num_head_channels": 8,
        "num_heads": -1,
        "hint_channels": 3,
        "dtype": torch.float32,
    }
    network = comfy.cldm.cldm.ControlNet(**config, operations=comfy.ops.disable_weight_init)
    tiny.seed_weights(network, "control net")
    control = comfy.controlnet.ControlNet(network.eval(), load_device=torch.device("cpu"))
    hint = torch.rand((1, 3, 8 * SIDE, 8 * SIDE), generator=generator_for("hint"))
    return control.set_cond_hint(hint, strength=0.5)


def test_controlnets_act_together_with_anchors(model: Any) -> None:
    row_embeds, given = embeds("sd15"), prompts("sd15")
    control = control_net()
    controlled = {
        name: [[text, {**extra, "control": control, "control_apply_to_uncond": False}] for text, extra in prompt]
        for name, prompt in given.items()
    }
    expected = seeded_sample(content_adapter("sd15", row_embeds).patch(model), controlled)
    result = seeded_sample(patch_model(model, adapter("sd15"), row_embeds), controlled)
    assert change(result, expected) <= BOUND
    assert change(seeded_sample(anchored(model)), result) > ACTS


# -- other packs on the same attention --------------------------------------------------------------


def halved(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Another pack's replacement: the text counts half."""
    from comfy.ldm.modules.attention import optimized_attention

    return 0.5 * optimized_attention(q, k, v, options["n_heads"])


KEYS = {"transformer": ("output", 5, 0), "block": ("output", 5)}


def with_replacement(model: Any, key: tuple[Any, ...], replacement: Callable[..., Tensor] = halved) -> Any:
    patched = model.clone()
    patched.set_model_attn2_replace(replacement, *key)
    return patched


@pytest.mark.parametrize("form", KEYS)
def test_a_replacement_of_another_pack_set_before_keeps_working(model: Any, form: str) -> None:
    heard: list[int] = []

    def listening(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        heard.append(q.shape[0])
        return halved(q, k, v, options)

    result = sample(plain_guider(anchored(with_replacement(model, KEYS[form], listening)), prompts("sd15")))
    assert heard == [2 * ROWS, 2 * ROWS]
    # the anchors still act in that layer: the same with that layer's anchor taken away is another result
    anchored_elsewhere = anchored(with_replacement(model, KEYS[form]))
    replacements = anchored_elsewhere.model_options["transformer_options"]["patches_replace"]["attn2"]
    replacements[KEYS["transformer"]] = halved
    elsewhere = sample(plain_guider(anchored_elsewhere, prompts("sd15")))
    assert change(result, elsewhere) > ACTS
    assert change(result, sample(plain_guider(anchored(model), prompts("sd15")))) > ACTS


def test_a_replacement_set_for_a_whole_block_afterwards_keeps_working(model: Any) -> None:
    before = sample(plain_guider(anchored(with_replacement(model, KEYS["block"])), prompts("sd15")))
    after = sample(plain_guider(with_replacement(anchored(model), KEYS["block"]), prompts("sd15")))
    assert torch.equal(before, after)


class OtherAdapter:
    """An IP-Adapter that adds to whatever replacement it finds, and tells at which noise levels it was heard."""

    def __init__(self, gain: float = 3.0, sigma_start: float = float("inf")) -> None:
        self.arguments = {"gain": gain, "sigma_start": sigma_start, "sigma_end": 0.0}
        self.heard: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "OtherAdapter":
        return self  # a function in that pack, which copies of a model share

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Any, *, gain: float, **_: Any) -> Tensor:
        assert out.shape == q.shape
        self.heard.append(float(options["sigmas"][0]))
        return gain * out

    def apply(self, model: Any) -> Any:
        """As the node of the widely used pack does it: on a clone, dicts copied, ``add`` where somebody was before."""
        patched = model.clone()
        to = patched.model_options["transformer_options"] = {**patched.model_options["transformer_options"]}
        to["patches_replace"] = {**to["patches_replace"], "attn2": {**to["patches_replace"]["attn2"]}}
        for replacement in to["patches_replace"]["attn2"].values():
            replacement.add(self, **self.arguments)
        return patched


def additions(model: Any) -> set[int]:
    """How many other adapters hang on each replacement of a model."""
    replacements = model.model_options["transformer_options"]["patches_replace"]["attn2"]
    return {len(replacement.additions) for replacement in replacements.values()}


def test_another_adapter_may_add_itself_as_the_widely_used_pack_does(model: Any) -> None:
    given, first = prompts("sd15"), anchored(model)
    alone = sample(plain_guider(first, given), steps=4)
    other = OtherAdapter(sigma_start=8.0)
    added = sample(plain_guider(other.apply(first), given), steps=4)
    assert other.heard
    assert all(sigma <= 8.0 for sigma in other.heard)
    assert len(set(other.heard)) < 4
    assert change(added, alone) > ACTS
    assert torch.equal(sample(plain_guider(first, given), steps=4), alone)  # nothing reached the model upstream


def test_an_addition_keeps_its_range_inside_another_patch(model: Any) -> None:
    other = OtherAdapter(sigma_start=8.0)
    sample(plain_guider(anchored(other.apply(anchored(model))), prompts("sd15")), steps=4)
    assert other.heard
    assert all(sigma <= 8.0 for sigma in other.heard)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_queueing_again_does_not_stack_what_another_adapter_adds(family: tiny.Family) -> None:
    given, upstream = prompts(family), anchored(tiny.unet(family), family)
    runs = [OtherAdapter().apply(upstream) for _ in range(3)]
    assert [additions(run) for run in runs] == [{1}, {1}, {1}]
    assert additions(upstream) == {0}
    first, _, third = (sample(plain_guider(run, given)) for run in runs)
    assert torch.equal(first, third)


@pytest.mark.parametrize("clones_between", [0, 1, 2])
def test_an_addition_stays_with_the_clone_it_was_made_on(model: Any, clones_between: int) -> None:
    """Neither upstream, nor to sisters; what is cloned from it has it, and may add more of its own."""
    upstream = anchored(anchored(model), weight=0.5)
    for _ in range(clones_between):
        upstream = upstream.clone()
    sister = upstream.clone()
    added = OtherAdapter().apply(upstream)
    below = added.clone()
    twice = OtherAdapter().apply(below)
    assert [additions(m) for m in (upstream, sister, added, below, twice)] == [{0}, {0}, {1}, {1}, {2}]
    late = OtherAdapter().apply(sister)  # after others were made
    assert [additions(m) for m in (sister, late, added)] == [{0}, {1}, {1}]


def test_two_patches_add_up(model: Any) -> None:
    given = prompts("sd15")
    other = embeds("sd15", name="other pictures")
    both = patch_model(anchored(model, weight=0.7), adapter("sd15"), other, weight=0.4)
    swapped = anchored(patch_model(model, adapter("sd15"), other, weight=0.4), weight=0.7)
    result = sample(plain_guider(both, given))
    assert change(result, sample(plain_guider(swapped, given))) <= BOUND
    assert change(result, sample(plain_guider(anchored(model, weight=0.7), given))) > ACTS
    # the same picture twice is the picture with the sum of the weights
    twice = anchored(anchored(model, weight=0.7), weight=0.4)
    assert change(sample(plain_guider(twice, given)), sample(plain_guider(anchored(model, weight=1.1), given))) <= BOUND


# -- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "manual_cast", "bound"),
    [
        (torch.bfloat16, None, 0.15),
        (torch.float16, torch.float32, 0.02),
        (torch.float8_e4m3fn, torch.float32, None),
        (torch.float8_e4m3fn, torch.bfloat16, None),
    ],
)
def test_models_of_other_dtypes_are_anchored(dtype: torch.dtype, manual_cast: Any, bound: float | None) -> None:
    given = prompts("sd15")
    model = tiny.unet("sd15", dtype=dtype, manual_cast=manual_cast)
    assert {x.dtype for x in model.model.diffusion_model.middle_block.parameters()} == {dtype}
    row_embeds = embeds("sd15")
    result = sample(plain_guider(anchored(model), given))
    assert result.isfinite().all()
    assert change(result, sample(plain_guider(model, given))) > ACTS
    if bound is not None:
        assert change(result, sample(plain_guider(anchored(tiny.unet("sd15")), given))) <= bound
    # rows stay apart
    cond = row_embeds.cond.clone()
    cond[1] = -cond[1]
    other = sample(plain_guider(patch_model(model, adapter("sd15"), RowEmbeds(cond, row_embeds.uncond)), given))
    assert torch.equal(other[0], result[0])
    assert not torch.equal(other[1], result[1])
