"""IP-Adapters on ComfyUI: files as managed models, and the patch that anchors every row of a batch."""

import copy
import hashlib
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ..errors import LunaInputError, LunaRuntimeError
from ..weight_files import inflated_bytes
from .attention import AnchoredAttention, AnchorOptions, KeyValues, Options, RowAnchors, Scaling
from .embeds import RowEmbeds
from .files import AdapterLayout, AdapterWeights, read_layout, split_weights
from .layer_weights import LayerWeights
from .layers import AttentionLayer, attention_layers
from .projection import AdapterNetwork

_KEY = "luna_ip_adapter"
_PASSES_OPTIONS = any(
    parameter.kind is parameter.VAR_KEYWORD or name == "transformer_options"
    for name, parameter in inspect.signature(optimized_attention).parameters.items()
)


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """An IP-Adapter whose weights ComfyUI loads and unloads like any model's.

    Attributes:
        name: of the file.
        layout: variant and sizes.
        patcher: ModelPatcher around an ``AdapterNetwork``.
        projection: digest of the image projection, which tells the embeds of one adapter from those of another.
    """

    name: str
    layout: AdapterLayout
    patcher: Any
    projection: bytes = b""

    @property
    def network(self) -> AdapterNetwork:
        return self.patcher.model

    def load(self) -> torch.device:
        """Brings the weights to where they compute."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.load_device

    def key_values(self, tokens: Tensor) -> KeyValues:
        """Keys and values [n,T,inner] of every layer for image tokens [n,T,D], in float32."""
        device = self.load()
        with torch.no_grad():
            return self.network.key_values(tokens.to(device, torch.float32))


def load_ip_adapter(path: str) -> IPAdapter:
    """Reads a .safetensors file, or a .bin file through PyTorch's weights-only unpickler.

    Raises:
        LunaInputError: the file is damaged, unsafe, or no supported IP-Adapter.
    """
    name = Path(path).name
    try:
        if claimed := inflated_bytes(path):
            raise LunaInputError(
                f"ip_adapter_file '{name}' is packed and would grow to {claimed} bytes: get the adapter as .safetensors"
            )
        state_dict = comfy.utils.load_torch_file(path, safe_load=True)
    except LunaInputError:
        raise
    except FileNotFoundError:
        raise LunaInputError(
            f"ip_adapter_file '{name}' is gone: press R to refresh the list and choose again"
        ) from None
    except pickle.UnpicklingError as error:
        raise LunaInputError(
            f"ip_adapter_file '{name}' was not opened: it is damaged, or it carries code or objects besides weights, "
            "which could harm this machine. Get the adapter as .safetensors, or from its author again"
        ) from error
    except Exception as error:
        # The loaders raise many kinds of error; the reason is passed on in full.
        raise LunaInputError(
            f"ip_adapter_file '{name}' cannot be read, the file is incomplete or damaged: download it again ({error})"
        ) from error
    return _from_weights(split_weights(state_dict, name))


_converted: dict[tuple[int, int], IPAdapter] = {}
"""Adapters of other packs' weights by the identity of a tensor of either half, for as long as both live."""


def as_ip_adapter(given: Any) -> IPAdapter:
    """Our own adapter as it is; those of the widely used loader packs, plain or inside their pipeline, converted once.

    Raises:
        LunaInputError: it is neither.
    """
    if isinstance(given, IPAdapter):
        return given
    weights = given
    if isinstance(weights, dict) and isinstance(weights.get("ipadapter"), dict):
        weights = weights["ipadapter"].get("model")
    if not isinstance(weights, dict) or not {"image_proj", "ip_adapter"} <= weights.keys():
        raise LunaInputError(
            f"ip_adapter is a {type(given).__name__} of unknown layout: "
            "connect Luna's IP-Adapter Loader, or an IPAdapter loader that gives image_proj and ip_adapter weights"
        )
    split = split_weights(weights, "of the connected loader")
    marks = [next(iter(half.values())) for half in (split.image_proj, split.ip_adapter)]
    place = (id(marks[0]), id(marks[1]))
    if place not in _converted:
        _converted[place] = _from_weights(split)
        for mark in marks:
            weakref.finalize(mark, _converted.pop, place, None)
    return _converted[place]


