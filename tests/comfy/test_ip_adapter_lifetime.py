"""What an anchored sampling call costs and leaves behind: nothing, however it ends."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import psutil
import pytest
import torch
from luna_refinement.errors import LunaError, LunaInputError, LunaRuntimeError
from luna_refinement.ip_adapter import LayerWeights, comfy_encode
from luna_refinement.ip_adapter.anchors import ANCHORS, AnchorRun, Anchors
from luna_refinement.ip_adapter.attention import AnchorCall, AnchoredAttention
from luna_refinement.ip_adapter.comfy_encode import check_clip_vision, encode_rows
from luna_refinement.ip_adapter.comfy_patch import patch_model
from luna_refinement.ip_adapter.projection import KeyValueLayers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import tiny
from harness.anchored_sampling import ROWS, adapter, anchored, change, embeds, plain_guider, prompts, sample
from harness.refining import photograph


@contextmanager
def counting(module: torch.nn.Module) -> Iterator[list[int]]:
    """Rows of every forward call of a module."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0]) if inputs else 0))
    try:
        yield calls
    finally:
        handle.remove()


# -- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
def test_keys_and_values_are_made_once_per_sampling_call(steps: int) -> None:
    model, ip_adapter, given = tiny.unet("sd15"), adapter("sd15"), prompts("sd15")
    patched = patch_model(model, ip_adapter, embeds("sd15"))
    with counting(ip_adapter.network.key_values) as calls, counting(ip_adapter.network.key_values.to_v[0]) as layer:
        for patched_model in (patched, patched.clone(), patched.clone().clone()):
            calls.clear()
            layer.clear()
            sample(plain_guider(patched_model, given), steps=steps)
            assert calls == layer == [ROWS + 1]  # the pictures, and no picture


