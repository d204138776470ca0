"""LoRAs per row in one sampling call, against one call per LoRA stack and against a run per row."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from bench_models import sd15_files
from builders.lora_files import EVERYTHING, SD_LINEAR, lora_file
from luna_refinement.batching.comfy_row_loras import LoraStack, RowLoras
from luna_refinement.batching.comfy_sampling import (
    Recipe,
    SamplingSettings,
    ksampler_recipe,
    prepared_noise,
    sample_rows,
)
from luna_refinement.batching.concepts import Lora
from luna_refinement.batching.noise import row_noise
from report import Report, Table, best_times, median, timed
from torch import Tensor

ROWS, SIDE, STEPS, REPEATS = 9, 16, 2, 3
RANK = 32


class Sampling:
    """Nine rows, sampled in whatever calls.

    Attributes:
        unet: seconds of every UNet call.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.unet: list[float] = []
        self._latents = torch.zeros(ROWS, 4, SIDE, SIDE)
        self._noise = prepared_noise(row_noise(range(ROWS), self._latents.shape[1:]))

    def rows(self, model: Any, places: Sequence[int]) -> Tensor:
        """[len(places),4,SIDE,SIDE]"""
        watched = model.clone()
        watched.set_model_unet_function_wrapper(self._timed)
        picked = list(places)
        return sample_rows(
            self.recipe, watched, self.recipe.conditioning, self._latents[picked], self._noise[picked], picked
        )

    def _timed(self, apply_model: Callable[..., Tensor], given: Any) -> Tensor:
        results: list[Tensor] = []
        self.unet.append(timed(lambda: results.append(apply_model(given["input"], given["timestep"], **given["c"]))))
        return results[0]


def loader(model: Any, stack: LoraStack) -> Any:
    """As ComfyUI's own loaders give the model."""
    for lora in stack:
        model = comfy.sd.load_lora_for_models(model, None, lora.weights, lora.strength, 0)[0]
    return model


def stacks_of(model: Any) -> list[LoraStack]:
    """Nine rows, four stacks besides none: of one LoRA and of three, linear layers and convolutions."""
    loras = [
        Lora(str(place), lora_file(model, f"bench {place}", layers, (RANK,), gain=0.05), 0.8)
        for place, layers in enumerate((SD_LINEAR, SD_LINEAR, EVERYTHING, SD_LINEAR))
    ]
    a, b, c, d = loras
    return [(a,), (), (b,), (c,), (a,), (a, b, d), (), (b,), (c,)]


def together(sampling: Sampling, model: Any, stacks: Sequence[LoraStack]) -> Tensor:
    return sampling.rows(RowLoras(model, stacks).patched(model, stacks), range(len(stacks)))


def per_stack(sampling: Sampling, model: Any, stacks: Sequence[LoraStack]) -> Tensor:
    places: dict[LoraStack, list[int]] = {}
    for place, stack in enumerate(stacks):
        places.setdefault(stack, []).append(place)
    return _in_order({tuple(rows): sampling.rows(loader(model, stack), rows) for stack, rows in places.items()})


def per_row(sampling: Sampling, model: Any, stacks: Sequence[LoraStack]) -> Tensor:
    return _in_order({(place,): sampling.rows(loader(model, stack), [place]) for place, stack in enumerate(stacks)})


def _in_order(parts: dict[tuple[int, ...], Tensor]) -> Tensor:
    rows = {place: latent for places, part in parts.items() for place, latent in zip(places, part, strict=True)}
    return torch.stack([rows[place] for place in sorted(rows)])


def totals(sampling: Sampling, model: Any, stacks: Sequence[LoraStack]) -> Table:
    """Whole time, LoRA files parsed and weights merged or loaded included."""
    ways = {
        "one call, LoRAs per row": together,
        "one call per stack, merged": per_stack,
        "a run per row, merged": per_row,
    }
    results: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def variant(name: str, way: Callable[..., Tensor]) -> Callable[[], None]:
        def work() -> None:
            before = len(sampling.unet)
            results[name] = way(sampling, model, stacks)
            calls[name] = len(sampling.unet) - before

        return work

    times = best_times([variant(name, way) for name, way in ways.items()], REPEATS)
    truth = results["a run per row, merged"]
    rows = tuple(
        (
            name,
            str(calls[name]),
            f"{median(spent):.2f}",
            f"{median(times[-1]) / median(spent):.2f}",
            f"{float((results[name] - truth).norm() / truth.norm()):.1e}",
        )
        for name, spent in zip(ways, times, strict=True)
    )
    return Table(f"{ROWS} rows of 4 stacks and none", ("way", "UNet calls", "s", "faster", "off a run per row"), rows)


def unet_calls(sampling: Sampling, model: Any) -> Table:
    """A UNet call with LoRAs over the same call without."""
    lora = Lora("bench", lora_file(model, "bench third", EVERYTHING, (RANK,), gain=0.05), 1.0)
    linear = Lora("linear", lora_file(model, "bench linear", SD_LINEAR, (RANK,), gain=0.05), 1.0)
    third: list[LoraStack] = [(linear,) if place % 3 == 0 else () for place in range(ROWS)]
    cases: dict[str, list[LoraStack]] = {
        "none": [()] * ROWS,
        f"rank {RANK} on a third of the rows, attention and feed-forward": third,
        f"rank {RANK} on a third of the rows, every layer": [(lora,) if stack else () for stack in third],
        f"rank {RANK} on all rows, every layer": [(lora,)] * ROWS,
        "4 stacks and none": stacks_of(model),
    }
    patched = {name: RowLoras(model, stacks).patched(model, stacks) for name, stacks in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(REPEATS + 1):  # turns are taken, the first warms up
        for name, one in patched.items():
            sampling.unet.clear()
            sampling.rows(one, range(ROWS))
            if repeat:
                seconds[name] += sampling.unet
    plain = median(seconds["none"])
    weights = {
        name: sum(factors.model_size() for factors in one.get_additional_models()) for name, one in patched.items()
    }
    rows = tuple(
        (name, f"{median(spent) * 1000:.0f}", f"{median(spent) / plain:.3f}", f"{weights[name] / 2**20:.1f}")
        for name, spent in seconds.items()
    )
    return Table("One UNet call", ("LoRAs", "ms", "over none", "their weights, MiB"), rows)


def memory(sampling: Sampling, model: Any, stacks: Sequence[LoraStack]) -> Table:
    """Peak on the device while sampling, where there is one that counts."""
    rows = []
    for name, way in (("one call, LoRAs per row", together), ("one call per stack, merged", per_stack)):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        way(sampling, model, stacks)
        rows.append((name, f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"))
    return Table("Peak memory of the device", ("way", "MiB"), tuple(rows))


def run(results: Path) -> Report:
    models = sd15_files()
    settings = SamplingSettings(1, STEPS, 3.0, "euler", "normal", 1.0)
    sampling = Sampling(ksampler_recipe(models.model, models.positive, models.negative, settings))
    stacks = stacks_of(models.model)
    tables = [totals(sampling, models.model, stacks), unet_calls(sampling, models.model)]
    if torch.cuda.is_available():
        tables.append(memory(sampling, models.model, stacks))
    about = (
        f"{ROWS} rows at {8 * SIDE} px, {STEPS} steps of euler with two prompts, {models.name}; LoRAs of rank {RANK} "
        f"on attention and feed-forward, one of the four on every layer. Median of {REPEATS}, taken in turns. "
        f"Merging is ComfyUI's own loader. Target: a UNet call at most 1.15 times one without LoRA at rank {RANK} on a "
        "third of the rows."
    )
    return Report("lora", about, tuple(tables))
