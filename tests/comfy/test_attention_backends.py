"""ComfyUI computes attention in several ways; rows come out alike under each, and anchors use the one that is set."""

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import pytest
from luna_refinement.batching.comfy_row_loras import RowLoras
from luna_refinement.batching.concepts import Lora
from torch import Tensor

from harness import tiny
from harness.anchored_sampling import anchored, change, plain_guider, prompts, sample
from harness.lora_files import SD_LINEAR, lora_file

BOUND = 2e-5  # float32 sums in another order, over two steps
BACKENDS = [attention.attention_basic, attention.attention_split, attention.attention_sub_quad]


def run(model: Any) -> Tensor:
    return sample(plain_guider(model, prompts("sd15")), side=24)


@pytest.mark.skipif(not hasattr(attention, "wrap_attn"), reason="this ComfyUI has one way of attention for all models")
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
def test_anchors_and_row_loras_give_the_same_under_every_backend(backend: Callable[..., Tensor]) -> None:
    model = tiny.unet("sd15")
    lora = Lora("linear", lora_file(model, "linear", SD_LINEAR, (4,)), 0.8)
    stacks = [(lora,), (), (lora,)]
    patched = anchored(RowLoras(model, stacks).patched(model, stacks))
    expected = run(patched)
    widths: list[int] = []

    def chosen(_: object, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        widths.append(k.shape[1])
        return backend(q, k, v, *args, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = chosen
    found = run(patched)
    assert widths.count(4) == 2 * 16  # the image tokens, in each layer of each step
    assert change(found, expected) <= BOUND
    assert change(found, run(model)) > 100 * BOUND