def _from_weights(weights: AdapterWeights) -> IPAdapter:
    layout = read_layout(weights)
    try:
        network = AdapterNetwork(weights, layout, comfy.ops.manual_cast)
    except RuntimeError as error:
        raise LunaInputError(
            f"ip_adapter_file '{weights.name}' looks like a {layout.variant} adapter but its weights do not fit one: "
            f"the file is damaged or of a variant Luna does not know ({error})"
        ) from error
    patcher = ModelPatcher(
        network,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return IPAdapter(weights.name, layout, patcher, _projection_digest(weights))


def _projection_digest(weights: AdapterWeights) -> bytes:
    """From the names and the small weights (norms and biases), which no two trainings share."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(weights.image_proj.items()):
        digest.update(f"{key}{tuple(value.shape)}".encode())
        if value.ndim == 1:
            digest.update(value.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().tobytes())
    return digest.digest()


def model_supports_anchoring(model: Any) -> bool:
    """True for a UNet with cross-attention to text (SD1.5, SDXL and their kin)."""
    return bool(attention_layers(model.get_model_object("diffusion_model")))


def layers_for(model: Any, adapter: IPAdapter) -> list[AttentionLayer]:
    """The model's layers, one per key and value pair of the adapter.

    Raises:
        LunaInputError: adapter and model are of different families, or the model was pruned.
    """
    layers = attention_layers(model.get_model_object("diffusion_model"))
    layout = adapter.layout
    widths = {layer.context_dim for layer in layers}
    if widths != {layout.cross_dim}:
        raise LunaInputError(
            f"ip_adapter '{adapter.name}' was made for {layout.family} (text tokens {layout.cross_dim} wide), "
            f"but model reads text tokens {'/'.join(map(str, sorted(widths)))} wide: "
            "use an adapter of the model's family"
        )
    if len(layers) != len(layout.numbers) or any(
        layer.inner_dim != inner for layer, inner in zip(layers, layout.inner_dims, strict=True)
    ):
        raise LunaInputError(
            f"ip_adapter '{adapter.name}' has {len(layout.numbers)} attention layers, model has {len(layers)}, "
            "or of other widths: a pruned or changed model needs an adapter of its own"
        )
    return layers


def patch_model(
    model: Any,
    adapter: IPAdapter,
    embeds: RowEmbeds,
    weight: float | Tensor = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    layer_weights: LayerWeights | None = None,
    scaling: Scaling = "V only",
    row_masks: Tensor | None = None,
) -> Any:
    """A clone of the model on which row i of a batch attends to embedding i.

    Args:
        model: ModelPatcher; not modified.
        adapter: whose keys and values act.
        embeds: one per row.
        weight: of all rows, or [N].
        start_percent, end_percent: part of the model's whole schedule in which anchors act.
        layer_weights: weights over the depth of the model.
        scaling: what the weight multiplies.
        row_masks: [N,H,W] in 0..1, where in its picture each row is anchored.

    Raises:
        LunaInputError: adapter and model do not fit together.
    """
    layers = layers_for(model, adapter)
    factors = (layer_weights or LayerWeights()).resolve(layers)
    sampling = model.get_model_object("model_sampling")
    options = AnchorOptions(
        weights=torch.as_tensor(weight, dtype=torch.float32).expand(len(embeds)),
        scaling=scaling,
        start_percent=start_percent,
        end_percent=end_percent,
        masks=row_masks,
    ).for_schedule(sampling)
    anchors = RowAnchors(embeds, options, adapter.key_values)
    patched = model.clone()
    for pair, (layer, factor) in enumerate(zip(layers, factors, strict=True)):
        if factor.factor:
            previous = _replacements(patched.model_options).get(layer.key)
            replacement = AnchoredAttention(anchors, pair, factor.factor, factor.swapped, _attention, previous)
            patched.set_model_attn2_replace(replacement, *layer.key)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _prepare_for(anchors))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _KEY, _roles_for(anchors))
    if not patched.get_callbacks(CallbacksMP.ON_CLONE, _KEY):
        patched.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _give_own_replacements)
    return patched


def _give_own_replacements(_: Any, clone: Any) -> None:
    """Gives a clone replacements of its own, to which other packs may add: newer ComfyUI lets clones share objects.

    ComfyUI calls this for every clone of a clone too, and for those it makes for further GPUs.
    """
    replacements = _replacements(clone.model_options)
    for key, replacement in replacements.items():
        if isinstance(replacement, AnchoredAttention):
            replacements[key] = copy.copy(replacement)


def _replacements(model_options: Mapping[str, Any]) -> dict[Any, Any]:
    """Cross-attention replacements on a model, by transformer (part, block, transformer) or block (part, block)."""
    return model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})


def _attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    passed = {"transformer_options": options} if _PASSES_OPTIONS else {}
    return optimized_attention(q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), **passed)


def _prepare_for(anchors: RowAnchors) -> Callable[..., Any]:
    """Makes keys and values before a sampling call and drops them after it, however it ends."""

    def outer_sample(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        if noise.shape[0] != len(anchors.embeds):
            raise LunaRuntimeError(
                f"ip_adapter: {len(anchors.embeds)} image embeds for a batch of {noise.shape[0]} latents: every latent "
                "needs its own embed. Give as many images as the latent batch holds"
            )
        try:
            anchors.prepare()
            guider = executor.class_obj
            # a node after Luna's may have changed the schedule, and with it the noise levels of the range
            options = anchors.options.for_schedule(guider.model_patcher.get_model_object("model_sampling"))
            with _during(anchors, guider=guider, options=options):
                return executor(noise, *args, **kwargs)
        finally:
            anchors.release()

    return outer_sample


_NEGATIVE = ("negative", "empty_negative_prompt")
"""Names under which ComfyUI's guiders keep prompts that pictures must not anchor."""


def _roles_for(anchors: RowAnchors) -> Callable[..., Any]:
    """Tells positive from negative prompts by the guider's own lists, in whatever order they are evaluated.

    Plain guidance evaluates [positive, negative], dual guidance [negative, middle, positive], and perturbed guidance
    or self-attention guidance a single one of them.
    """

    def calc_cond_batch(
        executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: Any
    ) -> Any:
        roles = _roles(getattr(anchors.guider, "conds", {}), conds)
        size = (x.shape[-2], x.shape[-1])  # some samplers change it on the way
        replacements = _replacements(model_options)
        with _during(anchors, roles=roles, latent_size=size, block_replacements=replacements):
            return executor(model, conds, x, timestep, model_options)

    return calc_cond_batch


def _roles(by_name: Mapping[str, Any], conds: Sequence[Any]) -> tuple[bool, ...]:
    """For each list of prompts whether pictures anchor it; a list the guider does not know goes by its place.

    On its own, a list that is not the guider's is one that a node on the model brought along: an empty prompt.
    """
    known = {id(entry): name not in _NEGATIVE for name, entry in by_name.items()}
    is_first_positive = len(conds) > 1 or "positive" not in by_name
    return tuple(known.get(id(entry), place == 0 and is_first_positive) for place, entry in enumerate(conds))


@contextmanager
def _during(anchors: RowAnchors, **state: Any) -> Iterator[None]:
    """Sets attributes of the anchors, and puts back what was there before."""
    before = {name: getattr(anchors, name) for name in state}
    for name, value in state.items():
        setattr(anchors, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(anchors, name, value)
