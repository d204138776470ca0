"""Input checks at the nodes' door: everything that can be known to fail is said before a model is loaded."""

import math
from typing import Any, TypeGuard

import torch
from comfy.ldm.modules.temporal_ae import VideoDecoder
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor
from torch.nn import GroupNorm

from ..batching.comfy_latents import has_frames, latent_shape
from ..batching.plan import CELL_PX
from ..errors import LunaInputError
from ..picture.detections import Detections
from ..values import shown

PICTURE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NOTEWORTHY = 1 / 255
"""How far values may leave 0..1, by a resampling, before it is worth a word."""


def check_image(image: Tensor, name: str = "image") -> None:
    """An IMAGE must be [B,H,W,3] or [B,H,W,4] of floats, hold at least one picture, and hold numbers of 0 to 1.

    A few values beyond are highlights and are taken, see ``range_notices``; a picture of 0..255 is not.

    Raises:
        LunaInputError: naming the input, what was given and what to do.
    """
    if not is_plain(image):
        raise LunaInputError(f"{name} is {shown(image)}: a picture batch [B,H,W,3] is needed")
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise LunaInputError(
            f"{name} has shape {list(image.shape)}: a picture batch [B,H,W,3], or [B,H,W,4] with alpha, is needed"
        )
    if 0 in image.shape:
        raise LunaInputError(f"{name} has shape {list(image.shape)}: it holds no picture")
    if image.dtype not in PICTURE_TYPES:
        raise LunaInputError(
            f"{name} holds {image.dtype}: floating point numbers from 0 to 1 are needed. Divide whole numbers of 0 to "
            "255 by 255"
        )
    low, high = (float(value) for value in torch.aminmax(image))  # without a temporary as large as the picture
    if not (math.isfinite(low) and math.isfinite(high)):
        raise LunaInputError(
            f"{name} holds values that are not numbers (NaN or infinity): "
            "a node before this one failed, often a VAE decoding in half precision"
        )
    if high > 1 + NOTEWORTHY and _is_of_another_range(image):
        raise LunaInputError(
            f"{name} holds values up to {high:g}, most of them above 1: pictures go from 0 to 1, divide this one by "
            f"{255 if high <= 255 else 65535 if high <= 65535 else 'its largest value'}"
        )


