"""Texts that read a picture: words encoded anew for each row, together with that row's picture.

A conditioning does not carry the words it was made of, so they are given beside it. Everything else that it carries,
such as masks and ControlNets, stays.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.utils
from torch import Tensor

from .comfy_prompts import check_prompts
from .crops import filling
from .fields import KINDS
from .kinds import PerText
from .rows import Conditioning, EncodedRow, Row

SHOWN_PX = 384**2
"""Of the picture: what ComfyUI's node for the later Qwen-Image-Edit models shows to the text encoder."""


def reads_pictures(clip: Any) -> bool:
    """Whether the tokenizer of ComfyUI's CLIP puts pictures among the words."""
    return "images" in inspect.signature(clip.tokenizer.tokenize_with_weights).parameters


def shown_pictures(rows: Sequence[Row], crops: Tensor) -> list[Tensor | None]:
    """What the text encoder sees of each row whose reference has words: [h,w,3] of about ``SHOWN_PX``.

    Args:
        rows: of one working size.
        crops: [N,H,W,3].
    """
    scale = math.sqrt(SHOWN_PX / (crops.shape[1] * crops.shape[2]))
    height, width = round(crops.shape[1] * scale), round(crops.shape[2] * scale)
    shown: list[Tensor | None] = []
    for row, crop in zip(rows, crops, strict=True):
        if row.reference is None or not row.reference.words:
            shown.append(None)
            continue
        own = row.reference.picture
        picture = crop if own is None else filling(own.to(crop), crop.shape[0], crop.shape[1])
        planes = comfy.utils.common_upscale(picture.movedim(-1, 0)[None], width, height, "area", "disabled")
        shown.append(planes[0].movedim(0, -1))
    return shown


def with_picture_text(clip: Any, model: Any, row: EncodedRow) -> EncodedRow:
    """The row with prompts whose text has read its picture.

    Args:
        clip: ComfyUI's CLIP whose tokenizer reads pictures.
        model: the ModelPatcher that will read the texts.
        row: with the picture, and words for one entry of each prompt.

    Raises:
        LunaInputError: the text is of another family of models than the model.
    """
    if row.shown is None or row.reference is None:
        return row
    made: Conditioning = {}
    for name, words in row.reference.words.items():
        ((_, given),) = row.conditioning[name]
        kept = {key: value for key, value in given.items() if not isinstance(KINDS.get(key), PerText)}
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(words, images=[row.shown[None]]), show_pbar=False)
        made[name] = [[text, kept | fields] for text, fields in encoded]
    check_prompts(model, made)
    return replace(row, conditioning=row.conditioning | made)
