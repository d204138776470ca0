"""What an IP-Adapter file holds: its variant, sizes and weights, read from key names and shapes alone."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..errors import LunaInputError
from ..weight_files import weight_fault

Variant = Literal["plus", "plain", "full_face", "mlp"]
Kind = Literal["unet", "kolors", "xlabs", "instantx"]
StateDict = dict[str, Tensor]

_PREFIXES = {
    "image_proj.": "image_proj",
    "ip_adapter.": "ip_adapter",
    "adapter_modules.": "ip_adapter",
    "ip_adapter_proj_model.": "image_proj",  # XLabs
}
HEAD_DIM = 64
"""Width of an attention head of a resampler."""
_FULL_FACE_TOKENS = 257
_FACE_IDENTITY = 512
_FLUX_WIDTH = 4096
_KOLORS_WIDTH = 2048
"""Of the resampler of Kolors adapters; those of SDXL are 1280 wide."""
_MODELS = {768: "SD1.5", 2048: "SDXL", _FLUX_WIDTH: "Flux"}
_NUMBER = "(0|[1-9][0-9]{0,3})"
_PAIR = re.compile(rf"{_NUMBER}\.to_([kv])_ip\.(weight|bias)")
_XLABS_PAIR = re.compile(rf"double_blocks\.{_NUMBER}\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)")
_MOST_LAYERS = 64
"""Of a resampler; the published ones have 4."""


@dataclass(frozen=True)
class AdapterWeights:
    """The two halves of a file.

    Attributes:
        name: for messages.
        image_proj: weights that turn an encoded picture into tokens, keys without prefix.
        ip_adapter: ``<number>.to_k_ip.weight`` and ``<number>.to_v_ip.weight`` [inner, cross_dim]; in XLabs' files
            also ``.bias`` [inner].
    """

    name: str
    image_proj: StateDict
    ip_adapter: StateDict


@dataclass(frozen=True)
class AdapterLayout:
    """Variant and sizes.

    Attributes:
        variant: "plus" (resampler), "plain" (one linear layer), "full_face" (MLP over all tokens) or "mlp" (MLP over
            the pooled embed).
        clip_dim: width of the CLIP vision output it was trained on.
        cross_dim: width of its tokens, which is that of the model's text tokens: 768, 2048 or 4096.
        tokens: image tokens per picture.
        numbers: of the key and value pairs, ascending; pair k belongs to the k-th cross-attention of the model.
        inner_dims: width of each pair's attention layer.
        kind: of network it acts in, and by whose convention.
    """

    variant: Variant
    clip_dim: int
    cross_dim: int
    tokens: int
    numbers: tuple[int, ...]
    inner_dims: tuple[int, ...]
    kind: Kind = "unet"

    @property
    def is_flux(self) -> bool:
        """Whether it acts in Flux' blocks instead of a UNet's cross-attention."""
        return self.kind in ("xlabs", "instantx")

    @property
    def family(self) -> str:
        """The family of models it belongs to."""
        if self.kind == "kolors":
            return "Kolors"
        return _MODELS.get(self.cross_dim, f"models with text tokens of {self.cross_dim}")

    @property
    def reads_pooled(self) -> bool:
        """True where it takes the pooled image embed, False for the penultimate layer's hidden states."""
        return self.variant in ("plain", "mlp")


def split_weights(state_dict: object, name: str) -> AdapterWeights:
    """Sorts a loaded file into its halves, whether its keys are flat (safetensors) or nested (pickles).

    Raises:
        LunaInputError: it is no IP-Adapter, or what should be a weight is none.
    """
    if not isinstance(state_dict, Mapping):
        raise LunaInputError(f"ip_adapter_file '{name}' holds a {type(state_dict).__name__}, so it is no IP-Adapter")
    halves: dict[str, StateDict] = {"image_proj": {}, "ip_adapter": {}}
    for half, key, value in _entries(state_dict):
        if fault := weight_fault(value):
            raise LunaInputError(
                f"ip_adapter_file '{name}': {half}.{key} {fault}: the file is damaged or no IP-Adapter; download it "
                "again"
            )
        halves[half][key] = value
    missing = [half for half, weights in halves.items() if not weights]
    if missing:
        shown = ", ".join(map(str, list(state_dict)[:3])) or "nothing"
        raise LunaInputError(
            f"ip_adapter_file '{name}' is no IP-Adapter: it has no {' and no '.join(missing)} weights "
            f"(found {shown}, …). Put an IP-Adapter file, such as ip-adapter-plus_sdxl_vit-h.safetensors, "
            "into models/ipadapter"
        )
    return AdapterWeights(name, halves["image_proj"], halves["ip_adapter"])


