"""How many rows a call holds, by ComfyUI's own estimates of what a conditioning brings along."""

from collections.abc import Iterator
from typing import Any

import comfy.controlnet
import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from luna_refinement.batching.comfy_chunks import MOST_ROWS, row_bytes, rows_that_fit

from harness import tiny

LATENT = (4, 128, 128)


def entry(**fields: Any) -> dict[str, list[Any]]:
    return {"positive": [[torch.zeros(1, 77, 8), fields]]}


def test_a_row_takes_what_comfyui_estimates_for_it() -> None:
    model = tiny.unet("sd15")
    assert row_bytes(model, LATENT) == int(1.5 * model.memory_required([1, *LATENT]))
    assert rows_that_fit(model, (4, 8, 8)) == MOST_ROWS


def test_reference_latents_count_where_the_model_reads_them() -> None:
    model = tiny.flux()
    if "ref_latents" not in model.model.memory_usage_factor_conds:
        pytest.skip("this ComfyUI does not count reference latents")
    plain, small, large = (
        row_bytes(model, (16, 64, 64), entry(**fields))
        for fields in (
            {},
            {"reference_latents": [torch.zeros(1, 16, 64, 64)]},
            {"reference_latents": [torch.zeros(1, 16, 64, 64)] * 3},
        )
    )
    assert small == pytest.approx(2 * plain, rel=0.01)
    assert large == pytest.approx(4 * plain, rel=0.01)


def test_a_controlnet_leaves_less_room() -> None:
    model = tiny.unet("sd15")
    larger_than_any_machine = comfy.controlnet.ControlLora({"weight": torch.empty(2**40, device="meta")})
    assert rows_that_fit(model, (4, 8, 8), entry(control=larger_than_any_machine)) == 1
    assert rows_that_fit(model, (4, 8, 8), entry()) > 1


@pytest.fixture
def on_apples_gpu() -> Iterator[Any]:
    """A model far larger than its device, of which ComfyUI knows the memory on any machine: it is the main memory."""
    network, free = tiny.unet("sd15").model, comfy.model_management.get_free_memory(torch.device("cpu"))
    model = ModelPatcher(network, torch.device("mps"), torch.device("cpu"), size=100 * free)
    comfy.model_management.current_loaded_models.insert(0, comfy.model_management.LoadedModel(model))
    yield model
    comfy.model_management.current_loaded_models.pop(0)


def test_weights_that_lie_on_the_device_give_way_to_rows(on_apples_gpu: Any) -> None:
    """They are streamed anyway: later calls hold no fewer rows than the first, which found the device empty."""
    model, side = on_apples_gpu, 64
    while (first := rows_that_fit(model, (4, side, side))) > 4:
        side = side * 9 // 8
    assert first >= 2
    model.model.model_loaded_weight_memory = 2 * comfy.model_management.get_free_memory(torch.device("cpu"))
    assert rows_that_fit(model, (4, side, side)) >= 2 * first
