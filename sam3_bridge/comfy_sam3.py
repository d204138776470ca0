"""SAM3 inside ComfyUI: transformers' own model, its memory managed by a ModelPatcher, run over a batch of pictures."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd1_clip
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import LunaInputError
from ..picture.detections import Detections
from .concepts import Concept
from .from_masks import Picture
from .sam3_files import CONFIG, HOW_TO_GET, NEEDED_TRANSFORMERS, check_folder
from .sam3_results import Outputs, collect

CONCEPTS_PER_CALL = 8
"""Concepts that share one call: each takes about 0.4 GB at SAM3's 288 x 288 masks."""

BYTES_PER_CONCEPT = 400 * 2**20
BYTES_PER_PICTURE = 2 * 2**30
"""Activations of the vision encoder at 1008 px, generously."""

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Left out, transformers would ask on the terminal whether to run a folder's code."""

_PREFIX = "detector_model."
"""Of the weights that stand next to the tracker's in the published file."""


class _Holder(nn.Module):
    """Lets a ModelPatcher note the device, which transformers' models do not allow on themselves."""

    def __init__(self, sam3: Any):
        super().__init__()
        self.sam3 = sam3


@dataclass(frozen=True, eq=False)
class Sam3:
    """A loaded SAM3.

    Attributes:
        name: of its folder or file.
        patcher: ComfyUI's handle on the model.
        processor: transformers' processor: picture preparation and tokenizer.
    """

    name: str
    patcher: ModelPatcher
    processor: Any

    @property
    def model(self) -> Any:
        """transformers' Sam3Model"""
        return self.patcher.model.sam3