def _entries(state_dict: Mapping[Any, Any]) -> Iterator[tuple[str, str, Any]]:
    """(half, key without prefix, value) of everything that belongs to one of the halves."""
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            half = "ip_adapter" if key == "adapter_modules" else key
            if half in ("image_proj", "ip_adapter"):
                yield from ((half, str(inner), weight) for inner, weight in value.items())
            continue
        if not isinstance(key, str):
            continue
        if match := _XLABS_PAIR.fullmatch(key):
            yield "ip_adapter", f"{match[1]}.to_{match[2]}_ip.{match[3]}", value
        for prefix, half in _PREFIXES.items():
            if key.startswith(prefix):
                yield half, key.removeprefix(prefix), value


def read_layout(weights: AdapterWeights) -> AdapterLayout:
    """Finds variant and sizes.

    Raises:
        LunaInputError: the variant is not supported (with the reason), or the weights do not fit together.
    """
    _refuse_unsupported(weights)
    numbers, inner_dims, cross_dim = _pairs(weights)
    projection = weights.image_proj
    _check_width(weights, cross_dim)
    if cross_dim == _FLUX_WIDTH:
        return _flux_layout(weights, numbers, inner_dims)
    if "latents" in projection and "layers.0.0.to_q.weight" in projection:
        _, tokens, dim = _shape(weights, "latents", 3)
        _, clip_dim = _shape(weights, "proj_in.weight", 2)
        _check_resampler(weights)
        kind: Kind = "kolors" if dim == cross_dim == _KOLORS_WIDTH else "unet"
        return AdapterLayout("plus", clip_dim, cross_dim, tokens, numbers, inner_dims, kind)
    if "proj.3.weight" in projection:
        _, clip_dim = _shape(weights, "proj.0.weight", 2)
        return AdapterLayout("full_face", clip_dim, cross_dim, _FULL_FACE_TOKENS, numbers, inner_dims)
    if "proj.weight" in projection and "norm.weight" in projection:
        rows, clip_dim = _shape(weights, "proj.weight", 2)
        return AdapterLayout("plain", clip_dim, cross_dim, rows // cross_dim, numbers, inner_dims)
    raise LunaInputError(
        f"ip_adapter_file '{weights.name}' has an image projection Luna does not know "
        f"({', '.join(sorted(projection)[:4])}, …): use a plain, plus, plus-face, full-face or composition "
        "adapter for SD1.5 or SDXL, or one of XLabs or InstantX for Flux"
    )


def _flux_layout(weights: AdapterWeights, numbers: tuple[int, ...], inner_dims: tuple[int, ...]) -> AdapterLayout:
    """XLabs: one linear layer, and biases; InstantX: an MLP, and none. Blocks are numbered from 0 in both."""
    projection, biased = weights.image_proj, any(key.endswith(".bias") for key in weights.ip_adapter)
    if numbers != tuple(range(len(numbers))):
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' numbers its {len(numbers)} layers from {numbers[0]} to {numbers[-1]}: "
            "those of Flux count from 0 without a gap; the file is damaged, download it again"
        )
    if biased and "proj.weight" in projection:
        rows, clip_dim = _shape(weights, "proj.weight", 2)
        return AdapterLayout("plain", clip_dim, _FLUX_WIDTH, rows // _FLUX_WIDTH, numbers, inner_dims, "xlabs")
    if not biased and "proj.0.weight" in projection and "proj.2.weight" in projection:
        _, clip_dim = _shape(weights, "proj.0.weight", 2)
        rows, _ = _shape(weights, "proj.2.weight", 2)
        return AdapterLayout("mlp", clip_dim, _FLUX_WIDTH, rows // _FLUX_WIDTH, numbers, inner_dims, "instantx")
    raise LunaInputError(
        f"ip_adapter_file '{weights.name}' has image tokens {_FLUX_WIDTH} wide, as adapters of Flux have, but is "
        f"neither XLabs' nor InstantX's ({', '.join(sorted(projection)[:4])}, …): use one of those"
    )


def resampler_width(weights: AdapterWeights) -> int:
    """Of the attention in a plus file's resampler, all heads together."""
    return _shape(weights, "layers.0.0.to_q.weight", 2)[0]


def resampler_depth(weights: AdapterWeights) -> int:
    """Layers of a plus file's resampler."""
    return len(_layer_numbers(weights))


def _layer_numbers(weights: AdapterWeights) -> set[str]:
    return {key.split(".")[1] for key in weights.image_proj if key.startswith("layers.")}


def _check_resampler(weights: AdapterWeights) -> None:
    """Its layers are numbered from 0 without a gap, and their width is a whole number of heads."""
    numbers = _layer_numbers(weights)
    if len(numbers) > _MOST_LAYERS or numbers != {str(number) for number in range(len(numbers))}:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' numbers the layers of its image projection "
            f"{', '.join(sorted(numbers)[:5])}, …: 0 to at most {_MOST_LAYERS - 1} without a gap are needed; the file "
            "is damaged, download it again"
        )
    width = resampler_width(weights)
    if width % HEAD_DIM:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' has an image projection {width} wide, which is no whole number of "
            f"attention heads of {HEAD_DIM}: the file is damaged or of a variant Luna does not know"
        )


