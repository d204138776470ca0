"""Where the time of a run with SDXL at full size goes, and what it moves and waits for."""

from functools import partial

from gpu_clock import Budget, Traffic, gib, now, peak_bytes
from gpu_models import Models
from gpu_refine import detail, faces, faces_picture
from report import Table
from timeline import MODELS, STAGES, Timeline


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
        models_only = sum(spent[stage] for stage in MODELS)
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
