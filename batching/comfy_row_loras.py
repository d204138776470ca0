"""LoRAs of single rows on ComfyUI: its key maps and adapters read the files, its injections change the layers.

LoRA and LoCon, LoHa and LoKr, and differences of weights and biases are given per row. What depends on the model's
weights or replaces them (DoRA, GLoRA, OFT, BOFT, set weights), or changes anything but linear layers and convolutions,
takes a sampling call of its own, on a model with the LoRAs merged.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ..errors import LunaRuntimeError
from .concepts import Lora
from .row_loras import Apply, Call, Live, LowRank, Offset, RowLayer, RowPart, RowPlaces, Site, low_rank

log = logging.getLogger("luna")

LoraStack = tuple[Lora, ...]
StackKey = tuple[tuple[int, float], ...]
"""Weights (by identity) and strengths of a stack that acts."""

_KEY = "luna_row_loras"
_PER_ROW = ("lora", "loha", "lokr")
"""Adapters whose difference is the same whatever the weight."""
_OF_TEXT = ("lora_te", "lora_prior_te", "text_encoder", "text_model", "te_", "te1_", "te2_", "lycoris_text_encoder")


@dataclass(frozen=True, eq=False)
class _Patch:
    """One change of a LoRA.

    Attributes:
        layer: path of the module in the model.
        weight: name of its parameter.
        content: ComfyUI's adapter or tuple.
        offset: the part of the parameter that is meant.
        function: what ComfyUI does with the difference before it adds it, where the model's layout is another one.
    """

    layer: str
    weight: str
    content: Any
    offset: Offset | None
    function: Callable[[Tensor], Tensor] | None


@dataclass(eq=False)
class _Parsed:
    """A LoRA as it meets a model.

    Attributes:
        patches: in the file's order.
        obstacle: why it cannot be given per row.
    """

    name: str
    patches: list[_Patch] = field(default_factory=list)
    obstacle: str | None = None
    misfits: int = 0


class RowLoras:
    """The LoRAs of a run, whose weights are loaded once, and models on which they act per row or merged.

    Args:
        model: ModelPatcher, or any clone of the one that will be sampled; not modified.
        stacks: every stack of the run. A row's LoRAs are added up, whatever their order.
    """

    def __init__(self, model: Any, stacks: Iterable[LoraStack]) -> None:
        self.notices: list[str] = []
        self._weights = model.model.state_dict().keys()
        self._key_map = comfy.lora.model_lora_keys_unet(model.model, {})
        self._stacks = {_key(stack): stack for stack in stacks if _key(stack)}
        self._parsed: dict[int, _Parsed] = {}
        for stack in self._stacks.values():
            for lora in stack:
                if id(lora.weights) not in self._parsed:
                    self._parsed[id(lora.weights)] = self._parse(lora, model.model)
        self._numbers = {key: number for number, key in enumerate(self._per_row())}
        self._places: dict[str, dict[int, int]] = {}
        self._factors = self._load(model)
        self._levels = _levels(model.model)
        self._merged: dict[tuple[int, StackKey], tuple[Any, Any]] = {}
        self._add_notices()

    def needs_own_call(self, stack: LoraStack) -> bool:
        """Whether rows with this stack cannot share a call with others: sample them on ``merged``."""
        return _key(stack) != () and self._known(stack) not in self._numbers

    def patched(self, model: Any, stacks: Sequence[LoraStack]) -> Any:
        """A clone of the model for one sampling call whose row i has ``stacks[i]``; without any, the model itself.

        Raises:
            LunaRuntimeError: a stack needs a call of its own.
        """
        if any(map(self.needs_own_call, stacks)):
            raise LunaRuntimeError("loras of concepts: rows that need a call of their own were given to one for many")
        rows = RowPlaces([self._numbers[self._known(stack)] if _key(stack) else None for stack in stacks])
        at_work = set(rows.stacks) - {None}
        if not at_work:
            return model
        layers = {
            path: {number: part for number, part in parts.items() if number in at_work}
            for path, parts in self._places.items()
        }
        return _inject(model, self._factors, {path: parts for path, parts in layers.items() if parts}, rows, self._levels)

    def merged(self, model: Any, stack: LoraStack) -> Any:
        """A clone of the model with the LoRAs of a stack merged one after the other; the same one each time."""
        key = (id(model), _key(stack))
        if key not in self._merged:
            clone = model
            for lora in stack:
                clone = comfy.sd.load_lora_for_models(clone, None, lora.weights, lora.strength, 0)[0]
            self._merged[key] = (model, clone)  # the model too, so that no other takes its id
        return self._merged[key][1]

    def _known(self, stack: LoraStack) -> StackKey:
        key = _key(stack)
        if key not in self._stacks:
            raise LunaRuntimeError("loras of concepts: a stack was not among those of the run")
        return key

    def _per_row(self) -> list[StackKey]:
        return [
            key
            for key, stack in self._stacks.items()
            if not any(self._parsed[id(lora.weights)].obstacle for lora in stack)
        ]

    def _parse(self, lora: Lora, model: nn.Module) -> _Parsed:
        weights = comfy.lora_convert.convert_lora(lora.weights)
        parsed = _Parsed(lora.name)
        if any(key.endswith(".dora_scale") for key in weights):
            parsed.obstacle = "it is a DoRA, which depends on the model's weights"
        for target, content in comfy.lora.load_lora(weights, self._key_map, log_missing=False).items():
            key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            if key not in self._weights:
                continue
            layer, _, weight = key.rpartition(".")
            parsed.patches.append(_Patch(layer, weight, content, offset, function))
            parsed.obstacle = parsed.obstacle or _obstacle(parsed.patches[-1], model)
        if not parsed.patches:
            of_text = all(key.startswith(_OF_TEXT) for key in weights)
            self.notices.append(
                f"lora '{lora.name}' only changes the text encoder, so it does nothing here: give it to a LoRA loader "
                "on the CLIP that encodes the concept's prompt"
                if of_text
                else f"lora '{lora.name}' fits no layer of this model, so it does nothing: it was made for another one"
            )
        return parsed

    def _load(self, model: Any) -> Any:
        """A ModelPatcher around the parts of all layers, in the order that ``_places`` tells."""
        parts: list[RowPart] = []
        dtype = _compute_dtype(model.model)
        for key, number in self._numbers.items():
            layers: dict[str, list[tuple[_Patch, float, _Parsed]]] = {}
            for lora in self._stacks[key]:
                parsed = self._parsed[id(lora.weights)]
                for patch in parsed.patches if lora.strength else ():
                    layers.setdefault(patch.layer, []).append((patch, lora.strength, parsed))
            for path, patches in layers.items():
                part = _part(model.model.get_submodule(path), patches, dtype)
                if part is not None:
                    self._places.setdefault(path, {})[number] = len(parts)
                    parts.append(part)
        return _as_model(nn.ModuleList(parts), model.load_device, model.offload_device)

    def _add_notices(self) -> None:
        for parsed in self._parsed.values():
            if parsed.obstacle:
                self.notices.append(
                    f"lora '{parsed.name}' takes a sampling call of its own for its rows: {parsed.obstacle}"
                )
            elif parsed.misfits:
                self.notices.append(
                    f"lora '{parsed.name}': {parsed.misfits} of its {len(parsed.patches)} weights have another size "
                    "than the model's and are left out: it was made for another model"
                )


def _key(stack: LoraStack) -> StackKey:
    return tuple((id(lora.weights), lora.strength) for lora in stack if lora.strength)


def _as_model(parts: nn.ModuleList, load_device: torch.device, offload_device: torch.device) -> Any:
    """In a ModelPatcher, so that ComfyUI loads and unloads it like any model."""
    patcher = ModelPatcher(parts, load_device, offload_device)
    if hasattr(patcher, "cached_patcher_init"):  # how newer ComfyUI makes the copies for further GPUs
        patcher.cached_patcher_init = (lambda: _as_model(copy.deepcopy(parts), load_device, offload_device), ())
    return patcher


def _compute_dtype(model: Any) -> torch.dtype:
    """In which the model computes: weights in eight bits are cast before use."""
    dtype = model.manual_cast_dtype or model.get_dtype()
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _obstacle(patch: _Patch, model: nn.Module) -> str | None:
    """Why a change cannot be given per row."""
    content = patch.content
    if isinstance(content, WeightAdapterBase):
        if content.name not in _PER_ROW:
            return f"{content.name.upper()} depends on the model's weights"
        if content.name == "lora" and content.weights[5] is not None:
            return "it makes layers of the model wider"
    elif not isinstance(content, tuple) or content[0] != "diff":
        return "it replaces weights of the model"
    if patch.weight not in ("weight", "bias") or _weight_shape(model.get_submodule(patch.layer)) is None:
        return f"{patch.layer} is neither a linear layer nor a convolution"
    return None


def _weight_shape(module: Any) -> tuple[int, ...] | None:
    """(out, in, *kernel) of a linear layer or a convolution, however its weight is stored; None for other modules."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return (module.out_features, module.in_features)
    if hasattr(module, "_conv_forward") and not module.transposed:
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return None


