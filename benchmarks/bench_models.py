"""The models of the benchmarks: the small files, loaded as ComfyUI's nodes load them, and tiny ones made in memory."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import comfy.clip_vision
import comfy.sd
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter, load_ip_adapter

from harness import assets, tiny
from harness.refining import Studio
from harness.workspace import BASE


def model_file(relative: str) -> str:
    """Path of a small model below the workspace's ``models`` folder."""
    path = BASE / "models" / relative
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run `nox -s bench`, which makes the small models")
    return str(path)


@dataclass(frozen=True, eq=False)
class Models:
    """Everything a refiner needs.

    Attributes:
        name: for tables.
        model, vae, clip_vision: ComfyUI's.
        adapter: of the model's family.
        positive, negative: CONDITIONING.
    """

    name: str
    model: Any
    vae: Any
    clip_vision: Any
    adapter: IPAdapter
    positive: list[Any]
    negative: list[Any]


@cache
def sd15_files() -> Models:
    """SD1.5's full depth at 320 channels and a ViT-L image encoder."""
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(model_file(assets.SD15_CHECKPOINT))
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("sharp photo", "blurry"))
    return Models(
        "SD1.5, 320 channels",
        model,
        vae,
        comfy.clip_vision.load(model_file(assets.CLIP_VISION)),
        load_ip_adapter(model_file(assets.SD15_PLUS)),
        positive,
        negative,
    )


@cache
def tiny_models(family: tiny.Family) -> Models:
    """The family's full depth at 32 channels."""
    studio = Studio(family, Path(mkdtemp()))
    return Models(
        f"{'SD1.5' if family == 'sd15' else 'SDXL'}, 32 channels",
        studio.model,
        studio.vae,
        studio.clip_vision,
        studio.plus,
        tiny.conditioning(family, "positive"),
        tiny.conditioning(family, "negative"),
    )
