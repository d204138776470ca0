"""What the attention knows of a call travels with the call: conds may run in threads, and layers may be compiled."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from luna_refinement.ip_adapter.comfy_patch import patch_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from harness import tiny
from harness.anchored_sampling import ROWS, adapter, anchored, change, embeds, plain_guider, prompts, sample

BOUND = 2e-5  # float32 rounding of two implementations over two steps
ACTS = 1e-3  # a change no rounding makes

# -- threads --------------------------------------------------------------------------------------

Evaluate = Callable[[Any, list[Any], int, Tensor, Tensor, Any], Tensor]


class OneModelEach:
    """Evaluates each cond of a call on a model of its own, as ComfyUI does where it has several GPUs.

    In threads all go from layer to layer in step, so that every one of them sees what the others leave behind.

    Args:
        patched: MODEL whose options apply.
        evaluate: gives the answer to the cond at a place.
    """

    def __init__(self, patched: Any, evaluate: Evaluate, in_threads: bool) -> None:
        self.evaluate = evaluate
        self.in_threads = in_threads
        self.met = 0
        self.in_step = threading.Barrier(2, action=self.meet, timeout=60)
        self.models = []
        for _ in range(2):
            clone = patched.clone()
            clone.model = tiny.unet("sd15").model  # seeded: the same weights
            clone.model.current_patcher = clone
            self.models.append(clone.model)

    def meet(self) -> None:
        self.met += 1

    def wait(self, n: Tensor, context: Tensor, value: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_threads:
            self.in_step.wait()
        return n, context, value

    def __call__(self, conds: list[Any], x: Tensor, timestep: Tensor, model_options: Any) -> list[Tensor]:
        def one(place: int) -> Tensor:
            with torch.inference_mode():
                return self.evaluate(self.models[place], conds, place, x, timestep, model_options)

        if not self.in_threads:
            return [one(place) for place in range(len(conds))]
        with ThreadPoolExecutor(len(conds)) as pool:
            return list(pool.map(one, range(len(conds))))


def below_the_wrappers(patched: Any, in_threads: bool) -> tuple[Any, OneModelEach]:
    """As ComfyUI's own multi-GPU code: what wraps the evaluation of conds runs once, on the main thread."""

    def evaluate(model: Any, conds: list[Any], place: int, *args: Any) -> Tensor:
        own = [cond if other == place else None for other, cond in enumerate(conds)]
        return comfy.samplers._calc_cond_batch(model, own, *args)[place]

    def calc_cond_batch(_: Any, __: Any, *args: Any) -> list[Tensor]:
        return each(*args)

    patched = patched.clone()
    each = OneModelEach(patched, evaluate, in_threads)
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "one model each", calc_cond_batch)
    patched.set_model_attn2_patch(each.wait)
    return plain_guider(patched, prompts("sd15")), each


def above_the_wrappers(patched: Any, in_threads: bool) -> tuple[Any, OneModelEach]:
    """As a guider that evaluates its prompts in parallel: every thread goes through all wrappers."""

    def evaluate(model: Any, conds: list[Any], place: int, *args: Any) -> Tensor:
        return comfy.samplers.calc_cond_batch(model, [conds[place]], *args)[0]

    patched = patched.clone()
    each = OneModelEach(patched, evaluate, in_threads)
    patched.set_model_attn2_patch(each.wait)

    class Parallel(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
            conds = [self.conds["positive"], self.conds["negative"]]
            positive, negative = each(conds, x, timestep, model_options)
            return negative + 4.0 * (positive - negative)

    guider = Parallel(patched)
    guider.set_conds(prompts("sd15")["positive"], prompts("sd15")["negative"])
    return guider, each


def by_the_host(patched: Any, in_threads: bool) -> tuple[Any, OneModelEach]:
    """ComfyUI's own multi-GPU code, on two devices that it takes for different ones."""
    from comfy.multigpu import MultiGPUThreadPool

    patched = patched.clone()
    each = OneModelEach(patched, lambda *_: torch.empty(0), in_threads)
    devices = [torch.device("cpu"), torch.device("cpu", 0)]

    def calc_cond_batch(_: Any, *args: Any) -> list[Tensor]:
        *given, model_options = args
        pool = MultiGPUThreadPool(devices) if in_threads else None
        clones = dict(zip(devices, (model.current_patcher for model in each.models), strict=True))
        options = model_options | {"multigpu_clones": clones, "multigpu_thread_pool": pool}
        host: Any = comfy.samplers  # older releases have no such function
        try:
            return host._calc_cond_batch_multigpu(*given, options)
        finally:
            if pool is not None:
                pool.shutdown()

    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "two devices", calc_cond_batch)
    patched.set_model_attn2_patch(each.wait)
    return plain_guider(patched, prompts("sd15")), each


WAYS = [below_the_wrappers, above_the_wrappers]
if hasattr(comfy.samplers, "_calc_cond_batch_multigpu"):
    WAYS.append(by_the_host)

SETTINGS: dict[str, dict[str, Any]] = {
    "everywhere": {},
    "range and masks": {"start_percent": 0.0, "end_percent": 0.6, "row_masks": torch.rand(ROWS, 64, 64)},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", WAYS)
def test_conds_in_threads_on_clones_give_the_same_bits_as_one_after_the_other(make: Any, settings: str) -> None:
    once = anchored(tiny.unet("sd15"), **SETTINGS[settings])
    patched = patch_model(once, adapter("sd15"), embeds("sd15", name="other pictures"), weight=0.5)
    guider, each = make(patched, in_threads=True)
    result = sample(guider, steps=4)
    assert each.met == 4 * 16  # in every layer of every step
    assert torch.equal(result, sample(make(patched, in_threads=False)[0], steps=4))
    assert change(result, sample(plain_guider(patched, prompts("sd15")), steps=4)) <= BOUND
    assert change(result, sample(plain_guider(once, prompts("sd15")), steps=4)) > ACTS


# -- torch.compile --------------------------------------------------------------------------------

BLOCKS = [f"diffusion_model.{part}.1.transformer_blocks.0" for part in ("input_blocks.1", "middle_block")]


@pytest.fixture
def compiler() -> Iterator[CompileCounter]:
    """Traces and counts the graphs, and generates no code."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_compiled_block_is_one_graph_and_stays_it_from_step_to_step(compiler: CompileCounter, settings: str) -> None:
    model = tiny.unet("sd15")
    graphs: list[int] = []

    def run(weight: float) -> Tensor:
        patched = anchored(model, weight=weight, **SETTINGS[settings])
        plain = sample(plain_guider(patched, prompts("sd15")), steps=4)
        set_torch_compile_wrapper(patched, backend=compiler, keys=BLOCKS, fullgraph=True)  # a break is an error
        graphs.clear()
        result = sample(
            plain_guider(patched, prompts("sd15")), steps=4, callback=lambda *_: graphs.append(compiler.frame_count)
        )
        assert change(result, plain) <= BOUND
        return result

    first = run(1.0)
    assert graphs[0] == len(BLOCKS)
    # one more for each block where the anchors' range ends, and none for another step
    ends = settings == "range and masks"
    assert sorted(set(graphs)) == ([len(BLOCKS), 2 * len(BLOCKS)] if ends else [len(BLOCKS)])
    # nor for another patch of the same kind, such as that of the next rows
    before = compiler.frame_count
    assert change(run(0.5), first) > ACTS
    assert compiler.frame_count == before