def _part(
    module: Any, patches: Sequence[tuple[_Patch, float, _Parsed]], dtype: torch.dtype
) -> RowPart | None:
    """What the LoRAs of a stack add to one layer, or None where none fits."""
    shape = _weight_shape(module)
    assert shape is not None
    products: list[LowRank] = []
    given: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    made = []
    for patch, strength, parsed in patches:
        if patch.offset is not None and sum(patch.offset[1:]) > shape[patch.offset[0]]:
            parsed.misfits += 1
            continue
        product = _product(patch, strength, shape) if getattr(module, "groups", 1) == 1 else None
        if product is not None:
            products.append(product)
            continue
        difference = _difference(patch, strength, shape if patch.weight == "weight" else shape[:1])
        if not difference.any():
            parsed.misfits += 1
        elif isinstance(patch.content, WeightAdapterBase) and patch.content.name != "lora":
            made.append((partial(_make, patch, strength), [t for t in patch.content.weights if isinstance(t, Tensor)]))
        else:
            given[patch.weight].append(difference)
    weight, bias = (sum(found[1:], found[0]) if found else None for found in given.values())
    if not products and weight is None and bias is None and not made:
        return None
    return RowPart(shape, products, weight, bias, made, dtype)


def _product(patch: _Patch, strength: float, shape: Sequence[int]) -> LowRank | None:
    if patch.weight != "weight" or patch.function or getattr(patch.content, "name", None) != "lora":
        return None
    up, down, alpha, core = patch.content.weights[:4]
    scale = strength if alpha is None else strength * alpha / down.shape[0]
    return low_rank(up, down, core, scale, shape, patch.offset)


