"""How many rows a call holds, by ComfyUI's own estimates of what a conditioning brings along."""

from typing import Any

import comfy.controlnet
import pytest
import torch
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
