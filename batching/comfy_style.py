"""Flux Redux for rows: tokens of each row's own picture behind its text, as strong as the row's anchor says."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_base
import comfy.model_management
import comfy.utils
import torch
from comfy.clip_vision import ClipVisionModel, Output
from comfy.ldm.flux.redux import ReduxImageEncoder
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..errors import LunaInputError
from ..ip_adapter import LayerWeights
from ..ip_adapter.comfy_encode import PictureMemory
from ..ip_adapter.comfy_patch import NEGATIVE
from ..ip_adapter.flux import token_grid
from .comfy_prompts import text_width
from .plan import name_rows
from .rows import Conditioning, EncodedRow, Row

_UNSEEN = -1e4
"""Added to the score of a token that nobody is to see: its share is exactly 0. Infinities become NaN where ComfyUI
scales a mask, and where an attention works key by key."""

_PICTURES_PER_BATCH = 4
"""The style model widens each token threefold on its way: 36 MB per picture."""


@dataclass(frozen=True)
class Style:
    """What guides rows by their pictures through the text.

    Attributes:
        model: ComfyUI's STYLE_MODEL, a Redux.
        clip_vision: the encoder it was trained with.
        weight: strength of rows without one of their own; 1 is ComfyUI's strength 1.
        layer_weights: whose curve runs over the rows of each picture.
    """

    model: Any
    clip_vision: ClipVisionModel
    weight: float
    layer_weights: LayerWeights


def reads_style(model: ModelPatcher) -> bool:
    """Whether a MODEL reads tokens of pictures among its text, and how strongly from an attention mask."""
    return isinstance(model.model, comfy.model_base.Flux)


def check_style(model: ModelPatcher, style_model: Any, clip_vision: Any) -> None:
    """Raises LunaInputError unless model, style model and encoder belong together; loads nothing."""
    redux = getattr(style_model, "model", None)
    if not isinstance(redux, ReduxImageEncoder):
        raise LunaInputError(
            f"style_model holds a {type(redux or style_model).__name__}: a Redux model is needed "
            "(Load Style Model with flux1-redux-dev)"
        )
    made, read = redux.redux_down.out_features, text_width(model)
    if read is not None and made != read:
        raise LunaInputError(
            f"style_model makes tokens {made} wide, model reads text {read} wide: use a style model that was made for "
            "this model, or disconnect style_model"
        )
    seen, wanted = _width(clip_vision), redux.redux_up.in_features
    if seen != wanted:
        raise LunaInputError(
            f"clip_vision sees pictures as tokens {seen or '?'} wide, style_model was trained on tokens {wanted} wide: "
            "connect Load CLIP Vision with its own encoder (sigclip_vision_patch14_384). Where ip_adapter needs "
            "another encoder, connect only one of the two"
        )


def _width(clip_vision: Any) -> int | None:
    """Of the tokens an encoder of the CLIP or SigLIP kind makes of a picture."""
    embeddings = getattr(getattr(getattr(clip_vision, "model", None), "vision_model", None), "embeddings", None)
    weight = getattr(getattr(embeddings, "position_embedding", None), "weight", None)
    return None if weight is None else int(weight.shape[-1])


class StyleTokens:
    """Makes the tokens of rows and gives them to the prompts that pictures guide.

    Args:
        style: what guides.
        model: that reads; not modified.
        rows: all that will be sampled.

    Raises:
        LunaInputError: a row's strength is negative.
    """

    def __init__(self, style: Style, model: ModelPatcher, rows: Sequence[Row]) -> None:
        self._style = style
        self._model = model
        below = [row for row in rows if _strength(row) < 0]
        if below:
            raise LunaInputError(
                f"ip_adapter_weight is {_strength(below[0]):g} for {name_rows([row.region.row for row in below])}: "
                "tokens of style_model can be seen less, not less than not at all. Use 0 or more, also in concepts "
                "and in the row curve of layer_weights"
            )

    def encode(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """The rows with the tokens [T,D] of their views."""
        views = torch.stack([row.view for row in rows if row.view is not None])
        clip_vision = self._style.clip_vision
        memory = _memories.setdefault(clip_vision.model, PictureMemory())
        with torch.no_grad():
            seen = memory.recall(
                views, lambda new: memory.in_parts(new, _PICTURES_PER_BATCH, self._seen, "clip_vision")
            )
            tokens = memory.in_parts(seen, _PICTURES_PER_BATCH, self._tokens, "style_model")
        return [replace(row, style=own) for row, own in zip(rows, tokens, strict=True)]

    def structure(self, row: Row) -> Hashable:
        """What rows that share a call have in common: the length of each text, or shorter ones would be repeated.

        Where pictures' tokens lie between the texts, attention would see the repetition.
        """
        return tuple(
            text.shape[1] for name, conds in row.conditioning.items() if name not in NEGATIVE for text, _ in conds
        )

    def add(self, conditioning: Conditioning, rows: Sequence[EncodedRow], size: tuple[int, int]) -> None:
        """Puts each row's tokens behind its text, in place; what else reads pictures must be in there already.

        Args:
            conditioning: of exactly these rows.
            rows: which share a call.
            size: (height, width) of their latents.
        """
        device = self._model.load_device
        tokens = torch.stack([row.style for row in rows if row.style is not None]).to(device)
        strengths = torch.tensor([_strength(row) for row in rows])
        for name, conds in conditioning.items():
            for entry in () if name in NEGATIVE else conds:
                text, fields = entry
                mask = self._mask(text.shape[1], tokens.shape[1], strengths, fields, size)
                if mask is not None:
                    fields |= {"attention_mask": mask, "attention_mask_img_shape": self._grid(size)}
                text = text.to(device).expand(len(rows), -1, -1)
                entry[0] = torch.cat([text, tokens.to(text)], dim=1)

    def bytes_per_row(self, conditioning: Conditioning, row: EncodedRow) -> int:
        """What tokens and masks of one row take beside ComfyUI's estimate, which knows neither.

        A token takes what the latent px of a picture's token take, and a mask of the size sampled is held once, put
        together with those of other entries, and brought to the model's dtype.
        """
        if row.style is None:
            return 0
        model = self._model.model
        px = len(row.style) * model.diffusion_model.patch_size**2
        masks = [fields.get("attention_mask") for conds in conditioning.values() for _, fields in conds]
        numbers = max((mask[0].numel() for mask in masks if mask is not None), default=0)
        of_dtype = comfy.model_management.dtype_size(model.manual_cast_dtype or model.get_dtype())
        return int(1.5 * model.memory_required([1, row.latent.shape[0], px])) + numbers * (2 * 2 + of_dtype)

    def _seen(self, views: Tensor) -> Tensor:
        return self._style.clip_vision.encode_image(views)["last_hidden_state"].float().cpu()

    def _tokens(self, seen: Tensor) -> Tensor:
        output = Output()
        # ComfyUI leaves the style model in main memory, and brings its weights to wherever the pictures are
        output["last_hidden_state"] = seen.to(self._style.clip_vision.load_device)
        return self._style.model.get_cond(output).cpu()

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens that the model makes of a latent."""
        return token_grid(size, self._model.model.diffusion_model.patch_size)

    def _mask(
        self, text: int, tokens: int, strengths: Tensor, fields: dict[str, Any], size: tuple[int, int]
    ) -> Tensor | None:
        """How text, style tokens, picture and reference latents see one another, [1 or N,L,L], added to the scores.

        As in ComfyUI's StyleModelApply, the tokens see each other in full, and others see them with the logarithm of
        their strength added. Made for the size sampled, the mask has room for reference latents too.

        Args:
            text, tokens: how many.
            strengths: [N], 0 or more.
            fields: of the entry.
            size: (height, width) of the latent.
        """
        given = fields.get("attention_mask")
        given = given if given is not None and given.ndim == 3 else None  # Flux reads no others
        if given is None and bool((strengths == 1).all()):
            return None
        grid = self._grid(size)
        references = [
            self._grid((latent.shape[-2], latent.shape[-1])) for latent in fields.get("reference_latents") or ()
        ]
        beside = sum(math.prod(shape) for shape in (grid, *references))
        if bool((strengths == strengths[0]).all()):
            strengths = strengths[:1]
        count = len(strengths) if given is None else max(len(strengths), len(given))
        length, device = text + tokens + beside, self._model.load_device
        mask = torch.zeros(count, length, length, dtype=torch.float16, device=device)
        bias = strengths.log().clamp(min=_UNSEEN).to(mask)[:, None, None]
        after = text + tokens
        mask[:, :text, text:after] = bias
        mask[:, after:, text:after] = bias
        if given is not None:
            kept = _scaled(given, fields.get("attention_mask_img_shape", (1, 1)), grid).to(mask)
            last = after + math.prod(grid)
            mask[:, :text, :text] = kept[:, :text, :text]
            mask[:, :text, after:last] = kept[:, :text, text:]
            mask[:, after:last, :text] = kept[:, text:, :text]
            mask[:, after:last, after:last] = kept[:, text:, text:]
        return mask


_memories: WeakKeyDictionary[nn.Module, PictureMemory] = WeakKeyDictionary()


def _strength(row: Row) -> float:
    return 1.0 if row.anchor is None else row.anchor.weight


def _scaled(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """An attention mask [n,L,L] over text and a picture's ``grid`` of tokens, for ``size``, as added to the scores."""
    if mask.dtype == torch.bool:
        mask = mask.float().log()
    return comfy.utils.upscale_dit_mask(mask.float().clamp(min=_UNSEEN), grid, size)
