"""The engine on ComfyUI: VAE, samplers, memory, progress and the IP-Adapter patch for each chunk of rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_base
import comfy.sd
import torch
from torch import Tensor

from ..comfy_memory import MemoryLimit
from ..errors import LunaRuntimeError
from ..ip_adapter import LayerWeights, RowEmbeds
from ..ip_adapter.comfy_encode import encode_rows
from ..ip_adapter.comfy_patch import IPAdapter, patch_model
from .comfy_progress import SamplingProgress
from .comfy_sampling import Recipe, prepared_noise, rows_that_fit, sample_rows, with_denoise
from .concepts import Concept, Lora, concept_for, denoise_of
from .conditioning import Conditioning, Row, RowConditioning
from .crops import cut, resample
from .noise import row_generator, row_noise
from .plan import RefinePlan, Region, even_chunk
from .refine import EncodedRows
from .scaffold import scaffold_slice


@dataclass(frozen=True)
class Anchor:
    """How rows are anchored by their own pictures.

    Attributes:
        adapter: the IP-Adapter.
        clip_vision: ComfyUI's CLIP vision model.
        weight: strength of the anchor.
        start_percent, end_percent: part of the schedule, 0..1.
        layer_weights: strength over the depth of the model, or None for the same everywhere.
    """

    adapter: IPAdapter
    clip_vision: Any
    weight: float
    start_percent: float
    end_percent: float
    layer_weights: LayerWeights | None = None


@dataclass(frozen=True, eq=False)
class _Call:
    """Rows that can share sampling calls: same schedule, same model, same structure of conditioning.

    Attributes:
        places: positions of the rows in the batch of one working size.
        recipe: with the rows' denoise.
        loras: of the rows' concept.
    """

    places: list[int]
    recipe: Recipe
    loras: tuple[Lora, ...]


class ComfyEngine:
    """Runs a refinement on ComfyUI's models; see ``refine.Engine``.

    Args:
        recipe: model, conditioning and sampler; never modified.
        vae: ComfyUI's VAE.
        chunk_size: rows per sampling call; 0 = as many as fit.
        anchor: image anchors, or None for text only.
        plan: what will be refined.
        mask_latent: also hold the latent outside each region's paste weight while sampling.
        noise_scaffold: [1 or B,c,H,W] in latent px, noise of the whole picture, or None for noise of each row's own.
        denoise_share: [1 or B,H,W] in 0..1, which share of the denoise each px of the picture gets, or None for all.
        concepts: settings by the label of a row; the first match counts.
    """

    px_per_batch = 4 * 1024**2

    def __init__(
        self,
        recipe: Recipe,
        vae: Any,
        chunk_size: int,
        anchor: Anchor | None,
        plan: RefinePlan,
        mask_latent: bool = False,
        noise_scaffold: Tensor | None = None,
        denoise_share: Tensor | None = None,
        concepts: Sequence[Concept] = (),
    ):
        self.recipe = recipe
        self.vae = vae
        self.chunk_size = chunk_size
        self.anchor_settings = anchor
        self.mask_latent = mask_latent
        self.noise_scaffold = noise_scaffold
        self.denoise_share = denoise_share
        self.concepts = tuple(concepts)
        self._cell = vae.spacial_compression_encode()
        self._shared = recipe.conditioning
        self._conditioning = RowConditioning(plan.width, plan.height, plan.image_count, self._cell)
        at_work = [plan.regions[row] for rows in plan.passes for row in rows]
        for region in at_work:
            self._conditioning.check(self._prompts(region))
        self._recipes = {denoise: self._recipe_for(denoise) for denoise in map(self._denoise, at_work)}
        self._inpaints = _takes_masked_picture(recipe.model)
        self._masked: dict[int, tuple[Tensor, Tensor]] = {}
        self._row_factors = _row_factors(plan, anchor.layer_weights) if anchor and anchor.layer_weights else {}
        self._progress = SamplingProgress(recipe.model, len(at_work), recipe.steps)
        self._limit = MemoryLimit("rows")

    @property
    def notices(self) -> list[str]:
        """What the user should know of how conditioning was given to rows; complete after the last call."""
        return self._conditioning.notices

    def anchor(self, crops: Tensor, regions: Sequence[Region]) -> RowEmbeds | None:
        if self.anchor_settings is None:
            return None
        pictures = [self._anchor_picture(crop, region) for crop, region in zip(crops, regions, strict=True)]
        return encode_rows(self.anchor_settings.adapter, self.anchor_settings.clip_vision, torch.stack(pictures))

    def join_anchors(self, parts: Sequence[object | None]) -> RowEmbeds | None:
        embeds = [part for part in parts if isinstance(part, RowEmbeds)]
        return RowEmbeds.concat(embeds) if embeds else None

    def encode(self, crops: Tensor, regions: Sequence[Region]) -> Tensor:
        if self._inpaints:
            self._encode_masked(crops, regions)
        return self.vae.encode(crops)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)[..., :3].to(device="cpu", dtype=torch.float32)

    def sample(self, rows: EncodedRows) -> Tensor:
        """Samples all rows in as few calls as memory and their settings allow."""
        sampled: dict[int, Tensor] = {}
        for call in self._calls(rows):
            sampled.update(zip(call.places, self._sample_call(rows, call), strict=True))
        return torch.stack([sampled[place] for place in range(len(rows.regions))])

    def _calls(self, rows: EncodedRows) -> list[_Call]:
        """Rows grouped by denoise and LoRA, and within these by the structure of their conditioning."""
        by_settings: dict[tuple[float | None, tuple[int, ...]], list[int]] = {}
        for place, region in enumerate(rows.regions):
            concept = self._concept(region)
            loras = () if concept is None else concept.loras
            by_settings.setdefault((self._denoise(region), tuple(map(id, loras))), []).append(place)
        calls: list[_Call] = []
        for (denoise, _), places in by_settings.items():
            concept = self._concept(rows.regions[places[0]])
            loras = () if concept is None else concept.loras
            groups = self._conditioning.groups(self._rows(rows, places), _size(rows))
            calls.extend(_Call([places[k] for k in group], self._recipes[denoise], loras) for group in groups)
        return calls

    def _sample_call(self, rows: EncodedRows, call: _Call) -> list[Tensor]:
        """Samples the rows of a call, in chunks where they do not fit."""
        recipe, shape = call.recipe, rows.latents.shape[1:]
        model = _with_loras(recipe.model, call.loras)
        chunks = self._limit.parts(
            call.places,
            self._chunk(recipe, len(call.places), shape),
            lambda places: self._sample_chunk(rows, places, recipe, model),
            self._no_room(rows),
            units_per_item=math.prod(shape),
        )
        done: list[Tensor] = []
        for places, result in chunks:
            done.extend(result)
            self._progress.rows_done(len(places))
        return done

    def _chunk(self, recipe: Recipe, total: int, latent_shape: Sequence[int]) -> int:
        if recipe.rows_alone:
            return 1
        most = self.chunk_size or rows_that_fit(recipe.model, latent_shape)
        return even_chunk(total, self._limit.at_most(most, math.prod(latent_shape)))

    def _sample_chunk(self, rows: EncodedRows, places: list[int], recipe: Recipe, model: Any) -> Tensor:
        latents = rows.latents[places]
        regions = [rows.regions[place] for place in places]
        conditioning = self._conditioning.for_rows(self._rows(rows, places), _size(rows))
        if self._inpaints:
            self._add_masked(conditioning, regions)
        return sample_rows(
            recipe,
            self._anchored(model, rows.anchors, places, regions),
            conditioning,
            latents,
            self._noise(regions, latents),
            [region.seed for region in regions],
            denoise_mask=self._latent_mask(regions, latents),
            callback=self._progress.callback(len(places)),
        )

    def _anchored(self, model: Any, anchors: object | None, places: list[int], regions: Sequence[Region]) -> Any:
        settings = self.anchor_settings
        if settings is None or not isinstance(anchors, RowEmbeds):
            return model
        weights = [self._anchor_weight(region, settings.weight) for region in regions]
        return patch_model(
            model,
            settings.adapter,
            anchors.take(places),
            weight=torch.tensor(weights),
            start_percent=settings.start_percent,
            end_percent=settings.end_percent,
            layer_weights=settings.layer_weights,
        )

    def _denoise(self, region: Region) -> float | None:
        """The row's own denoise, or None for the recipe's."""
        return denoise_of(region.label, self.concepts, None)

    def _recipe_for(self, denoise: float | None) -> Recipe:
        return self.recipe if denoise is None else with_denoise(self.recipe, denoise)

    def _concept(self, region: Region) -> Concept | None:
        return concept_for(region.label, self.concepts)

    def _rows(self, rows: EncodedRows, places: Sequence[int]) -> list[Row]:
        return [Row(rows.regions[place], self._prompts(rows.regions[place])) for place in places]

    def _prompts(self, region: Region) -> Conditioning:
        concept = self._concept(region)
        if concept is None:
            return self._shared
        own = {"positive": concept.positive, "negative": concept.negative}
        return self._shared | {name: conds for name, conds in own.items() if conds is not None}

    def _anchor_weight(self, region: Region, weight: float) -> float:
        concept = self._concept(region)
        if concept is not None and concept.ip_adapter_weight is not None:
            weight = concept.ip_adapter_weight
        return weight * self._row_factors.get(region.row, 1.0)

    def _anchor_picture(self, crop: Tensor, region: Region) -> Tensor:
        """The crop, or the reference picture of the row's concept, centre-cropped to the crop's shape."""
        concept = self._concept(region)
        if concept is None or concept.image is None:
            return crop
        picture = concept.image[0, ..., :3].to(crop)
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        return resample(picture[top : top + side, left : left + side], crop.shape[0], crop.shape[1])

    def _encode_masked(self, crops: Tensor, regions: Sequence[Region]) -> None:
        """What inpaint models get besides the latent: the crop with its mask greyed out, and the mask."""
        height, width = crops.shape[1:3]
        masks = torch.stack([self._region_mask(region, height, width).round() for region in regions])
        latents = self.vae.encode(torch.lerp(crops, torch.full_like(crops, 0.5), masks[..., None]))
        for region, latent, mask in zip(regions, latents, masks, strict=True):
            self._masked[region.row] = (latent, mask[None])

    def _add_masked(self, conditioning: Conditioning, regions: Sequence[Region]) -> None:
        images, masks = (torch.stack([self._masked[region.row][k] for region in regions]) for k in range(2))
        for conds in conditioning.values():
            for _, fields in conds:
                if self._inpaints == "always" or "concat_latent_image" not in fields:
                    fields |= {"concat_latent_image": images, "concat_mask": masks}

    def _region_mask(self, region: Region, height: int, width: int) -> Tensor:
        """[height,width] in 0..1: where the row may change."""
        return region.weights_over_crop(height, width) if self.mask_latent else torch.ones(height, width)

    def _noise(self, regions: Sequence[Region], latents: Tensor) -> Tensor:
        if self.noise_scaffold is None:
            return prepared_noise(row_noise([region.seed for region in regions], latents.shape[1:]))
        slices = [self._scaffold_slice(self.noise_scaffold, region, latents) for region in regions]
        return prepared_noise(torch.stack(slices))

    def _scaffold_slice(self, scaffold: Tensor, region: Region, latents: Tensor) -> Tensor:
        cell = self._cell
        return scaffold_slice(
            scaffold[region.image_index if scaffold.shape[0] > 1 else 0],
            (region.crop.y1 / cell, region.crop.x1 / cell),
            (region.crop.y2 / cell, region.crop.x2 / cell),
            (latents.shape[-2], latents.shape[-1]),
            row_generator(region.seed, "scaffold"),
        )

    def _latent_mask(self, regions: Sequence[Region], latents: Tensor) -> Tensor | None:
        if not self.mask_latent and self.denoise_share is None:
            return None
        height, width = latents.shape[-2:]
        masks = []
        for region in regions:
            mask = self._region_mask(region, height, width)
            if self.denoise_share is not None:
                share = self.denoise_share[region.image_index if self.denoise_share.shape[0] > 1 else 0]
                mask = mask * cut(share[..., None], region.crop, height, width)[..., 0]
            masks.append(mask[None])
        return torch.stack(masks)

    def _no_room(self, rows: EncodedRows) -> LunaRuntimeError:
        height, width = rows.regions[0].working_size
        return LunaRuntimeError(
            f"there is not enough memory to sample even one {width}x{height} px crop: "
            "choose a smaller crop_size, close other programs that use the GPU, or start ComfyUI with --lowvram"
        )


def _size(rows: EncodedRows) -> tuple[int, int]:
    """(height, width) of the latents."""
    return rows.latents.shape[-2], rows.latents.shape[-1]


def _takes_masked_picture(model: Any) -> Literal["always", "unless given", None]:
    """Whether the model reads each crop with its mask greyed out; Flux Fill prefers what its conditioning carries."""
    if "masked_image" in getattr(model.model, "concat_keys", ()):
        return "always"
    if not isinstance(model.model, comfy.model_base.Flux):
        return None
    channels = model.model.model_config.unet_config
    return "unless given" if channels["in_channels"] > 2 * channels["out_channels"] else None


def _row_factors(plan: RefinePlan, layer_weights: LayerWeights) -> dict[int, float]:
    """What the row curve makes of each row's weight; it runs over the rows of one picture, whatever batch it is in."""
    factors: dict[int, float] = {}
    for image_index in range(plan.image_count):
        rows = [region.row for region in plan.regions if region.image_index == image_index]
        factors.update(zip(rows, layer_weights.row_factors(len(rows)).tolist(), strict=True))
    return factors


def _with_loras(model: Any, loras: Sequence[Lora]) -> Any:
    """The model, or a clone of it with LoRAs."""
    for lora in loras:
        model = comfy.sd.load_lora_for_models(model, None, lora.weights, lora.strength, 0)[0]
    return model