def is_plain(given: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose values can be read one by one."""
    return isinstance(given, Tensor) and given.layout == torch.strided and given.device.type != "meta"


def _is_of_another_range(image: Tensor) -> bool:
    """Whether a picture [B,H,W,C] that goes beyond 1 holds nothing but whole numbers, or mostly values above 1."""
    colours = image[..., :3]
    if int(torch.count_nonzero(colours > 1)) > colours.numel() // 2:
        return True
    return not bool((colours != colours.round()).any())


def range_notices(image: Tensor, name: str = "image") -> list[str]:
    """What is said of a checked picture batch [B,H,W,C] that leaves 0..1, where a node will clip it."""
    low, high = (float(value) for value in torch.aminmax(image))
    if low >= -NOTEWORTHY and high <= 1 + NOTEWORTHY:
        return []
    return [
        f"{name} holds values from {low:.4g} to {high:.4g}: what is refined or resampled is clipped to 0..1, all other "
        "px keep their values"
    ]


def check_models(model: ModelPatcher, vae: VAE, working_px: int) -> None:
    """The VAE's latents must be the model's, of still pictures, and the working size must fit them.

    A model whose latents have a dimension for frames is used at one frame. Qwen-Image and Wan share one latent format,
    and Wan draws still pictures well, so what a model was trained for is no reason to refuse it.

    Args:
        model: ComfyUI MODEL.
        vae: ComfyUI VAE.
        working_px: side of the crops or tiles, px.

    Raises:
        LunaInputError: naming the input, what was given and what to do.
    """
    latent_format = model.get_model_object("latent_format")
    made, taken = getattr(vae, "latent_dim", 2), getattr(latent_format, "latent_dimensions", 2)
    if made != taken:
        raise LunaInputError(
            f"vae makes latents of {made} dimensions, model takes {taken} (1: sound, 2: pictures, 3: pictures or "
            "videos): use the vae that belongs to the model"
        )
    _check_stills(model, vae)
    if vae.latent_channels != latent_format.latent_channels:
        raise LunaInputError(
            f"vae makes latents of {vae.latent_channels} channels, model takes {latent_format.latent_channels}: "
            "use the vae that belongs to the model"
        )
    cell = latent_cell(vae)
    if working_px % cell:
        raise LunaInputError(f"a working size of {working_px} px does not fit this vae: use a multiple of {cell}")


_WITH_SOUND = {"LTXAV", "MiniMaxH3"}
"""Classes of models in ComfyUI whose latents are a video and its sound."""


def _check_stills(model: ModelPatcher, vae: VAE) -> None:
    """Raises LunaInputError where a batch cannot be one of pictures that do not see each other."""
    if getattr(vae, "latent_dim", 2) == 1 or _is_one_of(model, _WITH_SOUND):
        raise LunaInputError("model works on sound: Luna refines pictures, use an image model and its vae")
    if model.model.model_config.unet_config.get("use_temporal_attention"):
        raise LunaInputError(
            "model takes a batch for the frames of a video (Stable Video Diffusion): its rows would see each other. "
            "Use an image model"
        )
    if isinstance(getattr(getattr(vae, "first_stage_model", None), "decoder", None), VideoDecoder):
        raise LunaInputError(
            "vae takes a batch for the frames of a video (Stable Video Diffusion): its rows would see each other. "
            "Use the vae of an image model"
        )


_MASKS_ARE_FRAMES = {"CosmosPredict2", "WAN22"}
"""Classes of models in ComfyUI that read a latent mask as frames of a video which are given."""


def mask_notices(model: ModelPatcher) -> list[str]:
    """What is said where latents are masked on a model that is told less noise the less of its frame may change."""
    if not _is_one_of(model, _MASKS_ARE_FRAMES):
        return []
    return [
        "ComfyUI tells this model less noise the less of a crop may change, because it reads a latent mask as frames "
        "that are given: regions come out noisier. Turn mask_latent off, or leave out refined_mask"
    ]


def _is_one_of(model: ModelPatcher, classes: set[str]) -> bool:
    """Whether a model is of one of ComfyUI's classes; by name, since not every release has them."""
    return any(kind.__name__ in classes for kind in type(model.model).__mro__)


_WHOLE_BATCH_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
"""Nodes of ComfyUI that skip a step where the batch changes little, by the key of their wrappers."""


def cache_notices(model: ModelPatcher) -> list[str]:
    """What is said of nodes on the model that decide for all rows of a call at once."""
    at_work = {key for wrappers in model.wrappers.values() for key, found in wrappers.items() if found}
    return [
        f"{name} on model decides for the whole batch which steps to skip: rows then depend on each other, and results "
        "on chunk_size. Leave it out where a row must come back the same in any company"
        for key, name in _WHOLE_BATCH_CACHES.items()
        if key in at_work
    ]


def latent_cell(vae: VAE) -> int:
    """px of the picture that sides of crops and tiles are multiples of: the VAE's ratio, and at least 8.

    Whatever does not fit the ratio a VAE cuts off on all sides, so that its pictures come back moved.
    """
    ratio = vae.spacial_compression_encode()
    return math.lcm(CELL_PX, ratio) if isinstance(ratio, int) else CELL_PX


def check_depth(model: ModelPatcher, vae: VAE, working_px: int, name: str, cfg: float) -> None:
    """A UNet halves the latent level by level: what is left of it must be enough for its normalisation.

    Only networks with one channel in a group of their normalisation are ever short of numbers, and only where one
    latent is sampled by itself. PyTorch says so in the middle of a run, in words of its own.

    Args:
        model, vae: ComfyUI MODEL and VAE.
        working_px: side of the crops or tiles, px; 0 where it is chosen among the models' own sizes.
        name: of the input that sets it.
        cfg: guidance; at 1 the negative prompt is left out, which otherwise stands beside the latent.

    Raises:
        LunaInputError: the innermost level would be a single px.
    """
    network = model.get_model_object("diffusion_model")
    blocks = getattr(network, "input_blocks", ())
    halvings = sum(type(part).__name__ == "Downsample" for block in blocks for part in block)
    ratio = vae.spacial_compression_encode()
    if not working_px or cfg != 1 or not halvings or not isinstance(ratio, int) or working_px > ratio * 2**halvings:
        return
    if any(norm.num_channels == norm.num_groups for norm in network.modules() if isinstance(norm, GroupNorm)):
        raise LunaInputError(
            f"{name} is {working_px}: of so small a crop this model's innermost layers see a single px, which they "
            f"cannot normalise. Use more than {ratio * 2**halvings}"
        )


def check_scaffold(noise_scaffold: dict[str, Any] | None, vae: VAE, image: Tensor) -> Tensor | None:
    """The noise of a scaffold LATENT, [1 or B,c,H,W] in latent px, or None when there is none.

    Raises:
        LunaInputError: it is no noise, its channels or size are not those the vae gives this picture, its batch does
            not fit, or it holds more than one frame.
    """
    if noise_scaffold is None:
        return None
    samples = noise_scaffold.get("samples") if isinstance(noise_scaffold, dict) else None
    if not is_plain(samples) or not samples.is_floating_point():
        raise LunaInputError(
            f"noise_scaffold is {shown(noise_scaffold)}: a latent of noise is needed, from Luna Noise Scaffold"
        )
    count, height, width, _ = image.shape
    wanted = latent_shape(vae, height, width)
    if tuple(samples.shape[1:]) != wanted or samples.shape[0] not in (1, count):
        raise LunaInputError(
            f"noise_scaffold has shape {list(samples.shape)}, but {count} picture(s) of {width}x{height} px need "
            f"[1 or {count}, {', '.join(map(str, wanted))}]: connect image and this vae to Luna Noise Scaffold"
        )
    if samples.dtype not in PICTURE_TYPES or not bool(torch.isfinite(samples).all()):
        raise LunaInputError("noise_scaffold holds values that are not numbers: make it anew with Luna Noise Scaffold")
    return samples[:, :, 0] if has_frames(vae) else samples


def fitted(detections: Detections, image: Tensor) -> Detections:
    """The detections at the size of a checked picture batch [B,H,W,C].

    Raises:
        LunaInputError: they were made on other pictures: another number or another aspect.
    """
    count, height, width, _ = image.shape
    if detections.is_unplaced:
        return Detections((), width, height, count)
    if detections.image_count != count:
        raise LunaInputError(
            f"detections were made on {detections.image_count} picture(s), image holds {count}: "
            "detect on this very batch (SEGS know only one picture)"
        )
    return detections.scaled_to(width, height)
