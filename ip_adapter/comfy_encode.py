"""Row embeddings from pictures: CLIP vision and the adapter's projection, in batches, remembered by content."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..comfy_memory import MemoryLimit
from ..errors import LunaInputError, LunaRuntimeError
from .comfy_adapter import IPAdapter
from .comfy_patch import layers_for
from .embeds import RowEmbeds
from .pooling import PoolingHead

_ROWS_PER_BATCH = 16
_REMEMBERED_BYTES = 64 << 20
"""Of tokens [T,D] kept per memory: 512 pictures of SDXL plus, 85 of full-face, 19 of SigLIP."""

_ENCODERS = {768: "ViT-L", 1024: "ViT-H", 1280: "ViT-G"}
_HIDDEN = {1024: "ViT-L", 1152: "SigLIP so400m", 1280: "ViT-H", 1664: "ViT-G"}
_KOLORS_SIDE = 336
"""px of the pictures that the encoder of Kolors' adapters sees."""


class PictureMemory:
    """Tokens of pictures seen before, the oldest forgotten first, and how many pictures fit at once.

    One memory holds what one encoder, or one pair of encoder and adapter, made.
    """

    def __init__(self, limit_bytes: int = _REMEMBERED_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self.nothing: Tensor | None = None
        self.limit = MemoryLimit("pictures")

    def recall(self, views: Tensor, encoded: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens [N,T,D] of views [N,s,s,3] on the CPU; those not seen before are ``encoded``, each once."""
        digests = [_digest(view) for view in views]
        rows = {digest: self.find(digest) for digest in digests}
        new = list({digest: place for place, digest in enumerate(digests) if rows[digest] is None}.values())
        if new:
            for place, row in zip(new, encoded(views[new]), strict=True):
                rows[digests[place]] = row.clone()
                self.keep(digests[place], row.clone())
        return torch.stack([row for digest in digests if (row := rows[digest]) is not None])

    def in_parts(self, pictures: Tensor, most: int, work: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """What ``work`` makes of pictures [N,...], ``most`` at a time or as many as fit; ``name`` is the input's."""
        no_room = LunaRuntimeError(
            f"{name}: there is not enough memory to encode even one picture: close other programs that use the "
            "GPU, or start ComfyUI with --lowvram"
        )
        parts = self.limit.parts(list(range(len(pictures))), most, lambda places: work(pictures[places]), no_room)
        return torch.cat([made for _, made in parts])

    def find(self, digest: bytes) -> Tensor | None:
        if digest in self.rows:
            self.rows.move_to_end(digest)
        return self.rows.get(digest)

    def keep(self, digest: bytes, tokens: Tensor) -> None:
        self.rows[digest] = tokens
        while len(self.rows) * tokens.nbytes > self.limit_bytes:
            self.rows.popitem(last=False)


_memories: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, PictureMemory]] = WeakKeyDictionary()


def clip_widths(clip_vision: object) -> tuple[int, int]:
    """Width of the hidden states and of the pooled embed of ComfyUI's CLIP_VISION.

    Raises:
        LunaInputError: it is not an encoder of the CLIP kind.
    """
    encoder = getattr(clip_vision, "model", None)
    weight = getattr(getattr(encoder, "visual_projection", None), "weight", None)
    if weight is None or getattr(encoder, "vision_model", None) is None:
        raise LunaInputError(
            "clip_vision is no CLIP vision model with projection: IP-Adapters need the CLIP encoder they were trained "
            "with, usually CLIP-ViT-H-14-laion2B-s32B-b79K"
        )
    pooled, hidden = weight.shape
    return hidden, pooled


def check_clip_vision(adapter: IPAdapter, clip_vision: object) -> None:
    """Raises LunaInputError where the encoder is not of the kind the adapter was trained on."""
    layout = adapter.layout
    if layout.kind == "instantx":
        _check_siglip(adapter, clip_vision)
        return
    hidden, pooled = clip_widths(clip_vision)
    given, names = (pooled, _ENCODERS) if layout.reads_pooled else (hidden, _HIDDEN)
    if given != layout.clip_dim:
        raise LunaInputError(
            f"clip_vision gives embeds {given} wide ({names.get(given, 'unknown encoder')}), but ip_adapter "
            f"'{adapter.name}' was trained on {layout.clip_dim} ({names.get(layout.clip_dim, 'unknown encoder')}): "
            "load the CLIP vision model that belongs to the adapter"
        )
    side = getattr(clip_vision, "image_size", None)
    if layout.kind == "kolors" and side != _KOLORS_SIDE:
        raise LunaInputError(
            f"clip_vision sees pictures of {side} px, but ip_adapter '{adapter.name}' of Kolors was trained on "
            f"{_KOLORS_SIDE}: load CLIP ViT-L/14 at {_KOLORS_SIDE} px"
        )


