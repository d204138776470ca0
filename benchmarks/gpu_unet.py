"""The UNet alone: what the device can do, what rows in one call reach of it, their memory, and torch.compile."""

import statistics
from collections.abc import Callable
from typing import Any

import comfy.sample
import torch
import torch._dynamo as dynamo
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy_api.torch_helpers import set_torch_compile_wrapper
from flops import CELL_PX, TERA, unet_tflop
from gpu_clock import GIB, HAS_CUDA, NEEDS_CUDA, Budget, Marks, peak_bytes, timed
from gpu_models import Models
from luna_refinement.batching.comfy_chunks import row_bytes
from luna_refinement.ip_adapter import RowEmbeds
from luna_refinement.ip_adapter.comfy_patch import patch_model
from report import Table
from torch import Tensor
from torch._dynamo.utils import counters

STEPS, CFG = 3, 3.0
LATENTS = (1, 2, 4, 8, 16)
MOST_GRAPHS = 256
"""For torch.compile: ComfyUI numbers its blocks in the options that they read, so each is a graph of its own."""


def anchored(models: Models, rows: int) -> Any:
    """The model with an anchor for each of so many rows."""
    layout = models.adapter.layout
    generator = torch.Generator().manual_seed(rows)
    cond, uncond = (torch.randn(n, layout.tokens, layout.cross_dim, generator=generator) for n in (rows, 1))
    return patch_model(models.model, models.adapter, RowEmbeds(cond, uncond), weight=0.5)


def sample(models: Models, model: Any, rows: int, side: int, cfg: float = CFG, steps: int = STEPS) -> Tensor:
    """[rows,4,side/8,side/8] from a KSampler's run."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 4, side // CELL_PX, side // CELL_PX)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", models.positive, models.negative, latents,
        denoise=0.5, disable_pbar=True, seed=1,
    )  # fmt: skip


def call_seconds(models: Models, model: Any, rows: int, side: int) -> tuple[float, int]:
    """Median time of a UNet call after the first step, and the rows in it; from the device's own clock."""
    marks, sizes = Marks(), []

    def call(apply: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        sizes.append(given["input"].shape[0])
        marks.take()
        try:
            return apply(given["input"], given["timestep"], **given["c"])
        finally:
            marks.take()

    watched = model.clone()
    watched.set_model_unet_function_wrapper(call)
    sample(models, watched, rows, side, steps=STEPS + 1)
    first = len(sizes) // (STEPS + 1)
    return statistics.median(marks.pairs()[first:]), sizes[-1]


def peak_tflops(models: Models) -> float:
    """Of a large matrix product in the model's own number format: the measure of everything else."""
    side, dtype = (512 if models.is_tiny else 8192), models.model.model_dtype()
    a, b = (torch.randn(side, side, device=models.model.load_device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = []
    for _ in range(10):
        marks = Marks()
        marks.take()
        a @ b
        marks.take()
        times += marks.pairs()
    return 2 * side**3 / statistics.median(times) / TERA


def rows(models: Models, budget: Budget) -> list[Table]:
    """Rows in one call, with and without anchors."""
    peak, side = peak_tflops(models), models.sides[0]
    work = unet_tflop(side, models.is_tiny)
    found: list[tuple[str, ...]] = []
    for latents in LATENTS[:2] if models.is_tiny else LATENTS:
        budget.need()
        plain, size = call_seconds(models, models.model, latents, side)
        with_anchors, size_too = call_seconds(models, anchored(models, latents), latents, side)
        rates = [size * work / plain, size_too * work / with_anchors]
        cells = [f"{1000 * plain:.1f}", f"{1000 * with_anchors:.1f}", f"{with_anchors / plain:.3f}"]
        shares = [text for rate in rates for text in (f"{rate:.3g}", f"{rate / peak:.0%}")]
        found.append((f"{latents}", f"{size}", *cells, *shares))
    columns = ("latents", "rows in a call", "UNet call, ms", "anchored, ms", "ratio", "TFLOP/s", "of peak",
               "anchored, TFLOP/s", "of peak ")  # fmt: skip
    number = str(models.model.model_dtype()).removeprefix("torch.")
    title = f"Rows at {side} px in one UNet call; a matrix product in {number} reaches {peak:.3g} TFLOP/s"
    return [Table(title, columns, tuple(found))]


def memory(models: Models, budget: Budget) -> list[Table]:
    """What a row takes while sampling, beside what the plan of chunks reckons with."""
    columns = ("crop, px", "cfg", "ComfyUI's estimate, GiB/row", "planned, GiB/row", "measured, GiB/row", "of planned")
    found: list[tuple[str, ...]] = []
    few, many = (1, 2) if models.is_tiny else (2, 8)
    for side in models.sides:
        planned = row_bytes(models.model, (4, side // CELL_PX, side // CELL_PX))
        for cfg in (1.0, CFG):
            budget.need()
            peaks = []
            for count in (few, many):
                model = anchored(models, count)
                sample(models, model, count, side, cfg, steps=1)
                peaks.append(peak_bytes(lambda: sample(models, model, count, side, cfg, steps=1)))  # noqa: B023
            known = f"{side}", f"{cfg:g}", f"{planned / 1.5 / GIB:.3f}", f"{planned / GIB:.3f}"
            if peaks[0] is None or peaks[1] is None:
                found.append((*known, NEEDS_CUDA, NEEDS_CUDA))
            else:
                measured = (peaks[1] - peaks[0]) / (many - few)
                found.append((*known, f"{measured / GIB:.3f}", f"{measured / planned:.0%}"))
    return [Table(f"Memory of a row: the difference between {few} and {many} anchored rows", columns, tuple(found))]


def compiled(models: Models, budget: Budget) -> list[Table]:
    """torch.compile by ComfyUI's own helper: what dynamo makes of the model with and without anchors, and the gain."""
    backend = "inductor" if HAS_CUDA else "eager"  # without a GPU only what is traced counts
    side, count = models.sides[0], 1 if models.is_tiny else 4
    blocks = [name for name, part in models.model.model.named_modules() if isinstance(part, BasicTransformerBlock)]
    found: list[tuple[str, ...]] = []
    for region, keys in (("transformer blocks", blocks), ("whole UNet", ["diffusion_model"])):
        for name, model in (("text", models.model.clone()), ("anchored", anchored(models, count))):
            budget.need(60 if HAS_CUDA else 0)
            plain, _ = call_seconds(models, model, count, side)
            before = sample(models, model, count, side)
            dynamo.reset()
            counters.clear()
            set_torch_compile_wrapper(model, backend, keys=keys)
            with dynamo.config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=MOST_GRAPHS):
                took = timed(lambda: sample(models, model, count, side))  # noqa: B023 (called at once)
                after = sample(models, model, count, side)
                graphs = counters["stats"]["unique_graphs"]
                then, _ = call_seconds(models, model, count, side)
            again = counters["stats"]["unique_graphs"] - graphs
            differs = (after - before).abs().max() / before.abs().max()
            breaks = sum(counters["graph_break"].values())
            cells = [
                f"{took:.0f}",
                f"{1000 * plain:.1f}",
                f"{1000 * then:.1f}",
                f"{plain / then:.2f}",
                f"{differs:.1e}",
            ]
            found.append((region, name, str(graphs), str(breaks), str(again), *cells))
    dynamo.reset()
    columns = ("compiled", "rows", "graphs", "graph breaks", "graphs made again", "first run, s", "call before, ms",
               "call after, ms", "gain", "result differs by")  # fmt: skip
    return [Table(f"torch.compile, {backend}, {count} latents of {side} px", columns, tuple(found))]