def _difference(patch: _Patch, strength: float, shape: Sequence[int]) -> Tensor:
    """What ComfyUI would add to the weight, in full."""
    return _calculated(patch, patch.content, strength, torch.zeros(tuple(shape)))


def _make(patch: _Patch, strength: float, tensors: Sequence[Tensor], whole: Tensor) -> Tensor:
    """The same from tensors that are where the model computes."""
    loaded = iter(tensors)
    weights = tuple(next(loaded) if isinstance(part, Tensor) else part for part in patch.content.weights)
    return _calculated(patch, type(patch.content)(patch.content.loaded_keys, weights), strength, whole)


def _calculated(patch: _Patch, content: Any, strength: float, whole: Tensor) -> Tensor:
    change = (strength, content, 1.0, patch.offset, patch.function)
    key = f"{patch.layer}.{patch.weight}"
    return comfy.lora.calculate_weight([change], whole, key, intermediate_dtype=whole.dtype)


def _apply(module: Any) -> Apply:
    """The module's operation with another weight. A convolution's own, since nodes change how it pads."""
    if hasattr(module, "_conv_forward"):
        return lambda x, weight: module._conv_forward(x, weight, None)
    return F.linear


def _levels(model: Any) -> dict[str, int]:
    """How many halvings lie before each module of a UNet, by path; empty for other models."""
    levels: dict[str, int] = {}
    if isinstance(model.diffusion_model, UNetModel):
        level = 0
        for path, module in model.diffusion_model.named_modules(prefix="diffusion_model"):
            levels[path] = level
            if path.count(".") == 3:  # diffusion_model.input_blocks.3.0, not those inside of residual blocks
                level += isinstance(module, Downsample) - isinstance(module, Upsample)
    return levels


