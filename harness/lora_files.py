"""Seeded LoRA files in the layouts that trainers write, for the layers of a given model."""

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import comfy.utils
import torch
from torch import Tensor

from harness.seeding import StateDict, generator_for

Style = Literal["kohya", "diffusers", "peft", "generic"]
Kind = Literal["lora", "tucker", "loha", "lokr", "glora", "oft", "boft", "dora", "diff", "bias", "set", "reshape"]

SD_LINEAR = ("*attn?.to_q", "*attn?.to_k", "*attn?.to_v", "*attn?.to_out.0", "*ff.net.*", "*proj_in", "*proj_out")
SD_CONVOLUTIONS = ("*in_layers.2", "*out_layers.3", "*op", "*conv", "*skip_connection", "*input_blocks.0.0")
SD_EMBEDDINGS = ("*time_embed.*", "*emb_layers.1", "*label_emb.*")
EVERYTHING = (*SD_LINEAR, *SD_CONVOLUTIONS, *SD_EMBEDDINGS)
_GAIN = 0.3
"""Of a difference over the random weights of the tiny models."""


@dataclass(frozen=True)
class Target:
    """A weight that a file changes.

    Attributes:
        name: in the file, before the ending.
        shape: of the part of the weight that is meant.
    """

    name: str
    shape: tuple[int, ...]


def targets(model: Any, style: Style, layers: Sequence[str]) -> list[Target]:
    """The weights of a model whose paths match patterns, by their names in a style of file."""
    weights = {key: w for key, w in model.model.state_dict().items() if key.endswith(".weight") and w.ndim > 1}
    wanted = {key for key in weights if any(fnmatch.fnmatch(key.removesuffix(".weight"), layer) for layer in layers)}
    if style == "diffusers":
        return list(_diffusers_targets(model, weights, wanted))
    rename: Callable[[str], str] = (
        (lambda key: f"lora_unet_{key.replace('.', '_')}")
        if style == "kohya"
        else (lambda key: f"diffusion_model.{key}")
    )
    bare = {key: key.removeprefix("diffusion_model.").removesuffix(".weight") for key in sorted(wanted)}
    return [Target(rename(name), tuple(weights[key].shape)) for key, name in bare.items()]


def _diffusers_targets(model: Any, weights: StateDict, wanted: set[str]) -> Any:
    config = model.model.model_config.unet_config
    if config.get("image_model") == "flux":
        for name, to in sorted(comfy.utils.flux_to_diffusers(config, output_prefix="diffusion_model.").items()):
            key, offset = (to, None) if isinstance(to, str) else to[:2]
            if key in wanted:
                shape = list(weights[key].shape)
                if offset and offset[1] + offset[2] > shape[offset[0]]:
                    continue  # the tables expect an mlp four times as wide as the model
                if offset:
                    shape[offset[0]] = offset[2]
                yield Target(f"transformer.{name.removesuffix('.weight')}", tuple(shape))
        return
    for name, to in sorted(comfy.utils.unet_to_diffusers(config).items()):
        key = f"diffusion_model.{to}"
        if key in wanted and re.search(r"\.to_(q|k|v|out\.0)\.weight$", name):
            processor = name.removesuffix(".weight").removesuffix(".0").replace(".to_", ".processor.to_")
            yield Target(f"unet.{processor}", tuple(weights[key].shape))


_ENDINGS = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "generic": (".lora_up.weight", ".lora_down.weight"),
    "peft": (".lora_B.weight", ".lora_A.weight"),
}


