"""Row LoRA and Concept: files become stacks in the order of the chain."""

from pathlib import Path
from typing import Any

import folder_paths
import pytest
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.concepts import LunaConcept
from luna_refinement.nodes.row_lora import LunaRowLora
from safetensors.torch import save_file

from harness import tiny
from harness.lora_files import lora_file


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files in a folder of LoRAs."""
    model = tiny.unet()
    for name in ("a", "b", "c"):
        save_file(lora_file(model, name, ("*attn2.to_q",)), tmp_path / f"{name}.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return [f"{name}.safetensors" for name in ("a", "b", "c")]


def chain(*given: tuple[str, float]) -> Any:
    stack: Any = ()
    for name, strength in given:
        (stack,) = LunaRowLora.execute(name, strength, stack).result
    return stack


def test_a_chain_is_a_stack_in_its_order(names: list[str]) -> None:
    stack = chain((names[0], 0.5), (names[1], 0.0), (names[2], -1.0))
    assert [(lora.name, lora.strength) for lora in stack] == [(names[0], 0.5), (names[2], -1.0)]
    assert all(len(lora.weights) > 10 for lora in stack)


def test_the_own_lora_of_a_concept_comes_first(names: list[str]) -> None:
    def loras(**given: Any) -> list[tuple[str, float]]:
        settings = {"lora": "none", "strength": 1.0} | given
        ((concept,),) = LunaConcept.execute("face", -1.0, -1.0, **settings).result
        return [(lora.name, lora.strength) for lora in concept.loras]

    stack = chain((names[0], 0.5), (names[1], 2.0))
    assert loras() == []
    assert loras(loras=stack) == [(names[0], 0.5), (names[1], 2.0)]
    assert loras(lora=names[2], loras=stack) == [(names[2], 1.0), (names[0], 0.5), (names[1], 2.0)]
    assert loras(lora=names[2], strength=0.0, loras=stack) == loras(loras=stack)


def test_a_missing_file_is_named(names: list[str]) -> None:
    with pytest.raises(LunaInputError, match=r"gone\.safetensors"):
        LunaRowLora.execute("gone.safetensors", 1.0)
