"""The patch that anchors every row of a batch, and the wrappers that tell it what is known of each call.

The frozen state of a call travels in ``transformer_options``: with the model, then with the sampling call, then with
each call of the model, each on a copy of the options of its own, whatever threads they run in.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ..errors import LunaInputError, LunaRuntimeError
from .anchors import ANCHORS, AnchorRun, Anchors, Scaling
from .attention import CALLS, AnchorCall, AnchoredAttention, Attention, Options, Sigmas
from .comfy_adapter import IPAdapter
from .comfy_flux import CARRIES_FLUX_ADAPTERS, flux_key_values, flux_layers_for, is_flux, patch_blocks
from .embeds import RowEmbeds
from .layer_weights import LayerWeights
from .layers import AttentionLayer, attention_layers, is_kolors

_KEY = "luna_ip_adapter"
_PASSES_OPTIONS = any(
    parameter.kind is parameter.VAR_KEYWORD or name == "transformer_options"
    for name, parameter in inspect.signature(optimized_attention).parameters.items()
)


def unanchored(model: ModelPatcher, adapter: IPAdapter) -> str | None:
    """Why nothing can be anchored on this model, None where it can: UNets with cross-attention to text, and Flux."""
    network = model.get_model_object("diffusion_model")
    if attention_layers(network):
        return None
    if not is_flux(network):
        return "model has no UNet cross-attention and is no Flux, so ip_adapter cannot act on it"
    if not adapter.layout.is_flux:
        return (
            f"model is Flux, which has no UNet cross-attention for ip_adapter '{adapter.name}' of "
            f"{adapter.layout.family} to act on; those of XLabs and InstantX do"
        )
    if not CARRIES_FLUX_ADAPTERS:
        return "this ComfyUI is too old to carry ip_adapter on Flux; 0.3.75 and newer do"
    return None


def layers_for(model: ModelPatcher, adapter: IPAdapter) -> list[AttentionLayer]:
    """The model's layers, one per key and value pair of the adapter.

    Raises:
        LunaInputError: adapter and model are of different families, or the model was pruned.
    """
    network, layout = model.get_model_object("diffusion_model"), adapter.layout
    if layout.is_flux and is_flux(network):
        return flux_layers_for(network, adapter)
    layers = attention_layers(network)
    widths = {layer.context_dim for layer in layers}
    if widths != {layout.cross_dim} or (layout.kind == "kolors" and not is_kolors(network)):
        reads = f"reads text tokens {'/'.join(map(str, sorted(widths)))} wide" if layers else "has no such layers"
        raise LunaInputError(
            f"ip_adapter '{adapter.name}' was made for {layout.family} (text tokens {layout.cross_dim} wide), "
            f"but model {'is SDXL' if widths == {layout.cross_dim} else reads}: use an adapter of the model's family"
        )
    if tuple(layer.inner_dim for layer in layers) != layout.inner_dims:
        raise LunaInputError(
            f"ip_adapter '{adapter.name}' has {len(layout.numbers)} attention layers, model has {len(layers)}, "
            "or of other widths: a pruned or changed model needs an adapter of its own"
        )
    return layers


def patch_model(
    model: ModelPatcher,
    adapter: IPAdapter,
    embeds: RowEmbeds,
    weight: float | Tensor = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    layer_weights: LayerWeights | None = None,
    scaling: Scaling = "V only",
    row_masks: Tensor | None = None,
) -> ModelPatcher:
    """A clone of the model on which row i of a batch attends to embedding i.

    Args:
        model: not modified.
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
    layers, is_on_flux = layers_for(model, adapter), adapter.layout.is_flux
    anchors = Anchors(
        embeds=embeds,
        weights=torch.as_tensor(weight, dtype=torch.float32).expand(len(embeds)),
        factors=(layer_weights or LayerWeights()).resolve(layers),
        key_values_of=flux_key_values(model, adapter) if is_on_flux else adapter.key_values,
        scaling=scaling,
        start_percent=start_percent,
        end_percent=end_percent,
        masks=row_masks,
    )
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    before: tuple[Anchors, ...] = options.get(ANCHORS, ())
    options[ANCHORS] = (*before, anchors)
    if is_on_flux:
        patch_blocks(patched, adapter, layers, len(before))
    else:
        _patch_attention(patched, layers, anchors, len(before))
    if not before:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _outer_sample)
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _KEY, _calc_cond_batch)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, _apply_model)
        patched.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _give_own_replacements)
    return patched


def _patch_attention(patched: ModelPatcher, layers: Sequence[AttentionLayer], anchors: Anchors, patch: int) -> None:
    """Replaces the cross-attention of every layer with a weight."""
    for pair, (layer, factor) in enumerate(zip(layers, anchors.factors, strict=True)):
        if factor.factor:
            previous = _replacements(patched.model_options["transformer_options"]).get(layer.key)
            patched.set_model_attn2_replace(AnchoredAttention(patch, pair, _attention, previous), *layer.key)


def _give_own_replacements(_: ModelPatcher, clone: ModelPatcher) -> None:
    """Gives a clone replacements of its own, to which other packs may add: newer ComfyUI lets clones share objects.

    ComfyUI calls this for every clone of a clone too, and for those it makes for further GPUs.
    """
    replacements = _replacements(clone.model_options["transformer_options"])
    for key, replacement in replacements.items():
        if isinstance(replacement, AnchoredAttention):
            replacements[key] = copy.copy(replacement)