def lora_file(
    model: Any,
    name: str,
    layers: Sequence[str] = SD_LINEAR,
    ranks: Sequence[int] = (4,),
    style: Style = "kohya",
    kind: Kind = "lora",
    alpha: bool = True,
    gain: float = _GAIN,
) -> StateDict:
    """A file's weights.

    Args:
        model: ModelPatcher.
        name: seeds the values.
        layers: patterns of paths in the model.
        ranks: taken in turn by the layers.
        style: of the keys.
        kind: what the file holds for each layer.
        alpha: with alphas that are not the rank.
        gain: size of the differences.
    """
    generator = generator_for("lora file", name)
    found = targets(model, style, layers)
    assert found, f"no layer of the model matches {layers}"
    file: StateDict = {}
    flux = model.model.model_config.unet_config.get("image_model") == "flux"
    endings = (
        _ENDINGS["peft" if flux and style == "diffusers" else style]
        if style != "diffusers" or flux
        else (
            "_lora.up.weight",
            "_lora.down.weight",
        )
    )
    for place, target in enumerate(found):
        rank = ranks[place % len(ranks)]
        weights = _MAKERS[kind](target.shape, rank, generator, gain, endings)
        file |= {f"{target.name}{ending}": value for ending, value in weights.items()}
        if alpha and kind not in ("diff", "bias", "set"):
            file[f"{target.name}.alpha"] = torch.tensor(rank * 0.75)
    return file


def _normal(generator: torch.Generator, deviation: float, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator) * deviation


def _lora(
    shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, endings: tuple[str, str]
) -> StateDict:
    kernel, fan_in = shape[2:], torch.Size(shape[1:]).numel()
    up = _normal(generator, gain / rank**0.5, shape[0], rank, *(1,) * len(kernel))
    return {endings[0]: up, endings[1]: _normal(generator, fan_in**-0.5, rank, *shape[1:])}


def _tucker(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    ones = (1,) * len(shape[2:])
    fan = rank * torch.Size(shape[2:]).numel()
    return {
        ".lora_up.weight": _normal(generator, gain / rank**0.5, shape[0], rank, *ones),
        ".lora_mid.weight": _normal(generator, fan**-0.5, rank, rank, *shape[2:]),
        ".lora_down.weight": _normal(generator, shape[1] ** -0.5, rank, shape[1], *ones),
    }


def _loha(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    fan_in = torch.Size(shape[1:]).numel()
    return {
        f".hada_w{half}_{side}": _normal(generator, scale, *size)
        for half, scale in ((1, (gain / rank) ** 0.5), (2, fan_in**-0.25))
        for side, size in (("a", (shape[0], rank)), ("b", (rank, fan_in)))
    }


def _lokr(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    out, inner = shape[0] // 4, shape[1] // 4
    fan = inner * torch.Size(shape[2:]).numel()
    return {
        ".lokr_w1": _normal(generator, 0.5, 4, 4),
        ".lokr_w2_a": _normal(generator, gain / rank**0.5, out, rank),
        ".lokr_w2_b": _normal(generator, fan**-0.5, rank, fan),
    }


def _glora(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    fan_in = torch.Size(shape[1:]).numel()
    sizes = {"a1": (shape[1], rank), "a2": (rank, shape[1]), "b1": (shape[0], rank), "b2": (rank, fan_in)}
    return {f".{half}.weight": _normal(generator, gain / size[1] ** 0.5, *size) for half, size in sizes.items()}


def _oft(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    return {".oft_blocks": _normal(generator, gain / 2, 4, shape[0] // 4, shape[0] // 4)}


def _boft(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    return {".oft_blocks": _normal(generator, gain / 2, 2, shape[0] // 4, 4, 4)}


def _dora(
    shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, endings: tuple[str, str]
) -> StateDict:
    ones = (1,) * (len(shape) - 1)
    return _lora(shape, rank, generator, gain, endings) | {".dora_scale": 1 + _normal(generator, 0.2, shape[0], *ones)}


def _diff(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    return {".diff": _normal(generator, gain / torch.Size(shape[1:]).numel() ** 0.5, *shape)}


def _bias(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    return {".diff_b": _normal(generator, gain, shape[0])}


def _set(shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, *_: Any) -> StateDict:
    return {".set_weight": _normal(generator, torch.Size(shape[1:]).numel() ** -0.5, *shape)}


def _reshape(
    shape: tuple[int, ...], rank: int, generator: torch.Generator, gain: float, endings: tuple[str, str]
) -> StateDict:
    return _lora(shape, rank, generator, gain, endings) | {".reshape_weight": torch.tensor(shape)}


_MAKERS: dict[Kind, Callable[..., StateDict]] = {
    "lora": _lora,
    "tucker": _tucker,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
    "dora": _dora,
    "diff": _diff,
    "bias": _bias,
    "set": _set,
    "reshape": _reshape,
}
