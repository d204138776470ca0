"""Stands in for the layers of a model while it samples, through ComfyUI's injections, and puts them back afterwards."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor, nn

from ..errors import LunaRuntimeError
from .lora_parts import Apply
from .row_loras import Call, Live, RowLayer, RowPlaces, Site

_KEY = "luna_row_loras"


def _apply(module: Any) -> Apply:
    """The module's operation with another weight. A convolution's own, since nodes change how it pads."""
    if hasattr(module, "_conv_forward"):
        return lambda x, weight: module._conv_forward(x, weight, None)
    return F.linear


def levels_of(model: Any) -> dict[str, int]:
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


def inject_parts(
    model: Any, factors: Any, layers: Mapping[str, Mapping[int, int]], rows: RowPlaces, levels: Mapping[str, int]
) -> Any:
    """A clone of the model whose layers give rows their parts.

    Args:
        model: ModelPatcher.
        factors: ModelPatcher around all parts.
        layers: by path, and by number of the stack, the place of the part among them.
        rows: of the sampling call.
        levels: see ``levels_of``.
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
