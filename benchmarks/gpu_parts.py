"""Single parts beside the models: pixels on either device, noise of the stochastic samplers, LoRAs of rows."""

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from flops import CELL_PX
from gpu_clock import HAS_CUDA, Budget, in_turns, timed
from gpu_models import Models, random_weights
from gpu_refine import faces_picture
from gpu_unet import call_seconds
from luna_refinement.batching.color import match_color
from luna_refinement.batching.comfy_row_loras import RowLoras
from luna_refinement.batching.concepts import Lora
from luna_refinement.batching.crops import cut, paste
from luna_refinement.batching.noise import RowBrownianNoise, RowStepNoise
from luna_refinement.picture.boxes import Box
from report import Table
from torch import Tensor, nn

REPEATS, RANK = 5, 16


def pixels(models: Models, budget: Budget) -> list[Table]:
    """Cutting, colour matching and pasting of one crop, where it lies in main memory and on the device."""
    side, box = models.sides[0], models.box_px
    crop = Box(box // 2, box // 2, box // 2 + int(1.3 * box), box // 2 + int(1.3 * box))
    found = []
    for device in [torch.device("cpu"), torch.device("cuda")] if HAS_CUDA else [torch.device("cpu")]:
        works = _works(faces_picture(models)[0].to(device), crop, side)
        times = in_turns(works, REPEATS, budget)
        found.append((str(device), *(f"{1000 * statistics.median(times[name]):.2f}" for name in works)))
    columns = ("device", "cut, ms", "match mean_std, ms", "match wavelet, ms", "paste, ms")
    return [Table(f"Pixels of one crop of {crop.width} px at {side} px", columns, tuple(found))]


def _works(canvas: Tensor, crop: Box, side: int) -> dict[str, Callable[[], object]]:
    """What is done to the px of a crop of the canvas [H,W,3], on its device."""
    before = cut(canvas, crop, side, side)
    after, weights = torch.rand_like(before), torch.ones_like(before[..., 0])
    pasted = torch.ones_like(canvas[: crop.height, : crop.width, 0])
    return {
        "cut": lambda: cut(canvas, crop, side, side),
        "mean_std": lambda: match_color(after, before, weights, "mean_std"),
        "wavelet": lambda: match_color(after, before, weights, "wavelet"),
        "paste": lambda: paste(canvas, after, crop, crop, pasted),
    }


def noise(models: Models, budget: Budget) -> list[Table]:
    """A step's noise for nine rows, beside ComfyUI's own for the whole batch."""
    from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler

    steps, rows = 20, 9
    latent = models.sides[0] // CELL_PX
    x = torch.zeros(rows, 4, latent, latent, device=models.model.load_device)
    sigmas = torch.linspace(14, 0.1, steps + 1, device=x.device)
    seeds = list(range(rows))
    makers: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
        "Luna, per row (DPM++ SDE)": lambda: RowBrownianNoise(x, seeds),
        "Luna, per row (ancestral)": lambda: RowStepNoise(x, seeds),
        "ComfyUI's tree for the batch": lambda: BrownianTreeNoiseSampler(x, sigmas[-1], sigmas[0], seed=1, cpu=True),
    }

    def walk(make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> None:
        draw = make()
        for start, stop in pairwise(sigmas):
            draw(start, stop)

    times = in_turns({name: partial(walk, make) for name, make in makers.items()}, REPEATS, budget)
    each = {name: 1000 * statistics.median(spent) / steps for name, spent in times.items()}
    found = tuple((name, f"{ms:.2f}", f"{ms / rows:.2f}") for name, ms in each.items())
    return [Table(f"Noise of {rows} rows, {steps} steps", ("source", "ms per step", "ms per row and step"), found)]


def row_loras(models: Models, budget: Budget) -> list[Table]:
    """Rows with a LoRA each in one call, beside rows without."""
    budget.need()
    count, side = (2, models.sides[0]) if models.is_tiny else (8, models.sides[0])
    stacks = [(_lora(models, f"lora {row}"),) for row in range(count)]
    loras = RowLoras(models.model, stacks)
    columns = ("rows", "UNet call, ms", "ratio", "made ready in, s")
    if any(loras.needs_own_call(stack) for stack in stacks):
        return [Table("LoRAs of rows: left out, here a row with a LoRA takes a sampling call of its own", columns, ())]
    plain, _ = call_seconds(models, models.model, count, side)
    found = [("without LoRA", f"{1000 * plain:.1f}", "1", "–")]
    for name, given in (("one LoRA for all", stacks[:1] * count), ("a LoRA for each", stacks)):
        budget.need()
        ready = timed(lambda: loras.patched(models.model, given))  # noqa: B023 (called at once)
        call, _ = call_seconds(models, loras.patched(models.model, given), count, side)
        found.append((name, f"{1000 * call:.1f}", f"{call / plain:.2f}", f"{ready:.2f}"))
    title = f"LoRAs of rows: {count} latents of {side} px, rank {RANK} on every linear layer of the transformer blocks"
    return [Table(title, columns, tuple(found))]


def _lora(models: Models, name: str) -> Lora:
    """In the layout of published files."""
    weights: dict[str, Tensor] = {}
    for path, module in models.model.get_model_object("diffusion_model").named_modules():
        if isinstance(module, nn.Linear) and ".transformer_blocks." in path:
            key = f"lora_unet_{path.replace('.', '_')}"
            weights[f"{key}.lora_down.weight"] = random_weights(torch.Size((RANK, module.in_features))).half().cpu()
            weights[f"{key}.lora_up.weight"] = random_weights(torch.Size((module.out_features, RANK)), 0.1).half().cpu()
            weights[f"{key}.alpha"] = torch.tensor(float(RANK))
    return Lora(name, weights, 1.0)
