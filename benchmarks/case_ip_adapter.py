"""What an IP-Adapter costs per UNet call: without a patch, with Luna's, and with keys and values made in every call."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from bench_models import Models, sd15_files, tiny_models
from comfy.ldm.modules.attention import optimized_attention
from luna_refinement.ip_adapter import RowEmbeds
from luna_refinement.ip_adapter.comfy_adapter import IPAdapter
from luna_refinement.ip_adapter.comfy_patch import layers_for, patch_model
from report import Report, Table, median, milliseconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.seeding import generator_for

ROWS, STEPS, REPEATS = 9, 2, 3
WEIGHT = 0.5


class RecomputedAttention:
    """The plain way to replace a cross-attention: image tokens go through to_k_ip and to_v_ip in every call."""

    def __init__(self, embeds: RowEmbeds, to_k: Any, to_v: Any) -> None:
        self.embeds = embeds
        self.to_k = to_k
        self.to_v = to_v

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        heads = extra_options["n_heads"]
        out = optimized_attention(q, k, v, heads)
        cond = self.embeds.cond.to(q)
        uncond = self.embeds.uncond.to(q).expand(len(cond), -1, -1)
        cond_k, cond_v, uncond_k, uncond_v = self.to_k(cond), self.to_v(cond), self.to_k(uncond), self.to_v(uncond)
        roles = extra_options["cond_or_uncond"]
        ip_k = torch.cat([(cond_k, uncond_k)[role] for role in roles])
        ip_v = torch.cat([(cond_v, uncond_v)[role] for role in roles])
        return out + optimized_attention(q, ip_k, ip_v, heads) * WEIGHT


class CountSyncs(TorchDispatchMode):
    """Counts reads of a tensor's value by Python (``float(t)``, ``bool(t)``), which stop the host until the device is
    done; they all go through aten._local_scalar_dense. Counts sizes that depend on values (nonzero) too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.count += 1
        return func(*args, **(kwargs or {}))


def recomputing(model: Any, adapter: IPAdapter, embeds: RowEmbeds) -> Any:
    patched = model.clone()
    device = adapter.load()
    held = RowEmbeds(embeds.cond.to(device), embeds.uncond.to(device))
    layers = adapter.network.key_values
    for layer, to_k, to_v in zip(layers_for(model, adapter), layers.to_k, layers.to_v, strict=True):
        patched.set_model_attn2_replace(RecomputedAttention(held, to_k, to_v), *layer.key)
    return patched


def sample(models: Models, model: Any, side: int) -> Tensor:
    """A KSampler's run over ROWS latents of ``side`` latent px."""
    generator = generator_for("ip_adapter", side)
    latents, noise = (torch.randn(ROWS, 4, side, side, generator=generator) for _ in range(2))
    return comfy.sample.sample(
        model, noise, STEPS, 3.0, "euler", "normal", models.positive, models.negative, latents,
        denoise=0.5, disable_pbar=True, seed=1,
    )  # fmt: skip


def inside_calls(model: Any, before: Callable[[], None], after: Callable[[], None]) -> Any:
    """A clone that says when each UNet call begins and ends."""

    def call(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        before()
        try:
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        finally:
            after()

    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(call)
    return wrapped


def measure(models: Models, side: int) -> list[tuple[str, ...]]:
    generator = generator_for("embeds", models.name)
    layout = models.adapter.layout
    embeds = RowEmbeds(
        torch.randn(ROWS, layout.tokens, layout.cross_dim, generator=generator),
        torch.randn(1, layout.tokens, layout.cross_dim, generator=generator),
    )
    variants = {
        "no patch": models.model,
        "Luna": patch_model(models.model, models.adapter, embeds, weight=WEIGHT),
        "Luna, 0 to 80 % of the schedule": patch_model(
            models.model, models.adapter, embeds, weight=WEIGHT, end_percent=0.8
        ),
        "keys and values in every call": recomputing(models.model, models.adapter, embeds),
    }
    calls: dict[str, list[float]] = {name: [] for name in variants}
    runs: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(REPEATS + 1):  # the first warms up
        for name, model in variants.items():
            ticks: list[float] = []
            tick = _tick_into(ticks)
            start = _now()
            sample(models, inside_calls(model, tick, tick), side)
            stop = _now()
            if repeat:
                runs[name].append(stop - start)
                calls[name] += [end - begin for begin, end in zip(ticks[::2], ticks[1::2], strict=True)]
    rows: list[tuple[str, ...]] = []
    for name, model in variants.items():
        call, run = median(calls[name]), median(runs[name])
        syncs = _syncs(models, model, side)
        over = [call / median(calls["no patch"]), run / median(runs["no patch"])]
        rows.append(
            (models.name, name, milliseconds(call), f"{over[0]:.3f}", milliseconds(run), f"{over[1]:.3f}", f"{syncs:g}")
        )
    return rows


def _tick_into(ticks: list[float]) -> Callable[[], None]:
    return lambda: ticks.append(_now())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _syncs(models: Models, model: Any, side: int) -> float:
    """Per step, inside the UNet calls."""
    counter = CountSyncs()
    sample(models, inside_calls(model, counter.__enter__, lambda: counter.__exit__(None, None, None)), side)
    return counter.count / STEPS


def run(results: Path) -> Report:
    rows = [*measure(sd15_files(), 16), *measure(tiny_models("sd15"), 16), *measure(tiny_models("sdxl"), 16)]
    columns = (
        "model",
        "attention",
        "UNet call, ms",
        "over no patch",
        "sampling call, ms",
        "over no patch ",
        "syncs/step",
    )
    about = (
        f"{ROWS} rows, {STEPS} steps of euler, latents of 16x16, plus adapter of 16 tokens, median of "
        f"{REPEATS} runs in turns. The sampling call holds everything around the UNet calls, also Luna's one "
        "computation of keys and values. Syncs: reads of tensor values by Python inside the UNet calls, counted by "
        "a dispatch mode; those in the row without a patch are ComfyUI's own."
    )
    return Report("ip_adapter", about, (Table("Cost of anchoring rows", columns, tuple(rows)),))
