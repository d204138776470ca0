"""ComfyUI's own work on several GPUs: deep clones of a patched model, whose prompts run in threads, one per device.

The devices are the CPU under two names, which ComfyUI takes for different ones; everything else is its own code.
"""

import gc
import threading
from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from luna_refinement.batching.comfy_row_loras import LoraStack, RowLoras
from luna_refinement.batching.concepts import Lora
from torch import Tensor

from harness import tiny
from harness.anchored_sampling import ROWS, anchored, change, plain_guider, prompts, sample
from harness.lora_files import SD_CONVOLUTIONS, SD_LINEAR, lora_file
from harness.refining import Studio, detections, photograph

pytestmark = pytest.mark.skipif(
    not hasattr(ModelPatcher, "deepclone_multigpu"), reason="this ComfyUI computes on one GPU"
)

BOUND = 2e-5  # float32 rounding: the prompts run apart instead of in one batch
ACTS = 1e-3  # a change no rounding makes

Places = set[tuple[int, int]]
"""(thread, model) of every call."""
Patch = Callable[[Any], Any]


def on_two_devices(model: Any) -> Any:
    """As ComfyUI's node "MultiGPU CFG Split", which offers real GPUs only."""
    from comfy.multigpu import GPUOptionsGroup

    split = model.clone()
    copy = split.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    copy.is_multigpu_base_clone = True
    split.set_additional_models("multigpu", [copy])
    split.match_multigpu_clones()
    GPUOptionsGroup().register(split)
    return split


def loadable() -> Any:
    """A model that knows how it was loaded, as those of ComfyUI's loaders do."""
    model: Any = tiny.unet("sd15")
    model.cached_patcher_init = (tiny.unet, ("sd15",))
    return model


def watched(model: Any) -> tuple[Any, Places]:
    places: Places = set()

    def note(apply_model: Any, given: Any) -> Tensor:
        places.add((threading.get_ident(), id(apply_model.__self__)))
        return apply_model(given["input"], given["timestep"], **given["c"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(note)
    return clone, places


def with_row_loras(model: Any) -> Any:
    linear = Lora("linear", lora_file(model, "linear", SD_LINEAR, (4, 16)), 0.8)
    conv = Lora("conv", lora_file(model, "conv", SD_CONVOLUTIONS, (8,)), 1.0)
    stacks: list[LoraStack] = [(linear,), (), (conv, linear)]
    return RowLoras(model, stacks).patched(model, stacks)


def both(model: Any) -> Any:
    return anchored(with_row_loras(model), start_percent=0.0, end_percent=0.8, row_masks=torch.ones(ROWS, 64, 64))


def run(model: Any, callback: Callable[..., None] | None = None) -> Tensor:
    return sample(plain_guider(model, prompts("sd15")), callback=callback)


def models_of(split: Any) -> list[Any]:
    """The networks on both devices."""
    return [split.model, *(copy.model for copy in split.get_additional_models_with_key("multigpu"))]


def assert_as_before(split: Any, before: Tensor, weights: list[dict[str, Tensor]]) -> None:
    """Neither the model nor its copy carries anything of a patched clone's run."""
    assert torch.equal(run(split), before)
    gc.collect()
    for model, known in zip(models_of(split), weights, strict=True):
        assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
        assert all(torch.equal(value, known[key]) for key, value in model.state_dict().items())
    assert split.additional_models.keys() == {"multigpu"}
    assert split.injections == {}


@pytest.mark.parametrize("patch", [anchored, with_row_loras, both])
@pytest.mark.parametrize("order", ["split, then patched", "patched, then split"])
def test_rows_are_the_same_on_two_devices(patch: Patch, order: str) -> None:
    model, places = watched(loadable())
    expected = run(patch(model))
    assert len(places) == 1
    assert change(expected, run(model)) > ACTS
    places.clear()
    patched = patch(on_two_devices(model)) if order.startswith("split") else on_two_devices(patch(model))
    found = run(patched)
    assert len({thread for thread, _ in places}) == len({network for _, network in places}) == 2
    assert change(found, expected) <= BOUND
    assert torch.equal(run(patched), found)


@pytest.mark.parametrize(
    "error", [None, RuntimeError("broken"), comfy.model_management.InterruptProcessingException()], ids=str
)
def test_nothing_is_left_on_either_device(error: Exception | None) -> None:
    split = on_two_devices(loadable())
    before = run(split)
    weights = [{key: value.clone() for key, value in model.state_dict().items()} for model in models_of(split)]
    patched = both(split)

    def fail(*_: Any) -> None:
        if error is not None:
            raise error

    if error is None:
        assert change(run(patched), before) > ACTS
    else:
        with pytest.raises(type(error)):
            run(patched, fail)
    assert_as_before(split, before, weights)


def test_a_refiner_goes_on_in_smaller_chunks_where_one_device_is_full(tmp_path: Any) -> None:
    studio, image = Studio("sd15", tmp_path), photograph()
    expected = studio.detail(image, detections(image))[3]
    tried: list[int] = []

    def limited(apply_model: Any, given: Any) -> Tensor:
        tried.append(given["input"].shape[0])
        if tried[-1] > 3 and apply_model.__self__ is not split.model:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return apply_model(given["input"], given["timestep"], **given["c"])

    split = on_two_devices(loadable())
    split.set_model_unet_function_wrapper(limited)
    found = studio.detail(image, detections(image), model=split)[3]
    assert max(tried) == 5  # the regions, with one prompt on each device
    assert min(tried) == 2
    assert float((found - expected).abs().max()) <= 1e-4