def _check_siglip(adapter: IPAdapter, clip_vision: object) -> None:
    vision: Any = getattr(getattr(clip_vision, "model", None), "vision_model", None)
    is_siglip = bool(getattr(vision, "output_layernorm", False))  # the CLIP kind norms the first token alone
    width = vision.post_layernorm.weight.shape[0] if is_siglip else 0
    if width != adapter.layout.clip_dim:
        given = f"is SigLIP {width} wide" if is_siglip else "is no SigLIP encoder"
        raise LunaInputError(
            f"clip_vision {given}, but ip_adapter '{adapter.name}' was trained on SigLIP {adapter.layout.clip_dim} "
            "wide: load siglip-so400m-patch14-384"
        )
    if adapter.pooling is None:
        raise LunaInputError(
            f"ip_adapter '{adapter.name}' of InstantX reads what SigLIP's pooling head gives, which ComfyUI's CLIP "
            "vision leaves out: choose the file that clip_vision was loaded from as pooling_file of Luna's IP-Adapter "
            "Loader"
        )
    head: PoolingHead = adapter.pooling.model
    if not head.belongs_to(vision.post_layernorm.weight):
        raise LunaInputError(
            f"pooling_file '{head.name}' of ip_adapter '{adapter.name}' is not the file that clip_vision was loaded "
            "from: choose the same file in both"
        )


def check_compatible(model: ModelPatcher, adapter: IPAdapter, clip_vision: object) -> None:
    """Raises LunaInputError unless model, adapter and encoder belong together; loads nothing."""
    layers_for(model, adapter)
    check_clip_vision(adapter, clip_vision)


def views(clip_vision: ClipVisionModel, images: Tensor) -> Tensor:
    """What the encoder will see of pictures [N,H,W,C]: [N,s,s,3] in 0..1 at its own size s.

    ComfyUI centre-crops, scales and rounds a picture before it encodes it, and does nothing more to a view. Views are
    some 20 times smaller than crops, so rows can wait for the encoder without holding theirs.
    """
    preprocess = getattr(comfy.clip_model, "clip_preprocess", None) or comfy.clip_vision.clip_preprocess
    seen = preprocess(images, size=clip_vision.image_size, mean=[0.0] * 3, std=[1.0] * 3)
    return seen.movedim(1, -1).to(device="cpu", dtype=torch.float32)


def encode_rows(adapter: IPAdapter, clip_vision: ClipVisionModel, images: Tensor) -> RowEmbeds:
    """One embedding per picture.

    Args:
        adapter: its projection makes the tokens.
        clip_vision: ComfyUI's CLIP_VISION.
        images: [N,H,W,C] in 0..1; each is centre-cropped to a square by ComfyUI. Views serve as well.

    Returns:
        Tokens in float32 on the CPU. "Without picture" is what the adapters were trained with: zeros for the pooled
        embed, for hidden states those of an encoder input of zeros, for XLabs' a black picture.
    """
    memory = _memories.setdefault(clip_vision.model, WeakKeyDictionary()).setdefault(adapter.network, PictureMemory())

    def encoded(new: Tensor) -> Tensor:
        work = memory.in_parts(new, _ROWS_PER_BATCH, lambda part: _encode(clip_vision, part, adapter), "clip_vision")
        return _project(adapter, work)

    with torch.no_grad():
        found = memory.recall(views(clip_vision, images), encoded)
        if memory.nothing is None:
            memory.nothing = _project(adapter, _encode_nothing(clip_vision, adapter))
    return RowEmbeds(found, memory.nothing, adapter.projection)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()


def _encode(clip_vision: ClipVisionModel, images: Tensor, adapter: IPAdapter) -> Tensor:
    encoded = clip_vision.encode_image(images)
    if adapter.layout.kind == "instantx":
        return adapter.pooled(encoded["last_hidden_state"], _heads(clip_vision))
    output = encoded["image_embeds"] if adapter.layout.reads_pooled else encoded["penultimate_hidden_states"]
    return output.to(device="cpu", dtype=torch.float32)


def _encode_nothing(clip_vision: ClipVisionModel, adapter: IPAdapter) -> Tensor:
    if adapter.layout.kind == "xlabs":
        side = clip_vision.image_size
        return _encode(clip_vision, torch.zeros(1, side, side, 3), adapter)
    if adapter.layout.reads_pooled:
        return torch.zeros(1, adapter.layout.clip_dim)
    comfy.model_management.load_models_gpu([clip_vision.patcher])
    side = clip_vision.image_size
    zeros = torch.zeros(1, 3, side, side, device=clip_vision.load_device)
    return clip_vision.model(pixel_values=zeros, intermediate_output=-2)[1].to(device="cpu", dtype=torch.float32)


def _heads(clip_vision: ClipVisionModel) -> int:
    """Of the encoder's attention; its pooling head has as many."""
    heads: int = clip_vision.model.vision_model.encoder.layers[0].self_attn.heads
    return heads


def _project(adapter: IPAdapter, encoded: Tensor) -> Tensor:
    return adapter.network.image_proj(encoded.to(adapter.load())).to("cpu")