def load_sam3(path: Path, config: Any = None) -> Sam3:
    """Loads SAM3 from a folder in the layout of transformers, or from a loose file of its weights.

    Args:
        path: the folder or the ``.safetensors`` file.
        config: architecture of a loose file, which does not say its own; the published one by default. Every weight
            must fit it.

    Raises:
        LunaInputError: transformers cannot run SAM3, or the folder or file is not a whole SAM3.
    """
    model_class, processor_class = _transformers()
    single = path.is_file()
    if not single:
        check_folder(path)
    try:
        if single:
            model, info = _from_file(path, model_class, config)
            processor = _published_processor(processor_class)
        else:
            model, info = model_class.from_pretrained(
                path, **_LOCAL, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            processor = processor_class.from_pretrained(path, **_LOCAL)
    except LunaInputError:
        raise
    except SafetensorError as error:
        raise LunaInputError(
            f"sam3_model '{path.name}': the weights are damaged or not downloaded to the end ({error}). "
            "Download them again"
        ) from error
    except Exception as error:
        # transformers raises many kinds of error over settings that fit nothing; the reason is passed on in full.
        raise LunaInputError(
            f"sam3_model '{path.name}' cannot be loaded: its files do not fit each other or transformers "
            f"({type(error).__name__}: {error}). {HOW_TO_GET}"
        ) from error
    _check_complete(path.name, info)
    return Sam3(path.name, _managed(model.eval()), processor)


def detect(
    sam3: Sam3,
    image: Tensor,
    concepts: Sequence[Concept],
    threshold: float,
    max_detections: int = 0,
    nms_iou: float = 0.7,
) -> tuple[Detections, tuple[str, ...]]:
    """Looks for concepts on every picture; the vision encoder runs once for each, whatever the number of concepts.

    Args:
        sam3: the model.
        image: [B,H,W,C] in 0..1.
        concepts: what to look for and to leave out.
        threshold: scores at or below it are dropped.
        max_detections: the best so many of each picture; 0 for all.
        nms_iou: of two that overlap more than this the lower score goes; 1 keeps both.

    Returns:
        The detections, picture by picture in the order of the concepts, and notices.

    Raises:
        LunaInputError: a concept is too long for SAM3's tokenizer.
    """
    count, height, width, _ = image.shape
    picture = Picture(width, height, count)
    tokens = _tokenize(sam3, concepts)
    calls = range(0, len(concepts), CONCEPTS_PER_CALL)
    at_once = min(len(concepts), CONCEPTS_PER_CALL)
    comfy.model_management.load_models_gpu(
        [sam3.patcher], memory_required=BYTES_PER_PICTURE + at_once * BYTES_PER_CONCEPT
    )
    progress = comfy.utils.ProgressBar(count * (1 + len(calls)))
    return collect(
        lambda index: _look(sam3, image[index], concepts, tokens, progress),
        concepts,
        picture,
        threshold,
        max_detections,
        nms_iou,
    )


@torch.inference_mode()
def _look(
    sam3: Sam3, picture: Tensor, concepts: Sequence[Concept], tokens: dict[str, Tensor], progress: Any
) -> Iterator[tuple[Concept, Outputs]]:
    """Yields each concept with its logits [Q], presence [1], boxes [Q,4] and mask logits [Q,h,w] on one picture."""
    device = sam3.patcher.load_device
    comfy.model_management.throw_exception_if_processing_interrupted()
    pixels = (picture[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).movedim(-1, 0).cpu()
    prepared = sam3.processor.image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
    features = sam3.model.get_vision_features(pixel_values=prepared.to(device))
    progress.update(1)
    for start in range(0, len(concepts), CONCEPTS_PER_CALL):
        comfy.model_management.throw_exception_if_processing_interrupted()
        group = concepts[start : start + CONCEPTS_PER_CALL]
        text = {key: value[start : start + len(group)].to(device) for key, value in tokens.items()}
        outputs = sam3.model(vision_embeds=_repeated(features, len(group)), **text)
        progress.update(1)
        for row, concept in enumerate(group):
            presence = None if outputs.presence_logits is None else outputs.presence_logits[row]
            yield concept, (outputs.pred_logits[row], presence, outputs.pred_boxes[row], outputs.pred_masks[row])


def _repeated(features: Any, count: int) -> Any:
    """One picture's features for ``count`` concepts, without copying them."""
    return type(features)(
        fpn_hidden_states=tuple(level.expand(count, -1, -1, -1) for level in features.fpn_hidden_states),
        fpn_position_encoding=tuple(level.expand(count, -1, -1, -1) for level in features.fpn_position_encoding),
    )


def _tokenize(sam3: Sam3, concepts: Sequence[Concept]) -> dict[str, Tensor]:
    """Token ids and attention mask of all concepts: [C,T] each."""
    longest = sam3.model.config.text_config.max_position_embeddings
    texts = [concept.text for concept in concepts]
    for text, ids in zip(texts, sam3.processor.tokenizer(texts)["input_ids"], strict=True):
        if len(ids) > longest:
            raise LunaInputError(
                f"concepts: '{text}' has {len(ids)} tokens, SAM3 reads {longest}: name the thing in a few words"
            )
    encoded = sam3.processor.tokenizer(texts, padding="max_length", max_length=longest, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _managed(model: Any) -> ModelPatcher:
    """The model in a ModelPatcher; on devices that are fast in bfloat16 its vision backbone is kept in it.

    Only the backbone's weights, half of the model: its buffers hold the angles of its position encoding, and
    everything that makes boxes stays float32, for bfloat16 knows a place on a 4096 px picture no better than 8 px.
    """
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_bf16(device):
        use_half_backbone(model)
    return ModelPatcher(_Holder(model), load_device=device, offload_device=comfy.model_management.unet_offload_device())


def use_half_backbone(model: Any) -> None:
    """Brings the weights of the vision backbone, not its buffers, to bfloat16."""
    for parameter in model.vision_encoder.backbone.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _transformers() -> tuple[Any, Any]:
    """transformers' Sam3Model and Sam3Processor, imported only when they are needed."""
    advice = (
        f"SAM3 needs transformers {NEEDED_TRANSFORMERS} or newer with torchvision: run "
        f'`python -m pip install -U "transformers>={NEEDED_TRANSFORMERS}" torchvision` in ComfyUI\'s Python environment'
    )
    try:
        import transformers
    except ImportError as error:
        raise LunaInputError(f"transformers is not installed. {advice}") from error
    try:
        from transformers import Sam3Model, Sam3Processor
        from transformers.utils import is_torchvision_available
    except (ImportError, RuntimeError) as error:
        raise LunaInputError(f"transformers {transformers.__version__} cannot run SAM3 ({error}). {advice}") from error
    if not is_torchvision_available():
        raise LunaInputError(f"transformers {transformers.__version__} finds no torchvision. {advice}")
    return Sam3Model, Sam3Processor


def _from_file(path: Path, model_class: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """A loose file of weights under the keys of transformers."""
    from transformers import Sam3Config

    config = config or Sam3Config()
    with torch.device("meta"):
        needed = {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    with safe_open(path, framework="pt") as weights:
        names = {name.removeprefix(_PREFIX): name for name in weights.keys()}  # noqa: SIM118 (it is no dict)
        if not any(name.startswith("vision_encoder.backbone.") for name in names):
            raise LunaInputError(
                f"sam3_model '{path.name}' does not name its weights as transformers does (a repacked SAM3, or another "
                f"model): use the folder of the published model. {HOW_TO_GET}"
            )
        unfit = [
            name
            for name, shape in needed.items()
            if name not in names or weights.get_slice(names[name]).get_shape() != shape
        ]
        if unfit:
            raise LunaInputError(
                f"sam3_model '{path.name}' is not the published SAM3: {len(unfit)} of {len(needed)} weights are "
                f"missing or have another shape, for example {', '.join(unfit[:3])}. A loose file does not say its "
                f"architecture: use the folder it came from, with its {CONFIG}"
            )
        state = {name: weights.get_tensor(names[name]) for name in needed}
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        output_loading_info=True,
    )
    return model, info


def _published_processor(processor_class: Any) -> Any:
    """The published preparation of pictures, and CLIP's tokenizer, which SAM3 shares and ComfyUI ships."""
    from transformers import CLIPTokenizer
    from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

    folder = os.path.join(os.path.dirname(comfy.sd1_clip.__file__), "sd1_tokenizer")
    return processor_class(Sam3ImageProcessor(), CLIPTokenizer.from_pretrained(folder, **_LOCAL))


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """transformers fills in random weights where some are missing or of another shape; here that is an error."""
    missing, other = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or other:
        examples = ", ".join([*missing, *other][:3])
        raise LunaInputError(
            f"sam3_model '{name}': {len(missing)} weights are missing and {len(other)} have another shape, for example "
            f"{examples}. The download is incomplete or the file is another model. {HOW_TO_GET}"
        )