class Syncs(TorchDispatchMode):
    """Counts reads of tensors by the host, each of which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.equal")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def syncs_of_model_calls(model: Any, steps: int = 3) -> list[int]:
    """Host reads inside each evaluation of the UNet, which is where the attention layers run."""
    counts: list[int] = []

    def measure(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        with Syncs() as syncs:
            out = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        counts.append(syncs.count)
        return out

    measured = model.clone()
    measured.set_model_unet_function_wrapper(measure)
    sample(plain_guider(measured, prompts("sd15")), steps=steps)
    return counts


def test_attention_waits_for_the_device_never_or_once_per_call() -> None:
    model = tiny.unet("sd15")
    bare = syncs_of_model_calls(model)
    assert syncs_of_model_calls(anchored(model)) == bare
    masked = anchored(model, row_masks=torch.ones(ROWS, 64, 64), weight=torch.rand(ROWS))
    assert syncs_of_model_calls(masked) == bare
    # with a range the noise level is read once per model call, not once per layer
    ranged = syncs_of_model_calls(anchored(model, start_percent=0.1, end_percent=0.8))
    assert ranged == [count + 1 for count in bare]


# -- nothing is left --------------------------------------------------------------------------------


def weights_of(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.model.state_dict().items()}


def traces(model: Any) -> tuple[Any, ...]:
    """What hangs on a MODEL besides its weights."""
    return (
        repr(model.model_options),
        sorted(model.patches),
        sorted(model.object_patches),
        repr(model.wrappers),
        repr(model.callbacks),
        repr(model.attachments),
        sorted(vars(model.model)),
    )


class Boom(Exception):
    pass


def fail_with(error: BaseException) -> Callable[..., None]:
    def callback(*_: Any) -> None:
        raise error

    return callback


ENDINGS: dict[str, BaseException | None] = {
    "success": None,
    "error": Boom("in a callback"),
    "cancel": comfy.model_management.InterruptProcessingException(),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_model_is_bit_for_bit_as_before(ending: str) -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    result_before = sample(plain_guider(model, given))
    weights, hanging = weights_of(model), traces(model)
    patched = anchored(model, start_percent=0.0, end_percent=0.9, row_masks=torch.ones(ROWS, 64, 64))
    guider, error, runs = plain_guider(patched, given), ENDINGS[ending], []

    def look(*_: Any) -> None:
        (run,) = guider.model_options["transformer_options"][ANCHORS]
        assert run.key_values
        assert run.arranged
        assert run.shrunk
        runs.append(run)
        if error is not None:
            raise error

    if error is None:
        first = sample(guider, callback=look)
    else:
        with pytest.raises(type(error)):
            sample(guider, callback=look)
        first = sample(plain_guider(patched, given))
    # nothing of the call is left, whoever still holds it; and the patched model holds what it was given
    assert runs
    assert not any(run.key_values or run.arranged or run.shrunk for run in runs)
    for holder in (patched, guider):
        (anchors,) = holder.model_options["transformer_options"][ANCHORS]
        assert type(anchors) is Anchors
    # the model it was made from is untouched
    assert traces(model) == hanging
    after = weights_of(model)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert torch.equal(sample(plain_guider(model, given)), result_before)
    # and the patched one gives the same again
    assert torch.equal(sample(plain_guider(patched, given)), first)


def test_a_wrong_batch_leaves_nothing_either() -> None:
    model, given = tiny.unet("sd15"), prompts("sd15")
    before = sample(plain_guider(model, given))
    patched = anchored(model)
    hanging = traces(patched)
    with pytest.raises(LunaRuntimeError):
        sample(plain_guider(patched, given), rows=ROWS + 1)
    assert traces(patched) == hanging
    assert torch.equal(sample(plain_guider(model, given)), before)


def alive(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_fifty_runs_leak_neither_objects_nor_memory() -> None:
    model, ip_adapter, given = tiny.unet("sd15"), adapter("sd15"), prompts("sd15")
    process = psutil.Process(os.getpid())
    gc.collect()
    kinds = (AnchoredAttention, Anchors, AnchorRun, AnchorCall, KeyValueLayers)
    before = [alive(kind) for kind in kinds]  # earlier tests may have left some with ComfyUI's list of loaded models
    resident: list[int] = []
    current = model
    for run in range(50):
        patched = patch_model(model, ip_adapter, embeds("sd15"))
        chained = patched.clone().clone() if run % 2 else patched.clone()
        ending = (None, Boom("in a callback"), comfy.model_management.InterruptProcessingException())[run % 3]
        if ending is None:
            sample(plain_guider(chained, given), steps=1, side=8)
        else:
            with pytest.raises(type(ending)):
                sample(plain_guider(chained, given), steps=1, side=8, callback=fail_with(ending))
        current = current.clone()  # a chain of clones of the unpatched model
        del chained, patched, ending
        if run in (19, 49):
            comfy.model_management.cleanup_models_gc()
            gc.collect()
            resident.append(process.memory_info().rss)
    assert not current.model_options["transformer_options"].get("patches_replace")
    for value in ENDINGS.values():
        if value is not None:
            value.__traceback__ = None
    gc.collect()
    assert all(alive(kind) <= count for kind, count in zip(kinds, before, strict=True))
    assert resident[1] - resident[0] < 8 << 20  # 30 runs; one run's keys and values are 0.1 MB, its weights 3 MB


# -- embeddings of pictures -----------------------------------------------------------------------


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 60, 60, 3), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", ["plus", "plain", "full_face"])
def test_pictures_seen_before_are_not_encoded_again(tmp_path: Path, variant: str) -> None:
    clip_vision, ip_adapter = tiny.clip_vision(tmp_path), adapter("sd15", variant)
    images = pictures(5)
    with counting(clip_vision.model.vision_model.encoder) as calls:
        first = encode_rows(ip_adapter, clip_vision, images)
        assert sorted(calls) == ([5] if variant == "plain" else [1, 5])  # one batch, and that of no picture
        calls.clear()
        again = encode_rows(ip_adapter, clip_vision, images.flip(0))
        assert calls == []
        assert torch.equal(again.cond, first.cond.flip(0))
        assert torch.equal(again.uncond, first.uncond)
        changed = images.clone()
        changed[3, 0, 0, 0] += 0.5
        third = encode_rows(ip_adapter, clip_vision, changed)
        assert calls == [1]
        assert [torch.equal(a, b) for a, b in zip(third.cond, first.cond, strict=True)] == [True] * 3 + [False, True]
        twins = encode_rows(ip_adapter, clip_vision, pictures(1, seed=9).expand(4, -1, -1, -1))
        assert calls == [1, 1]
        assert len(twins) == 4
    # memory is of the pair: another adapter does not get these tokens
    other = adapter("sd15", "plain" if variant == "plus" else "plus")
    assert encode_rows(other, clip_vision, images).cond.shape != first.cond.shape


def test_embeds_equal_those_of_single_pictures_and_do_not_alias(tmp_path: Path) -> None:
    clip_vision, ip_adapter = tiny.clip_vision(tmp_path), adapter("sd15", "plus")
    images = pictures(20)  # more than one batch
    together = encode_rows(ip_adapter, clip_vision, images)
    alone = encode_rows(adapter("sd15", "plus"), tiny.clip_vision(tmp_path), images[17:18])
    assert change(together.cond[17], alone.cond[0]) <= 1e-5
    together.cond.zero_()
    assert encode_rows(ip_adapter, clip_vision, images[17:18]).cond.abs().max() > 0


def test_the_memory_of_embeds_is_bounded_in_bytes(tmp_path: Path) -> None:
    clip_vision, ip_adapter = tiny.clip_vision(tmp_path), adapter("sd15", "full_face")
    memory = comfy_encode.PictureMemory(limit_bytes=10 * 257 * 768 * 4)
    for seed in range(25):
        memory.keep(bytes([seed]), torch.zeros(257, 768))
    assert len(memory.rows) == 10
    assert memory.find(bytes([24])) is not None
    assert memory.find(bytes([14])) is None
    encode_rows(ip_adapter, clip_vision, pictures(2))
    (kept,) = comfy_encode._memories[clip_vision.model].values()
    assert kept.limit_bytes < 1 << 28
    # and it goes with the models it belongs to
    before = len(comfy_encode._memories)
    del clip_vision, ip_adapter, kept
    gc.collect()
    assert len(comfy_encode._memories) == before - 1


def test_no_picture_is_zeros_for_plain_and_an_input_of_zeros_for_plus(tmp_path: Path) -> None:
    clip_vision = tiny.clip_vision(tmp_path)
    plain, plus = adapter("sd15", "plain"), adapter("sd15", "plus")
    images = photograph(height=128, width=128)
    zeros = plain.network.image_proj(torch.zeros(1, tiny.CLIP_POOLED))
    assert torch.equal(encode_rows(plain, clip_vision, images).uncond, zeros)
    side = clip_vision.image_size
    with torch.no_grad():
        hidden = clip_vision.model(pixel_values=torch.zeros(1, 3, side, side), intermediate_output=-2)[1]
    assert change(encode_rows(plus, clip_vision, images).uncond, plus.network.image_proj(hidden)) <= 1e-6


def test_an_encoder_of_another_width_names_both(tmp_path: Path) -> None:
    wide = tiny.clip_vision(tmp_path, hidden=128, pooled=96)
    with pytest.raises(LunaInputError, match=r"gives embeds 128 wide .* trained on 64"):
        check_clip_vision(adapter("sd15", "plus"), wide)
    with pytest.raises(LunaInputError, match=r"gives embeds 96 wide .* trained on 48"):
        check_clip_vision(adapter("sd15", "plain"), wide)
    with pytest.raises(LunaInputError, match="no CLIP vision model with projection"):
        check_clip_vision(adapter("sd15", "plain"), object())


# -- models without cross-attention, and the nodes --------------------------------------------------


def node_inputs(model: Any, **changes: Any) -> dict[str, Any]:
    given = {"model": model, "ip_adapter": adapter("sd15"), "weight": 0.8, "start": 0.0, "end": 1.0}
    given |= {"scaling": "V only", "row_weights": "", "embeds": embeds("sd15")}
    return given | changes


def test_a_model_without_cross_attention_is_returned_as_it_is_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    from luna_refinement.nodes.ip_adapter import LunaApplyIPAdapter

    flux = tiny.flux()
    output = LunaApplyIPAdapter.execute(**node_inputs(flux))
    assert output.result[0] is flux
    (line,) = output.ui["text"]
    assert "has no UNet cross-attention" in line
    assert line in caplog.messages


def test_the_apply_node_anchors_and_leaves_its_input_alone() -> None:
    from luna_refinement.nodes.ip_adapter import LunaApplyIPAdapter

    model, given = tiny.unet("sd15"), prompts("sd15")
    hanging = traces(model)
    patched = LunaApplyIPAdapter.execute(**node_inputs(model, row_weights="1, 0.5\n0")).result[0]
    assert traces(model) == hanging
    expected = sample(plain_guider(anchored(model, weight=torch.tensor([0.8, 0.4, 0.0])), given))
    assert torch.equal(sample(plain_guider(patched, given)), expected)
    fading = LunaApplyIPAdapter.execute(**node_inputs(model, layer_weights=LayerWeights(row_curve=(1, 0)))).result[0]
    assert torch.equal(sample(plain_guider(fading, given)), expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "range": ({"start": 0.8, "end": 0.2}, "start is 0.8 and end 0.2"),
    "count of weights": ({"row_weights": "1, 2"}, "2 numbers for 3 images"),
    "words": ({"row_weights": "1, a lot, 2"}, "row_weights holds 'a lot', which is no number"),
    "nothing to anchor by": ({"embeds": None}, "connect images and clip_vision, or embeds"),
    "images without encoder": ({"embeds": None, "images": pictures(3)}, "connect images and clip_vision, or embeds"),
    "images and embeds": ({"images": pictures(3)}, "both images and embeds"),
    "masks": ({"attn_mask": torch.ones(2, 8, 8)}, "2 masks for 3 images"),
    "embeds of SDXL": ({"embeds": embeds("sdxl")}, "2048 wide"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_apply_node_names_what_is_wrong(name: str) -> None:
    from luna_refinement.nodes.ip_adapter import LunaApplyIPAdapter

    changes, message = WRONG[name]
    with pytest.raises(LunaError, match=message):
        LunaApplyIPAdapter.execute(**node_inputs(tiny.unet("sd15"), **changes))


def test_embeds_of_the_node_are_those_of_the_images(tmp_path: Path) -> None:
    from luna_refinement.nodes.ip_adapter import LunaApplyIPAdapter, LunaIPAdapterEmbeds

    model, given, ip_adapter = tiny.unet("sd15"), prompts("sd15"), adapter("sd15", "plus")
    clip_vision, images = tiny.clip_vision(tmp_path), pictures(ROWS)
    made = LunaIPAdapterEmbeds.execute(ip_adapter, clip_vision, images).result[0]
    by_embeds = LunaApplyIPAdapter.execute(**node_inputs(model, ip_adapter=ip_adapter, embeds=made)).result[0]
    from_images = node_inputs(model, ip_adapter=ip_adapter, embeds=None, images=images, clip_vision=clip_vision)
    by_images = LunaApplyIPAdapter.execute(**from_images).result[0]
    assert torch.equal(sample(plain_guider(by_embeds, given)), sample(plain_guider(by_images, given)))
    plain = adapter("sd15", "plain")
    with pytest.raises(LunaInputError, match="embeds were made with another adapter than ip_adapter"):
        LunaApplyIPAdapter.execute(**node_inputs(model, ip_adapter=plain, embeds=made.take([2, 0, 1])))
