"""LoRAs of single rows: files as stacks for concepts."""

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..batching.concepts import Lora
from ..batching.lora_files import read_lora
from ..errors import LunaInputError
from ..weight_files import inflated_bytes
from . import inputs
from .schema import LunaLoras, luna_schema

TEXT_HALF = (
    "The half of it that changes the text encoder acts where the prompt is encoded: use a LoRA loader on the CLIP."
)


class LunaRowLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaRowLora",
            display_name="Row LoRA (Luna)",
            category="Luna/Refine",
            description="A LoRA for the rows of a concept. Chain several into a stack; rows with different stacks are "
            "sampled together in one call, without merging into the model.",
            search_aliases=["lora stack", "lora per detection", "lora per row", "regional lora"],
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip=f"A LoRA from models/loras. {TEXT_HALF}",
                ),
                inputs.lora_strength("Strength of the LoRA; 0 leaves it out."),
                LunaLoras.Input("loras", optional=True, tooltip="LoRAs before this one; they all act together."),
            ],
            outputs=[LunaLoras.Output("stack", display_name="loras", tooltip="For Concept, or for another Row LoRA.")],
        )

    @classmethod
    def execute(cls, lora: str, strength: float, loras: tuple[Lora, ...] = ()) -> io.NodeOutput:
        return io.NodeOutput((*loras, *load_lora(lora, strength)))


def load_lora(name: str, strength: float) -> tuple[Lora, ...]:
    """The LoRA of a file; none at strength 0.

    Raises:
        LunaInputError: the file is missing, damaged, or no LoRA.
    """
    if strength == 0:
        return ()
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise LunaInputError(f"lora '{name}' is not in models/loras: put it there and press R")
    try:
        if claimed := inflated_bytes(path):
            raise LunaInputError(f"lora '{name}' is packed and would grow to {claimed} bytes: get it as .safetensors")
        state_dict = comfy.utils.load_torch_file(path, safe_load=True)
    except LunaInputError:
        raise
    except Exception as error:
        # The loaders raise many kinds of error; the reason is passed on in full.
        raise LunaInputError(
            f"lora '{name}' cannot be read, the file is incomplete or damaged: download it again ({error})"
        ) from error
    return (Lora(name, read_lora(state_dict, name), strength),)


NODES = (LunaRowLora,)