def _replacements(options: Options) -> dict[Any, Attention]:
    """Cross-attention replacements on a model, by transformer (part, block, transformer) or block (part, block)."""
    return options.get("patches_replace", {}).get("attn2", {})


def _attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    passed = {"transformer_options": options} if _PASSES_OPTIONS else {}
    return optimized_attention(q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), **passed)


# -- what is known, from the whole sampling call to a call of the model ----------------------------


def _outer_sample(executor: WrapperExecutor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Makes keys and values before a sampling call and drops them after it, however it ends."""
    guider = cast(CFGGuider, executor.class_obj)
    options = guider.model_options["transformer_options"]  # the guider's own for this call
    given: tuple[Anchors, ...] = options[ANCHORS]
    for anchors in given:
        if noise.shape[0] != len(anchors.embeds):
            raise LunaRuntimeError(
                f"ip_adapter: {len(anchors.embeds)} image embeds for a batch of {noise.shape[0]} latents: every latent "
                "needs its own embed. Give as many images as the latent batch holds"
            )
    # a node after Luna's may have changed the schedule, and with it the noise levels of the range
    sampling = guider.model_patcher.get_model_object("model_sampling")
    runs = [_run(anchors, sampling, guider) for anchors in given]
    options[ANCHORS] = tuple(runs)
    try:
        return executor(noise, *args, **kwargs)
    finally:
        options[ANCHORS] = given
        for run in runs:
            run.release()


def _calc_cond_batch(
    executor: WrapperExecutor, model: BaseModel, conds: list[Any], x: Tensor, timestep: Tensor, model_options: Any
) -> list[Tensor]:
    """Tells positive from negative prompts by the guider's own lists, in whatever order they are evaluated.

    Plain guidance evaluates [positive, negative], dual guidance [negative, middle, positive], and perturbed guidance
    or self-attention guidance a single one of them.
    """
    options = model_options["transformer_options"]
    runs = tuple(  # some samplers change the size on the way
        replace(run, roles=_roles(getattr(run.guider, "conds", {}), conds), latent_size=(x.shape[-2], x.shape[-1]))
        for run in (_run(given, model.model_sampling) for given in options[ANCHORS])
    )
    known = model_options | {"transformer_options": options | {ANCHORS: runs}}
    return executor(model, conds, x, timestep, known)


def _apply_model(
    executor: WrapperExecutor,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Tensor | None,
    control: object,
    transformer_options: Options,
    **more: object,
) -> Tensor:
    """Arranges what the layers need for the rows of this call, on its device and in its dtype."""
    model = cast(BaseModel, executor.class_obj)
    runs = [_run(given, model.model_sampling) for given in transformer_options[ANCHORS]]
    replacements = _replacements(transformer_options)
    known = AnchorCall(
        entries=tuple(transformer_options["cond_or_uncond"]),
        size=(x.shape[-2], x.shape[-1]),
        resting=_resting(runs, replacements, transformer_options),
        block_replacements={key: replacement for key, replacement in replacements.items() if len(key) == 2},
    )
    dtype = model.manual_cast_dtype or model.get_dtype()
    calls = tuple(run.call(known, x, dtype) for run in runs)
    return executor(x, t, c_concat, c_crossattn, control, {**transformer_options, CALLS: calls}, **more)


def _run(given: Anchors | AnchorRun, model_sampling: Any, guider: object = None) -> AnchorRun:
    """The anchors of the sampling call under way; made anew where a node calls the model outside of one."""
    if isinstance(given, AnchorRun):
        return given
    start, end = (float(model_sampling.percent_to_sigma(p)) for p in (given.start_percent, given.end_percent))
    return given.run((start, end), guider)


def _resting(runs: Sequence[AnchorRun], replacements: Mapping[Any, Attention], options: Options) -> tuple[Sigmas, ...]:
    """The ranges of noise levels in which this call is not; reads its level back from the device where one asks."""
    ours = [replacement for replacement in replacements.values() if isinstance(replacement, AnchoredAttention)]
    ranges = {run.sigmas for run in runs}.union(*(replacement.ranges() for replacement in ours))
    ranges = {(start, end) for start, end in ranges if start < 1e6 or end > 0}
    if not ranges or "sigmas" not in options:
        return ()
    sigma = float(options["sigmas"].max())
    return tuple(sorted((start, end) for start, end in ranges if not end <= sigma <= start))


NEGATIVE = ("negative", "empty_negative_prompt")
"""Names under which ComfyUI's guiders keep prompts that pictures must not anchor."""


def _roles(by_name: Mapping[str, Any], conds: Sequence[Any]) -> tuple[bool, ...]:
    """For each list of prompts whether pictures anchor it; a list the guider does not know goes by its place.

    On its own, a list that is not the guider's is one that a node on the model brought along: an empty prompt.
    """
    known = {id(entry): name not in NEGATIVE for name, entry in by_name.items()}
    is_first_positive = len(conds) > 1 or "positive" not in by_name
    return tuple(known.get(id(entry), place == 0 and is_first_positive) for place, entry in enumerate(conds))
