"""ComfyUI's own SAM3, a checkpoint's MODEL and CLIP, run over a batch of pictures for any number of concepts."""

from collections.abc import Iterator, Sequence
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ..errors import LunaInputError
from ..picture.detections import Detections
from .comfy_sam3 import BYTES_PER_CONCEPT, BYTES_PER_PICTURE
from .concepts import Concept
from .from_masks import Picture
from .sam3_results import Outputs, collect, cut_px

NEEDED_COMFYUI = "0.20"
"""The first release with a SAM3 of its own."""

Text = tuple[Tensor, Tensor]
"""A concept's embedding [1,T,D] and which of its tokens are words [1,T]."""


def check_core_sam3(model: ModelPatcher, clip: CLIP) -> None:
    """Raises LunaInputError unless this ComfyUI has a SAM3 and both inputs are of one."""
    if not hasattr(comfy.model_base, "SAM3"):
        raise LunaInputError(
            f"model and clip: core SAM3 needs ComfyUI {NEEDED_COMFYUI} or newer, and this is an older one. "
            "Update ComfyUI, or connect a SAM3 Loader (Luna) to sam3 instead"
        )
    from comfy.text_encoders.sam3_clip import SAM3ClipModelWrapper

    network = getattr(model, "model", model)
    if not isinstance(network, comfy.model_base.SAM3):
        raise LunaInputError(
            f"model is {type(network).__name__}, not SAM3: connect MODEL and CLIP of a Load Checkpoint with "
            "a SAM3 checkpoint"
        )
    encoder = getattr(clip, "cond_stage_model", clip)
    if not isinstance(encoder, SAM3ClipModelWrapper):
        raise LunaInputError(
            f"clip is {type(encoder).__name__}, not SAM3's: connect the CLIP of the SAM3 checkpoint that "
            "model comes from"
        )


def detect_core(
    model: ModelPatcher,
    clip: CLIP,
    image: Tensor,
    concepts: Sequence[Concept],
    threshold: float,
    max_detections: int = 0,
    nms_iou: float = 0.7,
) -> tuple[Detections, tuple[str, ...]]:
    """Looks for concepts on every picture; the vision encoder runs once for each, whatever the number of concepts.

    Scores, boxes and masks are those of ComfyUI's own node without refinement: the score is the query's alone, boxes
    are drawn out to whole px, and masks are cut to them.

    Args:
        model: ComfyUI MODEL of a SAM3 checkpoint.
        clip: its CLIP.
        image: [B,H,W,C] in 0..1.
        concepts: what to look for and to leave out; only their words reach the text encoder.
        threshold: scores at or below it are dropped.
        max_detections: the best so many of each picture; 0 for all.
        nms_iou: of two that overlap more than this the lower score goes; 1 keeps both.

    Returns:
        The detections, picture by picture in the order of the concepts, and notices.

    Raises:
        LunaInputError: this ComfyUI has no SAM3, an input is no SAM3's, or a concept is too long.
    """
    check_core_sam3(model, clip)
    count, height, width, _ = image.shape
    texts = _encode(clip, concepts)
    comfy.model_management.load_models_gpu([model], memory_required=BYTES_PER_PICTURE + BYTES_PER_CONCEPT)
    progress = comfy.utils.ProgressBar(count * (1 + len(concepts)))
    return collect(
        lambda index: _look(model, image[index], concepts, texts, progress),
        concepts,
        Picture(width, height, count),
        threshold,
        max_detections,
        nms_iou,
        cut_px,
    )


@torch.inference_mode()
def _encode(clip: CLIP, concepts: Sequence[Concept]) -> list[Text]:
    """Each concept on its own: commas and limits, which the tokenizer would read, are gone from its words."""
    texts = []
    for concept in concepts:
        tokens = clip.tokenize(concept.text)
        if any(len(parts) > 1 for parts in tokens.values()):
            longest = max(len(part) for parts in tokens.values() for part in parts)
            raise LunaInputError(
                f"concepts: '{concept.text}' is longer than the {longest} tokens SAM3 reads: name the thing in a few "
                "words"
            )
        encoded = clip.encode_from_tokens(tokens, return_dict=True)
        texts.append((encoded["cond"], encoded["attention_mask"]))
    return texts


@torch.inference_mode()
def _look(
    model: ModelPatcher, picture: Tensor, concepts: Sequence[Concept], texts: Sequence[Text], progress: Any
) -> Iterator[tuple[Concept, Outputs]]:
    """Yields each concept with its logits [Q], no presence, boxes [Q,4] and mask logits [Q,h,w] on one picture [H,W,C].

    ComfyUI's node reads no presence logit either, so one threshold means the same in both.
    """
    device, dtype = model.load_device, model.model.get_dtype_inference()
    detector = model.model.diffusion_model.detector
    trunk, resizer = detector.backbone["vision_backbone"].trunk, detector.backbone["language_backbone"]["resizer"]
    pixels = picture[None, ..., :3].movedim(-1, 1)
    square = comfy.utils.common_upscale(pixels, trunk.img_size, trunk.img_size, "bilinear", crop="disabled")
    seen = trunk(square.to(device=device, dtype=dtype))
    progress.update(1)
    for concept, (embedding, words) in zip(concepts, texts, strict=True):
        # ComfyUI's layers look for a cancel themselves, but compiled ones do not
        comfy.model_management.throw_exception_if_processing_interrupted()
        text = resizer(embedding.to(device=device, dtype=dtype))
        outputs = detector.forward_from_trunk(seen, text, words.to(device))
        progress.update(1)
        yield concept, (outputs["scores"][0], None, outputs["boxes"][0], outputs["masks"][0])