def _refuse_unsupported(weights: AdapterWeights) -> None:
    projection = weights.image_proj
    if any("to_q_lora" in key or "to_k_lora" in key for key in weights.ip_adapter) or any(
        key.startswith("perceiver_resampler.") for key in projection
    ):
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' is a FaceID adapter, which is not supported because it needs a face "
            "identity network and a LoRA besides CLIP vision: use a plus-face or full-face adapter"
        )
    if "latents" in projection and _width_in(projection) == _FACE_IDENTITY:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' reads face identity embeds {_FACE_IDENTITY} wide (InstantID and its "
            "kin), which is not supported because it needs a face identity network: use a plus-face or full-face "
            "adapter"
        )
    if "proj.2.weight" in projection and _width_in(projection, "proj.0.weight") == _FACE_IDENTITY:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' is a FaceID portrait adapter, which is not supported because it reads "
            "face identity embeds instead of CLIP vision: use a plus-face or full-face adapter"
        )
    if any(key.startswith("time_embedding.") for key in projection):
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' is an adapter of Stable Diffusion 3.5, which is not supported because "
            "its image tokens change with every step: use an SD1.5, SDXL or Flux adapter with its model"
        )


def _width_in(projection: StateDict, key: str = "proj_in.weight") -> int:
    weight = projection.get(key)
    return 0 if weight is None or weight.ndim != 2 else weight.shape[1]


def _pairs(weights: AdapterWeights) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    found: dict[str, set[int]] = {"k": set(), "v": set()}
    biases = 0
    for key in weights.ip_adapter:
        match = _PAIR.fullmatch(key)
        if match and match[3] == "weight":
            found[match[2]].add(int(match[1]))
        elif match:
            biases += 1
        elif "to_k_ip" in key or "to_v_ip" in key:
            raise LunaInputError(
                f"ip_adapter_file '{weights.name}' holds ip_adapter.{key}, which is no layer Luna knows: the file is "
                "damaged or of another kind"
            )
    if not found["k"] or found["k"] != found["v"]:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' holds {len(found['k'])} key and {len(found['v'])} value layers: "
            "the file is damaged or no IP-Adapter; download it again"
        )
    numbers = tuple(sorted(found["k"]))
    shapes, values = (
        [weights.ip_adapter[f"{number}.to_{kind}_ip.weight"].shape for number in numbers] for kind in "kv"
    )
    if shapes != values or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' mixes layers of different widths: the file is damaged; download it again"
        )
    if biases not in ((0, 2 * len(numbers)) if shapes[0][1] == _FLUX_WIDTH else (0,)):
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' has {biases} biases for {2 * len(numbers)} key and value layers: the "
            "file is damaged or of another kind"
        )
    return numbers, tuple(shape[0] for shape in shapes), shapes[0][1]


_WIDTH_KEYS = ("norm_out.weight", "proj.3.weight", "norm.weight")
"""The last norm of each projection is as wide as its tokens."""


def _check_width(weights: AdapterWeights, cross_dim: int) -> None:
    for key in _WIDTH_KEYS:
        if key in weights.image_proj and (width := _shape(weights, key, 1)[0]) != cross_dim:
            raise LunaInputError(
                f"ip_adapter_file '{weights.name}' projects pictures to tokens {width} wide, but its attention layers "
                f"read {cross_dim}: the file is damaged; download it again"
            )
    for key in ("proj.weight", "proj.2.weight"):
        linear = weights.image_proj.get(key)
        if linear is not None and linear.shape[0] % cross_dim:
            raise LunaInputError(
                f"ip_adapter_file '{weights.name}' projects pictures to {linear.shape[0]} numbers, which are no whole "
                f"tokens {cross_dim} wide: the file is damaged; download it again"
            )


def _shape(weights: AdapterWeights, key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a weight of the image projection that must be there and have so many dimensions."""
    shape = tuple(weights.image_proj[key].shape) if key in weights.image_proj else None
    if shape is None:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' lacks image_proj.{key}: the file is damaged; download it again"
        )
    if len(shape) != dimensions:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}': image_proj.{key} has shape {list(shape)}, {dimensions} dimensions are "
            "needed: the file is damaged; download it again"
        )
    return shape