def _site(path: str, levels: Mapping[str, int]) -> Site:
    return Site(path, levels.get(path), path.endswith((".attn2.to_k", ".attn2.to_v")))


def _inject(
    model: Any, factors: Any, layers: Mapping[str, Mapping[int, int]], rows: RowPlaces, levels: Mapping[str, int]
) -> Any:
    """A clone of the model whose layers give rows their parts.

    Args:
        model: ModelPatcher.
        factors: ModelPatcher around all parts.
        layers: by path, and by number of the stack, the place of the part among them.
        rows: of the sampling call.
        levels: see ``_levels``.
    """
    at_work: weakref.WeakKeyDictionary[nn.Module, tuple[Live, list[_Replaced]]] = weakref.WeakKeyDictionary()

    def inject(patcher: Any) -> None:
        eject(patcher)
        (mine,) = patcher.get_additional_models_with_key(_KEY)  # a copy for another GPU has its own
        live = Live()
        replaced = []
        for path, places in layers.items():
            module = patcher.model.get_submodule(path)
            parts = {number: mine.model[place] for number, place in places.items()}
            layer = RowLayer(module.forward, _apply(module), parts, rows, live, _site(path, levels))
            replaced.append(_Replaced(module, layer, module.__dict__.get("forward")))
            module.forward = layer
        at_work[patcher.model] = (live, replaced)

    def eject(patcher: Any) -> None:
        _, replaced = at_work.pop(patcher.model, (None, []))
        for layer in replaced:
            layer.restore()

    clone = model.clone()
    clone.set_additional_models(_KEY, [factors])
    clone.set_injections(_KEY, [PatcherInjection(inject, eject)])
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, _during_calls(at_work, rows))
    return clone


@dataclass(frozen=True, eq=False)
class _Replaced:
    """A module with a ``forward`` of ours.

    Attributes:
        before: what another node had put there, or None for that of its class.
    """

    module: nn.Module
    layer: RowLayer
    before: Any

    def restore(self) -> None:
        if self.module.__dict__.get("forward") is not self.layer:
            return  # whoever replaced it before us has already put back what was there
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


def _during_calls(at_work: Any, rows: RowPlaces) -> Callable[..., Any]:
    """Tells the layers of a call to the model, which is outside of what torch.compile sees."""

    def apply_model(
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        options = transformer_options or {}
        live, _ = at_work.get(executor.class_obj, (None, []))
        if live is None:
            raise LunaRuntimeError(
                "loras of concepts: ComfyUI ran the model without them: another node may load it by itself; take that "
                "node off the model"
            )
        entries = len(options.get("cond_or_uncond") or ()) or 1
        if x.shape[0] != entries * len(rows):
            raise LunaRuntimeError(
                f"loras of concepts: {len(rows)} rows, but the model is shown {x.shape[0] // entries} latents: use no "
                "node that samples parts of the batch (context windows), and give the patched model to these rows only"
            )
        live.call, before = Call(x.shape[0], x.shape[-2], x.shape[-1]), live.call
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            live.call = before

    return apply_model
