"""Runs of the refiner nodes in process, on tiny models in the real layouts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter, as_ip_adapter
from luna_refinement.nodes.chess import LunaChessRefiner
from luna_refinement.nodes.detailer import LunaSemanticDetailer
from luna_refinement.picture.detections import Detection, Detections
from skimage.data import astronaut
from torch import Tensor

from harness import tiny
from harness.pictures import REGIONS

BOXES = tuple(tuple(float(x) for x in box) for box in REGIONS.values())


def photograph(count: int = 1, height: int = 512, width: int = 512) -> Tensor:
    """[count,height,width,3]: the astronaut, mirrored and darkened from picture to picture."""
    picture = torch.from_numpy(astronaut()[:height, :width]).float() / 255
    flipped = picture.flip(1)
    return torch.stack([(flipped if index % 2 else picture) * (1 - 0.1 * index) for index in range(count)])


def detections(image: Tensor, boxes: Sequence[Sequence[float]] = BOXES, on: Sequence[int] | None = None) -> Detections:
    """Whole-box detections; ``on`` says which picture each lies on."""
    places = on or [0] * len(boxes)
    items = [Detection(place, (b[0], b[1], b[2], b[3])) for place, b in zip(places, boxes, strict=True)]
    return Detections(tuple(items), image.shape[2], image.shape[1], image.shape[0])


def labelled(image: Tensor, labels: Sequence[str]) -> Detections:
    """The first boxes of a photograph, each of a label of its own."""
    found = detections(image, BOXES[: len(labels)])
    items = tuple(replace(item, label=label) for item, label in zip(found.items, labels, strict=True))
    return replace(found, items=items)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest of any two numbers in the same place."""
    return float((a - b).abs().max())


def adapter_halves(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter file's weights as other packs' loaders give them."""
    halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        half, name = key.split(".", 1)
        halves[half][name] = value
    return halves


@dataclass
class Studio:
    """Models of one family and how the nodes are called with them."""

    family: tiny.Family
    folder: Path

    @cached_property
    def model(self) -> Any:
        return tiny.unet(self.family)

    @cached_property
    def vae(self) -> Any:
        return tiny.vae(self.family)

    @cached_property
    def clip_vision(self) -> Any:
        return tiny.clip_vision(self.folder)

    def adapter(self, variant: str = "plus") -> IPAdapter:
        """An IPADAPTER as another pack's loader would give it, converted by ours."""
        return as_ip_adapter(adapter_halves(tiny.ip_adapter_weights(self.family, variant)))

    @cached_property
    def plus(self) -> IPAdapter:
        return self.adapter()

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        settings = {
            "model": self.model,
            "vae": self.vae,
            "positive": tiny.conditioning(self.family, "positive"),
            "negative": tiny.conditioning(self.family, "negative"),
            "seed": 7,
            "steps": 3,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 0.4,
            "chunk_size": 0,
            "ip_adapter": self.plus,
            "clip_vision": self.clip_vision,
            "ip_adapter_weight": 0.8,
        }
        return settings | given

    def detail(self, image: Tensor, found: Detections, **settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """image, refined_mask, crops_before, crops_after of the Semantic Detailer."""
        crops = {"crop_size": 64, "padding": 0.15, "feather": 8, "mask_mode": "mask"}
        with torch.inference_mode():  # as ComfyUI runs nodes
            return LunaSemanticDetailer.execute(image, found, **self._settings(crops | settings)).result

    def chess(self, image: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """image and tile_plan of the Chess Refiner."""
        tiles = {"tile_size": 128, "min_overlap": 0.125, "feather": 1.0}
        with torch.inference_mode():
            return LunaChessRefiner.execute(image, **self._settings(tiles | settings)).result

    def plain_sample(self, model: Any | None = None) -> Tensor:
        """A KSampler's result on this model: tells whether anything was left on it."""
        generator = torch.Generator().manual_seed(3)
        latent, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
        model = model or self.model
        sampler = comfy.samplers.KSampler(model, 2, torch.device("cpu"), "euler", "normal", 0.5, model.model_options)
        positive, negative = (tiny.conditioning(self.family, name) for name in ("positive", "negative"))
        with torch.inference_mode():
            return sampler.sample(noise, positive, negative, cfg=3.0, latent_image=latent, disable_pbar=True, seed=1)


def counting(model: Any) -> tuple[Any, list[int]]:
    """A clone of the model, and a list that gets the rows of every call to it."""
    rows: list[int] = []
    return watching(model, lambda latents: rows.append(latents.shape[0])), rows


def watching(model: Any, note: Callable[[Tensor], None]) -> Any:
    """A clone of the model that shows the latents [rows,c,h,w] of every call to it."""

    def call(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        note(arguments["input"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(call)
    return watched
