"""Where the time of a run goes: a timeline of ComfyUI's models, and of what lies between their calls."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_clock import Budget, Traffic, gib, now, peak_bytes
from gpu_models import Models
from gpu_refine import detail, faces, faces_picture
from report import Table


class Timeline:
    """When ComfyUI's models were entered and left; what lies between goes by its neighbours."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, float]] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls.append((name, start, now()))

        return timed

    def watched(self, models: Models) -> dict[str, Any]:
        """Copies of model, VAE and CLIP vision whose calls are noted."""
        model = models.model.clone()
        model.set_model_unet_function_wrapper(
            self.around("UNet", lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
        )
        vae, clip_vision = copy.copy(models.vae), copy.copy(models.clip_vision)
        vae.encode = self.around("VAE encode", models.vae.encode)
        vae.decode = self.around("VAE decode", models.vae.decode)
        clip_vision.encode_image = self.around("CLIP vision", models.clip_vision.encode_image)
        return {"model": model, "vae": vae, "clip_vision": clip_vision}

    def stages(self, start: float, stop: float) -> dict[str, float]:
        """Seconds by stage, from ``start`` to ``stop``."""
        found: dict[str, float] = {}
        before, since = "", start
        for name, entered, left in (*self.calls, ("", stop, stop)):
            gap = _gap(before, name)
            for stage, seconds in ((gap, entered - since), (name, left - entered)):
                found[stage] = found.get(stage, 0.0) + seconds
            before, since = name, left
        found.pop("", None)
        return found


def _gap(before: str, after: str) -> str:
    if before == "VAE decode":
        return "colour match, paste"
    if before == "UNet":
        return "sampler, per step"
    return {"VAE encode": "check, plan, cut", "CLIP vision": "look"}.get(after, "tokens, keys and values, noise")


STAGES = ("check, plan, cut", "VAE encode", "look", "CLIP vision", "tokens, keys and values, noise", "UNet",
          "sampler, per step", "VAE decode", "colour match, paste")  # fmt: skip


def stage_split(models: Models, budget: Budget) -> list[Table]:
    """One anchored run on nine faces by stage, and what it moves and waits for."""
    side, found, steps = models.sides[0], faces(models), models.steps[0]
    stages, traffic = [], []
    for match in ("none", "mean_std", "wavelet"):
        budget.need()
        detail(models, faces_picture(models), found, side, steps, color_match=match)
        line = Timeline()
        watched = Models(**{**vars(models), **line.watched(models)})
        image, start = faces_picture(models), now()
        detail(watched, image, found, side, steps, color_match=match)
        stop = now()
        spent = line.stages(start, stop)
        models_only = sum(spent[stage] for stage in ("VAE encode", "CLIP vision", "UNet", "VAE decode"))
        cells = [f"{1000 * spent.get(stage, 0.0):.0f}" for stage in STAGES]
        stages.append((match, *cells, f"{1 - models_only / (stop - start):.1%}"))
        seen = Traffic()
        image = faces_picture(models)
        with seen:
            detail(models, image, found, side, steps, color_match=match)
        peak = peak_bytes(partial(detail, models, faces_picture(models), found, side, steps, color_match=match))
        traffic.append((match, str(seen.waits), str(seen.copies), f"{seen.bytes / 2**20:.0f}", gib(peak)))
    title = f"{len(found)} anchored faces of {side} px, {steps} steps: ms by stage, with a wait at every border"
    moved = (
        "colour match",
        "host waits for a value",
        "copies between devices",
        "MiB copied",
        "peak beside weights, GiB",
    )
    return [
        Table(title, ("colour match", *STAGES, "beside the models"), tuple(stages)),
        Table("Transfers and memory of the same runs", moved, tuple(traffic)),
    ]
